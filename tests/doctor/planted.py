"""PPO on a tiny model, healthy and with faults planted in it on purpose, each at several strengths.

The runs are the stage's own: `train_ppo` in a stage's folder, with `PpoRun` or a class that does one thing wrongly, on
a model that has been fine-tuned for a second to say three to six words of twenty and to end. Thresholds were set with
the strengths of `set_at` and other seeds than those of the tests, which plant the strengths of `tried_at`
(`python -m tests.doctor.thresholds` shows both).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.models import save_model
from torch import Tensor

from tastemaker.artefacts import run_stage
from tastemaker.config import from_mapping
from tastemaker.errors import TrainingError
from tastemaker.generation import Rollout, Sampling
from tastemaker.losses import shaped_rewards
from tastemaker.model import LanguageModel
from tastemaker.records import Demonstration, Message, Messages, Prompt
from tastemaker.responses import engine_for, sampling_for
from tastemaker.scoring import FunctionScorer
from tastemaker.settings import OptimizerConfig, PpoConfig, SftConfig
from tastemaker.stages import ppo
from tastemaker.stages.ppo import Experience, PpoRun, train_ppo
from tastemaker.stages.sft import train_sft

CPU = torch.device("cpu")
SAID = [f"w{number}" for number in range(10, 30)]
LIKED, DISLIKED = set(SAID[:5]), set(SAID[-5:])
RATE = 2e-3  # of healthy runs, both networks
ITERATIONS = 16

Score = Callable[[list[str]], float]


def prompts(count: int = 40) -> list[Prompt]:
    return [Prompt(messages=(Message("user", f"w{30 + number} w{31 + number}"),)) for number in range(count)]


def fine_tuned(folder: Path, *, seed: int = 0) -> str:
    """A model that says three to six of twenty words to anything, at random, and ends."""
    base = save_model(folder / "base", seed=seed, max_position_embeddings=64, num_hidden_layers=1)
    random_ = random.Random(seed)
    shown = [
        Demonstration(prompt=prompt, response=" ".join(random_.choices(SAID, k=random_.randint(3, 6))))
        for prompt in prompts()
        for _ in range(4)
    ]
    config = SftConfig(
        epochs=6, batch_size=16, keep_epochs="last", optimizer=OptimizerConfig(learning_rate=4e-3), residual_dropout=0.0
    )
    return str(train_sft(folder / "sft", config=config, base=str(base), demonstrations=shown, device=CPU, seed=seed))


def scorer(score: Score, name: str = "planted") -> FunctionScorer:
    def function(messages: list[Messages], responses: list[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        return [score(response.split()) for response in responses]

    return FunctionScorer(function, name=name)


def tasteful(words: list[str]) -> float:
    """Twice the share of liked words less that of disliked ones; length earns nothing."""
    return 2 * (sum(word in LIKED for word in words) - sum(word in DISLIKED for word in words)) / max(1, len(words))


def run_ppo(
    folder: Path,
    base: str,
    *,
    seed: int,
    score: Score = tasteful,
    run: type[PpoRun] = PpoRun,
    iterations: int = ITERATIONS,
    **changes: Any,
) -> Path:
    """A PPO stage in a folder of its own; one that a check stops leaves what it has written by then."""
    rates = {"learning_rate": RATE, "schedule": "constant"}
    settings: dict[str, Any] = {
        "init": base,
        "reward": "planted:score",
        "iterations": iterations,
        "batch_size": 32,
        "minibatches": 2,
        "decoding": {"max_new_tokens": 12},
        "policy": rates,
        "value": rates,
        "warmup_iterations": 2,
        "kl_coef": 0.5,
        "value_clip": 1.0,
        "checkpoint_every": 1000,
    }
    config = from_mapping(PpoConfig, settings | changes, where="planted")

    def work(place: Path) -> None:
        with patch.object(ppo, "PpoRun", run):
            train_ppo(
                place,
                config=config,
                init=base,
                reward=None,
                scorer=scorer(score),
                prompts=prompts(),
                device=CPU,
                seed=seed,
            )

    with suppress(TrainingError):
        run_stage(folder, stage="ppo", config=config, inputs={"seed": str(seed)}, work=work)
    return folder


def rate(value: float) -> dict[str, Any]:
    return {"learning_rate": value, "schedule": "constant"}


# --- runs that do one thing wrongly ---------------------------------------------------------------------------------


def with_stale_sampler(every: int) -> type[PpoRun]:
    """The sampler gets the policy's weights in every so many iterations only."""

    class Stale(PpoRun):
        stale: LanguageModel | None = None

        def roll_out(self, chosen: Sequence[int], iteration: int) -> list[Rollout]:
            policy = self.policy
            if self.stale is None:
                self.stale = LanguageModel(copy.deepcopy(policy.library), policy.tokenizer)
                self.generator = engine_for(self.stale, self.config.decoding)
            if iteration % every == 0:
                self.stale.library.load_state_dict(policy.library.state_dict())
            self.policy = self.sampler = self.stale
            try:
                return super().roll_out(chosen, iteration)
            finally:
                self.policy = self.sampler = policy

    return Stale


