"""The online store: encoded features by key, for serving. Reads need neither Polars nor torch."""
