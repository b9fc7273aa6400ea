r"""What the roles of embeddings do in a model of long histories: the analyses of the paper on DARE.

Three questions to a trained DARE, TWIN or relative (:class:`~recsys.models.dare.LongHistoryNetwork`):

- *gradients*: which of the two roles, attention and representation, moves a shared table, and do they agree?
- *attention*: do learnt scores rank events as the data do, by mutual information with the label?
- *discriminability*: how much does the pooled history tell about the label?

Source: Feng et al., "Long-Sequence Recommendation Models Need Decoupled Embeddings", ICLR 2025, arXiv 2410.02604,
sections 2 and 5, and the authors' code. What neither decides is tagged ``RECONSTRUCTION``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.batch import Bags, Batch
from recsys.embedded import Embedded
from recsys.errors import ConfigError, DataError
from recsys.models import RankingModel
from recsys.models.dare import DARE_ROLES, DAREConfig, LongHistoryNetwork, TWINConfig
from recsys.schema import Categorical, MultiCategorical, Schema
from recsys.training_set import TrainingSet
from training.data import BatchLoader
from training.objective import Objective

_SPACE = "attention"


def check_model(model: RankingModel) -> LongHistoryNetwork:
    """The network of a model that can be analysed.

    Raises:
        ConfigError: the model has no roles to compare.
    """
    if not isinstance(model.network, LongHistoryNetwork):
        raise ConfigError(
            f"the run's model must be dare or twin, got {type(model.network).__name__}",
            hint="these analyses are about attention and representation vectors; train configs/experiment/dare_*.yaml",
        )
    return model.network


# Gradients


@dataclass(frozen=True)
class TableGradients:
    """How two roles would move one table.

    Attributes:
        attention_norm: length of the attention path's gradient of the table, mean over steps.
        representation_norm: of the representation path's.
        ratio: the second over the first.
        conflicting_steps: share of steps whose two gradients of the table have a negative inner product.
        conflicting_rows: share of rows, over steps, that both paths touch and whose two gradients have one.
        cosine: of the two gradients of the table, mean over steps.
        steps: that had both gradients.
        rows: touched by both, over all steps.
    """

    attention_norm: float
    representation_norm: float
    ratio: float
    conflicting_steps: float
    conflicting_rows: float
    cosine: float
    steps: int
    rows: int


def role_gradients(
    model: RankingModel,
    config: DAREConfig | TWINConfig,
    schema: Schema,
    batches: Iterator[Batch],
    task_weights: Mapping[str, float],
) -> dict[str, TableGradients]:
    """Compares the gradients of the two roles, table by table; nothing is updated.

    As the authors measure it: two tables of equal contents, one a role, and the gradient of each. A model whose roles
    share their tables is rebuilt with two equal ones; where they are apart already, their own are compared.

    The gradient is that of the training loss, the auxiliary head's included. Only tables that both roles look up by
    single ids are compared; sets of ids are pooled before any role sees them.

    Args:
        model: of ``config``; not changed.
        batches: of the training split.
        task_weights: of the run.

    Raises:
        ConfigError: the model has no two roles of equal width to compare.
    """
    network = _with_two_roles(check_model(model), config, schema)
    objective = Objective(schema, task_weights)
    features = _scored_features(schema)
    found: dict[str, list[tuple[float, float, float, int, int]]] = {}
    for batch in batches:
        if batch.labels is None:
            continue
        embedded, leaves = _as_leaves(model.lookup(batch))
        network.train()
        output = network.training_forward(embedded, batch)
        objective(output, batch.labels, batch.num_rows).backward()
        for table, uses in features.items():
            rows, attention, representation = _row_gradients(batch, embedded, leaves, uses)
            if len(rows):
                found.setdefault(table, []).append(_step(attention, representation))
    return {table: _summed(steps) for table, steps in found.items()}


def _with_two_roles(network: LongHistoryNetwork, config: DAREConfig | TWINConfig, schema: Schema) -> LongHistoryNetwork:
    """A copy whose attention vectors have keys of their own, with the same weights."""
    if isinstance(config, TWINConfig) and (
        config.tables != "shared" or config.projection or config.search == "sampling"
    ):
        raise ConfigError(
            "the run's model must be dare, or twin with tables 'shared' and without projection or sampling, "
            f"got {config.tables!r}, projection {config.projection}, search {config.search!r}"
        )
    attention_dim = config.attention_dim if isinstance(config, DAREConfig) else config.embedding_dim
    if attention_dim != config.embedding_dim:
        raise ConfigError(
            f"attention_dim must be embedding_dim to compare gradients, got {attention_dim} and {config.embedding_dim}"
        )
    copied = LongHistoryNetwork(config, schema, DARE_ROLES, attention_dim)
    state = dict(network.state_dict())
    for name in copied.state_dict():
        if name.endswith("attention_slots.weight") and name not in state:
            state[name] = state[name.replace("attention_slots", "slots")]
    copied.load_state_dict(state)
    return copied


def _scored_features(schema: Schema) -> dict[str, list[tuple[str, str]]]:
    """By table, the uses (side, feature) that both roles look up by single ids."""
    found: dict[str, list[tuple[str, str]]] = {}
    for history in schema.histories:
        for name in history.attributes:
            feature = schema.feature(name)
            if isinstance(feature, Categorical) and not isinstance(feature, MultiCategorical):
                uses = found.setdefault(feature.table_name, [])
                uses += [use for use in ((history.name, name), ("candidate", name)) if use not in uses]
    return found


def _as_leaves(embedded: Embedded) -> tuple[Embedded, dict[tuple[str, str], Tensor]]:
    """Every vector of candidates and events a leaf, twice where a role has none of its own."""
    leaves: dict[tuple[str, str], Tensor] = {}

    def made(side: str, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        both = {f"{name}@{_SPACE}": t for name, t in features.items() if "@" not in name} | dict(features)
        copies = {name: t.detach().clone().requires_grad_() for name, t in both.items()}
        leaves.update({(side, name): t for name, t in copies.items()})
        return copies

    return embedded._replace(
        candidate=made("candidate", embedded.candidate),
        histories={n: h._replace(features=made(n, h.features)) for n, h in embedded.histories.items()},
    ), leaves


def _row_gradients(
    batch: Batch, embedded: Embedded, leaves: Mapping[tuple[str, str], Tensor], uses: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (U,) of a table that a batch touches, and the gradients (U, D) of both roles."""
    ids: list[Tensor] = []
    attention: list[Tensor] = []
    representation: list[Tensor] = []
    for side, name in uses:
        columns = {**batch.item, **batch.candidate} if side == "candidate" else batch.histories[side].features
        column = columns[name]
        assert not isinstance(column, Bags)
        values = leaves[side, name]
        if side != "candidate":
            history = embedded.histories[side]
            valid = torch.arange(values.shape[1]) < history.lengths.unsqueeze(1)
        ids.append(column)
        for role, key in ((attention, f"{name}@{_SPACE}"), (representation, name)):
            gradient = leaves[side, key].grad
            gradient = torch.zeros_like(values) if gradient is None else gradient
            role.append(gradient if side == "candidate" else gradient[valid])
    rows, inverse = torch.unique(torch.cat(ids), return_inverse=True)
    zeros = torch.zeros(len(rows), attention[0].shape[1])
    return (
        rows,
        zeros.index_add(0, inverse, torch.cat(attention)),
        zeros.index_add(0, inverse, torch.cat(representation)),
    )


