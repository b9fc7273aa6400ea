"""Metrics of order: AUC, GAUC, NDCG, MRR."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recsys.errors import DataError
from recsys.metrics.checks import labelled, ordered, positive_int, vector


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    r"""Area under the ROC curve: the chance that a random positive is scored above a random negative.

    .. math:: \mathrm{AUC} = \frac{\sum_{i: y_i=1} \sum_{j: y_j=0} w_i w_j
              \left( [s_i > s_j] + \tfrac12 [s_i = s_j] \right)}{\sum_{i: y_i=1} w_i \sum_{j: y_j=0} w_j}

    Computed from ranks in O(n log n), in whole numbers where there are no weights: exact, whatever the order of the
    rows.

    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982 (ties count one
    half).

    Args:
        labels: (n,) 0, 1, or NaN for a row that takes no part.
        scores: (n,) anything that increases with the probability; infinities are allowed.
        weights: (n,) at least 0; all 1 if not given.

    Returns:
        The AUC; NaN if a class has no rows (or no weight).

    Raises:
        DataError: lengths differ, a label is not 0/1/NaN, a score is NaN, a weight is negative or not finite.

    Example:
        >>> auc([1, 0, 0, 1], [0.9, 0.1, 0.9, 0.4])  # pairs: (.9 > .1), (.9 = .9), (.4 > .1), (.4 < .9)
        0.625
    """
    positive, present = labelled(labels)
    values = ordered("scores", scores, length=len(positive))[present]
    positive = positive[present]
    order = np.argsort(values, kind="stable")
    values, positive = values[order], positive[order]
    starts = _starts(values[1:] != values[:-1], len(values))
    if len(starts) == 0:
        return float("nan")
    if weights is None:
        ones = positive.astype(np.int64)
        return float(_pair_ratio(np.add.reduceat(ones, starts), np.add.reduceat(1 - ones, starts)))
    weight = ordered("weights", weights, length=len(present)).astype(np.float64)[present][order]
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise DataError("weights must be finite and at least 0")
    # As shares of each class, so that products of tiny or huge weights neither vanish nor overflow.
    total_positive, total_negative = weight[positive].sum(), weight[~positive].sum()
    if total_positive == 0 or total_negative == 0:
        return float("nan")
    share = weight / np.where(positive, total_positive, total_negative)
    return float(
        _pair_ratio(
            np.add.reduceat(np.where(positive, share, 0.0), starts),
            np.add.reduceat(np.where(positive, 0.0, share), starts),
        )
    )


def _pair_ratio(positives: NDArray[np.generic], negatives: NDArray[np.generic]) -> float:
    """Ratio of ordered pairs, given the weight of each class at each distinct score, ascending."""
    total_positive, total_negative = positives.sum(), negatives.sum()
    if total_positive == 0 or total_negative == 0:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    ordered_twice = (positives * (2 * below + negatives)).sum()
    return float(ordered_twice / (2 * total_positive * total_negative))


@dataclass(frozen=True)
class Gauc:
    """Result of :func:`gauc`.

    Attributes:
        value: the GAUC; NaN if no group has both classes.
        num_groups_used: groups with both classes.
        num_groups: groups with at least one labelled row.
        num_rows_used: labelled rows of the groups used: the sum of the weights.
    """

    value: float
    num_groups_used: int
    num_groups: int
    num_rows_used: int


def gauc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> Gauc:
    r"""Mean of each group's own AUC, weighted by the group's impressions.

    .. math:: \mathrm{GAUC} = \frac{\sum_u n_u \, \mathrm{AUC}_u}{\sum_u n_u}, \qquad
              u \text{ over groups with at least one positive and one negative}

    Ties count one half. Groups of one class are left out of both sums: their AUC is not defined.

    Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, section 6.3.

    Args:
        labels: (n,) 0, 1, or NaN for a row that takes no part.
        scores: (n,) anything that increases with the probability.
        groups: (n,) the group of each row, usually its user: whole numbers or text. Users who share an id (such as the
            id of unknown users) are one group.

    Raises:
        DataError: lengths differ, a label is not 0/1/NaN, a score is NaN, groups are not whole numbers or text.

    Example:
        >>> gauc([1, 0, 0, 1, 1], [0.9, 0.1, 0.8, 0.4, 0.7], [7, 7, 8, 8, 9])
        Gauc(value=0.5, num_groups_used=2, num_groups=3, num_rows_used=4)
    """
    positive, group_starts, ties = _sorted_by_group(labels, scores, groups)
    if len(positive) == 0:
        return Gauc(float("nan"), 0, 0, 0)
    ones = positive.astype(np.int64)
    tie_positives, tie_negatives = np.add.reduceat(ones, ties), np.add.reduceat(1 - ones, ties)
    first_tie = np.searchsorted(ties, group_starts)
    below = np.cumsum(tie_negatives) - tie_negatives
    ties_per_group = np.diff(first_tie, append=len(ties))
    below -= np.repeat(below[first_tie], ties_per_group)
    ordered_twice = np.add.reduceat(tie_positives * (2 * below + tie_negatives), first_tie)
    positives, negatives = np.add.reduceat(tie_positives, first_tie), np.add.reduceat(tie_negatives, first_tie)
    used = (positives > 0) & (negatives > 0)
    rows = (positives + negatives)[used]
    if len(rows) == 0:
        return Gauc(float("nan"), 0, len(group_starts), 0)
    group_auc = ordered_twice[used] / (2 * positives[used] * negatives[used])
    return Gauc(float((rows * group_auc).sum() / rows.sum()), len(rows), len(group_starts), int(rows.sum()))


@dataclass(frozen=True)
class GroupMean:
    """An unweighted mean over the groups where a metric is defined.

    Attributes:
        value: the mean; NaN if no group is used.
        num_groups_used: groups with at least one positive.
        num_groups: groups with at least one labelled row.
    """

    value: float
    num_groups_used: int
    num_groups: int


def ndcg_at_k(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, k: int) -> GroupMean:
    r"""Mean normalised discounted cumulative gain of the first ``k`` rows of each group.

    .. math:: \mathrm{DCG@}k = \sum_{r=1}^{k} \frac{y_{(r)}}{\log_2(1 + r)}, \qquad
              \mathrm{NDCG@}k = \mathrm{DCG@}k \, / \, \text{the largest possible}

    Rows with equal scores get the expectation over their random orders, so the result does not depend on the order of
    the input. Averaged over groups with at least one positive, each group counting once.

    Source: Järvelin and Kekäläinen, TOIS 2002; ties after McSherry and Najork, ECIR 2008, section 3.

    Args:
        k: how many places count, at least 1.

    Raises:
        DataError: as :func:`gauc`, or ``k`` is less than 1.

    Example:
        >>> round(ndcg_at_k([0, 1], [0.9, 0.1], [5, 5], k=10).value, 6)  # 1 / log2(3)
        0.63093
    """
    k = positive_int("k", k)
    positive, group_starts, ties = _sorted_by_group(labels, scores, groups, descending=True)
    if len(positive) == 0:
        return GroupMean(float("nan"), 0, 0)
    discount_sums = _discount_sums(min(k, len(positive)))
    tie_ends = np.append(ties[1:], len(positive))
    group_of_tie = np.searchsorted(group_starts, ties, side="right") - 1
    before, after = ties - group_starts[group_of_tie], tie_ends - group_starts[group_of_tie]
    last = len(discount_sums) - 1
    discounts = discount_sums[np.minimum(after, last)] - discount_sums[np.minimum(before, last)]
    mean_gain = np.add.reduceat(positive.astype(np.int64), ties) / (tie_ends - ties)
    dcg = np.bincount(group_of_tie, weights=mean_gain * discounts, minlength=len(group_starts))
    positives = np.add.reduceat(positive.astype(np.int64), group_starts)
    used = positives > 0
    best = discount_sums[np.minimum(positives[used], last)]
    return _group_mean(dcg[used] / best, len(group_starts))


def _discount_sums(k: int) -> NDArray[np.float64]:
    """(k + 1,) sums of the first 0..k discounts."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2, dtype=np.float64)))])


