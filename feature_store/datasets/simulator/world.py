r"""The simulated world: items, users, and what makes a user click.

Every item has a hidden unit vector :math:`z_i`, close to its topic's vector, which is close to its category's. A user
has several interests at a time. Interest :math:`k` is a topic with vector :math:`v_k` and a strength :math:`s_k`; it
lasts for some days, then another takes its place. The true click probability of item :math:`i` shown to user
:math:`u` at place :math:`j` is

.. math::
    \sigma\Big(b + A \sum_k s_k e^{\kappa (v_k \cdot z_i - 1)} + q_i + b_u - P \frac{\log(1 + j)}{\log 50}
    + c_{\text{hour}, \text{category}} + c_{\text{device}, \text{category}} + c_{\text{device}} + c_{\text{hour}}\Big)

with places from 0, and the intercept :math:`b` such that the expected click rate is the configured one. The sum is
large if *some* interest is close to the item. So a model must compare the candidate with each past click; the mean of
the past clicks lies between the interests and says little.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_store.datasets.simulator import draws
from feature_store.datasets.simulator.config import SimulatorConfig
from feature_store.datasets.simulator.draws import Floats, Ints

DEVICES = ("phone", "tablet", "desktop", "tv")
DEVICE_SHARES = (0.68, 0.1, 0.17, 0.05)
AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55+")
GENDERS = ("female", "male", "other")
SEGMENTS = len(AGE_GROUPS) * len(GENDERS)
HOURLY_TRAFFIC = (3, 2, 1, 1, 1, 2, 4, 7, 9, 8, 8, 9, 11, 10, 9, 9, 10, 12, 15, 18, 20, 19, 13, 7)
HOURS_PER_DAYPART = 4

Float32s = npt.NDArray[np.float32]


class Interests(NamedTuple):
    """The interests of R (user, time) pairs, K each."""

    topics: Ints
    """(R, K)"""
    strengths: Floats
    """(R, K), in [0.5, 1)"""


@dataclasses.dataclass(frozen=True)
class Items:
    """Items in order of their category. The simulation uses *positions* in these arrays; it writes ``ids``."""

    ids: Ints
    categories: Ints
    topics: Ints
    latents: Float32s
    """(I, d), unit vectors"""
    logits: Float32s
    """:math:`q_i`, the price effect and the popularity effect within"""
    prices: Floats
    cumulative_popularity: Floats
    category_starts: Ints
    """(C + 1,): items of category c are ``category_starts[c] : category_starts[c + 1]``"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Users:
    """Users. The simulation uses *positions* in these arrays; it writes ``ids``."""

    ids: Ints
    segments: Ints
    devices: Ints
    """the device that a user mostly uses"""
    logits: Float32s
    cumulative_activity: Floats

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that does not change while the log is written. Memory is O(items + users)."""

    config: SimulatorConfig
    items: Items
    users: Users
    topic_latents: Float32s
    """(topics, d), unit vectors; topic t belongs to category ``t // topics_per_category``"""
    segment_categories: Floats
    """(segments x C,): cumulative category preferences of segment s, raised by s"""
    daypart_category: Float32s
    device_category: Float32s
    hour_logits: Float32s
    device_logits: Float32s

    def interests(self, users: Ints, times_days: Floats) -> Interests:
        """Interests of users (R,) at times (R,), in days since the start of the impressions, negative before it.

        Interest k of a user is renewed each ``interest_lifetimes_days[k]`` times a factor in [0.5, 1.5) of the user's
        own. Nothing is simulated: renewal number n of (user, k) is a hash, so any time can be asked for in any order.
        """
        config, seed = self.config, self.config.seed
        slots = np.arange(len(config.interest_lifetimes_days))
        user, slot = users[:, None], slots[None, :]
        lifetimes = np.asarray(config.interest_lifetimes_days) * (
            0.5 + draws.uniform(seed, draws.INTEREST, 0, user, slot)
        )
        phases = draws.uniform(seed, draws.INTEREST, 1, user, slot)
        since_warm_up = times_days[:, None] + config.warm_up_days
        renewals = np.floor(since_warm_up / lifetimes + phases).astype(np.int64)
        by_segment = draws.uniform(seed, draws.INTEREST, 2, user, slot, renewals) < config.segment_share
        place = draws.uniform(seed, draws.INTEREST, 3, user, slot, renewals)
        preferred = draws.sample_cumulative(self.segment_categories, (self.users.segments[user] + place) / SEGMENTS)
        any_category = np.floor(place * config.num_categories).astype(np.int64)
        categories = np.where(by_segment, preferred % config.num_categories, any_category)
        inside = draws.uniform(seed, draws.INTEREST, 4, user, slot, renewals) * config.topics_per_category
        topics = categories * config.topics_per_category + np.floor(inside).astype(np.int64)
        return Interests(topics, 0.5 + 0.5 * draws.uniform(seed, draws.INTEREST, 5, user, slot, renewals))

    def affinity(self, interests: Interests, request_of_row: Ints, items: Ints) -> Float32s:
        r"""Closeness of items to interests, :math:`\sum_k s_k e^{\kappa (v_k \cdot z_i - 1)}`, (N,).

        Args:
            interests: of R requests.
            request_of_row: (N,)
            items: (N,) positions.
        """
        latents = self.items.latents[items]
        sharpness = np.float32(self.config.interest_sharpness)
        total = np.zeros(len(items), dtype=np.float32)
        for k in range(interests.topics.shape[1]):
            cosine = np.einsum("nd,nd->n", self.topic_latents[interests.topics[:, k]][request_of_row], latents)
            strength = interests.strengths[:, k].astype(np.float32)[request_of_row]
            total += strength * np.exp(sharpness * (cosine - np.float32(1.0)))
        return total


