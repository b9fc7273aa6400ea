"""What was known at each append to a training set, for who looks at its rows afterwards.

Rows of the logs are numbered in the order in which they came: those of the build, then those of each append, within
either by the name of their file. A row of the build is of *generation* 0, one of the first append of generation 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.schema import UNKNOWN_ID, Dense, Feature
from recsys.training_set import TrainingSet


@dataclass(frozen=True)
class Appends:
    """The appends of a training set, the oldest first.

    Attributes:
        entries: as :func:`entry` made them, from the manifest.
    """

    entries: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, training_set: TrainingSet) -> Appends:
        """Those of a set; none if it was built at once."""
        return cls(training_set.manifest.get("appends", []))

    @property
    def files(self) -> dict[str, list[str]]:
        """The files of each log that came after the build, in the order in which they came."""
        return {log: [f for e in self.entries for f in e["files"][log]] for log in ("impressions", "events")}

    def generations(self, log: str, source_rows: np.ndarray) -> np.ndarray:
        """``(n,)`` int64: of some rows of a log."""
        first = [e["source_rows"].get(log, 0) for e in self.entries]
        return np.searchsorted(np.array(first, dtype=np.int64), source_rows, side="right")

    def knew_event(self, generation: int, source_row: int) -> bool:
        """Whether an event was there when the rows of a generation were written."""
        if generation >= len(self.entries):
            return True
        return source_row < int(self.entries[generation]["source_rows"].get("events", 0))

    def begin(self, generation: int) -> int:
        """UTC microseconds: earlier impressions of the generation were set aside."""
        return 0 if generation == 0 else int(self.entries[generation - 1]["not_before"])

    def as_encoded(self, feature: Feature, value: np.ndarray, generation: int) -> np.ndarray:
        """Ids as they were given when the rows of a generation were written: later ones were unknown."""
        if isinstance(feature, Dense) or generation >= len(self.entries):
            return value
        size = self.entries[generation]["table_sizes"][feature.table_name]
        return np.where(value >= size, UNKNOWN_ID, value)


def entry(old: TrainingSet, part: str, at: str, new_files: Mapping[str, set[str]], not_before: int) -> dict[str, Any]:
    """What the manifest keeps of an append.

    Args:
        old: the set before it.
        part: folder of its rows.
        at: when, as ISO 8601 text.
        new_files: of each log.
        not_before: UTC microseconds; earlier impressions were set aside.
    """
    return {
        "part": part,
        "at": at,
        "files": {log: sorted(files) for log, files in new_files.items()},
        "source_rows": dict(old.manifest["source_rows"]),
        "table_sizes": dict(old.encoder.table_sizes),
        "not_before": not_before,
    }
