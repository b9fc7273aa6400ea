from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.datasets.simulator import SimulationSummary, SimulatorConfig, simulate
from feature_store.datasets.simulator.ceiling import CeilingCounter, PopularityCounter, auc_of_counts
from feature_store.datasets.simulator.draws import uniform
from feature_store.datasets.simulator.traffic import CLICK, Clock, Events, Traffic, concatenate, in_order
from feature_store.datasets.simulator.views import EventSorter
from feature_store.datasets.simulator.world import HOURLY_TRAFFIC, HOURS_PER_DAYPART, build_world
from recsys.config import validate
from recsys.errors import ConfigError, SourceError
from recsys.schema import Schema

ROOT = Path(__file__).parents[3]
DAY_US = 86_400_000_000
SMALL = SimulatorConfig(num_impressions=60_000, seed=3)
SEVERAL_BLOCKS = SimulatorConfig(
    num_impressions=40_000,
    min_candidates=1,
    max_candidates=4,
    num_users=300,
    num_items=300,
    rows_per_file=10_000,
    seed=1,
)
"""Four blocks, in as many files."""

Folder = tuple[Path, SimulationSummary]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    output = tmp_path_factory.mktemp("simulated") / "views"
    return output, simulate(SMALL, output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read(folder: Path, view: str) -> pl.DataFrame:
    return pl.read_parquet(folder / f"{view}.parquet")


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """By average ranks: independent of the counters of the simulator."""
    labels, ranks = np.asarray(labels, dtype=bool), pl.Series(np.asarray(scores)).rank("average").to_numpy()
    positives = int(labels.sum())
    negatives = len(labels) - positives
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


# What is written


def test_rows_requests_and_order(small: Folder) -> None:
    folder, summary = small
    impressions, truth = read(folder, "impressions"), read(folder, "truth")
    assert impressions.height == truth.height == SMALL.num_impressions
    assert truth.columns == ["probability"]
    assert impressions["time"].is_sorted()
    assert impressions["request_id"].is_sorted()
    requests = impressions.group_by("request_id", maintain_order=True).agg(
        pl.len().alias("n"), pl.col("user_id", "time", "device").n_unique(), pl.col("item_id").n_unique().alias("items")
    )
    assert requests.height == summary.num_requests
    assert requests["user_id"].max() == requests["time"].max() == requests["device"].max() == 1
    assert (requests["items"] == requests["n"]).all()  # no item twice in a request
    sizes = requests["n"][:-1]
    assert (sizes.min(), sizes.max()) == (SMALL.min_candidates, SMALL.max_candidates)
    place = impressions.select((pl.int_range(pl.len()).over("request_id") + 1).alias("place"), "position").drop_nulls()
    assert (place["place"] == place["position"]).all()
    start = SMALL.start_time_us
    assert start <= summary.first_time == impressions["time"][0]
    assert impressions["time"][-1] == summary.last_time < start + SMALL.num_days * DAY_US


def test_events_are_the_clicks_of_the_log_and_a_past_before_it(small: Folder) -> None:
    folder, summary = small
    impressions, events = read(folder, "impressions"), read(folder, "events")
    assert events["time"].is_sorted()
    assert dict(events["type"].value_counts().iter_rows()) == summary.num_events_by_type
    past = events.filter(pl.col("time") < SMALL.start_time_us)
    assert past["time"].min() >= SMALL.start_time_us - SMALL.warm_up_days * DAY_US  # type: ignore[operator]
    clicks_a_user = past.filter(pl.col("type") == "click").height / SMALL.resolved_num_users
    assert clicks_a_user == pytest.approx(SMALL.warm_up_clicks_per_user * (1 - SMALL.new_user_share), rel=0.03)
    key = ["user_id", "item_id"]
    for kind, label in (("click", "is_click"), ("like", "is_like"), ("purchase", "is_purchase")):
        shown = impressions.filter(pl.col(label) == 1).select(*key, "time")
        logged = events.filter((pl.col("time") >= SMALL.start_time_us) & (pl.col("type") == kind)).select(*key, "time")
        assert sorted(shown.select(key).rows()) == sorted(logged.select(key).rows())
        # Each happens after its impression: so never before the request that it belongs to.
        pairs = shown.sort(*key, "time").with_columns(logged.sort(*key, "time")["time"].alias("happened"))
        assert (pairs["happened"] > pairs["time"]).all()
    assert (impressions["is_like"] <= impressions["is_click"]).all()


def test_attributes_have_gaps_lists_and_no_secret(small: Folder) -> None:
    folder, _ = small
    users, items, impressions = read(folder, "users"), read(folder, "items"), read(folder, "impressions")
    assert users["user_id"].n_unique() == users.height < SMALL.resolved_num_users
    assert items["item_id"].n_unique() == items.height < SMALL.resolved_num_items
    assert set(impressions["user_id"]) - set(users["user_id"])  # users without a row
    assert set(impressions["item_id"]) - set(items["item_id"])  # items without a row
    for table, column in ((users, "age_group"), (items, "price"), (impressions, "position"), (impressions, "device")):
        assert 0 < table[column].null_count() < 0.2 * table.height
    for column in (users["declared_categories"], items["tags"]):
        assert column.null_count() > 0
        assert (column.list.len() == 0).any()
        assert (column.list.len() > 1).any()
    assert not {"probability", "topic", "latent"} & {*users.columns, *items.columns, *impressions.columns}


def test_the_schema_describes_the_views(small: Folder) -> None:
    folder, _ = small
    schema = Schema.load(ROOT / "configs" / "schema" / "simulated.yaml")
    views = {"user": "users", "item": "items", "context": "impressions", "candidate": "impressions"}
    for scope, view in views.items():
        wanted = {f.source_column for f in schema.features_of(scope)}  # type: ignore[arg-type]
        assert wanted <= set(read(folder, view).columns)
    assert {task.label for task in schema.tasks} <= set(read(folder, "impressions").columns)
    assert set(schema.history("clicked").event_types or ()) <= set(read(folder, "events")["type"])


def test_the_written_summary_is_the_returned_one(small: Folder) -> None:
    folder, summary = small
    stored = json.loads((folder / "simulation.json").read_text())
    assert stored == json.loads(json.dumps(summary.to_dict()))
    assert stored["num_rows"] == {v: read(folder, v).height for v in ("impressions", "events", "users", "items")}
    assert validate(SimulatorConfig, stored["config"], source="simulation.json") == SMALL.resolved()


# The truth


def test_probabilities_are_the_documented_formula() -> None:
    """A loop in double precision over the formula of the module's text."""
    world = build_world(SMALL)
    traffic = Traffic(world)
    block = traffic.block(0)
    rows = np.random.default_rng(0).integers(0, len(block.items), 40)
    for row in rows:
        request, item = block.request_of_row[row], block.items[row]
        user, time = block.users[request], block.times[request]
        interests = world.interests(np.array([user]), np.array([(time - SMALL.start_time_us) / DAY_US]))
        closeness = 0.0
        for topic, strength in zip(interests.topics[0], interests.strengths[0], strict=True):
            pairs = zip(world.topic_latents[topic].tolist(), world.items.latents[item].tolist(), strict=True)
            cosine = sum(a * b for a, b in pairs)
            closeness += strength * math.exp(SMALL.interest_sharpness * (cosine - 1))
        hour, category, device = time // 3_600_000_000 % 24, world.items.categories[item], block.devices[request]
        logit = (
            traffic.intercept
            + SMALL.interest_effect * closeness
            + world.items.logits[item]
            + world.users.logits[user]
            - SMALL.position_effect * math.log(1 + block.places[row]) / math.log(50)
            + world.daypart_category[hour // HOURS_PER_DAYPART, category]
            + world.device_category[device, category]
            + world.device_logits[device]
            + world.hour_logits[hour]
        )
        assert block.probabilities[row] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-4)


def test_clicks_happen_with_the_true_probability(small: Folder) -> None:
    folder, summary = small
    clicks = read(folder, "impressions")["is_click"].to_numpy()
    probabilities = read(folder, "truth")["probability"].to_numpy()
    order = np.argsort(probabilities)
    for part in np.array_split(order, 10):
        p = probabilities[part]
        assert abs(clicks[part].sum() - p.sum()) < 4 * math.sqrt((p * (1 - p)).sum())
    assert probabilities.mean() == pytest.approx(SMALL.click_rate, rel=0.05)
    assert summary.ceiling.click_rate == clicks.mean()


def test_the_ceiling_is_that_of_the_written_truth(small: Folder) -> None:
    folder, summary = small
    impressions, p = read(folder, "impressions"), read(folder, "truth")["probability"].to_numpy()
    clicks = impressions["is_click"].to_numpy()
    assert summary.ceiling.auc == pytest.approx(auc(clicks, p), abs=1e-6)
    logloss = -np.mean(np.where(clicks == 1, np.log(p), np.log(1 - p)))
    rate = clicks.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert summary.ceiling.logloss == pytest.approx(logloss, rel=1e-12)
    assert summary.ceiling.ne == pytest.approx(logloss / entropy, rel=1e-12)
    later = (impressions["request_id"] >= round(0.8 * summary.num_requests)).to_numpy()
    assert summary.later_ceiling.num_rows == later.sum()
    assert summary.later_ceiling.auc == pytest.approx(auc(clicks[later], p[later]), abs=1e-6)
    earlier = (
        impressions.filter(~later).group_by("item_id").agg(pl.len().alias("n"), pl.col("is_click").sum().alias("c"))
    )
    prior = earlier["c"].sum() / earlier["n"].sum()
    scores = impressions.filter(later).join(earlier, on="item_id", how="left", maintain_order="left").fill_null(0)
    popularity = (scores["c"] + 10 * prior) / (scores["n"] + 10)
    assert summary.later_popularity_auc == pytest.approx(auc(clicks[later], popularity), abs=1e-9)


def test_planted_answer_histories_tell_by_target_attention_not_by_their_mean() -> None:
    """With the true item vectors in hand, attention over past clicks beats their mean; the truth beats both."""
    world = build_world(SMALL)
    traffic = Traffic(world)
    blocks = [traffic.block(b) for b in range(traffic.num_blocks)]
    warm_up = [traffic.warm_up(b) for b in range(traffic.num_warm_up_blocks)]
    events = in_order(concatenate([*warm_up, *(b.events for b in blocks)]))
    clicks = events.select(events.types == CLICK)
    clicks = clicks.select(np.argsort(clicks.users, kind="stable"))
    starts = np.searchsorted(clicks.users, np.arange(len(world.users) + 1))
    latents = world.items.latents.astype(np.float64)
    block = blocks[-1]
    ends = np.cumsum(block.sizes)
    attention, mean, labels, truth, lengths = [], [], [], [], []
    for request in range(len(ends) - 800, len(ends)):
        user, rows = block.users[request], slice(ends[request] - block.sizes[request], ends[request])
        times = clicks.times[starts[user] : starts[user + 1]]
        history = clicks.items[starts[user] : starts[user + 1]][: np.searchsorted(times, block.times[request])][-50:]
        lengths.append(len(history))
        if len(history) == 0:
            continue
        cosines = latents[block.items[rows]] @ latents[history].T
        attention.append(np.exp(6 * (cosines - 1)).mean(axis=1))
        mean.append(latents[block.items[rows]] @ latents[history].mean(axis=0))
        labels.append(block.clicks[rows])
        truth.append(block.probabilities[rows])
    by_attention, by_mean, by_truth = (
        auc(np.concatenate(labels), np.concatenate(scores)) for scores in (attention, mean, truth)
    )
    assert np.median(lengths) >= 20  # histories are informative from the start
    assert by_attention > by_mean + 0.02
    assert by_truth > by_attention + 0.08


def test_ceiling_and_floor_leave_room_for_models(small: Folder) -> None:
    _, summary = small
    assert 0.78 < summary.later_ceiling.auc < 0.87
    assert 0.58 < summary.later_popularity_auc < 0.69


def test_interests_drift_piecewise_and_can_be_looked_up_in_any_order() -> None:
    world = build_world(SMALL)
    users = np.repeat(np.arange(40), 29)
    days = np.tile(np.arange(-14.0, 15.0), 40)
    together = world.interests(users, days)
    for i in (0, 17, 500, 1100):
        alone = world.interests(users[i : i + 1], days[i : i + 1])
        assert np.array_equal(alone.topics[0], together.topics[i])
        assert np.array_equal(alone.strengths[0], together.strengths[i])
    topics = together.topics.reshape(40, 29, -1)
    changes_a_day = (topics[:, 1:] != topics[:, :-1]).mean(axis=(0, 1))
    # A renewal draws the same topic again about once in 120 times; the mean of 1 / U(0.5, 1.5) is ln 3.
    expected = math.log(3) / np.array(SMALL.interest_lifetimes_days)
    assert np.all(np.abs(changes_a_day - expected) < 4 * np.sqrt(expected / (40 * 28)))
    assert together.strengths.min() >= 0.5
    assert together.strengths.max() < 1


# The same bytes, whatever the machine does


def test_same_config_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    simulate(SEVERAL_BLOCKS, tmp_path / "one")
    simulate(SEVERAL_BLOCKS, tmp_path / "three", workers=3)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert first == second
    parts = sorted(name for name in first if name.startswith("impressions.parquet/"))
    assert len(parts) > 1
    for part in parts:
        rows = [
            pl.read_parquet(tmp_path / "one" / view / Path(part).name).height
            for view in ("impressions.parquet", "truth.parquet")
        ]
        assert rows[0] == rows[1]


def test_large_views_are_folders_with_the_content_of_one_file(tmp_path: Path) -> None:
    simulate(SEVERAL_BLOCKS, tmp_path / "parts")
    simulate(SEVERAL_BLOCKS.model_copy(update={"rows_per_file": 10**6}), tmp_path / "one")
    for view in ("impressions", "events", "truth"):
        assert (tmp_path / "parts" / f"{view}.parquet").is_dir()
        assert (tmp_path / "one" / f"{view}.parquet").is_file()
        assert read(tmp_path / "parts", view).equals(read(tmp_path / "one", view))


def test_blocks_do_not_depend_on_each_other() -> None:
    forward, backward = Traffic(build_world(SEVERAL_BLOCKS)), Traffic(build_world(SEVERAL_BLOCKS))
    blocks = [forward.block(b) for b in range(forward.num_blocks)]
    assert len(blocks) == 4
    for number in (3, 1, 0, 2):
        again = backward.block(number)
        assert np.array_equal(again.probabilities, blocks[number].probabilities)
        assert np.array_equal(again.events.times, blocks[number].events.times)


def test_another_seed_is_another_world(tmp_path: Path) -> None:
    base = SimulatorConfig(num_impressions=2000)
    simulate(base, tmp_path / "a")
    simulate(base.model_copy(update={"seed": 1}), tmp_path / "b")
    assert not read(tmp_path / "a", "impressions").equals(read(tmp_path / "b", "impressions"))
    assert not read(tmp_path / "a", "items").equals(read(tmp_path / "b", "items"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 60)), max_size=60),
    st.lists(st.integers(0, 100), max_size=6),
)
def test_sorting_block_by_block_is_sorting_at_once(raw: list[tuple[int, int, int]], cuts: list[int]) -> None:
    """Events of a block start at its time and may end long after the next one starts."""
    cuts = sorted(cuts)
    columns = np.array(raw, dtype=np.int64).reshape(-1, 3)
    starts = np.array([0, *cuts])
    blocks = columns[:, 1] % len(starts)
    times = starts[blocks] + columns[:, 2]
    events = Events(columns[:, 0], columns[:, 1], times, (columns[:, 0] % 4).astype(np.int8), times.astype(np.float32))
    sorter, taken = EventSorter(), []
    for block in range(len(starts)):
        sorter.add(events.select(blocks == block))
        part = sorter.take_before(int(starts[block + 1]) if block + 1 < len(starts) else None)
        if part is not None:
            taken.append(part)
    if not len(columns):
        assert taken == []
        return
    together, at_once = concatenate(taken), in_order(events)
    for got, expected in zip(together, at_once, strict=True):
        assert np.array_equal(got, expected)


