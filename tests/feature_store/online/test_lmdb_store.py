"""How much an LMDB store can hold, and what it says when it is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_store.online.lmdb_store import LMDB, MAP_GIB
from feature_store.online.location import open_backend
from recsys.errors import ConfigError, UnavailableError


def gib_of(store: LMDB) -> float:
    size: int = store._environment.info()["map_size"]
    return size / 2**30


def test_room_is_that_of_the_last_run_that_gave_some(tmp_path: Path) -> None:
    sizes = []
    for map_gib, is_writable in ((None, True), (MAP_GIB + 1, True), (None, True), (None, False)):
        store = LMDB(tmp_path / "online", is_writable=is_writable, map_gib=map_gib)
        sizes.append(gib_of(store))
        if is_writable:
            store.update([b"key"], lambda _: [b"value"])
        store.close()
    assert sizes == [MAP_GIB, MAP_GIB + 1, MAP_GIB + 1, MAP_GIB + 1]


def test_a_full_store_stays_as_it_was_and_names_the_option(tmp_path: Path) -> None:
    store = LMDB(tmp_path / "online")
    store.update([b"key"], lambda _: [b"old"])
    store._environment.set_mapsize(1 << 20)
    with pytest.raises(UnavailableError, match=r"online is full at 0\.000976562 GiB") as error:
        store.update([b"key", b"more"], lambda _: [b"new", b"x" * (2 << 20)])
    assert error.value.hint is not None
    assert "`recsys materialize` with --map-gib 1" in error.value.hint
    assert store.get([b"key", b"more"]) == [b"old", None]
    store.close()
    # More room, and it takes the values.
    store = LMDB(tmp_path / "online", map_gib=1)
    store.update([b"key", b"more"], lambda _: [b"new", b"x" * (2 << 20)])
    assert store.get([b"key"]) == [b"new"]
    store.close()


def test_room_is_not_given_to_redis() -> None:
    with pytest.raises(ConfigError, match="map_gib must be given for LMDB stores only") as error:
        open_backend("redis://nowhere:1/0", is_writable=True, map_gib=2)
    assert error.value.hint == "set maxmemory there"
