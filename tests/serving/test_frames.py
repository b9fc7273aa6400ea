"""Data frames: rows are put into requests, and columns of users, items and histories take the place of what is
stored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import DataError, SourceError
from serving.frames import FrameReader, cut, groups_of
from serving.pyfunc import score_frame
from serving.scorer import Scorer

ITEM = 2**53 + 1
NOW = 1_700_900_000_000_000


@given(st.lists(st.tuples(st.sampled_from([None, 1, 2]), st.sampled_from(["a", "b", None])), max_size=30))
def test_groups_are_rows_that_are_equal(rows: list[tuple[int | None, str | None]]) -> None:
    columns = [pa.array([r[0] for r in rows], pa.int64()), pa.array([r[1] for r in rows], pa.string())]
    groups = groups_of(columns, len(rows)).tolist()
    seen: dict[tuple[int | None, str | None], int] = {}
    assert groups == [seen.setdefault(row, len(seen)) for row in rows]


def frame(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"user_id": [1000, 1000, 1001], "item_id": [ITEM, ITEM + 1, ITEM], "time": NOW, **columns})


def test_rows_of_one_user_and_time_are_one_request(scorer: Scorer) -> None:
    reader = FrameReader(scorer.artifact.schema)
    raw, order = reader.read(pa.Table.from_pandas(frame()[["user_id", "item_id", "time"]].iloc[[0, 2, 1]]), "frame")
    assert raw.users.to_pylist() == [1000, 1001]
    assert raw.request_of_row.tolist() == [0, 0, 1]
    assert order.tolist() == [0, 2, 1]


def test_a_request_has_the_time_of_its_earliest_row(scorer: Scorer) -> None:
    reader = FrameReader(scorer.artifact.schema)
    table = pa.Table.from_pandas(frame(request_id=[7, 7, 8]).assign(time=[NOW + 5, NOW, NOW + 9]))
    raw, _ = reader.read(table, "frame")
    assert raw.time.tolist() == [NOW, NOW + 9]
    assert raw.row_time is not None
    assert raw.row_time.tolist() == [NOW + 5, NOW, NOW + 9]


def test_grouping_does_not_change_a_score(scorer: Scorer) -> None:
    whole = frame(source=["s1", None, "s0"])
    together = score_frame(scorer, whole).to_numpy()
    alone = np.concatenate([score_frame(scorer, whole.iloc[[i]]).to_numpy() for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-6, rtol=0)
    np.testing.assert_allclose(score_frame(scorer, whole, batch_size=1).to_numpy(), alone, atol=1e-6, rtol=0)


def test_columns_of_users_and_items_take_the_place_of_stored_ones(scorer: Scorer) -> None:
    given = score_frame(scorer, frame(age=[20.0, 20.0, 70.0], category=["c1", None, "c2"]))
    for row, (user, item, age, category) in enumerate(
        [(1000, ITEM, 20.0, "c1"), (1000, ITEM + 1, 20.0, None), (1001, ITEM, 70.0, "c2")]
    ):
        ranking = scorer.rank(
            {
                "user_id": user,
                "time": NOW,
                "user": {"age": age},
                "candidates": [{"item_id": item, "category": category}],
            }
        )
        np.testing.assert_allclose(given.iloc[row], ranking.probabilities[0], atol=1e-6, rtol=0)
    assert not np.allclose(given, score_frame(scorer, frame()))


def test_list_columns_are_histories(scorer: Scorer) -> None:
    events = [[ITEM + 3, ITEM + 4, ITEM + 5], [], None]
    times = [[NOW - 3, NOW - 2, NOW + 1], [], None]
    given = frame(**{"clicked.item_id": events, "clicked.time": times, "clicked.dwell": [[1, 200, 3], [], None]})
    answer = score_frame(scorer, given)
    clicked = [{"item_id": ITEM + 3, "time": NOW - 3, "dwell": 1}, {"item_id": ITEM + 4, "time": NOW - 2, "dwell": 200}]
    for row, body in enumerate(
        [
            {"user_id": 1000, "candidates": [ITEM], "histories": {"clicked": clicked}},
            {"user_id": 1000, "candidates": [ITEM + 1], "histories": {"clicked": []}},
            {"user_id": 1001, "candidates": [ITEM]},
        ]
    ):
        ranking = scorer.rank({"time": NOW, **body})
        np.testing.assert_allclose(answer.iloc[row], ranking.probabilities[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(score_frame(scorer, given, batch_size=1), answer, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"clicked.itemid": [[1], [1], [1]]}, "is nothing that history 'clicked' reads"),
        ({"clicked.dwell": [[1], [1], [1]]}, r"must have the column clicked\.item_id"),
        ({"clicked.item_id": [1, 1, 1]}, r"column clicked\.item_id must hold lists"),
        ({"clicked.item_id": [[1], [1], [1]], "clicked.time": [[1], [1, 2], [1]]}, "must be equally long"),
        ({"age": ["old", "old", "old"]}, "column 'age'"),
    ],
)
def test_what_is_refused(scorer: Scorer, columns: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        score_frame(scorer, frame(**columns))


def test_a_column_of_several_types(scorer: Scorer) -> None:
    with pytest.raises(DataError, match="frame must have columns of one type each"):
        score_frame(scorer, frame(category=[1, "c1", None]))


def test_an_empty_frame(scorer: Scorer) -> None:
    answer = score_frame(scorer, frame().iloc[:0])
    assert answer.shape == (0, 2)
    assert list(answer.columns) == ["click", "like"]


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=12), batch_size=st.integers(1, 20))
def test_cuts_keep_requests_whole(scorer: Scorer, counts: list[int], batch_size: int) -> None:
    n = sum(counts)
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(len(counts)), counts),
            "item_id": np.arange(n) + ITEM,
            "time": np.full(n, NOW),
            "request_id": np.repeat(np.arange(len(counts)), counts),
        }
    )
    raw, order = FrameReader(scorer.artifact.schema).read(table, "table")
    assert order.tolist() == list(range(n))
    parts = cut(raw, batch_size)
    users = [u for p in parts for u in p.raw.users.to_pylist()]
    assert users == list(range(len(counts)))
    assert [i for p in parts for i in p.raw.items.to_pylist()] == table.column("item_id").to_pylist()
    assert all(len(p.raw.request_of_row) <= batch_size or len(p.raw.time) == 1 for p in parts)
    assert sum(p.rows.stop - p.rows.start for p in parts) == n
