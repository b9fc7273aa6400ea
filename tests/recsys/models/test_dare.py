"""DARE, TWIN and its variants agree with a slow float64 version written from the sources; roles really are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from recsys.batch import Batch, HistoryBatch
from recsys.config import validate
from recsys.embedded import Embedded
from recsys.errors import ConfigError, SchemaError
from recsys.losses import binary_cross_entropy
from recsys.metrics import auc
from recsys.models import MODELS, RankingModel, TrainingOutput
from recsys.models.dare import (
    DARE_ROLES,
    TWIN_ROLES,
    DAREConfig,
    LongHistoryNetwork,
    TWINConfig,
    build_dare,
    build_twin,
)
from recsys.schema import Categorical, Schema
from tests.references import dare as reference
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema
from training.objective import Objective

SMALL: dict[str, Any] = {
    "embedding_dim": 4,
    "top_k": 3,
    "num_slots": 5,
    "hidden": (7, 5),
    "auxiliary_hidden": (6,),
}
VARIANTS: dict[str, DAREConfig | TWINConfig] = {
    "dare": DAREConfig(**SMALL, attention_dim=4),
    "dare, wide attention": DAREConfig(**SMALL, attention_dim=12),
    "dare, all events": DAREConfig(**{**SMALL, "top_k": 20}, attention_dim=4),
    "twin": TWINConfig(**SMALL),
    "twin w/ proj": TWINConfig(**SMALL, projection=True),
    "twin w/o tr": TWINConfig(**SMALL, has_product=False),
    "twin-4e": TWINConfig(**SMALL, tables="by_role_and_side"),
    "three embeddings": TWINConfig(**SMALL, tables="attention_by_side"),
    "sim hard": TWINConfig(**SMALL, search="category", category="item_id"),
    "eta": TWINConfig(**SMALL, search="hash", hash_bits=9),
    "sdim": TWINConfig(**{**SMALL, "auxiliary_weight": 0}, search="sampling", hash_bits=6, hash_width=2),
}


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and every moving average at random, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            tensor.copy_(drawn + 1.0 if name.endswith("running_var") else drawn)
    return network


def build(config: DAREConfig | TWINConfig, seed: int = 0) -> RankingModel:
    torch.manual_seed(seed)
    builder: Any = build_dare if isinstance(config, DAREConfig) else build_twin
    model: RankingModel = builder(config, schema(), TABLE_SIZES)
    scrambled(model.network, seed)
    for table in model.lookup.parameters():
        nn.init.normal_(table)
    return model


def double(embedded: Embedded) -> Embedded:
    converted: Embedded = tree_map(lambda t: t.detach().double() if t.is_floating_point() else t, embedded)
    return converted


def plain(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().double().numpy() for name, t in features.items()}


def expected_of(model: RankingModel, config: DAREConfig | TWINConfig, embedded: Embedded) -> tuple[Any, Any]:
    is_dare = isinstance(config, DAREConfig)
    switches = {} if is_dare else {n: getattr(config, n) for n in ("search", "has_product", "hash_width", "category")}
    spec = schema()
    return reference.dare(
        plain(embedded.request),
        plain(embedded.candidate),
        {name: (plain(h.features), h.lengths.tolist()) for name, h in embedded.histories.items()},
        embedded.request_of_row.tolist(),
        {name: tensor.double().numpy() for name, tensor in model.network.state_dict().items()},
        reference.Names(
            request=["user_id", "age", "interests", "hour"],
            candidate=["price", "source"],
            shared={"clicked": ["item_id", "category", "tags"], "seen": ["item_id"]},
            own={"clicked": ["dwell"], "seen": []},
            is_categorical=lambda name: isinstance(spec.feature(name), Categorical),
        ),
        reference.Variant(
            tuple(DARE_ROLES if isinstance(config, DAREConfig) else TWIN_ROLES[config.tables]),  # type: ignore[arg-type]
            config.top_k,
            config.num_slots,
            **switches,
        ),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference_in_float64(variant: str) -> None:
    config = VARIANTS[variant]
    model = build(config, seed=1).eval()
    batch = random_batch(5, seed=5)
    embedded = model.lookup(batch)
    lengths = torch.stack([h.lengths for h in embedded.histories.values()])
    assert (lengths == 0).any()
    assert ((lengths > 0) & (lengths < 3)).any()
    assert (lengths > config.num_slots).any()
    logits, auxiliary = expected_of(model, config, embedded)
    np.testing.assert_allclose(model.network(embedded).detach(), logits, rtol=1e-4, atol=1e-5)
    network, exact = model.network.double(), double(embedded)
    np.testing.assert_allclose(network(exact).detach(), logits, rtol=1e-10, atol=1e-11)
    if config.auxiliary_weight > 0:
        output: TrainingOutput = network.training_forward(exact, batch)  # type: ignore[operator]
        assert batch.labels is not None
        loss = binary_cross_entropy(torch.from_numpy(auxiliary), batch.labels.double()).total
        torch.testing.assert_close(output.losses["auxiliary"], loss)
        torch.testing.assert_close(output.logits, network(exact))


def tied(embedded: Embedded) -> Embedded:
    """Attention vectors that are the representation vectors."""

    def same(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: features[name.partition("@")[0]] for name in features}

    return embedded._replace(
        candidate=same(embedded.candidate),
        histories={n: h._replace(features=same(h.features)) for n, h in embedded.histories.items()},
    )


def test_with_tied_tables_dare_is_twin() -> None:
    dare, twin = build(DAREConfig(**SMALL, attention_dim=4)).eval(), build(TWINConfig(**SMALL), seed=3).eval()
    state = {
        name: tensor
        for name, tensor in dare.network.state_dict().items()
        if not name.endswith("attention_slots.weight")
    }
    twin.network.load_state_dict(state)
    for history in dare.network.histories:  # type: ignore[union-attr]
        history.attention_slots.weight.data.copy_(history.slots.weight)  # type: ignore[union-attr, operator]
    embedded = tied(dare.lookup(random_batch(6, seed=6)))
    torch.testing.assert_close(dare.network(embedded), twin.network(embedded), rtol=0, atol=0)


def test_twin_has_one_table_of_slots_and_dare_two() -> None:
    assert not any("attention_slots" in name for name in build(TWINConfig(**SMALL)).network.state_dict())
    assert any("attention_slots" in name for name in build(DAREConfig(**SMALL, attention_dim=4)).network.state_dict())


@pytest.mark.parametrize(
    "config", [DAREConfig(**{**SMALL, "top_k": 8}, attention_dim=8), TWINConfig(**{**SMALL, "top_k": 9})]
)
def test_enough_to_keep_gives_both_heads_the_same(config: DAREConfig | TWINConfig) -> None:
    network = build(config).network
    embedded = build(config).lookup(random_batch(6, seed=7))
    for history in network.histories:  # type: ignore[union-attr]
        kept, everything = history.with_all_events(embedded)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(kept, everything)
    fewer = build(config.model_copy(update={"top_k": 2})).network
    kept, everything = fewer.histories[0].with_all_events(embedded)  # type: ignore[index, union-attr, operator]
    assert not torch.allclose(kept, everything)


def leaves(model: RankingModel, seed: int) -> tuple[Embedded, dict[str, Tensor]]:
    """Embedded vectors as leaves, by key, of candidates and events."""
    embedded = model.lookup(random_batch(8, seed=seed))
    found: dict[str, Tensor] = {}

    def leaf(side: str, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {name: t.detach().clone().requires_grad_() for name, t in features.items()}
        found.update({f"{side}.{name}": t for name, t in made.items()})
        return made

    return embedded._replace(
        candidate=leaf("candidate", embedded.candidate),
        histories={n: h._replace(features=leaf(n, h.features)) for n, h in embedded.histories.items()},
    ), found


def test_each_role_has_the_gradient_of_its_own_path_alone() -> None:
    """Of the scores, attention vectors; of the values with the weights held, representation vectors."""
    model = build(DAREConfig(**SMALL, attention_dim=4)).eval()
    embedded, vectors = leaves(model, 8)
    history = model.network.histories[0]  # type: ignore[index, union-attr]
    scores = history.scores(embedded)  # type: ignore[union-attr, operator]
    gradients = torch.autograd.grad(scores.square().sum(), list(vectors.values()), allow_unused=True)
    for name, gradient in zip(vectors, gradients, strict=True):
        assert gradient is None or "@attention" in name
    assert sum(g is not None and bool((g != 0).any()) for g in gradients) == 2 * 3 + 1
    *_, candidate, values = history.tokens(embedded)  # type: ignore[union-attr, operator]
    total = candidate.square().sum() + values.square().sum()
    gradients = torch.autograd.grad(total, list(vectors.values()), allow_unused=True)
    for name, gradient in zip(vectors, gradients, strict=True):
        assert gradient is None or "@" not in name


def test_the_auxiliary_head_trains_what_the_search_leaves_out() -> None:
    touched = []
    for weight in (0.0, 1.0):
        model = build(DAREConfig(**{**SMALL, "auxiliary_weight": weight, "top_k": 1}, attention_dim=4)).train()
        batch = random_batch(8, seed=9)
        embedded, vectors = leaves(model, 9)
        output: TrainingOutput = model.network.training_forward(embedded, batch)  # type: ignore[operator]
        loss = output.logits.sum() + sum(t.sum() for t in output.losses.values())
        gradient = torch.autograd.grad(loss, vectors["clicked.item_id@attention"])[0]
        touched.append(int((gradient != 0).any(2).sum()))
    # One event alone has the weight 1 whatever its score: the search's own gradient is 0.
    assert touched[0] == 0
    assert touched[1] > 10


def test_events_with_their_places_are_a_set_and_without_a_sequence() -> None:
    config = DAREConfig(**SMALL, attention_dim=4)
    model = build(config).eval()
    embedded = model.lookup(random_batch(6, seed=10))
    h = embedded.histories["clicked"]
    backwards = torch.arange(h.times.shape[1]).flip(0)
    whole = h._replace(lengths=torch.full_like(h.lengths, h.times.shape[1]))
    turned = whole._replace(features={n: t[:, backwards] for n, t in whole.features.items()})
    one, other = (embedded._replace(histories={**embedded.histories, "clicked": x}) for x in (whole, turned))
    assert (model.network(one) - model.network(other)).abs().max().item() > 1e-3
    history = model.network.histories[0]  # type: ignore[index, union-attr]
    scores, values = history.scores(one), history.tokens(one)[4]  # type: ignore[union-attr, operator]
    from recsys.ops.search_attention import top_k_pool

    rows = embedded.request_of_row
    torch.testing.assert_close(
        top_k_pool(scores[:, backwards], scores[:, backwards], values[:, backwards], whole.lengths, rows, 3),
        top_k_pool(scores, scores, values, whole.lengths, rows, 3),
    )


def test_the_cost_of_the_search_is_that_of_the_attention_width() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for width in (8, 16, 32):
        model = build(DAREConfig(**SMALL, attention_dim=width)).eval()
        embedded = model.lookup(random_batch(6, seed=11))
        with FlopCounterMode(display=False) as counter:
            model.network.attention_scores(embedded)  # type: ignore[operator]
        flops.append(counter.get_total_flops())
    assert flops[2] == 2 * flops[1] == 4 * flops[0] > 0
    model = build(DAREConfig(**SMALL, attention_dim=32))
    assert model.lookup(random_batch(1, seed=0)).candidate["item_id@attention"].shape[1] == 32
    assert model.lookup(random_batch(1, seed=0)).candidate["item_id"].shape[1] == 4


def test_the_initialisation_of_the_code_spares_biases_alone() -> None:
    torch.manual_seed(0)
    config = DAREConfig(initialisation="code", hidden=(300, 100))
    network = LongHistoryNetwork(config, schema(), DARE_ROLES, 16)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            assert (parameter == 0).all(), name
        elif parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1), name
    assert network.norm.weight.abs().max().item() < 0.1
    for name, table in build_dare(config, schema(), dict.fromkeys(TABLE_SIZES, 5000)).lookup.named_parameters():
        assert table.std().item() == pytest.approx(0.01, rel=0.1), name


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DAREConfig, {"attention_dim": 6}, "attention_dim: must be a multiple of 4, got 6"),
        (DAREConfig, {"top_k": 0}, "top_k: must be greater than or equal to 1, got 0"),
        (TWINConfig, {"search": "sampling"}, "auxiliary_weight must be 0 where search is 'sampling'"),
        (
            TWINConfig,
            {"search": "sampling", "auxiliary_weight": 0.0, "projection": True},
            "tables must be 'shared' and projection false",
        ),
        (
            TWINConfig,
            {"search": "sampling", "auxiliary_weight": 0.0, "hash_width": 5},
            "hash_bits must be a multiple of hash_width, got 32 and 5",
        ),
        (
            TWINConfig,
            {"search": "hash", "category": "brand"},
            "category must not be given where search is 'hash', got 'brand'",
        ),
        (TWINConfig, {"hash_bits": 64}, "hash_bits must not be given where search is 'attention', got 64"),
        (TWINConfig, {"search": "hash", "hash_width": 4}, "hash_width must not be given where search is 'hash', got 4"),
    ],
)
def test_a_broken_config_names_its_field(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(kind, changes, source="config")


@pytest.mark.parametrize("category", ["item_id", "category"])
def test_events_of_the_candidates_category_come_first_and_the_newest_of_each_before_others(category: str) -> None:
    one_history = validate(Schema, {**SCHEMA, "histories": SCHEMA["histories"][:1]}, source="one history")
    model = build_twin(TWINConfig(**SMALL, search="category", category=category), one_history, TABLE_SIZES)
    for table in model.lookup.parameters():
        nn.init.normal_(table)
    batch = random_batch(6, seed=12)
    events, offsets = batch.histories["clicked"].features[category], batch.histories["clicked"].offsets.tolist()
    candidates = batch.item[category]
    assert isinstance(events, Tensor)
    assert isinstance(candidates, Tensor)
    oldest = torch.tensor(offsets)[batch.request_of_row].clamp(max=len(events) - 1)
    candidates[:] = events[oldest]
    embedded = model.lookup(replace(batch, histories={"clicked": batch.histories["clicked"]}))
    network: Any = model.network
    search = network.histories[0]._newest_of_category(embedded, batch.request_of_row)
    num_alike = 0
    for row, request in enumerate(batch.request_of_row.tolist()):
        ids = events[offsets[request] : offsets[request + 1]].tolist()
        wanted = sorted(range(len(ids)), key=lambda j: (ids[j] == candidates[row], j), reverse=True)
        assert search[row, : len(ids)].argsort(descending=True).tolist() == wanted
        num_alike += ids.count(int(candidates[row]))
    assert num_alike > 10


@pytest.mark.parametrize("category", [None, "tags", "hour", "cateogry"])
def test_a_category_that_the_history_does_not_have_is_refused_with_the_choices(category: str | None) -> None:
    config = TWINConfig(**SMALL, search="category", category=category)
    got = "none" if category is None else repr(category)
    with pytest.raises(SchemaError, match=f"one value each of history 'clicked' .* got {got}") as caught:
        build_twin(config, schema(), TABLE_SIZES)
    assert caught.value.hint == "it has item_id, category"


def test_a_schema_that_cannot_be_searched_is_refused() -> None:
    no_history = validate(Schema, {**SCHEMA, "histories": []}, source="no history")
    with pytest.raises(SchemaError, match="histories must name at least one history for the model 'dare', got none"):
        build_dare(DAREConfig(), no_history, TABLE_SIZES)
    dense = validate(
        Schema, {**SCHEMA, "histories": [{"name": "clicked", "attributes": ["price"]}]}, source="dense history"
    )
    with pytest.raises(SchemaError, match="history 'clicked' must have a categorical attribute for the model 'twin'"):
        build_twin(TWINConfig(), dense, TABLE_SIZES)


@pytest.mark.parametrize("tables", ["shared", "attention_by_side", "by_role_and_side"])
@pytest.mark.parametrize("search", ["attention", "hash"])
def test_a_dense_attribute_is_in_no_space_of_tables(tables: str, search: str) -> None:
    spec = {**SCHEMA, "histories": [{"name": "seen", "max_length": 5, "attributes": ["item_id", "price"]}]}
    dense = validate(Schema, spec, source="dense attribute")
    config = TWINConfig(embedding_dim=4, top_k=2, tables=tables, search=search)  # type: ignore[arg-type]
    model = build_twin(config, dense, TABLE_SIZES).eval()
    whole = random_batch(6, seed=12)
    seen = whole.histories["seen"]

    def scores(price: float) -> Tensor:
        prices = torch.full((len(seen.times), 1), price)
        logits: Tensor = model(
            replace(whole, histories={"seen": replace(seen, features={**seen.features, "price": prices})})
        )
        return logits

    assert scores(1.0).isfinite().all()
    assert not torch.equal(scores(1.0), scores(2.0)), "it is pooled"


PLANTED = validate(
    Schema,
    {
        "name": "planted",
        "views": {
            "impressions": {"user": "u", "item": "i", "time": "t"},
            "events": {"user": "u", "item": "i", "time": "t"},
            "items": {"path": "i.parquet", "key": "i"},
        },
        "features": [{"name": "i", "kind": "categorical", "scope": "item"}],
        "histories": [{"name": "h", "attributes": ["i"]}],
        "tasks": [{"name": "click", "label": "y"}],
    },
    source="planted",
)
NUM_GROUPS, NUM_ITEMS, NUM_EVENTS = 4, 40, 20


def two_meanings(requests: int, seed: int) -> tuple[Batch, Tensor, Tensor]:
    """An item is of a group, which decides what it is relevant to, and good or bad, which decides what it says there.

    A click depends on how good the events of the candidate's own group were. So items of one group must be alike for
    attention and, the good and the bad, opposites for representation: in few dimensions one vector cannot be both.
    """
    drawn, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    group, is_good = torch.arange(NUM_ITEMS) % NUM_GROUPS, torch.rand(NUM_ITEMS, generator=fixed) < 0.5
    history = torch.randint(0, NUM_ITEMS, (requests, NUM_EVENTS), generator=drawn)
    candidate = torch.randint(0, NUM_ITEMS, (requests,), generator=drawn)
    is_own = group[history] == group[candidate].unsqueeze(1)
    mean = (is_own * torch.where(is_good[history], 1.0, -1.0)).sum(1) / is_own.sum(1).clamp(min=1)
    probability = torch.sigmoid(3 * mean)
    labels = (torch.rand(requests, generator=drawn) < probability).float()
    events = HistoryBatch(
        torch.arange(requests + 1) * NUM_EVENTS,
        torch.zeros(requests * NUM_EVENTS, dtype=torch.int64),
        {"i": (history + 2).flatten()},
    )
    batch = Batch(
        torch.arange(requests),
        torch.zeros(requests, dtype=torch.int64),
        {},
        {},
        {"i": candidate + 2},
        {},
        {"h": events},
        labels.unsqueeze(1),
    )
    return batch, labels, probability


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_where_the_roles_need_different_vectors_dare_beats_twin(seed: int) -> None:
    train, _, _ = two_meanings(8000, 1)
    batches = [train.select_requests(torch.arange(start, start + 500)) for start in range(0, 8000, 500)]
    test, labels, probability = two_meanings(4000, 2)
    sizes: dict[str, Any] = {
        "embedding_dim": 4,
        "top_k": 4,
        "num_slots": 20,
        "hidden": (32, 16),
        "auxiliary_hidden": (16,),
    }
    scores = {}
    for config in (DAREConfig(**sizes, attention_dim=4), TWINConfig(**sizes)):
        torch.manual_seed(seed)
        model = MODELS[type(config)](config, PLANTED, {"i": NUM_ITEMS + 2}).train()
        for table in model.lookup.parameters():
            nn.init.normal_(table, std=0.1)
        optimizer, objective = torch.optim.Adam(model.parameters(), lr=0.03), Objective(PLANTED, {})
        for step in range(250):
            batch = batches[step % len(batches)]
            assert batch.labels is not None
            optimizer.zero_grad()
            objective(model(batch), batch.labels, batch.num_rows).backward()
            optimizer.step()
        with torch.no_grad():
            scores[config.kind] = auc(labels.numpy(), model.eval()(test)[:, 0].numpy())
    ceiling = auc(labels.numpy(), probability.numpy())
    assert scores["dare"] > 0.5 + 0.6 * (ceiling - 0.5)
    assert scores["dare"] > scores["twin"] + 0.1 * (ceiling - 0.5)
