"""Under which bytes an online store keeps what it knows of users and items."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from recsys.encoding.columns import Array, IntKeys, NoKeys, as_keys

Key = int | str

META = b"m"
"""Key of what the store says about itself."""
USER = b"u"
"""What the keys of users begin with."""
ITEM = b"i"
"""What the keys of items begin with."""
_LONGEST_KEY = 400
_NO_KEY = b"-"
"""Asked for in place of a null key; nothing is stored there."""

WORDS = {"integer": "integers", "text": "text"}
"""How messages call types of keys."""


def stored_keys(keys: Array, which: str, prefix: bytes) -> tuple[list[bytes], str | None]:
    """Stored form of keys, and their type: 8 bytes for an integer; for text, its bytes or their hash."""
    parsed = as_keys(keys, where=which)
    if isinstance(parsed, NoKeys):
        return [_NO_KEY] * parsed.length, None
    if isinstance(parsed, IntKeys):
        # After a letter that no text begins with.
        head = prefix + b"n"
        if len(parsed.values) == 1 and parsed.valid is None:
            return [head + int(parsed.values[0]).to_bytes(8, "big", signed=True)], "integer"
        stored = np.empty(len(parsed.values), [("head", f"V{len(head)}"), ("key", ">i8")])
        stored["head"] = np.void(head)
        stored["key"] = parsed.values
        names: list[bytes] = stored.view(f"V{len(head) + 8}").tolist()
        if parsed.valid is not None:
            names = [n if v else _NO_KEY for n, v in zip(names, parsed.valid.tolist(), strict=True)]
        return names, "integer" if parsed.valid is None or parsed.valid.any() else None
    texts = (
        parsed.values
        if parsed.codes is None
        else parsed.values.take(pa.array(parsed.codes, mask=np.asarray(parsed.codes) < 0))
    )
    names = [_NO_KEY if text is None else prefix + _stored_text(text) for text in texts.to_pylist()]
    return names, "text" if texts.null_count < len(texts) else None


def _stored_text(text: str) -> bytes:
    content = text.encode()
    if len(content) <= _LONGEST_KEY:
        return b"t" + content
    return b"#" + blake2b(content, digest_size=32).digest()


def prefixed(prefix: bytes, keys: Sequence[bytes]) -> list[bytes]:
    """The keys under a prefix."""
    return [prefix + key for key in keys]
