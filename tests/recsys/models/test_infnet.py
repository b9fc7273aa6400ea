"""INFNet agrees with its equations computed one number at a time, under every reading, and flows as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from recsys.config import validate
from recsys.embedded import Embedded, EmbeddedHistory
from recsys.errors import ConfigError, SchemaError
from recsys.layers.token_attention import ProxyGate
from recsys.models import build_model
from recsys.models.infnet import QUERIES, INFNet, INFNetConfig, build_infnet, plan_blocks
from recsys.schema import Schema
from tests.references import infnet as reference
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema

LITERAL: dict[str, Any] = {"gate_proxies": "input", "residual": False, "layer_norm": False, "unused_updates": True}
"""The eight equations as they stand."""

READINGS: dict[str, dict[str, Any]] = {
    "literal": LITERAL,
    "recommended": {},
    "literal gates of updated proxies": {**LITERAL, "gate_proxies": "updated"},
    "one block": {"num_blocks": 1},
    "three blocks": {"num_blocks": 3, "gate_residual": True},
    "heads and widths": {"num_heads": 2, "key_dim": 3, "gate_hidden": (5, 6), "proxy_hidden": (7, 5)},
    "norm of tokens, places": {"input_norm": True, "position": "learned"},
    "mean, several proxies": {"sequence_pooling": "mean", "sequence_proxies": 3, "layer_norm": False},
    "target attention": {"target_attention": True},
    "shared tokens read, per source": {"heads_read": "task_and_shared_tokens", "projections": "per_source"},
    "everything updated": {"unused_updates": True},
    "no task tokens": {"variant": "without_task_tokens"},
    "no gates": {"variant": "without_gates"},
    "no flow": {"variant": "without_flow"},
    "no flow, residual gates": {"variant": "without_flow", "gate_residual": True, "num_blocks": 1},
}


def config(**options: Any) -> INFNetConfig:
    return INFNetConfig(embedding_dim=4, categorical_proxies=3, hidden=(6, 5), **{"proxy_hidden": (6,), **options})


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1)
    return network


def double(embedded: Embedded) -> Embedded:
    return tree_map(lambda t: t.double() if t.is_floating_point() else t, embedded)  # type: ignore[no-any-return]


def expected_logits(network: nn.Module, embedded: Embedded, settings: INFNetConfig) -> np.ndarray:
    plain = lambda features: {name: t.detach().double().numpy() for name, t in features.items()}  # noqa: E731
    readings = {name: getattr(settings, name) for name in reference.Readings._fields}
    return reference.infnet(
        {
            "request": plain(embedded.request),
            "candidate": plain(embedded.candidate),
            "histories": {name: (plain(h.features), h.lengths.tolist()) for name, h in embedded.histories.items()},
            "request_of_row": embedded.request_of_row.tolist(),
            "dense": {"age", "price"},
        },
        {name: tensor.detach().double().numpy() for name, tensor in network.state_dict().items()},
        reference.Names(
            request=["user_id", "age", "interests", "hour"],
            candidate=["item_id", "category", "tags", "price", "source"],
            attributes={"clicked": ["item_id", "category", "tags"], "seen": ["item_id"]},
            events={"clicked": ["item_id", "category", "tags", "dwell"], "seen": ["item_id"]},
        ),
        reference.Readings(**readings),
        len(schema().tasks),
    )


@pytest.mark.parametrize("name", READINGS)
def test_logits_equal_the_equations_in_float64(name: str) -> None:
    settings = config(**READINGS[name])
    model = build_infnet(settings, schema(), TABLE_SIZES).eval()
    scrambled(model, seed=1)
    batch = random_batch(5, max_rows=3, seed=2)
    embedded = model.lookup(batch)
    assert any((h.lengths == 0).any() for h in embedded.histories.values())
    expected = expected_logits(model.network, embedded, settings)
    got = model.network.double()(double(embedded)).detach()
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)
    single = model.network.float()(embedded).detach()
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)


def test_what_nothing_reads_is_left_out_and_the_logits_stay() -> None:
    everything, needed = (build_infnet(config(unused_updates=u), schema(), TABLE_SIZES).eval() for u in (True, False))
    scrambled(everything, seed=3)
    state = everything.network.state_dict()
    assert set(needed.network.state_dict()) < set(state)
    needed.network.load_state_dict({name: state[name] for name in needed.network.state_dict()})
    embedded = everything.lookup(random_batch(4, seed=4))
    torch.testing.assert_close(needed.network(embedded), everything.network(embedded))
    # With everything, a block is as large as the paper's equations make it: eight attentions, three gates.
    d, proxies = 4, 3 + 2 + 2
    block = everything.network.blocks[1]  # type: ignore[index]
    size = sum(p.numel() for name, p in block.named_parameters() if not name.startswith("norm."))
    assert size == 8 * 3 * d * d + (proxies * d * d + 3 * d) + 3 * (d * d + d)


@pytest.mark.parametrize("variant", ["full", "without_task_tokens", "without_gates"])
@pytest.mark.parametrize("gates", ["updated", "input"])
def test_every_parameter_is_read(variant: str, gates: str) -> None:
    for blocks in (1, 2, 3):
        network = INFNet(config(variant=variant, gate_proxies=gates, num_blocks=blocks, gate_hidden=(12,)), schema())
        scrambled(network, seed=5)
        network(looked_up(5, seed=6)).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


def test_plans() -> None:
    """One block with updated proxies: tasks only. Two: the first also makes what the second reads."""
    (only,), first = plan_blocks(config(num_blocks=1))
    assert only == (("shared", "task"), ("task",))
    assert first == {"shared", "task"}
    (one, two), first = plan_blocks(config(num_blocks=2))
    assert one == (QUERIES, ("categorical", "sequence", "task"))
    assert two == (("shared", "task"), ("task",))
    assert first == set(QUERIES)
    (one, two), first = plan_blocks(config(num_blocks=2, gate_proxies="input"))
    assert one == (("shared", "task"), ("categorical", "sequence", "task"))
    assert two == (("task",), ("task",))
    assert first == set(QUERIES)


def looked_up(num_requests: int, *, seed: int) -> Embedded:
    """Vectors of a random batch, without any gradient."""
    torch.manual_seed(seed)
    lookup = build_infnet(config(), schema(), TABLE_SIZES).lookup
    for table in lookup.parameters():
        nn.init.normal_(table)
    return tree_map(torch.detach, lookup(random_batch(num_requests, seed=seed)))  # type: ignore[no-any-return]


def jacobian(network: nn.Module, embedded: Embedded, parameter: Tensor) -> Tensor:
    """(T, n): whether some logit of a task depends on each row of a parameter."""
    logits = network(embedded)
    rows = []
    for task in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, task].sum(), parameter, retain_graph=True)
        rows.append(gradient.abs().sum(1) > 1e-9)
    return torch.stack(rows)


def test_a_task_token_reaches_its_own_head_in_one_block_and_all_in_two() -> None:
    embedded = looked_up(6, seed=7)
    one, two = (scrambled(INFNet(config(num_blocks=n), schema()), seed=8) for n in (1, 2))
    assert jacobian(one, embedded, one.task_tokens["task"]).tolist() == [[True, False], [False, True]]  # type: ignore[index]
    assert jacobian(two, embedded, two.task_tokens["task"]).all()  # type: ignore[index]


def test_an_event_changes_every_logit_of_its_request_in_one_block() -> None:
    network, embedded = scrambled(INFNet(config(num_blocks=1), schema()), seed=9), looked_up(6, seed=10)
    history = embedded.histories["seen"]
    request = int(torch.nonzero((history.lengths > 1) & (torch.bincount(embedded.request_of_row) > 1))[0])
    changed = history.features["item_id"].clone()
    changed[request, 0] += 1.0
    other = {**embedded.histories, "seen": history._replace(features={**history.features, "item_id": changed})}
    moved = (network(embedded._replace(histories=other)) - network(embedded)).abs() > 1e-7
    assert moved[embedded.request_of_row == request].all()
    assert not moved[embedded.request_of_row != request].any()


def test_places_make_the_order_of_events_matter() -> None:
    embedded = looked_up(8, seed=11)
    history = embedded.histories["seen"]
    request = int(torch.nonzero(history.lengths > 1)[0])
    swapped = history.features["item_id"].clone()
    swapped[request, [0, 1]] = swapped[request, [1, 0]]
    other = {**embedded.histories, "seen": history._replace(features={"item_id": swapped})}
    differences = []
    for position in ("none", "learned"):
        network = scrambled(INFNet(config(position=position), schema()), seed=12)
        differences.append((network(embedded._replace(histories=other)) - network(embedded)).abs().max().item())
    assert differences[0] < 1e-6 < 1e-4 < differences[1]


def test_a_gate_without_a_last_layer_halves_its_tokens() -> None:
    gate = ProxyGate(2, 3, hidden=(4,))
    nn.init.zeros_(gate.output.weight)
    assert gate(torch.randn(5, 2, 3)).tolist() == [[0.5] * 3] * 5
    biased = ProxyGate(2, 3, hidden=(4,), bias=2.0)
    nn.init.zeros_(biased.output.weight)
    torch.testing.assert_close(biased(torch.randn(1, 2, 3)), torch.full((1, 3), 1 / (1 + np.exp(-2.0))))


def one_task_schema(**changes: Any) -> Schema:
    tasks = [{"name": "click", "label": "is_click"}]
    return validate(Schema, {**SCHEMA, "tasks": tasks, **changes}, source="one task")


@pytest.mark.parametrize("variant", ["full", "without_task_tokens", "without_gates", "without_flow"])
def test_one_task_and_one_history_are_enough(variant: str) -> None:
    spec = one_task_schema(histories=SCHEMA["histories"][1:])
    model = build_infnet(config(variant=variant), spec, TABLE_SIZES)
    embedded = looked_up(3, seed=13)
    embedded = embedded._replace(histories={"seen": embedded.histories["seen"]})
    logits = model.network(embedded)
    assert logits.shape == (len(embedded.request_of_row), 1)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("variant", ["without_task_tokens", "without_gates", "without_flow"])
def test_ablations_too_are_request_major(variant: str) -> None:
    """The contract suite holds the full model to this."""
    model = build_infnet(config(variant=variant), schema(), TABLE_SIZES).eval()
    scrambled(model, seed=15)
    batch = random_batch(6, seed=16)
    logits = model(batch)
    torch.testing.assert_close(model(batch.exploded()), logits, rtol=1e-5, atol=1e-6)
    embedded = model.lookup(batch.select_requests(torch.tensor([2])))
    alone = model.network.single_request(embedded)  # type: ignore[operator]
    torch.testing.assert_close(alone, logits[batch.request_of_row == 2], rtol=1e-5, atol=1e-6)


def test_proxies_of_an_only_history_are_four() -> None:
    spec = one_task_schema(histories=SCHEMA["histories"][1:])
    assert INFNet(config(), spec).proxies["sequence"].output.out_features == 4 * 4
    assert INFNet(config(), schema()).proxies["sequence"].output.out_features == 4


def test_features_of_requests_are_optional() -> None:
    features = [f for f in SCHEMA["features"] if f["scope"] not in ("user", "context")]
    views = {name: view for name, view in SCHEMA["views"].items() if name != "users"}
    spec = validate(Schema, {**SCHEMA, "features": features, "views": views}, source="no users")
    embedded = looked_up(3, seed=14)._replace(request={})
    for variant in ("full", "without_flow"):
        network = build_infnet(config(variant=variant), spec, TABLE_SIZES).network
        assert network(embedded).shape == (len(embedded.request_of_row), 2)
        single = tree_map(lambda t: t[:1], embedded)
        torch.testing.assert_close(network.single_request(single), network(single))  # type: ignore[operator]


def test_bad_schemas_and_configs_are_refused() -> None:
    without = {name: value for name, value in SCHEMA.items() if name != "histories"}
    with pytest.raises(SchemaError, match="histories must name at least one history for the model 'infnet', got none"):
        build_infnet(config(), validate(Schema, without, source="none"), TABLE_SIZES)
    for options, words in (
        ({"num_heads": 3}, "num_heads must be a divisor of embedding_dim 4, got 3"),
        ({"variant": "without_flow", "heads_read": "task_and_shared_tokens"}, "heads_read must be 'task_token'"),
        ({"variant": "without_flow", "target_attention": True}, "target_attention must be false"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(INFNetConfig, {"kind": "infnet", "embedding_dim": 4, **options}, source="test")


def test_the_cost_is_linear_in_the_events() -> None:
    """Histories twice, three and four times as long cost once, twice and three times as much more."""
    model = build_model(INFNetConfig(embedding_dim=8, num_blocks=2), schema(), TABLE_SIZES).eval()
    embedded = model.lookup(random_batch(4, seed=1))

    def cost(times: int) -> int:
        histories = {
            name: EmbeddedHistory(
                {k: v.repeat(1, times, 1) for k, v in h.features.items()}, h.lengths, h.times.repeat(1, times)
            )
            for name, h in embedded.histories.items()
        }
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.network(embedded._replace(histories=histories))
        return counter.get_total_flops()

    first, second, third, fourth = (cost(times) for times in (1, 2, 3, 4))
    assert second - first == third - second == fourth - third > 0