def _step(attention: Tensor, representation: Tensor) -> tuple[float, float, float, int, int]:
    """Norms of both, cosine, conflicting rows, rows that both touch."""
    products = (attention * representation).sum(1)
    both = (attention != 0).any(1) & (representation != 0).any(1)
    a, r = attention.norm().item(), representation.norm().item()
    cosine = products.sum().item() / (a * r) if a * r > 0 else math.nan
    return a, r, cosine, int((products[both] < 0).sum()), int(both.sum())


def _summed(steps: Sequence[tuple[float, float, float, int, int]]) -> TableGradients:
    values = np.array(steps, dtype=np.float64)
    cosines = values[~np.isnan(values[:, 2]), 2]
    attention, representation = values[:, 0].mean(), values[:, 1].mean()
    rows = values[:, 4].sum()
    return TableGradients(
        attention_norm=float(attention),
        representation_norm=float(representation),
        ratio=float(representation / attention) if attention > 0 else math.nan,
        conflicting_steps=float((cosines < 0).mean()) if len(cosines) else math.nan,
        conflicting_rows=float(values[:, 3].sum() / rows) if rows else math.nan,
        cosine=float(cosines.mean()) if len(cosines) else math.nan,
        steps=len(cosines),
        rows=int(rows),
    )


# Attention


