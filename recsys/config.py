"""Configuration: YAML in, one frozen object out, or one error that lists everything that is wrong.

YAML is data only. A file is complete by itself: there is no inheritance, no interpolation and no dotted path to a
class. The only override is ``--set a.b=c``, applied before validation, so that the whole is validated at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration object: strict types, frozen, unknown keys forbidden."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class InconsistentError(ValueError):
    """Several broken rules between fields, raised by a validator; :func:`validate` gives each a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain data: dates stay text (their meaning is the schema's), 1e-3 is a number; no repeated keys."""


_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.2's numbers with an exponent, which PyYAML takes for text where they have no point or no sign: 1e-3, 2.5e3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=deep)
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
        ConfigError: the file is missing or unreadable, is not UTF-8, is not YAML (with line and column), or is not a
            mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"there are no YAML files in {path.parent}"
        raise ConfigError(f"{path} does not exist", hint=hint) from err
    except IsADirectoryError as err:
        raise ConfigError(f"{path} must be a YAML file, got a folder") from err
    except OSError as err:
        raise ConfigError(f"{path} must be a file that can be read, got: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} must be UTF-8 text, got other bytes at offset {err.start}") from err
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Parses one YAML mapping from text; ``source`` names it in errors."""
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError(f"{place} must be valid YAML: {err.problem}") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"{source} must be valid YAML: {err}") from err
    if loaded is None:
        raise ConfigError(f"{source} must hold a mapping at its top, got nothing")
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} must hold a mapping at its top, got {type(loaded).__name__}")
    try:
        json.dumps(loaded)
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{source} must hold data of finite depth, got an alias of what it stands in") from err
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
            value = yaml.load(text, Loader=_Loader)
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


def override(path: str, value: str | float | bool) -> str:
    """An override that :func:`apply_overrides` reads as exactly this value, whatever characters it holds.

    Example:
        >>> apply_overrides({}, [override("data.views", "runs/a: b #1"), override("training.epochs", 3)])
        {'data': {'views': 'runs/a: b #1'}, 'training': {'epochs': 3}}
    """
    style = '"' if isinstance(value, str) else None
    text: str = yaml.safe_dump(value, default_style=style, width=float("inf"))
    end_of_document = "\n..."
    return f"{path}={text.rstrip().removesuffix(end_of_document)}"


def _step(node: Any, key: str, path: str, *, create: bool) -> Any:
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise ConfigError(f"--set {path} must be a position below {len(node)}, got {key!r}")
        return node[int(key)]
    if isinstance(node, dict):
        if create and node.get(key) is None:
            node[key] = {}
        return node.get(key)
    raise ConfigError(f"--set {path}: its parent must be a mapping or a list, got {type(node).__name__}")


def validate(cls: type[C], mapping: Mapping[str, Any], *, source: str) -> C:
    """Builds a config object, or raises one :class:`ConfigError` listing every violation with its path.

    Rules between fields are looked at once each field by itself is right.

    Args:
        source: names the mapping in the message, usually its file.
    """
    try:
        # Through JSON: strict mode then takes a list for a tuple and text for a literal, and nothing else changes type.
        return cls.model_validate_json(json.dumps(mapping))
    except ValidationError as err:
        lines: list[str] = []
        hints: list[str] = []
        for violation in _told_apart(err.errors(include_url=False)):
            found, hint = _describe(cls, violation)
            lines.extend(found)
            if hint and hint not in hints:
                hints.append(hint)
        raise ConfigError(
            f"{source}: {len(lines)} problem{'s' if len(lines) > 1 else ''}\n  " + "\n  ".join(lines),
            hint="; ".join(hints) or None,
        ) from err


def _told_apart(violations: Iterable[Any]) -> list[Any]:
    """Leaves out that a list is too short where pydantic says so only because it left out the broken items."""
    violations = list(violations)
    return [
        v
        for v in violations
        if v["type"] != "too_short" or not any(_is_inside(other["loc"], v["loc"]) for other in violations)
    ]


def _is_inside(location: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _describe(cls: type[BaseModel], violation: Any) -> tuple[list[str], str | None]:
    """Lines for a violation, mostly one, and a hint."""
    path = ".".join(_in_file(cls, violation["loc"]))
    kind, message, got = violation["type"], violation["msg"], violation.get("input")
    if kind == "missing":
        return [f"{path}: must be given"], None
    if kind == "extra_forbidden":
        known = _keys_at(cls, violation["loc"][:-1])
        hint = f"{path}: {nearest(str(violation['loc'][-1]), known)}" if known else None
        return [f"{path}: is not a known key"], hint
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = violation["ctx"]["discriminator"].strip("'")
        kind_path = f"{path}.{tag}" if path else tag
    if kind == "union_tag_invalid":
        context = violation["ctx"]
        known = [t.strip().strip("'") for t in str(context["expected_tags"]).split(",")]
        return [f"{kind_path}: {context['tag']!r} is not known"], f"{kind_path}: {nearest(str(context['tag']), known)}"
    if kind == "union_tag_not_found":
        return [f"{kind_path}: must be given"], None
    if kind == "value_error" and isinstance(violation["ctx"]["error"], InconsistentError):
        return [f"{path}: {line}" if path else line for line in violation["ctx"]["error"].problems], None
    if kind in ("too_short", "too_long"):
        context = violation["ctx"]
        bound = context["min_length"] if kind == "too_short" else context["max_length"]
        rule = f"at {'least' if kind == 'too_short' else 'most'} {bound} item{'' if bound == 1 else 's'}"
        return [f"{path}: must have {rule}, got {context['actual_length']}"], None
    message = message.removeprefix("Value error, ")
    message = re.sub(r"^(Input|String|Tuple|List|Dictionary|Set|Decimal|URL|Number) should", "must", message)
    message = _IN_YAML_WORDS.get(message, message)
    if not message.startswith("must"):
        message = message[0].lower() + message[1:]
    shown = f", got {json.dumps(got, ensure_ascii=False)}" if isinstance(got, str | int | float) or got is None else ""
    return [f"{path or '(top)'}: {message}{shown[:120]}"], _number_hint(kind, got)


_IN_YAML_WORDS = {
    "must be a valid array": "must be a list",
    "must be an object": "must be a mapping",
    "must be a valid string": "must be text",
    "must be a valid boolean": "must be true or false",
}


def _number_hint(kind: str, got: Any) -> str | None:
    if not isinstance(got, str) or not kind.startswith(("float", "int")):
        return None
    try:
        number = yaml.load(got, Loader=_Loader)
    except yaml.YAMLError:
        return None
    return f"write {got} without quotes" if type(number) in (int, float) else None


def _keys_at(cls: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the model class that a location points into; none if it points elsewhere."""
    annotation: Any = cls
    for part in location:
        annotation = _inside(annotation, part)
    members = _members(annotation)
    return list(members[0].model_fields) if len(members) == 1 and _is_model(members[0]) else []


def _in_file(cls: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that lead to a location in the file: pydantic's location also names the member of a union."""
    annotation: Any = cls
    path = []
    for part in location:
        if len(_members(annotation)) <= 1:
            path.append(str(part))
        annotation = _inside(annotation, part)
    return path


def _inside(annotation: Any, part: Any) -> Any:
    """The annotation one step along: to a field, a place in a list, a key of a dictionary, or the member of a union."""
    members = _members(annotation)
    if len(members) > 1:
        return next((m for m in members if _is_model(m) and part in _tags_of(m)), None)
    if len(members) == 0:
        return None
    if _is_model(members[0]):
        field = members[0].model_fields.get(str(part))
        return None if field is None else field.annotation
    origin, arguments = get_origin(members[0]), get_args(members[0])
    if origin is dict:
        return arguments[1]
    return arguments[0] if origin in (tuple, list) else None


def _members(annotation: Any) -> list[Any]:
    """What a value may be besides null; one thing if the annotation is no union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [m for argument in get_args(annotation) for m in _members(argument)]
    return [] if annotation in (None, NoneType) else [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tags_of(cls: type[BaseModel]) -> list[Any]:
    """What may tell a class from the others of its union: the values of fields that can have but one."""
    literals = (get_args(f.annotation) for f in cls.model_fields.values() if get_origin(f.annotation) is Literal)
    return [values[0] for values in literals if len(values) == 1]


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
