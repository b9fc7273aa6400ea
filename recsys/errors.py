"""Every error the platform raises on purpose.

::

    RecsysError
    ├── ConfigError              (ValueError)    a YAML file, an override or an option breaks a rule
    │   └── SchemaError                          the schema contradicts itself, or a model needs what it lacks
    ├── DataError                (ValueError)    user data breaks a rule
    │   ├── SourceError                          a file is missing, unreadable, or lacks a column or a type
    │   ├── EncodingError                        a value cannot be encoded as its feature declares
    │   └── QuarantineError                      more rows were set aside than the limit allows
    ├── IntegrityError           (RuntimeError)  a file that we wrote is incomplete, changed, or of another version
    │   ├── CheckpointError                      a checkpoint cannot be read or does not fit the run
    │   └── ArtifactError                        an artifact cannot be loaded, or does not fit its encoder
    ├── TrainingError            (RuntimeError)  training cannot go on: the loss is no longer finite
    ├── RequestError             (ValueError)    a ranking request breaks a rule (HTTP 422)
    ├── UnavailableError         (RuntimeError)  something outside this process does not answer (HTTP 503)
    └── MissingDependencyError   (ImportError)   an optional package is not installed

Messages read ``<field> must <rule>, got <value>``, then a blank line and ``Hint: <fix>`` where there is one. They
name the place (feature, file, row group) and never repeat a user's raw data.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecsysError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what rule was broken, where.
        hint: how to mend it; shown after a blank line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\n\nHint: {hint}")


class ConfigError(RecsysError, ValueError):
    """A YAML file, an override or an option breaks a rule."""


class SchemaError(ConfigError):
    """The schema contradicts itself, or lacks what a model needs."""


class DataError(RecsysError, ValueError):
    """User data breaks a rule."""


class SourceError(DataError):
    """A file is missing, unreadable, or lacks a column or a type."""


class EncodingError(DataError):
    """A value cannot be encoded as its feature declares."""


class QuarantineError(DataError):
    """More rows were set aside than the limit allows."""


class IntegrityError(RecsysError, RuntimeError):
    """A file that the platform wrote is incomplete, was changed, or is of another version."""


class CheckpointError(IntegrityError):
    """A checkpoint cannot be read or does not fit the run."""


class ArtifactError(IntegrityError):
    """An artifact cannot be loaded, or does not fit its encoder."""


class TrainingError(RecsysError, RuntimeError):
    """Training cannot go on: the loss is no longer finite."""


class RequestError(RecsysError, ValueError):
    """A ranking request breaks a rule."""


class UnavailableError(RecsysError, RuntimeError):
    """Something outside this process does not answer."""


class MissingDependencyError(RecsysError, ImportError):
    """An optional package is not installed."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Words a hint for an unknown name: the nearest known ones, else all of them.

    Names that differ in nothing but case are nearest, whatever share of the letters that is.

    Example:
        >>> nearest("clik", ["click", "purchase"])
        "did you mean 'click'?"
        >>> nearest("CLICK", ["click", "purchase"])
        "did you mean 'click'?"
        >>> nearest("window", ["click", "kind"])
        "known names: 'click', 'kind'"
        >>> nearest("zzz", ["click", "like"])
        "known names: 'click', 'like'"
    """
    known = sorted(candidates)
    alike = [k for k in known if k.casefold() == name.casefold()]
    close = alike or difflib.get_close_matches(name, known, n=3, cutoff=0.65)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return "there are none"
    shown = ", ".join(repr(k) for k in known[:12])
    return f"known names: {shown}" + (f" and {len(known) - 12} more" if len(known) > 12 else "")
