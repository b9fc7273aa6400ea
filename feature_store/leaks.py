"""Whether a training set knows what it must not: rows recomputed, late events, features that tell too much."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from feature_store.build import DataConfig
from feature_store.files import locate
from feature_store.recompute import Difference, LateEvents, late_events, recompute_rows
from feature_store.single_feature import FeatureAuc, single_feature_aucs
from feature_store.views import view_format, view_paths
from recsys.config import fingerprint
from recsys.errors import IntegrityError
from recsys.schema import Schema
from recsys.training_set import TrainingSet

_REBUILD = "build it again with `recsys build CONFIG`"


@dataclass(frozen=True)
class LeakReport:
    """What was looked at, and what was found.

    Attributes:
        training_set: its folder.
        rows_recomputed: impressions that were recomputed from the views.
        differences: stored values that the views do not give.
        late: requests whose history reaches their own time.
        features: every feature's AUC by itself, the most telling first.
        max_auc: the limit of the latter.
    """

    training_set: str
    rows_recomputed: int
    differences: tuple[Difference, ...]
    late: tuple[LateEvents, ...]
    features: tuple[FeatureAuc, ...]
    max_auc: float

    @property
    def implausible(self) -> tuple[FeatureAuc, ...]:
        """Features that tell a task too well."""
        return tuple(f for f in self.features if f.is_implausible)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.differences or self.late or self.implausible)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them (NaN is left to the writer)."""
        return {**asdict(self), "is_clean": self.is_clean}


def check_leaks(
    data: DataConfig,
    *,
    schema: Schema | None = None,
    num_rows: int = 300,
    seed: int = 0,
    max_auc: float = 0.95,
    max_auc_rows: int = 1_000_000,
) -> LeakReport:
    """Checks a training set against the views that it was built from.

    Args:
        data: where both are.
        schema: what the views are said to hold, if that is known: it must be the set's.
        num_rows: impressions to recompute, over all splits.
        seed: of the samples.
        max_auc: a feature whose AUC by itself is clearly above it is implausible.
        max_auc_rows: rows read of a split for these.

    Raises:
        IntegrityError: the training set is broken, or its views or its schema have changed since.
        SourceError: the views cannot be read.
    """
    training_set = TrainingSet.open(data.training_set)
    if schema is not None and fingerprint(schema) != fingerprint(training_set.schema):
        raise IntegrityError(
            f"{data.training_set} must be of the experiment's schema, {schema.name!r}, but it was built with another",
            hint=_REBUILD,
        )
    _check_unchanged(training_set, data)
    num_recomputed, differences = recompute_rows(training_set, data, num_rows=num_rows, seed=seed)
    return LeakReport(
        training_set=data.training_set,
        rows_recomputed=num_recomputed,
        differences=tuple(differences),
        late=tuple(late_events(training_set)),
        features=tuple(single_feature_aucs(training_set, max_auc=max_auc, max_rows=max_auc_rows, seed=seed)),
        max_auc=max_auc,
    )


def _check_unchanged(training_set: TrainingSet, data: DataConfig) -> None:
    schema = training_set.schema
    files = [
        dict(located.identity)
        for view, pattern in view_paths(schema).items()
        for located in locate(view, data.views_root, pattern, view_format(schema, view))
    ]
    if files != training_set.manifest["inputs"]["files"]:
        raise IntegrityError(
            f"{data.training_set} must be of the views as they are, but files of {data.views} have changed since",
            hint=_REBUILD,
        )
