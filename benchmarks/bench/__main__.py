"""Compare with TRL on this machine: `python -m benchmarks.bench`, or `make bench` for everything.

    --cases sft-uniform,ppo-spread   some of the cases (benchmarks/bench/cases.py names them); rollout-vllm and
                                     ppo-autocast are measured only when they are named
    --models S,M                     one or both of the models
    --engines ours,peer              some of the engines, written to out/bench/some and not into the docs
    --rounds 3  --tries 3            turns of each engine, and how often a disturbed turn is repeated
    --quick                          one round, disturbed or not, written to out/bench/quick and not into the docs
    --results FOLDER                 where the results go

Writes a file of results for each model and case, with the commit and the machine, then the figures of
docs/performance.md and its picture. The peer's environments, the models and the data are made under out/bench the first
time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench.cases import CASES, MODELS, Case
from benchmarks.bench.driver import ROOT, Settings, WorkerError, environment, machine, measure, measure_start, profile
from benchmarks.bench.environments import peer_python, trl_of
from benchmarks.bench.results import KERNELS

OUT, RESULTS = ROOT / "out/bench", ROOT / "benchmarks/results"
UNMEASURED = (WorkerError, OSError, subprocess.CalledProcessError)  # a worker that died, a full disk, a failed install


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is to be measured."""

    cases: list[str]
    models: list[str]
    engines: list[str]
    results: Path
    documented: bool
    settings: Settings


def main() -> None:
    """Measure, and write what was found."""
    options = read_options(sys.argv[1:])
    began, settings, results = time.monotonic(), options.settings, options.results
    about = machine() | {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit_of(ROOT),
        "threads": settings.threads,
    }
    try:
        with ThreadPoolExecutor() as side_by_side:
            versions = sorted({trl_of(CASES[name]) for name in options.cases})
            list(side_by_side.map(lambda trl: peer_python(settings.out, trl), versions))
        run_json([sys.executable, "-m", "benchmarks.bench.models", str(settings.out), *options.models], settings)
    except UNMEASURED as error:
        sys.exit(f"error: what is measured could not be made under {settings.out}: {error}")
    print(f"ready after {_minutes(began)}", flush=True)
    failed = []
    for model in options.models:
        for case in (CASES[name] for name in options.cases if model in CASES[name].models):
            print(f"{model} {case.name}, after {_minutes(began)}", flush=True)
            try:
                _measure(case, model, options, about)
            except UNMEASURED as error:  # the others are measured all the same
                print(error, file=sys.stderr, flush=True)
                failed.append(f"{model} {case.name}")
    if options.documented:
        subprocess.run([sys.executable, "-m", "benchmarks.bench.table", str(results)], cwd=ROOT, check=True)
    print(f"done after {_minutes(began)}", flush=True)
    if failed:
        sys.exit(f"error: {', '.join(failed)} could not be measured; what was is in {results}.")


def commit_of(root: Path) -> str:
    """The commit that is measured; a + where code differs from it."""
    changed = ("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    said = [
        subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout.strip()
        for command in (("rev-parse", "--short", "HEAD"), changed)
    ]
    return said[0] + ("+" if said[1] else "")


def _measure(case: Case, model: str, options: Options, about: Mapping[str, Any]) -> None:
    """A case's file of results, and for PPO on M one iteration by kind of kernel."""
    peaks = run_json([sys.executable, "-m", "benchmarks.bench.limits"], options.settings)
    settings, run = options.settings, measure_start if case.task == "start" else measure
    sizes = json.loads((settings.out / "models" / model / "sizes.json").read_text(encoding="utf-8"))
    found = run(case, model, settings, options.engines)
    content = found | {"sizes": sizes, "about": {**about, "gemm": peaks}}
    _write(options.results / f"{model}-{case.name}.json", content)
    if (model, case.name) == ("M", "ppo-uniform") and "ours" in found["engines"]:
        ours = next(engine for engine in case.engines if engine.name == "ours")
        _write(options.results / KERNELS, profile(case, model, ours, settings) | {"about": about})


def read_options(arguments: Sequence[str]) -> Options:
    """The command line; a name that is unknown is refused with those that are known."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the options are told there
    )
    engines = list(dict.fromkeys(engine.name for case in CASES.values() for engine in case.engines))
    usual = [case.name for case in CASES.values() if not case.when_named]
    for name, known, default in (
        ("cases", list(CASES), usual),
        ("models", list(MODELS), list(MODELS)),
        ("engines", engines, []),
    ):
        parser.add_argument(f"--{name}", type=_names(known), default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path)
    given = parser.parse_args(arguments)
    settings = Settings(
        out=OUT,
        rounds=1 if given.quick else given.rounds,
        tries=1 if given.quick else given.tries,
        threads=given.threads,
    )
    partly = "quick" if given.quick else "some" if given.engines else None
    results = given.results or (RESULTS if partly is None else OUT / partly)
    return Options(
        cases=given.cases,
        models=given.models,
        engines=given.engines,
        results=results.absolute(),
        documented=partly is None and results.absolute() == RESULTS,
        settings=settings,
    )


def _names(known: Sequence[str]) -> Any:
    def read(given: str) -> list[str]:
        names = given.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there is no {name!r}; there are {', '.join(known)}")
        return names

    return read


def run_json(command: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run a program of ours and read the last line that it prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(settings.threads), check=True, stdout=subprocess.PIPE, text=True
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _write(path: Path, value: object) -> None:
    """Write JSON aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.rename(path)


def _minutes(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:.1f} min"


if __name__ == "__main__":
    main()
