"""AW-MoE agrees with a slow float64 version of the reconstruction, and its gate is what the abstract says of it."""

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
from recsys.metrics import auc
from recsys.models import RankingModel, TrainingOutput
from recsys.models.aw_moe import AWMoEConfig, build_aw_moe, thinned
from recsys.schema import Schema
from tests.references import aw_moe as reference
from tests.references import losses as reference_losses
from tests.synthetic import SCHEMA, TABLE_SIZES, random_batch, schema
from training.objective import Objective

SMALL: dict[str, Any] = {
    "embedding_dim": 4,
    "num_experts": 3,
    "group_hidden": (7, 5),
    "attention_hidden": (6,),
    "expert_hidden": (6, 4),
    "gate_hidden": (5, 4),
    "activation_hidden": (4,),
}
CONTRASTIVE = {"contrastive_weight": 0.5, "mask_probability": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "recommendation": {},
    "search": {"anchor": "query"},
    "search, shared inputs": {"anchor": "query", "gate_inputs": "shared"},
    "w/o gate unit": {"has_gate_unit": False},
    "w/o activation unit": {"has_activation_unit": False, "gate_inputs": "shared"},
    "w/o both": {"has_gate_unit": False, "has_activation_unit": False, "anchor": "query"},
    "mean of votes": {"gate_norm": "mean"},
    "softmax": {"gate_norm": "softmax"},
    "moe mean": {"gate": "mean"},
    "category moe": {"gate": "anchor", "anchor": "query"},
    "category moe, candidate": {"gate": "anchor"},
    "din": {"gate": "none", "num_experts": 1},
    "dnn": {"gate": "none", "num_experts": 1, "pooling": "mean"},
}


def scrambled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter at random, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.4)
    return network


def build(changes: dict[str, Any], seed: int = 0) -> RankingModel:
    torch.manual_seed(seed)
    model = build_aw_moe(AWMoEConfig(**{**SMALL, **changes}), schema(), TABLE_SIZES)
    scrambled(model, seed)
    return model


def double(embedded: Embedded) -> Embedded:
    converted: Embedded = tree_map(lambda t: t.detach().double() if t.is_floating_point() else t, embedded)
    return converted


def plain(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().double().numpy() for name, t in features.items()}


