"""PPO from iteration to iteration: what each one draws, how fast it learns, and that a killed run resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.test_ppo import CPU, PROMPTS, TEXTS, config, run_of

from tastemaker.metrics import read_metrics
from tastemaker.packing import Packed
from tastemaker.records import Prompt, Response
from tastemaker.stages.ppo import train_ppo
from tastemaker.training import Loss


class Watched:
    """Counts a word, remembers the prompts, and dies at its `last` call if there is one."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.prompts = last, list[list[str]]()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        self.prompts.append([prompt.key for prompt in prompts])
        if len(self.prompts) == self.last:
            raise KeyboardInterrupt
        return [float(response.text.split().count("w7")) for response in responses]


def passes(drawn: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [drawn[start : start + count] for start in range(0, len(drawn), count)]


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_every_prompt_is_asked_once_before_any_is_asked_again(base: str) -> None:
    """7 iterations of 3 episodes are 3 passes over 7 prompts, each in an order of its own."""
    run = run_of(base, iterations=7, batch_size=3, minibatches=1)
    run.scorer = watched = Watched()
    for iteration in range(7):
        run.step(iteration)
    rounds = passes([key for keys in watched.prompts for key in keys], len(PROMPTS))
    assert [sorted(keys) for keys in rounds] == [sorted(prompt.key for prompt in PROMPTS)] * 3
    assert len({tuple(keys) for keys in rounds}) == 3


def test_every_text_is_read_once_before_any_is_read_again(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 iterations of 2 inner epochs of 3 minibatches of 2 episodes, with a text each: 36 of 13 texts' passes."""
    run = run_of(base, texts=TEXTS, iterations=3, inner_epochs=2, ptx_coef=0.5, ptx_examples_per_episode=1.0)
    read, loss = list[tuple[int, ...]](), run._ptx_loss

    def spy(packed: Packed, num_tokens: float) -> Loss:
        read.extend(tuple(part.tolist()) for part in torch.split(packed.id_N, list(packed.lengths)))
        return loss(packed, num_tokens)

    monkeypatch.setattr(run, "_ptx_loss", spy)
    for iteration in range(3):
        run.step(iteration)
    assert len(read) == 3 * 2 * 3 * 2
    assert [len(set(texts)) for texts in passes(read, len(TEXTS))] == [13, 13, 10]


def test_the_same_prompt_is_answered_anew_each_time(base: str) -> None:
    """By the same weights: in another iteration, at another place of the batch, under another seed of the run."""
    run, other = run_of(base), run_of(base, seed=4)
    first, again, later, elsewhere = (
        [tuple(rollout.response_ids) for rollout in run_.roll_out([2] * 6, iteration)]
        for run_, iteration in ((run, 0), (run, 0), (run, 1), (other, 0))
    )
    assert first == again
    assert len({*first, *later, *elsewhere}) == 18


# --- learning rates -------------------------------------------------------------------------------------------------


def test_warmup_is_counted_in_iterations(base: str) -> None:
    """3 iterations of 2 inner epochs of 3 minibatches are 18 steps, 12 of them warm-up: a step s of it has
    0.1 + 0.9 s / 12 of the peak. An iteration's last steps are 5, 11 and 17. Then the policy's rate stays, and the
    value's falls linearly to a tenth: at step 17 five of six steps have passed, 0.1 + 0.9 / 6 = 0.25."""
    run = run_of(
        base,
        iterations=3,
        inner_epochs=2,
        warmup_iterations=2,
        policy={"learning_rate": 0.002, "schedule": "constant"},
        value={"learning_rate": 0.003, "schedule": "linear"},
    )
    rows = [run.step(iteration) for iteration in range(3)]
    assert [row["learning_rate"] / 0.002 for row in rows] == pytest.approx([0.475, 0.925, 1.0], abs=1e-9)
    assert [row["value_learning_rate"] / 0.003 for row in rows] == pytest.approx([0.475, 0.925, 0.25], abs=1e-9)


# --- killed and resumed ---------------------------------------------------------------------------------------------


def train(folder: Path, base: str, scorer: Watched) -> None:
    adam = {"learning_rate": 0.01, "schedule": "constant"}
    settings = config(
        iterations=5,
        checkpoint_every=2,
        kl_coef=0.3,
        adaptive_kl={"target": 0.05, "horizon": 20.0},
        ptx_coef=0.5,
        policy=adam,
        value=adam,
    )
    train_ppo(
        folder,
        config=settings,
        init=base,
        reward=None,
        scorer=scorer,
        prompts=PROMPTS,
        pretraining=TEXTS,
        device=CPU,
        seed=3,
    )


def test_a_run_killed_between_checkpoints_ends_as_one_that_was_not(base: str, tmp_path: Path) -> None:
    """Killed in the fourth iteration it goes on after the second, with the KL coefficient that it had reached."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train(whole, base, Watched())
    with pytest.raises(KeyboardInterrupt):
        train(torn, base, Watched(last=4))
    rest = Watched()
    train(torn, base, rest)
    assert len(rest.prompts) == 3
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (whole, torn)]
    assert [row | {"seconds": 0} for row in rows[0]] == [row | {"seconds": 0} for row in rows[1]]
    coefficients = [row["kl_coef"] for row in rows[0]]
    assert len(set(coefficients)) == 5, "the coefficient is steered in every iteration"
    assert min(coefficients) < 0.3 < max(coefficients)
    for model in ("model", "model-ema"):
        weights = [(folder / model / "model.safetensors").read_bytes() for folder in (whole, torn)]
        assert weights[0] == weights[1]
