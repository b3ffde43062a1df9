"""A run that is killed anywhere and continued ends with the same bytes as one that never stopped."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tastemaker import parallel
from tastemaker.checkpoint import load_state
from tastemaker.corpus import permutation
from tastemaker.errors import TrainingError
from tastemaker.metrics import read_metrics
from tastemaker.training import Loss, OptimizerConfig, Trainer, WeightAverage
from tastemaker.training.loop import ModuleState, Stateful, run_steps

TOTAL = 6


class Killed(BaseException):
    """Stands for the end of the process."""


class Run:
    """A small training: a module, its optimizer and a weight average, stepped on data drawn by number."""

    def __init__(self, folder: Path, *, checkpoint_every: int) -> None:
        torch.manual_seed(5)
        self.folder, self.checkpoint_every = folder, checkpoint_every
        self.module = nn.Linear(3, 2)
        config = OptimizerConfig(learning_rate=0.05, warmup_steps=2)
        self.trainer = Trainer(self.module, config, total_steps=TOTAL)
        self.average = WeightAverage(self.module)
        self.stepped: list[int] = []

    def go(self, *, kill_at: int | None = None, after: bool = False) -> None:
        def step(number: int) -> Mapping[str, float]:
            if number == kill_at and not after:
                raise Killed
            self.stepped.append(number)
            batch = torch.tensor([permutation(3, seed=1, epoch=number)], dtype=torch.float32)
            report = self.trainer.step([batch], partial(_squared, self.module), 1.0)
            self.average.update(self.module, 0.9)
            if number == kill_at:
                raise Killed
            return {"loss": report.loss, "grad_norm": report.grad_norm}

        states: dict[str, Stateful] = {
            "module": ModuleState(self.module),
            "trainer": self.trainer,
            "average": self.average,
        }
        run_steps(
            self.folder,
            description="test",
            total=TOTAL,
            states=states,
            step=step,
            checkpoint_every=self.checkpoint_every,
        )

    def bytes(self) -> bytes:
        buffer = io.BytesIO()
        torch.save([self.module.state_dict(), self.trainer.state(), self.average.state()], buffer)
        return buffer.getvalue()

    def metrics(self) -> list[dict[str, float]]:
        rows = read_metrics(self.folder / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _squared(module: nn.Module, batch: torch.Tensor, denominator: float) -> Loss:
    return Loss((module(batch) ** 2).sum() / denominator)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 4])
@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
@pytest.mark.parametrize("kill_at", range(TOTAL))
def test_killed_and_continued(kill_at: int, after: bool, checkpoint_every: int, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", checkpoint_every=TOTAL + 1)
    whole.go()
    killed = Run(tmp_path / "killed", checkpoint_every=checkpoint_every)
    with pytest.raises(Killed):
        killed.go(kill_at=kill_at, after=after)
    continued = Run(tmp_path / "killed", checkpoint_every=checkpoint_every)
    continued.go()
    assert continued.stepped[0] == kill_at // checkpoint_every * checkpoint_every
    assert continued.bytes() == whole.bytes()
    assert continued.metrics() == whole.metrics()
    assert [row["step"] for row in continued.metrics()] == list(range(TOTAL))


def test_killed_twice(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", checkpoint_every=TOTAL)
    whole.go()
    for kill_at in (3, 5):
        with pytest.raises(Killed):
            Run(tmp_path / "killed", checkpoint_every=2).go(kill_at=kill_at)
    continued = Run(tmp_path / "killed", checkpoint_every=2)
    continued.go()
    assert continued.stepped == [4, 5]
    assert continued.bytes() == whole.bytes()


def test_a_finished_run_keeps_no_checkpoint_of_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=3)
    run.go()
    state = load_state(tmp_path / "checkpoint" / "state.pt")
    assert state is not None
    assert state["step"] == 3


def test_memory_is_looked_at_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, looked = Run(tmp_path, checkpoint_every=2), list[int]()
    monkeypatch.setattr(parallel.SteadyMemory, "after_step", lambda _: looked.append(len(run.stepped)))
    run.go()
    assert looked == [1, 2, 3, 4, 5, 6]


def test_a_metric_without_a_meaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="metrics sparkle are not declared"):
        run_steps(tmp_path, description="test", total=1, states={}, step=lambda _: {"sparkle": 1.0}, checkpoint_every=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a handle is of")
def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut steps from the checkpoint on are written anew, and none before it."""
    flushed, fsync = list[tuple[str, int]](), os.fsync

    def noting(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        flushed.append((name, len(read_metrics(tmp_path / "metrics.jsonl"))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    Run(tmp_path, checkpoint_every=2).go()
    states = [place for place, (name, _) in enumerate(flushed) if name.startswith(".state.pt.")]
    assert [flushed[place - 1] for place in states] == [("metrics.jsonl", 2), ("metrics.jsonl", 4)]
