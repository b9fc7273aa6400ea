"""DIN agrees with a slow float64 version written from the paper, and attends where attention is what matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from recsys.config import validate
from recsys.embedded import Embedded, EmbeddedHistory
from recsys.errors import ConfigError, SchemaError
from recsys.layers import MLP, Dice, SoftmaxTargetAttention, TargetAttention
from recsys.losses import mean_binary_cross_entropy
from recsys.metrics import auc
from recsys.models.din import DIN, DINConfig, build_din
from recsys.schema import Schema
from tests.references import din as reference
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema

SMALL = DINConfig(embedding_dim=4, attention_hidden=(6,), hidden=(8, 5))


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and every moving average at random, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            tensor.copy_(drawn + 1.0 if name.endswith("running_var") else drawn)
    return network


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        (SMALL, 1),
        (SMALL.model_copy(update={"attention_hidden": (7, 5, 3), "hidden": (9,)}), 2),
        (SMALL.model_copy(update={"attention_softmax": True}), 3),
        (SMALL.model_copy(update={"pooling": "mean"}), 4),
    ],
)
def test_logits_equal_the_papers_form_in_float64(config: DINConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_din(config, schema(), TABLE_SIZES).eval()
    scrambled(model)
    embedded, logits = model.lookup(random_batch(5, seed=seed)), model(random_batch(5, seed=seed))
    plain = lambda features: {name: t.detach().double().numpy() for name, t in features.items()}  # noqa: E731
    spec = schema()
    expected = reference.din(
        plain(embedded.request),
        plain(embedded.candidate),
        {name: (plain(h.features), h.lengths.tolist()) for name, h in embedded.histories.items()},
        embedded.request_of_row.tolist(),
        {name: tensor.double().numpy() for name, tensor in model.network.state_dict().items()},
        reference.Names(
            request=["user_id", "age", "interests", "hour"],
            candidate=["item_id", "category", "tags", "price", "source"],
            query={"clicked": ["item_id", "category", "tags"], "seen": ["item_id"]},
            keys={"clicked": ["item_id", "category", "tags", "dwell"], "seen": ["item_id"]},
        ),
        with_softmax=config.attention_softmax,
        with_mean=config.pooling == "mean",
    )
    assert logits.shape == (len(embedded.request_of_row), len(spec.tasks))
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-6, atol=1e-6)
    double = model.network.double()(tree_map(lambda t: t.double() if t.is_floating_point() else t, embedded))
    np.testing.assert_allclose(double.detach(), expected, rtol=1e-10, atol=1e-11)


def test_by_hand() -> None:
    """One dense attribute x, one candidate x = 2, events 3 and 5: v = a(2, 3) 3 + a(2, 5) 5, logit = relu(2 + 10 v).

    With w1 = product only and relu, a(q, k) = q k: v = 6 * 3 + 10 * 5 = 68, and the logit is 682.
    """
    spec = dense_schema()
    network = DIN(DINConfig(attention_hidden=(1,), attention_activation="relu", hidden=(1,), activation="relu"), spec)
    with torch.no_grad():
        network.attention[0].unit.first.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        network.attention[0].unit.output.weight.fill_(1.0)
        network.mlp.first.weight.copy_(torch.tensor([[1.0, 10.0]]))
        network.output.weight.fill_(1.0)
    history = EmbeddedHistory({"x": torch.tensor([[[3.0], [5.0], [0.0]]])}, torch.tensor([2]), torch.zeros(1, 3).long())
    embedded = Embedded(
        {}, {"x": torch.tensor([[2.0]])}, {"clicked": history}, torch.tensor([0]), torch.zeros(1).long()
    )
    assert network(embedded).item() == 682.0
    assert network.single_request(embedded).item() == 682.0


def dense_schema(**history: Any) -> Schema:
    """One dense item feature, one history of it, nothing about users."""
    return validate(
        Schema,
        {
            "name": "dense",
            "views": {
                "impressions": {"user": "u", "item": "i", "time": "t"},
                "events": {"user": "u", "item": "i", "time": "t"},
                "items": {"path": "items.parquet", "key": "i"},
            },
            "features": [{"name": "x", "kind": "dense", "scope": "item"}],
            "histories": [{"name": "clicked", "attributes": ["x"], **history}],
            "tasks": [{"name": "click", "label": "y"}],
        },
        source="dense",
    )


def test_a_schema_without_user_features_is_scored() -> None:
    network = DIN(SMALL, dense_schema()).eval()
    history = EmbeddedHistory({"x": torch.randn(2, 3, 1)}, torch.tensor([3, 1]), torch.zeros(2, 3).long())
    embedded = Embedded(
        {}, {"x": torch.randn(4, 1)}, {"clicked": history}, torch.tensor([0, 0, 0, 1]), torch.zeros(2).long()
    )
    program = torch.export.export(network, (embedded,)).module()
    torch.testing.assert_close(program(embedded), network(embedded))
    assert network.mlp.first.weight.shape == (8, 2)


def test_the_layers_columns_are_in_the_documented_order() -> None:
    network = DIN(SMALL, schema())
    request = ("user_id", "age", "interests", "hour")
    candidate = ("item_id", "category", "tags", "price", "source")
    assert network.feature_order == (*request, *candidate, "clicked", "seen")
    # 4 wide each, but for the two dense features; "clicked" has three attributes and one event feature.
    assert network.mlp.first.weight.shape == (8, (4 + 1 + 4 + 4) + (4 + 4 + 4 + 1 + 4) + 4 * 4 + 4)
    assert network.attention[0].unit.first.weight.shape == (6, 12 + 16 + 12 + 12)


def test_the_order_of_a_dict_does_not_matter() -> None:
    model = scrambled(build_din(SMALL, schema(), TABLE_SIZES)).eval()
    embedded = model.lookup(random_batch(3, seed=4))
    backwards = lambda mapping: dict(reversed(mapping.items()))  # noqa: E731
    other = Embedded(
        backwards(embedded.request),
        backwards(embedded.candidate),
        {n: h._replace(features=backwards(h.features)) for n, h in backwards(embedded.histories).items()},
        embedded.request_of_row,
        embedded.time,
    )
    torch.testing.assert_close(model.network(other), model.network(embedded), rtol=0, atol=0)


def test_candidates_and_histories_share_their_tables() -> None:
    model = build_din(SMALL, schema(), TABLE_SIZES)
    tables = [name for name, _ in model.lookup.named_parameters()]
    assert len(tables) == len(TABLE_SIZES)
    assert sum("item" in name for name in tables) == 1


def test_a_behaviour_twice_contributes_twice() -> None:
    network = DIN(SMALL, dense_schema()).eval()
    scrambled(network)
    attention, query = network.attention[0], torch.tensor([[0.7]])
    keys = torch.tensor([[[1.3], [1.3]]])
    once = attention(query, keys, torch.tensor([1]), torch.tensor([0]))
    torch.testing.assert_close(attention(query, keys, torch.tensor([2]), torch.tensor([0])), 2 * once)
    assert once.abs().item() > 1e-3


def test_config_chooses_the_classes() -> None:
    assert isinstance(DIN(SMALL, schema()).attention[0], TargetAttention)
    soft = DIN(SMALL.model_copy(update={"attention_softmax": True}), schema())
    assert isinstance(soft.attention[0], SoftmaxTargetAttention)
    plain = DIN(SMALL.model_copy(update={"attention_activation": "prelu", "activation": "prelu"}), schema())
    assert not any(isinstance(m, Dice) for m in plain.modules())


def test_initialisation_is_that_of_the_authors_code() -> None:
    torch.manual_seed(0)
    network = DIN(DINConfig(embedding_dim=32), schema())
    for module in network.modules():
        if isinstance(module, nn.Linear):
            fan = module.in_features + module.out_features
            assert (module.bias == 0).all()
            assert module.weight.abs().max().item() <= (6 / fan) ** 0.5
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)
    scrambled(network)
    network.reset_parameters()
    for name, tensor in network.named_parameters():
        assert name.endswith("weight") or (tensor == 0).all()
    assert all((b == name.endswith("var")).all() for name, b in network.named_buffers())


def test_a_schema_without_history_is_refused() -> None:
    no_history = validate(Schema, {**SCHEMA, "histories": []}, source="no history")
    with pytest.raises(SchemaError, match="histories must name at least one history for the model 'din', got none"):
        build_din(SMALL, no_history, TABLE_SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim: must be greater than or equal to 4, got 0"),
        ({"embedding_dim": 6}, "embedding_dim: must be a multiple of 4, got 6"),
        ({"hidden": []}, "hidden: "),
        ({"hidden": [8, 0]}, "hidden.1: must be greater than or equal to 1, got 0"),
        ({"dropout": 1.0}, "dropout: must be less than 1, got 1.0"),
        ({"activation": "gelu"}, "activation: must be 'dice', 'prelu', 'sigmoid' or 'relu'"),
        ({"attention": 3}, "attention: is not a known key"),
    ],
)
def test_a_broken_config_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DINConfig, changes, source="config")


def test_request_side_work_is_done_once_a_request() -> None:
    """Candidates of one request share its part of the first layer: more candidates add none of it."""
    from torch.utils.flop_counter import FlopCounterMode

    network = DIN(SMALL, schema()).eval()
    model = build_din(SMALL, schema(), TABLE_SIZES).eval()
    flops = []
    for rows in (10, 11, 12):
        embedded = _one_request(model.lookup(random_batch(1, seed=6)), rows)
        with FlopCounterMode(display=False) as counter:
            network.single_request(embedded)
        flops.append(counter.get_total_flops())
    request_part = 2 * 8 * 13
    a_row_of_the_mlp = 2 * (8 * (21 + 16) + 8 * 5 + 5 * 2)
    assert flops[1] - flops[0] == flops[2] - flops[1]
    fixed = flops[0] - 10 * (flops[1] - flops[0])
    assert fixed == request_part
    assert flops[1] - flops[0] > a_row_of_the_mlp


def _one_request(embedded: Embedded, rows: int) -> Embedded:
    candidate = {name: t[:1].expand(rows, -1).contiguous() for name, t in embedded.candidate.items()}
    return embedded._replace(candidate=candidate, request_of_row=torch.zeros(rows, dtype=torch.int64))


class _MeanPooling(nn.Module):
    """What DIN claims to beat: the same inputs and MLP, histories averaged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp, self.output = MLP(2 * width, (32, 16), activation="dice"), nn.Linear(16, 1)

    def forward(self, embedded: Embedded) -> Tensor:
        history = embedded.histories["clicked"]
        mean = history.features["x"].sum(1) / history.lengths.clamp(min=1).unsqueeze(1)
        return self.output(self.mlp(torch.cat([embedded.candidate["x"], mean[embedded.request_of_row]], dim=1)))  # type: ignore[no-any-return]


