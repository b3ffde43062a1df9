"""The benchmark's driver with real processes: who takes turns when, what is thrown away, how a death is told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.bench import driver, measuring
from benchmarks.bench.cases import Case, Engine
from benchmarks.bench.driver import Settings, Worker, WorkerError, measure

from tastemaker import parallel

# Says that it is ready, writes down whose turn it is, and computes nothing. `foreign` of each turn is given.
WORKER = """
import json, sys
name, log, foreign, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
print(json.dumps({"versions": {"python": "3"}}), flush=True)
for line in sys.stdin:
    with open(log, "a") as file:
        file.write(name + chr(10))
    if not foreign:
        sys.exit("tired")
    step = {"seconds": 1.0, "cpu": 1.0, "phases": {}, "counts": {"tokens": tokens, "sequences": 2}}
    print(json.dumps({"steps": [step], "peak_rss": 1, "foreign": foreign.pop(0)}), flush=True)
"""
SETTINGS = {"rounds": 3, "tries": 3, "threads": 1}
CASE = Case(
    name="sft-uniform",
    task="sft",
    sittings=((Engine(name="peer", side="peer"), Engine(name="ours", side="ours")),),
)


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What others take in each turn of each engine; may be changed before the driver is started."""
    takes = {"ours": [0.0] * 9, "peer": [0.0] * 9}

    def command(case: Case, model: str, engine: Engine, settings: Settings, **_: Any) -> list[str]:
        tokens = ["8" if engine.shared else "7"]
        return [sys.executable, "-c", WORKER, engine.name, str(tmp_path / "turns"), repr(takes[engine.name]), *tokens]

    monkeypatch.setattr(driver, "_command", command)
    return takes


def test_engines_take_turns_forwards_and_backwards(foreign: dict[str, list[float]], tmp_path: Path) -> None:
    found = measure(CASE, "S", Settings(out=tmp_path, **SETTINGS))
    assert (tmp_path / "turns").read_text().split() == ["peer", "ours", "ours", "peer", "peer", "ours"]
    assert [turn["round"] for turn in found["engines"]["ours"]["turns"]] == [0, 1, 2]


def test_a_disturbed_turn_is_taken_again_and_kept_beside(foreign: dict[str, list[float]], tmp_path: Path) -> None:
    foreign["ours"] = [0.5, 0.01, 0.3, 0.2, 0.4, 0.0]
    turns = measure(CASE, "S", Settings(out=tmp_path, **SETTINGS))["engines"]["ours"]["turns"]
    assert [(turn["tries"], turn["foreign"]) for turn in turns] == [(2, 0.01), (3, 0.2), (1, 0.0)]
    assert [[one["foreign"] for one in turn["thrown_away"]] for turn in turns] == [[0.5], [0.3, 0.4], []]


def test_a_case_whose_engines_did_other_work_has_no_figures(foreign: dict[str, list[float]], tmp_path: Path) -> None:
    other = replace(CASE, sittings=((Engine(name="peer", side="peer"), Engine(name="ours", side="ours", shared=True)),))
    with pytest.raises(WorkerError, match="the engines did not do the same work"):
        measure(other, "S", Settings(out=tmp_path, **SETTINGS))


def test_a_worker_that_dies_is_told_with_what_it_said(foreign: dict[str, list[float]], tmp_path: Path) -> None:
    foreign["ours"] = []
    with pytest.raises(WorkerError, match=r"a worker ended with exit code 1; .*ends with\ntired"):
        measure(CASE, "S", Settings(out=tmp_path, **SETTINGS))


def test_a_worker_that_is_dead_before_it_is_asked_is_told_too(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", "print('{}')"], tmp_path / "log", Settings(out=tmp_path, **SETTINGS))
    try:
        worker._process.wait()  # nobody reads what is written to it
        with pytest.raises(WorkerError, match="a worker ended with exit code 0"):
            worker.turn(1)
    finally:
        worker.stop()


def test_the_peer_is_given_what_our_processes_have() -> None:
    assert (measuring.PRIMITIVES_KEPT, measuring.LARGE_BLOCK) == (parallel.PRIMITIVES_KEPT, parallel.LARGE_BLOCK)


def test_workers_keep_what_was_compiled_and_have_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    given = driver.environment(3)
    assert "PYTHONDONTWRITEBYTECODE" not in given
    assert (given["OMP_NUM_THREADS"], given["HF_HUB_OFFLINE"]) == ("3", "1")
