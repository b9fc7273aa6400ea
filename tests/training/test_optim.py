from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.errors import ConfigError
from recsys.models import RankingModel, build_model
from recsys.models.din import DINConfig
from tests.synthetic import TABLE_SIZES, random_batch, schema
from training.optim import (
    AdagradConfig,
    AdamConfig,
    DenseAdagradConfig,
    DenseAdamConfig,
    DenseAdamWConfig,
    DenseSGDConfig,
    LazyAdam,
    LazyAdamConfig,
    RowwiseAdagradConfig,
    SGDConfig,
    clip_gradients,
    dense_optimizer,
    dense_parameters,
    fuse_embeddings,
    optimize_tables,
    table_parameters,
)

CPU = torch.device("cpu")


def model(seed: int = 0) -> RankingModel:
    torch.manual_seed(seed)
    return build_model(DINConfig(embedding_dim=4, hidden=(6,), attention_hidden=(5,)), schema(), TABLE_SIZES)


def tables(m: torch.nn.Module) -> dict[str, Tensor]:
    return {k.split(".")[-2]: v.detach().clone() for k, v in m.state_dict().items() if "embedding_bags" in k}


def gradients(m: RankingModel, weight: Tensor, batch: Any) -> dict[str, Tensor]:
    """The dense gradient of each table, by plain torch."""
    plain = copy.deepcopy(m)
    (plain(batch) * weight).sum().backward()
    return {k.split(".")[-2]: p.grad for k, p in plain.named_parameters() if "embedding_bags" in k}