def expected_of(
    model: RankingModel, embedded: Embedded, kept: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    config: AWMoEConfig = model.network.config  # type: ignore[assignment]
    is_search = config.anchor == "query"
    return reference.aw_moe(
        plain(embedded.request),
        plain(embedded.candidate),
        {name: (plain(h.features), h.lengths.tolist()) for name, h in embedded.histories.items()},
        embedded.request_of_row.tolist(),
        {name: tensor.detach().double().numpy() for name, tensor in model.network.state_dict().items()},
        reference.Names(
            query=["hour"] if is_search else [],
            request=["user_id", "age", "interests", *([] if is_search else ["hour"])],
            candidate=["price", "source"],
            shared={"clicked": ["item_id", "category", "tags"], "seen": ["item_id"]},
            own={"clicked": ["dwell"], "seen": []},
        ),
        reference.Variant(**{name: getattr(config, name) for name in reference.Variant._fields}),
        kept,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gates_equal_the_reference(variant: str) -> None:
    model = build(VARIANTS[variant], seed=1).eval()
    embedded = model.lookup(random_batch(5, seed=5))
    assert all((h.lengths == 0).any() for h in embedded.histories.values())
    logits, gates = expected_of(model, embedded)
    np.testing.assert_allclose(model.network(embedded).detach(), logits, rtol=1e-5, atol=1e-6)
    network, exact = model.network.double(), double(embedded)
    np.testing.assert_allclose(network(exact).detach(), logits, rtol=1e-10, atol=1e-11)
    gate = network.gate(exact).detach()  # type: ignore[operator]
    if VARIANTS[variant].get("anchor") == "query":
        assert gate.shape[0] == len(embedded.time)
        gate = gate[embedded.request_of_row]
    np.testing.assert_allclose(gate, gates, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("anchor", ["query", "candidate"])
def test_the_contrastive_loss_equals_the_reference(anchor: str) -> None:
    """Anchors, thinned positives, users and single events, each row of a request counted."""
    model = build({"anchor": anchor, **CONTRASTIVE, "num_negatives": 4, "temperature": 0.6}, seed=2).train()
    batch = random_batch(9, seed=2)
    users = torch.tensor([4, 4, 2, 0, 9, 0, 4, 5, 6])
    batch = replace(batch, user_row=users)
    embedded = double(model.lookup(batch))
    torch.manual_seed(5)
    output: TrainingOutput = model.network.double().training_forward(embedded, batch)  # type: ignore[operator]
    torch.manual_seed(5)
    kept = {n: thinned(h.lengths, h.times.shape[1], 0.5) for n, h in embedded.histories.items()}
    assert any((k.sum(1) < h.lengths).any() for k, h in zip(kept.values(), embedded.histories.values(), strict=True))
    _, gates = expected_of(model, embedded)
    _, positives = expected_of(model, embedded, {n: k.numpy() for n, k in kept.items()})
    rows = batch.request_of_row
    identity = torch.where(users > 0, users, -1 - torch.arange(9))[rows]
    losses = reference_losses.contrastive(
        gates.tolist(), positives.tolist(), identity.tolist(), cosine=True, temperature=0.6, num_negatives=4
    )
    several = torch.stack([h.lengths > 1 for h in batch.histories.values()]).any(0)[rows]
    assert not several.all()
    total = sum(loss for loss, counts in zip(losses, several.tolist(), strict=True) if counts)
    assert output.losses["contrastive"].item() == pytest.approx(0.5 * total, rel=1e-9)
    torch.testing.assert_close(output.logits, model.network(embedded))


def test_nothing_masked_gives_the_analytic_value() -> None:
    """g+ = g: the positive's cosine is 1, and only the negatives' are left to the gates."""
    model = build({**CONTRASTIVE, "mask_probability": 0.0, "temperature": 1.0}).train()
    batch = replace(random_batch(6, seed=3), user_row=None)
    embedded = model.lookup(batch)
    output: TrainingOutput = model.network.training_forward(embedded, batch)  # type: ignore[operator]
    gate = nn.functional.normalize(model.network.gate(embedded), dim=1)  # type: ignore[operator]
    expected, rows = 0.0, batch.request_of_row
    several = torch.stack([h.lengths > 1 for h in batch.histories.values()]).any(0)[rows]
    for row in range(batch.num_rows):
        if several[row]:
            others = gate[rows != rows[row]] @ gate[row]
            expected += torch.log(1 + (others - 1).exp().sum()).item()
    assert output.losses["contrastive"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def gradient_of_gate(model: RankingModel) -> tuple[Tensor, Embedded]:
    embedded = model.lookup(random_batch(5, seed=4))
    candidate = {name: t.detach().clone().requires_grad_() for name, t in embedded.candidate.items()}
    embedded = embedded._replace(candidate=candidate)
    return model.network.gate(embedded), embedded  # type: ignore[operator]


def test_in_search_the_gate_is_one_for_all_candidates() -> None:
    model = build({"anchor": "query"})
    gate, embedded = gradient_of_gate(model)
    gradients = torch.autograd.grad(gate.square().sum(), list(embedded.candidate.values()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)
    assert gate.shape == (5, 3)


def test_in_recommendation_the_gate_knows_the_candidate() -> None:
    gate, embedded = gradient_of_gate(build({}))
    gradients = torch.autograd.grad(gate.square().sum(), [embedded.candidate[n] for n in ("item_id", "category")])
    assert all((gradient != 0).any(1).all() for gradient in gradients)
    assert gate.shape == (len(embedded.request_of_row), 3)


@pytest.mark.parametrize("anchor", ["query", "candidate"])
def test_one_expert_whose_weight_is_one_is_din(anchor: str) -> None:
    """A softmax over one expert is 1 whatever the gate says."""
    model = build({"num_experts": 1, "gate_norm": "softmax", "anchor": anchor}).eval()
    din = build({"num_experts": 1, "gate": "none", "anchor": anchor}, seed=7).eval()
    missing, unexpected = din.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("gate" in key for key in unexpected)
    batch = random_batch(5, seed=5)
    torch.testing.assert_close(model(batch), din(batch), rtol=0, atol=0)


def test_the_contrastive_loss_reaches_tables_and_gate_but_not_the_experts() -> None:
    for inputs in ("own", "shared"):
        model = build({**CONTRASTIVE, "gate_inputs": inputs}).train()
        output = model(random_batch(8, seed=6))
        output.losses["contrastive"].backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
        assert any(name.startswith("lookup.") for name in touched)
        assert any(name.startswith("network.gates.") for name in touched)
        assert any(name.startswith("network.behaviours.") for name in touched) == (inputs == "shared")
        assert not any(name.startswith(("network.experts", "network.attention", "network.other")) for name in touched)


def test_a_stopped_gradient_makes_the_positive_a_constant() -> None:
    gradients = []
    for stop in (False, True):
        model = build({**CONTRASTIVE, "has_stop_gradient": stop}).train()
        torch.manual_seed(0)
        output = model(random_batch(8, seed=6))
        output.losses["contrastive"].backward()
        gradients.append((output.losses["contrastive"].item(), model.network.gates[0].default.grad))  # type: ignore[index, union-attr]
    assert gradients[0][0] == gradients[1][0]
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_new_users_are_told_apart_by_candidate() -> None:
    """Without a default event the gate would be 0, and every candidate's logit with it."""
    model = build({}).eval()
    batch = random_batch(3, 6, seed=7, empty_history=True)
    embedded = model.lookup(batch)
    assert (model.network.gate(embedded).abs() > 1e-4).any(1).all()  # type: ignore[operator]
    logits = model(batch)[batch.request_of_row == 0]
    assert logits.std(0).min().item() > 1e-4


def test_the_last_event_stays() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 2, 5]).repeat(5000)
    kept = thinned(lengths, 6, 0.9)
    assert not (kept & (torch.arange(6) >= lengths.unsqueeze(1))).any()
    assert torch.equal(kept.sum(1) > 0, lengths > 0)
    two = kept[lengths == 2][:, :2].double()
    # Both events alike: kept with 1 - p, or as the one that stays where both would go.
    assert two.mean(0).tolist() == pytest.approx([0.1 + 0.9 * 0.9 / 2] * 2, abs=0.02)
    assert torch.equal(thinned(lengths, 6, 0.0), torch.arange(6) < lengths.unsqueeze(1))
    five = thinned(torch.full((20_000,), 5), 5, 0.3).double().mean().item()
    assert five == pytest.approx(0.7 + 0.3**5 / 5, abs=0.01)


def test_a_seed_decides_what_is_masked() -> None:
    batch, losses = random_batch(8, seed=8), []
    for seed in (1, 1, 2):
        model = build(CONTRASTIVE).train()
        torch.manual_seed(seed)
        losses.append(model(batch).losses["contrastive"].item())
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_of_two_batches_of_strangers_is_a_sum() -> None:
    """Sums over rows: doubling every request doubles the loss, for a user is no negative of itself."""
    batch = replace(random_batch(4, seed=9), user_row=torch.tensor([1, 2, 3, 4]))
    twice = batch.select_requests(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    for anchor in ("query", "candidate"):
        model = build({**CONTRASTIVE, "mask_probability": 0.0, "num_negatives": 1, "anchor": anchor}).train()
        once, both = model(batch).losses["contrastive"], model(twice).losses["contrastive"]
        torch.testing.assert_close(both, 2 * once)


def test_in_search_the_gate_costs_nothing_for_another_candidate() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts: dict[str, list[int]] = {}
    for gate, experts in (("attention", 1), ("none", 1)):
        model = build({"anchor": "query", "gate": gate, "num_experts": experts}).eval()
        for rows in (10, 20):
            embedded = model.lookup(random_batch(1, seed=6))
            embedded = embedded._replace(
                candidate={n: t[:1].expand(rows, -1).contiguous() for n, t in embedded.candidate.items()},
                request_of_row=torch.zeros(rows, dtype=torch.int64),
            )
            with FlopCounterMode(display=False) as counter:
                model.network.single_request(embedded)  # type: ignore[operator]
            counts.setdefault(gate, []).append(counter.get_total_flops())
    weighing = 2 * 10 * 2  # one multiplication a row, expert and task
    assert counts["attention"][1] - counts["attention"][0] == counts["none"][1] - counts["none"][0] + weighing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 6}, "embedding_dim: must be a multiple of 4, got 6"),
        ({"gate": "none"}, "num_experts must be 1 where gate is 'none', got 4"),
        ({"gate": "anchor", "contrastive_weight": 0.1}, "contrastive_weight must be 0 where gate is 'anchor'"),
        ({"gate": "mean", "has_gate_unit": False}, "has_gate_unit and has_activation_unit must be true"),
        ({"has_activation_unit": False, "gate_norm": "mean"}, "gate_norm must be 'none' or 'softmax'"),
        ({"gate": "none", "num_experts": 1, "gate_norm": "softmax"}, "gate_norm must be 'none' where gate is 'none'"),
        ({"mask_probability": 1.0}, "mask_probability: must be less than 1, got 1.0"),
        ({"temperature": 0.0}, "temperature: must be greater than 0, got 0.0"),
    ],
)
def test_a_broken_config_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(AWMoEConfig, changes, source="config")


