from __future__ import annotations

import gzip
import random
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from feature_store.datasets import stream
from feature_store.datasets.avazu import load_avazu
from feature_store.datasets.criteo import load_criteo
from recsys.errors import SourceError
from tests.feature_store.datasets.loaded import build

AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def criteo_line(n: int) -> str:
    """Every third count and every fourth value is missing; some counts are negative."""
    counts = ["" if (n + i) % 3 == 0 else str(i * n - 2) for i in range(13)]
    values = ["" if (n + i) % 4 == 0 else f"{(n * 2654435761 + i) % 2**32:08x}" for i in range(26)]
    return "\t".join([str(n % 2), *counts, *values])


def avazu_line(n: int, hour: str = "", **fields: str) -> str:
    values = {
        "id": f"{1000009418151094273 * 10 + n}",  # past 2^63, as in the public file
        "click": str(int(n % 5 == 0)),
        "hour": hour or f"1410{21 + n % 10}{n % 24:02d}",
        "C14": str(15706 + n % 7),
        "device_id": "a99f214a" if n % 3 else f"{n:08x}",
        **{
            name: f"{name[-2:]}{n % 4:06x}"
            for name in AVAZU_HEADER.split(",")
            if name.endswith(("_id", "main", "gory"))
        },
        **fields,
    }
    return ",".join(values.get(name, str(n % 3 - 1)) for name in AVAZU_HEADER.split(","))


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path.parent


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches from a small file."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 2000)


@pytest.mark.usefixtures("small_blocks")
def test_criteo_row_by_row(tmp_path: Path) -> None:
    lines = [criteo_line(n) for n in range(100)]
    summary = load_criteo(write(tmp_path / "raw" / "train.txt", lines), tmp_path / "views")
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    assert summary.rows_written == {"impressions": 100}
    for n, row in enumerate(impressions.rows(named=True)):
        label, *fields = lines[n].split("\t")
        assert (row["user"], row["item"], row["time"], row["label"]) == (0, 0, n * 1_000_000, int(label))
        expected = [int(f) if f else None for f in fields[:13]] + [int(f, 16) if f else None for f in fields[13:]]
        assert [row[f"I{i}"] for i in range(1, 14)] + [row[f"C{i}"] for i in range(1, 27)] == expected
    assert build(summary, tmp_path / "views").rows == {"train": 80, "validation": 10, "test": 10}


