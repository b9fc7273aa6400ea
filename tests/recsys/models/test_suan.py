"""SUAN and LightSUAN agree with slow float64 loops, score candidates side by side, and use order and time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from recsys.config import Config, validate
from recsys.embedded import Embedded, EmbeddedHistory
from recsys.errors import ConfigError, SchemaError
from recsys.layers import Dice
from recsys.losses import mean_binary_cross_entropy
from recsys.metrics import auc
from recsys.models import RankingModel, build_model
from recsys.models.din import DIN, DINConfig
from recsys.models.suan import LightSUANConfig, SUANConfig, build_suan
from recsys.schema import Schema
from tests.references import suan as reference
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema

SMALL: dict[str, Any] = {"embedding_dim": 4, "hidden": (8, 5)}
LIGHT: dict[str, Any] = {**SMALL, "window": 2, "dilation": 3}


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and every moving average at random, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            tensor.copy_(drawn + 1.0 if name.endswith("running_var") else drawn)
    return network


def model_of(config: Config, seed: int = 0) -> RankingModel:
    torch.manual_seed(seed)
    model = build_model(config, schema(), TABLE_SIZES).eval()
    scrambled(model, seed)
    return model


def plain(features: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().double().numpy() for name, t in features.items()}


def expected(model: RankingModel, embedded: Embedded, config: Any, mask: reference.Mask) -> np.ndarray:
    spec = schema()
    return reference.suan(
        plain(embedded.request),
        plain(embedded.candidate),
        [
            reference.History(
                plain(embedded.histories[h.name].features),
                embedded.histories[h.name].lengths.tolist(),
                embedded.histories[h.name].times.numpy(),
                h.attributes,
                [f.name for f in h.event_features],
            )
            for h in spec.histories
        ],
        embedded.request_of_row.tolist(),
        embedded.time.tolist(),
        {name: tensor.double().numpy() for name, tensor in model.network.state_dict().items()},
        reference.Options(config.num_heads, config.norm_style, config.alignment_pooling),
        mask,
        dense=["age"],
        candidate_mapping=config.candidate_mapping,
        is_projected=config.width is not None,
    )


CASES = {
    "suan": (SUANConfig(**SMALL), reference.causal),
    "code": (SUANConfig(**SMALL, norm_style="code", width=8, num_heads=4), reference.causal),
    "slots": (SUANConfig(**SMALL, candidate_mapping="slots", alignment_pooling="causal"), reference.causal),
    "wide slots": (SUANConfig(**SMALL, candidate_mapping="slots", width=4, bias_per_head=True), reference.causal),
    "light": (LightSUANConfig(**LIGHT, bias_per_layer=True), reference.local_or_dilated(2, 3)),
    "light, a candidate too": (
        LightSUANConfig(**LIGHT, candidate_attention="sparse", alignment_pooling="position"),
        reference.local_or_dilated(2, 3, sparse_candidate=True),
    ),
    "split": (
        LightSUANConfig(**LIGHT, pattern="split", bias_per_head=True, bias_per_layer=True),
        reference.local_then_dilated(2, 3, 2),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_logits_equal_the_formulas_in_float64(case: str) -> None:
    config, mask = CASES[case]
    model = model_of(config, seed=1)
    embedded = model.lookup(random_batch(4, seed=3))
    assert max(h.lengths.max() for h in embedded.histories.values()) > 5
    wanted = expected(model, embedded, config, mask)
    with torch.no_grad():
        np.testing.assert_allclose(model.network(embedded), wanted, rtol=1e-5, atol=1e-5)
        double = tree_map(lambda t: t.double() if t.is_floating_point() else t, embedded)
        np.testing.assert_allclose(model.network.double()(double), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", list(CASES))
def test_one_pass_over_all_candidates_equals_one_candidate_at_a_time(case: str) -> None:
    model = model_of(CASES[case][0])
    batch = random_batch(5, seed=5)
    with torch.no_grad():
        together = model(batch)
        alone = torch.cat(
            [model(batch.exploded().select_requests(torch.tensor([row]))) for row in range(len(together))]
        )
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        of_one = batch.select_requests(torch.tensor([0]))
        embedded = model.lookup(of_one)
        torch.testing.assert_close(
            model.network.single_request(embedded),  # type: ignore[operator]
            together[: of_one.num_rows],
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "sparse",
    [
        {"window": 8, "dilation": 7},
        {"window": 50, "dilation": 5},
        {"window": 1, "dilation": 1},
        {"window": 3, "dilation": 1},
        {"window": 8, "dilation": 5, "candidate_attention": "sparse"},
    ],
)
def test_a_pattern_that_sees_everything_is_dense_attention(sparse: dict[str, Any]) -> None:
    """A window of the whole history, or a dilation of 1."""
    dense, light = model_of(SUANConfig(**SMALL)), model_of(LightSUANConfig(**SMALL, **sparse))
    light.load_state_dict(dense.state_dict())
    batch = random_batch(6, seed=7)
    torch.testing.assert_close(light(batch), dense(batch), rtol=0, atol=1e-5)
    narrow = model_of(LightSUANConfig(**SMALL, window=1, dilation=6))
    narrow.load_state_dict(dense.state_dict())
    assert not torch.allclose(narrow(batch), dense(batch), rtol=0, atol=1e-4)


def embedded_at_length(length: int, rows: int = 1, requests: int = 1) -> tuple[Schema, Embedded]:
    """One history of the given length, of 8-wide vectors, one token of profile."""
    generator = torch.Generator().manual_seed(length)
    spec = long_schema(length)
    history = EmbeddedHistory(
        {"x": torch.randn(requests, length, 8, generator=generator)},
        torch.full((requests,), length),
        (torch.arange(length) * 10_000_000_000).repeat(requests, 1),
    )
    return spec, Embedded(
        {"u": torch.randn(requests, 4, generator=generator)},
        {"x": torch.randn(rows * requests, 8, generator=generator)},
        {"clicked": history},
        torch.arange(requests).repeat_interleave(rows),
        torch.full((requests,), length * 10_000_000_000),
    )


def long_schema(length: int, dim: int = 8) -> Schema:
    return validate(
        Schema,
        {
            "name": "long",
            "views": {
                "impressions": {"user": "u", "item": "i", "time": "t"},
                "events": {"user": "u", "item": "i", "time": "t"},
                "items": {"path": "items.parquet", "key": "i"},
            },
            "features": [
                {"name": "u", "kind": "dense", "scope": "context", "dim": 4},
                {"name": "x", "kind": "dense", "scope": "item", "dim": dim},
            ],
            "histories": [{"name": "clicked", "attributes": ["x"], "max_length": length}],
            "tasks": [{"name": "click", "label": "y"}],
        },
        source="long",
    )


def flops(config: Config, length: int, rows: int = 1) -> int:
    spec, embedded = embedded_at_length(length, rows)
    network = build_model(config, spec, {}).network.eval()
    # The counter does not know the fused form of dense attention on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(embedded)
    return int(counter.get_total_flops())


def test_sparse_attention_skips_the_work() -> None:
    """Products of queries and keys, beyond what is linear in the length: a fifth of the dense ones at 512 events."""
    dense, light = SUANConfig(**SMALL), LightSUANConfig(**SMALL, window=16, dilation=16)
    quadratic = lambda config: flops(config, 512) - 2 * flops(config, 256)  # noqa: E731
    assert 0 < quadratic(light) < quadratic(dense) / 10
    pairs = 2 * 2 * 512 * 8 * 2  # scores and sums of two layers, 8 wide, multiplied and added
    saved = flops(dense, 512) - flops(light, 512)
    assert saved > 0.8 * pairs * 512


@pytest.mark.parametrize("config", [SUANConfig(**SMALL), LightSUANConfig(**LIGHT)])
def test_a_candidate_repeats_no_work_of_its_history(config: Config) -> None:
    one, two, three = (flops(config, 200, rows) for rows in (1, 2, 3))
    assert three - two == two - one
    assert two - one < one / 50


def test_events_do_not_see_the_candidate() -> None:
    network = model_of(SUANConfig(**SMALL)).network
    seen: list[Tensor] = []
    network.encoders[0].blocks[1].self_attention.register_forward_pre_hook(  # type: ignore[union-attr, index]
        lambda _, inputs: seen.append(inputs[0])
    )
    embedded = model_of(SUANConfig(**SMALL)).lookup(random_batch(5, seed=8))
    with torch.no_grad():
        first = network(embedded)
        other = network(embedded._replace(candidate={n: t + 1.0 for n, t in embedded.candidate.items()}))
    assert not torch.allclose(first, other)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_the_time_of_the_request_and_of_events_matter() -> None:
    model = model_of(SUANConfig(**SMALL))
    embedded = model.lookup(random_batch(5, seed=9))
    day = 86_400_000_000
    with torch.no_grad():
        logits = model.network(embedded)
        later = model.network(embedded._replace(time=embedded.time + 400 * day))
        shifted = {n: h._replace(times=h.times + 400 * day) for n, h in embedded.histories.items()}
        both = model.network(embedded._replace(time=embedded.time + 400 * day, histories=shifted))
    assert ((later - logits).abs().amax(1) > 1e-4).any()
    torch.testing.assert_close(both, logits, rtol=0, atol=1e-5)  # hours of the day are the same, and all differences


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 3}, "event of the history 'clicked' must be a multiple of num_heads=3, got 16"),
        ({"width": 6, "num_heads": 4}, "must be a multiple of num_heads=4, got 6"),
    ],
)
def test_a_width_that_heads_cannot_share_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        build_suan(SUANConfig(embedding_dim=4, **config), schema(), TABLE_SIZES)


def test_a_schema_without_history_or_profile_is_refused() -> None:
    with pytest.raises(SchemaError, match="histories must name at least one history"):
        build_suan(SUANConfig(), validate(Schema, {**SCHEMA, "histories": []}, source="s"), TABLE_SIZES)
    bare = [f for f in SCHEMA["features"] if f["scope"] not in ("user", "context")]
    with pytest.raises(SchemaError, match="at least one of scope user or context"):
        build_suan(SUANConfig(), validate(Schema, {**SCHEMA, "features": bare}, source="s"), TABLE_SIZES)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SUANConfig, {"norm_style": "post"}, "norm_style: must be 'pre' or 'code'"),
        (SUANConfig, {"window": 3}, "window: is not a known key"),
        (LightSUANConfig, {"window": 0}, "window: must be greater than or equal to 1, got 0"),
        (
            LightSUANConfig,
            {"pattern": "split", "num_heads": 1},
            "num_heads must be at least 2 where pattern is 'split'",
        ),
        (
            LightSUANConfig,
            {"pattern": "split", "candidate_attention": "sparse"},
            "candidate_attention must be 'dense' where pattern is 'split'",
        ),
    ],
)
def test_a_broken_config_names_its_field(kind: type[Config], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(kind, changes, source="config")


def test_initialisation_is_that_of_the_source() -> None:
    torch.manual_seed(0)
    network = model_of(SUANConfig(embedding_dim=32)).network
    for _ in range(2):
        network.reset_parameters()  # type: ignore[operator]
        for module in network.modules():
            if isinstance(module, nn.Linear):
                assert module.bias is None or (module.bias == 0).all()
                if module.weight.numel() > 4000:
                    assert module.weight.std().item() * module.in_features**0.5 == pytest.approx(1.0, rel=0.1)
                bound = 2 / 0.8796 * module.in_features**-0.5
                assert module.weight.abs().max().item() <= bound * 1.001
            if isinstance(module, Dice):
                assert (module.running_mean == 0).all()
        encoder = network.encoders[0]  # type: ignore[index]
        for table in (encoder.positions, encoder.hours, encoder.bias.time):
            assert table.std().item() == pytest.approx(0.02, rel=0.3)
        scrambled(network)


def planted(requests: int, seed: int, table: Tensor) -> tuple[Embedded, Tensor, Tensor]:
    """A click is likely if the candidate equals the newest event and that event is less than an hour old.

    The history is a bag for whoever cannot see order and time; every item appears in it as often elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    items, events = table.shape[0], 6
    history = torch.randint(0, items, (requests, events), generator=generator)
    at = torch.randint(0, events, (requests, 1), generator=generator)
    candidate = history.gather(1, at).squeeze(1)
    hour = 3_600_000_000
    is_recent = torch.rand(requests, generator=generator) < 0.5
    age = torch.where(is_recent, hour // 10, 30 * hour)
    time = torch.full((requests,), 10**15)
    back = torch.arange(events).flip(0) * 2 * hour
    likes = (history[:, -1] == candidate) & is_recent
    probability = torch.where(likes, 0.9, 0.1)
    labels = (torch.rand(requests, generator=generator) < probability).float().unsqueeze(1)
    embedded = Embedded(
        {"u": torch.ones(requests, 4)},
        {"x": table[candidate]},
        {
            "clicked": EmbeddedHistory(
                {"x": table[history]}, torch.full((requests,), events), time.unsqueeze(1) - age.unsqueeze(1) - back
            )
        },
        torch.arange(requests),
        time,
    )
    return embedded, labels, probability


def rows_of(embedded: Embedded, rows: Tensor) -> Embedded:
    whole = tree_map(lambda t: t[rows], embedded)
    return whole._replace(request_of_row=torch.arange(len(rows)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "config",
    [
        SUANConfig(embedding_dim=8, num_layers=1, hidden=(32,), candidate_mapping="slots"),
        LightSUANConfig(embedding_dim=8, num_layers=1, hidden=(32,), candidate_mapping="slots", window=2, dilation=3),
    ],
)
def test_order_and_time_are_found_where_din_cannot_see_them(config: Any) -> None:
    torch.manual_seed(0)
    table = nn.functional.normalize(torch.randn(12, 8), dim=1) * 2
    spec = long_schema(6)
    train, labels, _ = planted(4000, 1, table)
    test, test_labels, probability = planted(4000, 2, table)
    scores = {}
    for name, network in (
        ("suan", build_model(config, spec, {}).network),
        ("din", DIN(DINConfig(attention_hidden=(24,), hidden=(32, 16)), spec)),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for step in range(120):
            rows = torch.arange(500) + 500 * (step % 8)
            optimizer.zero_grad()
            mean_binary_cross_entropy(network(rows_of(train, rows)), labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            scores[name] = auc(test_labels[:, 0], network.eval()(test)[:, 0])
    ceiling = auc(test_labels[:, 0], probability)
    assert scores["suan"] > scores["din"] + 0.5 * (ceiling - scores["din"])
