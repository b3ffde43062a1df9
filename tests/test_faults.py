"""The patches that bring known faults back still fit the code, and name tests that exist.

That their tests fail on them is shown by `scripts/show-faults`, which takes too long to be run each time.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
PATCHES = sorted((ROOT / "tests").glob("**/faults/*.patch"))


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    return load_script("show_faults")


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_the_patch_fits_and_its_tests_exist(path: Path, faults: ModuleType) -> None:
    fault = faults.read_fault(path)
    assert faults.apply(fault, ROOT, "--check") is None
    for test in fault.tests:
        file, _, name = test.partition("::")
        function = re.escape(name.rpartition("::")[2].partition("[")[0])
        assert re.search(rf"^\s*def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_a_patch_without_a_heading_is_refused(tmp_path: Path, faults: ModuleType) -> None:
    path = tmp_path / "x.patch"
    path.write_text("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="begins with one line 'Fault"):
        faults.read_fault(path)


CASE = '<testcase classname="tests.pitfalls.test_a" name="{name}">{found}</testcase>'
FAILURE, SLIP = (
    '<failure message="AssertionError: 1 == 2"/>',
    "<failure message=\"NameError: name 'x' is not defined\"/>",
)


@pytest.mark.parametrize(
    ("code", "found", "verdict"),
    [
        (0, {}, "MISSED"),
        (2, {}, "BROKEN"),
        (1, {"test_1[a]": FAILURE, "test_1[b]": "", "test_2": FAILURE}, "caught"),
        (1, {"test_1[a]": FAILURE, "test_2": ""}, "MISSED"),
        (1, {"test_1[a]": FAILURE, "test_2": SLIP}, "BROKEN"),
        (1, {"test_1[a]": FAILURE, "test_2": '<error message="a fixture"/>'}, "BROKEN"),
    ],
)
def test_a_fault_is_caught_where_each_of_its_tests_fails_by_itself(
    code: int, found: dict[str, str], verdict: str, faults: ModuleType
) -> None:
    results = "".join(CASE.format(name=name, found=what) for name, what in found.items())
    tests = ["tests/pitfalls/test_a.py::test_1", "tests/pitfalls/test_a.py::test_2"]
    assert faults.verdict_of(tests, code, f"<testsuite>{results}</testsuite>")[0] == verdict
