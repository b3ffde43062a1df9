"""Short training runs on the tiny world whose every figure is written down: at most twenty optimizer steps a stage.

They run through the stages' public functions, on the small shipped base, in float64 on one thread. PPO learns from the
responses of `rollouts.json`, so neither the sampler nor a processor's rounding decides what it sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from tests.exact import float64_by_default, in_float64, set_head

from tastemaker import tinyworld
from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.generation import FinishReason, Rollout
from tastemaker.metrics import read_metrics
from tastemaker.model import LanguageModel, RewardModel, freeze
from tastemaker.records import Demonstration, Prompt, Ranking, Response
from tastemaker.scoring import FunctionScorer, ModelScorer
from tastemaker.stages import dpo, ppo, reward, sft
from tastemaker.tinyworld import study

Curve = list[float | None]
Curves = dict[str, Curve]
Rows = list[dict[str, Any]]

HERE = Path(__file__).parent
CURVES, ROLLOUTS = HERE / "curves.json", HERE / "rollouts.json"
BASE = str(tinyworld.BASES / "base-small")
CPU = torch.device("cpu")
SEED = 8
DIGITS = 9  # behind the point, as the files have them

# Tokens at once: less than a batch, so that every step is several micro-batches.
BUDGET = 300
SFT: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 5,
    "keep_epochs": "last",
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3},
    "pretraining_mix": 0.3,
    "max_text_tokens": 24,
    "microbatch_tokens": BUDGET,
}
REWARD: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 5,
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "microbatch_tokens": BUDGET,
}
DPO: dict[str, Any] = {
    "init": BASE,
    "epochs": 2,
    "batch_size": 11,
    "optimizer": {"learning_rate": 3e-4, "warmup_steps": 3, "schedule": "linear"},
    "microbatch_tokens": BUDGET,
}
PPO: dict[str, Any] = {
    "init": BASE,
    "reward": "",
    "iterations": 5,
    "batch_size": 6,
    "minibatches": 2,
    "inner_epochs": 2,
    "decoding": {"max_new_tokens": 12},
    "policy": {"learning_rate": 3e-4, "schedule": "constant"},
    "value": {"learning_rate": 1e-3, "schedule": "constant"},
    "warmup_iterations": 2,
    "kl_coef": 0.1,
    "adaptive_kl": {"target": 0.1, "horizon": 60.0},
    "microbatch_tokens": BUDGET,
}
PPO_PTX = PPO | {"ptx_coef": 0.5, "ptx_examples_per_episode": 1.0, "max_text_tokens": 24}

SHOWN: Mapping[str, tuple[str, ...]] = {
    "sft": ("loss", "grad_norm", "learning_rate", "validation_loss"),
    "reward": ("loss", "accuracy", "score_gap", "grad_norm", "learning_rate", "validation_loss"),
    "dpo": ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob", "grad_norm", "learning_rate"),
    "ppo": (
        *("score", "reward", "kl", "kl_coef", "entropy", "explained_variance", "policy_loss", "value_loss"),
        *("grad_norm", "value_grad_norm", "clip_fraction", "value_clip_fraction", "approx_kl", "ratio_mean"),
        *("ratio_max", "heldout_text_loss"),
    ),
    "ppo-ptx": ("reward", "kl", "policy_loss", "value_loss", "ptx_loss", "grad_norm", "heldout_text_loss"),
}


def run(name: str, folder: Path) -> Curves:
    """The curves of a stage, one number a step (None where a step does not measure it)."""
    with in_float64_throughout():
        RUNS[name](folder)
    rows = read_metrics(folder / "metrics.jsonl")
    return {metric: [rounded(row.get(metric)) for row in rows] for metric in SHOWN[name]}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


# --- the runs -------------------------------------------------------------------------------------------------------


def run_sft(folder: Path) -> None:
    sft.train_sft(
        folder,
        config=from_mapping(sft.SftConfig, SFT, where="golden"),
        base=BASE,
        demonstrations=demonstrations()[:23],
        validation=demonstrations()[23:],
        pretraining=study.texts(SEED, documents=11),
        device=CPU,
        seed=SEED,
    )


def run_reward(folder: Path) -> None:
    reward.train_reward_model(
        folder,
        config=from_mapping(reward.RewardConfig, REWARD, where="golden"),
        init=BASE,
        rankings=rankings()[:23],
        validation=rankings()[23:],
        demonstrations=demonstrations()[:5],
        device=CPU,
        seed=SEED,
    )


def run_dpo(folder: Path) -> None:
    dpo.train_dpo(
        folder,
        config=from_mapping(dpo.DpoConfig, DPO, where="golden"),
        init=BASE,
        rankings=rankings()[:23],
        device=CPU,
        seed=SEED,
    )


def run_ppo(folder: Path, *, settings: Mapping[str, Any] = PPO, recorded: bool = True) -> Rows:
    """PPO for the scores of a reward model that was never trained. Returns the rollouts of its iterations.

    `recorded`: they are those of the file; otherwise the policy samples them.
    """
    judge = folder / "reward"
    save_reward_model(judge, new_exact_reward_model(BASE, seed=SEED))
    with rollouts_of(read_rollouts() if recorded else None) as seen:
        ppo.train_ppo(
            folder,
            config=from_mapping(ppo.PpoConfig, settings, where="golden"),
            init=BASE,
            reward=str(judge),
            scorer=ModelScorer(freeze(load_exact_reward_model(str(judge)), "float32"), budget=BUDGET),
            prompts=prompts(),
            pretraining=study.texts(SEED, documents=11) if "ptx_coef" in settings else (),
            heldout_text=study.held_out_texts(SEED, documents=7),
            device=CPU,
            seed=SEED,
        )
    return seen


RUNS: Mapping[str, Callable[[Path], object]] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "ppo": run_ppo,
    "ppo-ptx": partial(run_ppo, settings=PPO_PTX),
}
STAGES: Mapping[str, ModuleType] = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "ppo-ptx": ppo}


# --- the data -------------------------------------------------------------------------------------------------------


def prompts() -> list[Prompt]:
    return study.prompts(SEED, train=31, validation=0, test=0)


def demonstrations() -> list[Demonstration]:
    return [
        Demonstration(prompt=prompt, response=study.write(prompt, number)) for number, prompt in enumerate(prompts())
    ]


def rankings() -> list[Ranking]:
    """Two to four responses a prompt in the order of their true worth, with ties."""
    asked, worth = prompts(), FunctionScorer(study.gold, name="gold")
    found = []
    for number, prompt in enumerate(asked):
        truth, other = prompt.about.extra["truth"], asked[number - 1].about.extra["truth"]
        texts = [truth["flawed"], other["ideal"], study.write(prompt, number), truth["ideal"]]
        responses = tuple(Response(text=text) for text in dict.fromkeys(texts[: 2 + number % 3]))
        scores = [round(score, 6) for score in worth([prompt] * len(responses), responses)]
        best_first = sorted(set(scores), reverse=True)
        order = tuple(tuple(place for place, one in enumerate(scores) if one == score) for score in best_first)
        found.append(Ranking(prompt=prompt, responses=responses, order=order))
    return found


# --- rollouts -------------------------------------------------------------------------------------------------------


def read_rollouts() -> Rows:
    """One row an episode: the iteration, the prompt's ids, the response's ids and why it ended."""
    rows: Rows = json.loads(ROLLOUTS.read_text(encoding="utf-8"))
    return rows


@contextmanager
def rollouts_of(recorded: Rows | None) -> Iterator[Rows]:
    """Within the block PPO gets the recorded rollouts, or samples; either way they are noted."""
    seen: Rows = []
    sample = ppo.PpoRun.roll_out

    def roll_out(run: ppo.PpoRun, chosen: Sequence[int], iteration: int) -> list[Rollout]:
        if recorded is None:
            rollouts = sample(run, chosen, iteration)
        else:
            rows = [row for row in recorded if row["iteration"] == iteration]
            asked = [list(run.prompt_ids[index]) for index in chosen]
            assert [row["prompt"] for row in rows] == asked, "other prompts: python -m tests.golden.renew --rollouts"
            rollouts = [as_rollout(row) for row in rows]
        seen.extend(as_row(one, iteration) for one in rollouts)
        return rollouts

    with patch.object(ppo.PpoRun, "roll_out", roll_out):
        yield seen


def as_rollout(row: Mapping[str, Any]) -> Rollout:
    """With log-probs of 0: the trainer reads its own."""
    ids = list(row["response"])
    return Rollout(tuple(row["prompt"]), ids, [0.0] * len(ids), FinishReason(row["finish"]), row["iteration"])


def as_row(rollout: Rollout, iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "prompt": list(rollout.prompt_ids),
        "response": list(rollout.response_ids),
        "finish": rollout.finish.value,
    }


# --- models in float64 ----------------------------------------------------------------------------------------------


def load_exact_policy(source: str, **options: Any) -> LanguageModel:
    """A base ends its answer where it would ask the next question."""
    return in_float64(load_policy(source, stop_texts=tinyworld.STOP_TOKENS, **options))


def load_exact_reward_model(source: str) -> RewardModel:
    return in_float64(load_reward_model(source))


def new_exact_reward_model(source: str, *, seed: int, **options: Any) -> RewardModel:
    return set_head(in_float64(new_reward_model(source, seed=seed, **options)), seed=seed)


LOADERS: Mapping[str, Callable[..., Any]] = {
    "load_policy": load_exact_policy,
    "load_reward_model": load_exact_reward_model,
    "new_reward_model": new_exact_reward_model,
}


@contextmanager
def in_float64_throughout() -> Iterator[None]:
    """Within the block stages load their models in float64, and nothing falls back below it."""
    with ExitStack() as stack:
        stack.enter_context(float64_by_default())
        for stage in (sft, reward, dpo, ppo):
            for name, load in LOADERS.items():
                if hasattr(stage, name):
                    stack.enter_context(patch.object(stage, name, load))
        yield
