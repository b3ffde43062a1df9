"""The same seed gives the same bytes at every stage, and a run that was killed anywhere gives them too."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stages import test_dpo, test_ppo, test_reward, test_sft

from tastemaker.artefacts import hash_path
from tastemaker.metrics import read_metrics
from tastemaker.stages.dpo import train_dpo
from tastemaker.stages.ppo import train_ppo
from tastemaker.stages.reward import train_reward_model
from tastemaker.stages.sft import train_sft
from tastemaker.training import StepReport, Trainer

CPU = torch.device("cpu")
ADAM = {"learning_rate": 3e-3, "warmup_steps": 2}
Outcome = tuple[dict[str, str], list[dict[str, Any]]]


def run_sft(folder: Path, base: str, every: int, seed: int) -> None:
    """7 demonstrations in batches of 3, and pretraining text in every other one: 3 steps an epoch."""
    train_sft(
        folder,
        config=test_sft.config(checkpoint_every=every, pretraining_mix=0.14, optimizer=ADAM),
        base=base,
        demonstrations=test_sft.DEMONSTRATIONS,
        validation=test_sft.DEMONSTRATIONS[:2],
        pretraining=test_sft.TEXTS,
        device=CPU,
        seed=seed,
    )


def run_reward(folder: Path, base: str, every: int, seed: int) -> None:
    """13 rankings in batches of 5: 3 steps an epoch."""
    train_reward_model(
        folder,
        config=test_reward.config(checkpoint_every=every, epochs=2, optimizer=ADAM),
        init=base,
        rankings=test_reward.RANKINGS[:13],
        validation=test_reward.RANKINGS[13:17],
        demonstrations=test_sft.DEMONSTRATIONS[:3],
        device=CPU,
        seed=seed,
    )


def run_dpo(folder: Path, base: str, every: int, seed: int) -> None:
    """22 pairs in batches of 7: 4 steps an epoch."""
    train_dpo(
        folder,
        config=test_dpo.config(checkpoint_every=every, batch_size=7, optimizer=ADAM),
        init=base,
        rankings=test_dpo.RANKINGS,
        validation=test_dpo.RANKINGS[:3],
        device=CPU,
        seed=seed,
    )


def run_reward_pairs(folder: Path, base: str, every: int, seed: int) -> None:
    """31 rankings as pairs in an order of their own, 4 steps, and folds of raters, each with a training of its own."""
    train_reward_model(
        folder,
        config=test_reward.config(
            checkpoint_every=every, optimizer=ADAM, grouping="pairs", cross_validation_folds=2, batch_size=9
        ),
        init=base,
        rankings=test_reward.RANKINGS,
        device=CPU,
        seed=seed,
    )


def run_ppo(folder: Path, base: str, every: int, seed: int, **changes: Any) -> None:
    """2 iterations of 3 minibatches, each a step of the policy and one of the value function; everything on."""
    adam = {"learning_rate": 3e-3}
    train_ppo(
        folder,
        config=test_ppo.config(
            iterations=2,
            checkpoint_every=every,
            adaptive_kl={"target": 0.05, "horizon": 20.0},
            ptx_coef=0.5,
            policy=adam,
            value=adam,
            **changes,
        ),
        init=base,
        reward=None,
        scorer=test_ppo.count_of("w7"),
        prompts=test_ppo.PROMPTS,
        pretraining=test_ppo.TEXTS,
        heldout_text=test_ppo.HELD_OUT,
        device=CPU,
        seed=seed,
    )


# Each with the number of optimizer steps that it takes.
RUNS: Mapping[str, tuple[Callable[[Path, str, int, int], None], int]] = {
    "sft": (run_sft, 2 * 3),
    "reward": (run_reward, 2 * 3),
    "dpo": (run_dpo, 2 * 4),
    "ppo": (run_ppo, 2 * 3 * 2),
    "ppo by adapters": (partial(run_ppo, lora={"rank": 3, "alpha": 7}), 2 * 3 * 2),
    "ppo on one trunk": (partial(run_ppo, value_function="shared"), 2 * 3),
    "reward by pairs": (run_reward_pairs, 2 * 4),
}
every_stage = pytest.mark.parametrize("stage", RUNS)


def outcome(folder: Path) -> Outcome:
    """The hash of every model's weights, and the metrics without their timings."""
    weights = {str(path.relative_to(folder)): hash_path(path) for path in sorted(folder.rglob("model.safetensors"))}
    assert weights
    return weights, [row | {"seconds": 0} for row in read_metrics(folder / "metrics.jsonl")]


def disturb(number: int) -> None:
    """Random numbers as another process may have left them."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_at(number: int, *, after: bool) -> Iterator[None]:
    """Ends the process at that optimizer step, before or after it has changed the weights."""
    apply, taken = Trainer.apply, [0]

    def torn(self: Trainer, loss: float, sums: Mapping[str, float]) -> StepReport:
        taken[0] += 1
        if taken[0] == number and not after:
            raise Killed
        report = apply(self, loss, sums)
        if taken[0] == number:
            raise Killed
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "apply", torn)
        yield


@every_stage
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(stage: str, base: str, tmp_path: Path) -> None:
    run, _ = RUNS[stage]
    found = []
    for number, seed in enumerate((5, 5, 6)):
        disturb(number)
        run(tmp_path / str(number), base, 2, seed)
        found.append(outcome(tmp_path / str(number)))
    assert found[0] == found[1]
    assert all(found[0][0][name] != found[2][0][name] for name in found[0][0])


@every_stage
def test_a_run_killed_at_any_optimizer_step_ends_as_one_that_was_not(stage: str, base: str, tmp_path: Path) -> None:
    """At drawn steps, before or after the weights change, inside an epoch and at its end, up to two times."""
    run, steps = RUNS[stage]
    run(tmp_path / "whole", base, 100, 5)
    whole, tries = outcome(tmp_path / "whole"), [0]

    @settings(max_examples=5)
    @given(
        kills=st.lists(st.tuples(st.integers(1, steps), st.booleans()), min_size=1, max_size=2),
        every=st.integers(1, 3),
    )
    def check(kills: list[tuple[int, bool]], every: int) -> None:
        tries[0] += 1
        folder = tmp_path / f"torn-{tries[0]}"
        for number, after in kills:
            disturb(number)
            try:
                with killed_at(number, after=after):
                    run(folder, base, every, 5)
            except Killed:
                continue
            break  # what was left after the first kill had fewer steps
        else:
            run(folder, base, every, 5)
        assert outcome(folder) == whole

    check()
    assert tries[0] > 2
