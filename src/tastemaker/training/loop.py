"""The loop around a stage's steps: resume where a kill left off, write metrics, checkpoint, show progress.

A step is a pure function of what is in the states and of its own number (data order and noise are drawn from seed and
number), so a run that was killed anywhere and continued ends with the same bytes as one that never stopped: on a
processor. On a GPU backward passes add up in no fixed order, and it ends with the same but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from tastemaker import parallel
from tastemaker.artefacts import CHECKPOINT
from tastemaker.checkpoint import load_state, save_state
from tastemaker.console import progress
from tastemaker.metrics import MetricsWriter


class Stateful(Protocol):
    """Something whose state goes into a checkpoint."""

    def state(self) -> Mapping[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


class ModuleState:
    """A module's weights as a state."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state(self) -> Mapping[str, Any]:
        return self.module.state_dict()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(parallel.all_laid_as(self.module.state_dict(), state))


def run_steps(
    folder: Path,
    *,
    description: str,
    total: int,
    states: Mapping[str, Stateful],
    step: Callable[[int], Mapping[str, float]],
    checkpoint_every: int,
    shown: str = "loss",
) -> None:
    """Call `step(number)` for each number from where the last checkpoint stands up to `total`.

    Each call returns the step's metrics; `shown` is the one put beside the progress bar.
    """
    path = folder / CHECKPOINT / "state.pt"
    saved = load_state(path)
    start = 0
    if saved is not None:
        start = int(saved["step"])
        for name, state in states.items():
            state.load_state(saved[name])
        del saved  # a second copy of all weights
    writer, memory = MetricsWriter(folder / "metrics.jsonl", resume_at=start), parallel.SteadyMemory()
    with progress(description, total, done=start) as ticker:
        for number in range(start, total):
            began = time.monotonic()
            metrics = dict(step(number))
            writer.write(number, metrics | {"seconds": time.monotonic() - began})
            ticker.advance(note=f"{shown} {metrics[shown]:.3f}" if shown in metrics else "")
            if (number + 1) % checkpoint_every == 0 and number + 1 < total:
                writer.sync()
                save_state(path, {"step": number + 1} | {name: state.state() for name, state in states.items()})
            memory.after_step()
