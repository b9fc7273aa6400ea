"""Losses: pure functions of logits and labels, or of vectors. A missing label (NaN) takes no part."""

from recsys.losses.contrastive import Similarity, contrastive_loss
from recsys.losses.cross_entropy import LossSums, binary_cross_entropy, mean_binary_cross_entropy

__all__ = ["LossSums", "Similarity", "binary_cross_entropy", "contrastive_loss", "mean_binary_cross_entropy"]