def build_world(config: SimulatorConfig) -> World:
    """Draws the world of a configuration."""
    config = config.resolved()
    generator = draws.block_generator(config.seed, draws.WORLD)
    centres = _unit(generator.standard_normal((config.num_categories, config.latent_dim)))
    around = _unit(generator.standard_normal((config.num_topics, config.latent_dim)))
    topic_latents = _unit(np.repeat(centres, config.topics_per_category, axis=0) + config.topic_spread * around)
    items = _build_items(config, topic_latents)
    preferences = np.exp(generator.standard_normal((SEGMENTS, config.num_categories)))
    cumulative: Floats = np.cumsum(preferences / preferences.sum(axis=1, keepdims=True), axis=1)
    cumulative[:, -1] = 1.0
    dayparts = 24 // HOURS_PER_DAYPART
    daypart_category = config.context_effect * generator.standard_normal((dayparts, config.num_categories))
    device_category = config.context_effect * generator.standard_normal((len(DEVICES), config.num_categories))
    return World(
        config=config,
        items=items,
        users=_build_users(config),
        topic_latents=topic_latents.astype(np.float32),
        segment_categories=(cumulative + np.arange(SEGMENTS, dtype=np.float64)[:, None]).ravel(),
        daypart_category=daypart_category.astype(np.float32),
        device_category=device_category.astype(np.float32),
        hour_logits=(config.context_effect * np.sin(2 * np.pi * (np.arange(24) - 14) / 24)).astype(np.float32),
        device_logits=(config.context_effect * generator.standard_normal(len(DEVICES))).astype(np.float32),
    )


def _build_items(config: SimulatorConfig, topic_latents: Floats) -> Items:
    generator = draws.block_generator(config.seed, draws.WORLD, 1)
    num_items = config.resolved_num_items
    # Every topic has an item; the rest fall on topics at random. Sorting by topic sorts by category.
    others = generator.integers(0, config.num_topics, num_items - config.num_topics)
    topics = np.sort(np.concatenate([np.arange(config.num_topics), others]))
    categories = topics // config.topics_per_category
    noise = _unit(generator.standard_normal((num_items, config.latent_dim)))
    latents = _unit(topic_latents[topics] + config.item_spread * noise)
    log_popularity = -config.popularity_exponent * np.log(1.0 + generator.permutation(num_items))
    prices = np.exp(generator.normal(3.0, 0.8, num_items))
    shares = {"popularity": 0.6, "price": -0.3, "own": 0.55}
    own = generator.standard_normal(num_items)
    quality = (
        shares["popularity"] * _standardised(log_popularity)
        + shares["price"] * _standardised(np.log(prices))
        + shares["own"] * own
    )
    return Items(
        ids=5_000_000_000 + generator.permutation(num_items),
        categories=categories,
        topics=topics,
        latents=latents.astype(np.float32),
        logits=(config.item_effect * _standardised(quality)).astype(np.float32),
        prices=prices,
        cumulative_popularity=np.cumsum(np.exp(log_popularity)),
        category_starts=np.searchsorted(categories, np.arange(config.num_categories + 1)),
    )


def _build_users(config: SimulatorConfig) -> Users:
    generator = draws.block_generator(config.seed, draws.USERS)
    num_users = config.resolved_num_users
    ages = draws.sample_cumulative(np.cumsum((0.22, 0.3, 0.22, 0.15, 0.11)), generator.random(num_users))
    genders = draws.sample_cumulative(np.cumsum((0.48, 0.48, 0.04)), generator.random(num_users))
    devices = draws.sample_cumulative(np.cumsum(DEVICE_SHARES), generator.random(num_users))
    return Users(
        ids=1 + generator.permutation(num_users),
        segments=ages * len(GENDERS) + genders,
        devices=devices,
        logits=(config.user_effect * generator.standard_normal(num_users)).astype(np.float32),
        cumulative_activity=np.cumsum(np.exp(0.8 * generator.standard_normal(num_users))),
    )


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return unit


def _standardised(values: Floats) -> Floats:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
