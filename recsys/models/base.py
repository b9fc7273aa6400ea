"""What every ranking model is: a look-up and a network."""

from __future__ import annotations

from torch import Tensor, nn

from recsys.batch import Batch
from recsys.embeddings import Lookup


class RankingModel(nn.Module):
    """``logits = network(lookup(batch))``, of shape ``(N, T)``, float32.

    Training runs both halves, sharding touches only ``lookup``, ``torch.export`` takes ``network`` whole, and the
    scorer does the look-up from memory-mapped tables.

    Args:
        lookup: ids to vectors.
        network: :class:`~recsys.embeddings.Embedded` to logits.
    """

    def __init__(self, lookup: Lookup, network: nn.Module) -> None:
        super().__init__()
        self.lookup = lookup
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``(N, T)`` of the batch's candidates."""
        logits: Tensor = self.network(self.lookup(batch))
        return logits
