from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.batch import Bags, Batch
from recsys.config import validate
from recsys.embedded import Use, columns_of_side, uses_of_tables
from recsys.errors import ConfigError
from recsys.models import RankingModel, build_model
from recsys.models.din import DINConfig
from recsys.training_set import TrainingSet
from tests.synthetic import TABLE_SIZES, random_batch, schema
from training.data import BatchLoader
from training.experiment import TrainingConfig
from training.optim import AdagradConfig, SGDConfig, TableRows, fuse_embeddings, rows_of_tables, table_parameters
from training.regularisation import MiniBatchAwareDecay, add_l2, count_impressions, ids_by_table, without_biases

CPU = torch.device("cpu")


def users(*ids: int) -> Batch:
    """A batch of as many requests, of these users."""
    batch = random_batch(len(ids))
    return replace(batch, user={**batch.user, "user_id": torch.tensor(ids)})


def test_two_batches_of_mini_batch_aware_decay_by_hand() -> None:
    """Row 1 occurs in 4 impressions of the training set, row 2 in 1, row 3 in 2."""
    weight = torch.tensor([[1.0], [1.0], [1.0], [8.0], [5.0]])
    counts = {"user_id": torch.tensor([0, 4, 1, 2, 0])}
    uses = {"user_id": [Use("request", "user_id")]}
    decay = MiniBatchAwareDecay(uses, {"user_id": TableRows(weight, 0)}, counts, 0.4)
    decay.apply(users(1, 2, 1, 1), lr=0.5)  # lr * lambda = .2; row 1, three times there, shrinks once
    torch.testing.assert_close(weight, torch.tensor([[1.0], [1.0 - 0.2 / 4], [1.0 - 0.2 / 1], [8.0], [5.0]]))
    before = weight.clone()
    decay.apply(users(3, 1), lr=0.25)  # lr * lambda = .1
    expected = [[1.0], [0.95 * (1 - 0.1 / 4)], [0.8], [8.0 * (1 - 0.1 / 2)], [5.0]]
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert torch.equal(weight[[0, 2, 4]], before[[0, 2, 4]])


def test_a_row_shrinks_to_nothing_at_most() -> None:
    """A factor below 0 would turn its sign, and one below -1 make it grow at every step."""
    weight = torch.ones(3, 1)
    decay = MiniBatchAwareDecay(
        {"user_id": [Use("request", "user_id")]},
        {"user_id": TableRows(weight, 0)},
        {"user_id": torch.tensor([0, 1, 1000])},
        1000.0,
    )
    decay.apply(users(1, 2), lr=0.05)
    torch.testing.assert_close(weight, torch.tensor([[1.0], [0.0], [0.95]]))


def test_a_rank_shrinks_its_own_rows_by_the_ids_of_all() -> None:
    shard = torch.ones(2, 1)  # rows 2 and 3 of five
    counts = {"user_id": torch.tensor([0, 1, 1, 2, 1])}
    uses = {"user_id": [Use("request", "user_id")]}
    others = np.array([3, 4])
    held = {"user_id": TableRows(shard, 2)}
    MiniBatchAwareDecay(uses, held, counts, 1.0, lambda own: [own, others]).apply(users(1, 1), lr=0.1)
    torch.testing.assert_close(shard, torch.tensor([[1.0], [0.95]]))


@pytest.fixture
def fused_pair() -> Callable[[Any], tuple[RankingModel, RankingModel]]:
    def make(config: Any) -> tuple[RankingModel, RankingModel]:
        torch.manual_seed(0)
        plain = build_model(
            DINConfig(embedding_dim=4, hidden=(6,), attention_hidden=(5,)), schema(), TABLE_SIZES
        ).eval()
        fused = copy.deepcopy(plain)
        fuse_embeddings(fused, config, device=CPU)
        return plain, fused

    return make


def tables(m: RankingModel) -> dict[str, Tensor]:
    return {name: rows.weight.detach().clone() for name, rows in rows_of_tables(m).items()}