def mutual_information(both: np.ndarray, event: np.ndarray, label: np.ndarray, total: np.ndarray) -> np.ndarray:
    r"""Mutual information of two binary variables in bits, from counts.

    .. math:: I = \sum_{x, y} p_{xy} \log_2 \frac{p_{xy} + \epsilon}{p_x\, p_y + \epsilon}, \qquad \epsilon = 10^{-5}

    Source: the code of DARE's authors, as to the four cells, the base and the smoothing.

    Args:
        both: how often event and label are both 1; any shape, as the others.
        event: how often the event is 1.
        label: how often the label is 1.
        total: of all cases, above 0.

    Example:
        >>> counts = np.array([[50], [50], [50], [100]])  # one decides the other: one bit
        >>> float(mutual_information(*counts).round(3)[0])
        1.0
    """
    epsilon = 1e-5
    p_event, p_label = event / total, label / total
    cells = [
        (both / total, p_event * p_label),
        ((event - both) / total, p_event * (1 - p_label)),
        ((label - both) / total, (1 - p_event) * p_label),
        ((total - event - label + both) / total, (1 - p_event) * (1 - p_label)),
    ]
    return np.asarray(sum(p * np.log2((p + epsilon) / (q + epsilon)) for p, q in cells))


@dataclass(frozen=True)
class AttentionAccuracy:
    """How well learnt scores rank events.

    Attributes:
        ndcg: of the ranking of (category, place) by mean score, gains the mutual information; mean over the candidates'
            categories.
        random_ndcg: of a random ranking, for comparison; mean over as many shuffles.
        target_categories: of candidates that had enough.
        pairs: of a category and a place that were ranked, over all of them.
    """

    ndcg: float
    random_ndcg: float
    target_categories: int
    pairs: int


def attention_accuracy(
    target: np.ndarray,
    events: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    min_rows: int = 200,
    min_pairs: int = 20,
    seed: int = 0,
) -> AttentionAccuracy:
    """Compares learnt scores with what the data say of each category of events at each place of the history.

    For candidates of one category, the truth about events of category c at place p is the mutual information between
    "such an event is there" and the label; the model's word is the mean score that it gives these events.

    RECONSTRUCTION: the mean over events, linear gains, the ranking of all pairs seen often enough at once, and the
    lower bounds are ours.

    Args:
        target: (N,) category of each candidate.
        events: (N, P) category of the newest event, the one before, and so on; below 0 where there is none.
        scores: (N, P) of these.
        labels: (N,) 0 or 1.
        min_rows: of a category of candidates.
        min_pairs: events of a category at a place.
        seed: of the shuffles.
    """
    generator, ndcgs, shuffled, pairs = np.random.default_rng(seed), [], [], 0
    num_categories, places = int(events.max(initial=0)) + 1, events.shape[1]
    values, counts = np.unique(target, return_counts=True)
    for category in values[counts >= min_rows]:
        rows = target == category
        here, there = events[rows], events[rows] >= 0
        key = (here + num_categories * np.arange(places))[there]
        size = num_categories * places
        seen = np.bincount(key, minlength=size).astype(np.float64)
        label = np.broadcast_to(labels[rows, None], here.shape)[there]
        clicked = np.bincount(key, label, minlength=size)
        score = np.bincount(key, scores[rows][there], minlength=size)
        enough = seen >= min_pairs
        if enough.sum() < 2:
            continue
        total, positive = np.full(size, float(rows.sum())), np.full(size, float(labels[rows].sum()))
        gains = np.maximum(mutual_information(clicked, seen, positive, total)[enough], 0.0)
        if gains.max() <= 0:
            continue
        ndcgs.append(_ndcg(gains, score[enough] / seen[enough]))
        shuffled.append(np.mean([_ndcg(gains, generator.random(len(gains))) for _ in range(20)]))
        pairs += int(enough.sum())
    if not ndcgs:
        raise DataError(
            f"the split must have a category of candidates with {min_rows} rows, and with pairs of a category and a "
            f"place seen {min_pairs} times, got none",
            hint="analyse another split or feature, or lower the bounds",
        )
    return AttentionAccuracy(float(np.mean(ndcgs)), float(np.mean(shuffled)), len(ndcgs), pairs)


