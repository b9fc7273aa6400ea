"""What derived values carry to the next append, found again from all files that a training set was built from.

An append needs it where the set carries nothing, for it was built before sets did; where users or items that an
attribute had put in one group are in several now; and where a column that an expression reads held integers so far,
and holds fractions now. The files of the build and of each append are read one generation after the other
(:mod:`feature_store.appended`): that is as much work as a build.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from feature_store.appended import Appends
from feature_store.build import DataConfig
from feature_store.carried import Carried
from feature_store.derived import Computation, read_as_before, value_kinds
from feature_store.joined import Joined
from feature_store.views import Views
from recsys.schema import Schema
from recsys.training_set import TrainingSet


def replayed(
    old: TrainingSet,
    schema: Schema,
    data: DataConfig,
    *,
    newest: int,
    staging: Path,
    as_numbers: Mapping[str, Collection[str]],
) -> Carried:
    """What a set carries to its next append.

    Args:
        old: the set.
        schema: what it was built with.
        data: where its files are.
        newest: UTC microseconds; requests to come are not earlier.
        staging: folder for what is not kept.
        as_numbers: by log, columns whose integers count as fractions.

    Raises:
        QuarantineError: too many rows are broken.
        SourceError: a file cannot be read any more, or does not fit the others.
    """
    appends = Appends.of(old)
    later = appends.files
    files: dict[str, list[str]] = {view: [] for view in ("impressions", "events", "users", "items")}
    for file in old.manifest["inputs"]["files"]:
        files.setdefault(str(file["view"]), []).append(str(file["file"]))
    first = {log: [name for name in files[log] if name not in later[log]] for log in later}
    entities = {view: files[view] for view in ("users", "items")}

    def opened(logs: Mapping[str, Collection[str]], name: str) -> Views:
        return Views(
            schema,
            data.views_root,
            staging=staging / name,
            max_quarantined_fraction=data.max_quarantined_fraction,
            only={view: names for view, names in {**entities, **logs}.items() if names},
        )

    kinds = value_kinds(opened({log: files[log] for log in later}, "all"))
    for log, columns in as_numbers.items():
        kinds.setdefault(log, {}).update(dict.fromkeys(columns, "number"))
    carried: Carried | None = None
    for generation, new in enumerate([first, *(entry["files"] for entry in appends.entries)]):
        views = opened(new, f"{generation:05d}")
        read_as_before(views, kinds)
        joined = Joined.join(
            views,
            lambda _: None,
            not_before=appends.begin(generation) if generation else None,
            known={"user": old.users, "item": old.items},
            is_derived=False,
        )
        carried = Computation(joined, carried).carry(newest)
    assert carried is not None
    return carried
