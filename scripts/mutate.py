"""Show how much the tests notice: change a module in one small place after another, and run its tests each time.

    scripts/mutate [MODULE ...] [--jobs N] [--survivors [--to TEST ...]]

What is changed is said in `mutants.py`. A mutant is caught if a test fails, or takes so long that it must be hanging.
One that no test notices is either a gap in the tests or a change without effect; the second kind is argued, one by one,
in `mutation_arguments.toml`. Written are benchmarks/results/mutation.json and docs/mutation.md.

To try hundreds of mutants on a small machine, nothing is started anew. A server imports what the tests need and what
does not depend on the module; for each mutant it forks, and the fork's import of the module gets the changed code from
memory: no file is ever touched. A first run of the unchanged module notes which test runs which line, so a mutant is
shown only to the tests that come by it, the quickest first. Each fork checks that its tests had the changed code.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
from mutants import Module, Mutant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/mutation.json"
PAGE = ROOT / "docs/mutation.md"
ARGUMENTS = ROOT / "scripts/mutation_arguments.toml"
MODULES = {
    "losses": ["tests/test_losses.py"],
    "packing": ["tests/test_packing.py"],
    "generation.sampling": ["tests/generation/test_sampling.py"],
    "agreement": ["tests/test_agreement.py"],
    "store.claiming": [
        "tests/store/test_leases.py",
        "tests/store/test_desk.py",
        "tests/store/test_hidden.py",
        "-k",
        "not postgresql",
    ],
}
USUAL = ("torch", "transformers", "hypothesis", "hypothesis.extra.numpy", "scipy.stats", "sqlalchemy")
GENEROUS, LEAST_SECONDS, GRACE_SECONDS = 20, 60.0, 20.0
CAUGHT, SURVIVED, HUNG, BROKEN = "caught", "survived", "hung", "broken"


# --- the changed module in place of the one on disk -----------------------------------------------------------------


class Supplier(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module's import the code that it was made with; `code` None refuses it."""

    def __init__(self, name: str, path: Path, code: CodeType | None) -> None:
        self.name, self.path, self.code, self.supplied = name, path, code, 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        if self.code is None:
            raise ImportError(f"{name} is not to be imported yet")
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert self.code is not None
        self.supplied += 1
        exec(self.code, module.__dict__)

    @property
    def in_use(self) -> bool:
        """Whether it is this code, loaded once, that everybody has who has the module."""
        spec = getattr(sys.modules.get(self.name), "__spec__", None)
        return self.supplied == 1 and spec is not None and spec.loader is self


