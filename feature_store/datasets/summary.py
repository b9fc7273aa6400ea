"""What a data set loader reports about its work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from feature_store.datasets.negatives import NegativeSampling

Progress = Callable[[int, int], None]
"""Called with the amount of work done and the whole amount."""


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """What a loader read, wrote and found.

    Attributes:
        name: the data set's name in the registry.
        rows_read: raw file name -> rows read from it.
        rows_written: view (impressions, events, users, items) -> rows written.
        repeats_dropped: impressions dropped because an exact copy was kept.
        findings: what was odd in the raw files, in words -> how many rows, users or items it concerns. Nothing listed
            here was dropped unless the words say so.
        num_events_by_type: event type -> rows, empty where events have no type.
        split: the documented split, as ``data.split`` of an experiment takes it; empty where the set has none.
        sampling: how negatives were drawn, and how many; empty where the set has impressions of its own.
    """

    name: str
    rows_read: Mapping[str, int]
    rows_written: Mapping[str, int]
    repeats_dropped: int
    findings: Mapping[str, int]
    num_events_by_type: Mapping[str, int] = dataclasses.field(default_factory=dict)
    split: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in ``dataset.json`` beside the views."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A public data set that the platform can read in its original files.

    Attributes:
        name: what the command line calls it.
        description: one line, for a listing.
        source: where a user gets the raw files.
        licence: what the files may be used for.
        raw_files: what the raw folder must hold.
        schema_file: the schema of the views, relative to the project's root.
        load: ``load(raw_dir, output_dir, progress=None)`` reads the raw files and writes the views.
        sampling: how negatives are drawn unless told otherwise; None for a set with impressions.
        load_sampled: ``load`` with how to draw negatives as its last argument; None for a set with impressions.
    """

    name: str
    description: str
    source: str
    licence: str
    raw_files: tuple[str, ...]
    schema_file: str
    load: Callable[[Path, Path, Progress | None], DatasetSummary]
    sampling: NegativeSampling | None = None
    load_sampled: Callable[[Path, Path, Progress | None, NegativeSampling], DatasetSummary] | None = None
