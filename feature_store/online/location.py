"""Where an online store is: ``lmdb:PATH`` or a Redis URL."""

from __future__ import annotations

from feature_store.online.key_values import KeyValues
from recsys.errors import ConfigError

_REDIS = ("redis://", "rediss://", "unix://")


def is_online(location: str) -> bool:
    """Whether a text names an online store, and not a folder."""
    return location.startswith(("lmdb:", *_REDIS))


def open_backend(location: str, *, is_writable: bool, is_made: bool = True, map_gib: int | None = None) -> KeyValues:
    """Opens what holds the bytes. Loads only the client that it needs.

    Args:
        location: ``lmdb:PATH``, ``redis://HOST:PORT/DB`` (also ``rediss://``, ``unix://``; ``?namespace=NAME``).
        is_writable: False to read only.
        is_made: whether an LMDB store that is not there is made, if ``is_writable``.
        map_gib: the most that an LMDB store can hold; None leaves it as it is.

    Raises:
        ConfigError: the location is none of these, or ``map_gib`` is given for Redis.
        SourceError: there is no such LMDB store, or its folder cannot be used.
        UnavailableError: the server does not answer.
    """
    if location.startswith("lmdb:") and location != "lmdb:":
        from feature_store.online.lmdb_store import LMDB

        return LMDB(location.removeprefix("lmdb:"), is_writable=is_writable, is_made=is_made, map_gib=map_gib)
    if location.startswith(_REDIS):
        if map_gib is not None:
            raise ConfigError(
                "map_gib must be given for LMDB stores only, got it for Redis", hint="set maxmemory there"
            )
        from feature_store.online.redis_store import Redis

        return Redis(location)
    raise ConfigError(f"STORE must be lmdb:PATH or redis://HOST:PORT/DB, got {location!r}")
