"""Broken rows: set aside in a file with the reason, counted, and refused when they are too many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from feature_store.sources import Source
from recsys.errors import QuarantineError
from recsys.training_set import SOURCE_ROW

REASON = "@reason"
_CODE = "@code"


class Quarantine:
    """The broken rows of one view. A row has one reason: the first that was found.

    Args:
        source: the view.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reasons: list[str] = []
        self._rows: list[np.ndarray] = []

    def add(self, reason: str, source_rows: np.ndarray) -> None:
        """Sets rows aside.

        Args:
            reason: what is wrong, naming the column.
            source_rows: ``(n,)`` int64; rows that were not set aside before.
        """
        if len(source_rows):
            self._reasons.append(reason)
            self._rows.append(source_rows)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by reason, in the order in which they were found."""
        counts: dict[str, int] = {}
        for reason, rows in zip(self._reasons, self._rows, strict=True):
            counts[reason] = counts.get(reason, 0) + len(rows)
        return counts

    @property
    def num_rows(self) -> int:
        """Rows set aside."""
        return sum(len(rows) for rows in self._rows)

    def enforce(self, max_fraction: float) -> None:
        """Refuses a view with too many broken rows.

        Raises:
            QuarantineError: with the reasons, how often each occurs, and where first.
        """
        if self.num_rows <= max_fraction * self._source.num_rows:
            return
        first: dict[str, int] = {}
        for reason, rows in zip(self._reasons, self._rows, strict=True):
            first[reason] = min(int(rows.min()), first.get(reason, int(rows.min())))
        reasons = [f"{reason}: {n:,} rows, first row {first[reason]:,}" for reason, n in self.counts.items()]
        raise QuarantineError(
            f"{self._source.place}: at most {max_fraction:.1%} of the rows may be broken, got {self.num_rows:,} of "
            f"{self._source.num_rows:,}\n  " + "\n  ".join(reasons),
            hint=self._time_hint()
            + "mend the source (rows count from 0, after the header), or raise max_quarantined_fraction",
        )

    def _time_hint(self) -> str:
        """For times that cannot be read, and those after 2200, as all are that are read in too coarse a unit."""
        is_late = any(reason.endswith("is not before 2200") for reason in self._reasons)
        is_none = any(reason.endswith("is not a time") for reason in self._reasons)
        times = "times are integers, or text such as 2020-09-13T12:26:40Z; " if is_none else ""
        return times + (f"check views.{self._source.view}.time_unit, " if is_late else "")

    def write(self, folder: Path) -> Path | None:
        """Writes the rows as they were to ``<view>.parquet``, with ``@reason`` and ``@source_row``, if any."""
        if not self._rows:
            return None
        source_rows = np.concatenate(self._rows)
        reason_of_row = np.repeat(np.arange(len(self._reasons)), [len(r) for r in self._rows])
        order = np.argsort(source_rows)
        table = self._source.rows(source_rows).with_columns(
            pl.Series(REASON, self._reasons, dtype=pl.String).gather(reason_of_row[order]).alias(REASON),
            pl.Series(SOURCE_ROW, source_rows[order]),
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._source.view}.parquet"
        pq.write_table(table.to_arrow(), path)
        return path


def code_of(problems: list[tuple[str, pl.Expr]]) -> pl.Expr:
    """The number of the first problem of a row, from 1; 0 if it has none."""
    found = [pl.when(is_broken).then(pl.lit(code, pl.UInt16)) for code, (_, is_broken) in enumerate(problems, start=1)]
    return pl.coalesce(*found, pl.lit(0, pl.UInt16))


def checked_blocks(
    source: Source, quarantine: Quarantine, problems: list[tuple[str, pl.Expr]], columns: Mapping[str, pl.Expr]
) -> Iterator[tuple[np.ndarray, pl.DataFrame]]:
    """Reads columns block by block and, at the end, sets aside the rows that have one of some problems.

    Args:
        source: the view.
        quarantine: its broken rows.
        problems: reasons, and expressions that are true where a row is broken; the first that holds counts.
        columns: what to read, by name.

    Yields:
        ``(n,)`` bool, the rows of the block that have no problem, and the columns of all of its rows.
    """
    wanted = {**columns, _CODE: code_of(problems)}
    broken: dict[int, list[np.ndarray]] = {}
    num_rows = 0
    for block in source.blocks(wanted):
        codes = block[_CODE].to_numpy()
        if codes.any():
            for code in np.unique(codes[codes > 0]).tolist():
                broken.setdefault(code, []).append(num_rows + np.flatnonzero(codes == code))
        num_rows += block.height
        yield codes == 0, block.drop(_CODE)
    for code, (reason, _) in enumerate(problems, start=1):
        if code in broken:
            quarantine.add(reason, np.concatenate(broken[code]))
