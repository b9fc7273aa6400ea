"""Models on Frappe, several seeds, beside FuxiCTR and the published figures.

    python -m benchmarks.frappe --raw FOLDER --output FOLDER --seeds 5 --threads 2 --fuxictr VENV/bin/python
    python -m benchmarks.frappe --raw FOLDER --output FOLDER --fuxictr VENV/bin/python --models finalmlp_fast

Trains the experiments ``configs/experiment/<model>_frappe.yaml`` as ``recsys train`` does, each in its own process,
and, where ``--fuxictr`` names a Python that has FuxiCTR, FinalMLP and DualMLP by FuxiCTR on the same files
(:mod:`benchmarks.fuxictr_frappe`): for each seed first ours, then theirs, so that both see the same machine. Writes
``frappe.json`` and ``frappe.md`` into the output folder; what is there is not run again. Protocol: the published
split; the epoch that is best on validation is tested.

Times: ``wall`` is a process from start to end, imports, test and report included; ``to best`` is from the beginning of
the first epoch to the end of the best one, evaluation of validation included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine_record

PUBLISHED = {
    "lr": 0.9356,
    "fm": 0.9671,
    "dnn": 0.9833,
    "deepfm": 0.9842,
    "dcnv2": 0.9845,
    "dualmlp": 0.98465,
    "finalmlp": 0.98607,
}
"""Test AUC of BARS and of FinalMLP's authors: one seed each, on the published train negatives."""

