"""The analyses of roles find what was planted, and equal their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from recsys.cli import app
from recsys.errors import ConfigError, DataError
from recsys.models import RankingModel, build_model
from recsys.models.dare import DAREConfig, TWINConfig
from recsys.models.din import DINConfig
from recsys.training_set import TrainingSet
from tests.synthetic import TABLE_SIZES, random_batch, schema
from tests.training.conftest import MakeExperiment
from training.analysis import (
    attention_accuracy,
    batches_of,
    cluster,
    information_of_clusters,
    mutual_information,
    role_gradients,
    scored_rows,
)
from training.objective import Objective
from training.run import TrainedRun
from training.trainer import train

SMALL: dict[str, Any] = {"embedding_dim": 4, "top_k": 3, "hidden": (8,), "auxiliary_hidden": (4,)}


def test_mutual_information_is_its_definition() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 2, (2, 500))
    y = np.where(generator.random(500) < 0.5, x, y)
    expected = 0.0
    for a in (0, 1):
        for b in (0, 1):
            both, pa, pb = np.mean((x == a) & (y == b)), np.mean(x == a), np.mean(y == b)
            expected += both * math.log2((both + 1e-5) / (pa * pb + 1e-5))
    counts = [np.array(float(c)) for c in ((x & y).sum(), x.sum(), y.sum(), 500)]
    assert mutual_information(*counts).item() == pytest.approx(expected, rel=1e-12)
    independent = [np.array(float(c)) for c in (25, 50, 50, 100)]
    assert mutual_information(*independent).item() == pytest.approx(0, abs=1e-12)


def planted_events(rows: int = 6000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Candidates of two categories; a click is likely where the newest or second event is of the candidate's own."""
    generator = np.random.default_rng(1)
    target, events = generator.integers(0, 2, rows), generator.integers(0, 5, (rows, 4))
    events[generator.random((rows, 4)) < 0.1] = -1
    chance = 0.1 + 0.6 * (events[:, 0] == target) + 0.2 * (events[:, 1] == target)
    return target, events, chance, (generator.random(rows) < chance).astype(np.float64)


def test_scores_that_know_the_answer_rank_as_the_data_do() -> None:
    target, events, _, labels = planted_events()
    is_own = events == target[:, None]
    weight = np.array([3.0, 1.0, 0.1, 0.1])
    good = attention_accuracy(target, events, np.where(is_own, weight, 0.0), labels)
    bad = attention_accuracy(target, events, np.where(is_own, -weight, 0.0), labels)
    assert good.target_categories == 2
    assert good.pairs == 2 * 5 * 4
    assert good.ndcg > 0.97 > good.random_ndcg > bad.ndcg


def test_attention_without_enough_rows_is_refused() -> None:
    target, events, _, labels = planted_events(100)
    with pytest.raises(DataError, match="the split must have a category of candidates with 200 rows"):
        attention_accuracy(target, events, events.astype(float), labels)


def test_clusters_are_found_and_what_they_tell_is_measured() -> None:
    generator = np.random.default_rng(2)
    truth = generator.integers(0, 3, 3000)
    points = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])[truth] + generator.normal(0, 0.5, (3000, 2))
    found = cluster(points, 12)
    for each in np.unique(found):
        assert len(np.unique(truth[found == each])) == 1
    labels = (truth == 1).astype(np.float64)
    share = labels.mean()
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert information_of_clusters(found, labels) == pytest.approx(entropy, rel=1e-9)
    assert information_of_clusters(np.zeros(3000, int), labels) == pytest.approx(0, abs=1e-12)
    assert information_of_clusters(generator.permutation(found), labels) < 0.02
    assert (cluster(points, 12) == found).all()
    with pytest.raises(ConfigError, match=r"num_clusters must be in \[1, 3000\]"):
        cluster(points, 3001)


def untrained(config: Any) -> RankingModel:
    torch.manual_seed(0)
    model = build_model(config, schema(), TABLE_SIZES)
    for table in model.lookup.parameters():
        torch.nn.init.normal_(table)
    return model


def test_the_roles_gradients_add_up_to_that_of_the_shared_table() -> None:
    """Two equal tables, one a role: what moves the one table of TWIN is the sum of both."""
    from training.analysis import _as_leaves, _row_gradients, _scored_features, _with_two_roles

    config = TWINConfig(**SMALL)
    model, batch = untrained(config), random_batch(8, seed=1)
    assert batch.labels is not None
    objective = Objective(schema(), {})
    embedded, leaves = _as_leaves(model.lookup(batch))
    network = _with_two_roles(model.network, config, schema()).train()  # type: ignore[arg-type]
    objective(network.training_forward(embedded, batch), batch.labels, batch.num_rows).backward()
    rows, attention, representation = _row_gradients(batch, embedded, leaves, _scored_features(schema())["item"])
    assert (attention != 0).any()
    assert (representation != 0).any()
    objective(model.train()(batch), batch.labels, batch.num_rows).backward()
    (table,) = [p for name, p in model.lookup.named_parameters() if ".item." in name]
    assert table.grad is not None
    torch.testing.assert_close(table.grad[rows], attention + representation, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", [TWINConfig(**SMALL), DAREConfig(**SMALL, attention_dim=4)])
def test_gradients_are_compared_table_by_table_and_move_nothing(config: Any) -> None:
    model = untrained(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = role_gradients(model, config, schema(), iter([random_batch(8, seed=s) for s in range(3)]), {})
    assert set(found) == {"item", "category"}
    for gradients in found.values():
        assert gradients.ratio == pytest.approx(gradients.representation_norm / gradients.attention_norm)
        assert gradients.steps == 3
        assert 0 <= gradients.conflicting_rows <= 1
        assert gradients.rows > 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DINConfig(embedding_dim=4), "the run's model must be dare or twin, got DIN"),
        (DAREConfig(**SMALL, attention_dim=8), "attention_dim must be embedding_dim to compare gradients, got 8 and 4"),
        (TWINConfig(**SMALL, tables="by_role_and_side"), "got 'by_role_and_side'"),
    ],
)
def test_a_model_without_two_equal_roles_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        role_gradients(untrained(config), config, schema(), iter([random_batch(4)]), {})


