"""The feature store: from logs to a training set, and from a training set to online features."""
