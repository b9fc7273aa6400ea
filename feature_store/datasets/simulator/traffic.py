"""Requests, impressions and events of the simulated world, one block at a time.

Blocks do not depend on each other: a click depends on the user's interests, which can be looked up at any time, not on
earlier clicks. So any block can be generated alone, in any order or at once, always with the same result.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.datasets.simulator import draws
from feature_store.datasets.simulator.draws import Floats, Ints
from feature_store.datasets.simulator.world import (
    DEVICE_SHARES,
    HOURLY_TRAFFIC,
    HOURS_PER_DAYPART,
    Float32s,
    Interests,
    World,
)

EVENT_TYPES = ("view", "click", "like", "purchase")
VIEW, CLICK, LIKE, PURCHASE = range(4)
REQUESTS_PER_BLOCK = 4096
WARM_UP_CLICKS_PER_BLOCK = 32_768
WARM_UP_CHOICES = 4
"""Items that a user sees for each click of the warm-up."""

_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US
_SECOND_US = 1_000_000
_VIEW_RATE = 0.08
_LIKE_LOGIT, _PURCHASE_LOGIT = -2.4, -4.2
_SAME_DEVICE_SHARE = 0.8
_FULL_PLACE = np.log(50.0)


class Events(NamedTuple):
    """Past interactions, in no particular order."""

    users: Ints
    items: Ints
    times: Ints
    types: npt.NDArray[np.int8]
    dwell_s: Float32s

    def select(self, rows: Ints | slice | npt.NDArray[np.bool_]) -> Events:
        """Some of them."""
        return Events(self.users[rows], self.items[rows], self.times[rows], self.types[rows], self.dwell_s[rows])


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive requests: R of them, N impressions. Users and items are positions in the world's arrays."""

    users: Ints
    times: Ints
    devices: Ints
    sizes: Ints
    items: Ints
    places: Ints
    probabilities: Floats
    clicks: npt.NDArray[np.bool_]
    likes: npt.NDArray[np.bool_]
    purchases: npt.NDArray[np.bool_]
    events: Events

    @property
    def request_of_row(self) -> Ints:
        """Position of each impression's request, (N,)."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)


def empty_block() -> Block:
    """A block of no requests, with the right types."""
    ints, flags = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    events = Events(ints, ints, ints, ints.astype(np.int8), ints.astype(np.float32))
    return Block(ints, ints, ints, ints, ints, ints, ints.astype(np.float64), flags, flags, flags, events)


class Clock:
    """Turns places in the order of the traffic into times, by the daily rhythm.

    ``times(fractions)`` is increasing in the fraction, so the r-th of R requests gets a time in order without any
    sorting.
    """

    def __init__(self, start_us: int, num_days: int) -> None:
        self.start_us = start_us
        weights = np.tile(np.asarray(HOURLY_TRAFFIC, dtype=np.float64), num_days)
        first_hour = start_us // _HOUR_US % 24
        self._traffic = np.concatenate([[0.0], np.cumsum(np.roll(weights, -first_hour))])
        self._traffic /= self._traffic[-1]

    def times(self, fractions: Floats) -> Ints:
        """UTC microseconds of fractions in [0, 1) of the traffic."""
        hours = np.interp(fractions, self._traffic, np.arange(len(self._traffic)))
        return self.start_us + np.floor(hours * _HOUR_US).astype(np.int64)


class Traffic:
    """Generates the blocks of a world.

    Attributes:
        num_requests: of the impression log.
        num_blocks: of the impression log.
        num_warm_up_blocks: of the events before it.
    """

    def __init__(self, world: World) -> None:
        config = world.config
        self.world = world
        self.request_sizes = _request_sizes(
            config.seed, config.num_impressions, config.min_candidates, config.max_candidates
        )
        self.num_requests = len(self.request_sizes)
        self.num_blocks = -(-self.num_requests // REQUESTS_PER_BLOCK)
        self.num_warm_up_clicks = round(config.warm_up_clicks_per_user * len(world.users))
        self.num_warm_up_blocks = -(-self.num_warm_up_clicks // WARM_UP_CLICKS_PER_BLOCK)
        self._clock = Clock(config.start_time_us, config.num_days)
        self._warm_up_clock = Clock(config.start_time_us - config.warm_up_days * _DAY_US, config.warm_up_days)
        self.intercept = self._solve_intercept()

    def block_start(self, block: int) -> int:
        """A time not after any event of this block or a later one."""
        return int(self._clock.times(np.array([block * REQUESTS_PER_BLOCK / self.num_requests]))[0])

    def warm_up_start(self, block: int) -> int:
        """As :meth:`block_start`, for the warm-up."""
        return int(self._warm_up_clock.times(np.array([block * WARM_UP_CLICKS_PER_BLOCK / self.num_warm_up_clicks]))[0])

    def block(self, block: int) -> Block:
        """Requests ``block * REQUESTS_PER_BLOCK`` and the following."""
        first = block * REQUESTS_PER_BLOCK
        sizes = self.request_sizes[first : first + REQUESTS_PER_BLOCK].astype(np.int64)
        generator = draws.block_generator(self.world.config.seed, draws.LOG, block)
        return self._requests(generator, first, sizes)

    def _requests(self, generator: np.random.Generator, first: int, sizes: Ints) -> Block:
        world, num_requests, num_rows = self.world, len(sizes), int(sizes.sum())
        orders = first + np.arange(num_requests) + generator.random(num_requests)
        times = self._clock.times(orders / self.num_requests)
        users = draws.sample_cumulative(world.users.cumulative_activity, generator.random(num_requests))
        other_device = draws.sample_cumulative(np.cumsum(DEVICE_SHARES), generator.random(num_requests))
        devices = np.where(
            generator.random(num_requests) < _SAME_DEVICE_SHARE, world.users.devices[users], other_device
        )
        interests = world.interests(users, self._days(times))

        request_of_row = np.repeat(np.arange(num_requests), sizes)
        places = np.arange(num_rows) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        items = self._candidates(generator, interests, request_of_row)
        affinity = world.affinity(interests, request_of_row, items)
        logits = self._logits(users, times, devices, request_of_row, items, affinity, places)
        probabilities = 1.0 / (1.0 + np.exp(-(logits + self.intercept)))
        clicks = generator.random(num_rows) < probabilities
        likes, purchases = self._follow_ups(generator, clicks, affinity)
        times_of_row = times[request_of_row]
        seen = times_of_row + ((1.0 + 1.5 * places + generator.random(num_rows)) * _SECOND_US).astype(np.int64)
        views = ~clicks & (generator.random(num_rows) < _VIEW_RATE)
        events = self._events(generator, users[request_of_row], items, seen, affinity, views, clicks, likes, purchases)
        return Block(users, times, devices, sizes, items, places, probabilities, clicks, likes, purchases, events)

    def warm_up(self, block: int) -> Events:
        """Events before the impressions: at each click the user saw some items of their interests and chose one.

        The choice is by the odds of the true click probabilities (without place and device, which were not logged
        then).
        """
        world, config = self.world, self.world.config
        first = block * WARM_UP_CLICKS_PER_BLOCK
        count = min(WARM_UP_CLICKS_PER_BLOCK, self.num_warm_up_clicks - first)
        generator = draws.block_generator(config.seed, draws.WARM_UP, block)
        times = self._warm_up_clock.times(
            (first + np.arange(count) + generator.random(count)) / self.num_warm_up_clicks
        )
        by_activity = draws.sample_cumulative(world.users.cumulative_activity, generator.random(count))
        anyone = np.floor(generator.random(count) * len(world.users)).astype(np.int64)
        users = np.where(generator.random(count) < 0.5, by_activity, anyone)
        is_known = draws.uniform(config.seed, draws.NEW_USER, users) >= config.new_user_share
        users, times = users[is_known], times[is_known]
        count = len(users)

        interests = world.interests(users, self._days(times))
        click_of_row = np.repeat(np.arange(count), WARM_UP_CHOICES)
        items = self._candidates(generator, interests, click_of_row)
        affinity = world.affinity(interests, click_of_row, items)
        odds = np.exp(config.interest_effect * affinity + world.items.logits[items]).reshape(count, WARM_UP_CHOICES)
        cumulative = np.cumsum(odds, axis=1, dtype=np.float64)
        chosen = (cumulative <= generator.random(count)[:, None] * cumulative[:, -1:]).sum(axis=1)
        clicks = np.zeros(count * WARM_UP_CHOICES, dtype=np.bool_)
        clicks[np.arange(count) * WARM_UP_CHOICES + np.minimum(chosen, WARM_UP_CHOICES - 1)] = True
        likes, purchases = self._follow_ups(generator, clicks, affinity)
        seen = times[click_of_row] + (generator.random(len(items)) * 60 * _SECOND_US).astype(np.int64)
        views = ~clicks & (generator.random(len(items)) < _VIEW_RATE)
        events = self._events(generator, users[click_of_row], items, seen, affinity, views, clicks, likes, purchases)
        return events.select(events.times < config.start_time_us)

    def _candidates(self, generator: np.random.Generator, interests: Interests, request_of_row: Ints) -> Ints:
        """Items (N,), no two equal in a request: some from the categories of the interests, all by popularity."""
        items, config = self.world.items, self.world.config
        num_rows = len(request_of_row)
        slots = np.floor(generator.random(num_rows) * interests.topics.shape[1]).astype(np.int64)
        categories = interests.topics[request_of_row, slots] // config.topics_per_category
        bounds = np.concatenate([[0.0], items.cumulative_popularity])[items.category_starts]
        low, high = bounds[categories], bounds[categories + 1]
        is_retrieved = generator.random(num_rows) < config.retrieved_share
        total = items.cumulative_popularity[-1]
        low, high = np.where(is_retrieved, low, 0.0), np.where(is_retrieved, high, total)
        drawn = low + generator.random(num_rows) * (high - low)
        positions = draws.sample_cumulative(items.cumulative_popularity, drawn / total)
        while len(repeated := _repeats(request_of_row * len(items) + positions)) > 0:
            positions[repeated] = np.floor(generator.random(len(repeated)) * len(items)).astype(np.int64)
        return positions

    def _logits(
        self,
        users: Ints,
        times: Ints,
        devices: Ints,
        request_of_row: Ints,
        items: Ints,
        affinity: Float32s,
        places: Ints,
    ) -> Floats:
        """True logits without the intercept, (N,)."""
        world, config = self.world, self.world.config
        hours = times // _HOUR_US % 24
        of_request = world.users.logits[users] + world.hour_logits[hours] + world.device_logits[devices]
        categories = world.items.categories[items]
        logits = config.interest_effect * affinity.astype(np.float64)
        logits += world.items.logits[items]
        logits += of_request[request_of_row]
        logits += world.daypart_category[(hours // HOURS_PER_DAYPART)[request_of_row], categories]
        logits += world.device_category[devices[request_of_row], categories]
        logits -= config.position_effect * np.log1p(places) / _FULL_PLACE
        return logits

    def _follow_ups(
        self, generator: np.random.Generator, clicks: npt.NDArray[np.bool_], affinity: Float32s
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Likes and purchases: after clicks only, more often the closer the item is to an interest."""
        chance = generator.random((2, len(clicks)))
        likes = clicks & (chance[0] < 1.0 / (1.0 + np.exp(-(_LIKE_LOGIT + 2.5 * affinity))))
        purchases = clicks & (chance[1] < 1.0 / (1.0 + np.exp(-(_PURCHASE_LOGIT + 2.5 * affinity))))
        return likes, purchases

    def _events(
        self,
        generator: np.random.Generator,
        users: Ints,
        items: Ints,
        seen: Ints,
        affinity: Float32s,
        views: npt.NDArray[np.bool_],
        clicks: npt.NDArray[np.bool_],
        likes: npt.NDArray[np.bool_],
        purchases: npt.NDArray[np.bool_],
    ) -> Events:
        parts = []
        for kind, happened, delay_s, dwell in (
            (VIEW, views, 0.0, 0.3),
            (CLICK, clicks, 0.0, 2.0),
            (LIKE, likes, 30.0, 2.5),
            (PURCHASE, purchases, 300.0, 3.5),
        ):
            rows = np.flatnonzero(happened)
            delays = (delay_s * (0.2 + generator.random(len(rows))) * _SECOND_US).astype(np.int64)
            dwell_s = np.exp(dwell + affinity[rows] + 0.6 * generator.standard_normal(len(rows))).astype(np.float32)
            kinds = np.full(len(rows), kind, dtype=np.int8)
            parts.append(Events(users[rows], items[rows], seen[rows] + delays, kinds, dwell_s))
        return concatenate(parts)

    def _days(self, times: Ints) -> Floats:
        return (times - self.world.config.start_time_us) / _DAY_US

    def _solve_intercept(self) -> float:
        """The intercept that gives the expected click rate on requests drawn for this purpose, by bisection."""
        config = self.world.config
        sizes = self.request_sizes[:REQUESTS_PER_BLOCK].astype(np.int64)
        self.intercept = 0.0
        sample = self._requests(draws.block_generator(config.seed, draws.SAMPLE), 0, sizes)
        # Spread over the whole log: the sample's own times cover only its first requests.
        times = self._clock.times((np.arange(len(sizes)) + 0.5) / len(sizes))
        interests = self.world.interests(sample.users, self._days(times))
        generator = draws.block_generator(config.seed, draws.SAMPLE, 1)
        items = self._candidates(generator, interests, sample.request_of_row)
        affinity = self.world.affinity(interests, sample.request_of_row, items)
        logits = self._logits(
            sample.users, times, sample.devices, sample.request_of_row, items, affinity, sample.places
        )
        low, high = -100.0, 100.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            rate = float(np.mean(1.0 / (1.0 + np.exp(-(logits + middle)))))
            low, high = (middle, high) if rate < config.click_rate else (low, middle)
        return 0.5 * (low + high)


