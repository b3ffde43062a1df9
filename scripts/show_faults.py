"""Show that tests catch the faults they are there for: bring each fault back and see its test fail.

    scripts/show-faults [PATCH ...] [--jobs N]

A fault is a patch `tests/**/faults/NAME.patch`. Above the diff it says in a line what it breaks, and names its tests:

    Fault: the padding is told by its id, so a response's own end token is not learned from.
    Test: tests/pitfalls/test_tokens.py::test_the_end_token_is_learned

First all those tests are run as the code stands, and must pass. Then each patch is applied to a copy of the tree, and
each of its tests must fail. What breaks before a test begins (a fixture, an import) does not count, nor does a test
that ends by a slip of the patch itself, such as a name that is not there. Exits 1 if a fault goes unnoticed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # pytest's exit codes; from 2 on it did not get to run the tests
SLIPS = ("NameError", "UnboundLocalError", "AttributeError", "ImportError", "ModuleNotFoundError", "SyntaxError")
RESULTS = ".results.xml"
LONGEST_SECONDS = 900  # a fault may also make its test wait for ever, which shows nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A patch that brings a fault back, and the tests that notice it."""

    path: Path
    breaks: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))


def read_fault(path: Path) -> Fault:
    """A patch with its heading; SystemExit where that is not as it should be."""
    heading, diff, _ = path.read_text(encoding="utf-8").partition("--- a/")
    breaks = re.findall(r"^Fault: (.+)$", heading, re.MULTILINE)
    tests = tuple(re.findall(r"^Test: (\S+)$", heading, re.MULTILINE))
    if len(breaks) != 1 or not tests or not diff:
        raise SystemExit(f"{path}: a patch begins with one line 'Fault: ...', one or more 'Test: ...', then the diff")
    return Fault(path=path.resolve(), breaks=breaks[0], tests=tests)


def all_faults() -> list[Fault]:
    return [read_fault(path) for path in sorted((ROOT / "tests").glob("**/faults/*.patch"))]


def copy_tree(to: Path) -> None:
    """Every file that is the project's own, changed or new ones too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def apply(fault: Fault, tree: Path, *options: str) -> str | None:
    """Apply a patch in a copy of the tree; what is wrong if it does not fit."""
    command = ["git", "apply", "--unidiff-zero", *options, str(fault.path)]
    ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return None if ended.returncode == 0 else ended.stderr.strip()


def run_tests(tests: Sequence[str], tree: Path) -> tuple[int, str]:
    """Pytest's exit code and its last lines. No bytecode is kept: a patched file may look as old as before."""
    paths = {"PYTHONPATH": f"{tree / 'src'}{os.pathsep}{tree}", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={RESULTS}", *tests],
            cwd=tree,
            env=os.environ | paths,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return INTERRUPTED, f"The tests took more than {LONGEST_SECONDS} s."
    return ended.returncode, "\n".join(ended.stdout.strip().splitlines()[-15:])


def verdict_of(tests: Sequence[str], code: int, results: str) -> tuple[str, str]:
    """What came of a fault, and why it is not caught: by pytest's exit code and its results in JUnit's XML."""
    if code == PASSED:
        return "MISSED", "No test failed."
    if code != FAILED:
        return "BROKEN", "The tests could not be run."
    failed, broken = set[str](), list[str]()
    for case in ElementTree.fromstring(results).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"
        broken += [f"{name}: {error.get('message')}" for error in case.iter("error")]
        for failure in case.iter("failure"):
            said = failure.get("message") or ""
            if said.partition(":")[0] in SLIPS:
                broken.append(f"{name}: {said}")
            else:
                failed |= {name, name.partition("[")[0]}
    if broken:
        return "BROKEN", "\n".join(broken)
    passed = [test for test in tests if test not in failed]
    return ("MISSED", f"These passed: {', '.join(passed)}.") if passed else ("caught", "")


def show(fault: Fault, tree: Path) -> bool:
    """Whether the fault is noticed."""
    problem = apply(fault, tree)
    if problem is not None:
        print(f"STALE    {fault.name}: {problem}", flush=True)
        return False
    (tree / RESULTS).unlink(missing_ok=True)
    try:
        code, said = run_tests(fault.tests, tree)
    finally:
        apply(fault, tree, "--reverse")
    results = (tree / RESULTS).read_text(encoding="utf-8") if code == FAILED else ""
    verdict, why = verdict_of(fault.tests, code, results)
    print(f"{verdict:8} {fault.name}: {fault.breaks}", flush=True)
    if verdict != "caught":
        print(f"{why}\n{said}", flush=True)
    return verdict == "caught"


def show_all(faults: Sequence[Fault], jobs: int) -> int:
    """How many faults go unnoticed."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trees: Queue[Path] = Queue()
        for job in range(jobs):
            tree = Path(folder) / str(job)
            copy_tree(tree)
            trees.put(tree)

        def one(fault: Fault) -> bool:
            tree = trees.get()
            try:
                return show(fault, tree)
            finally:
                trees.put(tree)

        tree = trees.get()
        code, said = run_tests(sorted({test for fault in faults for test in fault.tests}), tree)
        trees.put(tree)
        if code != PASSED:
            raise SystemExit(f"The tests do not pass as the code stands:\n{said}")
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            return sum(not caught for caught in pool.map(one, faults))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("patches", nargs="*", type=Path, help="the patches to show; all if left out")
    parser.add_argument("--jobs", type=int, default=2, help="how many to show at the same time")
    options = parser.parse_args()
    faults = [read_fault(path) for path in options.patches] or all_faults()
    unnoticed = show_all(faults, options.jobs)
    print(f"{len(faults) - unnoticed} of {len(faults)} faults are caught")
    raise SystemExit(int(unnoticed > 0))


if __name__ == "__main__":
    main()