BY_FUXICTR = ("finalmlp", "dualmlp")
FAST = tuple(f"{model}_fast" for model in BY_FUXICTR)
"""The same networks (FinalMLP's with less dropout), by a schedule that is not the published one and ends sooner."""
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parses arguments and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of train.csv, valid.csv, test.csv")
    parser.add_argument("--output", type=Path, required=True, help="views, training set, runs, results")
    parser.add_argument("--models", nargs="+", choices=[*PUBLISHED, *FAST], default=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of either system")
    parser.add_argument("--fuxictr", type=Path, help="a Python with FuxiCTR; none: it is left out")
    args = parser.parse_args()
    output = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    _prepare(args.raw.absolute(), output, args.fuxictr)
    results_file = output / "frappe.json"
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}
    for seed in range(1, args.seeds + 1):
        for model in args.models:
            runs: dict[str, Callable[[], dict[str, Any]]] = {
                "recsys": lambda model=model, seed=seed: _ours(output, model, seed, args.threads)  # type: ignore[misc]
            }
            network = model.removesuffix("_fast")
            if args.fuxictr is not None and network in BY_FUXICTR:
                runs["fuxictr"] = lambda network=network, seed=seed: _fuxictr(  # type: ignore[misc]
                    args.fuxictr, output, args.raw.absolute(), network, seed, args.threads
                )
            for system, run in runs.items():
                key = f"{system}/{model if system == 'recsys' else network}/{seed}"
                if key not in results:
                    results[key] = run() | {"threads": args.threads}
                    sys.stdout.write(f"{key}: {json.dumps(results[key])}\n")
                    sys.stdout.flush()
                    _replace(results_file, json.dumps(results, indent=1))
                    _replace(output / "frappe.md", table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and deviation of the test AUC, and medians of the times."""
    lines = [
        "| model | system | seeds | test AUC, mean | deviation | published | epochs | to best, s | wall, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in (*PUBLISHED, *FAST):
        published = PUBLISHED[model.removesuffix("_fast")]
        for system in ("recsys", "fuxictr"):
            runs = [r for key, r in results.items() if key.startswith(f"{system}/{model}/")]
            if not runs:
                continue
            auc = [r["auc"] for r in runs]
            spread = f"{statistics.stdev(auc):.5f}" if len(auc) > 1 else ""
            middle = {name: statistics.median(r[name] for r in runs) for name in ("epochs", "to_best_s", "wall_s")}
            lines.append(
                f"| {model} | {system} | {len(runs)} | {statistics.mean(auc):.5f} | {spread} | {published} "
                f"| {middle['epochs']:g} | {middle['to_best_s']:.1f} | {middle['wall_s']:.1f} |"
            )
    record = machine_record()
    note = (
        "Published: one seed, on the published train negatives; here those may have been drawn again by the "
        "published rule, while validation and test are the published files."
    )
    return "\n".join([*lines, "", note, "", f"Machine: {json.dumps(record)}", ""])


def _prepare(raw: Path, output: Path, fuxictr: Path | None) -> None:
    if not (output / "views" / "dataset.json").exists():
        _recsys("data", "frappe", "--raw", str(raw), "--output", str(output / "views"))
    if not (output / "training_set" / "manifest.json").exists():
        _recsys("build", str(_config("finalmlp")), *_places(output))
    if fuxictr is not None and not (output / "fuxictr" / "frappe" / "test.npz").exists():
        script = Path(__file__).with_name("fuxictr_frappe.py")
        subprocess.run([fuxictr, script, raw, output / "fuxictr", "prepare", "0", "1"], check=True)


def _config(model: str) -> Path:
    return ROOT / "configs" / "experiment" / f"{model}_frappe.yaml"


def _places(output: Path) -> list[str]:
    return ["--set", f"data.views={output / 'views'}", "--set", f"data.training_set={output / 'training_set'}"]


def _recsys(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "recsys.cli", *arguments], check=True, cwd=ROOT)


def _ours(output: Path, model: str, seed: int, threads: int) -> dict[str, Any]:
    run = output / "runs" / f"{model}_{seed}"
    command = [sys.executable, "-m", "recsys.cli", "train", str(_config(model)), *_places(output), "--no-resume"]
    command += ["--set", f"training.seed={seed}", "--set", f"training.num_threads={threads}", "--run", str(run)]
    command += ["--set", f"tracking.uri=sqlite:///{output / 'mlflow.db'}"]
    times = _watch(command, threads, ended=r"^epoch \d+: train loss")
    summary = json.loads((run / "summary.json").read_text())
    test = summary["test"]["click"]
    found = {"auc": test["auc"], "logloss": test["logloss"], "gauc": test["gauc"], "epochs": summary["epochs"]}
    found["validation_auc"] = summary["validation"]["click"]["auc"]
    # The run's configuration is written when everything is loaded, before the model is built.
    started = (run / "config.json").stat().st_mtime
    return found | {"best_epoch": summary["best_epoch"]} | times.of(started, summary["best_epoch"])


def _fuxictr(python: Path, output: Path, raw: Path, model: str, seed: int, threads: int) -> dict[str, Any]:
    script = Path(__file__).with_name("fuxictr_frappe.py")
    command = [str(python), str(script), str(raw), str(output / "fuxictr"), model, str(seed), str(threads)]
    # It says "STOP!" or "Save best" once an epoch, after validation.
    verdict = r"STOP!|Save best model"
    times = _watch(command, threads, ended=verdict)
    found: dict[str, Any] = json.loads(next(x for x in times.lines if x.startswith("RESULT ")).removeprefix("RESULT "))
    verdicts = [x for x in times.lines if re.search(verdict, x)]
    best = max(number for number, x in enumerate(verdicts, start=1) if "Save best" in x)
    found["validation_auc"] = float(verdicts[best - 1].rpartition("=")[2])
    return found | {"best_epoch": best} | times.of(found.pop("fit_began"), best)


@dataclass(frozen=True)
class _Times:
    """What was seen of a process: its lines, when each epoch ended (seconds since 1970), seconds from start to end."""

    lines: list[str]
    ends: list[float]
    wall: float

    def of(self, started: float, best: int) -> dict[str, float]:
        """Times of a run whose training began at ``started`` and whose best epoch was ``best``."""
        return {"to_best_s": self.ends[best - 1] - started, "wall_s": self.wall}


def _watch(command: Sequence[str], threads: int, *, ended: str) -> _Times:
    """Runs a process and notes when it prints that an epoch has ended."""
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    began = time.time()
    lines, ends = [], []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | limits, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if re.search(ended, line):
                ends.append(time.time())
    if process.returncode:
        raise RuntimeError("\n".join([f"{' '.join(command)} ended with {process.returncode}:", *lines[-20:]]))
    return _Times(lines, ends, time.time() - began)


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    main()
