"""The summary holds each metric of the labelled rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recsys.errors import DataError
from recsys.metrics import auc, ece, evaluate_scores, gauc, logloss, normalised_entropy
from recsys.metrics.summary import sigmoid

GENERATOR = np.random.default_rng(5)
LOGITS = GENERATOR.normal(size=400)
LABELS = np.where(GENERATOR.random(400) < 0.1, np.nan, GENERATOR.random(400) < 1 / (1 + np.exp(-LOGITS)))
GROUPS = GENERATOR.integers(0, 30, 400)


def test_every_entry_is_its_own_metric() -> None:
    p, present = 1 / (1 + np.exp(-LOGITS)), ~np.isnan(LABELS)
    got = evaluate_scores(LABELS, probabilities=p, groups=GROUPS)
    grouped = gauc(LABELS, p, GROUPS)
    assert got.auc == auc(LABELS, p)
    assert (got.gauc, got.gauc_users) == (grouped.value, grouped.num_groups_used)
    assert got.logloss == logloss(LABELS, p)
    assert got.ne == normalised_entropy(LABELS, p)
    assert got.ece == ece(LABELS, p)
    assert (got.num_rows, got.num_positives) == (present.sum(), np.nansum(LABELS))


def test_logits_and_their_probabilities_agree() -> None:
    by_logits = evaluate_scores(LABELS, logits=LOGITS, groups=GROUPS)
    by_probability = evaluate_scores(LABELS, probabilities=1 / (1 + np.exp(-LOGITS)), groups=GROUPS)
    for name in ("auc", "gauc", "logloss", "ne", "ece"):
        assert getattr(by_logits, name) == pytest.approx(getattr(by_probability, name), abs=1e-12)


def test_logits_keep_their_order_where_the_sigmoid_saturates() -> None:
    assert evaluate_scores([1, 0], logits=[60.0, 50.0]).auc == 1.0
    assert evaluate_scores([0, 1], logits=[60.0, 50.0]).logloss == pytest.approx(30.0, abs=1e-9)


def test_nothing_labelled_is_nothing_known() -> None:
    got = evaluate_scores([math.nan], logits=[0.3], groups=[1])
    assert (got.num_rows, got.num_positives, got.gauc_users) == (0, 0, 0)
    assert all(math.isnan(v) for v in (got.auc, got.gauc, got.logloss, got.ne, got.ece))


def test_without_groups_there_is_no_gauc() -> None:
    got = evaluate_scores(LABELS, logits=LOGITS)
    assert math.isnan(got.gauc)
    assert got.gauc_users == 0


def test_one_kind_of_score_must_be_given() -> None:
    with pytest.raises(DataError, match="exactly one of logits and probabilities"):
        evaluate_scores([1, 0])
    with pytest.raises(DataError, match="exactly one of logits and probabilities"):
        evaluate_scores([1, 0], logits=[0.0, 0.0], probabilities=[0.5, 0.5])


def test_the_sigmoid_does_not_overflow() -> None:
    with np.errstate(over="raise"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
