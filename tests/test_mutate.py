"""What `scripts/mutate` changes, that a mutant is what its tests get, and that every survivor is argued."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]

SOURCE = '''
"""A docstring with 1 < 2."""
from typing import Literal

LIMIT = 3
Kind = int | str


def total(values: list[int], *, start: int = 0, kind: Literal["a", "b"] = "a") -> int:
    """The sum + the start."""
    if not values:
        raise ValueError(f"{1 + 1} values, min 1")
    found = start + sum(values)
    if kind == "b" and found < LIMIT:
        found -= 1
    return max(found, total([found], start=1, kind=kind))
'''

CALL = "found, total([found], start=1, kind=kind)"


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    return load_script("mutants")


@pytest.fixture(scope="module")
def mutate(mutants: ModuleType) -> ModuleType:
    assert mutants is sys.modules["mutants"]
    return load_script("mutate")


def test_every_kind_of_change_is_made_and_nothing_else(mutants: ModuleType) -> None:
    found = [(one.operator, one.change) for one in mutants.Module(SOURCE).mutants]
    assert sorted(found) == sorted(
        [
            ("constant", "3 -> 4"),
            ("constant", "3 -> 2"),
            ("constant", "0 -> 1"),
            ("constant", "0 -> -1"),
            ("constant", "'a' -> 'a~'"),
            ("not", "not values -> values"),
            ("statement", "raise ValueError(f'{1 + 1} values, min 1') -> (left out)"),
            ("arithmetic", "start + sum(values) -> start - sum(values)"),
            ("boolean", "kind == 'b' and found < LIMIT -> kind == 'b' or found < LIMIT"),
            ("condition", "kind == 'b' and found < LIMIT -> not (kind == 'b' and found < LIMIT)"),
            ("comparison", "kind == 'b' -> kind != 'b'"),
            ("constant", "kind == 'b' -> kind == 'b~'"),
            ("comparison", "found < LIMIT -> found <= LIMIT"),
            ("comparison", "found < LIMIT -> found >= LIMIT"),
            ("statement", "found -= 1 -> (left out)"),
            ("arithmetic", "found -= 1 -> found += 1"),
            ("constant", "1 -> 2"),
            ("constant", "1 -> 0"),
            ("name", f"max({CALL}) -> min({CALL})"),
            ("argument", "start=1 -> (left out)"),
            ("argument", "kind=kind -> (left out)"),
            ("constant", "start=1 -> start=2"),
            ("constant", "start=1 -> start=0"),
        ]
    )


def test_a_mutant_is_one_change_and_leaves_the_tree_as_it_was(mutants: ModuleType) -> None:
    module = mutants.Module("def f(x):\n    if x > 2:\n        return x * 3\n    return -x\n")
    before = ast.dump(module.tree)
    given: dict[str, list[Any]] = {}
    for mutant in module.mutants:
        names: dict[str, Any] = {}
        exec(module.compiled(mutant, "f.py"), names)
        given[mutant.change] = [names["f"](x) for x in (1, 2, 3, 4)]
    assert ast.dump(module.tree) == before
    # the function itself gives -1, -2, 9, 12
    assert given == {
        "x > 2 -> x >= 2": [-1, 6, 9, 12],
        "x > 2 -> x <= 2": [3, 6, -3, -4],
        "x > 2 -> x > 3": [-1, -2, -3, 12],
        "x > 2 -> x > 1": [-1, 6, 9, 12],
        "x * 3 -> x / 3": [-1, -2, 1, 4 / 3],
        "x * 3 -> x * 4": [-1, -2, 12, 16],
        "x * 3 -> x * 2": [-1, -2, 6, 8],
        "-x -> x": [1, 2, 9, 12],
    }
    lines = {mutant.change: list(mutant.lines) for mutant in module.mutants}
    assert (lines["x > 2 -> x >= 2"], lines["x * 3 -> x / 3"], lines["-x -> x"]) == ([2], [3], [4])


def test_arguments_that_a_function_of_the_module_requires_stay(mutants: ModuleType) -> None:
    source = """
    def f(*, a, b=1): return a + b
    f(a=x, b=y)
    g(a=x, reason="no")
    """
    changes = [one.change for one in mutants.Module(textwrap.dedent(source)).mutants if one.operator == "argument"]
    assert changes == ["b=y -> (left out)", "a=x -> (left out)"]


def test_equal_changes_of_equal_lines_have_names_of_their_own(mutants: ModuleType) -> None:
    module = mutants.Module("def f(x):\n    x += 1\n    x += 1\n")
    keys = [mutant.key for mutant in module.mutants]
    assert len(set(keys)) == len(keys) == 8
    assert ("x += 1", "x += 1 -> (left out) (2)") in keys


def test_a_fork_has_the_changed_code_and_its_test_sees_it(tmp_path: Path) -> None:
    """In a Python of its own, where nothing of ours is imported yet; no file of the module is written."""
    test = tmp_path / "test_sizes.py"
    test.write_text(
        "import pytest\nfrom tastemaker.errors import ConfigError\nfrom tastemaker.ranges import parse_size\n\n"
        "def test_a_size():\n    assert parse_size('0.001KB', 'x') == 1\n"
    )
    code = f"""
import sys
sys.path[:0] = {[str(ROOT / "scripts"), str(ROOT / "src"), str(ROOT)]!r}
import mutate
path = mutate.path_of("ranges")
module = mutate.Module(path.read_text("utf-8"))
(changed,) = (one for one in module.mutants if one.change == "size < 1 -> size <= 1")
for mutant in (None, changed):
    code = module.compiled(mutant, str(path))
    print(mutate.waited(mutate.fork("ranges", code, [{str(test)!r}], 300, "--noconftest"))["verdict"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["survived", "caught"]


# --- what is written down of the last run ---------------------------------------------------------------------------


def test_the_page_is_what_the_results_and_the_arguments_make(mutate: ModuleType) -> None:
    assert mutate.page(mutate.read_results(), mutate.read_arguments()) == mutate.PAGE.read_text(encoding="utf-8")


def test_every_survivor_is_argued_and_every_argument_has_its_survivor(mutate: ModuleType) -> None:
    results, arguments = mutate.read_results(), mutate.read_arguments()
    survivors = {(name, one["line"], one["change"]) for name, found in results.items() for one in found["survivors"]}
    argued = [(one["module"], one["line"], change) for one in arguments for change in one["changes"]]
    assert sorted(argued) == sorted(survivors)
    assert all(len(one["why"]) > 20 for one in arguments)


def test_the_modules_are_those_that_were_run_and_enough_is_caught(mutate: ModuleType, mutants: ModuleType) -> None:
    results = mutate.read_results()
    assert list(results) == [name for name in mutate.MODULES if name in results]
    for name, found in results.items():
        assert found["caught"] >= 0.95 * found["mutants"], name
        assert found["mutants"] == found["caught"] + len(found["survivors"])
        lines = {line.strip() for line in mutate.path_of(name).read_text(encoding="utf-8").splitlines()}
        gone = [one["line"] for one in found["survivors"] if one["line"] not in lines]
        assert gone == [], f"{name} has changed; run scripts/mutate {name}"
    assert json.loads(mutate.RESULTS.read_text(encoding="utf-8")) == results
