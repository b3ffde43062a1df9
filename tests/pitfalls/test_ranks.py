"""Pitfalls of many processes: empty answers, synced gradients, uneven batches, seeds. Two real ones, by torchrun."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.parallel import jobs
from tests.parallel.driver import SEQUENCES, lm_loss
from tests.parallel.launching import drive

from tastemaker.checkpoint import load_policy
from tastemaker.generation import FinishReason
from tastemaker.metrics import read_metrics
from tastemaker.stages.ppo import PpoRun
from tastemaker.training import OptimizerConfig, Trainer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what two processes have made of them."""
    place = tmp_path_factory.mktemp("ranks")
    jobs.make_models(place / "models")
    drive(place, "syncing", "sampling")
    return place


def found(folder: Path, job: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "several" / job / "found.json").read_text())
    return read


def run_of(models: Path, **changes: Any) -> PpoRun:
    config = jobs.ppo_config(**changes)
    names = (str(models / "ending" / "model"), str(models / "judge"))
    return PpoRun(config, *names, jobs.scorer(models), jobs.PROMPTS, jobs.TEXTS, (), jobs.CPU, 3)


def test_15_empty_answers_keep_their_place(tmp_path: Path) -> None:
    """Each rank drops its empty answers, so ranks have batches of different sizes and wait for one another for ever.

    Source: DeepSpeed-Chat's `_generate_sequence` (microsoft/DeepSpeedExamples).
    Here: nothing is dropped; an answer that trains nothing keeps its place with a mask of False, and every process has
    as many turns at the micro-batches (`parallel.turns`). The result is that of one process.
    """
    models = tmp_path / "models"
    jobs.make_models(models)
    run = run_of(models)
    rollouts = run.roll_out(run.draw_prompt(0, 9), 0)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    assert lengths.count(1) >= 2, "answers of nothing but the end token"
    assert any(rollout.finish is FinishReason.LENGTH for rollout in rollouts), "answers that train nothing"
    drive(tmp_path, "ppo")
    jobs.ppo(tmp_path / "one", models)
    one, several = (jobs.weights(tmp_path / place / "model") for place in ("one", "several/ppo"))
    assert jobs.largest_difference(one, several) < TOLERANCE


def test_42_gradients_are_synced_on_the_last_micro_batch_alone(folder: Path) -> None:
    """Gradients are synced on every micro-batch, which costs time, or not on the last, which discards them.

    Source: NVIDIA-NeMo/RL#3660, allenai/open-instruct#1498.
    Here: `Trainer.accumulate` turns syncing on for the last micro-batch of a step (`parallel.sync_gradients`). Before
    it no process has a gradient in parts; after it their sum is one process's gradient.
    """
    several = found(folder, "syncing")
    assert several["synced_before"] == [[False] * 3] * 2, "three turns each at five micro-batches in two parts"
    policy = load_policy(str(folder / "models" / "tied"))
    trainer = Trainer(policy, OptimizerConfig(learning_rate=1e-3), total_steps=1)
    loss_fn = partial(lm_loss, policy, [], trainer)
    first, _ = trainer.accumulate([0, 1, 2], loss_fn, 7.0)
    second, _ = trainer.accumulate([3, 4], loss_fn, 5.0)
    assert len(SEQUENCES) == 5
    expected = [None if each.grad is None else float(each.grad.double().sum()) for each in trainer.parameters]
    assert several["gradients"] == pytest.approx(expected, abs=1e-4, rel=1e-4)
    report = trainer.apply(first + second, {})
    assert several["loss"] == pytest.approx(report.loss, rel=1e-5)
    assert several["grad_norm"] == pytest.approx(report.grad_norm, rel=1e-5)


def test_42_every_process_holds_a_part_of_each_gradient(folder: Path) -> None:
    """And tied embeddings stay tied."""
    several = found(folder, "syncing")
    policy = load_policy(str(folder / "models" / "tied"))
    sizes = [parameter.numel() for parameter in policy.parameters()]
    assert [sum(parts) for parts in zip(*several["pieces"], strict=True)] == sizes
    assert all(part < size for parts in several["pieces"] for part, size in zip(parts, sizes, strict=True))
    assert several["tied"] == [True, True]


def test_48_an_uneven_last_batch_is_that_of_one_process(tmp_path: Path) -> None:
    """A rank without data hangs the others; or a batch that does not come out even counts some of it twice; or
    gradients are averaged over ranks, though losses were divided by the whole batch's count already.

    Source: no one system is named; samplers of several ranks pad their data so.
    Here: 5 demonstrations in batches of 2; at the last one the second process has none, computes the first's again and
    multiplies its gradient by 0 (`parallel.turns`, `Trainer.accumulate`).
    """
    models = tmp_path / "models"
    jobs.make_models(models)
    drive(tmp_path, "lone")
    jobs.lone(tmp_path / "one", models)
    places = [tmp_path / "one", tmp_path / "several" / "lone"]
    one, several = (jobs.weights(place / "model") for place in places)
    assert jobs.largest_difference(one, several) < TOLERANCE
    assert jobs.moved(one, jobs.weights(models / "base")) > 100 * TOLERANCE
    rows, others = (read_metrics(place / "metrics.jsonl") for place in places)
    assert len(rows) == len(others) == 6
    for row, other in zip(rows, others, strict=True):
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


def test_64_a_sample_depends_on_its_place_and_on_no_rank(folder: Path) -> None:
    """All ranks have one seed and draw the same samples; or each has its own, and another number of ranks has others.

    Source: volcengine/verl#5179.
    Here: a response's seed is a hash of the run's seed, the iteration and its place in the batch
    (`responses.seed_for`); `parallel.in_shares` hands out places. Nine responses to one prompt differ, and two
    processes draw those of one.
    """
    run = PpoRun(
        jobs.ppo_config(decoding={"max_new_tokens": 6}, ptx_coef=0.0, batch_size=9),
        str(folder / "models" / "base"),
        str(folder / "models" / "judge"),
        jobs.scorer(folder / "models"),
        [jobs.PROMPTS[0]],
        (),
        (),
        jobs.CPU,
        3,
    )
    drawn = [list(rollout.response_ids) for rollout in run.roll_out([0] * 9, 0)]
    several = found(folder, "sampling")["responses"]
    assert several == drawn
    assert several[0:8:2] != several[1::2]
    assert len({tuple(ids) for ids in several}) > 4
    assert [list(rollout.response_ids) for rollout in run.roll_out([0] * 9, 1)] != drawn, "another iteration"
    run.seed = 4
    assert [list(rollout.response_ids) for rollout in run.roll_out([0] * 9, 0)] != drawn, "another run"


def test_64_noise_differs_between_processes(folder: Path) -> None:
    """What belongs to no sample, such as dropout's noise, is drawn from a seed of each process's own."""
    first, second = found(folder, "sampling")["noise"]
    assert len(first) == len(second) > 4
    assert not set(first) & set(second)
