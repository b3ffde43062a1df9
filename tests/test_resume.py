"""A run that is killed again and again ends with the same bytes as one that never stopped."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from tests.forked import Forked, forked
from tests.runs import measured, smoke_command, weights

from tastemaker.cli import main

pytestmark = pytest.mark.slow

KILLS = 10
SEED = 20220304  # the date of the paper
PATIENCE = 240.0  # seconds without a sign of life after which a run is taken to hang


def signs_of_life(out: Path) -> int:
    """Grows with every file and every step that a run writes."""
    if not out.exists():
        return 0
    signs = 0
    for folder, _, names in os.walk(out):
        signs += len(names)
        if "metrics.jsonl" in names:
            signs += (Path(folder) / "metrics.jsonl").read_bytes().count(b"\n")
    return signs


def kill_after(process: Forked, out: Path, signs: int, wait: float) -> bool:
    """Kill the process once there are so many signs, one of them its own, and a moment later. False if it ended."""
    target, deadline = max(signs, signs_of_life(out) + 1), time.monotonic() + PATIENCE
    while signs_of_life(out) < target:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.005)
    time.sleep(wait)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def test_a_run_killed_at_ten_moments_ends_with_the_same_bytes(random_base: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    whole, torn, log = tmp_path / "whole", tmp_path / "torn", tmp_path / "log.txt"
    assert main(smoke_command(random_base, whole)) == 0
    signs = signs_of_life(whole)
    kills = 0
    for turn in range(KILLS):  # a moment of each tenth of most of the run, so that a slow kill does not use up the rest
        process = forked(smoke_command(random_base, torn), log)
        moment = int(0.9 * signs * (turn + rng.random()) / KILLS)
        killed = kill_after(process, torn, moment, rng.uniform(0, 0.2))
        assert killed or process.poll() == 0, log.read_text()
        kills += killed
    assert kills == KILLS, f"{kills} kills; the others came after the run had ended"
    process = forked(smoke_command(random_base, torn), log)
    assert process.wait(timeout=PATIENCE) == 0, log.read_text()
    assert weights(torn) == weights(whole)
    assert measured(torn) == measured(whole)
    assert not list(torn.rglob(".*.partial")), "what kills left behind is cleared away"
    assert not list(torn.rglob("*.aside"))
    assert not list(torn.rglob(".*.before"))
