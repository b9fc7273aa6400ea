"""MMoE and PLE agree with their equations computed one expert at a time; who reads which expert is as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from recsys.config import Config, validate
from recsys.embedded import Embedded
from recsys.errors import ConfigError, SchemaError
from recsys.layers.experts import Experts, ExpertsOfOwnInputs
from recsys.models import build_model
from recsys.models.mmoe import MMoE, MMoEConfig
from recsys.models.ple import PLE, PLEConfig
from recsys.schema import Schema
from tests.references import experts as reference
from tests.references.din import attend
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema

NUM_TASKS = 2


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
            tensor.copy_(drawn + 1.5 if name.endswith("running_var") else drawn)
    return network


def expected_logits(config: Any, network: nn.Module, embedded: Embedded) -> np.ndarray:
    plain = lambda features: {name: t.detach().double().numpy() for name, t in features.items()}  # noqa: E731
    request, candidate = plain(embedded.request), plain(embedded.candidate)
    histories = {name: (plain(h.features), h.lengths.tolist()) for name, h in embedded.histories.items()}
    keys = {"clicked": ["item_id", "category", "tags", "dwell"], "seen": ["item_id"]}
    weights = {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()}
    logits = []
    for row, r in enumerate(embedded.request_of_row.tolist()):
        of_events = [([histories[h][0][name][r] for name in names], histories[h][1][r]) for h, names in keys.items()]
        is_averaged = config.history_pooling == "mean"
        x = reference.pooled_inputs(
            [request[name][r] for name in ("user_id", "age", "interests", "hour")],
            of_events if is_averaged else [],
            [candidate[name][row] for name in ("item_id", "category", "tags", "price", "source")],
        )
        for number, (h, (attributes, length)) in enumerate(zip(keys, [] if is_averaged else of_events, strict=False)):
            query = np.concatenate([candidate[name][row] for name in keys[h] if name != "dwell"])
            events = np.concatenate(attributes, axis=1)[:length]
            x = np.concatenate([x, attend(query, events, weights, f"inputs.histories.{number}.attention.unit")])
        if isinstance(config, MMoEConfig):
            logits.append(reference.mmoe(x, weights, config.num_experts, NUM_TASKS))
        else:
            sizes = config.num_levels, config.num_task_experts, config.num_shared_experts
            logits.append(reference.ple(x, weights, *sizes, NUM_TASKS))
    return np.array(logits)


@pytest.mark.parametrize(
    "config",
    [
        MMoEConfig(embedding_dim=4, num_experts=3, expert_hidden=(6, 5), tower_hidden=(4,)),
        MMoEConfig(embedding_dim=4, num_experts=1, expert_hidden=(6,), tower_hidden=(4, 3)),
        MMoEConfig(embedding_dim=4, history_pooling="din", num_experts=2, expert_hidden=(6,), tower_hidden=(4,)),
        PLEConfig(embedding_dim=4, num_levels=1, expert_hidden=(6, 5), tower_hidden=(4,)),
        PLEConfig(embedding_dim=4, num_levels=2, expert_hidden=(6, 5), tower_hidden=(4,)),
        PLEConfig(embedding_dim=4, history_pooling="din", num_levels=2, expert_hidden=(6, 5), tower_hidden=(4,)),
        PLEConfig(
            embedding_dim=4,
            num_levels=3,
            num_task_experts=2,
            num_shared_experts=3,
            expert_hidden=(5,),
            tower_hidden=(4,),
        ),
    ],
)
def test_logits_equal_the_equations_in_float64(config: Config) -> None:
    model = build_model(config, schema(), TABLE_SIZES).eval()
    scrambled(model, seed=1)
    embedded = model.lookup(random_batch(5, max_rows=3, seed=2))
    assert any((h.lengths == 0).any() for h in embedded.histories.values())
    expected = expected_logits(config, model.network, embedded)
    np.testing.assert_allclose(model.network(embedded).detach(), expected, rtol=1e-5, atol=1e-6)
    double = tree_map(lambda t: t.double() if t.is_floating_point() else t, embedded)
    np.testing.assert_allclose(model.network.double()(double).detach(), expected, rtol=1e-9, atol=1e-10)


def reads(network: nn.Module, embedded: Embedded, parameter: Tensor) -> list[list[bool]]:
    """(T, K): whether a task's logits depend on each expert's last layer."""
    logits = network(embedded)
    rows = []
    for task in range(NUM_TASKS):
        (gradient,) = torch.autograd.grad(logits[:, task].sum(), parameter, retain_graph=True)
        rows.append((gradient != 0).flatten(1).any(1).tolist())
    return rows


def looked_up(seed: int) -> Embedded:
    torch.manual_seed(seed)
    lookup = build_model(MMoEConfig(embedding_dim=4), schema(), TABLE_SIZES).lookup
    for table in lookup.parameters():
        nn.init.normal_(table)
    return tree_map(torch.detach, lookup(random_batch(8, seed=seed)))  # type: ignore[no-any-return]


def test_tasks_read_the_experts_that_are_theirs() -> None:
    embedded = looked_up(3)
    mmoe = scrambled(MMoE(MMoEConfig(embedding_dim=4, num_experts=3, expert_hidden=(9, 9)), schema()), 4)
    assert reads(mmoe, embedded, mmoe.experts.rest.weights[0]) == [[True] * 3] * 2  # type: ignore[union-attr, index, arg-type]
    sizes: dict[str, Any] = {"num_task_experts": 1, "num_shared_experts": 2, "expert_hidden": (9, 9)}
    cgc = scrambled(PLE(PLEConfig(embedding_dim=4, num_levels=1, **sizes), schema()), 5)
    own = [[True, False, True, True], [False, True, True, True]]
    assert reads(cgc, embedded, cgc.first.experts.rest.weights[0]) == own  # type: ignore[union-attr, index, arg-type]
    # With two levels, the shared gate hands every expert of the first on to all tasks; the last is still each's own.
    ple = scrambled(PLE(PLEConfig(embedding_dim=4, num_levels=2, **sizes), schema()), 6)
    assert reads(ple, embedded, ple.first.experts.rest.weights[0]) == [[True] * 4] * 2  # type: ignore[union-attr, index, arg-type]
    assert reads(ple, embedded, ple.further[0].experts.rest.weights[0]) == own  # type: ignore[union-attr, index, arg-type]


def test_one_expert_is_a_shared_bottom() -> None:
    """A softmax over one expert is 1: the gate has no say."""
    embedded, network = looked_up(7), MMoE(MMoEConfig(embedding_dim=4, num_experts=1), schema())
    before = network(embedded)
    with torch.no_grad():
        network.gates.weight.normal_()
    torch.testing.assert_close(network(embedded), before)


def test_every_expert_starts_as_if_it_were_alone() -> None:
    """Xavier's bound is that of one expert, not of the stack."""
    torch.manual_seed(0)
    network = PLE(PLEConfig(embedding_dim=8, num_task_experts=3, expert_hidden=(40, 30)), schema())
    inputs = network.inputs.request_size + network.inputs.row_size
    for weight, fans in (
        (network.first.experts.first.weight, inputs + 40),
        (network.first.experts.rest.weights[0], 40 + 30),
        (network.further[0].experts.first[0].weight, 30 + 40),  # type: ignore[index, union-attr]
    ):
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < weight.abs().max().item() <= bound  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("config", [MMoEConfig(embedding_dim=4), PLEConfig(embedding_dim=4)])
def test_a_schema_without_histories_or_users_is_scored(config: Config) -> None:
    features = [f for f in SCHEMA["features"] if f["scope"] not in ("user", "context")]
    views = {name: view for name, view in SCHEMA["views"].items() if name not in ("users", "events")}
    spec = validate(Schema, {**SCHEMA, "features": features, "views": views, "histories": []}, source="bare")
    embedded = looked_up(8)._replace(request={}, histories={})
    network = build_model(config, spec, TABLE_SIZES).network
    assert network(embedded).shape == (len(embedded.request_of_row), 2)


def test_bad_sizes_and_schemas_are_refused() -> None:
    for build in (
        lambda: Experts(1, 1, 0, (2,), activation="relu"),
        lambda: Experts(1, 1, 2, (), activation="relu"),
        lambda: ExpertsOfOwnInputs(1, (1,), (2, 0), activation="relu"),
        lambda: ExpertsOfOwnInputs(1, (1,), (2,), activation="relu", dropout=1.0),
    ):
        with pytest.raises(ConfigError, match="must"):
            build()
    features = [f for f in SCHEMA["features"] if f["scope"] in ("user", "context")]
    bare = {name: v for name, v in SCHEMA.items() if name not in ("histories", "tables")}
    spec = validate(Schema, {**bare, "features": [f for f in features if "table" not in f]}, source="no items")
    for config in (MMoEConfig(), PLEConfig()):
        with pytest.raises(SchemaError, match="features must have at least one of scope 'item' or 'candidate'"):
            build_model(config, spec, TABLE_SIZES)
