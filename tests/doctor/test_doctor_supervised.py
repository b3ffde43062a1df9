"""SFT, reward models and DPO, broken on purpose and healthy, as the stages themselves leave them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.doctor.planted import CPU, DISLIKED, LIKED, SAID, prompts

from tastemaker.artefacts import run_stage
from tastemaker.config import from_mapping
from tastemaker.doctor import examine
from tastemaker.records import Demonstration, Ranking, Response
from tastemaker.settings import DpoConfig, RewardConfig, SftConfig
from tastemaker.stages.dpo import train_dpo
from tastemaker.stages.reward import train_reward_model
from tastemaker.stages.sft import train_sft

Taste = Literal["known", "unknown", "reversed"]


def rankings(count: int, *, seed: int, taste: Taste = "known") -> list[Ranking]:
    """Pairs of a response that ends with a liked word and one that ends with a disliked one; raters err in a fifth."""
    random_, asked, found = random.Random(seed), prompts(), list[Ranking]()
    for number in range(count):
        shown = tuple(
            Response(text=" ".join([*random_.choices(SAID[5:15], k=2), random_.choice(sorted(words))]))
            for words in (LIKED, DISLIKED)
        )
        first_is_better = random_.random() < {"known": 0.8, "reversed": 0.2, "unknown": 0.5}[taste]
        order = ((0,), (1,)) if first_is_better else ((1,), (0,))
        found.append(Ranking(prompt=asked[number % len(asked)], responses=shown, order=order))
    return found


def optimizer(rate: float) -> dict[str, Any]:
    return {"learning_rate": rate, "schedule": "constant", "warmup_steps": 0}


def found_in(folder: Path) -> list[str]:
    (diagnosis,) = examine(folder)
    assert diagnosis.measured.finished
    assert not diagnosis.is_short
    return [finding.kind.name for finding in diagnosis.findings]


def sft(folder: Path, base: str, rate: float, seed: int = 0) -> Path:
    random_ = random.Random(seed)
    shown = [
        Demonstration(prompt=prompt, response=" ".join(random_.choices(SAID[:8], k=3)))
        for prompt in prompts()
        for _ in range(2)
    ]
    settings = {"epochs": 2, "batch_size": 8, "optimizer": optimizer(rate), "residual_dropout": 0.0}
    config = from_mapping(SftConfig, settings | {"keep_epochs": "last"}, where="test")

    def work(place: Path) -> None:
        train_sft(
            place, config=config, base=base, demonstrations=shown[8:], validation=shown[:8], device=CPU, seed=seed
        )

    run_stage(folder, stage="sft", config=config, inputs={}, work=work)
    return folder


def reward(folder: Path, base: str, train: Sequence[Ranking], held_out: Sequence[Ranking], rate: float = 2e-3) -> Path:
    config = from_mapping(RewardConfig, {"batch_size": 16, "optimizer": optimizer(rate)}, where="test")

    def work(place: Path) -> None:
        train_reward_model(place, config=config, init=base, rankings=train, validation=held_out, device=CPU, seed=0)

    run_stage(folder, stage="reward", config=config, inputs={}, work=work)
    return folder


def dpo(folder: Path, base: str, rate: float) -> Path:
    settings = {"init": base, "batch_size": 16, "optimizer": optimizer(rate)}
    config = from_mapping(DpoConfig, settings, where="test")

    def work(place: Path) -> None:
        train_dpo(place, config=config, init=base, rankings=rankings(256, seed=0), device=CPU, seed=0)

    run_stage(folder, stage="dpo", config=config, inputs={}, work=work)
    return folder


@pytest.mark.parametrize("seed", range(2))
def test_healthy_fine_tuning(talker: str, tmp_path: Path, seed: int) -> None:
    assert found_in(sft(tmp_path / "sft", talker, 1e-3, seed)) == []


@pytest.mark.parametrize(
    ("rate", "found"), [(1e-12, "loss-not-falling"), (1e-20, "loss-not-falling"), (0.3, "loss-rising")]
)
def test_fine_tuning_at_a_wrong_rate(talker: str, tmp_path: Path, rate: float, found: str) -> None:
    assert found_in(sft(tmp_path / "sft", talker, rate)) == [found]


@pytest.mark.parametrize("seed", range(2))
def test_a_healthy_reward_model(talker: str, tmp_path: Path, seed: int) -> None:
    train, held_out = rankings(320, seed=seed), rankings(60, seed=9 + seed)
    assert found_in(reward(tmp_path / "reward", talker, train, held_out)) == []


def test_a_reward_model_of_labels_at_random(talker: str, tmp_path: Path) -> None:
    train, held_out = (rankings(count, seed=seed, taste="unknown") for count, seed in ((320, 1), (1600, 2)))
    assert "accuracy-at-chance" in found_in(reward(tmp_path / "reward", talker, train, held_out))


def test_a_reward_model_whose_labels_are_exchanged_in_one_file(talker: str, tmp_path: Path) -> None:
    train, held_out = rankings(320, seed=1), rankings(60, seed=2, taste="reversed")
    assert "labels-reversed" in found_in(reward(tmp_path / "reward", talker, train, held_out))


def test_healthy_dpo(talker: str, tmp_path: Path) -> None:
    assert found_in(dpo(tmp_path / "dpo", talker, 1e-4)) == []


@pytest.mark.parametrize(("rate", "found"), [(1e-20, "policy-not-moving"), (0.03, "chosen-less-likely")])
def test_dpo_at_a_wrong_rate(talker: str, tmp_path: Path, rate: float, found: str) -> None:
    assert found in found_in(dpo(tmp_path / "dpo", talker, rate))
