"""What every model keeps, whatever it is: a new one joins by its line in ``MODELS`` and an entry in ``CASES``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils._pytree import tree_map

from recsys.batch import Bags, Batch, Column, HistoryBatch
from recsys.config import Config
from recsys.embedded import Embedded, EmbeddedHistory
from recsys.models import MODELS, RankingModel, build_model, split_output
from recsys.models.aw_moe import AWMoEConfig
from recsys.models.dare import DAREConfig, TWINConfig
from recsys.models.dcnv2 import DCNv2Config
from recsys.models.deepfm import DeepFMConfig
from recsys.models.din import DINConfig
from recsys.models.dnn import DNNConfig
from recsys.models.finalmlp import DualMLPConfig, FinalMLPConfig
from recsys.models.fm import FMConfig
from recsys.models.infnet import INFNetConfig
from recsys.models.lr import LRConfig
from recsys.models.mmoe import MMoEConfig
from recsys.models.ple import PLEConfig
from recsys.models.suan import LightSUANConfig, SUANConfig
from recsys.models.wide_deep import WideDeepConfig
from tests.synthetic import TABLE_SIZES, random_batch, schema
from training.objective import Objective

AW_MOE: dict[str, Any] = {
    "embedding_dim": 4,
    "num_experts": 3,
    "group_hidden": (8,),
    "attention_hidden": (6,),
    "expert_hidden": (16, 8),
    "gate_hidden": (8, 6),
    "activation_hidden": (6,),
}

CASES: dict[str, Config] = {
    "din": DINConfig(embedding_dim=4, attention_hidden=(6,), hidden=(16, 8)),
    "din prelu": DINConfig(
        embedding_dim=4, attention_hidden=(6, 5), hidden=(16,), attention_activation="prelu", activation="prelu"
    ),
    "din mean": DINConfig(embedding_dim=4, pooling="mean", hidden=(16, 8)),
    "din softmax": DINConfig(embedding_dim=4, attention_hidden=(6,), hidden=(16, 8), attention_softmax=True),
    "dare": DAREConfig(embedding_dim=8, attention_dim=4, top_k=3, num_slots=6, hidden=(16, 8), auxiliary_hidden=(8,)),
    "twin": TWINConfig(embedding_dim=4, top_k=3, num_slots=6, hidden=(16, 8), auxiliary_hidden=(8,)),
    "twin 4e": TWINConfig(
        embedding_dim=4, top_k=3, num_slots=6, hidden=(16,), auxiliary_hidden=(8,), tables="by_role_and_side"
    ),
    "twin projected": TWINConfig(
        embedding_dim=4, top_k=3, num_slots=6, hidden=(16,), auxiliary_hidden=(8,), projection=True, has_product=False
    ),
    "sim hard": TWINConfig(
        embedding_dim=4,
        top_k=8,
        num_slots=6,
        hidden=(16,),
        auxiliary_weight=0,
        search="category",
        category="item_id",
    ),
    "eta": TWINConfig(embedding_dim=4, top_k=3, num_slots=6, hidden=(16,), auxiliary_hidden=(8,), search="hash"),
    "sdim": TWINConfig(
        embedding_dim=4, num_slots=6, hidden=(16,), auxiliary_weight=0, search="sampling", hash_bits=8, hash_width=2
    ),
    "aw_moe & cl": AWMoEConfig(**AW_MOE, contrastive_weight=0.01, mask_probability=0.4),
    "aw_moe": AWMoEConfig(**AW_MOE),
    "aw_moe query & cl": AWMoEConfig(
        **AW_MOE, anchor="query", contrastive_weight=0.01, mask_probability=0.4, num_negatives=5
    ),
    "aw_moe w/o gate unit": AWMoEConfig(**AW_MOE, has_gate_unit=False, gate_norm="mean", gate_inputs="shared"),
    "aw_moe w/o activation unit": AWMoEConfig(
        **AW_MOE, has_activation_unit=False, gate_norm="softmax", anchor="query", gate_inputs="shared"
    ),
    "moe mean": AWMoEConfig(**AW_MOE, gate="mean"),
    "category moe": AWMoEConfig(**AW_MOE, gate="anchor", anchor="query"),
    "category moe, candidate": AWMoEConfig(**AW_MOE, gate="anchor", gate_norm="softmax"),
    "moe din": AWMoEConfig(**{**AW_MOE, "num_experts": 1}, gate="none", anchor="query"),
    "moe dnn": AWMoEConfig(**{**AW_MOE, "num_experts": 1}, gate="none", pooling="mean"),
    "infnet": INFNetConfig(embedding_dim=4, gate_hidden=(8,), proxy_hidden=(8,), hidden=(16, 8)),
    "infnet options": INFNetConfig(
        embedding_dim=4,
        num_heads=2,
        gate_hidden=(8,),
        gate_residual=True,
        input_norm=True,
        position="learned",
        target_attention=True,
        heads_read="task_and_shared_tokens",
        projections="per_source",
        proxy_hidden=(8,),
        hidden=(16, 8),
    ),
    "mmoe": MMoEConfig(embedding_dim=4, num_experts=3, expert_hidden=(16, 8), tower_hidden=(8,)),
    "mmoe din": MMoEConfig(
        embedding_dim=4, history_pooling="din", num_experts=2, expert_hidden=(8,), tower_hidden=(8,), activation="dice"
    ),
    "ple": PLEConfig(embedding_dim=4, expert_hidden=(16, 8), tower_hidden=(8,)),
    "lr": LRConfig(),
    "fm": FMConfig(embedding_dim=5),
    "dnn": DNNConfig(embedding_dim=5, hidden=(16, 8), dropout=0.0),
    "wide_deep": WideDeepConfig(embedding_dim=4, hidden=(16, 8), dropout=0.0),
    "deepfm": DeepFMConfig(embedding_dim=5, hidden=(16,), dropout=0.0, batch_norm=False),
    "dcnv2": DCNv2Config(embedding_dim=3, hidden=(16, 8), num_cross_layers=2, dropout=0.0, batch_norm=False),
    "dualmlp": DualMLPConfig(embedding_dim=5, hidden_1=(16, 8), hidden_2=(12,), dropout_1=0.0, dropout_2=0.0),
    "finalmlp": FinalMLPConfig(
        embedding_dim=5,
        hidden_1=(16, 8),
        hidden_2=(12,),
        dropout_1=0.0,
        dropout_2=0.0,
        context_1=("user_id", "age", "interests"),
        context_2=("item_id", "price", "hour"),
        gate_hidden=(6,),
        num_heads=4,
    ),
    "finalmlp static gates": FinalMLPConfig(
        embedding_dim=5, hidden_1=(16, 8), hidden_2=(12,), dropout_1=0.0, dropout_2=0.0, batch_norm=False, num_heads=2
    ),
    "suan": SUANConfig(embedding_dim=4, hidden=(16, 8)),
    "suan code": SUANConfig(
        embedding_dim=4,
        width=8,
        num_layers=1,
        hidden=(16,),
        norm_style="code",
        alignment_pooling="causal",
        candidate_mapping="slots",
        bias_per_head=True,
    ),
    "lightsuan": LightSUANConfig(embedding_dim=4, hidden=(16, 8), num_layers=1, window=2, dilation=3),
}
BASELINES = {"lr", "fm", "dnn", "wide_deep", "deepfm", "dcnv2", "dualmlp", "finalmlp", "finalmlp static gates"}
SLOW = {"fm", "dnn", "wide_deep", "dcnv2", "dualmlp"}
"""Models that share their layers with others, left to `make test-all`."""
ORDER_FREE = {"din", "din mean", "din prelu", "din softmax", "infnet", "mmoe", "mmoe din", "ple"} | BASELINES
ORDER_FREE |= {name for name, config in CASES.items() if config.kind == "aw_moe"}  # type: ignore[attr-defined]
"""Models for which a history is a bag."""
DRAWING = {"aw_moe & cl", "aw_moe query & cl"}
"""Models whose own losses draw at random."""
SEARCHING = {"dare", "twin", "twin 4e", "twin projected", "sim hard", "eta", "sdim"}
"""Models that look at no more than some events of a history."""

_GATE = ("mlp.linears.0", "output")


def _weights_and_biases(*layers: str) -> list[str]:
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


STATE_DICT_KEYS: dict[str, list[str]] = {
    "din": [
        "attention.{history}.unit.first.weight",
        "attention.{history}.unit.first.bias",
        "attention.{history}.unit.output.weight",
        "attention.{history}.unit.output.bias",
        "attention.{history}.unit.activations.0.alpha",
        "attention.{history}.unit.activations.0.running_mean",
        "attention.{history}.unit.activations.0.running_var",
        "mlp.first.weight",
        "mlp.first.bias",
        "mlp.after_first.activation.alpha",
        "mlp.after_first.activation.running_mean",
        "mlp.after_first.activation.running_var",
        "mlp.rest.linears.0.weight",
        "mlp.rest.linears.0.bias",
        "mlp.rest.after.0.activation.alpha",
        "mlp.rest.after.0.activation.running_mean",
        "mlp.rest.after.0.activation.running_var",
        "output.weight",
        "output.bias",
    ],
    "mmoe": [
        *_weights_and_biases("experts.first", "gates", "towers.{history}.0.linears.0", "towers.{history}.1"),
        "experts.rest.weights.0",
        "experts.rest.biases.0",
    ],
    "infnet": [
        *_weights_and_biases(
            *("tokens.dense.{history}", "tokens.event.{history}"),
            *("proxies.categorical.mlp.first", "proxies.categorical.output"),
            *("proxies.sequence.mlp.linears.0", "proxies.sequence.output", "proxies.sequence.norm"),
            *(f"blocks.0.norm.{stream}" for stream in ("categorical", "sequence", "shared", "task")),
            *(f"blocks.1.norm.{stream}" for stream in ("shared", "task")),
            *(f"blocks.0.gate.{kind}.{part}" for kind in ("categorical", "sequence", "task") for part in _GATE),
            *(f"blocks.1.gate.task.{part}" for part in _GATE),
            *("heads.{history}.0.linears.0", "heads.{history}.0.linears.1", "heads.{history}.1"),
        ),
        *("task_tokens.shared", "task_tokens.task"),
        *(
            key
            for block, streams in ((0, ("categorical", "sequence", "shared", "task")), (1, ("shared", "task")))
            for stream in streams
            for source in ("categorical", "sequence", "task")
            if source not in {"categorical": ("categorical",), "sequence": ("sequence",)}.get(stream, ("task",))
            for key in (
                f"blocks.{block}.query.{stream}_to_{source}.weight",
                f"blocks.{block}.source.{source}_by_{stream}.key",
                f"blocks.{block}.source.{source}_by_{stream}.value",
            )
        ),
    ],
}
_UNIFIED_ATTENTION_BLOCK = [
    "norms.0.weight",
    "norms.1.weight",
    "norms.2.weight",
    "self_attention.query.weight",
    "self_attention.key.weight",
    "self_attention.value.weight",
    "self_attention.output.weight",
    "profile_attention.query.weight",
    "profile_attention.key.weight",
    "profile_attention.value.weight",
    "profile_attention.output.weight",
    "alignment.squeeze.weight",
    "alignment.first.weight",
    "alignment.second.weight",
    "feed_forward.gate.weight",
    "feed_forward.gate.bias",
    "feed_forward.up.weight",
    "feed_forward.up.bias",
    "feed_forward.down.weight",
    "feed_forward.down.bias",
]
STATE_DICT_KEYS["suan"] = [
    "tokens.0.weight",
    "tokens.0.bias",
    "to_event.{history}.weight",
    "to_event.{history}.bias",
    "encoders.{history}.positions",
    "encoders.{history}.hours",
    "encoders.{history}.of_hour.weight",
    "encoders.{history}.of_hour.bias",
    "encoders.{history}.bias.position",
    "encoders.{history}.bias.time",
    *(f"encoders.{{history}}.blocks.{layer}.{key}" for layer in range(2) for key in _UNIFIED_ATTENTION_BLOCK),
    "mlp.first.weight",
    "mlp.first.bias",
    "mlp.after_first.activation.alpha",
    "mlp.after_first.activation.running_mean",
    "mlp.after_first.activation.running_var",
    "mlp.rest.linears.0.weight",
    "mlp.rest.linears.0.bias",
    "mlp.rest.after.0.activation.alpha",
    "mlp.rest.after.0.activation.running_mean",
    "mlp.rest.after.0.activation.running_var",
    "output.weight",
    "output.bias",
]
TABLE_KEYS = {f"embedding_bags.{table}.weight" for table in TABLE_SIZES}


def build(name: str, *, seed: int = 0) -> RankingModel:
    """A model whose moving averages have seen some batches and whose tables start at a size where they matter."""
    torch.manual_seed(seed)
    model = build_model(CASES[name], schema(), TABLE_SIZES)
    with torch.no_grad():
        for table in model.lookup.parameters():
            table.normal_(std=0.5)
        for moving in range(3):
            model.train()(random_batch(8, seed=100 + moving))
    return model


# One case of each model in every run; its variants where there is more time.
_KINDS = [type(config) for config in CASES.values()]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW or type(config) in _KINDS[:place] else [])
        for place, (name, config) in enumerate(CASES.items())
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str) -> RankingModel:
    return build(name).eval()


def loss_of(model: RankingModel, batch: Batch) -> Tensor:
    """What training minimises: the logits' cross-entropy, and the network's own losses."""
    assert batch.labels is not None
    loss: Tensor = Objective(schema(), {})(model(batch), batch.labels, batch.num_rows)
    return loss


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_every_model_is_covered() -> None:
    assert {type(config) for config in CASES.values()} == set(MODELS)


def test_logits_are_rows_by_tasks_in_single_precision(model: RankingModel) -> None:
    batch = random_batch(5, seed=1)
    logits = model(batch)
    assert logits.shape == (batch.num_rows, 2)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_every_parameter_gets_a_gradient_from_the_loss(name: str) -> None:
    model, batch = build(name).train(), random_batch(16, seed=2)
    assert batch.labels is not None
    loss_of(model, batch).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    for parameter_name, parameter in model.network.named_parameters():
        # A softmax does not see what is added to every score of a history.
        if not (name == "din softmax" and parameter_name.endswith("unit.output.bias")):
            assert (parameter.grad != 0).any(), parameter_name
    for table_name, table in model.lookup.named_parameters():
        assert table.grad is not None
        assert (table.grad != 0).any(), table_name


def test_each_task_has_its_own_logit(name: str) -> None:
    model, batch = build(name).train(), random_batch(6, seed=3)
    logits = split_output(model(batch)).logits
    for task in range(2):
        (gradient,) = torch.autograd.grad(logits[:, task].sum(), logits, retain_graph=True)
        assert (gradient[:, 1 - task] == 0).all()
    assert not torch.allclose(logits[:, 0], logits[:, 1])


@pytest.mark.parametrize("training", [True, False])
def test_one_row_is_a_batch(name: str, training: bool) -> None:
    batch = one_request(seed=4)
    batch = rows_of(batch, torch.tensor([0]))
    logits = split_output(build(name).train(training)(batch)).logits
    assert logits.shape == (1, 2)
    logits.sum().backward()
    assert torch.isfinite(logits).all()


def test_a_rows_score_does_not_depend_on_its_batch_mates(model: RankingModel) -> None:
    batch = random_batch(6, seed=5)
    logits = model(batch)
    for row in range(batch.num_rows):
        assert_same(model(rows_of(batch, torch.tensor([row]))), logits[row : row + 1])


def test_no_features_value_leaks_to_another_row(model: RankingModel) -> None:
    embedded = model.lookup(random_batch(4, seed=6))
    rows = len(embedded.request_of_row)
    candidate = {name: t.detach().clone().requires_grad_() for name, t in embedded.candidate.items()}
    logits = model.network(embedded._replace(candidate=candidate))
    gradients = torch.autograd.grad(logits[0].sum(), list(candidate.values()), allow_unused=True)
    for key, gradient in zip(candidate, gradients, strict=True):
        if gradient is None:  # a candidate may be read from other tables than an event
            assert any(other.startswith(f"{key}@") for other in candidate)
            continue
        assert (gradient[0] != 0).any()
        assert (gradient[1:] == 0).all()
    assert rows > 1


def test_request_major_equals_exploded(model: RankingModel) -> None:
    batch = random_batch(7, seed=7)
    assert batch.num_rows > batch.num_requests
    assert_same(model(batch.exploded()), model(batch))


def test_training_statistics_of_request_major_and_exploded_are_equal(name: str) -> None:
    one, other, batch = build(name).train(), build(name).train(), random_batch(7, seed=8)
    got, expected = split_output(one(batch)), split_output(other(batch.exploded()))
    assert_same(got.logits, expected.logits)
    for key in got.losses if name not in DRAWING else ():
        assert_same(got.losses[key], expected.losses[key])
    for key, value in one.state_dict().items():
        assert_same(other.state_dict()[key], value)


def test_requests_may_come_in_any_order(model: RankingModel) -> None:
    batch = random_batch(6, seed=9)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    rows = torch.cat([torch.nonzero(batch.request_of_row == r).flatten() for r in order])
    assert_same(model(batch.select_requests(order)), model(batch)[rows])


def test_candidates_may_come_in_any_order(model: RankingModel) -> None:
    batch = one_request(seed=10)
    order = torch.randperm(batch.num_rows, generator=torch.Generator().manual_seed(0))
    assert_same(model(rows_of(batch, order)), model(batch)[order])


def test_a_bag_of_events_may_come_in_any_order(name: str, model: RankingModel) -> None:
    if name not in ORDER_FREE:
        pytest.skip("the model reads the order of events")
    batch = random_batch(6, seed=11)
    assert_same(
        model(replace(batch, histories={n: reversed_events(h) for n, h in batch.histories.items()})), model(batch)
    )


def test_histories_matter(name: str, model: RankingModel) -> None:
    batch = first_with_history(random_batch(9, seed=12))
    logits = model(batch)
    for history in batch.histories:
        shorter = replace(batch, histories={**batch.histories, history: without_first_event(batch.histories[history])})
        changed = (model(shorter) - logits).abs().amax(1) > 1e-7
        of_request = changed[batch.request_of_row == 0]
        assert of_request.any() if name in SEARCHING else of_request.all()


@pytest.mark.parametrize("training", [True, False])
def test_padding_has_no_effect(name: str, training: bool) -> None:
    one, other = build(name).train(training), build(name).train(training)
    embedded = one.lookup(random_batch(5, seed=13))
    padded = embedded._replace(
        histories={
            n: EmbeddedHistory(
                {f: nn.functional.pad(t, (0, 0, 0, 4)) for f, t in h.features.items()},
                h.lengths,
                nn.functional.pad(h.times, (0, 4)),
            )
            for n, h in embedded.histories.items()
        }
    )
    assert_same(other.network(padded), one.network(embedded))
    for key, value in one.state_dict().items():
        assert_same(other.state_dict()[key], value)


def test_what_stands_in_padding_has_no_effect(model: RankingModel) -> None:
    embedded = model.lookup(random_batch(5, seed=14))
    filled = {}
    for history, h in embedded.histories.items():
        valid = torch.arange(h.times.shape[1]) < h.lengths.unsqueeze(1)
        assert not valid.all()
        features = {f: torch.where(valid.unsqueeze(2), t, 123.0) for f, t in h.features.items()}
        filled[history] = EmbeddedHistory(features, h.lengths, torch.where(valid, h.times, 10**15))
    assert_same(model.network(embedded._replace(histories=filled)), model.network(embedded))


@pytest.mark.parametrize("training", [True, False])
def test_empty_histories_are_scored_and_learnt_from(name: str, training: bool) -> None:
    model, batch = build(name).train(training), random_batch(4, seed=15, empty_history=True)
    before = copy.deepcopy(model.state_dict())
    assert batch.labels is not None
    loss = loss_of(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(split_output(model(batch)).logits).all()
    for parameter_name, parameter in model.network.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    if not training:
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_extreme_vectors_stay_finite(model: RankingModel) -> None:
    embedded = model.lookup(random_batch(5, seed=16))
    far = tree_map(lambda t: t * 1e4 if t.is_floating_point() else t, embedded)
    assert torch.isfinite(model.network(far)).all()


def test_a_seed_decides_everything(name: str) -> None:
    runs = []
    for _ in range(2):
        model = build(name, seed=3).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(3):
            batch = random_batch(8, seed=step)
            assert batch.labels is not None
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        runs.append(model.state_dict())
    for key, value in runs[0].items():
        assert torch.equal(runs[1][key], value), key


def test_32_rows_are_learnt_by_heart(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(CASES[name], schema(), TABLE_SIZES).train()
    batch = rows_of(random_batch(20, seed=17), torch.arange(32))
    assert batch.labels is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2 if name == "lr" else 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert ((model.eval()(batch) > 0) == (batch.labels > 0.5)).float().mean().item() > 0.9


def test_state_dict_keys_are_pinned(name: str, model: RankingModel) -> None:
    """A changed key breaks every checkpoint: change this list only together with a migration."""
    tables = [key for key in model.state_dict() if key.startswith("lookup.")]
    assert {key.split(".", 3)[-1] for key in tables if "@" not in key} == TABLE_KEYS
    if name in STATE_DICT_KEYS:
        expected = []
        for key in STATE_DICT_KEYS[name]:
            expected += [key.format(history=h) for h in range(2)] if "{history}" in key else [key]
        assert sorted(model.network.state_dict()) == sorted(expected)


def test_eager_equals_exported_at_any_sizes(model: RankingModel) -> None:
    with torch.no_grad():
        example = model.lookup(random_batch(6, seed=18))
        program = export(model.network, (example,), dynamic_shapes=(dynamic_shapes(example, Dim("requests")),)).module()
        for requests, max_rows, seed in ((6, 5, 19), (9, 2, 20), (2, 1, 21), (1, 6, 22), (1, 1, 23)):
            embedded = model.lookup(random_batch(requests, max_rows, seed=seed))
            assert_same(program(embedded), model.network(embedded))


class _SingleRequest(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, embedded: Embedded) -> Tensor:
        return self.network.single_request(embedded)  # type: ignore[operator, no-any-return]


def test_the_program_of_one_request_equals_that_of_many(model: RankingModel) -> None:
    with torch.no_grad():
        example = model.lookup(one_request(seed=24))
        single = export(
            _SingleRequest(model.network), (example,), dynamic_shapes=(dynamic_shapes(example, None),)
        ).module()
        for max_rows, seed in ((6, 25), (12, 26), (1, 27)):
            embedded = model.lookup(random_batch(1, max_rows, seed=seed))
            assert_same(single(embedded), model.network(embedded))
        for history, empty in example.histories.items():
            none = empty._replace(lengths=torch.zeros(1, dtype=torch.int64))
            emptied = example._replace(histories={**example.histories, history: none})
            assert_same(single(emptied), model.network(emptied))


def test_the_form_of_one_request_equals_that_of_many_in_float64(model: RankingModel) -> None:
    """What references hold of the one form, so of the other."""
    embedded = model.lookup(one_request(seed=28))
    double = tree_map(lambda t: t.double() if t.is_floating_point() else t, embedded)
    network = model.network.double()
    with torch.no_grad():
        torch.testing.assert_close(network.single_request(double), network(double), rtol=1e-9, atol=1e-11)  # type: ignore[operator]


def dynamic_shapes(embedded: Embedded, requests: Dim | None) -> Any:
    """Every size free but the widths; one request if ``requests`` is None."""
    rows = Dim("rows")
    of_request: dict[int, Any] = {} if requests is None else {0: requests}
    return Embedded(
        dict.fromkeys(embedded.request, of_request),
        {feature: {0: rows} for feature in embedded.candidate},
        {
            name: EmbeddedHistory(
                {feature: {**of_request, 1: Dim(f"length_{name}")} for feature in history.features},
                of_request,  # type: ignore[arg-type]
                {**of_request, 1: Dim(f"length_{name}")},  # type: ignore[arg-type]
            )
            for name, history in embedded.histories.items()
        },
        {0: rows},  # type: ignore[arg-type]
        of_request,  # type: ignore[arg-type]
    )


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, with the requests that they are of."""
    requests, request_of_row = torch.unique(batch.request_of_row[rows], return_inverse=True)
    whole = batch.select_requests(requests)
    take: Callable[[Mapping[str, Column]], dict[str, Column]] = lambda columns: {  # noqa: E731
        name: _bags(column, rows) if isinstance(column, Bags) else column[rows] for name, column in columns.items()
    }
    return replace(
        whole,
        request_of_row=request_of_row,
        item=take(batch.item),
        candidate=take(batch.candidate),
        labels=None if batch.labels is None else batch.labels[rows],
        source_row=None,
    )


