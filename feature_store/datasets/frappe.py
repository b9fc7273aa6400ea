"""Frappe: which of 4,082 apps 957 users used, in which context; the usual small set of factorisation machines.

Source: Baltrunas, Church, Karatzoglou, Oliver, "Frappe: Understanding the Usage and Perception of Mobile App
Recommendations In-The-Wild", 2015; as published with two drawn negatives a use (He, Chua, "Neural Factorization
Machines", SIGIR 2017) and its 7:2:1 split. Two forms are read, with the same result:

* BARS ``Frappe_x1``: ``train.csv``, ``valid.csv``, ``test.csv``, with a header;
* libFM: ``train.libfm``, ``validation.libfm``, ``test.libfm`` (or with ``frappe.`` before), lines of a label, 1 or -1,
  and ten ``id:1`` in the order of the fields.

The ids are those of the files: integers, of which each field has its own range. ``feature_map.csv`` (``id``, ``field``,
``value``), where there is one, is used to check that.

Impressions
    Every row as it is, repeats included: the published split is kept row by row.

Time
    The set has no times. A row's time says its part and its place in the file: row ``i`` from 0 of training is ``i``
    microseconds after 1 January 1970, of validation after 2 January, of test after 3 January (UTC). So a split by time
    is the published split, and a feature that reads the time would be without meaning.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from feature_store.datasets.folder import views_folder
from feature_store.datasets.raw import read_table, require_folder
from feature_store.datasets.stream import whole_numbers
from feature_store.datasets.summary import DatasetSummary, Progress
from recsys.errors import SourceError, nearest
from recsys.files import write_json

NAME = "frappe"
MARKER = "dataset.json"
FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
MAP_FILE = "feature_map.csv"
SPLIT = {
    "train_end": "1970-01-02T00:00:00Z",
    "validation_end": "1970-01-03T00:00:00Z",
    "test_end": "1970-01-04T00:00:00Z",
}

_DAY_US = 86_400_000_000
_FORMS = (
    ("train.csv", "valid.csv", "test.csv"),
    ("train.libfm", "validation.libfm", "test.libfm"),
    ("train.libfm", "valid.libfm", "test.libfm"),
    ("frappe.train.libfm", "frappe.validation.libfm", "frappe.test.libfm"),
)


def load_frappe(raw_dir: Path, output_dir: Path, progress: Progress | None = None) -> DatasetSummary:
    """Reads the raw files and writes the impressions and ``dataset.json``.

    Args:
        raw_dir: folder of the raw files, in either form.
        output_dir: folder of the views; it appears complete or not at all.
        progress: called after each of the files.

    Raises:
        SourceError: a raw file is missing or broken, or ``output_dir`` holds something else.
    """
    raw_dir = Path(raw_dir)
    require_folder(raw_dir)
    rows_read: dict[str, int] = {}
    parts = []
    for day, path in enumerate(_find(raw_dir)):
        part = _read_libfm(path) if path.suffix == ".libfm" else _read_csv(path)
        rows_read[path.name] = part.height
        parts.append(part.with_columns((pl.int_range(part.height) + day * _DAY_US).alias("time")))
        if progress is not None:
            progress(day + 1, 3)
    impressions = pl.concat(parts)
    _check_fields(raw_dir, impressions, rows_read)
    repeats = impressions.drop("time").is_duplicated().sum()
    summary = DatasetSummary(
        name=NAME,
        rows_read=rows_read,
        rows_written={"impressions": impressions.height},
        repeats_dropped=0,
        findings={"rows equal to another, kept: the split is as published": int(repeats)} if repeats else {},
        split=SPLIT,
    )
    with views_folder(output_dir, marker=MARKER) as folder:
        impressions.select(*FIELDS, "time", "label").write_parquet(folder / "impressions.parquet")
        write_json(folder / MARKER, summary.to_dict())
    return summary


def _find(raw_dir: Path) -> list[Path]:
    for names in _FORMS:
        if all((raw_dir / name).is_file() for name in names):
            return [raw_dir / name for name in names]
    held = [p.name for p in raw_dir.iterdir()]
    missing = next((n for names in _FORMS if any(o in held for o in names) for n in names if n not in held), None)
    raise SourceError(
        f"{raw_dir} must hold {', '.join(_FORMS[0])} or {', '.join(_FORMS[1])}",
        hint=nearest(_FORMS[0][0], held) if missing is None else f"{missing} is missing",
    )


def _read_csv(path: Path) -> pl.DataFrame:
    table = read_table(path, dict.fromkeys(("label", *FIELDS), "int"))
    for name in table.columns:
        if table[name].null_count():
            row = int(table[name].is_null().arg_true()[0]) + 1
            raise SourceError(f"{path}: row {row:,}: {name} must have a value")
    return _labelled(table, path, [0, 1])


def _read_libfm(path: Path) -> pl.DataFrame:
    text = path.read_bytes().decode("utf-8", "replace")
    lines = pl.DataFrame({"line": pl.Series(text.split("\n"), dtype=pl.String).str.strip_chars()})
    lines = lines.with_row_index("number", offset=1).filter(pl.col("line") != "")
    parts = lines["line"].str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
    wrong = (parts.list.len() != len(FIELDS) + 1).arg_true()
    if len(wrong):
        at = int(wrong[0])
        raise SourceError(
            f"{path}:{lines['number'][at]} must have a label and {len(FIELDS)} features, got {len(parts[at])} words"
        )
    columns = {"label": parts.list.get(0)}
    for place, name in enumerate(FIELDS, start=1):
        word = parts.list.get(place)
        odd = (~word.str.contains(r"^\d+:1(\.0*)?$")).arg_true()
        if len(odd):
            raise SourceError(f"{path}:{lines['number'][int(odd[0])]}: feature {place} must be written as ID:1")
        columns[name] = word.str.extract(r"^(\d+):")
    table = whole_numbers(pl.DataFrame(columns), list(columns), path, 1, required=True)
    return _labelled(table, path, [-1, 1])


def _labelled(table: pl.DataFrame, path: Path, values: list[int]) -> pl.DataFrame:
    broken = (~table["label"].is_in(values)).arg_true()
    if len(broken):
        raise SourceError(f"{path}: row {int(broken[0]) + 1:,}: label must be {values[0]} or {values[1]}")
    return table.with_columns((pl.col("label") == 1).cast(pl.Int8))


def _check_fields(raw_dir: Path, impressions: pl.DataFrame, rows_read: dict[str, int]) -> None:
    """An id must belong to the field in whose column it stands."""
    path = raw_dir / MAP_FILE
    if path.is_file():
        names = read_table(path, {"id": "int", "field": "text"})
        rows_read[MAP_FILE] = names.height
        for field in FIELDS:
            known = names.filter(pl.col("field") == field)["id"].to_numpy()
            odd = np.flatnonzero(~np.isin(impressions[field].to_numpy(), known))
            if len(odd):
                raise SourceError(
                    f"{raw_dir}: row {int(odd[0]) + 1:,} of all: {field} must hold ids that {MAP_FILE} gives this field"
                )
        return
    for one, other in pairwise(FIELDS):
        shared = np.intersect1d(impressions[one].unique().to_numpy(), impressions[other].unique().to_numpy())
        if len(shared):
            raise SourceError(
                f"{raw_dir}: {one} and {other} must have no id in common, got {len(shared)}",
                hint="the fields must be in the order of the published files: " + ", ".join(FIELDS),
            )
