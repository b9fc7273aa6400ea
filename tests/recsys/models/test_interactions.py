"""Models of feature interactions agree with slow float64 versions, and have as many parameters as published runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from recsys.config import Config, validate
from recsys.embedded import Embedded
from recsys.errors import ConfigError, SchemaError
from recsys.models import RankingModel, build_model
from recsys.models.dcnv2 import DCNv2Config
from recsys.models.deepfm import DeepFMConfig
from recsys.models.dnn import DNNConfig
from recsys.models.finalmlp import DualMLPConfig, FinalMLP, FinalMLPConfig
from recsys.models.fm import FMConfig
from recsys.models.lr import LRConfig
from recsys.models.wide_deep import WideDeepConfig
from recsys.schema import Schema
from tests.references import interactions as reference
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema

DIM = 5
REQUEST = ("user_id", "age", "interests", "hour")
CANDIDATE = ("item_id", "category", "tags", "price", "source")
EVENTS = {"clicked": ("item_id", "category", "tags", "dwell"), "seen": ("item_id",)}
DENSE = ("age", "price")

FINALMLP = FinalMLPConfig(
    embedding_dim=DIM,
    hidden_1=(8, 6),
    hidden_2=(9,),
    context_1=("user_id", "age"),
    context_2=("tags", "price", "hour"),
    gate_hidden=(7, 4),
    num_heads=3,
)
CASES: dict[str, Config] = {
    "lr": LRConfig(),
    "fm": FMConfig(embedding_dim=DIM),
    "dnn": DNNConfig(embedding_dim=DIM, hidden=(8, 6)),
    "wide_deep": WideDeepConfig(embedding_dim=DIM, hidden=(8,)),
    "deepfm": DeepFMConfig(embedding_dim=DIM, hidden=(8, 6), batch_norm=False),
    "dcnv2": DCNv2Config(embedding_dim=DIM, hidden=(8, 6), num_cross_layers=3),
    "dualmlp": DualMLPConfig(embedding_dim=DIM, hidden_1=(8, 6), hidden_2=(7,)),
    "finalmlp": FINALMLP,
    "finalmlp static": FINALMLP.model_copy(update={"context_1": (), "context_2": ()}),
    "finalmlp one head": FINALMLP.model_copy(update={"context_2": ("user_id",), "num_heads": 1}),
}


def scrambled(model: RankingModel) -> RankingModel:
    """Draws every parameter and moving average at random, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            tensor.copy_(drawn + 1.0 if name.endswith("running_var") else drawn)
    return model.eval()


def fields_of(
    embedded: Embedded, row: int, width: int, dense: Mapping[str, np.ndarray], space: str = ""
) -> dict[str, np.ndarray]:
    """Every field of one row, by name, in order."""
    r = int(embedded.request_of_row[row])

    def plain(tensor: torch.Tensor) -> np.ndarray:
        result: np.ndarray = tensor.detach().double().numpy()
        return result

    def vector(name: str, vectors: Mapping[str, torch.Tensor], at: int) -> np.ndarray:
        if name in DENSE:
            return dense[name] @ plain(vectors[name][at])  # type: ignore[no-any-return]
        return plain(vectors[name + space][at])[..., :width]

    found = {name: vector(name, embedded.request, r) for name in REQUEST}
    for history, names in EVENTS.items():
        h = embedded.histories[history]
        for name in names:
            found[f"{history}.{name}"] = reference.mean_pooled(vector(name, h.features, r), int(h.lengths[r]))
    return found | {name: vector(name, embedded.candidate, row) for name in CANDIDATE}


