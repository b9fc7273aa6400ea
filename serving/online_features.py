"""Stored features from an online store, for serving: what :mod:`feature_store.online` keeps, as a feature source.

Everything about a request is read at once, in :meth:`OnlineFeatures.at`: one transaction of LMDB, one round trip of
Redis.
What is written meanwhile, by ``recsys push`` or ``recsys materialize``, the next request sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from feature_store.online.location import open_backend
from feature_store.online.reading import Entities, Read, cut
from feature_store.online.store import OnlineStore
from recsys.encoding.columns import Array
from recsys.encoding.encoder import Encoder
from serving.features import Derived, Events, FeatureSource, Known


class OnlineFeatures:
    """Features from an online store. Safe to call from several threads.

    Args:
        store: of the artifact's encoder.
    """

    has_users = True
    has_items = True
    has_derived = True

    def __init__(self, store: OnlineStore) -> None:
        self.store = store

    @classmethod
    def open(cls, location: str, encoder: Encoder) -> Self:
        """Opens a store for reading.

        Args:
            location: ``lmdb:PATH`` or ``redis://HOST:PORT/DB``.
            encoder: the artifact's.

        Raises:
            ArtifactError: the store holds nothing, or values of another encoder.
            SourceError: there is no such LMDB store.
            UnavailableError: the server does not answer.
        """
        return cls(OnlineStore(open_backend(location, is_writable=False), encoder))

    def at(self, users: Array, items: Array) -> FeatureSource:
        """See :class:`~serving.features.FeatureSource`."""
        return _ReadFeatures(self, users, items, self.store.read(users, items))

    def users(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`~serving.features.FeatureSource`."""
        return _known(self.store.users(keys), features)

    def items(self, keys: Array, features: Sequence[str]) -> Known:
        """See :class:`~serving.features.FeatureSource`."""
        return _known(self.store.items(keys), features)

    def history(self, name: str, users: Array, before: np.ndarray, max_length: int) -> Events:
        """See :class:`~serving.features.FeatureSource`."""
        return Events(*cut(self.store.history(name, users), before, max_length))

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> Derived:
        """See :class:`~serving.features.FeatureSource`."""
        return Derived(*self.store.derived(users, items, time, request_of_row))


class _ReadFeatures:
    """What was read for the users and items of a batch; other keys are asked for anew.

    Args:
        source: where it was read.
        users: ``(R,)`` keys.
        items: ``(N,)`` keys.
        read: what was found.
    """

    has_users = True
    has_items = True
    has_derived = True

    def __init__(self, source: OnlineFeatures, users: Array, items: Array, read: Read) -> None:
        self._source = source
        self._users = users
        self._items = items
        self._read = read

    def at(self, users: Array, items: Array) -> FeatureSource:
        return self._source.at(users, items)

    def users(self, keys: Array, features: Sequence[str]) -> Known:
        if keys is not self._users:
            return self._source.users(keys, features)
        return _known(self._read.users, features)

    def items(self, keys: Array, features: Sequence[str]) -> Known:
        if keys is not self._items:
            return self._source.items(keys, features)
        return _known(self._read.items, features)

    def history(self, name: str, users: Array, before: np.ndarray, max_length: int) -> Events:
        if users is not self._users:
            return self._source.history(name, users, before, max_length)
        return Events(*cut(self._read.histories[name], before, max_length))

    def derived(self, users: Array, items: Array, time: np.ndarray, request_of_row: np.ndarray) -> Derived:
        if users is not self._users or items is not self._items:
            return self._source.derived(users, items, time, request_of_row)
        return Derived(*self._source.store.derived_of(self._read, time, request_of_row))


def _known(found: Entities, features: Sequence[str]) -> Known:
    return Known({f: found.columns[f] for f in features}, found.is_known)
