"""Optimizer steps against AdamW written out in float64, and what stops training before it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.models import make_policy, random_sequences
from tests.work import counting
from torch import Tensor, nn

from tastemaker.corpus import next_token_places
from tastemaker.errors import ConfigError, TrainingError
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel
from tastemaker.packing import microbatches, pack
from tastemaker.training import Loss, OptimizerConfig, StepReport, Trainer, learning_rate_factor

CONSTANT = OptimizerConfig(learning_rate=0.1, schedule="constant")


class Weights(nn.Module):
    """A module that is one vector of five weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0]))


def pulled(module: Weights, batch: Tensor, denominator: float) -> Loss:
    """A loss whose gradient is `batch / denominator`."""
    return Loss((module.w * batch).sum() / denominator, {"rows": torch.ones(()), "pull": batch.sum()})


def step(trainer: Trainer, *batches: Sequence[float], denominator: float = 1.0) -> StepReport:
    assert isinstance(trainer.module, Weights)
    return trainer.step(map(torch.tensor, batches), partial(pulled, trainer.module), denominator)


# --- the optimizer ---------------------------------------------------------------------------------------------------


def test_adamw_with_clipping_and_a_schedule_is_the_formula() -> None:
    config = OptimizerConfig(
        learning_rate=0.03, schedule="linear", warmup_steps=2, betas=(0.8, 0.9), weight_decay=0.05, max_grad_norm=2.5
    )
    module, total = Weights(), 7
    trainer = Trainer(module, config, total_steps=total)
    gradients = np.random.default_rng(0).normal(size=(total, 5)) * np.array([0.1, 1, 3, 0.01, 1])
    w: npt.NDArray[np.float64] = module.w.detach().numpy().astype(np.float64)
    mean, square = np.zeros(5), np.zeros(5)
    for number, gradient in enumerate(gradients):
        report = step(trainer, gradient.astype(np.float32).tolist())
        norm = float(np.sqrt((gradient**2).sum()))
        assert report.grad_norm == pytest.approx(norm, rel=1e-5)  # as it was before clipping
        g = gradient * min(1.0, 2.5 / norm)
        rate = 0.03 * ([0.1, 0.55][number] if number < 2 else 0.1 + 0.9 * (1 - (number - 2) / 5))
        assert report.learning_rate == pytest.approx(rate)
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + 0.1 * g**2
        mean_hat, square_hat = mean / (1 - 0.8 ** (number + 1)), square / (1 - 0.9 ** (number + 1))
        w = w * (1 - rate * 0.05) - rate * mean_hat / (np.sqrt(square_hat) + 1e-8)
        np.testing.assert_allclose(module.w.detach().numpy(), w, rtol=0, atol=2e-6)
    assert trainer.steps_taken == total


def test_small_steps_are_not_lost_in_fp32() -> None:
    """Ten steps at the rate of reinforcement learning move the weights as float64 says; bf16 would not move at all."""
    module = Weights()
    start = module.w.detach().double().clone()
    trainer = Trainer(module, replace(CONSTANT, learning_rate=1e-6), total_steps=10)
    for _ in range(10):
        step(trainer, [0.3, -0.3, 0.3, -0.3, 0.3])  # Adam moves a weight with a steady gradient by the rate each step
    moved = (module.w.detach().double() - start).numpy()
    np.testing.assert_allclose(moved, [-1e-5, 1e-5, -1e-5, 1e-5, -1e-5], rtol=0.15)  # fp32 keeps 2.4e-7 of 3
    assert torch.equal(module.w.detach().bfloat16()[1:3], start.bfloat16()[1:3])


def test_the_gradients_norm_is_reported_before_clipping() -> None:
    trainer = Trainer(Weights(), replace(CONSTANT, max_grad_norm=1.0), total_steps=3)
    assert step(trainer, [3.0, 0.0, 4.0, 0.0, 0.0]).grad_norm == pytest.approx(5.0)
    assert step(trainer, [0.3, 0.0, 0.4, 0.0, 0.0]).grad_norm == pytest.approx(0.5)


def test_a_gradient_within_the_norm_is_left_alone() -> None:
    """Adam hides a constant scale, so two gradients of different size tell whether either was scaled."""
    clipped, free = Weights(), Weights()
    for module, norm in ((clipped, 1.0), (free, 100.0)):
        trainer = Trainer(module, replace(CONSTANT, max_grad_norm=norm), total_steps=2)
        step(trainer, [0.3, 0.0, 0.4, 0.0, 0.0])
        step(trainer, [30.0, 0.0, 40.0, 0.0, 0.0])
    assert float((clipped.w - free.w).detach().abs().max()) > 0.01


