"""What commands say of memory, before and after, and how a limit picks micro-batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import save_model
from tests.runs import SMOKE

from tastemaker import parallel
from tastemaker.checkpoint import load_shape, new_reward_model, save_reward_model
from tastemaker.cli import main
from tastemaker.config import load_recipe
from tastemaker.errors import ConfigError
from tastemaker.forecast import Place, dpo_forecast, fitted, ppo_forecast, reward_forecast, sft_forecast
from tastemaker.memory import Estimate
from tastemaker.recipe import Recipe
from tastemaker.records import Demonstration, Message, Prompt, Ranking, Response, Text
from tastemaker.round import Round
from tastemaker.settings import (
    DecodingConfig,
    DpoConfig,
    LoraConfig,
    OptimizerConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
)

HERE = Place(gpu=False)
ASKED = Prompt(messages=(Message("user", "w3 w4 w5 w6 w7"),))
DEMONSTRATIONS = [Demonstration(prompt=ASKED, response="w8 w9 w10")] * 40
RANKINGS = [
    Ranking(
        prompt=ASKED,
        responses=(Response(text="w5"), Response(text="w6 w7"), Response(text="w8 w9 w10")),
        order=((2,), (0,), (1,)),
    )
] * 40
PPO = PpoConfig(init="x", reward="y", batch_size=32, minibatches=2, decoding=DecodingConfig(max_new_tokens=20))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def reward(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward") / "model"
    save_reward_model(folder, new_reward_model(model, seed=0))
    return str(folder)


def forecasts(model: str, reward: str) -> list[tuple[Any, Any]]:
    """A forecast and a config for every stage that trains."""
    return [
        (sft_forecast(model, DEMONSTRATIONS, [], HERE), SftConfig()),
        (reward_forecast(model, RANKINGS, HERE), RewardConfig()),
        (dpo_forecast(model, RANKINGS, HERE), DpoConfig(init="x")),
        (ppo_forecast(model, reward, [ASKED] * 40, [], HERE), PPO),
    ]


# --- budgets ---------------------------------------------------------------------------------------------------------


def by_budget(config: SftConfig) -> Estimate:
    """1 MB a token, and 100 MB that nothing saves."""
    return Estimate(parts={"weights": 100_000_000, "activations": 1_000_000 * config.microbatch_tokens})


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        (10_000_000_000, 8192),  # all that is set
        (8_291_999_999, 7936),  # one byte less than 8192 tokens take: the next multiple of 256 below
        (1_000_000_000, 768),
        (356_000_000, 256),
    ],
)
def test_the_largest_budget_that_fits_is_taken(limit: int, budget: int) -> None:
    chosen = fitted(SftConfig(), by_budget, limit)
    assert chosen == SftConfig(microbatch_tokens=budget)


def test_what_fits_in_no_way_is_refused_with_its_parts() -> None:
    with pytest.raises(ConfigError, match=r"355 MB of memory .* about 356 MB \(activations 256 MB, weights 100 MB"):
        fitted(SftConfig(), by_budget, 355_400_000)
    assert fitted(SftConfig(microbatch_tokens=100), by_budget, 200_000_000).microbatch_tokens == 100


def test_a_policys_two_budgets_are_fitted_each_for_itself() -> None:
    def forecast(config: PpoConfig) -> Estimate:
        phases = 1000 * config.microbatch_tokens, 2000 * config.decoding.batch_tokens
        return Estimate(parts={"largest": max(phases)})

    chosen = fitted(PPO, forecast, 2_100_000)
    assert (chosen.microbatch_tokens, chosen.decoding.batch_tokens) == (2048, 1024)
    assert chosen.decoding.max_new_tokens == PPO.decoding.max_new_tokens


# --- stages ----------------------------------------------------------------------------------------------------------


def test_every_stage_has_an_estimate(model: str, reward: str) -> None:
    for forecast, config in forecasts(model, reward):
        estimate = forecast(config)
        assert estimate.parts["weights"] > 0
        assert estimate.total == sum(estimate.parts.values())


def test_ppo_holds_more_networks_than_fine_tuning(model: str, reward: str) -> None:
    """Policy, reference, average, value function and reward model: 5 networks, of which 2 have moments."""
    sft, _, _, ppo = (forecast(config) for forecast, config in forecasts(model, reward))
    assert ppo.parts["weights"] == pytest.approx(5 * sft.parts["weights"], rel=0.2)
    assert ppo.parts["optimizer"] == pytest.approx(2 * sft.parts["optimizer"], rel=0.2)
    forecast = ppo_forecast(model, None, [ASKED], [], HERE)
    by_function, adapted = forecast(PPO), forecast(_with(PPO, lora=LoraConfig(rank=2)))
    assert by_function.parts["weights"] == pytest.approx(4 * sft.parts["weights"], rel=0.2)
    assert adapted.parts["weights"] < 0.6 * by_function.parts["weights"]


def test_ppo_in_bf16_holds_half_of_what_is_frozen_and_a_copy_to_decode(model: str, reward: str) -> None:
    forecast, shape, judge = (
        ppo_forecast(model, reward, [ASKED], [], HERE),
        load_shape(model),
        load_shape(reward, scores=True),
    )
    half = _with(PPO, policy=replace(PPO.policy, precision="bfloat16"))
    more = 2 * shape.parameters - 2 * shape.inner_matrices - 2 * judge.inner_matrices
    assert forecast(half).parts["weights"] - forecast(PPO).parts["weights"] == more
    without_average = forecast(_with(PPO, ema_decay=0.0)).parts["weights"]
    assert forecast(PPO).parts["weights"] - without_average == 4 * shape.parameters


def _with(config: PpoConfig, **changes: Any) -> PpoConfig:
    return replace(config, **changes)


def test_options_that_save_memory_save_it(model: str) -> None:
    forecast = sft_forecast(model, DEMONSTRATIONS, [], HERE)
    plain = forecast(SftConfig())
    saved = forecast(SftConfig(optimizer=OptimizerConfig(learning_rate=1e-3, gradient_checkpointing=True)))
    assert saved.parts["activations"] < plain.parts["activations"]
    half = forecast(SftConfig(optimizer=OptimizerConfig(learning_rate=1e-3, precision="bfloat16")))
    assert half.parts["activations"] < plain.parts["activations"]


def test_pretraining_text_joins_the_batch(model: str) -> None:
    texts = [Text(text="w3 w4 w5 " * 20)] * 5
    forecast = sft_forecast(model, DEMONSTRATIONS, texts, HERE)
    mixed, plain = forecast(SftConfig(pretraining_mix=0.5)), forecast(SftConfig())
    assert mixed.parts["activations"] > plain.parts["activations"]


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    row = {"prompt": "w3 w4 w5 w6 w7", "completion": "w8 w9 w10"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return tmp_path


def test_a_command_says_what_it_expects_and_what_it_took(
    data: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sft", "--model", model, "--data", str(data / "data.jsonl"), "--out", str(data / "out"), "--epochs", "1"]
    assert main([*command, "--max-memory", "2GB", "--microbatch-tokens", "300"]) == 0
    said = capsys.readouterr().err
    assert "expected at the peak, in micro-batches of 300 tokens" in said
    manifest = json.loads((data / "out" / "manifest.json").read_text())
    memory = manifest["memory"]
    assert memory["peak_mb"] > 100
    assert sum(memory["parts_mb"].values()) == pytest.approx(memory["expected_mb"], abs=1)
    assert manifest["config"]["microbatch_tokens"] == 300
    assert "memory" not in json.dumps([manifest["config"], manifest["inputs"], manifest["outputs"]])
    assert main([*command, "--max-memory", "3GB", "--microbatch-tokens", "300"]) == 0
    assert "is up to date" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [None, "2GB"])
def test_memory_is_tight_where_there_is_a_limit(
    limit: str | None, data: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, prepare = list[bool](), parallel.prepare

    def spy(threads: int | None = None, *, tight: bool = False) -> torch.device:
        asked.append(tight)
        return prepare(threads, tight=tight)

    monkeypatch.setattr(parallel, "prepare", spy)
    command = ["sft", "--model", model, "--data", str(data / "data.jsonl"), "--out", str(data / "out"), "--epochs", "1"]
    assert main([*command, *(["--max-memory", limit] if limit else [])]) == 0
    Round(load_recipe(SMOKE, Recipe), data / "run", max_memory=None if limit is None else 2 * 10**9)
    assert asked == [limit is not None] * 2


def test_a_limit_that_nothing_keeps_is_refused(data: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sft", "--model", model, "--data", str(data / "data.jsonl"), "--out", str(data / "out")]
    assert main([*command, "--max-memory", "1MB"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "1 MB of memory are not enough" in said
    assert not (data / "out").exists()
    assert main([*command, "--max-memory", "plenty"]) == 2
    assert "max_memory is 'plenty'; give a size above 0, such as 6GB or 512MB." in capsys.readouterr().err


def test_a_wrong_model_is_still_the_stages_to_refuse(
    data: Path, reward: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sft", "--model", reward, "--data", str(data / "data.jsonl"), "--out", str(data / "out")]
    assert main(command) == 2
    assert "is a reward model" in capsys.readouterr().err


def test_layers_of_ours_are_counted_on_only_where_they_run(
    model: str, reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters and models in parts run by the library's layers, which keep more for the backward pass."""
    assert load_shape(model).own_layers
    long = replace(PPO, decoding=DecodingConfig(max_new_tokens=90), microbatch_tokens=100_000)
    adapters = ppo_forecast(model, reward, [ASKED] * 40, [], HERE)(replace(long, lora=LoraConfig(rank=1)))
    monkeypatch.setattr("tastemaker.llama.layers_of", lambda library: None)
    library = ppo_forecast(model, reward, [ASKED] * 40, [], HERE)(replace(long, lora=LoraConfig(rank=1)))
    assert adapters.parts["activations"] == library.parts["activations"]
    monkeypatch.undo()
    monkeypatch.setattr("tastemaker.processes.several", lambda: True)
    assert not load_shape(model).own_layers
