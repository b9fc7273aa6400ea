from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.datasets.negatives import NegativeSampler, NegativeSampling
from recsys.errors import ConfigError


def make(sampling: NegativeSampling, user: Any, item: Any, num_items: int, category: Any = None) -> NegativeSampler:
    category = None if category is None else np.array(category)
    return NegativeSampler(sampling, np.array(user), np.array(item), num_items=num_items, category=category)


@given(
    kind=st.sampled_from(["uniform", "popularity", "in_category"]),
    log=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=25),
    per_positive=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_negatives_are_new_to_the_user_different_from_each_other_and_as_many_as_there_are(
    kind: Any, log: list[tuple[int, int]], per_positive: int, seed: int
) -> None:
    user, item = (np.array([row[place] for row in log]) for place in range(2))
    category = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    sampler = make(NegativeSampling(kind, per_positive, seed), user, item, 8, category)
    drawn = sampler.draw(user, item, block=0)
    short = 0
    for row in range(len(log)):
        touched = {i for u, i in log if u == log[row][0]}
        pool = set(range(8)) - touched
        if kind == "in_category":
            pool = {i for i in pool if category[i] == category[log[row][1]]}
        if kind == "popularity":
            pool &= {i for _, i in log}
        found = [i for i in drawn[row].tolist() if i >= 0]
        assert set(found) <= pool
        assert len(set(found)) == len(found) == min(per_positive, len(pool))
        short += len(found) < per_positive
    record = sampler.record()
    assert record["positives"] == len(log)
    assert record["drawn"] == int((drawn >= 0).sum())
    assert record["positives_with_fewer"] == short


def test_the_distribution_is_the_declared_one() -> None:
    # User 0 touched item 0 only; among the others, interactions are 1 : 2 : 5.
    user = np.array([0] + [1] * 8)
    item = np.array([0, 1, 2, 2, 3, 3, 3, 3, 3])
    draws = 20_000
    asked = np.zeros(draws, dtype=np.int64)
    for kind, expected in (("popularity", [0, 1 / 8, 2 / 8, 5 / 8]), ("uniform", [0, 1 / 3, 1 / 3, 1 / 3])):
        drawn = make(NegativeSampling(kind), user, item, 4).draw(asked, asked, block=0)[:, 0]  # type: ignore[arg-type]
        share = np.bincount(drawn, minlength=4) / draws
        # Five standard deviations of a share of so many draws are at most 5 * sqrt(1/4 / 20,000) = 0.018.
        assert np.abs(share - expected).max() < 0.018
    drawn = make(NegativeSampling("in_category"), user, item, 4, [0, 0, 1, 0]).draw(asked, asked, block=0)[:, 0]
    share = np.bincount(drawn, minlength=4) / draws
    assert np.abs(share - [0, 1 / 2, 0, 1 / 2]).max() < 0.018


def test_draws_depend_on_seed_and_block_only() -> None:
    user, item = np.arange(200) % 20, np.arange(200) % 90

    def draw(seed: int, block: int) -> list[Any]:
        drawn: list[Any] = (
            make(NegativeSampling("uniform", 3, seed), user, item, 1000).draw(user, item, block=block).tolist()
        )
        return drawn

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(1, 0)
    assert draw(0, 0) != draw(0, 1)


def test_a_pool_that_is_nearly_used_up_is_searched_exactly() -> None:
    # One of 5,000 items is left: drawing and refusing would hardly ever find it.
    item = np.arange(4_999)
    sampler = make(NegativeSampling("uniform", 2), np.zeros(4_999, dtype=np.int64), item, 5_000)
    assert sampler.draw(np.array([0]), np.array([7]), block=0).tolist() == [[4_999, -1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "popular"}, "negatives must be one of .*'popular'"),
        ({"per_positive": 0}, "at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NegativeSampling(**arguments)


def test_in_category_needs_categories() -> None:
    with pytest.raises(ConfigError, match="category"):
        make(NegativeSampling("in_category"), [0], [0], 1)
