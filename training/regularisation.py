"""Penalties on weights: L2 over everything, and DIN's L2 over the rows of a batch.

They act on gradients and weights, not through the loss: the training loss that a run reports is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recsys.batch import Batch
from recsys.embedded import Use, columns_of_side
from recsys.embeddings import ids_of
from training.data import LoadedBatch
from training.optim import TableRows


def add_l2(parameters: Iterable[nn.Parameter], coefficient: float) -> None:
    r"""Adds the gradient of an L2 penalty, :math:`\lambda w`, to every parameter's gradient.

    The penalty is :math:`\frac{\lambda}{2} \sum w^2`, **with the half**, over every weight: of a table, over all rows,
    looked up or not. A recipe that states :math:`\lambda \sum w^2` wants twice its :math:`\lambda` here. Added before
    gradients are clipped and before the optimizer: under Adam that is what a penalty in the loss does, and not what
    AdamW does.

    Args:
        parameters: with dense gradients; one that has none yet gets one.
        coefficient: :math:`\lambda`.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = coefficient * parameter.detach()
        else:
            parameter.grad.add_(parameter.detach(), alpha=coefficient)


def without_biases(parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that L2 is for: all whose own name has no ``bias`` in it."""
    return [p for name, p in parameters.items() if "bias" not in name.rpartition(".")[2]]


def ids_by_table(batch: Batch, uses: Mapping[str, Sequence[Use]]) -> dict[str, Tensor]:
    """Every id that a batch looks up in each table, repeated as it comes.

    Args:
        uses: by table.
    """
    sides = {u.side: columns_of_side(batch, u.side) for places in uses.values() for u in places}
    return {
        table: torch.cat([ids_of(sides[u.side][u.feature])[0] for u in places])
        for table, places in uses.items()
        if places
    }


def count_impressions(
    batches: Iterable[LoadedBatch], uses: Mapping[str, Sequence[Use]], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    r"""In how many training impressions each row of each table occurs: the :math:`n_j` of DIN.

    An impression has the ids of its candidate, its user and context, and its histories as the model sees them; one that
    has an id twice, say as the candidate and in a history, counts once.

    Args:
        batches: everything that an epoch of training sees.
        uses: by table.
        sizes: rows by table.

    Returns:
        (rows,) int64 by table.
    """
    counts = {table: torch.zeros(sizes[table], dtype=torch.int64) for table in uses}
    same: dict[tuple[Use, ...], str] = {}  # tables that are looked up alike are counted once
    for table, places in uses.items():
        same.setdefault(tuple(places), table)
    for loaded in batches:
        for places, table in same.items():
            _count(loaded.batch, places, counts[table])
    return {table: counts[same[tuple(places)]] for table, places in uses.items()}


def _count(batch: Batch, places: Sequence[Use], counts: Tensor) -> None:
    """Adds one batch; a pair of request (or row) and id is one whole number."""
    num_ids, num_requests = len(counts), len(batch.time)
    of_requests, of_rows = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for use in places:
        ids, sizes = ids_of(columns_of_side(batch, use.side)[use.feature])
        if use.side == "candidate":
            of_rows.append(torch.repeat_interleave(torch.arange(batch.num_rows), sizes) * num_ids + ids)
            continue
        owner = torch.arange(num_requests)
        if use.side != "request":
            owner = torch.repeat_interleave(owner, batch.histories[use.side].lengths)
        of_requests.append(torch.repeat_interleave(owner, sizes) * num_ids + ids)
    pairs = torch.cat(of_requests).unique()
    rows_of_request = torch.bincount(batch.request_of_row, minlength=num_requests)
    counts.index_add_(0, pairs % num_ids, rows_of_request[pairs // num_ids])
    rows = torch.cat(of_rows).unique()
    request, ids = batch.request_of_row[rows // num_ids], rows % num_ids
    ids = ids[~torch.isin(request * num_ids + ids, pairs)]
    counts += torch.bincount(ids, minlength=num_ids)


class MiniBatchAwareDecay:
    r"""Mini-batch aware regularisation: the rows of a batch shrink, rare ones more than frequent ones.

    .. math:: w_j \leftarrow w_j - \eta \left( \frac{1}{|B|} \sum_{(x, y) \in B} \frac{\partial L}{\partial w_j}
              + \lambda \frac{\alpha_j}{n_j} w_j \right)

    :math:`\alpha_j` is 1 if the row occurs in the batch, however often, and 0 if not; :math:`n_j` is the number of
    impressions of the training set that it occurs in. The factor 2 of the derivative is in :math:`\lambda`, as in the
    paper. Rows outside the batch are neither read nor written.

    The penalty's part is **decoupled**: it is applied to the weights between the forward and the backward pass, with
    the tables' learning rate of the step. Under SGD that is the paper's equation to the letter, because the gradient
    was taken at the weights before; under an adaptive optimizer the penalty is not rescaled by its state, as in AdamW.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 5.1.

    Args:
        uses: of each table.
        rows: the part of each table that this process holds.
        counts: :math:`n_j` of each table, from :func:`count_impressions`.
        coefficient: :math:`\lambda`; the paper takes 0.01.
        gather: every rank's array, on every rank.
    """

    def __init__(
        self,
        uses: Mapping[str, Sequence[Use]],
        rows: Mapping[str, TableRows],
        counts: Mapping[str, Tensor],
        coefficient: float,
        gather: Callable[[np.ndarray], list[np.ndarray]] = lambda own: [own],
    ) -> None:
        self._uses = {table: places for table, places in uses.items() if places}
        self._rows = rows
        self._gather = gather
        # Tables stand one after the other in one range of numbers, so that ranks exchange all ids at once.
        ends = np.cumsum([len(counts[table]) for table in self._uses])
        self._starts = dict(zip(self._uses, [0, *ends[:-1].tolist()], strict=True))
        self._strength = {table: coefficient / counts[table].clamp(min=1).double() for table in self._uses}

    @torch.no_grad()
    def apply(self, batch: Batch, lr: float) -> None:
        """Shrinks the rows of a batch.

        Args:
            batch: this rank's part of the global batch, on any device.
            lr: of the tables, in this step.
        """
        found = [
            (ids.unique() + self._starts[table]).cpu().numpy() for table, ids in ids_by_table(batch, self._uses).items()
        ]
        occurring = np.unique(np.concatenate(self._gather(np.concatenate(found))))
        for table, start in self._starts.items():
            weight, first = self._rows[table]
            low, high = np.searchsorted(occurring, [start + first, start + first + len(weight)])
            ids = torch.from_numpy(occurring[low:high] - start)
            # DIFF(paper): a row shrinks to 0 at most; a large lambda would turn its sign and then make it grow.
            keep = (1.0 - lr * self._strength[table][ids]).clamp(min=0.0).to(weight.dtype).to(weight.device)[:, None]
            local = (ids - first).to(weight.device)
            # Not an in-place change in the eyes of autograd: no look-up's backward pass reads the weights.
            weight.data.index_copy_(0, local, weight.data.index_select(0, local) * keep)
