"""Negatives for logs that hold only what users did: items drawn for each positive, of which the user did none.

==============  ====================================================================
uniform         every item with the same probability
popularity      in proportion to how many interactions an item has in the whole log
in_category     every item of the positive's category with the same probability
==============  ====================================================================

An item that the user interacted with at any time, before or after, is never drawn, and the negatives of one positive
differ from each other. Figures on sampled negatives say how well a model tells the drawn items from the chosen ones;
they cannot be compared with figures on impressions, nor between ways of drawing. Write the way next to the figure: it
is recorded in ``dataset.json``.

The pool is the whole log, as in the papers, so an item that nobody has touched yet can be drawn. In a small slice of a
log, where most items occur once, such draws teach a model that an item seen only as a negative is a bad one, and
later it is the positive: in the slice of Taobao with 929 users, the share of positives by item, fitted on training,
has an AUC of 0.21 on the next day. ``recsys data check-leaks`` shows this figure for every feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from recsys.errors import ConfigError, nearest

SamplingKind = Literal["uniform", "popularity", "in_category"]
_ROUNDS = 20
"""Draws are repeated so often; what is left then is drawn from the exact remaining pool, which is slower."""


@dataclass(frozen=True)
class NegativeSampling:
    """How to draw negatives.

    Attributes:
        kind: from which distribution.
        per_positive: how many for each positive.
        seed: equal seeds and logs give equal negatives.
    """

    kind: SamplingKind = "uniform"
    per_positive: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplingKind):
            raise ConfigError(
                f"negatives must be one of {', '.join(get_args(SamplingKind))}, got {self.kind!r}",
                hint=nearest(self.kind, get_args(SamplingKind)),
            )
        if self.per_positive < 1:
            raise ConfigError(f"negatives per positive must be at least 1, got {self.per_positive}")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")


class NegativeSampler:
    """Draws negatives against a whole log of interactions.

    Users and items are given as numbers ``0 .. U - 1`` and ``0 .. I - 1``; the pool is the items.

    Args:
        sampling: how to draw.
        user: ``(E,)`` int64, of every interaction.
        item: ``(E,)`` int64, of every interaction.
        num_items: I.
        category: ``(I,)`` int64, number of each item's category, from 0; needed to draw in the category.
    """

    def __init__(
        self,
        sampling: NegativeSampling,
        user: np.ndarray,
        item: np.ndarray,
        *,
        num_items: int,
        category: np.ndarray | None = None,
    ) -> None:
        self.sampling = sampling
        self._num_items = num_items
        self._seen = np.unique(user.astype(np.int64) * num_items + item)
        self._item = item
        self._num_positives = self._num_negatives = self._num_short = 0
        if sampling.kind == "in_category":
            if category is None:
                raise ConfigError("negatives in_category need a data set whose items have a category")
            self._category = category
            self._by_category = np.argsort(category, kind="stable")
            self._category_start = np.searchsorted(category[self._by_category], np.arange(int(category.max()) + 2))

    def draw(self, user: np.ndarray, positive: np.ndarray, *, block: int) -> np.ndarray:
        """Negatives of some positives.

        Args:
            user: ``(P,)`` int64.
            positive: ``(P,)`` int64, the items.
            block: number of this call; the draws depend on it, on the seed and on the arguments, and on nothing else.

        Returns:
            ``(P, per_positive)`` int64; -1 where no item is left that the user has not interacted with.
        """
        rng = np.random.default_rng([self.sampling.seed, block])
        drawn = np.full((len(user), self.sampling.per_positive), -1, dtype=np.int64)
        for place in range(self.sampling.per_positive):
            pending = np.arange(len(user))
            for _ in range(_ROUNDS):
                if len(pending) == 0:
                    break
                candidates = self._candidates(rng, positive[pending])
                taken = (drawn[pending, :place] == candidates[:, None]).any(axis=1)
                taken |= self._is_seen(user[pending], candidates)
                drawn[pending[~taken], place] = candidates[~taken]
                pending = pending[taken]
            for row in pending.tolist():
                drawn[row, place] = self._draw_exactly(rng, int(user[row]), int(positive[row]), drawn[row, :place])
        found = drawn >= 0
        self._num_positives += len(user)
        self._num_negatives += int(np.count_nonzero(found))
        self._num_short += int(np.count_nonzero(~found.all(axis=1)))
        return drawn

    def record(self) -> dict[str, Any]:
        """How negatives were drawn and how many, for ``dataset.json``."""
        return {
            "negatives": self.sampling.kind,
            "per_positive": self.sampling.per_positive,
            "seed": self.sampling.seed,
            "pool_items": self._num_items,
            "positives": self._num_positives,
            "drawn": self._num_negatives,
            "positives_with_fewer": self._num_short,
        }

    def _candidates(self, rng: np.random.Generator, positive: np.ndarray) -> np.ndarray:
        if self.sampling.kind == "uniform":
            return rng.integers(self._num_items, size=len(positive))
        if self.sampling.kind == "popularity":
            by_count: np.ndarray = self._item[rng.integers(len(self._item), size=len(positive))].astype(np.int64)
            return by_count
        category = self._category[positive]
        start, stop = self._category_start[category], self._category_start[category + 1]
        in_category: np.ndarray = self._by_category[rng.integers(start, stop)]
        return in_category

    def _is_seen(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        wanted = user.astype(np.int64) * self._num_items + item
        place = np.searchsorted(self._seen, wanted)
        place[place == len(self._seen)] = 0
        found: np.ndarray = self._seen[place] == wanted
        return found

    def _draw_exactly(self, rng: np.random.Generator, user: int, positive: int, drawn: np.ndarray) -> int:
        if self.sampling.kind == "in_category":
            category = int(self._category[positive])
            pool = self._by_category[self._category_start[category] : self._category_start[category + 1]]
        else:
            pool = np.arange(self._num_items)
        pool = pool[~self._is_seen(np.full(len(pool), user), pool) & ~np.isin(pool, drawn)]
        if self.sampling.kind == "popularity":
            weights = np.bincount(self._item, minlength=self._num_items)[pool]
            pool, weights = pool[weights > 0], weights[weights > 0]
            return int(rng.choice(pool, p=weights / weights.sum())) if len(pool) else -1
        return int(rng.choice(pool)) if len(pool) else -1
