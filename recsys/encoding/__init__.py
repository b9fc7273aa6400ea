"""Raw values to ids and numbers: fitted once on the training period, applied by one code path everywhere."""

from recsys.encoding.columns import Ragged
from recsys.encoding.encoder import EncodedColumn, Encoder
from recsys.encoding.fitting import EncoderFitter
from recsys.encoding.hashing import hash_keys
from recsys.encoding.key_index import KeyIndex

__all__ = ["EncodedColumn", "Encoder", "EncoderFitter", "KeyIndex", "Ragged", "hash_keys"]