def mrr(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> GroupMean:
    r"""Mean reciprocal rank of each group's *first* relevant row.

    .. math:: \mathrm{MRR} = \frac{1}{|G|} \sum_{g \in G} \frac{1}{\min_{i \in g,\, y_i = 1} \mathrm{rank}_i}

    Ties count against the model: a row's rank is 1 + the number of negatives scored at least as high, so a constant
    score earns nothing. Averaged over groups with at least one positive, each group counting once.

    Source: Voorhees, "The TREC-8 Question Answering Track Report", 1999.

    Raises:
        DataError: as :func:`gauc`.

    Example:
        >>> mrr([0, 1, 1], [0.9, 0.5, 0.1], [5, 5, 5])
        GroupMean(value=0.5, num_groups_used=1, num_groups=1)
    """
    positive, group_starts, ties = _sorted_by_group(labels, scores, groups, descending=True)
    if len(positive) == 0:
        return GroupMean(float("nan"), 0, 0)
    first_positive = np.flatnonzero(positive)
    group_of_positive = np.searchsorted(group_starts, first_positive, side="right") - 1
    used_groups, first = np.unique(group_of_positive, return_index=True)
    if len(used_groups) == 0:
        return GroupMean(float("nan"), 0, len(group_starts))
    tie = np.searchsorted(ties, first_positive[first], side="right")
    tie_end = np.append(ties, len(positive))[tie]
    negatives_until = np.concatenate([[0], np.cumsum(~positive)])
    rank = 1 + negatives_until[tie_end] - negatives_until[group_starts[used_groups]]
    return _group_mean(1.0 / rank, len(group_starts))


def _group_mean(values: NDArray[np.float64], num_groups: int) -> GroupMean:
    return GroupMean(float(values.mean()) if len(values) else float("nan"), len(values), num_groups)


def rela_impr(auc: float, base: float) -> float:
    r"""Relative improvement of an AUC over a base model's, in percent.

    .. math:: \left( \frac{\mathrm{AUC} - 0.5}{\mathrm{AUC}_\mathrm{base} - 0.5} - 1 \right) \cdot 100

    Source: Zhou et al., KDD 2018, section 6.3 (after Yan et al., ICML 2014).

    Returns:
        Percent; NaN if the base is 0.5 exactly.

    Example:
        >>> round(rela_impr(0.8818, 0.8624), 2)
        5.35
    """
    return float("nan") if base == 0.5 else ((auc - 0.5) / (base - 0.5) - 1.0) * 100.0


def _sorted_by_group(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, *, descending: bool = False
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Sorts labelled rows by group, then score: labels, starts of groups, starts of runs of equal scores."""
    positive, present = labelled(labels)
    values = ordered("scores", scores, length=len(positive))[present]
    ids = _group_ids(vector("groups", groups, length=len(positive))[present])
    order = np.lexsort((-values.astype(np.float64) if descending else values, ids))
    positive, values, ids = positive[present][order], values[order], ids[order]
    new_group = ids[1:] != ids[:-1]
    group_starts = _starts(new_group, len(ids))
    ties = _starts(new_group | (values[1:] != values[:-1]), len(ids))
    return positive, group_starts, ties


def _group_ids(groups: NDArray[np.generic]) -> NDArray[np.generic]:
    if np.issubdtype(groups.dtype, np.integer):
        return groups
    if groups.dtype.kind in "USO":
        try:
            ids: NDArray[np.int64] = np.unique(groups, return_inverse=True)[1]
            return ids
        except TypeError as err:
            raise DataError("groups must be all whole numbers or all text, got a mixture") from err
    raise DataError(f"groups must be whole numbers or text, got {groups.dtype}")


def _starts(changes: NDArray[np.bool_], length: int) -> NDArray[np.int64]:
    """Positions where runs start, given the (length - 1,) changes between neighbours; none if there are no rows."""
    if length == 0:
        return np.zeros(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(changes) + 1]).astype(np.int64)
