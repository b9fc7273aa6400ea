"""A small model with a space of its own and a loss of its own, for the tests of what any such model may do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.batch import Batch
from recsys.embedded import Embedded, Space, uses_of_features
from recsys.embeddings import Lookup
from recsys.losses import binary_cross_entropy
from recsys.models import RankingModel, TrainingOutput
from recsys.schema import Schema

DIM, SPACE_DIM = 4, 8


def space(schema: Schema) -> Space:
    """Of the items, candidates and events alike, and of their tags, which are sets."""
    return Space("role", SPACE_DIM, uses_of_features(schema, ("item_id", "tags")))


class SpacedNetwork(nn.Module):
    """Sums of vectors of both spaces, plus hours since the request, into one linear layer."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.output = nn.Linear(DIM + 2 * SPACE_DIM + 1, num_tasks)
        self.side = nn.Linear(SPACE_DIM, num_tasks)

    def forward(self, embedded: Embedded) -> Tensor:
        history = embedded.histories["clicked"]
        ages = (embedded.time.unsqueeze(1) - history.times).clamp(min=0) / 3.6e9
        valid = torch.arange(ages.shape[1]).unsqueeze(0) < history.lengths.unsqueeze(1)
        age = (torch.where(valid, ages, 0.0).sum(1, keepdim=True) + 1).log()
        past = torch.cat([history.features["item_id@role"].sum(1), age.float()], dim=1)[embedded.request_of_row]
        role = embedded.candidate["item_id@role"] + embedded.candidate["tags@role"]
        logits: Tensor = self.output(torch.cat([embedded.candidate["item_id"], role, past], dim=1))
        return logits

    def training_forward(self, embedded: Embedded, batch: Batch) -> TrainingOutput:
        assert batch.labels is not None
        side = binary_cross_entropy(self.side(embedded.candidate["item_id@role"]), batch.labels).total
        return TrainingOutput(self(embedded), {"side": 0.5 * side, "size": 0.01 * self.output.weight.square().sum()})


def spaced_model(schema: Schema, table_sizes: dict[str, int]) -> RankingModel:
    """With its look-up."""
    lookup = Lookup(schema, table_sizes, DIM, spaces=(space(schema),))
    return RankingModel(lookup, SpacedNetwork(len(schema.tasks)))
