"""A schema proposed from profiles: a first guess that builds as it is, with the reason of every guess beside it.

Views are told by the names of files and folders, roles by the names of columns, everything else by what columns hold.
What cannot be told is asked for, never assumed: which column is the user, the item, the time, the label. A column that
seems to be known only after the impression (another outcome, a watch time) becomes a task or is left out, with a
comment; so does free text, and what holds one value only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl

from feature_store.files import is_address
from feature_store.formats import format_of
from feature_store.profile import ColumnProfile, ViewProfile, moment_of, opened_view, profile_view
from feature_store.sources import kind_of, words_of
from recsys.config import validate
from recsys.errors import ConfigError, SourceError, nearest
from recsys.schema import FormatSpec, Schema

VIEWS = ("impressions", "events", "users", "items")
_VIEW_NAMES = {
    "users": r"user|member|customer|visitor",
    "items": r"item|movie|video|product|^ads?$|article|book|good|catalog",
    "events": r"event|behavio|action|history|play",
    "impressions": r"impression|exposure|train|rating|interaction|sample|click|log|view|review",
}
_USER = r"^(user|uid|member|customer|visitor|account|reviewer|viewer|cookie)"
_ITEM = (
    r"^(item|iid|movie|video|product|ad|asin|article|sku|book|song|track|creative|photo|doc|news|good|listing)s?"
    r"(_?id|_?no|_?key)?$"
)
_TIME = r"(time|timestamp|_ts$|^ts$|date|^day$|second|_at$)"
_REQUEST = r"^(request|session|impression|query|list|search|page_?view)"
_LABEL = (
    r"^(label|target|y|is_?click(ed)?|click(ed|s)?|is_.*|like(d|s)?|purchase(d)?|buy|bought|convert(ed)?|conversion|"
    r"ctr|cvr|follow(ed)?|share(d)?|comment(ed)?|long_view|long_watch)$"
)
_RATING = r"^(rating|score|stars?|overall|grade)s?$"
_AFTER = r"(play_?time|watch_?time|watched|dwell|stay|duration_ms$|revenue|_after$|outcome|view_time|comment_stay)"
_CODES = (
    r"^(id|code|key|type|kind|category|categorie|cat|cate|subcategory|brand|zip|postcode|postal|group|level|"
    r"tab|class|classe|feat|position|rank|city|citie|country|countrie|region|state|province|district|area|"
    r"county|location|geo|gender|sex|device|os|browser|platform|carrier|network|isp|channel|source|medium|"
    r"lang|language|locale|genre|author|artist|publisher|seller|shop|store|merchant|vendor|campaign|"
    r"advertiser|segment|cluster|bucket|color|colour|occupation|job|profession|education|status|flag|"
    r"model|version|slot|placement|page|site|domain|app|topic|tag|theme|series|creative|layout)s?$"
)
"""Last words of the names of integers that name things."""
_AMOUNTS = (
    r"^(age|price|cost|amount|fee|salary|income|budget|discount|counts?|cnt|total|sum|num|avg|mean|"
    r"median|max|min|rate|ratio|score|length|len|size|width|height|depth|weight|duration|distance|days|"
    r"hours|minutes|seconds|months|years|weeks|ms|views|clicks|likes|shares|comments|follows|followers|"
    r"fans|plays|purchases|orders|sales|visits|impressions|quantity|qty|stock|balance|points)$"
)
"""Last words of the names of integers that are more or less."""
_COUNTED = r"^(num|n|nr|count|cnt|total|sum|avg|mean|max|min)$"
"""First words of such names."""
_FEW = 50
"""Integers with so many values at most are categories whatever their number of rows."""
_SOME = 1000
"""With so many, they are where each value stands in a hundred rows on average."""
_ROWS_OF_A_VALUE = 100
_NAME = re.compile(r"[^A-Za-z0-9_]+")
_PLAIN = re.compile(r"^[A-Za-z_][A-Za-z0-9_./*-]*$")
_WORDS_OF_YAML = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_MANY = 100_000
_FREE_TEXT = 25.0
_SPLIT = (0.8, 0.9)


@dataclass(frozen=True)
class Roles:
    """Columns of the impressions that a user has named; the others are guessed.

    Attributes:
        user: key of the user.
        item: key of the item.
        time: of the impression.
        label: of the task.
        request: what groups impressions.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    label: str | None = None
    request: str | None = None