def expected_logits(name: str, model: RankingModel, embedded: Embedded) -> np.ndarray:
    weights = {n: t.double().numpy() for n, t in model.network.state_dict().items()}

    def maps(prefix: str, names: Sequence[str] = DENSE) -> dict[str, np.ndarray]:
        return {n: weights[f"{prefix}.dense.{i}.weight"] for i, n in enumerate(names)}

    rows = []
    for row in range(len(embedded.request_of_row)):
        if name == "lr":
            rows.append(reference.lr(list(fields_of(embedded, row, 2, maps("fields")).values()), weights))
            continue
        fields = list(fields_of(embedded, row, DIM, maps("fields")).values())
        if name in ("fm", "wide_deep", "deepfm"):
            first = list(fields_of(embedded, row, 2, maps("first_order"), "@first_order").values())
            rows.append(getattr(reference, name)(first, fields, weights))
        elif name.startswith("finalmlp"):
            config = CASES[name]
            assert isinstance(config, FinalMLPConfig)
            contexts: list[Sequence[np.ndarray]] = []
            for number, context in enumerate((config.context_1, config.context_2), start=1):
                dense = maps(f"contexts.{number - 1}", [n for n in DENSE if n in context])
                r = int(embedded.request_of_row[row])
                sides = [(n, embedded.request, r) for n in REQUEST] + [(n, embedded.candidate, row) for n in CANDIDATE]
                contexts.append(
                    [
                        dense[n] @ side[n][at].double().numpy()
                        if n in DENSE
                        else side[f"{n}@gate_{number}"][at].detach().double().numpy()[:DIM]
                        for n, side, at in sides
                        if n in context
                    ]
                )
            rows.append(reference.finalmlp(fields, contexts, weights))
        else:
            rows.append(getattr(reference, name)(fields, weights))
    return np.array(rows)


@pytest.mark.parametrize("name", list(CASES))
def test_logits_equal_the_formula_in_float64(name: str) -> None:
    model = scrambled(build_model(CASES[name], schema(), TABLE_SIZES))
    embedded = model.lookup(random_batch(4, seed=1))
    expected = expected_logits(name, model, embedded)
    assert expected.shape == (len(embedded.request_of_row), 2)
    np.testing.assert_allclose(model.network(embedded).detach(), expected, rtol=1e-5, atol=1e-5)
    double = model.network.double()(tree_map(lambda t: t.double() if t.is_floating_point() else t, embedded))
    np.testing.assert_allclose(double.detach(), expected, rtol=1e-9, atol=1e-10)


FRAPPE = Path(__file__).parents[3] / "configs" / "schema" / "frappe.yaml"


def num_parameters(config: Config, spec: Schema) -> int:
    """Of the network, tables left out."""
    network = build_model(config, spec, dict.fromkeys(spec.table_encoders, 3)).network
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # FinalMLP's authors' log on Frappe_x1: 253,392 with 10,439 embedding rows of 10.
        (
            FinalMLPConfig(
                hidden_1=(400,),
                hidden_2=(100,),
                context_1=("user",),
                context_2=("item",),
                gate_hidden=(400,),
                num_heads=5,
            ),
            253_392 - 104_390,
        ),
        # BARS's logs on Frappe_x1, all with 5,389 embedding rows of 10, and as many first-order weights.
        (LRConfig(), 5_390 - 5_389),
        (FMConfig(), 59_280 - 5_389 * 11),
        (DNNConfig(), (781_892 - 53_890) // 2),  # the log counts the network twice
        (DeepFMConfig(), 423_280 - 5_389 * 11),
        (WideDeepConfig(), 423_280 - 5_389 * 11),
        # No log of the parallel structure: four crosses of 100 x 100, the DNN's hidden layers, one linear layer.
        (DCNv2Config(), 4 * (100 * 100 + 100) + (364_001 - 401) + (100 + 400) + 1),
        (
            DualMLPConfig(hidden_1=(400, 400, 400), hidden_2=(500, 500, 500)),
            364_001 + (100 * 500 + 500) + 2 * (500 * 500 + 500) + 3 * 1000 + 501,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Config) else "",
)
def test_parameters_outside_tables_on_frappe(config: Config, expected: int) -> None:
    assert num_parameters(config, Schema.load(FRAPPE)) == expected


def wide_schema(num_categorical: int, num_dense: int) -> Schema:
    """Item features alone, as of Criteo and Avazu."""
    return validate(
        Schema,
        {
            "name": "wide",
            "views": {
                "impressions": {"user": "u", "item": "i", "time": "t"},
                "items": {"path": "items.parquet", "key": "i"},
            },
            "features": [
                *({"name": f"c{i}", "kind": "categorical", "scope": "item"} for i in range(1, num_categorical + 1)),
                *({"name": f"d{i}", "kind": "dense", "scope": "item"} for i in range(1, num_dense + 1)),
            ],
            "tasks": [{"name": "click", "label": "y"}],
        },
        source="wide",
    )