def _bags(bags: Bags, rows: Tensor) -> Bags:
    pieces = [bags.values[bags.offsets[row] : bags.offsets[row + 1]] for row in rows.tolist()]
    return Bags(torch.cat(pieces), torch.tensor([0, *torch.tensor([len(p) for p in pieces]).cumsum(0).tolist()]))


def _events_of(column: Column, events: Tensor) -> Column:
    return _bags(column, events) if isinstance(column, Bags) else column[events]


def reversed_events(history: HistoryBatch) -> HistoryBatch:
    """Every request's events from the newest to the oldest."""
    bounds = history.offsets.tolist()
    events = [torch.arange(a, b).flip(0) for a, b in itertools.pairwise(bounds)]
    order = torch.cat(events)
    return HistoryBatch(
        history.offsets, history.times[order], {n: _events_of(c, order) for n, c in history.features.items()}
    )


def without_first_event(history: HistoryBatch) -> HistoryBatch:
    """The first request's history without its oldest event."""
    events = torch.arange(1, len(history.times))
    offsets = history.offsets.clone()
    offsets[1:] -= 1
    return HistoryBatch(offsets, history.times[events], {n: _events_of(c, events) for n, c in history.features.items()})


def first_with_history(batch: Batch) -> Batch:
    """The same requests, first one with two events or more in every history."""
    lengths = torch.stack([h.lengths for h in batch.histories.values()])
    full = torch.nonzero((lengths > 1).all(0)).flatten()
    others = torch.tensor([r for r in range(batch.num_requests) if r != full[0]], dtype=torch.int64)
    return batch.select_requests(torch.cat([full[:1], others]))


def one_request(*, seed: int) -> Batch:
    """One request of several candidates, with two events or more in every history."""
    batch = random_batch(20, max_rows=8, seed=seed)
    enough = torch.bincount(batch.request_of_row) > 2
    for history in batch.histories.values():
        enough &= history.lengths > 1
    return batch.select_requests(torch.nonzero(enough).flatten()[:1])
