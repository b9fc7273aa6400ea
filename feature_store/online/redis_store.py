"""Redis as the online store: one server that many services share.

Everything about a request is one ``MGET``: one round trip. Writes compare and set: a small script on the server sets
the new values if the old ones are still what they were computed from, else the caller computes again. So a push is
atomic, whoever else writes, and needs no lock that a killed process could leave behind. The server removes expired
values.

A namespace begins every key, so that several models can share a server. Not for Redis Cluster: the keys of one request
lie in many slots.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import parse_qs, urlencode

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from feature_store.online.codec import NEVER, expiry_of
from feature_store.online.key_values import Change
from recsys.errors import ConfigError, UnavailableError

NAMESPACE = "recsys"
_TRIES = 200
_PAGE = 512

# KEYS: what to set. ARGV, three a key: sha1 of the value as it was ('' if there was none); the new value ('' to remove
# the key); when it expires, in Unix milliseconds ('never', or 'keep' to leave the key as it is). Returns 0 if a value
# has changed since, else 1.
_COMPARE_AND_SET = """
for i, key in ipairs(KEYS) do
  local found = redis.call('GET', key)
  if (found and redis.sha1hex(found) or '') ~= ARGV[3 * i - 2] then return 0 end
end
for i, key in ipairs(KEYS) do
  local value, expires = ARGV[3 * i - 1], ARGV[3 * i]
  if expires == 'keep' then
  elseif value == '' then redis.call('DEL', key)
  elseif expires == 'never' then redis.call('SET', key, value)
  else redis.call('SET', key, value, 'PXAT', expires) end
end
return 1
"""


class Redis:
    """A :class:`~feature_store.online.key_values.KeyValues` on a server.

    Args:
        url: ``redis://host:port/db``, ``rediss://`` or ``unix://``; ``?namespace=NAME`` begins every key.
        timeout_s: of a connection and of a command.

    Raises:
        ConfigError: the URL is none.
        UnavailableError: the server does not answer.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        address, _, asked = url.partition("?")
        query = parse_qs(asked)
        namespace = query.pop("namespace", [NAMESPACE])[-1]
        self._prefix = namespace.encode() + b":"
        scheme, _, place = address.partition("://")
        self._shown = f"{scheme}://{place.rpartition('@')[2]}"  # without a password that the URL may hold
        number = place.rpartition("@")[2].partition("/")[2]
        if scheme != "unix" and number and not number.isdecimal():
            raise ConfigError(f"{self._shown} must name a database by its number, got {number!r}", hint="such as /0")
        plain = f"{address}?{urlencode(query, doseq=True)}" if query else address
        try:
            # No command is repeated by the client: a compare-and-set that was done would then seem to have failed.
            self._client: Any = redis.Redis.from_url(
                plain,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                health_check_interval=30,
            )
        except (ValueError, TypeError) as err:
            raise ConfigError(f"{self._shown} must be redis://HOST:PORT/DB, rediss:// or unix://: {err}") from err
        self._script: Any = self._client.register_script(_COMPARE_AND_SET)
        with self._reported():
            self._client.ping()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See :class:`~feature_store.online.key_values.KeyValues`. One round trip."""
        if not keys:
            return []
        with self._reported():
            return cast("list[bytes | None]", self._client.mget([self._prefix + key for key in keys]))

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """See :class:`~feature_store.online.key_values.KeyValues`. Computed again while others write the same keys."""
        if not keys:
            return
        full = [self._prefix + key for key in keys]
        for turn in range(_TRIES):
            old = self.get(keys)
            arguments: list[bytes | str] = []
            for before, after in zip(old, change(list(old)), strict=True):
                seen = "" if before is None else hashlib.sha1(before, usedforsecurity=False).hexdigest()
                arguments += [seen, after or b"", "keep" if after is None else _expiry(after)]
            with self._reported():
                if self._script(keys=full, args=arguments) == 1:
                    return
            time.sleep(random.random() * min(0.001 * 2**turn, 0.05))
        raise UnavailableError(
            f"{self._shown}: the same values are written by others all the time; gave up after {_TRIES} tries"
        )

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See :class:`~feature_store.online.key_values.KeyValues`. A key may be given twice, as Redis does."""
        pattern = b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^-" else bytes([c]) for c in self._prefix + prefix) + b"*"
        cursor = 0
        while True:
            with self._reported():
                cursor, page = self._client.scan(cursor, match=pattern, count=_PAGE)
                values = self._client.mget(page) if page else []
            for key, value in zip(page, values, strict=True):
                if value is not None:
                    yield key[len(self._prefix) :], value
            if cursor == 0:
                return

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as err:
            raise UnavailableError(
                f"{self._shown} must be a Redis server that answers: {str(err) or type(err).__name__}",
                hint="check that it runs and that the URL is right",
            ) from err


def _expiry(value: bytes) -> str:
    expires = expiry_of(value)
    return "never" if expires == NEVER else str(expires // 1000)
