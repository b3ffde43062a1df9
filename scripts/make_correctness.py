"""Write docs/correctness.md from the tests of tests/pitfalls: what may go wrong in silence, and what catches it.

    scripts/make-correctness            write the page
    scripts/make-correctness --check    only say whether it is up to date (exit code 1 if not)

A pitfall's first test, `test_NN_...`, has a docstring in three parts: the fault, `Source:`, and `Here:`. The patches
`tests/pitfalls/faults/NN-....patch` bring it back. What cannot happen in this design stands in
`tests/pitfalls/argued_away.toml`, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PITFALLS, PAGE = ROOT / "tests/pitfalls", ROOT / "docs/correctness.md"
ARGUED_AWAY = PITFALLS / "argued_away.toml"
SECTIONS = {
    "Tokens, padding, stopping": range(1, 16),
    "Log-probs and the ratio": range(16, 29),
    "KL": range(29, 35),
    "Loss normalisation and optimizer steps": range(35, 49),
    "Advantages, values, rewards": range(49, 64),
    "Modes, seeds, state": range(64, 71),
}
NUMBERS = range(1, 71)
INTRODUCTION = """\
# Correctness

<!-- made by scripts/make-correctness from tests/pitfalls; change the tests' docstrings and run it again -->

Reinforcement learning from human feedback fails in silence: a mask that is off by one, a mean over the wrong tokens,
a score read at the padding, and the run ends well with a worse model. Below are {count} such faults that are documented
in papers and in the issue trackers of well-known systems, and what keeps each of them out of this one.

**{tested} have a test, and {patched} a patch that brings the fault back.** This applies each patch to a copy of the
code and shows that its test fails:

    scripts/show-faults tests/pitfalls/faults/*.patch

The tests are part of `make test`. Other checks of the same kind are in it too: short runs of every stage against golden
curves in float64, equations against hand calculations, invariants over random batches.

- [Several processes](many-processes.md) against one, and [TRL](peers.md) on the same batch.
- [Mutation testing](mutation.md) of the equations, of packing, the sampler, agreement and leases.
- [`tastemaker doctor`](doctor.md) looks at a run, [`tastemaker inspect`](inspect.md) at the tokens that a stage sees.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pitfall:
    """A documented fault, and what is done about it."""

    number: int
    fault: str
    source: str
    here: str
    file: str = ""
    tests: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()


def read_pitfalls() -> dict[int, Pitfall]:
    """Every pitfall by its number; SystemExit where a docstring is not as it should be or a number is given twice."""
    found: dict[int, Pitfall] = {}
    for path in sorted(PITFALLS.glob("test_*.py")):
        for number, tests in _tests_by_number(path).items():
            if number in found:
                raise SystemExit(f"{path}: pitfall {number} has tests in {found[number].file} already")
            fault, source, here = _parts(tests[0], path)
            found[number] = Pitfall(
                number=number,
                fault=fault,
                source=source,
                here=here,
                file=str(path.relative_to(ROOT)),
                tests=tuple(test.name for test in tests),
                patches=tuple(str(patch.relative_to(ROOT)) for patch in _patches(number)),
            )
    return found | dict(_argued_away(set(found)))


def _tests_by_number(path: Path) -> dict[int, list[ast.FunctionDef]]:
    found: dict[int, list[ast.FunctionDef]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match = re.match(r"test_(\d\d)_", node.name) if isinstance(node, ast.FunctionDef) else None
        if match is not None and isinstance(node, ast.FunctionDef):
            found.setdefault(int(match[1]), []).append(node)
    return found


def _parts(test: ast.FunctionDef, path: Path) -> tuple[str, str, str]:
    """The fault, its sources and how it is kept out."""
    text = inspect.cleandoc(ast.get_docstring(test) or "")
    match = re.fullmatch(r"(.+?)\n\nSource: (.+?)\n+Here: (.+)", text, re.DOTALL)
    if match is None:
        raise SystemExit(f"{path}: the docstring of {test.name} has not the parts: the fault, 'Source: ', 'Here: '")
    fault, source, here = (" ".join(part.split()) for part in match.groups())
    here = here[0].upper() + here[1:]
    return fault, source, here


def _patches(number: int) -> list[Path]:
    return sorted((PITFALLS / "faults").glob(f"{number:02d}-*.patch"))


def _argued_away(tested: set[int]) -> Iterator[tuple[int, Pitfall]]:
    if not ARGUED_AWAY.exists():
        return
    for key, row in tomllib.loads(ARGUED_AWAY.read_text(encoding="utf-8")).items():
        number = int(key)
        if number in tested:
            raise SystemExit(f"{ARGUED_AWAY}: pitfall {number} has a test")
        yield number, Pitfall(number=number, fault=row["fault"], source=row["source"], here=row["why"])


def correctness() -> str:
    """docs/correctness.md"""
    pitfalls = read_pitfalls()
    tested = [one for one in pitfalls.values() if one.tests]
    counts = {"count": len(pitfalls), "tested": len(tested), "patched": sum(bool(one.patches) for one in tested)}
    lines = [INTRODUCTION.format(**counts)]
    for title, numbers in SECTIONS.items():
        lines += [f"## {title}", ""]
        for number in numbers:
            if number in pitfalls:
                lines += [*_entry(pitfalls[number]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entry(one: Pitfall) -> list[str]:
    lines = [f"**{one.number}. {one.fault}**", f"{one.here}  "]
    if one.tests:
        tests = ", ".join(f"`{test}`" for test in one.tests)
        patches = ", ".join(f"[{Path(patch).stem}](../{patch})" for patch in one.patches)
        lines.append(f"[Test](../{one.file}): {tests}. Brought back by {patches or 'no patch'}.  ")
    else:
        lines.append("No test: it cannot happen here.  ")
    return [*lines, f"*Source: {one.source}*"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check, text = parser.parse_args().check, correctness()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale and not check:
        PAGE.write_text(text, encoding="utf-8")
    print(("out of date" if check else "written") if stale else "up to date")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