def test_a_schema_without_history_or_query_is_refused() -> None:
    no_history = validate(Schema, {**SCHEMA, "histories": []}, source="no history")
    with pytest.raises(SchemaError, match="histories must name at least one history for the model 'aw_moe'"):
        build_aw_moe(AWMoEConfig(), no_history, TABLE_SIZES)
    features = [f for f in SCHEMA["features"] if f["scope"] != "context"]
    no_context = validate(Schema, {**SCHEMA, "features": features}, source="no context")
    with pytest.raises(SchemaError, match="at least one of scope context where the anchor is 'query'"):
        build_aw_moe(AWMoEConfig(anchor="query"), no_context, TABLE_SIZES)
    build_aw_moe(AWMoEConfig(), no_context, TABLE_SIZES)


PLANTED = validate(
    Schema,
    {
        "name": "planted",
        "views": {
            "impressions": {"user": "u", "item": "i", "time": "t"},
            "events": {"user": "u", "item": "i", "time": "t"},
            "items": {"path": "i.parquet", "key": "i"},
        },
        "features": [
            {"name": "i", "kind": "categorical", "scope": "item"},
            {"name": "page", "kind": "categorical", "scope": "context"},
        ],
        "histories": [{"name": "h", "attributes": ["i"]}],
        "tasks": [{"name": "click", "label": "y"}],
    },
    source="planted",
)
NUM_HABITS, NUM_ITEMS = 4, 120