def test_only_what_requires_gradients_is_trained() -> None:
    free, frozen = Weights(), Weights()
    frozen.requires_grad_(False)
    trainer = Trainer(nn.ModuleList([free, frozen]), CONSTANT, total_steps=1)

    def loss(_: int, denominator: float) -> Loss:
        return Loss(((free.w**2).sum() + (frozen.w**2).sum()) / denominator)

    trainer.step([0], loss, 1.0)
    assert torch.equal(frozen.w, Weights().w)
    assert not torch.equal(free.w, Weights().w)


# --- micro-batches ---------------------------------------------------------------------------------------------------


def test_losses_sums_and_gradients_add_up() -> None:
    trainer = Trainer(Weights(), CONSTANT, total_steps=2)
    # w . (1, 0, 2, 0, 0) = 4.5 and w . (0, 1, 0, 0, 1) = -4, divided by 5
    report = step(trainer, [1.0, 0, 2, 0, 0], [0, 1.0, 0, 0, 1], denominator=5)
    assert report.loss == pytest.approx(0.1)
    assert report.sums == {"rows": 2.0, "pull": 5.0}
    assert report.grad_norm == pytest.approx(math.sqrt(7) / 5)
    again = step(trainer, [0.0] * 5, denominator=5)
    assert again.grad_norm == 0, "the last step's gradients were not cleared"


SEQUENCES = random_sequences([5, 2, 11, 3, 7])


def sequence_loss(policy: LanguageModel, group: Sequence[int], num_tokens: float) -> Loss:
    packed = pack([SEQUENCES[index] for index in group])
    logprob_M = policy.predict(packed, *next_token_places(packed)).logprob_M
    return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))


def test_the_number_of_microbatches_changes_nothing() -> None:
    config = OptimizerConfig(learning_rate=1e-3, epsilon=1e-5)  # Adam turns rounding of gradients near 0 into steps
    weights, reports = [], []
    for budget in (1, 15, 1000):
        policy = make_policy()
        trainer = Trainer(policy, config, total_steps=3)
        groups = microbatches([len(ids) for ids in SEQUENCES], budget=budget)
        reports.append([trainer.step(groups, partial(sequence_loss, policy), 23.0) for _ in range(3)])
        weights.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
    for other in (1, 2):
        torch.testing.assert_close(weights[other], weights[0], rtol=0, atol=1e-6)
        for found, expected in zip(reports[other], reports[0], strict=True):
            assert found.loss == pytest.approx(expected.loss, abs=1e-6)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_two_losses_accumulate_into_one_step() -> None:
    together, apart = Weights(), Weights()
    one = Trainer(together, CONSTANT, total_steps=1)
    step(one, [1.0, -2, 0.5, 0, 3])
    two = Trainer(apart, CONSTANT, total_steps=1)
    loss, sums = two.accumulate([torch.tensor([1.0, -2, 0, 0, 0])], partial(pulled, apart), 1.0)
    two.accumulate([torch.tensor([0, 0, 1.0, 0, 6])], partial(pulled, apart), 2.0)
    report = two.apply(loss, sums)
    assert torch.equal(together.w, apart.w)
    assert report.loss == pytest.approx(2.5)
    assert two.steps_taken == 1


