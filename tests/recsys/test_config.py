"""Configuration: everything that is wrong is said at once, with its place and the way to mend it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from recsys.config import (
    Config,
    InconsistentError,
    apply_overrides,
    canonical_json,
    fingerprint,
    load_yaml,
    override,
    parse_yaml,
    validate,
)
from recsys.errors import ConfigError, nearest


class Adam(Config):
    kind: Literal["adam"] = "adam"
    learning_rate: float = Field(0.001, gt=0)


class Sgd(Config):
    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.0


class Layer(Config):
    width: int = Field(ge=1)
    is_gated: bool = False


class Own(Config):
    mode: Literal["own"] = "own"
    optimizer: Annotated[Adam | Sgd, Field(discriminator="kind")] = Adam()


class Borrowed(Config):
    mode: Literal["borrowed"] = "borrowed"
    temperature: float = 1.0
    kind: int = 0


class Run(Config):
    name: str
    source: Annotated[Own | Borrowed, Field(discriminator="mode")] = Own()
    sources: tuple[Annotated[Own | Borrowed, Field(discriminator="mode")], ...] = ()
    time: int | str = 0
    epochs: int = Field(1, ge=1)
    optimizer: Annotated[Adam | Sgd, Field(discriminator="kind")] = Adam()
    fallback: Annotated[Adam | Sgd, Field(discriminator="kind")] | None = None
    layers: tuple[Layer, ...] = Field((), max_length=3)
    heads: dict[str, Layer] = Field(default_factory=dict)
    first: Layer | None = None
    lowest: int = 0
    highest: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        problems = []
        if self.lowest > self.highest:
            problems.append("lowest must be at most highest")
        if self.epochs > self.highest:
            problems.append("epochs must be at most highest")
        if problems:
            raise InconsistentError(problems)
        return self


def problems_of(mapping: dict[str, Any]) -> tuple[list[str], str | None]:
    """Lines of the message, and the hint."""
    with pytest.raises(ConfigError) as caught:
        validate(Run, mapping, source="run.yaml")
    first, *lines = caught.value.message.split("\n  ")
    plural = "" if len(lines) == 1 else "s"
    assert first == f"run.yaml: {len(lines)} problem{plural}"
    return lines, caught.value.hint


def test_a_valid_mapping_gives_a_frozen_object() -> None:
    run = validate(Run, {"name": "x", "layers": [{"width": 3}], "optimizer": {"kind": "sgd"}}, source="run.yaml")
    assert run == Run(name="x", layers=(Layer(width=3),), optimizer=Sgd())
    with pytest.raises(ValidationError, match="frozen"):
        run.name = "y"  # type: ignore[misc]


def test_every_violation_is_reported_with_its_path() -> None:
    lines, hint = problems_of(
        {
            "name": 7,
            "epochs": 0,
            "optimizer": {"kind": "adam", "learning_rate": -1.0},
            "layers": [{"width": 2}, {"width": "2"}, {}],
            "heads": {"a": {"width": 2, "is_gated": 1}},
            "extra": 1,
        }
    )
    assert lines == [
        "name: must be text, got 7",
        "epochs: must be greater than or equal to 1, got 0",
        "optimizer.learning_rate: must be greater than 0, got -1.0",
        'layers.1.width: must be a valid integer, got "2"',
        "layers.2.width: must be given",
        "heads.a.is_gated: must be true or false, got 1",
        "extra: is not a known key",
    ]
    assert hint is not None
    assert "write 2 without quotes" in hint


@pytest.mark.parametrize(
    ("mapping", "line", "hint"),
    [
        ({"epoch": 1}, "epoch: is not a known key", "epoch: did you mean 'epochs'?"),
        (
            {"layers": [{"width": 1, "gated": 1}]},
            "layers.0.gated: is not a known key",
            "layers.0.gated: did you mean 'is_gated'?",
        ),
        ({"heads": {"a": {"wdth": 1}}}, "heads.a.wdth: is not a known key", "heads.a.wdth: did you mean 'width'?"),
        ({"first": {"widths": 1}}, "first.widths: is not a known key", "first.widths: did you mean 'width'?"),
        (
            {"optimizer": {"kind": "sgd", "momentun": 1}},
            "optimizer.momentun: is not a known key",
            "optimizer.momentun: did you mean 'momentum'?",
        ),
        (
            {"fallback": {"kind": "adam", "learning_rates": 1}},
            "fallback.learning_rates: is not a known key",
            "fallback.learning_rates: did you mean 'learning_rate'?",
        ),
        (  # a key that is one of another member's, or of none
            {"source": {"mode": "borrowed", "temprature": 2.0}},
            "source.temprature: is not a known key",
            "source.temprature: did you mean 'temperature'?",
        ),
        (
            {"sources": [{"mode": "own", "optimizer": {"kind": "sgd", "momentun": 1}}]},
            "sources.0.optimizer.momentun: is not a known key",
            "sources.0.optimizer.momentun: did you mean 'momentum'?",
        ),
        (  # shares three letters with 'kind', which is not near
            {"source": {"mode": "borrowed", "window": 3}},
            "source.window: is not a known key",
            "source.window: known names: 'kind', 'mode', 'temperature'",
        ),
        ({"source": {"mode": "owns"}}, "source.mode: 'owns' is not known", "source.mode: did you mean 'own'?"),
        ({"optimizer": {"kind": "adm"}}, "optimizer.kind: 'adm' is not known", "optimizer.kind: did you mean 'adam'?"),
        (
            {"optimizer": {"kind": "zzzz"}},
            "optimizer.kind: 'zzzz' is not known",
            "optimizer.kind: known names: 'adam', 'sgd'",
        ),
    ],
)
def test_unknown_names_bring_the_nearest(mapping: dict[str, Any], line: str, hint: str) -> None:
    lines, got_hint = problems_of({"name": "x"} | mapping)
    assert line in lines
    assert got_hint == hint


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"optimizer": {}}, "optimizer.kind: must be given"),
        ({"source": {}}, "source.mode: must be given"),
        ({"source": {"mode": "own", "optimizer": {}}}, "source.optimizer.kind: must be given"),
        ({"optimizer": 3}, None),
        ({"layers": {}}, "layers: must be a list"),
        ({"heads": []}, None),
        ({"first": 3}, None),
        ({"layers": [{"width": 1}] * 4}, "layers: must have at most 3 items, got 4"),
        ({"epochs": 1.5}, "epochs: must be a valid integer, got 1.5"),
        ({"epochs": True}, "epochs: must be a valid integer, got true"),
        ({"epochs": None}, "epochs: must be a valid integer, got null"),
        (
            {"optimizer": {"kind": "sgd", "momentum": float("nan")}},
            "optimizer.momentum: must be a finite number, got NaN",
        ),
    ],
)
def test_wrong_types(mapping: dict[str, Any], line: str | None) -> None:
    lines, _ = problems_of({"name": "x"} | mapping)
    assert len(lines) == 1
    assert lines[0].startswith(next(iter(mapping)))
    if line is not None:
        assert lines == [line]


def test_a_value_that_may_be_of_two_types_is_named_by_its_key() -> None:
    lines, _ = problems_of({"name": "x", "time": 1.5})
    assert lines == ["time: must be a valid integer, got 1.5", "time: must be text, got 1.5"]


def test_rules_between_fields_have_a_line_each() -> None:
    lines, _ = problems_of({"name": "x", "epochs": 8, "lowest": 9, "highest": 7})
    assert lines == ["lowest must be at most highest", "epochs must be at most highest"]


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("2.5e3", 2.5e3), ("1e+3", 1e3), ("-3e-4", -3e-4), ("1.0e-3", 1e-3), ("2.e1", 20.0)],
)
def test_numbers_with_an_exponent_need_neither_point_nor_sign(written: str, number: float) -> None:
    parsed = parse_yaml(f"name: x\noptimizer: {{kind: sgd, momentum: {written}}}", source="run.yaml")
    assert validate(Run, parsed, source="run.yaml").optimizer == Sgd(momentum=number)
    assert apply_overrides({}, [f"a={written}", f"b='{written}'"]) == {"a": number, "b": written}
    assert apply_overrides({}, [override("a", written)]) == {"a": written}


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "0x1e-3", "1 e5"])
def test_what_only_looks_like_a_number_is_text(text: str) -> None:
    assert parse_yaml(f"a: {text}", source="run.yaml") == {"a": text}


def test_yaml_is_read_as_plain_data(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: [x, 2.5, null, true]\nday: 2020-01-02\nc: {d: é}\n", encoding="utf-8")
    want = {"a": 1, "b": ["x", 2.5, None, True], "day": "2020-01-02", "c": {"d": "é"}}
    assert load_yaml(tmp_path / "a.yaml") == load_yaml(str(tmp_path / "a.yaml")) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"x\.yaml:2:1 must be valid YAML: key 'a' is given twice"),
        ("b: {c: 1, c: 2}", r"x\.yaml:1:11 must be valid YAML: key 'c' is given twice"),
        ("1: a", r"x\.yaml:1:1 must be valid YAML: key 1 must be text: quote it"),
        ("yes: a", r"key True must be text"),
        ("a: [1,", r"x\.yaml:1:7 must be valid YAML"),
        ("a: \x00", r"x\.yaml must be valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", r"x\.yaml:1:4 must be valid YAML: could not determine a constructor"),
        ("a: !!binary aGk=", r"x\.yaml:1:4 must be valid YAML: could not determine a constructor"),
        ("a: !!timestamp 2020-01-01", r"x\.yaml:1:4 must be valid YAML: could not determine a constructor"),
        ("a: {<<: {b: 1}}", r"x\.yaml:1:5 must be valid YAML: could not determine a constructor"),
        ("a: &x [*x]", r"x\.yaml must hold data of finite depth"),
        ("", r"x\.yaml must hold a mapping at its top, got nothing"),
        ("- a", r"x\.yaml must hold a mapping at its top, got list"),
        ("a: 1\n---\nb: 2", r"x\.yaml:2:1 must be valid YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, source="x.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no YAML files in"):
        load_yaml(tmp_path / "run.yaml")
    (tmp_path / "din.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"dni\.yaml does not exist[\s\S]*did you mean 'din\.yaml'"):
        load_yaml(tmp_path / "dni.yaml")
    with pytest.raises(ConfigError, match=r"must be UTF-8 text, got other bytes at offset 3"):
        load_yaml(tmp_path / "din.yaml")
    with pytest.raises(ConfigError, match="must be a YAML file, got a folder"):
        load_yaml(tmp_path)
    with pytest.raises(ConfigError, match="must be a file that can be read"):
        load_yaml(tmp_path / "din.yaml" / "inner.yaml")


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("a=2", {"a": 2}),
        ("a=2.5e-1", {"a": 0.25}),
        ("a=", {"a": None}),
        ("a=b=c", {"a": "b=c"}),
        ("a=[1, x]", {"a": [1, "x"]}),
        ("m.x={y: 1}", {"m": {"x": {"y": 1}, "z": 3}}),
        ("m.z=4", {"m": {"x": 1, "z": 4}}),
        ("new.deep.er=1", {"new": {"deep": {"er": 1}}}),
        ("none.x=1", {"none": {"x": 1}}),
        ("l.1=9", {"l": [1, 9, {"k": 3}]}),
        ("l.2.k=9", {"l": [1, 2, {"k": 9}]}),
        (" a =2", {"a": 2}),
    ],
)
def test_overrides(override: str, want: dict[str, Any]) -> None:
    mapping = {"a": 1, "m": {"x": 1, "z": 3}, "none": None, "l": [1, 2, {"k": 3}]}
    before = canonical_json(mapping)
    assert apply_overrides(mapping, [override]) == mapping | want
    assert canonical_json(mapping) == before


def test_later_overrides_win() -> None:
    assert apply_overrides({"a": 1}, ["a=2", "b.c=1", "a=3", "b.d=2"]) == {"a": 3, "b": {"c": 1, "d": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "--set must read a.b=c, got 'a'"),
        ("=1", "--set must read a.b=c"),
        ("a..b=1", "--set must read a.b=c"),
        ("a=[1", "--set a= must be followed by a YAML value"),
        ("a={x: 1, x: 2}", "--set a= must be followed by a YAML value"),
        ("a=!!binary aGk=", "--set a= must be followed by a YAML value"),
        ("a.b=1", "--set a.b: a must be a mapping or a list"),
        ("a.b.c=1", r"--set a\.b: its parent must be a mapping or a list, got int"),
        ("l.3=1", r"--set l\.3 must be a position below 3, got '3'"),
        ("l.-1=1", "must be a position below 3"),
        ("l.²=1", "must be a position below 3"),
        ("l.x.y=1", "must be a position below 3, got 'x'"),
    ],
)
def test_overrides_that_lead_nowhere(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"a": 1, "l": [1, 2, {"k": 3}]}, [override])


def test_a_wrong_override_is_found_when_the_whole_is_validated() -> None:
    lines, hint = problems_of(apply_overrides({"name": "x"}, ["epoch=3", "optimizer.kind=sgd", "lowest=a"]))
    assert lines == ['lowest: must be a valid integer, got "a"', "epoch: is not a known key"]
    assert hint == "epoch: did you mean 'epochs'?"


def test_canonical_json_and_fingerprint_by_hand() -> None:
    text = '{"kind":"sgd","momentum":0.5}'
    assert canonical_json(Sgd(momentum=0.5)) == text
    assert fingerprint(Sgd(momentum=0.5)) == hashlib.sha256(text.encode()).hexdigest()
    assert canonical_json({"b": "é", "a": [1, None]}) == '{"a":[1,null],"b":"é"}'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=5), st.randoms())
def test_the_fingerprint_does_not_depend_on_the_order_of_keys(mapping: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(v) for v in value] if isinstance(value, list) else value

    assert fingerprint(shuffled(mapping)) == fingerprint(mapping)
    assert fingerprint(mapping | {"another key": 1}) != fingerprint(mapping)


def test_the_fingerprint_of_a_config_survives_a_round_trip() -> None:
    run = Run(name="é", layers=(Layer(width=2),), heads={"b": Layer(width=1), "a": Layer(width=3)})
    again = validate(Run, run.model_dump(mode="json"), source="x")
    assert again == run
    assert fingerprint(again) == fingerprint(run)
    assert fingerprint(run.model_copy(update={"epochs": 2})) != fingerprint(run)


def test_nearest() -> None:
    assert nearest("clik", ["like", "click"]) == "did you mean 'click' or 'like'?"
    assert nearest("x", []) == "there are none"
    assert nearest("zzz", [f"n{i:02}" for i in range(14)]).endswith("'n11' and 2 more")