def users_of_habits(users: int, seed: int, *, short: float) -> tuple[Batch, Tensor, Tensor]:
    """Each habit likes another half of the items, and most of a user's events are items that the habit likes.

    Args:
        short: share of users of whom one to three events are known; of the others, 20 are.
    """
    drawn, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    likes = torch.rand(NUM_HABITS, NUM_ITEMS, generator=fixed) < 0.5
    habit = torch.randint(0, NUM_HABITS, (users,), generator=drawn)
    history = torch.multinomial(torch.where(likes[habit], 1.0, 0.25), 20, replacement=True, generator=drawn)
    candidate = torch.randint(0, NUM_ITEMS, (users,), generator=drawn)
    labels = (torch.rand(users, generator=drawn) < torch.where(likes[habit, candidate], 0.85, 0.15)).float()
    is_short = torch.rand(users, generator=drawn) < short
    lengths = torch.where(is_short, torch.randint(1, 4, (users,), generator=drawn), 20)
    kept = torch.arange(20) < lengths.unsqueeze(1)
    events = HistoryBatch(
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.zeros(int(lengths.sum()), dtype=torch.int64),
        {"i": (history + 2)[kept]},
    )
    batch = Batch(
        torch.arange(users),
        torch.zeros(users, dtype=torch.int64),
        {},
        {"page": torch.ones(users, dtype=torch.int64)},
        {"i": candidate + 2},
        {},
        {"h": events},
        labels.unsqueeze(1),
        user_row=torch.arange(users) + 1,
    )
    return batch, labels, lengths