def test_criteo_packed_and_with_windows_line_ends_is_the_same(tmp_path: Path) -> None:
    lines = [criteo_line(n) for n in range(20)]
    load_criteo(write(tmp_path / "a" / "train.txt", lines), tmp_path / "a_views")
    load_criteo(write(tmp_path / "b" / "train.txt.gz", [f"{line}\r" for line in lines]), tmp_path / "b_views")
    first, second = (pl.read_parquet(tmp_path / f"{x}_views" / "impressions.parquet") for x in "ab")
    assert first.equals(second)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\t3", r"train\.txt:50 must have 40 fields, got 3"),
        (criteo_line(49) + "\t", r"train\.txt:50 must have 40 fields, got 41"),
        ("2" + criteo_line(49)[1:], r"row 50: label must be 0 or 1"),
        (criteo_line(49)[1:], r"row 50: label must be a whole number"),
        (criteo_line(49).replace("\t47\t", "\t4.7\t"), r"row 50: I2 must be a whole number"),
        (criteo_line(48)[:-8] + "ghijklmn", r"row 50: C26 must be a number of base 16"),
        ("\xff\xfe", r"train\.txt"),
    ],
)
def test_a_broken_criteo_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    lines = [criteo_line(n) for n in range(100)]
    lines[49] = line
    with pytest.raises(SourceError, match=message):
        load_criteo(write(tmp_path / "raw" / "train.txt", lines), tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_a_file_that_was_cut_short_or_is_empty_is_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw" / "train.txt.gz", [criteo_line(n) for n in range(2000)])
    whole = (raw / "train.txt.gz").read_bytes()
    (raw / "train.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"train\.txt\.gz"):
        load_criteo(raw, tmp_path / "views")
    (raw / "train.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(SourceError, match="got an empty file"):
        load_criteo(raw, tmp_path / "views")


def test_avazu_row_by_row(tmp_path: Path) -> None:
    lines = [AVAZU_HEADER, *(avazu_line(n) for n in range(120))]
    summary = load_avazu(write(tmp_path / "raw" / "train.gz", lines), tmp_path / "views")
    impressions = pl.read_parquet(tmp_path / "views" / "impressions.parquet")
    assert summary.rows_written == {"impressions": 120}
    assert "id" not in impressions.columns
    for n, row in enumerate(impressions.rows(named=True)):
        raw = dict(zip(AVAZU_HEADER.split(","), lines[n + 1].split(","), strict=True))
        # 21 October 2014, 00:00 UTC, is 1,413,849,600 seconds after 1970.
        assert row["time"] == (1_413_849_600 + n % 10 * 86_400 + n % 24 * 3_600) * 1_000_000
        assert {name: str(row[name]) for name in raw if name not in ("id", "hour")} == {
            name: value for name, value in raw.items() if name not in ("id", "hour")
        }
    assert build(summary, tmp_path / "views").rows == {"train": 96, "validation": 12, "test": 12}


def test_columns_in_another_order_and_missing_devices(tmp_path: Path) -> None:
    names = AVAZU_HEADER.split(",")
    order = random.Random(1).sample(range(len(names)), len(names))
    lines = [AVAZU_HEADER, *(avazu_line(n, device_id="" if n == 4 else "d") for n in range(10))]
    mixed = [",".join(line.split(",")[i] for i in order) for line in lines]
    first = load_avazu(write(tmp_path / "a" / "train.csv", lines), tmp_path / "a_views")
    second = load_avazu(write(tmp_path / "b" / "train", mixed), tmp_path / "b_views")
    assert first.findings == second.findings == {"rows without device_id, kept with an empty one": 1}
    tables = [pl.read_parquet(tmp_path / f"{x}_views" / "impressions.parquet") for x in "ab"]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([AVAZU_HEADER.replace("site_id", "siteid"), avazu_line(0)], r"must have the column site_id"),
        ([AVAZU_HEADER, avazu_line(0), avazu_line(1, "14102")], r"row 2: hour must be written as YYMMDDHH"),
        ([AVAZU_HEADER, avazu_line(0), avazu_line(1, "14133100")], r"row 2: hour must be written as YYMMDDHH"),
        ([AVAZU_HEADER, avazu_line(0), avazu_line(1, click="")], r"row 2: click must be a whole number"),
        ([AVAZU_HEADER, avazu_line(0, C14="")], r"row 1: C14 must be a whole number"),
        ([AVAZU_HEADER, avazu_line(0), avazu_line(1)[:-3]], r"train\.csv:3 must have 24 fields, got 23"),
    ],
)
def test_a_broken_avazu_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_avazu(write(tmp_path / "raw" / "train.csv", lines), tmp_path / "views")
    assert not (tmp_path / "views").exists()


@pytest.mark.usefixtures("small_blocks")
def test_no_batch_is_larger_than_its_block(tmp_path: Path) -> None:
    path = write(tmp_path / "raw" / "train.txt", [criteo_line(n) for n in range(500)]) / "train.txt"
    columns = [f"c{i}" for i in range(40)]
    heights = [batch.height for _, batch in stream.text_batches(path, columns, separator="\t", has_header=False)]
    shortest = min(len(criteo_line(n)) + 1 for n in range(500))
    assert sum(heights) == 500
    assert max(heights) <= 2000 // shortest + 1


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_a_file_is_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    block = 100_000
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    lines = [criteo_line(n) for n in range(1_000)] * 60
    path = write(tmp_path / "raw" / name, lines) / name
    columns = [f"c{i}" for i in range(40)]
    before, held = pa.total_allocated_bytes(), []
    for _, batch in stream.text_batches(path, columns, separator="\t", has_header=False):
        held.append(pa.total_allocated_bytes() - before)
        del batch
    # A block, its table and the decompressor's buffers (1 MB), but not the file, which is more than five times as much.
    limit = 20 * block
    assert sum(len(line) + 1 for line in lines) > 5 * limit
    assert max(held) < limit