def test_commands_report_on_a_run(training_set: TrainingSet, make_experiment: MakeExperiment, run_dir: Path) -> None:
    model = {"kind": "twin", "embedding_dim": 4, "top_k": 3, "hidden": [8], "auxiliary_hidden": [4]}
    experiment = make_experiment(epochs=1, history_length=2)
    experiment = experiment.model_copy(update={"model": TWINConfig.model_validate(model, strict=False)})
    train(experiment, training_set.schema, run_dir, progress=False)

    def report(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["analyse", *arguments[:1], str(run_dir), *arguments[1:], "--json"])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    gradients = report("gradients", "--batches", "3")
    assert gradients["tables"]["item"]["steps"] == 3
    attention = report(
        "attention",
        "--feature",
        "category",
        "--split",
        "train",
        "--places",
        "3",
        "--min-rows",
        "30",
        "--min-pairs",
        "3",
    )
    assert 0 < attention["ndcg"] <= 1
    clusters = report("discriminability", "--clusters", "2", "--clusters", "20", "--split", "train")["clusters"]
    assert [c["clusters"] for c in clusters] == [2, 20]
    assert 0 <= clusters[0]["bits"] <= 1
    # The usual numbers of clusters go as far as the rows do.
    few = report("discriminability", "--split", "train", "--max-rows", "60")
    assert few["rows"] == 60
    assert [c["clusters"] for c in few["clusters"]] == [2, 5, 10, 20, 50]
    for rows, asked, message in [
        ("60", ["--clusters", "2", "--clusters", "61"], "--clusters must be at most 60, the rows that are looked at"),
        ("1", [], "there must be 2 rows to cluster, got 1"),
    ]:
        options = ["--split", "train", "--max-rows", rows, *asked]
        refused = CliRunner().invoke(app, ["analyse", "discriminability", str(run_dir), *options])
        assert refused.exit_code != 0
        assert message in " ".join(refused.output.split())
    # Histories are as long as the run's own, not as the schema's.
    bits = [bits_of_clusters(TrainedRun.load(run_dir).model, training_set, length) for length in (2, None)]
    assert clusters[1]["bits"] == bits[0] != bits[1]
    plain = CliRunner().invoke(app, ["analyse", "gradients", str(run_dir), "--batches", "1"])
    assert "and conflicts" in plain.stdout
    wrong = CliRunner().invoke(app, ["analyse", "attention", str(run_dir), "--feature", "tags"])
    assert wrong.exit_code == 2


def test_rows_hold_the_newest_events_and_their_scores(training_set: TrainingSet) -> None:
    config = TWINConfig(**SMALL)
    torch.manual_seed(0)
    model = build_model(config, training_set.schema, training_set.encoder.table_sizes).eval()
    rows = scored_rows(
        model, training_set, "train", task="click", history="clicked", feature="category", places=3, max_rows=300
    )
    assert rows.events.shape == rows.scores.shape == (300, 3)
    batch = next(batches_of(training_set, "train", 1024))
    history = batch.histories["clicked"]
    with torch.no_grad():
        scores = model.network.histories[0].scores(model.lookup(batch))  # type: ignore[index, union-attr, operator]
    for n in range(300):
        r = int(batch.request_of_row[n])
        start, end = int(history.offsets[r]), int(history.offsets[r + 1])
        newest = history.features["category"][start:end].flip(0)[:3].tolist()  # type: ignore[index]
        assert rows.events[n].tolist() == newest + [-1] * (3 - len(newest))
        expected = scores[n, : end - start].flip(0)[:3].numpy()
        np.testing.assert_allclose(rows.scores[n, : len(newest)], expected, rtol=1e-5, atol=1e-7)


def bits_of_clusters(model: RankingModel, training_set: TrainingSet, history_length: int | None) -> float:
    rows = scored_rows(
        model,
        training_set,
        "train",
        task="click",
        history="clicked",
        feature="category",
        places=1,
        max_rows=100_000,
        history_length=history_length,
    )
    return information_of_clusters(cluster(rows.pooled, 20), rows.labels)


def test_histories_are_cut_to_their_newest_events(training_set: TrainingSet) -> None:
    whole = next(batches_of(training_set, "train", 256)).histories["clicked"]
    cut = next(batches_of(training_set, "train", 256, history_length=2)).histories["clicked"]
    assert whole.lengths.max() > 2
    torch.testing.assert_close(cut.lengths, whole.lengths.clamp(max=2))
    for r, length in enumerate(cut.lengths.tolist()):
        mine, newest = (
            slice(cut.offsets[r], cut.offsets[r + 1]),
            slice(whole.offsets[r + 1] - length, whole.offsets[r + 1]),
        )
        torch.testing.assert_close(cut.times[mine], whole.times[newest])
        torch.testing.assert_close(cut.features["category"][mine], whole.features["category"][newest])  # type: ignore[index]
