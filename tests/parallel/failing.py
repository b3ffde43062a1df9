"""`tastemaker` in several processes, the second of which fails in its second step of fine-tuning."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tastemaker import processes
from tastemaker.cli import main
from tastemaker.errors import TrainingError
from tastemaker.model import LanguageModel
from tastemaker.stages import sft
from tastemaker.stages.sft import Example
from tastemaker.training import Loss

loss, calls = sft._example_loss, list[int]()


def failing(policy: LanguageModel, batch: Sequence[Example], num_tokens: float) -> Loss:
    calls.append(len(batch))
    if processes.number() == 1 and len(calls) == 2:
        raise TrainingError("made to fail in its second step")
    return loss(policy, batch, num_tokens)


if __name__ == "__main__":
    sft._example_loss = failing
    sys.exit(main())
