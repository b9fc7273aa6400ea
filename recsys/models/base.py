"""What every ranking model is: a look-up and a network; what training one may add to its loss; widths of layers."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from recsys.batch import Batch
from recsys.embeddings import Lookup

Width = Annotated[int, Field(ge=1, le=65536)]
"""Of a layer, in a config."""


class TrainingOutput(NamedTuple):
    """What a network with loss terms of its own gives in training.

    Attributes:
        logits: ``(N, T)``, as in inference.
        losses: terms by name, added to the loss of the logits. ``(T,)``: sums over rows by task, weighted as the tasks
            are; a scalar: a sum over rows, weighted already. Sums are over the rows at hand, never means: the objective
            divides by the rows of the global batch.
    """

    logits: Tensor
    losses: dict[str, Tensor]


class RankingModel(nn.Module):
    """``logits = network(lookup(batch))``, of shape ``(N, T)``, float32.

    Training runs both halves, sharding touches only ``lookup``, ``torch.export`` takes ``network`` whole, and the
    scorer does the look-up from memory-mapped tables.

    Args:
        lookup: ids to vectors.
        network: :class:`~recsys.embeddings.Embedded` to logits. One that has loss terms of its own defines
            ``training_forward(embedded, batch) -> TrainingOutput`` too, which training calls instead.
    """

    def __init__(self, lookup: Lookup, network: nn.Module) -> None:
        super().__init__()
        self.lookup = lookup
        self.network = network

    def forward(self, batch: Batch) -> Tensor | TrainingOutput:
        """Logits ``(N, T)`` of the candidates; in training mode with the network's own losses, if it has any."""
        embedded = self.lookup(batch)
        if self.training and hasattr(self.network, "training_forward"):
            output: TrainingOutput = self.network.training_forward(embedded, batch)  # type: ignore[operator]
            return output
        logits: Tensor = self.network(embedded)
        return logits


def split_output(output: Tensor | TrainingOutput) -> TrainingOutput:
    """The same with an empty set of losses where there are none."""
    return output if isinstance(output, TrainingOutput) else TrainingOutput(output, {})
