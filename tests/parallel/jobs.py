"""The trainings that several processes and one do alike: small models, ragged lengths, uneven last batches.

Adam's epsilon is large enough that rounding of a gradient near 0 makes no step; learning rates are such that weights
move by some thousandths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.models import save_model
from tests.stages.conftest import demonstration, prompt, ranking
from torch import Tensor

from tastemaker import processes
from tastemaker.checkpoint import load_reward_model, new_reward_model, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.files import write_records
from tastemaker.metrics import MetricsWriter
from tastemaker.model import freeze
from tastemaker.records import Demonstration, Ranking, Text
from tastemaker.scoring import ModelScorer
from tastemaker.settings import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tastemaker.stages.dpo import train_dpo
from tastemaker.stages.ppo import train_ppo
from tastemaker.stages.reward import train_reward_model
from tastemaker.stages.sft import train_sft

CPU = torch.device("cpu")
ADAM = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "epsilon": 1e-5}

DEMONSTRATIONS = [
    demonstration(f"w{n} w{n + 1}" + " w8" * (n % 4), " ".join(f"w{n + k}" for k in range(3 * (n % 3) + 1)))
    for n in range(5, 12)
]
# Answers of no word and of five: a policy that has seen them ends some of its responses at once.
ANSWERS = [demonstration(f"w{n} w{n + 1}" + " w9" * (n % 3), " ".join(["w7"] * (5 * (n % 2)))) for n in range(3, 14)]


def ranked(number: int, rater: str) -> Ranking:
    best = number % 3
    responses = ["w5 w7", f"w6 w{number} w9", "w6"]
    return ranking(f"w{number} w3" + " w4" * best, responses, ((best,), tuple({0, 1, 2} - {best})), rater=rater)


RANKINGS = [ranked(number, f"rater {number % 2}") for number in range(20, 31)]
OTHERS = [ranked(number, "another") for number in range(40, 45)]
PROMPTS = [prompt(f"w{number} w{number + 1}" + " w9" * (number % 3)) for number in range(3, 14)]
TEXTS = [Text(text=" ".join(f"w{(7 * place + number) % 90}" for place in range(5 + number))) for number in range(7)]
HELD_OUT = [Text(text=f"w{number} {text.text}") for number, text in enumerate(TEXTS[:3], 91)]


def in_any_order(_seed: int) -> list[Demonstration]:
    """Demonstrations in each process's own order: so a set of texts has them where Python draws its hashes anew."""
    numbers = random.Random(processes.number()).sample(range(10, 60), 50)
    return [demonstration(f"w{number} w7", "w5") for number in numbers]


def make_models(folder: Path) -> None:
    """What trainings start from: a policy, one with tied embeddings, one that ends its responses, a reward model."""
    base = save_model(folder / "base", max_position_embeddings=64)
    save_model(folder / "tied", seed=3, max_position_embeddings=64, tie_word_embeddings=True)
    judge = new_reward_model(str(base), seed=5)
    judge.offset += 0.375
    save_reward_model(folder / "judge", judge)
    ending = from_mapping(
        SftConfig,
        {"epochs": 6, "batch_size": 4, "keep_epochs": "last", "optimizer": ADAM | {"learning_rate": 5e-3}},
        where="test",
    )
    train_sft(folder / "ending", config=ending, base=str(base), demonstrations=ANSWERS, device=CPU, seed=1)
    write_records(folder / "data.jsonl", DEMONSTRATIONS)
    write_records(folder / "rankings.jsonl", RANKINGS)
    write_records(folder / "prompts.jsonl", PROMPTS)


def sft(folder: Path, models: Path) -> None:
    """7 demonstrations in batches of 3, so that the last batch has one; a text beside each 3 of them."""
    config = from_mapping(
        SftConfig,
        {
            "epochs": 2,
            "batch_size": 3,
            "keep_epochs": "last",
            "pretraining_mix": 0.25,
            "microbatch_tokens": 20,
            "checkpoint_every": 2,
            "optimizer": ADAM,
        },
        where="test",
    )
    train_sft(
        folder,
        config=config,
        base=str(models / "base"),
        demonstrations=DEMONSTRATIONS,
        validation=DEMONSTRATIONS[:3],
        pretraining=TEXTS,
        device=CPU,
        seed=2,
    )


