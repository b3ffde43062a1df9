"""Faults planted in running PPO are named, at strengths that no threshold was set with; healthy runs raise no alarm."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.doctor.planted import FAULTS, Fault, run_ppo

from tastemaker.doctor import examine

TRIED = [
    pytest.param(fault, strength, id=f"{fault.finding} at {strength:g}")
    for fault in FAULTS
    for strength in fault.tried_at
]


@pytest.mark.parametrize(("fault", "strength"), TRIED)
def test_a_planted_fault_is_named(talker: str, tmp_path: Path, fault: Fault, strength: float) -> None:
    (diagnosis,) = examine(run_ppo(tmp_path / "ppo", talker, seed=0, **fault.plant(strength)))
    assert {fault.finding, *fault.also} <= {finding.kind.name for finding in diagnosis.findings}
    assert not diagnosis.is_healthy


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(talker: str, tmp_path: Path, seed: int) -> None:
    (diagnosis,) = examine(run_ppo(tmp_path / "ppo", talker, seed=seed))
    assert [finding.seen for finding in diagnosis.findings] == []
    assert not diagnosis.is_short
    score = diagnosis.measured.series("score")
    assert score.values[-1] > score.values[0] + 0.3, "it does learn"


def test_no_strength_is_both_set_with_and_tried() -> None:
    for fault in FAULTS:
        assert len(fault.tried_at) >= 2
        assert not set(fault.set_at) & set(fault.tried_at)
    assert len({fault.finding for fault in FAULTS}) >= 10
