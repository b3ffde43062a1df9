"""Supervised fine-tuning: what is predicted, over what it is divided, what is kept, and that it learns to stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.conftest import demonstration, prompt
from transformers import AutoModelForCausalLM

from tastemaker.checkpoint import load_policy
from tastemaker.config import from_mapping
from tastemaker.errors import DataError, ModelError
from tastemaker.metrics import read_metrics
from tastemaker.records import Text
from tastemaker.responses import DecodingConfig, sample_responses
from tastemaker.stages import sft
from tastemaker.stages.sft import Example, SftConfig, demonstration_loss, encode_demonstrations, select_epoch, train_sft
from tastemaker.training import Loss, StepReport, Trainer

CPU = torch.device("cpu")
DEMONSTRATIONS = [
    demonstration(f"w{n} w{n + 1}", " ".join(f"w{n + k}" for k in range(n % 3 + 1))) for n in range(5, 12)
]
TEXTS = [Text(text=" ".join(f"w{(5 * place + number) % 90}" for place in range(9))) for number in range(5)]


def config(**changes: Any) -> SftConfig:
    small: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 3,
        "residual_dropout": 0.0,
        "optimizer": {"learning_rate": 1e-3},
    }
    return from_mapping(SftConfig, small | changes, where="test")


def train(folder: Path, base: str, settings: SftConfig, rows: Sequence[Any] = DEMONSTRATIONS, **more: Any) -> Path:
    return train_sft(folder, config=settings, base=base, demonstrations=rows, device=CPU, seed=2, **more)


def test_validation_runs_in_the_precision_of_training(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spied(*arguments: Any) -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        return demonstration_loss(*arguments)

    monkeypatch.setattr(sft, "demonstration_loss", spied)
    settings = config(optimizer={"learning_rate": 1e-3, "precision": "bfloat16"})
    train(tmp_path / "sft", base, settings, validation=DEMONSTRATIONS[:2])
    assert seen == [True, True]


def test_the_loss_is_the_librarys_with_the_prompt_masked(base: str) -> None:
    policy = load_policy(base)
    library = AutoModelForCausalLM.from_pretrained(base)
    examples = encode_demonstrations(DEMONSTRATIONS, policy.tokenizer, context=64)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.arange(ids.shape[1]) < example.start, -100, ids)
        total += library(input_ids=ids, labels=labels).loss.item() * example.num_predicted
        count += example.num_predicted
    for budget in (1, 23, 10_000):
        assert demonstration_loss(policy, examples, budget) == pytest.approx(total / count, abs=1e-5)


def test_the_end_token_is_predicted_and_the_prompt_is_not(base: str) -> None:
    """`w5 w6` after <bos> w0 and before w1, then the response of three words and <eos>: ids of wN are N + 4."""
    tokenizer = load_policy(base).tokenizer
    (example,) = encode_demonstrations([demonstration("w5 w6", "w7 w8 w9")], tokenizer, context=64)
    assert example.ids == (1, 4, 9, 10, 5, 11, 12, 13, 2)
    assert example.start == 5
    assert example.num_predicted == 4


def test_a_demonstration_that_does_not_fit_is_refused(base: str) -> None:
    tokenizer = load_policy(base).tokenizer
    with pytest.raises(ModelError, match="1 of 1 demonstrations are longer than the model's context of 8"):
        encode_demonstrations([demonstration("w5 w6", "w7 w8 w9")], tokenizer, context=8)


def test_every_epoch_is_kept_and_the_model_is_the_last(base: str, tmp_path: Path) -> None:
    model = train(tmp_path, base, config(epochs=3), validation=DEMONSTRATIONS[:2])
    assert sorted(path.name for path in (tmp_path / "epochs").iterdir()) == ["01", "02", "03"]
    first, *_, last = ((tmp_path / "epochs" / name / "model.safetensors").read_bytes() for name in ("01", "02", "03"))
    assert first != last == (model / "model.safetensors").read_bytes()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 3 * 3, "7 demonstrations in batches of 3 are 3 steps an epoch"
    assert ["validation_loss" in row for row in rows] == [False, False, True] * 3
    assert [round(row["epoch"], 3) for row in rows[:3]] == [0.333, 0.667, 1.0]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_last_epoch_alone_is_kept_where_nobody_chooses(base: str, tmp_path: Path) -> None:
    model = train(tmp_path / "last", base, config(keep_epochs="last"), validation=DEMONSTRATIONS[:2])
    assert not (tmp_path / "last" / "epochs").exists()
    everything = train(tmp_path / "all", base, config(), validation=DEMONSTRATIONS[:2])
    assert (model / "model.safetensors").read_bytes() == (everything / "model.safetensors").read_bytes()
    assert len(read_metrics(tmp_path / "last" / "metrics.jsonl")) == 2 * 3


@pytest.mark.parametrize(
    ("mix", "texts"),
    [(0.0, [0] * 6), (0.25, [1] * 6), (0.3, [1] * 6), (0.5, [3] * 6), (0.1, [1, 0, 0] * 2), (0.14, [1, 0] * 3)],
)
def test_the_mix_is_a_share_of_the_batch(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: float, texts: list[int]
) -> None:
    """With m texts beside 3 demonstrations, m / (m + 3) is the share: 1 of 4, 3 of 6; 1/3 of a text to have 1 of 10.

    At 0.3 the nearest to 9/7 of a text is one; at 0.14 it would be none of 0.488, so every second batch has one.
    """
    batches: list[list[Example]] = []
    denominators: list[float] = []
    step = Trainer.step

    def spy(
        self: Trainer, groups: Iterable[list[Example]], loss_fn: Callable[[list[Example], float], Loss], number: float
    ) -> StepReport:
        parts = list(groups)
        batches.append([example for part in parts for example in part])
        denominators.append(number)
        return step(self, parts, loss_fn, number)

    monkeypatch.setattr(Trainer, "step", spy)
    train(tmp_path, base, config(epochs=2, pretraining_mix=mix), pretraining=TEXTS)
    drawn: list[Example] = []
    for batch, denominator, expected in zip(batches, denominators, texts, strict=True):
        mixed_in = [example for example in batch if example.start == 1]
        assert len(mixed_in) == expected
        drawn += mixed_in
        assert denominator == sum(example.num_predicted for example in batch)
        assert all(len(example.ids) == 10 for example in mixed_in), "9 words and <eos>"
    assert len(set(drawn[:5])) == min(5, len(drawn)), "without replacement"


def test_every_demonstration_is_seen_once_an_epoch(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    loss = sft._example_loss

    def spy(policy: Any, batch: Sequence[Example], num_tokens: float) -> Loss:
        seen.extend(example.ids for example in batch)
        return loss(policy, batch, num_tokens)

    monkeypatch.setattr(sft, "_example_loss", spy)
    train(tmp_path, base, config())
    count = len(DEMONSTRATIONS)
    assert sorted(seen[:count]) == sorted(seen[count:])
    assert len(set(seen[:count])) == count
    assert seen[:count] != seen[count:]


def test_after_overfitting_one_sample_generation_says_it_and_stops(base: str, tmp_path: Path) -> None:
    one = demonstration("w5 w6", "w7 w8 w7 w9")
    model = train(tmp_path, base, config(epochs=40, batch_size=1, optimizer={"learning_rate": 1e-2}), [one])
    decoding = DecodingConfig(max_new_tokens=12, greedy=True)
    ((response,),) = sample_responses(
        load_policy(str(model)), [prompt("w5 w6")], n=1, decoding=decoding, seed=0, purpose="t"
    )
    assert response.text == "w7 w8 w7 w9"
    assert response.finished


def test_an_epoch_is_chosen_by_score_and_the_earlier_one_of_equals(base: str, tmp_path: Path) -> None:
    train(tmp_path / "run", base, config(epochs=3))
    epochs = tmp_path / "run" / "epochs"
    chosen = select_epoch(tmp_path / "chosen", scores={"03": 0.5, "01": -1.0, "02": 0.5}, epochs=epochs)
    assert (chosen / "model.safetensors").read_bytes() == (epochs / "02" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "chosen" / "choice.json").read_text())["chosen"] == "02"


def test_without_data_nothing_is_trained(base: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no demonstrations"):
        train(tmp_path, base, config(), [])
    with pytest.raises(DataError, match="no pretraining text was given"):
        train(tmp_path, base, config(pretraining_mix=0.1))
