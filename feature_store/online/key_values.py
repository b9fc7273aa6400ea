"""What holds the bytes of an online store: an embedded database, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

Change = Callable[[list[bytes | None]], Sequence[bytes | None]]
"""From the values of keys to their new ones; None leaves a key as it is, no bytes remove it. May be called again."""


class KeyValues(Protocol):
    """Bytes by key. Safe to call from several threads, and from several processes at once."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, as of one moment; None where there is none.

        Raises:
            UnavailableError: the store does not answer.
        """

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """Changes the values of some keys together: all or none, and nothing in between is lost.

        Raises:
            UnavailableError: the store does not answer, or cannot take the values.
        """

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values under a prefix, in any order; keys that change meanwhile may be given or not."""

    def close(self) -> None:
        """Lets go of files and connections."""
