"""Exact metrics over a whole set: numpy in, plain numbers out. None is ever averaged over batches.

Every function drops rows whose label is missing (NaN), refuses labels other than 0 and 1 and scores that are NaN, and
returns NaN where the metric is not defined (one class only, no rows): never a made-up 0.5 or 0.
"""

from recsys.metrics.calibration import (
    Reliability,
    ece,
    logloss,
    logloss_from_logits,
    normalised_entropy,
    reliability,
    reliability_by_quantile,
)
from recsys.metrics.ranking import Gauc, GroupMean, auc, gauc, mrr, ndcg_at_k, rela_impr
from recsys.metrics.summary import Metrics, evaluate_scores

__all__ = [
    "Gauc",
    "GroupMean",
    "Metrics",
    "Reliability",
    "auc",
    "ece",
    "evaluate_scores",
    "gauc",
    "logloss",
    "logloss_from_logits",
    "mrr",
    "ndcg_at_k",
    "normalised_entropy",
    "rela_impr",
    "reliability",
    "reliability_by_quantile",
]