def concatenate(parts: list[Events]) -> Events:
    """One after the other."""
    return Events(
        users=np.concatenate([part.users for part in parts]),
        items=np.concatenate([part.items for part in parts]),
        times=np.concatenate([part.times for part in parts]),
        types=np.concatenate([part.types for part in parts]),
        dwell_s=np.concatenate([part.dwell_s for part in parts]),
    )


def in_order(events: Events) -> Events:
    """By time, then user, item and type: a total order, so equal sets of events give equal bytes."""
    return events.select(np.lexsort((events.types, events.items, events.users, events.times)))


def _repeats(keys: Ints) -> Ints:
    """Positions of every value's second and later occurrences."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    repeated: Ints = order[1:][ordered[1:] == ordered[:-1]]
    return repeated


def _request_sizes(seed: int, num_impressions: int, smallest: int, largest: int) -> npt.NDArray[np.uint16]:
    """Candidates of each request, uniform, in all exactly ``num_impressions``. The last request has what is left."""
    generator = draws.block_generator(seed, draws.REQUEST_SIZES)
    parts: list[npt.NDArray[np.uint16]] = []
    left = num_impressions
    while left > 0:
        sizes = generator.integers(smallest, largest + 1, 65_536).astype(np.uint16)
        ends = np.cumsum(sizes, dtype=np.int64)
        whole = int(np.searchsorted(ends, left, side="right"))
        if whole < len(sizes):
            rest = left - (int(ends[whole - 1]) if whole else 0)
            sizes = np.append(sizes[:whole], np.uint16(rest)) if rest else sizes[:whole]
            left = 0
        else:
            left -= int(ends[-1])
        parts.append(sizes)
    return np.concatenate(parts)
