"""`failing.py PROCESSES STEP COMMAND ...`: `tastemaker` in several processes, some of which fail in a step.

PROCESSES are their numbers, like 01, and steps count from 1. If it fails, the first does so a second later.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tests.forked import run_command

from tastemaker import processes
from tastemaker.errors import TrainingError
from tastemaker.model import LanguageModel
from tastemaker.stages import sft
from tastemaker.stages.sft import Example
from tastemaker.training import Loss


def fail(numbers: str, step: int, command: Sequence[str]) -> None:
    """This process's part in the command; it ends here."""
    loss, calls = sft._example_loss, list[int]()

    def failing(policy: LanguageModel, batch: Sequence[Example], num_tokens: float) -> Loss:
        calls.append(len(batch))
        if str(processes.number()) in numbers and len(calls) == step:
            time.sleep(processes.is_first())
            raise TrainingError("made to fail", finding="not-finite")
        return loss(policy, batch, num_tokens)

    sft._example_loss = failing
    run_command(command)


if __name__ == "__main__":
    fail(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