def _ndcg(gains: np.ndarray, scores: np.ndarray) -> float:
    """NDCG with linear gains over the whole list."""
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    ranked = gains[np.argsort(-scores, kind="stable")]
    return float((ranked * discounts).sum() / (np.sort(gains)[::-1] * discounts).sum())


# Discriminability


def cluster(
    points: np.ndarray, num_clusters: int, *, steps: int = 100, batch_size: int = 1024, seed: int = 0
) -> np.ndarray:
    """Cluster (N,) of each point (N, D), by mini-batch k-means.

    Source: Sculley, "Web-Scale K-Means Clustering", WWW 2010, algorithm 1: centres start at points drawn at random, and
    each moves to the points of a batch that are nearest to it, by one over the points that it has had.

    Raises:
        ConfigError: there are fewer points than clusters.
    """
    if not 1 <= num_clusters <= len(points):
        raise ConfigError(f"num_clusters must be in [1, {len(points)}], the points there are, got {num_clusters}")
    generator = np.random.default_rng(seed)
    centres = points[generator.choice(len(points), num_clusters, replace=False)].astype(np.float64)
    had = np.zeros(num_clusters)
    for _ in range(steps):
        batch = points[generator.integers(0, len(points), min(batch_size, len(points)))]
        nearest = _nearest(batch, centres)
        count = np.bincount(nearest, minlength=num_clusters)
        total = np.zeros_like(centres)
        np.add.at(total, nearest, batch)
        # One point after the other, each by 1 / (points had so far), is the mean of all that were had.
        hit = count > 0
        centres[hit] = (centres[hit] * had[hit, None] + total[hit]) / (had[hit] + count[hit])[:, None]
        had += count
    return _nearest(points, centres)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N,) index of the nearest centre, in blocks that stay small."""
    norms = (centres**2).sum(1)
    blocks = [
        np.argmin(norms - 2 * points[start : start + 4096] @ centres.T, axis=1) for start in range(0, len(points), 4096)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)


def information_of_clusters(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Mutual information in bits between cluster and label, of the counts as they are.

    It grows with the number of clusters even where there is nothing to tell, by about (clusters - 1) / (2 N ln 2):
    compare models at equal numbers of clusters and rows.
    """
    _, cluster_of_row = np.unique(clusters, return_inverse=True)
    seen = np.bincount(cluster_of_row)
    clicked = np.bincount(cluster_of_row, labels)
    total = len(labels)
    found = 0.0
    for counts, share in ((clicked, labels.mean()), (seen - clicked, 1 - labels.mean())):
        some = counts > 0
        found += float((counts[some] / total * np.log2(counts[some] / (seen[some] * share))).sum())
    return max(found, 0.0)


# Over a training set


@dataclass(frozen=True)
class Scored:
    """What a network makes of a split, row by row.

    Attributes:
        labels: (N,) of one task.
        pooled: (N, V) what the head takes of the history, the target-aware part.
        target: (N,) category of the candidate.
        events: (N, P) category of the newest events, newest first; -1 where there is none.
        scores: (N, P) attention scores of these.
    """

    labels: np.ndarray
    pooled: np.ndarray
    target: np.ndarray
    events: np.ndarray
    scores: np.ndarray


