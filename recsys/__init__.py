"""A ranking platform: requests with many candidates, histories by reference, one path from logs to a served score."""

__version__ = "0.1.0"