def planted_gate(seed: int, table_size: int, **changes: Any) -> RankingModel:
    """A small AW-MoE whose gate reads the history alone: the one page is its anchor."""
    config = AWMoEConfig(
        embedding_dim=8,
        group_hidden=(16,),
        attention_hidden=(16,),
        expert_hidden=(32, 16),
        gate_hidden=(16,),
        activation_hidden=(16,),
        anchor="query",
        **changes,
    )
    torch.manual_seed(seed)
    model = build_aw_moe(config, PLANTED, {"i": table_size, "page": 3}).train()
    for table in model.lookup.parameters():
        nn.init.normal_(table, std=0.1)
    return model


def take_step(model: RankingModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    assert batch.labels is not None
    optimizer.zero_grad()
    Objective(PLANTED, {})(model(batch), batch.labels, batch.num_rows).backward()
    optimizer.step()


def gains_where_histories_are_cut(seed: int) -> dict[str, float]:
    """What the loss adds to the AUC of users of whom one to three events are scored by (short), or 20 (long)."""
    train, _, _ = users_of_habits(6000, 1, short=0.0)
    batches = [train.select_requests(torch.arange(start, start + 300)) for start in range(0, 6000, 300)]
    test, labels, lengths = users_of_habits(4000, 2, short=0.5)
    gains: dict[str, float] = {}
    for weight in (0.0, 0.5):
        model = planted_gate(seed, NUM_ITEMS + 2, contrastive_weight=weight, mask_probability=0.9)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
        for step in range(300):
            take_step(model, optimizer, batches[step % len(batches)])
        with torch.no_grad():
            logits = model.eval()(test)[:, 0].numpy()
        for name, rows in (("short", (lengths < 4).numpy()), ("long", (lengths == 20).numpy())):
            found = auc(labels.numpy()[rows], logits[rows])
            gains[name] = found - gains.get(name, 0.0)
    return gains


@pytest.mark.slow
def test_the_contrastive_loss_makes_the_gate_robust_to_cut_histories() -> None:
    """Every user has 20 events in training; half of them are cut to one to three when they are scored, and only then.

    The gain is larger there than where all 20 are known. It shows robustness to a change between training and scoring,
    not help for users who have short histories in both: for that see the next test. The setting (a high share of events
    dropped) was chosen with the seeds 0, 1 and 2 in view; what is held is their mean.
    """
    runs = [gains_where_histories_are_cut(seed) for seed in range(3)]
    short, long = (sum(gains[name] for gains in runs) / len(runs) for name in ("short", "long"))
    assert short > 0.02, runs
    assert short > long + 0.02, runs


NUM_GROUPS, NUM_HISTORY_ITEMS, NUM_CANDIDATES = 8, 400, 20


def mostly_short_histories(users: int, seed: int, *, impressions: int) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Users of eight groups: one in ten has 20 events, the others one to three; all have as many impressions.

    The group decides which of 400 items a user's events are (its own fifty, now and then another) and which of 20
    other items, the candidates, the user clicks (with .85, else .15). So what is to be learnt is the group of each of
    400 items: labels tell it slowly, but in the few long histories items of a group stand side by side.

    Returns:
        The batch, its labels (N,), and of each row how many events are known.
    """
    drawn, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    likes = torch.rand(NUM_GROUPS, NUM_CANDIDATES, generator=fixed) < 0.5
    group = torch.randint(0, NUM_GROUPS, (users,), generator=drawn)
    is_own = torch.arange(NUM_HISTORY_ITEMS) % NUM_GROUPS == group.unsqueeze(1)
    events = torch.multinomial(torch.where(is_own, 1.0, 0.02), 20, replacement=True, generator=drawn)
    is_long = torch.rand(users, generator=drawn) < 0.1
    lengths = torch.where(is_long, 20, torch.randint(1, 4, (users,), generator=drawn))
    user = torch.arange(users).repeat_interleave(impressions)
    candidate = torch.randint(0, NUM_CANDIDATES, (len(user),), generator=drawn)
    labels = (torch.rand(len(user), generator=drawn) < torch.where(likes[group[user], candidate], 0.85, 0.15)).float()
    kept = torch.arange(20) < lengths[user].unsqueeze(1)
    history = HistoryBatch(
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths[user].cumsum(0)]),
        torch.zeros(int(kept.sum()), dtype=torch.int64),
        {"i": (events[user] + NUM_CANDIDATES + 2)[kept]},
    )
    batch = Batch(
        torch.arange(len(user)),
        torch.zeros(len(user), dtype=torch.int64),
        {},
        {"page": torch.ones(len(user), dtype=torch.int64)},
        {"i": candidate + 2},
        {},
        {"h": history},
        labels.unsqueeze(1),
        user_row=user + 1,
    )
    return batch, labels.numpy(), lengths[user].numpy()


def auc_of_short_histories(seed: int, **contrastive: float) -> float:
    """Test AUC of users of one to three events, at the epoch (of 15) of the best validation AUC of all users."""
    train, _, _ = mostly_short_histories(2000, 10 * seed + 1, impressions=2)
    validation, validation_labels, _ = mostly_short_histories(2000, 10 * seed + 2, impressions=1)
    test, test_labels, lengths = mostly_short_histories(6000, 10 * seed + 3, impressions=1)
    assert (lengths <= 3).mean() > 0.85
    model = planted_gate(seed, NUM_HISTORY_ITEMS + NUM_CANDIDATES + 2, **contrastive)
    optimizer, best, found = torch.optim.Adam(model.parameters(), lr=0.005), 0.0, 0.0
    for _ in range(15):
        model.train()
        for requests in torch.randperm(train.num_rows).split(250):
            take_step(model, optimizer, train.select_requests(requests))
        model.eval()
        with torch.no_grad():
            value = auc(validation_labels, model(validation)[:, 0].numpy())
            if value > best:
                best = value
                found = auc(test_labels[lengths <= 3], model(test)[:, 0].numpy()[lengths <= 3])
    return found


@pytest.mark.slow
def test_the_contrastive_loss_helps_users_of_short_histories_where_most_have_them() -> None:
    """Few users have long histories and most have short ones, in training and in scoring: the short ones gain.

    Both models are taken at their best epoch by validation. A user's two impressions are often in one batch: they are
    no negatives of each other. Data and setting (weight, share of events dropped, epochs) were chosen with seeds 1 to
    3, where the gains were .046, .049 and .066; what is held is seeds 11 to 14.
    """
    gains = []
    for seed in range(11, 15):
        alone = auc_of_short_histories(seed)
        gains.append(auc_of_short_histories(seed, contrastive_weight=0.5, mask_probability=0.5) - alone)
    assert min(gains) > 0, gains
    assert sum(gains) / len(gains) > 0.03, gains