def with_sampler_at(temperature: float) -> type[PpoRun]:
    """Responses are drawn at another temperature than their log-probs are taken at."""

    class Warmer(PpoRun):
        def roll_out(self, chosen: Sequence[int], iteration: int) -> list[Rollout]:
            config = self.config
            self.config = replace(config, decoding=replace(config.decoding, temperature=temperature))
            try:
                return super().roll_out(chosen, iteration)
            finally:
                self.config = config

    return Warmer


def with_end_unknown() -> type[PpoRun]:
    """The sampler does not stop at the end token."""

    def endless(*given: Any) -> Sampling:
        return replace(sampling_for(*given), stop_token_ids=())

    class Endless(PpoRun):
        def roll_out(self, chosen: Sequence[int], iteration: int) -> list[Rollout]:
            with patch.object(ppo, "sampling_for", endless):
                return super().roll_out(chosen, iteration)

    return Endless


def with_kl_reward() -> type[PpoRun]:
    """The KL penalty has the wrong sign."""

    def turned(*given: Tensor, kl_coef: float) -> Tensor:
        return shaped_rewards(*given, kl_coef=-kl_coef)

    class Turned(PpoRun):
        def observe(
            self, chosen: Sequence[int], rollouts: Sequence[Rollout], iteration: int
        ) -> tuple[Experience, dict[str, float]]:
            with patch.object(ppo, "shaped_rewards", turned):
                return super().observe(chosen, rollouts, iteration)

    return Turned


def with_advantages_turned() -> type[PpoRun]:
    """What is bad is made likelier."""

    class Turned(PpoRun):
        def update(self, experience: Experience, iteration: int) -> dict[str, float]:
            return super().update(replace(experience, advantage_BT=-experience.advantage_BT), iteration)

    return Turned


def with_old_experience(since: int) -> type[PpoRun]:
    """From an iteration on, the policy is trained on the rollouts of the iteration before, scored back then."""

    class Late(PpoRun):
        before: Experience | None = None

        def update(self, experience: Experience, iteration: int) -> dict[str, float]:
            taken = self.before if self.before is not None and iteration >= since else experience
            self.before = experience
            return super().update(taken, iteration)

    return Late


def with_shared_reference() -> type[PpoRun]:
    """The reference is the policy itself."""

    class Shared(PpoRun):
        def observe(
            self, chosen: Sequence[int], rollouts: Sequence[Rollout], iteration: int
        ) -> tuple[Experience, dict[str, float]]:
            self.reference = self.policy
            return super().observe(chosen, rollouts, iteration)

    return Shared


