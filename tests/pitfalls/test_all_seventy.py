"""All seventy documented pitfalls have a test and a patch that brings the fault back, or an argument."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from tests.scripts import load_script

FAULTS = Path(__file__).parent / "faults"
LEAST_TESTED, MOST_ARGUED_AWAY = 62, 8


@pytest.fixture(scope="module")
def made() -> ModuleType:
    return load_script("make_correctness")


def test_there_are_all_seventy(made: ModuleType) -> None:
    pitfalls = made.read_pitfalls()
    assert sorted(pitfalls) == list(range(1, 71))
    tested = [one for one in pitfalls.values() if one.tests]
    assert len(tested) >= LEAST_TESTED
    assert len(pitfalls) - len(tested) <= MOST_ARGUED_AWAY
    assert [one.number for one in tested if not one.patches] == [], "have no patch"


def test_a_patch_names_tests_of_its_own_number() -> None:
    for path in FAULTS.glob("*.patch"):
        tests = re.findall(r"^Test: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert any(f"::test_{path.name[:2]}_" in test for test in tests), path.name


def test_the_page_is_what_the_script_makes(made: ModuleType) -> None:
    assert made.PAGE.read_text(encoding="utf-8") == made.correctness(), "run scripts/make-correctness"
