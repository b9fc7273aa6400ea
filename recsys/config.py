"""Configuration: YAML in, one frozen object out, or one error that lists everything that is wrong.

YAML is data only. A file is complete by itself: there is no inheritance, no interpolation and no dotted path to a class. The
only override is ``--set a.b=c``, applied before validation, so that the whole is validated at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration object: strict types, frozen, unknown keys forbidden."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps dates as text (their meaning is the schema's) and refuses repeated keys."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=deep)  # type: ignore[no-untyped-call]
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"key {key!r} must be text: quote it", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads one YAML mapping.

    Raises:
        ConfigError: the file is missing, is not UTF-8, is not YAML (with line and column), or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path} does not exist", hint=nearest(path.name, siblings)) from err
    except IsADirectoryError as err:
        raise ConfigError(f"{path} must be a YAML file, got a folder") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} must be UTF-8 text, got other bytes at offset {err.start}") from err
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Parses one YAML mapping from text; ``source`` names it in errors."""
    try:
        loaded = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{place} must be valid YAML: {err.problem}") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"{source} must be valid YAML: {err}") from err
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} must hold a mapping at its top, got {type(loaded).__name__}")
    return loaded


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies ``a.b=c`` overrides; ``c`` is read as YAML, a number between dots indexes a list.

    Example:
        >>> apply_overrides({"training": {"epochs": 3}}, ["training.epochs=1"])
        {'training': {'epochs': 1}}

    Raises:
        ConfigError: an override has no ``=`` or no name, or walks through something that is not a mapping or list.
    """
    result: dict[str, Any] = json.loads(json.dumps(mapping))
    for override in overrides:
        path, separator, text = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"--set must read a.b=c, got {override!r}")
        try:
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError as err:
            raise ConfigError(f"--set {path}= must be followed by a YAML value") from err
        node: Any = result
        for depth, key in enumerate(keys[:-1]):
            node = _step(node, key, ".".join(keys[: depth + 1]), create=True)
        if isinstance(node, list):
            _step(node, keys[-1], path, create=False)
            node[int(keys[-1])] = value
        elif isinstance(node, dict):
            node[keys[-1]] = value
        else:
            raise ConfigError(f"--set {path}: {'.'.join(keys[:-1])} must be a mapping or a list")
    return result


def _step(node: Any, key: str, path: str, *, create: bool) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ConfigError(f"--set {path} must be a position below {len(node)}, got {key!r}")
        return node[int(key)]
    if isinstance(node, dict):
        if create and node.get(key) is None:
            node[key] = {}
        return node.get(key)
    raise ConfigError(f"--set {path}: its parent must be a mapping or a list, got {type(node).__name__}")


def validate(cls: type[C], mapping: Mapping[str, Any], *, source: str) -> C:
    """Builds a config object, or raises one :class:`ConfigError` listing every violation with its path.

    Args:
        source: names the mapping in the message, usually its file.
    """
    try:
        # Through JSON: strict mode then takes a list for a tuple and text for a literal, and nothing else changes type.
        return cls.model_validate_json(json.dumps(mapping))
    except ValidationError as err:
        lines, hints = [], []
        for violation in err.errors(include_url=False):
            line, hint = _describe(cls, violation)
            lines.append(line)
            if hint and hint not in hints:
                hints.append(hint)
        raise ConfigError(
            f"{source}: {len(lines)} problem{'s' if len(lines) > 1 else ''}\n  " + "\n  ".join(lines),
            hint="; ".join(hints) or None,
        ) from err


def _describe(cls: type[BaseModel], violation: Any) -> tuple[str, str | None]:
    path = ".".join(str(part) for part in violation["loc"]) or "(top)"
    kind, message, got = violation["type"], violation["msg"], violation.get("input")
    hint = None
    if kind == "missing":
        return f"{path}: must be given", None
    if kind == "extra_forbidden":
        known = _keys_at(cls, violation["loc"][:-1])
        return f"{path}: is not a known key", f"{path}: {nearest(str(violation['loc'][-1]), known)}" if known else None
    if kind.endswith("union_tag_invalid"):
        context = violation["ctx"]
        known_tags = [t.strip().strip("'") for t in str(context["expected_tags"]).split(",")]
        return f"{path}.kind: {context['tag']!r} is not known", f"{path}.kind: {nearest(str(context['tag']), known_tags)}"
    if kind.endswith("union_tag_not_found"):
        return f"{path}.kind: must be given", None
    message = message.removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if not message.startswith("must"):
        message = message[0].lower() + message[1:]
    if isinstance(got, str) and kind.startswith(("float", "int")):
        try:
            number = float(got)
        except ValueError:
            pass
        else:
            mantissa = got.lower()
            hint = f"YAML reads {got} as text: write {_yaml_number(mantissa, number)}"
    shown = f", got {json.dumps(got)}" if isinstance(got, (str, int, float, bool)) or got is None else ""
    return f"{path}: {message}{shown[:120]}", hint


def _yaml_number(text: str, number: float) -> str:
    if "e" in text:
        mantissa, exponent = text.split("e")
        sign = exponent if exponent[:1] in "+-" else f"+{exponent}"
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}"
    return repr(number) if not number.is_integer() else f"{number:g}"


def _keys_at(cls: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the model class that a location points into; unions yield the chosen class."""
    current: Any = cls
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            options = [c for c in _classes_in(current) if _tag_of(c) == part]
            current = options[0] if options else current
            continue
        field = current.model_fields.get(str(part))
        if field is None:
            return []
        current = field.annotation
        inner = _classes_in(current)
        current = inner[0] if len(inner) == 1 else current
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for argument in getattr(annotation, "__args__", ()) for c in _classes_in(argument)]


def _tag_of(cls: type[BaseModel]) -> str | None:
    kind = cls.model_fields.get("kind")
    return None if kind is None else kind.default


def canonical_json(config: Config | Mapping[str, Any]) -> str:
    """Sorted, compact JSON: equal configs give equal text."""
    plain = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(config: Config | Mapping[str, Any]) -> str:
    """sha256 of :func:`canonical_json`, in hexadecimal.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()
