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
    DenseAdagradConfig,
    DenseAdamConfig,
    DenseAdamWConfig,
    DenseSGDConfig,
    RowwiseAdagradConfig,
    SGDConfig,
    dense_optimizer,
    dense_parameters,
    fuse_embeddings,
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
