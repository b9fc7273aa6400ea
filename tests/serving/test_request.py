"""Requests: what is taken, what is refused, and that every problem is named at once without the caller's data."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import RequestError
from serving.request import RequestParser
from tests.synthetic import schema

PARSER = RequestParser(schema(), max_candidates=5, max_events=4)


def problems(body: Any) -> str:
    with pytest.raises(RequestError) as caught:
        PARSER.parse(body if isinstance(body, (bytes, dict)) else orjson.dumps(body))
    return str(caught.value)


def test_a_whole_request() -> None:
    request = PARSER.parse(
        orjson.dumps(
            {
                "request_id": "a1",
                "user_id": 17,
                "time": "2026-01-31T12:00:00+02:00",
                "candidates": [9, {"item_id": 2**53 + 1, "price": 3, "source": "s1"}],
                "user": {"age": 35.5, "interests": ["c1"]},
                "context": {"time": "1970-01-01T01:00:00Z"},
                "histories": {"clicked": [{"item_id": 4, "time": 1_000_000, "dwell": 12}], "seen": [4, 5]},
                "task": "like",
            }
        )
    )
    assert request.candidates == [9, 2**53 + 1]
    assert request.candidate_values == [None, {"price": 3, "source": "s1"}]
    assert request.time == 1_769_853_600_000_000  # 10:00 UTC on 31 January 2026
    assert request.context == {"time": 3_600_000_000}
    assert request.histories["clicked"].times == [1_000_000]
    assert request.histories["clicked"].values == [{"dwell": 12}]
    assert request.histories["seen"].times is None
    assert (request.task, request.request_id, request.user_id) == ("like", "a1", 17)


def test_time_is_now_and_utc_where_it_does_not_say() -> None:
    import time

    before = time.time_ns() // 1000
    request = PARSER.parse({"user_id": None, "candidates": ["a"]})
    assert before <= request.time <= time.time_ns() // 1000
    naive = PARSER.parse({"candidates": ["a"], "time": "2000-01-01T00:00:00.000001"})
    assert naive.time == 946_684_800_000_001


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "body must be JSON"),
        (b"\xff", "body must be JSON"),
        (b"[1]", "body must be a JSON object, got a list"),
        ({}, "candidates must be given"),
        ({"candidates": []}, "candidates must name at least one"),
        ({"candidates": "a"}, "candidates must be a list, got text"),
        ({"candidates": [1, 2, 3, 4, 5, 6]}, "candidates must be at most 5, got 6"),
        ({"candidates": [1, "a"]}, "candidates must have keys of one type"),
        ({"candidates": [True]}, "candidates[0] must be a 64-bit integer or text, got a boolean"),
        ({"candidates": [1, 1.5]}, "candidates[1] must be a 64-bit integer or text, got a number with a decimal point"),
        ({"candidates": [2**63]}, "candidates[0] must be a 64-bit integer or text, got a number beyond 64 bits"),
        ({"candidates": [2**70]}, "candidates[0] must be a 64-bit integer or text, got a number beyond 64 bits"),
        ({"candidates": [-(2**63) - 1]}, "candidates[0] must be a 64-bit integer or text, got a number beyond 64 bits"),
        (
            {"candidates": [1], "user_id": 2**70},
            "user_id must be a 64-bit integer or text, got a number beyond 64 bits",
        ),
        ({"candidates": 5}, "candidates must be a list, got an integer"),
        ({"candidates": [1, None]}, "candidates[1] must be a 64-bit integer or text, got null"),
        ({"candidates": [{"price": 1}]}, "candidates[0] must have 'item_id'"),
        ({"candidates": [{"item_id": 1, "prise": 1}]}, "did you mean 'price'?"),
        ({"candidates": [{"item_id": 1, "price": {}}]}, "candidates[0].price must be a number, text, a boolean"),
        ({"candidates": [1], "user_id": 1.5}, "user_id must be a 64-bit integer or text"),
        ({"candidates": [1], "usr": 1}, "'usr' is not a known field, did you mean 'user'"),
        ({"candidates": [1], "time": "yesterday"}, "time must be ISO 8601 or UTC microseconds, got other text"),
        ({"candidates": [1], "time": 2**62}, "time must lie between 1970 and 2200"),
        ({"candidates": [1], "time": True}, "time must be ISO 8601 or UTC microseconds, got a boolean"),
        ({"candidates": [1], "user": []}, "user must be an object, got a list"),
        ({"candidates": [1], "context": {"age": 1}}, "context.'age' is not a column that a feature reads"),
        ({"candidates": [1], "histories": {"clicks": []}}, "histories.'clicks' is not a history of the model"),
        (
            {"candidates": [1], "histories": {"seen": [1, 2, 3, 4, 5]}},
            "histories.'seen' must have at most 4 events, got 5",
        ),
        (
            {"candidates": [1], "histories": {"seen": [{"item_id": 1, "time": 5}, {"item_id": 2}]}},
            "histories.'seen' must give the time of every event, or of none",
        ),
        ({"candidates": [1], "histories": {"seen": [1, "a"]}}, "histories.'seen' must have keys of one type"),
        (
            {"candidates": [1], "histories": {"seen": [{"item_id": 1, "tme": 5}]}},
            "histories.'seen'[0].'tme' is not a column that a feature reads, did you mean 'time'?",
        ),
        (
            {"candidates": [1], "histories": {"clicked": [{"item_id": 1, "zzzz": 5}]}},
            "known names: 'category', 'dwell', 'item_id', 'tags', 'time'",
        ),
        ({"candidates": [1], "task": "buy"}, "task must be one of the model's"),
        ({"candidates": [1], "request_id": [1]}, "request_id must be text"),
    ],
)
def test_what_is_refused(body: Any, message: str) -> None:
    assert message in problems(body)


@pytest.mark.parametrize(
    ("divisor", "factor", "unit"), [(10**6, 1, "seconds"), (1000, 1, "milliseconds"), (1, 1000, "nanoseconds")]
)
def test_times_of_another_unit_are_refused(divisor: int, factor: int, unit: str) -> None:
    first, last = 1_700_000_000_000_000, 1_702_000_000_000_000
    now = last + 86_400_000_000
    parser = RequestParser(schema(), training_period=(first, last))
    wrong = now // divisor * factor
    message = f"must be UTC microseconds where it is a number, got {unit} by its size"
    with pytest.raises(RequestError, match=f"time {message}"):
        parser.parse({"candidates": [1], "time": wrong})
    events = {"seen": [{"item_id": 4, "time": wrong}]}
    with pytest.raises(RequestError, match=rf"histories\.'seen'\[0\]\.time {message}"):
        parser.parse({"candidates": [1], "time": now, "histories": events})
    assert parser.parse({"candidates": [1], "time": now}).time == now
    # Older than all training, and given as text: neither is a matter of units.
    assert parser.parse({"candidates": [1], "time": first - 10**13}).time == first - 10**13
    assert parser.parse({"candidates": [1], "time": "1970-01-20T16:40:00Z"}).time == 1_701_600 * 10**6
    # Without a period, or with one that counts from another origin, nothing is known of units.
    for period in (None, (0, 10**12)):
        if wrong < 7 * 10**15:
            assert (
                RequestParser(schema(), training_period=period).parse({"candidates": [1], "time": wrong}).time == wrong
            )


def test_every_problem_is_named_at_once() -> None:
    text = problems({"candidates": [{"price": 1}, True], "time": "x", "task": "buy", "usr": 1})
    for place in ("'usr'", "candidates[0]", "candidates[1]", "time", "task"):
        assert place in text


def test_a_flood_of_problems_is_cut_short() -> None:
    parser = RequestParser(schema(), max_candidates=1000)
    with pytest.raises(RequestError, match="and 980 more"):
        parser.parse({"candidates": [None] * 1000})


def test_messages_do_not_repeat_values() -> None:
    secret = "4111-1111-1111-1111"
    for body in (
        {"candidates": [1], "user": {"age": {"x": secret}}},
        {"candidates": [1], "time": secret},
        {"candidates": [1], "task": secret},
        {"candidates": [1.5], "user_id": [secret]},
    ):
        assert secret not in problems(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "user_id",
                        "candidates",
                        "time",
                        "context",
                        "user",
                        "histories",
                        "clicked",
                        "item_id",
                        "age",
                        "task",
                        "dwell",
                    ]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_parsed_or_refused(body: Any) -> None:
    try:
        request = PARSER.parse(json.dumps(body))
    except RequestError:
        return
    assert 1 <= len(request.candidates) <= 5


def test_a_boolean_is_no_number() -> None:
    for wrong in (True, [1.0, False]):
        said = problems({"candidates": [{"item_id": 1, "price": wrong}]})
        assert said == "candidates[0].price must be a number, got a boolean"


def test_the_key_of_the_user_may_be_repeated_but_be_no_other() -> None:
    request = PARSER.parse({"candidates": [1], "user_id": 17, "user": {"user_id": 17}})
    assert (request.user_id, request.user) == (17, {"user_id": 17})
    said = problems({"candidates": [1], "user_id": 17, "user": {"user_id": 18}})
    assert said == "user.user_id must be user_id, got another"