def test_with_sgd_a_step_is_the_paper_s_equation(fused_pair: Any) -> None:
    lr, strength = 0.1, 0.5
    plain, fused = fused_pair(SGDConfig(lr=lr))
    uses = fused.lookup.uses
    generator = torch.Generator().manual_seed(3)
    counts = {name: torch.randint(1, 9, (len(t),), generator=generator) for name, t in tables(fused).items()}
    decay = MiniBatchAwareDecay(uses, rows_of_tables(fused), counts, strength)
    batch = random_batch(3, seed=1)
    before = tables(fused)
    plain(batch).sum().backward()
    output = fused(batch).sum()
    decay.apply(batch, lr)
    output.backward()
    occurring = {name: set(ids.tolist()) for name, ids in ids_by_table(batch, uses).items()}
    gradient = {name.split(".")[-2]: p.grad for name, p in table_parameters(plain).items()}
    for name, table in tables(fused).items():
        alpha = torch.tensor([float(j in occurring[name]) for j in range(len(table))])[:, None]
        assert 0 < alpha.sum() < len(table)
        g = gradient[name]
        assert g is not None
        expected = before[name] - lr * (g + strength * alpha / counts[name][:, None] * before[name])
        torch.testing.assert_close(table, expected, rtol=1e-6, atol=1e-7)
        absent = alpha[:, 0] == 0
        assert torch.equal(table[absent], before[name][absent])


def test_an_adaptive_optimizer_does_not_rescale_the_decay(fused_pair: Any) -> None:
    _, fused = fused_pair(AdagradConfig(lr=0.1))
    batch = random_batch(3, seed=1)
    counts = {name: torch.ones(len(t), dtype=torch.int64) for name, t in tables(fused).items()}
    decay = MiniBatchAwareDecay(fused.lookup.uses, rows_of_tables(fused), counts, 0.5)
    start = tables(fused)
    _, other = fused_pair(AdagradConfig(lr=0.1))
    other(batch).sum().backward()
    output = fused(batch).sum()
    decay.apply(batch, 0.1)
    output.backward()
    for name, ids in ids_by_table(batch, fused.lookup.uses).items():
        rows = ids.unique()
        difference = tables(other)[name][rows] - tables(fused)[name][rows]
        torch.testing.assert_close(difference, 0.1 * 0.5 * start[name][rows], rtol=1e-4, atol=1e-7)


def test_impressions_are_counted_as_a_double_loop_counts_them(training_set: TrainingSet) -> None:
    uses = build_model(DINConfig(embedding_dim=4), training_set.schema, training_set.encoder.table_sizes).lookup.uses
    found = count_impressions(BatchLoader(training_set, "train", 64), uses, training_set.encoder.table_sizes)
    expected: dict[str, Counter[int]] = {table: Counter() for table in uses}
    for loaded in BatchLoader(training_set, "train", 1, prefetch=0):  # a request at a time
        batch = loaded.batch
        for row in range(batch.num_rows):
            for table, places in uses.items():
                seen: set[int] = set()
                for use in places:
                    column = columns_of_side(batch, use.side)[use.feature]
                    if use.side != "candidate":
                        ids = column.values if isinstance(column, Bags) else column
                    elif isinstance(column, Bags):
                        ids = column.values[column.offsets[row] : column.offsets[row + 1]]
                    else:
                        ids = column[row : row + 1]
                    seen |= set(ids.tolist())
                expected[table].update(seen)
    assert found.keys() == expected.keys()
    for table, counts in found.items():
        assert {j: n for j, n in enumerate(counts.tolist()) if n} == dict(expected[table]), table
    rows = training_set.split("train").num_rows
    assert max(int(c.max()) for c in found.values()) <= rows
    assert found["user_id"].sum() == rows


def test_l2_is_half_lambda_times_the_squares() -> None:
    table, weight, bias = (torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(3))
    copies = [p.detach().clone().requires_grad_() for p in (table, weight)]
    (sum((p**3).sum() for p in copies) + 0.3 / 2 * sum((p**2).sum() for p in copies)).backward()
    (table**3).sum().backward()
    (weight**3).sum().backward()
    add_l2([table, *without_biases({"a.weight": weight, "a.bias": bias, "attention_bias": bias})], 0.3)
    for ours, theirs in zip((table, weight), copies, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert bias.grad is None


def test_l2_over_tables_needs_an_optimizer_that_sees_all_rows() -> None:
    with pytest.raises(ConfigError, match=r"embedding_l2 must be 0 with embedding_optimizer.kind 'adagrad'"):
        validate(TrainingConfig, {"embedding_l2": 0.05}, source="test")
    validate(TrainingConfig, {"embedding_l2": 0.05, "embedding_optimizer": {"kind": "adam"}}, source="test")


def test_ids_are_counted_in_what_is_learnt_from(training_set: TrainingSet) -> None:
    """Less data and shorter histories give smaller counts, none larger."""
    uses, sizes = uses_of_tables(training_set.schema), training_set.encoder.table_sizes
    whole = count_impressions(BatchLoader(training_set, "train", 64), uses, sizes)
    part = count_impressions(BatchLoader(training_set, "train", 64, fraction=0.5, history_length=1), uses, sizes)
    assert all((part[table] <= whole[table]).all() for table in whole)
    assert 0 < part["item"].sum() < 0.6 * whole["item"].sum()
