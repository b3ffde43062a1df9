"""docs/doctor.md says what the code holds to: every finding with its threshold, and every planted fault."""

from __future__ import annotations

from pathlib import Path

from tests.doctor.planted import FAULTS
from tests.scripts import load_script

from tastemaker.doctor import KINDS
from tastemaker.doctor.examine import CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def test_the_table_of_findings_is_what_the_script_makes() -> None:
    made = load_script("make_docs")
    assert made.with_findings(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8"), (
        "docs/doctor.md: run scripts/make-docs"
    )


def test_every_planted_fault_is_in_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for fault in FAULTS:
        strengths = ", ".join(f"{strength:.3g}" for strength in fault.tried_at)
        assert f"| {fault.what} | {fault.strength}: {strengths} | `{fault.finding}` |" in text


def test_every_kind_says_what_it_is() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert kind.causes
        assert kind.tries
        assert not kind.title.endswith(".")
    assert set(CHECKS) == {"sft", "reward", "ppo", "dpo"}