def reference_step(config: Any, weight: Tensor, gradient: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of the optimizer over the whole table, from its definition, in float64."""
    w, g = weight.double(), gradient.double()
    if isinstance(config, SGDConfig):
        return (w - config.lr * g).float(), None
    if isinstance(config, AdagradConfig):
        state = torch.zeros_like(w) if state is None else state
        state = state + g**2
        return (w - config.lr * g / (state.sqrt() + config.eps)).float(), state
    state = torch.zeros(len(w), 1, dtype=torch.float64) if state is None else state
    state = state + (g**2).mean(1, keepdim=True)
    return (w - config.lr * g / (state.sqrt() + config.eps)).float(), state


@pytest.mark.parametrize(
    "config",
    [
        RowwiseAdagradConfig(lr=0.1),
        AdagradConfig(lr=0.1),
        SGDConfig(lr=0.1),
    ],
    ids=["rowwise_adagrad", "adagrad", "sgd"],
)
def test_fused_steps_are_the_optimizer_s_definition_on_looked_up_rows_alone(config: Any) -> None:
    plain = model().eval()
    fused = copy.deepcopy(plain)
    fuse_embeddings(fused, config, device=CPU)
    states: dict[str, Tensor | None] = {}
    for step in range(3):
        batch = random_batch(3, seed=step)
        weight = torch.randn(batch.num_rows, 2)
        gradient = gradients(plain, weight, batch)
        (fused(batch) * weight).sum().backward()
        before, after = tables(plain), tables(fused)
        for name, table in before.items():
            expected, states[name] = reference_step(config, table, gradient[name], states.get(name))
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)
            untouched = (gradient[name] == 0).all(1)
            assert untouched.any()
            assert torch.equal(after[name][untouched], table[untouched])
        plain.load_state_dict(fused.state_dict())


def test_fusing_changes_neither_weights_nor_names_nor_scores() -> None:
    plain = model().eval()
    fused = copy.deepcopy(plain)
    fuse_embeddings(fused, AdagradConfig(), device=CPU)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value), name
    batch = random_batch(5)
    torch.testing.assert_close(fused(batch), plain(batch), rtol=1e-6, atol=1e-7)


def test_dense_parameters_are_all_but_the_tables() -> None:
    m = model()
    names = set(dense_parameters(m))
    assert names == {n for n, _ in m.named_parameters() if "embedding_bags" not in n}
    assert names
    fuse_embeddings(m, AdagradConfig(), device=CPU)
    assert set(dense_parameters(m)) == names


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (DenseAdamConfig(lr=0.1, weight_decay=0.3), lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3)),
        (DenseAdamWConfig(lr=0.1, weight_decay=0.3), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3)),
        (DenseAdagradConfig(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (DenseSGDConfig(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
    ids=["adam", "adamw", "adagrad", "sgd"],
)
def test_state_allocated_ahead_takes_the_steps_of_a_fresh_optimizer(config: Any, reference: Any) -> None:
    start = torch.tensor([1.0, -2.0, 3.0])
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, fresh = dense_optimizer(config, {"w": ours}), reference([theirs])
    assert torch.equal(ours, start)
    assert set(optimizer.state_dict()["state"]) == {"w"}
    for step in range(3):
        for p in (ours, theirs):
            p.grad = torch.tensor([0.5, -1.0, 2.0]) * (step + 1)
        optimizer.step()
        fresh.step()
        assert torch.equal(ours, theirs)


def test_a_table_with_more_rows_than_fbgemm_can_count_is_refused() -> None:
    table = EmbeddingBagConfig(name="huge", embedding_dim=4, num_embeddings=2**31, feature_names=["huge"])
    holder = torch.nn.Sequential(EmbeddingBagCollection([table], device=torch.device("meta")))
    with pytest.raises(ConfigError, match=r"table 'huge' must have at most 2,147,483,647 rows.*got 2,147,483,648"):
        fuse_embeddings(holder, SGDConfig(), device=CPU)


def sparse(rows: list[int], values: Tensor, num_rows: int) -> Tensor:
    shape = (num_rows, values.shape[1])
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, shape, check_invariants=True)


def lazy_adam_step(config: LazyAdamConfig, w: Tensor, g: Tensor, state: dict[str, Any], looked_up: list[int]) -> Tensor:
    """From the definition, row by row, in float64."""
    beta1, beta2 = config.betas
    state["t"] = state.get("t", 0) + 1
    m, v = state.setdefault("m", torch.zeros_like(w)), state.setdefault("v", torch.zeros_like(w))
    result = w.clone()
    for j in looked_up:
        m[j] = beta1 * m[j] + (1 - beta1) * g[j]
        v[j] = beta2 * v[j] + (1 - beta2) * g[j] ** 2
        m_hat, v_hat = m[j] / (1 - beta1 ** state["t"]), v[j] / (1 - beta2 ** state["t"])
        result[j] = w[j] - config.lr * m_hat / (v_hat.sqrt() + config.eps)
    return result


def test_adam_of_tables_is_adam_on_the_dense_gradient() -> None:
    config = AdamConfig(lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    plain = model().eval()
    ours = copy.deepcopy(plain)
    reference = torch.optim.Adam(table_parameters(plain).values(), lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    optimizer = optimize_tables(table_parameters(ours), ours, config)
    for step in range(6):
        batch = random_batch(3, seed=step)
        weight = torch.randn(batch.num_rows, 2, generator=torch.Generator().manual_seed(step))
        before = tables(ours)
        for m, o in ((plain, reference), (ours, optimizer)):
            o.zero_grad()
            (m(batch) * weight).sum().backward()
        untouched = {
            k.split(".")[-2]: (p.grad == 0).all(1) for k, p in table_parameters(ours).items() if p.grad is not None
        }
        for o in (reference, optimizer):
            o.step()
        for name, table in tables(ours).items():
            torch.testing.assert_close(table, tables(plain)[name], rtol=0, atol=1e-6)
        if step == 5:  # rows outside the batch go on along their moments: that is what "lazy" is without
            moved = [(tables(ours)[name] != before[name])[rows].any() for name, rows in untouched.items()]
            assert any(moved)


def test_lazy_adam_is_its_definition_on_looked_up_rows_alone() -> None:
    config = LazyAdamConfig(lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    weight = torch.nn.Parameter(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = LazyAdam([weight], lr=config.lr, betas=config.betas, eps=config.eps)
    expected, state = weight.detach().double(), dict[str, Any]()
    for step, ids in enumerate([[1, 1, 4], [4], [], [2, 1, 4, 2]]):
        gradient = torch.randn(len(ids), 3, generator=torch.Generator().manual_seed(step + 1))
        dense = torch.zeros(7, 3, dtype=torch.float64)
        for j, g in zip(ids, gradient.double(), strict=True):
            dense[j] += g
        weight.grad = sparse(ids, gradient, 7)
        before = weight.detach().clone()
        optimizer.step()
        expected = lazy_adam_step(config, expected, dense, state, sorted(set(ids)))
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
        rest = [j for j in range(7) if j not in ids]
        assert torch.equal(weight[rest], before[rest])
    assert float(optimizer.state[weight]["step"]) == 4


def test_lazy_adam_is_adam_where_every_row_is_in_every_batch() -> None:
    start = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    lazy, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours, adam = (
        LazyAdam([lazy], lr=0.1, betas=(0.9, 0.99), eps=1e-3),
        torch.optim.Adam([plain], 0.1, (0.9, 0.99), 1e-3),
    )
    for step in range(4):
        plain.grad = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
        lazy.grad = plain.grad.to_sparse(1)
        ours.step()
        adam.step()
        torch.testing.assert_close(lazy, plain, rtol=0, atol=1e-6)


def test_lazy_adam_trains_the_tables_of_a_model_by_the_rows_it_looks_up() -> None:
    m = model().train()
    parameters = table_parameters(m)
    optimizer = optimize_tables(parameters, m, LazyAdamConfig(lr=0.05))
    assert set(optimizer.state_dict()["state"]) == set(parameters)
    before = tables(m)
    batch = random_batch(3)
    m(batch).sum().backward()
    touched = {}
    for name, p in parameters.items():
        assert p.grad is not None
        assert p.grad.is_sparse
        touched[name.split(".")[-2]] = p.grad.coalesce().indices()[0]
    optimizer.step()
    for name, table in tables(m).items():
        changed = (table != before[name]).any(1).nonzero().flatten()
        assert len(changed)
        assert set(changed.tolist()) <= set(touched[name].tolist())


def test_clipping_bounds_the_norm_of_dense_and_sparse_gradients_together() -> None:
    dense, table = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 1))
    dense.grad = torch.tensor([3.0, 0.0])
    # The two entries of row 1 are one gradient of 4: the norm is 5, not sqrt(9 + 4 + 4).
    table.grad = sparse([1, 1], torch.tensor([[2.0], [2.0]]), 3)
    clip_gradients([dense, table, torch.nn.Parameter(torch.zeros(1))], 2.5)
    torch.testing.assert_close(dense.grad, torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(table.grad.to_dense(), torch.tensor([[0.0], [2.0], [0.0]]))
    clip_gradients([dense, table], 100.0)
    torch.testing.assert_close(dense.grad, torch.tensor([1.5, 0.0]))
    clip_gradients([], 1.0)
