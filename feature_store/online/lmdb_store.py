"""LMDB as the online store: a folder on this machine, memory-mapped, for one writer and any number of readers at once.

Reads take no locks and see one moment. Writes are copy-on-write and synced: a process killed at any moment leaves the
state before its transaction or after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from feature_store.online.key_values import Change
from recsys.errors import SourceError, UnavailableError

MAP_GIB = 64
"""Address space of a new store, and so the most that it can hold; the file grows as it is filled."""
_PAGE = 1024


class LMDB:
    """A :class:`~feature_store.online.key_values.KeyValues` in a folder.

    A process opens a folder once; threads share the object.

    Args:
        folder: of the store; holds nothing else.
        is_writable: False for a service that only reads.
        is_made: whether a store that is not there is made, if ``is_writable``.
        map_gib: the most that it can hold from now on, if that is more than before; None leaves it as it is,
            :data:`MAP_GIB` of a new one.

    Raises:
        SourceError: there is no store, or the folder cannot be used.
    """

    def __init__(
        self, folder: str | Path, *, is_writable: bool = True, is_made: bool = True, map_gib: int | None = None
    ) -> None:
        self.folder = Path(folder)
        if not (is_writable and is_made) and not (self.folder / "data.mdb").is_file():
            raise SourceError(
                f"{self.folder} must hold an online store, got none", hint="make it with `recsys materialize`"
            )
        if self.folder.exists() and not (self.folder / "data.mdb").is_file():
            found = "a file" if not self.folder.is_dir() else "a folder of other files"
            if found == "a file" or any(self.folder.iterdir()):
                raise SourceError(
                    f"{self.folder} must be the folder of an online store, or be empty, or not exist, got {found}",
                    hint="choose another path",
                )
        is_new = not (self.folder / "data.mdb").is_file()
        try:
            if is_writable:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._environment = lmdb.open(
                str(self.folder),
                # Of a store that exists, 0 is the size that its last writer gave it, which is written in the file.
                map_size=(map_gib or (MAP_GIB if is_new else 0)) << 30,
                readonly=not is_writable,
                create=is_writable,
                max_readers=1024,
                # Point reads: what lies beside a value is not read ahead.
                readahead=False,
            )
            if is_writable:
                self._environment.reader_check()  # forget readers that were killed
        except (OSError, lmdb.Error) as err:
            raise SourceError(f"{self.folder} must be a folder of an online store: {err}") from err

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See :class:`~feature_store.online.key_values.KeyValues`."""
        with self._reported(), self._environment.begin() as transaction:
            return list(map(transaction.get, keys))

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """See :class:`~feature_store.online.key_values.KeyValues`."""
        with self._reported(), self._environment.begin(write=True) as transaction:
            values = change(list(map(transaction.get, keys)))
            for key, value in zip(keys, values, strict=True):
                if value:
                    transaction.put(key, value)
                elif value is not None:
                    transaction.delete(key)

    def scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """See :class:`~feature_store.online.key_values.KeyValues`.

        A page at a time: no transaction stays open meanwhile.
        """
        start = prefix
        while True:
            page: list[tuple[bytes, bytes]] = []
            with self._reported(), self._environment.begin() as transaction:
                cursor = transaction.cursor()
                if cursor.set_range(start):
                    for key, value in cursor:
                        if not key.startswith(prefix) or len(page) == _PAGE:
                            break
                        page.append((key, value))
            yield from page
            if len(page) < _PAGE:
                return
            start = page[-1][0] + b"\0"

    def close(self) -> None:
        """Closes the files."""
        self._environment.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as err:
            size = self._environment.info()["map_size"] / 2**30
            more = max(round(2 * size), 1)
            raise UnavailableError(
                f"{self.folder} is full at {size:g} GiB",
                hint=f"give it more room: `recsys materialize` with --map-gib {more}, else as it was filled; "
                "or fill a new store that keeps less (--keep-events, --keep-rows, --user-ttl)",
            ) from err
        except lmdb.MapResizedError as err:
            raise UnavailableError(
                f"{self.folder} was given more room since it was opened", hint="open it again: restart what reads it"
            ) from err
        except lmdb.ReadonlyError as err:
            raise UnavailableError(f"{self.folder} was opened for reading only") from err
        except lmdb.Error as err:
            raise UnavailableError(f"{self.folder} cannot be read or written: {err}") from err
