"""Training: an experiment file in, a run folder with checkpoints, metrics and a report out."""
