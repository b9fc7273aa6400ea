"""What training minimises: binary cross-entropy, summed over tasks, per row of the global batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.losses import binary_cross_entropy
from recsys.models import TrainingOutput, split_output
from recsys.schema import Schema
from training.balancing import GradNorm, Uncertainty


class Objective(nn.Module):
    r"""Weighted binary cross-entropy over the labels that are there.

    .. math:: \frac1B \sum_{i=1}^{N} \sum_{t=1}^{T} w_t \, m_{it} \, \mathrm{BCE}(\sigma(z_{it}), y_{it})

    with :math:`m_{it} = 1` where the label is present. :math:`B` is the number of rows of the *global* batch: the
    ranks' objectives add up to that of one process, and the update of an embedding row does not depend on how many
    ranks there are. A network's own losses (:class:`~recsys.models.TrainingOutput`) are added before the division. A
    task's loss is not divided by its own number of labels: a rare label must not weigh more in the batches where it is
    rarer still.

    Args:
        schema: gives the tasks, one logit column each.
        task_weights: weight by task; 1 where not given.
        balance: adds up the weighted losses of the tasks; a plain sum if not given.
    """

    weights: Tensor

    def __init__(
        self,
        schema: Schema,
        task_weights: Mapping[str, float],
        balance: Uncertainty | GradNorm | None = None,
    ) -> None:
        super().__init__()
        self.balance = balance
        weights = [task_weights.get(task.name, 1.0) for task in schema.tasks]
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def forward(self, output: Tensor | TrainingOutput, labels: Tensor, num_rows: int) -> Tensor:
        """The loss, a scalar.

        Args:
            output: logits (N, T), or these with a network's own losses, which are added.
            labels: (N, T), 0, 1, or NaN where missing.
            num_rows: rows of the global batch.
        """
        logits, losses = split_output(output)
        sums = binary_cross_entropy(logits, labels)
        of_tasks = sum((loss for loss in losses.values() if loss.dim() == 1), sums.total) * self.weights
        if self.balance is None:
            total = of_tasks.sum()
        else:
            total = self.balance(of_tasks, sums.num_labelled * self.weights)
        total = sum((loss for loss in losses.values() if loss.dim() == 0), total)
        return total / num_rows
