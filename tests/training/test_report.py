"""The report: figures are the given ones, text is escaped, nothing is fetched, nothing half-written is left."""

from __future__ import annotations

import dataclasses
import itertools
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.metrics import Metrics, auc
from training.report import (
    DataSummary,
    HistoryBucket,
    LearningCurve,
    ReliabilityBin,
    ReportData,
    ScoreRow,
    TaskReport,
    auc_interval,
    history_buckets,
    rate_interval,
    reliability_bins,
    render_report,
    write_report,
)
from training.report_chart import round_ticks

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.test/a.png onerror=alert(1)>&amp;"
VOID = {"meta"}


class Page(HTMLParser):
    """Tags with attributes, text, and table rows; fails on a tag closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data


def metrics(**changes: float) -> Metrics:
    plain = Metrics(
        auc=0.7321, gauc=0.6543, gauc_users=123, logloss=0.2109, ne=0.8765, ece=0.0123, num_rows=4567, num_positives=890
    )
    return dataclasses.replace(plain, **changes)


def report(**changes: object) -> ReportData:
    task = TaskReport(
        "click",
        (
            ScoreRow("DIN", "model", metrics()),
            ScoreRow("truth", "ceiling", metrics(auc=0.7921)),
            ScoreRow("popularity", "floor", metrics(auc=0.6121, gauc=math.nan)),
        ),
        (ReliabilityBin(0.1, 0.12, 2000), ReliabilityBin(0.3, 0.29, 2567)),
        (HistoryBucket(0, 0, 0.61, 1000, 100), HistoryBucket(1, None, 0.74, 3567, 790)),
    )
    plain = ReportData(
        title="din_demo",
        subtitle="DIN on simulated",
        created_at="1 May 2025, 10:00 UTC",
        split="test",
        tasks=(task,),
        data=DataSummary("simulated", {"train": 98765}, {"schema": "ab" * 32}, {"null user": 7}, {"train end": "May"}),
        config={"model": {"kind": "din", "attention_hidden": (36,)}},
        environment={"torch": "2.13"},
        curve=LearningCurve(((0.5, 0.5), (1.0, 0.4), (2.0, 0.3)), ((1.0, 0.71), (2.0, 0.7)), "AUC", 1.0),
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_the_table_shows_the_given_figures() -> None:
    rows = Page(render_report(report())).rows
    shown = {row[0]: row[1:] for row in rows}
    assert shown["DIN"] == ["0.7321", "0.6543", "0.2109", "0.8765", "0.0123", "123", "4,567", "890"]
    assert shown["truth ceiling"][0] == "0.7921"
    assert shown["popularity floor"][:2] == ["0.6121", "\u2013"]
    assert ["0.1000", "0.1200", "2,000"] in rows
    assert ["1+", "0.7400", "3,567", "790"] in rows
    assert ["train", "98,765"] in rows
    assert ["null user", "7"] in rows
    assert ["schema", "ab" * 32] in rows
    assert ["torch", "2.13"] in rows


def test_the_share_of_the_gap_is_by_the_formula() -> None:
    text = Page(render_report(report())).text
    assert f"closes {(0.7321 - 0.6121) / (0.7921 - 0.6121):.0%} of the gap" in text


def test_no_share_of_the_gap_without_a_floor_and_a_ceiling() -> None:
    whole = report()
    alone = dataclasses.replace(whole.tasks[0], scores=whole.tasks[0].scores[:1])
    assert "of the gap" not in Page(render_report(report(tasks=(alone,)))).text


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = render_report(report())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"} & {
        t for t, _ in page.tags
    }
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href", "xlink:href", "srcset", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_text_stays_text() -> None:
    whole = report()
    task = dataclasses.replace(whole.tasks[0], name=HOSTILE, scores=(ScoreRow(HOSTILE, "model", metrics()),))
    curve = dataclasses.replace(whole.curve, validation_name=HOSTILE)  # type: ignore[type-var]
    data = DataSummary(HOSTILE, {HOSTILE: 1}, {HOSTILE: HOSTILE}, {HOSTILE: 2}, {HOSTILE: HOSTILE})
    hostile = report(
        title=HOSTILE,
        subtitle=HOSTILE,
        created_at=HOSTILE,
        split=HOSTILE,
        tasks=(task, task),
        curve=curve,
        data=data,
        config={HOSTILE: [HOSTILE]},
        environment={HOSTILE: HOSTILE},
    )
    page, plain = Page(render_report(hostile)), Page(render_report(report(tasks=whole.tasks * 2)))
    assert {t for t, _ in page.tags} <= {t for t, _ in plain.tags}
    assert {n for _, a in page.tags for n in a} <= {n for _, a in plain.tags for n in a}
    assert page.text.count(HOSTILE) >= 12


def test_charts_have_text_and_headers_have_scope() -> None:
    page = Page(render_report(report()))
    charts = [a for t, a in page.tags if t == "svg"]
    assert len(charts) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    alternatives = " ".join(a["aria-label"] or "" for a in charts)
    assert "0.7400 over 3,567 rows" in alternatives
    assert "highest 0.7100" in alternatives
    assert all(a.get("scope") in {"row", "col"} for t, a in page.tags if t == "th")


def test_the_best_epoch_is_marked() -> None:
    page = Page(render_report(report()))
    assert "the weights of epoch 1 were kept" in page.text
    assert sum("best" in (a.get("class") or "").split() for t, a in page.tags if t == "circle") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"curve": None},
        {"curve": LearningCurve((), (), "AUC", None)},
        {"curve": LearningCurve(((1.0, 0.5),), ((1.0, math.nan),), "AUC", None)},
        {"curve": LearningCurve(((1.0, 0.5),), ((1.0, 0.5),), "logloss", 1.0, higher_is_better=False)},
        {"tasks": (TaskReport("click", (ScoreRow("m", "model", metrics(auc=math.nan, ne=math.inf)),)),)},
        {
            "tasks": (
                TaskReport(
                    "click",
                    (ScoreRow("m", "model", metrics()),),
                    (ReliabilityBin(0.0, 0.0, 1),),
                    (HistoryBucket(0, 0, math.nan, 3, 0),),
                ),
            )
        },
    ],
    ids=["no-curve", "empty-curve", "nan", "one-epoch", "undefined", "one-class"],
)
def test_degenerate_runs_have_a_report(changes: dict[str, object]) -> None:
    text = render_report(report(**changes))
    Page(text)
    assert "nan" not in text.split("<style>")[0] + text.split("</style>")[1]


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path / "deep" / "report.html", report())
    before = path.read_text(encoding="utf-8")
    assert before == render_report(report())

    def fail(_: object) -> str:
        raise RuntimeError("no")

    monkeypatch.setattr("training.report.render_report", fail)
    with pytest.raises(RuntimeError, match="no"):
        write_report(path, report(title="other"))
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_history_buckets_are_auc_over_their_rows() -> None:
    rng = np.random.default_rng(3)
    length, labels, scores = rng.integers(0, 30, 500), rng.integers(0, 2, 500).astype(float), rng.normal(size=500)
    labels[:20] = np.nan
    buckets = history_buckets(length, labels, scores, edges=(0, 1, 10))
    known = ~np.isnan(labels)
    expected = [length == 0, (length >= 1) & (length < 10), length >= 10]
    assert [b.label for b in buckets] == ["0", "1\u20139", "10+"]
    for bucket, rows in zip(buckets, expected, strict=True):
        assert bucket.auc == auc(labels[rows & known], scores[rows & known])
        assert bucket.num_rows == (rows & known).sum()
        assert bucket.num_positives == labels[rows & known].sum()


def test_history_buckets_leave_out_what_is_empty() -> None:
    buckets = history_buckets(np.array([0, 0, 7]), np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.3]))
    assert [(b.first, b.last, b.num_rows) for b in buckets] == [(0, 0, 2), (5, 9, 1)]
    assert buckets[0].auc == 1.0
    assert math.isnan(buckets[1].auc)


def test_reliability_bins_by_hand() -> None:
    bins = reliability_bins(np.array([0, 1, 1, np.nan, 1.0]), np.array([0.1, 0.2, 0.7, 0.5, 0.9]), num_bins=2)
    assert bins == (ReliabilityBin((0.1 + 0.2) / 2, 1 / 2, 2), ReliabilityBin((0.7 + 0.9) / 2, 2 / 2, 2))
    assert reliability_bins(np.array([np.nan]), np.array([0.5])) == ()


def test_auc_interval_by_hand() -> None:
    # A = 0.5: Q1 = .5/1.5 = 1/3, Q2 = .5/1.5 = 1/3, so (.25 + (p-1 + n-1)(1/3 - 1/4)) / (pn) with p = n = 13.
    half = 1.96 * math.sqrt((0.25 + 24 / 12) / 169)
    assert auc_interval(0.5, 13, 13) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)
    assert all(map(math.isnan, auc_interval(math.nan, 0, 3)))


def test_auc_interval_is_as_wide_as_repeated_draws_say() -> None:
    """The normal model of the AUC's error, against 400 draws of the whole data set."""
    rng = np.random.default_rng(11)
    labels = np.repeat([0.0, 1.0], [300, 60])
    drawn = [auc(labels, np.concatenate([rng.normal(0, 1, 300), rng.normal(0.9, 1, 60)])) for _ in range(400)]
    low, high = auc_interval(float(np.mean(drawn)), 60, 300)
    # The formula assumes exponential scores, so it agrees with normal ones to about a tenth; the draws add 4 %.
    assert (high - low) / (2 * 1.96) == pytest.approx(np.std(drawn), rel=0.2)


def test_rate_interval_by_hand() -> None:
    z2 = 1.96**2
    assert rate_interval(0.0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-12)
    low, high = rate_interval(0.5, 100)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 100 + z2 / 40000) / (1 + z2 / 100))


@given(st.floats(-1e6, 1e6, allow_nan=False), st.floats(1e-3, 1e6, allow_nan=False), st.integers(2, 8), st.booleans())
def test_ticks_enclose_the_range(low: float, span: float, count: int, whole: bool) -> None:
    high = low + span
    ticks = round_ticks(low, high, count, whole=whole)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-6
    assert ticks[-1] >= high - step * 1e-6
    assert all(b > a for a, b in itertools.pairwise(ticks))
    assert 2 <= len(ticks) <= count + 3
    if whole:
        assert all(t == int(t) for t in ticks)