# Size, speed, robustness

MEASURE = """
import resource, sys
from feature_store.datasets.simulator import SimulatorConfig, simulate
config = SimulatorConfig(num_impressions=int(sys.argv[1]), num_users=2000, num_items=500, warm_up_clicks_per_user=10.0)
simulate(config, sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_impressions(tmp_path: Path) -> None:
    """The larger log has 700 thousand impressions more: 50 MB as plain columns."""
    peak_kib = []
    for size in (200_000, 900_000):
        command = [sys.executable, "-c", MEASURE, str(size), str(tmp_path / str(size))]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peak_kib.append(int(ran.stdout))
    assert peak_kib[1] < peak_kib[0] + 25 * 1024


def test_progress_counts_impressions_and_a_failure_leaves_no_trace(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def stop_in_the_middle(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(SEVERAL_BLOCKS, tmp_path / "views", stop_in_the_middle)
    assert list(tmp_path.iterdir()) == []
    calls.clear()
    simulate(SEVERAL_BLOCKS, tmp_path / "views", lambda done, total: calls.append((done, total)))
    assert [total for _, total in calls] == [40_000] * 4
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == 40_000


def test_never_replaces_another_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SourceError, match=r"must be empty or hold simulation\.json"):
        simulate(SimulatorConfig(num_impressions=1000), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_candidates": 30, "max_candidates": 20}, "min_candidates must be at most max_candidates, got 30 > 20"),
        ({"num_items": 120, "max_candidates": 61}, r"num_items must be at least twice max_candidates \(122\), got 120"),
        ({"num_items": 200, "num_categories": 50}, r"num_items must be at least .* \(250\), got 200"),
        ({"start_time": "2025-01-06T00:00:00"}, "start_time: must have an offset"),
        ({"start_time": "tomorrow"}, "start_time: must be an ISO 8601 time"),
        ({"interest_lifetimes_days": [3.0, 0.0]}, "interest_lifetimes_days: must be positive"),
    ],
)
def test_a_config_that_cannot_be_simulated_is_refused_at_once(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(SimulatorConfig, changes, source="test")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_impressions": 1000, "warm_up_clicks_per_user": 0.0},
        {"num_impressions": 1003, "min_candidates": 20, "max_candidates": 20},
        {"num_impressions": 1500, "min_candidates": 1, "max_candidates": 1, "num_users": 10},
        {"num_impressions": 1000, "new_user_share": 1.0, "missing_rate": 0.0, "missing_entity_rate": 0.0},
        {
            "num_impressions": 1000,
            "num_items": 240,
            "num_categories": 2,
            "max_candidates": 120,
            "popularity_exponent": 3.0,
        },
    ],
)
def test_extremes(changes: dict[str, object], tmp_path: Path) -> None:
    config = validate(SimulatorConfig, changes, source="test")
    summary = simulate(config, tmp_path / "views")
    impressions = read(tmp_path / "views", "impressions")
    assert impressions.height == config.num_impressions
    assert not impressions.select("request_id", "item_id").is_duplicated().any()
    events = read(tmp_path / "views", "events")
    if config.warm_up_clicks_per_user == 0 or config.new_user_share == 1:
        assert (events["time"] >= config.start_time_us).all()
    assert summary.num_rows["events"] == events.height


# The pieces


def test_clock_follows_the_daily_rhythm() -> None:
    start = 1_736_121_600_000_000 + 5 * 3_600_000_000  # 05:00
    clock = Clock(start, num_days=2)
    total = 2 * sum(HOURLY_TRAFFIC)
    # After the traffic of 05 and 06 o'clock it is 07:00, and after a whole day of it 05:00 again.
    assert clock.times(
        np.array([0.0, (HOURLY_TRAFFIC[5] + HOURLY_TRAFFIC[6]) / total + 1e-12, 0.5 + 1e-12])
    ).tolist() == [
        start,
        start + 2 * 3_600_000_000,
        start + 24 * 3_600_000_000,
    ]
    times = clock.times(np.linspace(0, 1, 1001)[:-1])
    assert np.all(np.diff(times) > 0)
    assert times[-1] < start + 2 * DAY_US


def test_uniform_hashes_are_uniform_and_depend_on_every_counter() -> None:
    draws = uniform(7, 2, np.arange(300)[:, None], np.arange(200)[None, :])
    assert draws.shape == (300, 200)
    assert 0 <= draws.min() <= draws.max() < 1
    counts = np.bincount((draws.ravel() * 100).astype(int), minlength=100)
    chi_squared = ((counts - 600) ** 2 / 600).sum()
    assert chi_squared < 99 + 5 * math.sqrt(2 * 99)
    assert len(np.unique(draws)) == draws.size
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 5 / math.sqrt(draws.size)
    assert uniform(8, 2, 0, 0)[0] != uniform(7, 2, 0, 0)[0] != uniform(7, 3, 0, 0)[0]


def test_counters_of_one_class_or_nothing_are_undefined() -> None:
    counter = CeilingCounter()
    assert math.isnan(counter.result().auc)
    counter.update(np.array([0.25, 0.5]), np.array([True, True]))
    result = counter.result()
    assert math.isnan(result.auc)
    assert math.isnan(result.ne)
    assert result.logloss == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert math.isnan(PopularityCounter(3).auc())
    assert auc_of_counts([0, 0], [1, 1]) != auc_of_counts([0, 0], [1, 1])  # NaN


def test_counting_in_parts_is_counting_at_once() -> None:
    generator = np.random.default_rng(2)
    p = generator.random(5000)
    clicks = generator.random(5000) < p
    whole, parts = CeilingCounter(), CeilingCounter()
    whole.update(p, clicks)
    for part in np.array_split(np.arange(5000), 7):
        parts.update(p[part], clicks[part])
    assert whole.result().auc == parts.result().auc == pytest.approx(auc(clicks, p), abs=1e-5)
    assert whole.result().logloss == pytest.approx(parts.result().logloss, rel=1e-12)
