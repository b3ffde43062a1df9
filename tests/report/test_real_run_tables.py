"""The tables of docs/real-run.md: every number of a finished run where the page wants it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tastemaker.files import write_records
from tastemaker.records import Message, Prompt

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_real_run.py"
RESULTS = {
    "comparisons": [
        {
            "a": "ppo-ptx",
            "b": "sft",
            "win_rate": 0.625,
            "ci95": [0.5754, 0.6723],
            "length_controlled": {"win_rate": 0.619, "ci95": [0.569, 0.667]},
        }
    ],
    "models": {
        "sft": {
            "proxy_score": {"value": 0.884, "ci95": [0.76, 0.99], "n": 400},
            "kl": -0.0004,
            "mean_tokens": 58.4,
            "eos_rate": 0.2225,
            "entropy": 2.7713,
            "heldout_text_loss": 2.56549,
        },
        "best-of-4": {
            "proxy_score": None,
            "kl": None,
            "mean_tokens": 60.1,
            "eos_rate": 0.1,
            "entropy": None,
        },
    },
    "stages": [{"name": "6-policy/dpo", "seconds": 1439.0}],
    "peak_memory_mb": 11704.0,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    first = tmp_path / "round-1"
    (first / "1-prompts").mkdir(parents=True)
    (first / "7-evaluation").mkdir()
    prompts = [Prompt(messages=(Message(role="user", content=f"Is {place} | prime?"),)) for place in range(29)]
    write_records(first / "1-prompts/test.jsonl", prompts)
    rows = [
        {"prompt": prompt.key, "contestant": who, "response": f"{who} says\n {place} " + "is a number " * 20}
        for who in ("sft", "dpo")
        for place, prompt in enumerate(prompts)
    ]
    (first / "7-evaluation/responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), "utf-8")
    return tmp_path


def printed(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(run)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_tables_hold_the_figures_of_the_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(finished, monkeypatch, capsys)
    assert "| ppo-ptx over sft | 62.5 % [57.5, 67.2] | 61.9 % [56.9, 66.7] |" in lines
    assert "| sft | 0.88 [0.76, 0.99] | 0.00 | 58 | 22 % | 2.77 | 2.565 |" in lines
    assert "| best-of-4 |  |  | 60 | 10 % |  |  |" in lines  # what was not measured is no zero
    assert "| 6-policy/dpo | 24 |" in lines
    assert "Peak memory 11.4 GiB." in lines


def test_samples_are_those_at_every_28th_place_by_everybody(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(finished, monkeypatch, capsys)
    assert [line for line in lines if line.startswith("**")] == ["**Is 0 \\| prime?**", "**Is 28 \\| prime?**"]
    responses = [line for line in lines if "says" in line]
    assert [line.split()[:5] for line in responses] == [
        ["|", who, "|", who, "says"] for _ in (0, 28) for who in ("sft", "dpo")
    ]
    assert all(len(line) < 180 and line.endswith("… |") for line in responses)