def planted(requests: int, seed: int, table: Tensor) -> tuple[Embedded, Tensor, Tensor]:
    """A click is likely if the candidate is among the 12 events of the history: a question about pairs."""
    generator = torch.Generator().manual_seed(seed)
    items, events = table.shape[0], 12
    history = torch.randint(0, items, (requests, events), generator=generator)
    candidate = torch.randint(0, items, (requests,), generator=generator)
    from_history = torch.rand(requests, generator=generator) < 0.5
    picked = history.gather(1, torch.randint(0, events, (requests, 1), generator=generator)).squeeze(1)
    candidate = torch.where(from_history, picked, candidate)
    probability = torch.where((history == candidate.unsqueeze(1)).any(1), 0.9, 0.1)
    labels = (torch.rand(requests, generator=generator) < probability).float().unsqueeze(1)
    embedded = Embedded(
        {},
        {"x": table[candidate]},
        {
            "clicked": EmbeddedHistory(
                {"x": table[history]}, torch.full((requests,), events), torch.zeros(requests, events).long()
            )
        },
        torch.arange(requests),
        torch.zeros(requests).long(),
    )
    return embedded, labels, probability


def test_din_finds_what_mean_pooling_cannot() -> None:
    """60 items in 8 dimensions: an average of 12 of them does not tell whether one is there; attention does."""
    torch.manual_seed(0)
    table = nn.functional.normalize(torch.randn(60, 8), dim=1) * 2
    spec = validate(
        Schema,
        {
            **dense_schema().model_dump(mode="json"),
            "features": [{"name": "x", "kind": "dense", "scope": "item", "dim": 8}],
        },
        source="planted",
    )
    train, labels, _ = planted(4000, 1, table)
    test, test_labels, probability = planted(4000, 2, table)
    scores = {}
    for name, network in (
        ("din", DIN(DINConfig(attention_hidden=(24,), hidden=(32, 16)), spec)),
        ("mean", _MeanPooling(8)),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for step in range(120):
            rows = torch.arange(500) + 500 * (step % 8)
            optimizer.zero_grad()
            mean_binary_cross_entropy(network(_rows(train, rows)), labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            scores[name] = auc(test_labels[:, 0], network.eval()(test)[:, 0])
    ceiling = auc(test_labels[:, 0], probability)
    assert scores["din"] > scores["mean"] + 0.5 * (ceiling - scores["mean"])


def _rows(embedded: Embedded, rows: Tensor) -> Embedded:
    history = embedded.histories["clicked"]
    return Embedded(
        {},
        {"x": embedded.candidate["x"][rows]},
        {"clicked": EmbeddedHistory({"x": history.features["x"][rows]}, history.lengths[rows], history.times[rows])},
        torch.arange(len(rows)),
        torch.zeros(len(rows)).long(),
    )
