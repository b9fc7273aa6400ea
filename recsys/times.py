"""The bounds of times, UTC microseconds, alike for builds, stores and requests."""

from __future__ import annotations

EARLIEST = 631_152_000_000_000
"""1990-01-01. Times before it are taken for another unit's where nothing speaks for them."""

MAX_TIME = 7_258_118_400_000_000
"""2200-01-01. Times must lie before it."""