def test_parameters_of_finalmlp_on_criteo_and_avazu() -> None:
    """The authors' totals without embedding rows: 1,614,382 on Criteo, 993,262 on Avazu."""
    criteo = FinalMLPConfig(
        hidden_1=(400, 400, 400),
        hidden_2=(1000,),
        context_1=tuple(f"d{i}" for i in range(1, 14)),
        context_2=("c6",),
        num_heads=200,
    )
    maps_of_dense_features = 2 * 13 * 10  # which the authors' code counts among the embeddings
    assert num_parameters(criteo, wide_schema(26, 13)) == 1_614_382 + maps_of_dense_features
    # An empty context: a vector of 10, 10 -> 800, and 800 -> 220 without its bias never learn anything, in either gate.
    dead = 2 * (10 + (10 * 800 + 800) + 800 * 220)
    assert num_parameters(FinalMLPConfig(), wide_schema(22, 0)) == 993_262 - dead


def test_a_zero_context_through_zero_biases_is_a_static_gate_for_ever() -> None:
    """What the class of the static gate says of the authors' empty context, step by step."""
    torch.manual_seed(0)
    context = nn.Parameter(torch.zeros(1, 4))
    hidden, output = nn.Linear(4, 6), nn.Linear(6, 3)
    for layer in (hidden, output):
        nn.init.zeros_(layer.bias)
    static = nn.Parameter(torch.zeros(3))
    target = torch.tensor([0.3, 1.9, 1.0])
    optimizer = torch.optim.Adam([context, *hidden.parameters(), *output.parameters(), static], lr=0.1)
    kept = [t.detach().clone() for t in (context, hidden.weight, hidden.bias, output.weight)]
    for _ in range(20):
        optimizer.zero_grad()
        full = 2 * torch.sigmoid(output(torch.relu(hidden(context)))).squeeze(0)
        ours = 2 * torch.sigmoid(static)
        torch.testing.assert_close(ours, full)
        ((full - target).square().sum() + (ours - target).square().sum()).backward()
        optimizer.step()
    for before, after in zip(kept, (context, hidden.weight, hidden.bias, output.weight), strict=True):
        assert torch.equal(before, after)
    assert (static.abs() > 0.1).sum() == 2


def test_gates_start_near_one_and_the_static_one_at_one() -> None:
    spec = schema()
    model = build_model(CASES["finalmlp static"], spec, TABLE_SIZES)
    assert isinstance(model.network, FinalMLP)
    for stream in model.network.streams:
        assert torch.equal(2 * torch.sigmoid(stream.bias), torch.ones_like(stream.bias))  # type: ignore[arg-type]
    gated = build_model(FINALMLP, spec, TABLE_SIZES).network
    assert isinstance(gated, FinalMLP)
    for stream, context in zip(gated.streams, (2 * DIM, 3 * DIM), strict=True):
        assert torch.equal(stream.gate(torch.zeros(2, context)), torch.ones(2, 14 * DIM))  # type: ignore[operator]


def test_without_the_bilinear_form_and_gates_it_is_dualmlp() -> None:
    torch.manual_seed(0)
    spec = schema()
    final = build_model(CASES["finalmlp static"], spec, TABLE_SIZES).eval()
    dual = build_model(DualMLPConfig(embedding_dim=DIM, hidden_1=(8, 6), hidden_2=(9,)), spec, TABLE_SIZES).eval()
    state = final.network.state_dict()
    renamed = {n.replace("streams.0.mlp", "mlps.0").replace("streams.1.mlp", "mlps.1"): t for n, t in state.items()}
    renamed = {
        n.replace("fusion.left", "outputs.0").replace("fusion.right", "outputs.1"): t for n, t in renamed.items()
    }
    left_out = dual.network.load_state_dict(renamed, strict=False)
    assert not left_out.missing_keys
    assert sorted(left_out.unexpected_keys) == ["fusion.blocks", "streams.0.bias", "streams.1.bias"]
    with torch.no_grad():
        final.network.fusion.blocks.zero_()  # type: ignore[union-attr, operator]
    embedded = dual.lookup(random_batch(5, seed=2))
    torch.testing.assert_close(final.network(embedded), dual.network(embedded))


