"""An artifact as an MLflow model: data frame in, probabilities out, for MLflow's own tools.

The frame has the columns that :mod:`serving.frames` describes; only the user's and the item's are needed. The answer
has one column a task, rows in the order of the frame.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType
from mlflow.types import Schema as Columns
from mlflow.types.schema import AnyType

from recsys.artifact import Artifact
from recsys.errors import DataError
from recsys.schema import Dense
from recsys.training_set import open_table
from serving.frames import FrameReader, score_table
from serving.scorer import Scorer

ARTIFACT = "artifact"
"""Name of the artifact's folder among the MLflow model's artifacts."""

ENTRY = Path(__file__).with_name("mlflow_model.py")
"""What MLflow is given as ``python_model``."""

REQUIREMENTS = ("torch", "pyarrow", "numpy", "pandas", "pydantic", "pyyaml", "orjson", "mlflow")
"""Packages that scoring needs beside this project."""


class RankingPyfunc(PythonModel):
    """Scores data frames with an artifact."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None

    def load_context(self, context: Any) -> None:
        """Loads the artifact and replays its recorded rows.

        Raises:
            ArtifactError: it cannot be used.
        """
        self._scorer = Scorer.load(context.artifacts[ARTIFACT])

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow's signature
        model_input: pd.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Probability of each task, one row for each row of the frame.

        Args:
            context: not used.
            model_input: impressions, see :mod:`serving.frames`.
            params: ``batch_size``, rows scored at once.

        Raises:
            DataError: a column is missing or cannot be read.
        """
        assert self._scorer is not None
        return score_frame(self._scorer, model_input, batch_size=int((params or {}).get("batch_size", 4096)))


def score_frame(scorer: Scorer, frame: pd.DataFrame, *, batch_size: int = 4096) -> pd.DataFrame:
    """Probability of each task, with the frame's index.

    Args:
        frame: impressions, see :mod:`serving.frames`.
        batch_size: rows scored at once, about.

    Raises:
        DataError: a column is missing or cannot be read.
    """
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
        raise DataError(f"frame must have columns of one type each: {str(err).splitlines()[0]}") from err
    reader = FrameReader(scorer.artifact.schema)
    scores = score_table(scorer, table, reader, source="frame", batch_size=batch_size)
    return pd.DataFrame(scores.probabilities, columns=list(scorer.artifact.tasks), index=frame.index)


def signature(artifact: Artifact) -> ModelSignature:
    """Columns that an artifact reads and gives; of the first, only the user's and the item's key must be there."""
    schema = artifact.schema
    shown = schema.views.impressions
    columns: dict[str, ColSpec] = {}

    def add(name: str, kind: Any, *, required: bool = False) -> None:
        columns.setdefault(name, ColSpec(kind, name, required=required))

    add(shown.user, AnyType(), required=True)
    add(shown.item, AnyType(), required=True)
    add(shown.time, AnyType())
    if shown.request is not None:
        add(shown.request, AnyType())
    for feature in schema.features:
        add(feature.source_column, DataType.double if _is_number(feature) else AnyType())
    for history in schema.histories:
        add(f"{history.name}.{shown.item}", AnyType())
        add(f"{history.name}.time", AnyType())
        for event_feature in history.event_features:
            add(f"{history.name}.{event_feature.source_column}", AnyType())
    return ModelSignature(
        inputs=Columns(list(columns.values())),
        outputs=Columns([ColSpec(DataType.double, task) for task in artifact.tasks]),
    )


def _is_number(feature: Any) -> bool:
    return isinstance(feature, Dense) and feature.dim == 1


def input_example(artifact: Artifact) -> pd.DataFrame | None:
    """Two candidates of one user, from the artifact's snapshot; None where it has none."""
    folder = artifact.features_folder
    if folder is None:
        return None
    keys = open_table(folder / "items.arrow").keys
    assert keys is not None
    items = keys.slice(1, 2).to_pylist()
    if not items:
        return None
    users: list[Any] = [None]
    if (folder / "users.arrow").is_file():
        user_keys = open_table(folder / "users.arrow").keys
        users = (user_keys.slice(1, 1).to_pylist() if user_keys is not None else []) or [None]
    shown = artifact.schema.views.impressions
    return pd.DataFrame({shown.user: users * len(items), shown.item: items, shown.time: 1_767_225_600_000_000})


def requirements() -> list[str]:
    """What pip must install for the model to load elsewhere, with the versions of this environment."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS]