def test_numbers_are_read_once_however_many_microbatches() -> None:
    """Each read waits for a GPU."""
    reads = []
    for batches in ([[1.0, 2, 3, 4, 5]], [[1.0, 0, 0, 0, 5], [0, 2.0, 0, 4, 0], [0, 0, 3.0, 0, 0]]):
        module = Weights()
        trainer = Trainer(module, CONSTANT, total_steps=1)
        with counting() as work:
            loss, sums = trainer.accumulate(map(torch.tensor, batches), partial(pulled, module), 1.0)
        assert loss == pytest.approx(0.5 - 2 + 6 - 15)
        assert sums == {"rows": len(batches), "pull": 15}
        reads.append(work.operators["_local_scalar_dense"])
    assert reads[0] == reads[1] == 0  # of a processor's memory all at once, without an operator


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # four steps of warm-up from a tenth, then eight down to a fifth; the middle of the fall is at step 8
        ("cosine", {0: 0.1, 1: 0.325, 3: 0.775, 4: 1.0, 6: 0.8828427, 8: 0.6, 12: 0.2, 99: 0.2}),
        ("linear", {0: 0.1, 2: 0.55, 4: 1.0, 6: 0.8, 8: 0.6, 10: 0.4, 12: 0.2, 99: 0.2}),
        ("constant", {0: 0.1, 3: 0.775, 4: 1.0, 8: 1.0, 99: 1.0}),
    ],
)
def test_schedules_by_hand(schedule: Any, expected: dict[int, float]) -> None:
    config = OptimizerConfig(learning_rate=7.0, schedule=schedule, floor=0.2, warmup_steps=4)
    for place, factor in expected.items():
        assert learning_rate_factor(config, place, 12) == pytest.approx(factor, abs=1e-6), place


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    for schedule in ("cosine", "linear", "constant"):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule)
        assert learning_rate_factor(config, 0, 10) == 1.0
        assert learning_rate_factor(config, 0, 1) == 1.0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights(bad: float) -> None:
    trainer = Trainer(Weights(), CONSTANT, total_steps=2)
    good = [1.0, 0, 0, 0, 0]
    with pytest.raises(TrainingError, match=f"the loss is {bad} at optimizer step 0; the weights were not changed"):
        step(trainer, good, [bad, 0, 0, 0, 0])
    assert torch.equal(trainer.parameters[0], Weights().w)
    assert trainer.steps_taken == 0
    assert step(trainer, good).grad_norm == pytest.approx(1), "gradients of the refused step were kept"


def test_a_gradient_that_is_not_finite_stops_before_the_weights() -> None:
    module = Weights()
    trainer = Trainer(module, CONSTANT, total_steps=2)

    def loss(_: int, denominator: float) -> Loss:
        return Loss((module.w * 0).abs().sqrt().sum() / denominator)  # 0, with the slope of a root at 0

    with pytest.raises(TrainingError, match="gradient's norm is nan at optimizer step 0; the weights were not changed"):
        trainer.step([0], loss, 1.0)
    assert torch.equal(module.w, Weights().w)
    assert step(trainer, [1.0, 0, 0, 0, 0]).grad_norm == pytest.approx(1)


def test_nothing_to_take_is_refused() -> None:
    with pytest.raises(TrainingError, match="there are 0 optimizer steps"):
        Trainer(Weights(), CONSTANT, total_steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": math.nan}, "above 0"),
        ({"floor": 1.5}, "from 0 to 1"),
    ],
)
def test_configs_that_cannot_be_meant(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONSTANT, **changes)  # type: ignore[arg-type]


# --- precision and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_in_bf16_weights_in_fp32(precision: Any, dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2)
    trainer = Trainer(module, replace(CONSTANT, precision=precision), total_steps=1)
    seen = []

    def loss(batch: Tensor, denominator: float) -> Loss:
        out = module(batch)
        seen.append(out.dtype)
        return Loss(out.float().sum() / denominator)

    trainer.step([torch.ones(1, 3)], loss, 1.0)
    assert seen == [dtype]
    assert module.weight.dtype == torch.float32
    assert trainer.optimizer.state[module.weight]["exp_avg"].dtype == torch.float32


def test_a_state_continues_where_it_was_taken() -> None:
    gradients = [[1.0, -2, 3, 0.1, 0], [0.5, 2, -1, 0.2, 1], [-1.0, 1, 1, 0.3, 0], [2.0, 0, 1, 0.1, 1]]
    whole = Trainer(Weights(), OptimizerConfig(learning_rate=0.1, warmup_steps=2), total_steps=4)
    for gradient in gradients:
        step(whole, gradient)
    first = Trainer(Weights(), whole.config, total_steps=4)
    for gradient in gradients[:2]:
        step(first, gradient)
    second = Trainer(Weights(), whole.config, total_steps=4)
    second.module.load_state_dict(first.module.state_dict())
    second.load_state(first.state())
    for gradient in gradients[2:]:
        step(second, gradient)
    assert second.steps_taken == 4
    assert torch.equal(second.parameters[0], whole.parameters[0])


@pytest.mark.parametrize(("warmup", "said"), [(4, False), (5, True), (9, True)])
def test_a_warm_up_that_outlasts_training_is_said(warmup: int, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 9 steps of warm-up the fifth is at 0.1 + 0.9 * 4 / 9 = half the rate."""
    Trainer(Weights(), OptimizerConfig(learning_rate=2e-3, schedule="constant", warmup_steps=warmup), total_steps=5)
    heard = capsys.readouterr().err
    assert ("the learning rate rises to the end" in heard) == said
    assert warmup != 9 or "comes to 0.001 of 0.002: its warm-up is 9 of 5 optimizer steps" in heard