def test_initial_values_are_the_protocols() -> None:
    """Tables N(0, 1e-4), linear layers Xavier-normal, biases 0, blocks Xavier-normal on one column."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(TABLE_SIZES, 4000)
    model = build_model(FINALMLP.model_copy(update={"hidden_1": (300,), "hidden_2": (300,)}), schema(), sizes)
    for name, table in model.lookup.named_parameters():
        assert table.std().item() == pytest.approx(1e-4, rel=0.05), name
    network = model.network
    assert isinstance(network, FinalMLP)
    weight = network.streams[0].mlp.first.weight  # type: ignore[union-attr]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (14 * DIM + 300)), rel=0.05)  # type: ignore[operator]
    assert network.fusion.blocks[0].std().item() == pytest.approx(math.sqrt(2 / (1 + 300 * 300 / 3)), rel=0.05)
    assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))


def test_columns_beyond_a_fields_width_are_never_used() -> None:
    model = build_model(CASES["fm"], schema(), TABLE_SIZES)
    model(random_batch(6, seed=3)).sum().backward()
    for name, table in model.lookup.named_parameters():
        used = 2 if "@first_order" in name else DIM
        assert table.shape[1] % 4 == 0
        assert table.grad is not None
        assert (table.grad[:, used:] == 0).all()
        assert (table.grad[:, :used] != 0).any(), name


def test_an_unknown_context_is_named_with_its_neighbours() -> None:
    with pytest.raises(SchemaError, match=r"model\.context_2 must name features .* got 'item_ids'") as err:
        build_model(FINALMLP.model_copy(update={"context_2": ("item_ids",)}), schema(), TABLE_SIZES)
    assert "item_id" in str(err.value)


def test_heads_must_divide_both_widths() -> None:
    with pytest.raises(ConfigError, match="hidden_2 must be a multiple of num_heads"):
        validate(FinalMLPConfig, {"hidden_1": [8], "hidden_2": [9], "num_heads": 4}, source="config")


@pytest.mark.parametrize("config", [LRConfig(), DNNConfig(hidden=(4,))], ids=["lr", "dnn"])
def test_a_schema_without_candidates_features_is_refused(config: Config) -> None:
    spec: dict[str, Any] = {
        "name": "users",
        "views": {"impressions": {"user": "u", "item": "i", "time": "t"}},
        "features": [{"name": "u", "kind": "categorical", "scope": "user"}],
        "tasks": [{"name": "click", "label": "y"}],
    }
    with pytest.raises(SchemaError, match="scope 'item' or 'candidate'"):
        build_model(config, validate(Schema, spec, source="users"), {"u": 5})


def test_a_schema_of_candidates_alone_is_scored() -> None:
    model = build_model(DNNConfig(hidden=(4,)), wide_schema(2, 1), {"c1": 5, "c2": 5}).eval()
    embedded = Embedded(
        {},
        {"c1": torch.randn(3, 12), "c2": torch.randn(3, 12), "d1": torch.randn(3, 1)},
        {},
        torch.tensor([0, 0, 1]),
        torch.zeros(2, dtype=torch.int64),
    )
    one = Embedded({}, embedded.candidate, {}, torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert model.network(embedded).shape == (3, 1)
    torch.testing.assert_close(model.network.single_request(one), model.network(embedded))  # type: ignore[operator]


def test_synthetic_schema_is_what_the_tests_assume() -> None:
    assert tuple(f["name"] for f in SCHEMA["features"]) == REQUEST + CANDIDATE


def test_training_computes_the_gate_of_each_id_once_and_gets_the_same() -> None:
    """Logits and gradients of `training_forward`, whose gates see users and items, are those of `forward`."""
    config = FINALMLP.model_copy(
        update={"context_1": ("user_id",), "context_2": ("item_id",), "dropout_1": 0.0, "dropout_2": 0.0}
    )
    one, other = (scrambled(build_model(config, schema(), TABLE_SIZES)).train() for _ in range(2))
    batch = random_batch(60, seed=4)
    assert len(batch.item["item_id"].unique()) < batch.num_rows  # type: ignore[union-attr]
    output = one(batch)
    assert not output.losses
    expected = other.network(other.lookup(batch))
    torch.testing.assert_close(output.logits, expected)
    for logits in (output.logits, expected):
        logits.square().sum().backward()
    for (name, got), wanted in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4, msg=name)