@dataclass
class Proposal:
    """What was found, and a schema over it.

    Attributes:
        root: folder or address that paths in the schema are relative to.
        name: of the schema.
        profiles: by view.
        mapping: the schema, as YAML gives it.
        comments: why, by place: ``view.column`` of what is left out, ``features.name``, or the name of a section.
        span: first and last time of the impressions, UTC microseconds.
        cuts: times at which four fifths, then nine tenths of the impressions are past.
    """

    root: str
    name: str
    profiles: dict[str, ViewProfile]
    mapping: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)
    span: tuple[int, int] = (0, 0)
    cuts: tuple[int, int] = (0, 0)

    @property
    def split(self) -> dict[str, str]:
        """Periods of training, validation and test: 80, 10 and 10 per cent of the impressions.

        Raises:
            SourceError: the impressions do not span enough different times.
        """
        ends = (*self.cuts, self.span[1] + 1)
        if not self.span[0] < ends[0] < ends[1] < ends[2]:
            raise SourceError(f"{self.root}: impressions must have different times to be split, got too few")
        return {
            key: datetime.fromtimestamp(end // 10**6, UTC).replace(microsecond=end % 10**6).isoformat()
            for key, end in zip(("train_end", "validation_end", "test_end"), ends, strict=True)
        }

    def schema_yaml(self) -> str:
        """The schema as YAML, with comments."""
        return "\n".join(_schema_lines(self)) + "\n"

    def experiment_yaml(self, schema_file: str, training_set: str) -> str:
        """An experiment over the schema, as ``recsys build`` takes it."""
        views = self.root if is_address(self.root) else str(Path(self.root).resolve())
        lines = [
            f"# Proposed by `recsys data inspect`: builds {self.name} as it is.",
            f"name: {_flow(self.name)}",
            f"schema_file: {_flow(schema_file)}",
            "data:",
            f"  views: {_flow(views)}",
            f"  training_set: {_flow(training_set)}",
            f"  split: {_flow(self.split)}",
            "model: {kind: din}",
        ]
        return "\n".join(lines) + "\n"


def propose(path: str | Path, *, roles: Roles = Roles(), declared: FormatSpec | None = None) -> Proposal:
    """Profiles a folder of views, or one log, and proposes a schema.

    Args:
        path: a file, a folder of views (told by their names), a folder of parts, or an fsspec address.
        roles: what is known of the columns.
        declared: format of all files; found out if None.

    Raises:
        SourceError: nothing can be read there.
        ConfigError: a role cannot be told from the columns.
    """
    if not str(path):
        raise ConfigError("PATH must name a file, a folder or an address, got nothing")
    root, patterns = _patterns(path, declared)
    profiles = {view: profile_view(root, pattern, declared) for view, pattern in patterns.items()}
    for profile in profiles.values():
        if profile.num_rows == 0:
            raise SourceError(f"{profile.path} must hold rows, got none: they tell what its columns are")
    name = _identifier(Path(str(path).rstrip("/")).name.split(".")[0] or "proposed")
    comments: dict[str, str] = {}
    views, tasks = _views(root, profiles, roles, comments)
    features = list(_features(profiles, views, tasks, comments))
    mapping: dict[str, Any] = {"name": name, "views": views, "features": features}
    mapping["histories"] = _histories(root, profiles, views, features, tasks, comments)
    mapping["tasks"] = tasks
    mapping = {key: value for key, value in mapping.items() if value}
    validate(Schema, mapping, source="proposed schema")
    proposal = Proposal(str(root), name, profiles, mapping, comments)
    proposal.span, proposal.cuts = _times(root, profiles["impressions"], views["impressions"])
    return proposal


def _patterns(path: str | Path, declared: FormatSpec | None) -> tuple[str | Path, dict[str, str]]:
    """The folder of views, and the path of each in it."""
    if is_address(path):
        root, _, name = str(path).rstrip("/").rpartition("/")
        return root, {"impressions": name}
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise SourceError(f"{path} must exist, but is a link to nothing")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SourceError(f"{path} must exist", hint=nearest(path.name, beside) if beside else None)
    if path.is_file():
        return path.parent, {"impressions": path.name}
    found: dict[str, str] = {}
    entries = [p for p in sorted(path.iterdir()) if not p.name.startswith((".", "_"))]
    entries = [
        p for p in entries if p.is_dir() or declared is not None or format_of(p.name) or p.suffix in (".dat", ".txt")
    ]
    for view in VIEWS:  # exact names first: `impressions.parquet` beside `log.csv`
        named = [p.name for p in entries if p.name.split(".")[0].lower() == view]
        found |= dict.fromkeys([view], named[0]) if named else {}
    for view, pattern in _VIEW_NAMES.items():
        for entry in entries:
            if view not in found and entry.name not in found.values() and re.search(pattern, entry.name.lower()):
                found[view] = entry.name
    if "impressions" not in found and found.keys() <= {"events"}:
        return path.parent, {"impressions": path.name}  # parts of one log
    if "impressions" not in found:
        found["impressions"] = found.pop("events", "") or ""
    if not found["impressions"]:
        raise SourceError(
            f"{path} must hold impressions, got {', '.join(sorted(found.values()))}",
            hint="name the file or folder of the log impressions.*, or give the path of the log itself",
        )
    return path, {view: found[view] for view in VIEWS if view in found}


def _pick(profile: ViewProfile, given: str | None, pattern: str, role: str) -> str:
    columns = profile.columns
    if given is not None:
        if given not in columns:
            raise ConfigError(
                f"--{role} must be a column of {profile.path}, got {given!r}", hint=nearest(given, columns)
            )
        return given
    named = found = [name for name in columns if re.search(pattern, name.strip().lower())]
    if role == "time":
        found = [n for n in found if _is_time(columns[n])] or [n for n in columns if _is_time(columns[n])]
    keys = [n for n in found if columns[n].kind in ("integer", "text")] if role in ("user", "item") else found
    exact = [n for n in keys if re.search(r"(^|_)(id|key)$|^(user|item|time|timestamp)$", n.strip().lower())]
    chosen = (exact or keys)[:1]
    if not chosen:
        held = [f"column {n!r} holds {words_of(columns[n].kind)}" for n in named]  # type: ignore[arg-type]
        wanted = "times, or integers that can be times" if role == "time" else "integers or text"
        raise ConfigError(
            f"{profile.path}: no column looks like the {role}: --{role} must name one",
            hint=f"{', '.join(held)}, not {wanted}" if held else f"columns: {', '.join(columns)}",
        )
    return chosen[0]


def _is_time(column: ColumnProfile) -> bool:
    return column.kind in ("timestamp", "local") or (column.kind == "integer" and column.time_unit is not None)


def _views(
    root: str | Path, profiles: Mapping[str, ViewProfile], roles: Roles, comments: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    log = profiles["impressions"]
    user, item = _pick(log, roles.user, _USER, "user"), _pick(log, roles.item, _ITEM, "item")
    time = _pick(log, roles.time, _TIME, "time")
    views: dict[str, Any] = {"impressions": _log_view(log, user, item, time, comments, "impressions")}
    request = roles.request or next(
        (n for n in log.columns if re.search(_REQUEST, n.lower()) and n not in (user, item, time)), None
    )
    if request is not None and _is_request(root, log, request, user):
        views["impressions"]["request"] = request
    if "events" in profiles:
        events = profiles["events"]
        place = {r: _same_or_pick(events, c, p, r) for r, c, p in _roles_of(user, item, time)}
        views["events"] = _log_view(events, place["user"], place["item"], place["time"], comments, "events")
        kind = next(
            (n for n in events.columns if re.search(r"^(event_?)?(type|action|behaviou?r(_type)?)$", n.lower())), None
        )
        if kind is not None and events.columns[kind].kind in ("text", "integer"):
            views["events"]["type"] = kind
    for view, key, pattern in (("users", user, _USER), ("items", item, _ITEM)):
        if view in profiles:
            profile = profiles[view]
            own = _same_or_pick(profile, key, pattern, view[:-1])
            views[view] = {"path": profile.path, "key": own} | _format(profile)
            repeated = profile.num_rows - profile.columns[own].num_null - (profile.columns[own].distinct or 0)
            if repeated > 0:
                comments[f"views.{view}"] = f"{repeated:,} rows repeat a key: the first of each counts"
    negative = [p.path for v, p in profiles.items() for c in _keys(views[v]) if (p.columns[c].lowest or 0) < 0]
    if negative:
        views["negative_keys"] = "keep"
        comments["views.negative_keys"] = f"{negative[0]} has negative keys; remove the line if they stand for nobody"
    return views, _tasks(log, roles, {user, item, time, request}, comments)


def _roles_of(user: str, item: str, time: str) -> Iterable[tuple[str, str, str]]:
    return (("user", user, _USER), ("item", item, _ITEM), ("time", time, _TIME))


def _keys(view: Mapping[str, Any]) -> list[str]:
    return [view[key] for key in ("user", "item", "key") if key in view]


def _same_or_pick(profile: ViewProfile, name: str, pattern: str, role: str) -> str:
    return name if name in profile.columns else _pick(profile, None, pattern, role)


def _format(profile: ViewProfile) -> dict[str, Any]:
    if profile.format is None:
        return {}
    declared = profile.format.model_dump(mode="json", exclude_defaults=True)
    return {"format": {"kind": profile.format.kind, **declared}}


def _log_view(
    profile: ViewProfile, user: str, item: str, time: str, comments: dict[str, str], view: str
) -> dict[str, Any]:
    column = profile.columns[time]
    found: dict[str, Any] = {"path": profile.path, "user": user, "item": item, "time": time}
    if column.kind == "integer":
        found["time_unit"] = column.time_unit or "s"
        found_unit = f"integers between {column.lowest} and {column.highest}"
        comments[f"views.{view}"] = f"time: {found_unit}, read as {found['time_unit']} since 1970, UTC"
    elif column.kind == "local":
        found["time_zone"] = "UTC"
        comments[f"views.{view}"] = "time: without a zone or offset; UTC is a guess, write the zone of the clock"
    return found | _format(profile)


def _is_request(root: str | Path, log: ViewProfile, request: str, user: str) -> bool:
    """Whether a column groups rows, each group of one user."""
    column = log.columns[request]
    if column.kind not in ("integer", "text") or column.num_null or column.distinct == log.num_rows:
        return False
    with opened_view(root, log.path, log.format) as (frame, _, _, _):
        users = frame.group_by(request).agg(pl.col(user).n_unique().alias("users"))
        return int(users.select((pl.col("users") > 1).sum()).collect(engine="streaming").item()) == 0


def _tasks(log: ViewProfile, roles: Roles, taken: set[str | None], comments: dict[str, str]) -> list[dict[str, Any]]:
    columns = {name: c for name, c in log.columns.items() if name not in taken}
    binary = [name for name, c in columns.items() if _is_binary(c)]
    if roles.label is not None:
        if roles.label not in log.columns:
            raise ConfigError(
                f"--label must be a column of {log.path}, got {roles.label!r}", hint=nearest(roles.label, log.columns)
            )
        named = [roles.label]
    else:
        named = [n for n in binary if re.search(_LABEL, n.lower())]
        named = named or [n for n, c in columns.items() if re.search(_RATING, n.lower()) and _is_number(c)]
        named = named or (binary if len(binary) == 1 else [])
    if not named:
        raise ConfigError(
            f"{log.path}: no column looks like a label: --label must name one",
            hint=f"columns: {', '.join(columns)}",
        )
    tasks = []
    for name in named:
        column = log.columns[name]
        task: dict[str, Any] = {"name": _identifier(name), "label": name}
        if not _is_binary(column):
            if not _is_number(column) or column.median is None:
                raise ConfigError(f"--label must name a column of numbers, got {name!r}")
            task["at_least"] = float(column.median if column.median != column.lowest else column.highest or 0)
            comments[f"tasks.{name}"] = (
                f"numbers from {column.lowest} to {column.highest}: a positive is one at or above the median"
            )
        tasks.append(task)
    return tasks


def _is_number(column: ColumnProfile) -> bool:
    return column.kind in ("integer", "number") and column.distinct is not None


def _is_binary(column: ColumnProfile) -> bool:
    if column.kind == "boolean":
        return True
    return _is_number(column) and (column.distinct or 0) == 2 and (column.lowest, column.highest) == (0, 1)


def _features(
    profiles: Mapping[str, ViewProfile],
    views: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    comments: dict[str, str],
) -> Iterator[dict[str, Any]]:
    log = views["impressions"]
    taken: set[str] = set()
    for view, scope, key in (("users", "user", log["user"]), ("items", "item", log["item"])):
        own = views[view]["key"] if view in views else key
        source = profiles.get(view) or profiles["impressions"]
        name = _free(own, taken, scope)
        count = source.columns[own].distinct or 0
        feature: dict[str, Any] = {"name": name, "scope": scope, "kind": "categorical"} | _renamed(name, own)
        if count > 1000:
            feature["encoder"] = {"kind": "vocabulary", "min_count": 2}
        yield feature
        if view in profiles:
            yield from _columns(profiles[view], view, scope, {own}, taken, comments)
    labels = {task["label"] for task in tasks}
    used = {log["user"], log["item"], log["time"], log.get("request", log["user"]), *labels}
    yield from _columns(profiles["impressions"], "impressions", "candidate", used, taken, comments)
    for name, kind in (("hour", "hour_of_day"), ("weekday", "day_of_week")):
        free = _free(name, taken, "request")
        yield {
            "name": free,
            "scope": "context",
            "kind": "categorical",
            "column": log["time"],
            "encoder": {"kind": kind},
        }


def _columns(
    profile: ViewProfile, view: str, scope: str, used: set[str], taken: set[str], comments: dict[str, str]
) -> Iterator[dict[str, Any]]:
    for column in profile.columns.values():
        if column.name in used:
            continue
        kind = _kind(column, profile.num_rows, view)
        if isinstance(kind, str):
            comments[f"{view}.{column.name}"] = kind
            continue
        name = _free(column.name, taken, scope)
        why = _why(column, kind)
        if why is not None:
            comments[f"features.{name}"] = why
        yield {"name": name, "scope": scope} | kind | _renamed(name, column.name)


def _renamed(name: str, column: str) -> dict[str, str]:
    return {} if name == column else {"column": column}


def _kind(column: ColumnProfile, num_rows: int, view: str) -> dict[str, Any] | str:
    """How a column becomes a feature; text says why it does not."""
    distinct = column.distinct or 0
    if view in ("impressions", "events") and re.search(_AFTER, column.name.lower()):
        return "seems to be known only after the impression"
    if column.kind == "null" or (column.kind != "list" and distinct <= 1):
        return "one value only" if column.kind != "null" else "empty"
    if column.kind == "list":
        if column.inner == "number":
            wide = {"kind": "dense", "dim": column.width}
            return wide if column.width > 1 else "lists of numbers of different lengths"
        return {"kind": "multi_categorical"}
    if column.kind in ("timestamp", "local", "date") or (column.time_unit and re.search(_TIME, column.name.lower())):
        return "a time: declare what of it counts (hour_of_day, day_of_week, an age)"
    if column.kind == "other":
        return f"of type {column.type}"
    if column.kind == "boolean":
        return {"kind": "categorical"}
    if column.kind == "text":
        if column.separator is not None:
            return {"kind": "multi_categorical", "separator": column.separator}
        if column.mean_length > _FREE_TEXT or (distinct > 0.9 * num_rows and num_rows > 1000):
            return "free text, or nearly a value a row"
        return {"kind": "categorical"} | _rare(distinct)
    if column.kind == "integer" and _is_code(column, num_rows):
        return {"kind": "categorical"} | _rare(distinct)
    transform = {"transform": {"kind": "standardise", "log1p": True}} if _is_spread(column) else {}
    return {"kind": "dense"} | transform


def _is_spread(column: ColumnProfile) -> bool:
    """Whether a few numbers are far greater than most, as counts are."""
    return (column.lowest or 0) >= 0 and (column.highest or 0) > 100 * max(column.median or 0, 1)


def _is_code(column: ColumnProfile, num_rows: int) -> bool:
    """Whether integers name things rather than say how much; the name decides, then how many values there are."""
    meant = _meant(column.name)
    distinct = column.distinct or 0
    if meant is not None:
        return meant == "code"
    is_repeated = distinct <= _SOME and num_rows >= _ROWS_OF_A_VALUE * distinct and not _is_spread(column)
    return distinct <= _FEW or is_repeated


def _meant(name: str) -> Literal["code", "amount"] | None:
    """What the name of a column of integers says of them; ``num_cities`` and ``age`` are amounts, ``city`` is a code.

    Example:
        >>> [_meant(n) for n in ("city", "userCityId", "age", "num_cities", "age_group", "price2", "x7")]
        ['code', 'code', 'amount', 'amount', 'code', 'amount', None]
    """
    words = [w for w in re.split(r"[^a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()) if w]
    if len(words) > 1 and re.search(_COUNTED, words[0]):
        return "amount"
    for word in reversed(words):
        if re.search(_AMOUNTS, word):
            return "amount"
        if re.search(_CODES, word):
            return "code"
    return None


def _why(column: ColumnProfile, kind: Mapping[str, Any]) -> str | None:
    """What is to be checked of a column of integers, which may be codes as well as amounts."""
    if column.kind != "integer" or (kind["kind"] == "dense" and _meant(column.name) == "amount"):
        return None
    held = f"integers with {column.distinct or 0:,} different values"
    if kind["kind"] == "dense":
        return f"{held}: taken as an amount; write kind: categorical if they are codes"
    said = "by the name" if _meant(column.name) == "code" else "there are few for the rows"
    return f"{held}: taken as codes, {said}; write kind: dense if they are amounts"


def _rare(distinct: int) -> dict[str, Any]:
    if distinct <= 1000:
        return {}
    return {"encoder": {"kind": "vocabulary", "min_count": 2 if distinct <= _MANY else 5}}


def _free(column: str, taken: set[str], scope: str) -> str:
    name = _identifier(column)
    if name in taken:
        name = f"{scope}_{name}"
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _identifier(text: str) -> str:
    name = _NAME.sub("_", text).strip("_") or "column"
    return f"x_{name}" if name[0].isdigit() else name


def _histories(
    root: str | Path,
    profiles: Mapping[str, ViewProfile],
    views: dict[str, Any],
    features: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    comments: dict[str, str],
) -> list[dict[str, Any]]:
    history: dict[str, Any] = {"name": _free("history", {f["name"] for f in features}, "user")}
    if "events" in views:
        events = views["events"]
        if "type" in events:
            with opened_view(root, events["path"], profiles["events"].format) as (frame, _, _, _):
                counted = frame.group_by(pl.col(events["type"]).cast(pl.String)).len().collect(engine="streaming")
            ordered = counted.drop_nulls().sort("len", events["type"], descending=[True, False])
            kinds = ordered[events["type"]].to_list()
            positive = [k for k in kinds if k.lower().startswith(("click", "watch", "play", "buy", "purchase", "pv"))]
            history["event_types"] = positive or kinds[:10]
            comments["histories"] = f"event types, the most frequent first: {', '.join(kinds[:10])}"
    else:
        log = views["impressions"]
        columns = profiles["impressions"].columns
        told = [t["label"] for t in tasks if "at_least" not in t and columns[t["label"]].kind != "number"]
        views["events"] = {k: v for k, v in log.items() if k != "request"}
        comments["histories"] = "there is no view of events: the user's earlier rows of the log stand for them"
        if told:
            views["events"]["type"] = told[0]
            history["event_types"] = ["true" if columns[told[0]].kind == "boolean" else "1"]
            comments["histories"] += f", those with {told[0]}"
    items = [f["name"] for f in features if f["scope"] == "item" and f["kind"] != "dense"]
    return [history | {"attributes": items[:5], "max_length": 50}]


def _times(root: str | Path, profile: ViewProfile, view: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Span of the impressions and the times of the cuts, in UTC microseconds."""
    column = profile.columns[view["time"]]
    if column.kind == "integer":
        scale, divisor = {"s": (10**6, 1), "ms": (10**3, 1), "us": (1, 1), "ns": (1, 1000)}[view["time_unit"]]
    with opened_view(root, profile.path, profile.format) as (frame, _, _, _):
        raw = pl.col(view["time"])
        if column.kind == "integer":
            time = raw.cast(pl.Int64, strict=False) * scale // divisor
        elif str(kind_of(frame.collect_schema()[view["time"]])) == "text":
            time = moment_of(raw).to_physical()
        else:
            time = raw.cast(pl.Datetime("us")).to_physical()
        found = frame.select(
            low=time.min(), high=time.max(), a=time.quantile(_SPLIT[0], "lower"), b=time.quantile(_SPLIT[1], "lower")
        ).collect()
    low, high, a, b = (int(v or 0) for v in found.row(0))
    return (low, high), (a, b)


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        plain = _PLAIN.match(value) and value.lower() not in _WORDS_OF_YAML
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _schema_lines(proposal: Proposal) -> Iterator[str]:
    mapping, comments = proposal.mapping, proposal.comments
    yield "# Proposed by `recsys data inspect` from what the columns hold: a start that builds, not the last word."
    yield "# Features must be known before the impression: `recsys data check-leaks` finds what tells too much"
    yield f"name: {_flow(mapping['name'])}"
    yield ""
    yield "views:"
    for view, entry in mapping["views"].items():
        if f"views.{view}" in comments:
            yield f"  # {comments[f'views.{view}']}"
        yield f"  {view}: {_flow(entry)}"
    yield ""
    yield "features:"
    for feature in mapping["features"]:
        why = comments.get(f"features.{feature['name']}")
        if why is not None:
            yield f"  # {why}"
        yield f"  - {_flow(feature)}"
    left_out = {place: why for place, why in comments.items() if place.partition(".")[0] in VIEWS}
    if left_out:
        yield "  # Left out:"
    for place, why in left_out.items():
        yield f"  #   {place}: {why}"
    yield ""
    yield "histories:"
    if "histories" in comments:
        yield f"  # {comments['histories']}"
    for history in mapping["histories"]:
        yield f"  - {_flow(history)}"
    yield ""
    yield "tasks:"
    for task in mapping["tasks"]:
        if f"tasks.{task['label']}" in comments:
            yield f"  # {comments['tasks.' + task['label']]}"
        yield f"  - {_flow(task)}"
