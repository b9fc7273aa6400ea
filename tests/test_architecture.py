"""Who may import whom. One entry of `RULES` a package; the longest matching name counts.

A package may always import itself and the standard library; `first` and `third` are what it may import besides. Imports
inside functions count too, so an exception here is a change of the architecture. What must not be *loaded* by a light
entry point (the command line, the scoring service) is held by `UNLOADED`, over imports at module level only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recsys", "feature_store", "training", "serving")
FIRST_PARTY = (*PACKAGES, "benchmarks", "tests")


@dataclass(frozen=True)
class Rule:
    """What a package may import besides itself and the standard library; `own`: the rule covers its modules too."""

    first: frozenset[str] = field(default_factory=frozenset)
    third: frozenset[str] = field(default_factory=frozenset)
    own: bool = True


def rule(first: str = "", third: str = "", *, own: bool = True) -> Rule:
    return Rule(frozenset(first.split()), frozenset(third.split()), own)


CONFIG = "recsys.errors recsys.config"
SCHEMA = f"{CONFIG} recsys.derived recsys.schema"
ENCODING = f"{SCHEMA} recsys.encoding recsys.files"
STORED = f"{ENCODING} recsys.times recsys.training_set recsys.windows"
BATCHES = f"{STORED} recsys.batch recsys.embedded"
SCORED = f"{BATCHES} recsys.artifact recsys.manifest recsys.predictor recsys.ops feature_store.online"
ARRAYS = "numpy pyarrow"
SERVING = f"{ARRAYS} torch orjson pydantic"
TRAINING = f"{ARRAYS} torch torchrec pydantic yaml rich psutil"

RULES = {
    "recsys": rule(own=False),
    "recsys.errors": rule(),
    "recsys.config": rule("recsys.errors", "pydantic yaml"),
    "recsys.files": rule("recsys.errors"),
    "recsys.derived": rule(CONFIG, "pydantic"),
    "recsys.schema": rule(f"{CONFIG} recsys.derived", "pydantic yaml"),
    "recsys.times": rule(),
    # Numbers only: training and serving compute derived values through it.
    "recsys.windows": rule("recsys.derived", "numpy"),
    "recsys.encoding": rule(f"{SCHEMA} recsys.files", f"{ARRAYS} pydantic"),
    "recsys.training_set": rule(ENCODING, ARRAYS),
    "recsys.ops": rule("recsys.errors", "torch fbgemm_gpu triton"),
    "recsys.layers": rule("recsys.errors recsys.ops", "torch"),
    "recsys.losses": rule("recsys.errors recsys.ops", "torch"),
    "recsys.metrics": rule("recsys.errors", "numpy"),
    "recsys.batch": rule(STORED, f"{ARRAYS} torch"),
    "recsys.embedded": rule(f"{SCHEMA} recsys.batch", "torch"),
    "recsys.embeddings": rule(f"{SCHEMA} recsys.batch recsys.embedded recsys.ops", "torch torchrec fbgemm_gpu"),
    # A model file knows the base class and what fields are, and never another model; only the registry sees them all.
    "recsys.models": rule(f"{SCHEMA} recsys.embeddings", "torch pydantic"),
    "recsys.models.*": rule(
        # Losses: those that a network brings along, its training_forward; the loss of its logits is not its business.
        f"{SCHEMA} recsys.batch recsys.embedded recsys.embeddings recsys.layers recsys.losses recsys.ops "
        "recsys.models.base recsys.models.fields recsys.models.inputs",
        "torch pydantic",
    ),
    "recsys.manifest": rule("recsys.errors recsys.files"),
    "recsys.artifact": rule(f"{BATCHES} recsys.manifest", f"{ARRAYS} torch"),
    "recsys.compiled": rule(third="torch"),
    "recsys.predictor": rule(f"{BATCHES} recsys.artifact recsys.compiled recsys.manifest recsys.ops", "numpy torch"),
    # The only modules that see every package.
    "recsys.cli": rule(" ".join(PACKAGES), "typer rich click"),
    "recsys.commands": rule(" ".join(PACKAGES), f"typer rich click polars {ARRAYS}"),
    "feature_store": rule(STORED, f"{ARRAYS} polars pydantic rich"),
    "feature_store.files": rule(f"{STORED} feature_store", "fsspec"),
    "feature_store.single_feature": rule(f"{STORED} recsys.metrics", ARRAYS),
    "feature_store.distributed": rule(f"{STORED} feature_store", f"{ARRAYS} polars pydantic rich ray"),
    "feature_store.online": rule(STORED, f"{ARRAYS} pydantic lmdb redis"),
    # The expressions of a schema over one event: loaded by the first push that computes any, never by a service.
    "feature_store.online.pushed": rule(f"{STORED} feature_store.expressions feature_store.online", "numpy polars"),
    "training": rule("recsys feature_store", TRAINING),
    "training.power_law": rule("recsys.errors", "numpy"),
    "training.tracking": rule("recsys feature_store training", f"{TRAINING} mlflow pandas"),
    "training.distributed": rule("recsys feature_store training", f"{TRAINING} ray"),
    "training.tune": rule("recsys feature_store training", f"{TRAINING} ray"),
    "serving": rule(SCORED, SERVING),
    "serving.connections": rule(third="uvicorn"),
    "serving.service": rule(f"{SCORED} serving", f"{SERVING} uvicorn uvloop httptools starlette"),
    "serving.loader": rule("recsys.errors recsys.manifest", "mlflow"),
    "serving.settings": rule("recsys.errors recsys.config recsys.manifest", "pydantic"),
    "serving.pyfunc": rule(f"{SCORED} serving", f"{SERVING} mlflow pandas"),
    "serving.mlflow_model": rule("serving.pyfunc", "mlflow"),
    "serving.batch": rule(f"{SCORED} serving", f"{SERVING} ray rich"),
    "serving.deployment": rule(f"{SCORED} serving", f"{SERVING} ray starlette"),
    # A reference is written from the formula, never from the code that it is there to check.
    "tests.references": rule(third="numpy torch"),
}

# Loading the first must not load any of the others.
UNLOADED = {
    "recsys.cli": f"{ARRAYS} torch torchrec polars pandas pydantic mlflow ray feature_store training serving",
    "recsys.files": f"{ARRAYS} torch polars pandas pydantic",
    "recsys.training_set": "torch",
    "feature_store.build": "torch mlflow ray pandas",
    "training.trainer": "ray mlflow pandas",
    "serving.settings": "torch numpy pyarrow mlflow",
    "serving.loader": "torch numpy pyarrow mlflow",
    "serving.scorer": "torchrec fbgemm_gpu polars pandas mlflow ray training feature_store",
    "serving.service": "torchrec fbgemm_gpu polars pandas mlflow ray training",
    "serving.online_features": "torchrec fbgemm_gpu polars pandas mlflow ray training lmdb redis",
}


@dataclass(frozen=True)
class Import:
    """`module` imports `name` in line `line`; `loaded` when merely importing `module` runs it."""

    module: str
    name: str
    line: int
    loaded: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path) -> dict[str, Path]:
    found = {module_name(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}
    references = sorted((root / "tests" / "references").rglob("*.py"))
    return found | {module_name(path, root): path for path in references}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def import_nodes(node: ast.AST, loaded: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, loaded
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                yield from import_nodes(ast.Module([statement], []), loaded=False)
            for statement in child.orelse:
                yield from import_nodes(ast.Module([statement], []), loaded)
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_nodes(child, loaded and not in_function)


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> list[Import]:
    """The imports of one file by absolute name; `from package import module` names the module, not the package."""
    found = []
    for node, loaded in import_nodes(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            source = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            members = [f"{source}.{alias.name}" for alias in node.names]
            names = [member if member in modules else source for member in members]
        found += [Import(module, name, node.lineno, loaded) for name in dict.fromkeys(names)]
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def rule_of(module: str) -> tuple[str, Rule]:
    """The longest pattern that fits: `a.*` what is below `a`; `a` the same and `a` itself, or, not `own`, only `a`."""

    def fits(pattern: str) -> bool:
        if pattern.endswith(".*"):
            return module.startswith(pattern[:-1])
        return within(module, pattern) if RULES[pattern].own else module == pattern

    pattern = max(filter(fits, RULES), key=len, default=None)
    assert pattern is not None, f"{module} has no rule: add one to RULES"
    return pattern, RULES[pattern]


def is_allowed(found: Import) -> bool:
    pattern, allowed = rule_of(found.module)
    top = found.name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if top not in FIRST_PARTY:
        return top in allowed.third
    return found.name == found.module or any(within(found.name, name) for name in (pattern, *allowed.first))


def violations(root: Path) -> list[str]:
    modules = modules_of(root)
    return [
        f"{modules[found.module].relative_to(root)}:{found.line}: {found.module} must not import {found.name}"
        for module, path in modules.items()
        for found in imports_of(module, path, modules)
        if not is_allowed(found)
    ]


def loaded_by(entry: str, root: Path) -> dict[str, str]:
    """All that importing `entry` loads, first-party modules and others, each with the module that imports it."""
    modules = modules_of(root)
    because: dict[str, str] = {entry: "the test"}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        parent = module.rpartition(".")[0]
        names = [parent] if parent else []
        if module in modules:
            names += [found.name for found in imports_of(module, modules[module], modules) if found.loaded]
        for name in names:
            if name not in because:
                because[name] = module
                waiting.append(name)
    return because


def test_every_import_is_allowed() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize("entry", UNLOADED)
def test_an_entry_point_loads_no_more_than_it_needs(entry: str) -> None:
    assert entry in modules_of(ROOT)
    because = loaded_by(entry, ROOT)
    assert {name: because[name] for name in because if name.partition(".")[0] in UNLOADED[entry].split()} == {}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = ["torch", "polars", "pandas", "mlflow", "ray", "numpy", "pyarrow"]
    code = f"import sys, recsys.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        ("recsys/schema.py", "import torch", "torch"),
        ("recsys/schema.py", "def f():\n    import numpy.linalg", "numpy.linalg"),
        ("recsys/config.py", "from recsys import schema", "recsys.schema"),
        ("recsys/config.py", "from . import schema", "recsys.schema"),
        ("recsys/encoding/hashing.py", "from ..batch import Batch", "recsys.batch"),
        ("recsys/models/din.py", "from recsys.models.other import Other", "recsys.models.other"),
        ("recsys/models/din.py", "from recsys.metrics import auc", "recsys.metrics"),
        ("recsys/layers/mlp.py", "import fbgemm_gpu", "fbgemm_gpu"),
        ("feature_store/build.py", "import ray.data", "ray.data"),
        ("feature_store/build.py", "from recsys.batch import Batch", "recsys.batch"),
        ("training/trainer.py", "import mlflow", "mlflow"),
        ("training/trainer.py", "if TYPE_CHECKING:\n    from serving.scorer import Scorer", "serving.scorer"),
        ("serving/scorer.py", "from training.export import export_artifact", "training.export"),
        ("serving/scorer.py", "import mlflow", "mlflow"),
        ("serving/service.py", "from feature_store.build import build_training_set", "feature_store.build"),
        ("tests/references/auc.py", "from recsys.metrics import auc", "recsys.metrics"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, source: str, name: str) -> None:
    for file in (path, "recsys/schema.py", "recsys/batch.py", "recsys/models/other.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / path).write_text(source)
    line = source.count("\n") + 1
    module = path.removesuffix(".py").replace("/", ".")
    assert violations(tmp_path) == [f"{path}:{line}: {module} must not import {name}"]


def test_a_library_is_loaded_through_other_modules_but_not_through_functions(tmp_path: Path) -> None:
    (tmp_path / "recsys").mkdir()
    (tmp_path / "recsys" / "cli.py").write_text("from recsys import one\nif TYPE_CHECKING:\n    import ray\n")
    (tmp_path / "recsys" / "one.py").write_text("try:\n    import torch.nn\nexcept ImportError:\n    pass\n")
    (tmp_path / "recsys" / "two.py").write_text("class A:\n    def f(self):\n        import mlflow\n")
    assert set(loaded_by("recsys.cli", tmp_path)) == {"recsys.cli", "recsys", "recsys.one", "torch.nn", "torch"}
    assert set(loaded_by("recsys.two", tmp_path)) == {"recsys.two", "recsys"}