def scored_rows(
    model: RankingModel,
    training_set: TrainingSet,
    split: str,
    *,
    task: str,
    history: str,
    feature: str,
    places: int,
    max_rows: int,
    batch_size: int = 1024,
    history_length: int | None = None,
) -> Scored:
    """Runs the network over the first rows of a split that have the task's label.

    Args:
        history: whose events are looked at.
        feature: the history's attribute that is the category; single ids.
        places: newest events to look at.
        history_length: newest events that the model reads, as it was trained with; the schema's bounds if not given.

    Raises:
        ConfigError: the model, history or feature is none that can be analysed.
    """
    network, schema = check_model(model), training_set.schema
    categories = categories_of(schema, history)
    if feature not in categories:
        raise ConfigError(f"feature must be one of {', '.join(categories)}, got {feature!r}")
    column = [t.name for t in schema.tasks].index(task)
    searched = network.histories[[h.name for h in schema.histories].index(history)]
    if searched.search == "sampling":
        raise ConfigError("the run's model must score events, got search 'sampling', which pools those of equal signs")
    parts: list[tuple[np.ndarray, ...]] = []
    rows = 0
    for batch in batches_of(training_set, split, batch_size, history_length=history_length):
        with torch.no_grad():
            embedded = model.eval().lookup(batch)
            pooled = searched(embedded)[:, -searched.values_size :]  # type: ignore[operator]
            scores = searched.scores(embedded)  # type: ignore[operator]
        found = batch.histories[history]
        # The newest event is at place 0: count back from each history's end.
        age = found.lengths.unsqueeze(1) - 1 - torch.arange(places)
        at = (found.offsets[:-1].unsqueeze(1) + age.clamp(min=0)).clamp(max=max(len(found.times) - 1, 0))
        ids, target = found.features[feature], {**batch.item, **batch.candidate}[feature]
        assert isinstance(ids, Tensor)
        assert isinstance(target, Tensor)
        of_row = batch.request_of_row
        events = torch.where(age >= 0, ids[at], -1) if len(ids) else torch.full(age.shape, -1)
        placed = scores.gather(1, age.clamp(min=0)[of_row].clamp(max=scores.shape[1] - 1))
        assert batch.labels is not None
        labels = batch.labels[:, column]
        kept = ~labels.isnan()
        parts.append(tuple(t[kept].numpy() for t in (labels, pooled, target, events[of_row], placed)))
        rows += int(kept.sum())
        if rows >= max_rows:
            break
    if rows == 0:
        raise DataError(f"split {split!r} must have rows with a label of {task!r}, got none")
    return Scored(*(np.concatenate(columns)[:max_rows] for columns in zip(*parts, strict=True)))


def categories_of(schema: Schema, history: str) -> list[str]:
    """Attributes of a history that may be its events' category: those of single ids.

    Raises:
        ConfigError: there is no such history, or it has none.
    """
    names = [h.name for h in schema.histories]
    if history not in names:
        raise ConfigError(f"history must be one of {', '.join(names)}, got {history!r}")
    found = [
        name
        for name in schema.history(history).attributes
        if isinstance(kind := schema.feature(name), Categorical) and not isinstance(kind, MultiCategorical)
    ]
    if not found:
        raise ConfigError(f"history {history!r} must have an attribute with one category each, got none")
    return found


def batches_of(
    training_set: TrainingSet,
    split: str,
    batch_size: int,
    *,
    limit: int | None = None,
    history_length: int | None = None,
) -> Iterator[Batch]:
    """Batches of a split in its order.

    Args:
        limit: the first ones only.
        history_length: newest events of each history, as the run was trained with; the schema's bounds if not given.
    """
    with closing(iter(BatchLoader(training_set, split, batch_size, history_length=history_length))) as loaded:
        for each in loaded:
            if limit is not None and each.index >= limit:
                return
            yield each.batch


def as_json(value: TableGradients | AttentionAccuracy) -> dict[str, Any]:
    """As plain JSON."""
    return asdict(value)
