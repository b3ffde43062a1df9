"""Residual dropout in supervised fine-tuning: on in every step and off outside, its noise a function of the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.float64 import response_logprobs
from tests.models import save_model
from tests.stages.test_sft import DEMONSTRATIONS, config, train

from tastemaker.checkpoint import load_policy, save_policy
from tastemaker.metrics import read_metrics
from tastemaker.stages import sft
from tastemaker.stages.sft import encode_demonstrations

STILL = {"learning_rate": 1e-12, "schedule": "constant"}  # moves no weight that a float32 tells from another


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random policy of an architecture that has residual dropout."""
    return str(save_model(tmp_path_factory.mktemp("gpt2") / "model", "gpt2"))


def exact_loss(model: str, rows: Any) -> float:
    """The mean over the responses' tokens, without dropout."""
    policy = load_policy(model)
    losses: list[float] = []
    for example in encode_demonstrations(rows, policy.tokenizer, context=64):
        prompt_ids, response_ids = example.ids[: example.start], example.ids[example.start :]
        losses += (-response_logprobs(policy.library, prompt_ids, response_ids)).tolist()
    return sum(losses) / len(losses)


def test_every_step_has_dropout_and_noise_of_its_own(gpt2: str, tmp_path: Path) -> None:
    """The same demonstration three times by the same weights: without dropout the loss is the same each time."""
    one = DEMONSTRATIONS[2:3]
    exact, losses = exact_loss(gpt2, one), dict[float, list[float]]()
    for dropout in (0.0, 0.5):
        folder = tmp_path / str(dropout)
        train(folder, gpt2, config(epochs=3, batch_size=1, residual_dropout=dropout, optimizer=STILL), one)
        losses[dropout] = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
    assert losses[0.0] == pytest.approx([exact] * 3, abs=5e-6)
    noisy = [exact, *losses[0.5]]
    assert min(abs(a - b) for place, a in enumerate(noisy) for b in noisy[:place]) > 1e-3


def test_an_epoch_is_measured_without_dropout(gpt2: str, tmp_path: Path) -> None:
    held_out = DEMONSTRATIONS[:5]
    train(tmp_path, gpt2, config(residual_dropout=0.5), validation=held_out)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    measured = [row["validation_loss"] for row in rows if "validation_loss" in row]
    kept = [exact_loss(str(tmp_path / "epochs" / name), held_out) for name in ("01", "02")]
    assert measured == pytest.approx(kept, abs=5e-6)
    assert abs(kept[0] - kept[1]) > 1e-3


def test_a_run_killed_between_checkpoints_draws_the_same_noise(
    gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process comes with other random numbers. Killed while it keeps the first epoch's model, the third step,
    the run goes on after the second."""
    settings = config(residual_dropout=0.5, checkpoint_every=2)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    torch.manual_seed(11)
    train(tmp_path / "whole", gpt2, settings)
    torch.manual_seed(12)
    monkeypatch.setattr(sft, "save_policy", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "torn", gpt2, settings)
    torch.manual_seed(13)
    monkeypatch.setattr(sft, "save_policy", save_policy)
    train(tmp_path / "torn", gpt2, settings)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "torn")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "torn")]
    assert models[0] == models[1]
