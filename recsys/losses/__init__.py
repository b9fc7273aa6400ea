"""Losses: pure functions of logits and labels. A missing label (NaN) takes no part."""

from recsys.losses.cross_entropy import LossSums, binary_cross_entropy, mean_binary_cross_entropy

__all__ = ["LossSums", "binary_cross_entropy", "mean_binary_cross_entropy"]
