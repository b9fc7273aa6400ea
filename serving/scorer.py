"""Scores: a batch to probabilities, a request to its candidates in order.

Shapes: R requests, N candidates (rows), T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from recsys.artifact import Artifact
from recsys.batch import Batch
from recsys.errors import RequestError
from recsys.manifest import Engine
from recsys.predictor import Predictor
from serving.assembler import Assembler
from serving.features import FeatureSource, NoFeatures, SnapshotFeatures
from serving.request import Key, RankRequest, RequestParser

_ONLINE = ("lmdb:", "redis://", "rediss://", "unix://")


@dataclass(frozen=True)
class Ranking:
    """A request's candidates, best first; equal scores keep the request's order.

    Attributes:
        task: what was ranked by.
        items: key of each candidate.
        scores: ``(N,)`` float64, probability of the task.
        order: ``(N,)`` int64, each candidate's place in the request.
        probabilities: ``(N, T)`` float64, of every task.
        num_unknown_candidates: candidates of which only the request knows anything.
        is_unknown_user: whether the same holds of the user.
        num_ignored_events: events of the request that are not before it.
    """

    task: str
    items: list[Key]
    scores: np.ndarray
    order: np.ndarray
    probabilities: np.ndarray
    num_unknown_candidates: int
    is_unknown_user: bool
    num_ignored_events: int


class Scorer:
    """An artifact that answers. Safe to call from several threads.

    It does not touch torch's number of threads: a service that answers many requests at once sets it to 1.

    Example:
        >>> scorer = Scorer.load("artifacts/din")  # doctest: +SKIP
        >>> scorer.rank({"user_id": 17, "candidates": [9, 4, 7]}).items  # doctest: +SKIP
        [4, 9, 7]

    Args:
        predictor: the model.
        features: what is known without being told.

    Attributes:
        artifact: what it scores with.
        predictor: the model.
        assembler: requests to batches.
        parser: JSON to requests.
    """

    def __init__(self, predictor: Predictor, features: FeatureSource) -> None:
        self.predictor = predictor
        self.artifact: Artifact = predictor.artifact
        self.assembler = Assembler(self.artifact.encoder, features)
        self.parser = RequestParser(self.artifact.schema, training_period=self.artifact.training_period)

    @classmethod
    def load(
        cls,
        artifact: str | Path,
        *,
        features: str | Path | None = None,
        engine: Engine = "auto",
        verify: bool = True,
    ) -> Self:
        """Loads an artifact and replays its recorded rows.

        Args:
            artifact: its folder.
            features: folder of stored features (see :class:`~serving.features.SnapshotFeatures`), or an online store:
                ``lmdb:PATH`` or ``redis://HOST:PORT/DB``; the artifact's own snapshot if not given.
            engine: see :class:`~recsys.predictor.Predictor`.
            verify: compare every file's checksum.

        Raises:
            ArtifactError: the artifact or the features cannot be used.
        """
        opened = Artifact.open(artifact, verify=verify)
        predictor = Predictor(opened, engine=engine)
        return cls(predictor, open_features(opened, features))

    def score(self, batch: Batch) -> np.ndarray:
        """Probabilities ``(N, T)``, float64. The one place where a logit becomes a probability."""
        return sigmoid(self.predictor.logits(batch))

    def rank(self, request: RankRequest | Mapping[str, Any] | bytes) -> Ranking:
        """Ranks the candidates of one request.

        Raises:
            RequestError: the request breaks a rule; every problem is named.
        """
        checked = request if isinstance(request, RankRequest) else self.parser.parse(request)
        position = self.artifact.task_position(checked.task)
        assembled = self.assembler.batch([checked])
        probabilities = self.score(assembled.batch)
        if not np.isfinite(probabilities).all():
            raise RequestError("raw values must be of the size that the model was trained on: a score is not a number")
        scores = probabilities[:, position]
        order = np.argsort(-scores, kind="stable")
        keys = checked.candidates
        return Ranking(
            task=self.artifact.tasks[position],
            items=[keys[i] for i in order.tolist()],
            scores=scores[order],
            order=order,
            probabilities=probabilities[order],
            num_unknown_candidates=int(np.count_nonzero(~assembled.is_known_item)),
            is_unknown_user=not bool(assembled.is_known_user[0]),
            num_ignored_events=assembled.num_ignored_events,
        )


def open_features(artifact: Artifact, folder: str | Path | None) -> FeatureSource:
    """The stored features in a folder or an online store, or the artifact's own, or none.

    Raises:
        ArtifactError: the features are not of the artifact's encoder.
        SourceError: there is no such LMDB store.
        UnavailableError: the online store does not answer.
    """
    if isinstance(folder, str) and folder.startswith(_ONLINE):
        from serving.online_features import OnlineFeatures

        return OnlineFeatures.open(folder, artifact.encoder)
    chosen = artifact.features_folder if folder is None else Path(folder)
    if chosen is None:
        return NoFeatures(artifact.encoder)
    features = SnapshotFeatures(chosen, artifact.encoder)
    features.warm()
    return features


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, in float64; exact in both tails."""
    x = logits.astype(np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)
