"""Optimizer steps over micro-batches.

Who divides a loss by what is where RLHF goes silently wrong, so it is said in one place: the caller counts a
denominator over the whole step, every micro-batch's loss is its own sum over that denominator, and gradients add up.
The number of micro-batches therefore changes nothing. Gradients are clipped by their global norm, which is reported as
it was before. A loss or a gradient that is not finite stops training before it can reach the weights.

The learning rate is a function of the optimizer step, counted from 0 to `total_steps`.

Several processes are given the same micro-batches, and each takes its turns at them (`parallel`): the step is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tastemaker import parallel, processes
from tastemaker.compiled import compile_layers
from tastemaker.console import say
from tastemaker.errors import ConfigError, TrainingError
from tastemaker.recompute import layers_in, layers_recomputed
from tastemaker.settings import OptimizerConfig

Batch = TypeVar("Batch")

TOTAL = "total"  # beside the names of sums: the loss itself


@dataclass(frozen=True, slots=True)
class Loss:
    """A micro-batch's share of the step's loss, already divided, and what else was summed over it for the metrics.

    Sums are tensors without dimensions on the loss's device, so that nobody waits for a GPU to read them.
    """

    value: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step: the summed loss, the sums of its micro-batches, the gradient's norm before clipping."""

    loss: float
    sums: Mapping[str, float]
    grad_norm: float
    learning_rate: float


class Trainer:
    """Trains the parameters of `module` that require gradients; of several processes each holds a part of them all."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, total_steps: int) -> None:
        if total_steps < 1:
            raise TrainingError(f"there are {total_steps} optimizer steps to take; give more data or more epochs.")
        self.module, self.config, self.total_steps = module, config, total_steps
        if config.warmup_steps >= total_steps:
            highest = config.learning_rate * learning_rate_factor(config, total_steps - 1, total_steps)
            say(
                f"  the learning rate rises to the end, and comes to {highest:.2g} of {config.learning_rate:.2g}: its "
                f"warm-up is {config.warmup_steps} of {total_steps} optimizer steps; shorten it"
            )
        if config.compile and processes.several():
            raise ConfigError("compile is for one process; set it to false, or start one.")
        if config.precision == "bfloat16":
            parallel.warn_of_slow_bf16()
        parallel.shard(module, layers_in(module))
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.steps_taken = 0
        if config.compile:
            compile_layers(module)

    def autocast(self) -> torch.autocast:
        """The precision that forward passes run in."""
        device = self.parameters[0].device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def step(
        self, microbatches: Iterable[Batch], loss_fn: Callable[[Batch, float], Loss], denominator: float
    ) -> StepReport:
        """One optimizer step over all `microbatches`; each loss is divided by `denominator`."""
        loss, sums = self.accumulate(microbatches, loss_fn, denominator)
        return self.apply(loss, sums)

    def accumulate(
        self,
        microbatches: Iterable[Batch],
        loss_fn: Callable[[Batch, float], Loss],
        denominator: float,
        *,
        last: bool = True,
    ) -> tuple[float, dict[str, float]]:
        """Add the gradients of `microbatches` to those already there, without stepping. Returns the loss and sums.

        Once a step, at the end of the `last` micro-batches before it, gradients are added up over processes.
        """
        sums = dict[str, Tensor]()  # read once, at the end: reading waits for a GPU
        with layers_recomputed(self.module) if self.config.gradient_checkpointing else nullcontext():
            for turn in parallel.turns(microbatches):
                with self.autocast():
                    loss = loss_fn(turn.item, denominator)
                parallel.sync_gradients(self.module, last and turn.last)
                (loss.value if turn.counts else 0 * loss.value).backward()  # type: ignore[no-untyped-call]
                for name, amount in {TOTAL: loss.value, **loss.sums}.items():
                    counted = amount.detach().double() if turn.counts else torch.zeros_like(amount, dtype=torch.double)
                    sums[name] = sums[name] + counted if name in sums else counted
        amounts = parallel.summed_amounts(torch.stack([*sums.values()]).tolist() if sums else [])
        found = dict(zip(sums, amounts, strict=True))
        total = found.pop(TOTAL, 0.0)
        self._check_finite("the loss", total)
        return total, found

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"{name} is {value} at optimizer step {self.steps_taken}; the weights were not changed. "
                "Usual causes: a learning rate that is too high, or data with extreme lengths or scores.",
                finding="not-finite",
            )

    def apply(self, loss: float, sums: Mapping[str, float]) -> StepReport:
        """Clip the accumulated gradients, take the step, clear them."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = parallel.total_norm(gradients)
        self._check_finite("the gradient's norm", norm)
        if norm > self.config.max_grad_norm:  # otherwise every gradient would be multiplied by 1
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, torch.tensor(norm))
        rate = self.config.learning_rate * learning_rate_factor(self.config, self.steps_taken, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_taken += 1
        return StepReport(loss=loss, sums=dict(sums), grad_norm=norm, learning_rate=rate)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the module's weights."""
        return {"optimizer": self.optimizer.state_dict(), "steps_taken": self.steps_taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        saved = state["optimizer"]
        moments = {
            int(place): parallel.all_laid_as(dict.fromkeys(tensors, self.parameters[int(place)]), tensors)
            for place, tensors in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": moments})
        self.steps_taken = int(state["steps_taken"])


def learning_rate_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The share of the peak learning rate at optimizer step `step` (the first is 0)."""
    if step < config.warmup_steps:
        return 0.1 + 0.9 * step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.floor + (1 - config.floor) * falling