# --- the faults -----------------------------------------------------------------------------------------------------

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault that is planted into PPO, and the finding by which the doctor has to name it."""

    finding: str
    what: str
    strength: str
    """What is varied; `tried_at` are strengths that no threshold was set with."""
    set_at: tuple[float, ...]
    tried_at: tuple[float, ...]
    plant: Callable[[float], Settings]
    """Arguments of `run_ppo` for a strength."""
    also: tuple[str, ...] = field(default=())
    """Other findings that it has to have."""


FAULTS = (
    Fault(
        finding="kl-exploding",
        what="no KL penalty, and a reward that can be hacked: it counts words of a kind",
        strength="the policy's learning rate",
        set_at=(6e-3,),
        tried_at=(4e-3, 1e-2),
        plant=lambda x: {
            "kl_coef": 0.0,
            "policy": rate(x),
            "score": lambda words: float(sum(word in LIKED for word in words)),
        },
    ),
    Fault(
        finding="update-too-large",
        what="a learning rate far too high",
        strength="the policy's learning rate",
        set_at=(0.03,),
        tried_at=(0.02, 0.1),
        plant=lambda x: {"policy": rate(x)},
    ),
    Fault(
        finding="sampler-stale",
        what="the sampler is given the policy's weights too seldom",
        strength="iterations between two times",
        set_at=(100,),
        tried_at=(2, 12),
        plant=lambda x: {"run": with_stale_sampler(int(x))},
    ),
    Fault(
        finding="kl-negative",
        what="the sampler keeps the weights that training began with, so the KL is that of other words",
        strength="the policy's learning rate",
        set_at=(2e-3,),
        tried_at=(1e-3, 4e-3),
        plant=lambda x: {"run": with_stale_sampler(10_000), "policy": rate(x)},
        also=("sampler-stale",),
    ),
    Fault(
        finding="sampler-law",
        what="the sampler draws at another temperature than log-probs are taken at",
        strength="the sampler's temperature, beside 1",
        set_at=(0.8,),
        tried_at=(0.95, 1.3),
        plant=lambda x: {"run": with_sampler_at(x)},
    ),
    Fault(
        finding="sampler-law",
        what="the same in bf16, whose rounding hides what is smaller",
        strength="the sampler's temperature, beside 1",
        set_at=(1.3,),
        tried_at=(0.75, 1.25),
        plant=lambda x: {
            "run": with_sampler_at(x),
            "policy": rate(RATE) | {"precision": "bfloat16"},
            "iterations": 2,  # the first one tells, and few processors are quick in bf16
        },
    ),
    Fault(
        finding="ratio-not-1",
        what="the policy is trained on the rollouts of the iteration before",
        strength="the iteration from which on",
        set_at=(1,),
        tried_at=(3, 9),
        plant=lambda x: {"run": with_old_experience(int(x))},
    ),
    Fault(
        finding="reward-does-not-add-up",
        what="the KL penalty has the wrong sign",
        strength="`kl_coef`",
        set_at=(0.5,),
        tried_at=(0.02, 1.0),
        plant=lambda x: {"run": with_kl_reward(), "kl_coef": x},
    ),
    Fault(
        finding="reference-moves",
        what="the reference shares the policy's weights",
        strength="the policy's learning rate",
        set_at=(2e-3,),
        tried_at=(5e-4, 1e-2),
        plant=lambda x: {"run": with_shared_reference(), "policy": rate(x)},
    ),
    Fault(
        finding="policy-not-moving",
        what="a learning rate that weights in fp32 do not take up",
        strength="the policy's learning rate",
        set_at=(1e-12,),
        tried_at=(1e-20, 1e-10),
        plant=lambda x: {"policy": rate(x)},
    ),
    Fault(
        finding="reward-constant",
        what="a reward that says the same of every response",
        strength="the reward",
        set_at=(0.0,),
        tried_at=(1 / 3, -7.0),
        plant=lambda x: {"score": lambda words: x},
    ),
    Fault(
        finding="reward-saturated",
        what="a reward that has no more to tell once a word of a kind is said",
        strength="the policy's learning rate, without a KL penalty",
        set_at=(6e-3,),
        tried_at=(4e-3, 5e-3),
        plant=lambda x: {
            "kl_coef": 0.0,
            "policy": rate(x),
            "iterations": 32,
            "whiten_advantages": False,  # what is left of them once all score the same would be as large as ever
            "score": lambda words: float(any(word in LIKED for word in words)),
        },
    ),
    Fault(
        finding="length-growth",
        what="a reward that likes length",
        strength="the reward for a word",
        set_at=(1.0,),
        tried_at=(0.5, 3.0),
        plant=lambda x: {
            "kl_coef": 0.02,
            "decoding": {"max_new_tokens": 32},
            "truncation_penalty": 0.0,
            "score": lambda words: x * len(words),
        },
    ),
    Fault(
        finding="all-truncated",
        what="the sampler does not know the end token",
        strength="`max_new_tokens`",
        set_at=(12,),
        tried_at=(7, 19),
        plant=lambda x: {"run": with_end_unknown(), "decoding": {"max_new_tokens": int(x)}},
    ),
    Fault(
        finding="value-not-learning",
        what="the value function is not trained",
        strength="its learning rate",
        set_at=(1e-9,),
        tried_at=(1e-12, 1e-7),
        plant=lambda x: {"value": rate(x)},
    ),
    Fault(
        finding="entropy-collapse",
        what="a reward for one word, and next to no KL penalty",
        strength="`kl_coef`",
        set_at=(0.0,),
        tried_at=(0.003, 0.01),
        plant=lambda x: {
            "kl_coef": x,
            "policy": rate(6e-3),
            "score": lambda words: 2 * words.count(SAID[0]) / max(1, len(words)),
        },
    ),
    Fault(
        finding="reward-falling",
        what="advantages with the wrong sign",
        strength="the policy's learning rate",
        set_at=(2e-3,),
        tried_at=(1e-3, 4e-3),
        plant=lambda x: {"run": with_advantages_turned(), "policy": rate(x)},
    ),
)
