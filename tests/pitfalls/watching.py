"""What training hands to its optimizers, watched from the engine: the rows, gradient and report of every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tastemaker.training import Loss, StepReport, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step: who took it, on which micro-batches, along which gradient (before clipping)."""

    trainer: Trainer
    microbatches: tuple[Any, ...]
    gradient: Tensor
    report: StepReport


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """A list that every optimizer step from now on is added to."""
    steps, gathered = list[Step](), list[Any]()
    accumulate, apply = Trainer.accumulate, Trainer.apply

    def watched_accumulate(
        self: Trainer,
        microbatches: Iterable[Any],
        loss_fn: Callable[[Any, float], Loss],
        denominator: float,
        *,
        last: bool = True,
    ) -> tuple[float, dict[str, float]]:
        parts = list(microbatches)
        gathered.extend(parts)
        return accumulate(self, parts, loss_fn, denominator, last=last)

    def watched_apply(self: Trainer, loss: float, sums: Mapping[str, float]) -> StepReport:
        gradient = gradient_of(self.parameters)
        report = apply(self, loss, sums)
        steps.append(Step(trainer=self, microbatches=tuple(gathered), gradient=gradient, report=report))
        gathered.clear()
        return report

    monkeypatch.setattr(Trainer, "accumulate", watched_accumulate)
    monkeypatch.setattr(Trainer, "apply", watched_apply)
    return steps


def gradient_of(parameters: Iterable[Tensor]) -> Tensor:
    """The gradients of all parameters end to end; of one that has none, zeros."""
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    return torch.cat([part.detach().flatten() for part in parts]).clone()


def values_of(parameters: Iterable[Tensor]) -> Tensor:
    """The parameters themselves end to end."""
    return torch.cat([one.detach().flatten() for one in parameters]).clone()


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two gradients, as a share of the expected one's length."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