# --- which test runs which line -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Recorder:
    """A pytest plugin that notes the lines of one file that each test runs, and what each test takes."""

    path: str
    lines: dict[str, set[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    of_fixture: dict[str, set[int]] = field(default_factory=dict)
    uses: dict[str, list[str]] = field(default_factory=dict)
    current: set[int] = field(default_factory=set)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current = self.lines.setdefault(item.nodeid, set())
        self.uses[item.nodeid] = list(getattr(item, "fixturenames", ()))
        began = time.monotonic()
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.seconds[item.nodeid] = time.monotonic() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[Any]:
        """What a fixture of several tests runs is run for each of them, though only the first one waits for it."""
        if fixturedef.scope == "function":
            return (yield)
        of_test, self.current = self.current, self.of_fixture.setdefault(fixturedef.argname, set())
        try:
            return (yield)
        finally:
            self.current = of_test

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != self.path:
            return None
        self.current.add(frame.f_lineno)
        return self.trace

    def summary(self) -> dict[str, Any]:
        lines = {
            test: sorted(found.union(*(self.of_fixture.get(name, set()) for name in self.uses[test])))
            for test, found in self.lines.items()
        }
        return {"lines": lines, "seconds": self.seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The unchanged module's run: the lines and the seconds of each test, and the modules that were loaded."""

    lines: Mapping[str, frozenset[int]]
    seconds: Mapping[str, float]
    loaded: Sequence[str]

    def tests_for(self, mutant: Mutant) -> list[str]:
        """The tests that come by a mutant, the quickest first."""
        wanted = frozenset(mutant.lines)
        found = [test for test, lines in self.lines.items() if not wanted or wanted & lines]
        return sorted(found, key=lambda test: (self.seconds[test], test))

    def limit(self, tests: Sequence[str]) -> float:
        return max(LEAST_SECONDS, GENEROUS * sum(self.seconds[test] for test in tests))


# --- forks ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fork:
    """A process that runs tests on one version of the module, and where it tells what came out."""

    pid: int
    folder: Path
    deadline: float

    def wait(self) -> dict[str, Any] | None:
        """What it told, once it has ended; None while it runs. One that takes too long is interrupted, then killed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        now = time.monotonic()
        if not pid:
            if now > self.deadline + GRACE_SECONDS:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            elif now > self.deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGINT)  # so that the tests' own servers are stopped
                time.sleep(0.5)
            return None
        told = self.folder / "told.json"
        found: dict[str, Any] = {"problem": f"it ended with status {status}"}
        if told.exists():
            found = json.loads(told.read_text("utf-8"))
        if now > self.deadline:
            found = {"verdict": HUNG}
        elif "problem" in found:
            found["problem"] += "\n" + (self.folder / "said").read_text("utf-8", errors="replace")[-3000:]
        shutil.rmtree(self.folder, ignore_errors=True)
        return found


def fork(name: str, code: CodeType, tests: Sequence[str], limit: float, *options: str, record: bool = False) -> Fork:
    """Run tests in a fork in which the module `name` has this code."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Fork(pid, folder, time.monotonic() + limit)
    try:
        os.setpgid(0, 0)
        with (folder / "said").open("wb") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        told = _run(name, code, [*options, *tests], folder, record)
    except BaseException:
        told = {"problem": traceback.format_exc()}
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def _run(name: str, code: CodeType, tests: Sequence[str], folder: Path, record: bool) -> dict[str, Any]:
    path = path_of(name)
    supplier = Supplier(f"tastemaker.{name}", path, code)
    sys.meta_path.insert(0, supplier)
    watcher = Recorder(str(path)) if record else _FirstFailure()
    # Other people's plugins are left out, and assertions as they are: both take time, and change no verdict.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--basetemp", str(folder / "tmp")]
    ended = int(pytest.main([*options, *([] if record else ["-x"]), *tests], plugins=[watcher]))
    if isinstance(watcher, Recorder):
        if ended or not supplier.in_use:
            raise AssertionError(f"the tests of {name} do not pass as the code stands (pytest's exit code {ended})")
        return watcher.summary() | {"loaded": sorted(sys.modules)}
    if supplier.supplied and not supplier.in_use and ended == 0:
        raise AssertionError("the tests had another version of the module")
    if ended == 0 and not supplier.supplied:
        raise AssertionError("the module was not loaded")
    # A mutant that cannot be imported fails the collection, which is no less a failure: 2 is pytest's code for it.
    return {"verdict": SURVIVED if ended == 0 else CAUGHT, "by": watcher.test}


class _FirstFailure:
    """A pytest plugin that notes the first test that fails."""

    def __init__(self) -> None:
        self.test: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.test is None:
            self.test = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.test is None:
            self.test = report.nodeid


# --- the server -----------------------------------------------------------------------------------------------------


def path_of(name: str) -> Path:
    return ROOT / "src/tastemaker" / f"{name.replace('.', '/')}.py"


def waited(one: Fork) -> dict[str, Any]:
    while True:
        told = one.wait()
        if told is not None:
            return told
        time.sleep(0.02)


def measure_baseline(name: str, module: Module, tests: Sequence[str]) -> Baseline:
    """Run the unchanged module's tests, with every line noted."""
    code = module.compiled(None, str(path_of(name)))
    told = waited(fork(name, code, tests, limit=3600, record=True))
    if "lines" not in told:
        raise SystemExit(told.get("problem", "the tests hang"))
    lines = {test: frozenset(found) for test, found in told["lines"].items()}
    return Baseline(lines=lines, seconds=told["seconds"], loaded=told["loaded"])


def preload(name: str, loaded: Sequence[str]) -> None:
    """Import what the tests loaded, as far as it comes without the module itself."""
    refusal = Supplier(f"tastemaker.{name}", path_of(name), None)
    sys.meta_path.insert(0, refusal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loaded:
            if not one.startswith(("tests", "_pytest", "conftest", "__main__", "mutants")) and one not in sys.modules:
                with contextlib.suppress(BaseException):
                    importlib.import_module(one)
    sys.meta_path.remove(refusal)


def check_that_it_works(name: str, module: Module, baseline: Baseline) -> None:
    """The module itself passes when it is supplied as a mutant is; one that cannot be loaded does not."""
    tests = sorted(baseline.lines, key=lambda test: baseline.seconds[test])
    code = module.compiled(None, str(path_of(name)))
    known = waited(fork(name, code, tests, 600, "--collect-only"))
    told = waited(fork(name, code, tests[:3], 600))
    broken = compile("raise AssertionError('a mutant is loaded')", str(path_of(name)), "exec")
    refused = waited(fork(name, broken, tests[:3], 600))
    if [told.get("verdict"), known.get("verdict")] != [SURVIVED] * 2 or refused.get("verdict") != CAUGHT:
        said = "\n".join(str(one.get("problem", one)) for one in (known, told, refused))
        raise SystemExit(f"mutants of {name} would not be loaded:\n{said}")


@dataclass(slots=True)
class Verdict:
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    by: str | None = None


def try_mutants(name: str, module: Module, baseline: Baseline, mutants: Sequence[Mutant], jobs: int) -> list[Verdict]:
    """The verdicts on some mutants of a module, in their order."""
    waiting, running, found = list(enumerate(mutants)), dict[int, Fork](), dict[int, Verdict]()
    began = time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            place, mutant = waiting.pop(0)
            tests = baseline.tests_for(mutant)
            if not tests:
                found[place] = Verdict(mutant, SURVIVED, "no test comes by it")
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `x is 1` is what some mutants are
                code = module.compiled(mutant, str(path_of(name)))
            running[place] = fork(name, code, tests, baseline.limit(tests))
        for place, one in list(running.items()):
            told = one.wait()
            if told is None:
                continue
            del running[place]
            found[place] = Verdict(mutants[place], told.get("verdict", BROKEN), told.get("by"))
            if "problem" in told:
                print(told["problem"], flush=True)
            if found[place].verdict in (SURVIVED, BROKEN):
                said = found[place].verdict
                print(f"  {said}: line {mutants[place].number}: {mutants[place].change}", flush=True)
            if len(found) % 25 == 0:
                print(f"  {len(found)} of {len(mutants)} in {time.monotonic() - began:.0f} s", flush=True)
        time.sleep(0.01)
    return [found[place] for place in range(len(mutants))]


# --- results --------------------------------------------------------------------------------------------------------


def read_results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return results


def entry(tests: Sequence[str], baseline: Baseline, verdicts: Sequence[Verdict], seconds: float) -> dict[str, Any]:
    """A module's part of the results."""
    kinds = sorted({one.mutant.operator for one in verdicts})
    missed = [one for one in verdicts if one.verdict in (SURVIVED, BROKEN)]
    tally = {
        kind: [
            sum(one.mutant.operator == kind for one in verdicts),
            sum(one.mutant.operator == kind for one in missed),
        ]
        for kind in kinds
    }
    catching = Counter(one.by.partition("[")[0] for one in verdicts if one.verdict == CAUGHT and one.by)
    return {
        "tests": list(tests),
        "num_tests": len(baseline.lines),
        "mutants": len(verdicts),
        "caught": len(verdicts) - len(missed),
        "of_them_hung": sum(one.verdict == HUNG for one in verdicts),
        "operators": tally,
        "survivors": [{"line": one.mutant.line, "change": one.mutant.change} for one in missed],
        "caught_first_by": dict(sorted(catching.items(), key=lambda pair: (-pair[1], pair[0]))),
        "seconds": round(seconds),
    }


def joined(before: Mapping[str, Any], module: Module, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Verdicts on the survivors of an earlier run, with those on the rest, which stand."""
    now = {one.mutant.key: one for one in verdicts}
    assert len(module.mutants) == before["mutants"], "the module has changed since: run it whole"
    return [now.get(mutant.key, Verdict(mutant, CAUGHT)) for mutant in module.mutants]


def named(tests: Sequence[str], longest: int) -> Baseline:
    """As though each of these tests came by every line and took half a minute: for tests that were just written."""
    every = frozenset(range(1, longest + 1))
    return Baseline(lines=dict.fromkeys(tests, every), seconds=dict.fromkeys(tests, 30.0), loaded=USUAL)


def run_module(
    name: str, jobs: int, *, survivors: bool, shown_to: Sequence[str], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All mutants of a module, or those that survived before; `shown_to` the named tests alone."""
    began, module, tests = time.monotonic(), Module(path_of(name).read_text("utf-8")), MODULES[name]
    chosen = module.mutants
    if survivors and before is not None:
        known = {(one["line"], one["change"]) for one in before["survivors"]}
        chosen = [mutant for mutant in module.mutants if mutant.key in known]
    print(f"{name}: {len(chosen)} of {len(module.mutants)} mutants", flush=True)
    baseline = named(shown_to, len(module.lines)) if shown_to else measure_baseline(name, module, tests)
    preload(name, baseline.loaded)
    check_that_it_works(name, module, baseline)
    verdicts = try_mutants(name, module, baseline, chosen, jobs)
    if len(chosen) < len(module.mutants) and before is not None:
        verdicts = joined(before, module, verdicts)
    found = entry(tests, baseline, verdicts, time.monotonic() - began)
    if len(chosen) < len(module.mutants) and before is not None:
        found |= {name: before[name] for name in ("seconds", "caught_first_by")}
        found["num_tests"] = max(found["num_tests"], before["num_tests"])
    print(f"{name}: {found['caught']} of {found['mutants']} caught", flush=True)
    return found


def read_arguments() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(ARGUMENTS.read_text("utf-8")).get("survivor", [])
    return found


def argument_for(module: str, survivor: Mapping[str, str], arguments: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a survivor is no gap, if that has been argued."""
    for one in arguments:
        if one["module"] == module and one["line"] == survivor["line"] and survivor["change"] in one["changes"]:
            return str(one["why"])
    return None


def page(results: Mapping[str, Any], arguments: Sequence[Mapping[str, Any]]) -> str:
    """docs/mutation.md"""
    lines = [
        "# How much the tests notice",
        "",
        "<!-- made by scripts/mutate from benchmarks/results/mutation.json and scripts/mutation_arguments.toml -->",
        "",
        "A test that passes shows little unless it can fail. So the modules on which everything rests are changed in",
        "one small place at a time (a comparison, a sign, a constant by one, `min` for `max`, `and` for `or`, a",
        "condition negated, an argument or statement left out), and their tests are run each time.",
        "`scripts/mutate` does it; [`mutants.py`](../scripts/mutants.py) says what is changed and what is not.",
        "",
        "| module | mutants | caught | share | survivors argued |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        argued = sum(argument_for(name, one, arguments) is not None for one in found["survivors"])
        share = 100 * found["caught"] / found["mutants"]
        path = f"{name.replace('.', '/')}.py"
        link = f"[`{path}`](../src/tastemaker/{path})"
        cells = (link, found["mutants"], found["caught"], f"{share:.1f} %", f"{argued} of {len(found['survivors'])}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    missing = [f"`{name}`" for name in MODULES if name not in results]
    if missing:
        lines += ["", f"Set up in the script and not measured yet: {', '.join(missing)}."]
    lines += [
        "",
        "What remains is listed below, with the reason why no test can tell it from the original, or none should. The",
        "share is of all mutants: those without effect count as not caught.",
        "",
    ]
    for name, found in results.items():
        lines += [f"## {name}", ""]
        if not found["survivors"]:
            lines += ["Every mutant is caught.", ""]
        for survivor in found["survivors"]:
            why = argument_for(name, survivor, arguments) or "**Not argued yet.**"
            lines.append(f"- `{_inline(survivor['line'])}`: `{_inline(survivor['change'])}`. {why}")
        lines += [""] if found["survivors"] else []
    return "\n".join(lines).rstrip() + "\n"


def _inline(code: str) -> str:
    return " ".join(code.split())


def write(results: Mapping[str, Any]) -> None:
    ordered = {name: results[name] for name in MODULES if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(ordered, read_arguments()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], help="all if left out")
    parser.add_argument("--jobs", type=int, default=2, help="how many mutants to try at the same time")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    parser.add_argument("--to", action="append", default=[], help="with --survivors: a test to show them to, no other")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    if options.to and not (options.survivors and len(options.modules) == 1):
        parser.error("--to goes with --survivors and one module")
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    results = read_results()
    for name in () if options.page else options.modules or MODULES:
        # A server for each: what one module's tests import may depend on another module.
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            found = run_module(
                name, options.jobs, survivors=options.survivors, shown_to=options.to, before=results.get(name)
            )
            write(read_results() | {name: found})  # another module may have ended meanwhile
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"{name}: the run failed")
        results = read_results()
    write(results)


if __name__ == "__main__":
    main()