def lone(folder: Path, models: Path) -> None:
    """Batches of 2, and of one at last, without any text: a process has nothing to do then. No gradient is clipped."""
    free = ADAM | {"max_grad_norm": 1000.0}
    config = from_mapping(
        SftConfig, {"epochs": 2, "batch_size": 2, "keep_epochs": "last", "optimizer": free}, where="test"
    )
    rows = DEMONSTRATIONS[:5]
    train_sft(folder, config=config, base=str(models / "base"), demonstrations=rows, device=CPU, seed=2)


def reward(folder: Path, models: Path) -> None:
    """11 prompts in batches of 4, layers computed again for their gradients."""
    config = from_mapping(
        RewardConfig,
        {
            "epochs": 2,
            "batch_size": 4,
            "microbatch_tokens": 60,
            "checkpoint_every": 2,
            "cross_validation_folds": 2,
            "optimizer": ADAM | {"gradient_checkpointing": True},
        },
        where="test",
    )
    train_reward_model(
        folder,
        config=config,
        init=str(models / "base"),
        rankings=RANKINGS,
        validation=RANKINGS[:4],
        held_out_raters=OTHERS,
        demonstrations=DEMONSTRATIONS,
        device=CPU,
        seed=4,
    )


def dpo(folder: Path, models: Path) -> None:
    """22 pairs in batches of 5, on tied embeddings."""
    config = from_mapping(
        DpoConfig,
        {"init": "", "batch_size": 5, "microbatch_tokens": 70, "checkpoint_every": 2, "optimizer": ADAM},
        where="test",
    )
    init = str(models / "tied")
    train_dpo(folder, config=config, init=init, rankings=RANKINGS, validation=RANKINGS[:3], device=CPU, seed=1)


def ppo_config(**changes: Any) -> PpoConfig:
    """9 episodes in 3 minibatches of 3, which two processes cannot halve; a cut-off response trains nothing."""
    small: dict[str, Any] = {
        "init": "",
        "reward": "",
        "iterations": 3,
        "batch_size": 9,
        "minibatches": 3,
        "decoding": {"max_new_tokens": 4, "batch_tokens": 64},
        "policy": ADAM,
        "value": ADAM,
        "warmup_iterations": 0,
        "truncated": "mask",
        "microbatch_tokens": 20,
        "ptx_coef": 0.5,
        "ptx_examples_per_episode": 1.0,
        "adaptive_kl": {"target": 0.1, "horizon": 100.0},
        "checkpoint_every": 2,
    }
    return from_mapping(PpoConfig, small | changes, where="test")


def scorer(models: Path) -> ModelScorer:
    return ModelScorer(freeze(load_reward_model(str(models / "judge")), "float32"), budget=40)


def ppo(folder: Path, models: Path) -> None:
    """PPO-ptx for a reward model, with everything that a checkpoint may hold."""
    train_ppo(
        folder,
        config=ppo_config(),
        init=str(models / "ending" / "model"),
        reward=str(models / "judge"),
        scorer=scorer(models),
        prompts=PROMPTS,
        pretraining=TEXTS,
        heldout_text=HELD_OUT,
        device=CPU,
        seed=3,
    )


class StoppedError(Exception):
    """Stands for the end of the job."""


def command(name: str, models: Path, out: Path) -> list[str]:
    """What is given to `tastemaker NAME`."""
    data = {"sft": "data.jsonl", "ppo": "prompts.jsonl"}.get(name, "rankings.jsonl")
    given = ["--data", str(models / data), "--out", str(out), "--threads", "1", "--batch-size", "3"]
    given += ["--init" if name in ("dpo", "ppo") else "--model", str(models / "base")]
    if name == "ppo":
        given += ["--reward", str(models / "judge"), "--iterations", "2", "--minibatches", "1"]
        return [*given, "--decoding.max-new-tokens", "4", "--ptx-coef", "0"]
    return [*given, "--epochs", "1", "--optimizer.learning-rate", "1e-3"]


TRAININGS: Mapping[str, Callable[[Path, Path], None]] = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


def half(name: str, folder: Path, models: Path) -> None:
    """One of them, stopped in its third step; the checkpoint is of the second."""
    write = MetricsWriter.write

    def stopping(self: MetricsWriter, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise StoppedError
        write(self, step, values)

    MetricsWriter.write = stopping  # type: ignore[method-assign]
    try:
        TRAININGS[name](folder, models)
    except StoppedError:
        pass
    finally:
        MetricsWriter.write = write  # type: ignore[method-assign]


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any parameter of two models of a kind."""
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def moved(model: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """By how much weights moved that both have: a reward model has another head than what it started from."""
    shared = [name for name in model if name in start and model[name].shape == start[name].shape]
    return max(float((model[name] - start[name]).abs().max()) for name in shared)
