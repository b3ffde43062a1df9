"""Commands that train: supervised fine-tuning, the reward model, PPO, DPO, each on the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tastemaker import parallel, sources
from tastemaker.checkpoint import load_reward_model
from tastemaker.commands.options import Here, parse, read_given, read_records, stage
from tastemaker.commands.options import inputs as inputs_of
from tastemaker.files import read_demonstrations, read_prompts, read_rankings, read_texts
from tastemaker.functions import is_function_path, load_function
from tastemaker.records import Demonstration, Prompt, Ranking, Text
from tastemaker.scoring import FunctionScorer, ModelScorer, Scorer
from tastemaker.stages.dpo import DpoConfig, train_dpo
from tastemaker.stages.ppo import PpoConfig, train_ppo
from tastemaker.stages.reward import RewardConfig, train_reward_model
from tastemaker.stages.sft import SftConfig, train_sft


@dataclass(frozen=True, slots=True, kw_only=True)
class _SftOptions:
    """Fine-tune a model on demonstrations; the loss is on the responses. Writes OUT/model and OUT/epochs."""

    model: str
    """A model folder, a .gguf file or a hub name."""
    data: str
    """Demonstrations: {"prompt", "completion"}, {"messages"}, {"instruction", "input", "output"}."""
    out: Path
    """The folder to write."""
    validation: str | None = None
    """Held-out demonstrations, whose loss is reported after every epoch."""
    text: str | None = None
    """Pretraining text for pretraining-mix: {"text"} rows or a .txt file."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[SftConfig, Here] = SftConfig()


def sft(arguments: Sequence[str]) -> None:
    """`tastemaker sft`"""
    options = parse(_SftOptions, arguments, "sft")
    rows = read_records(options.data, read_demonstrations, Demonstration)
    held_out = read_given(options.validation, read_demonstrations, Demonstration)
    text = read_given(options.text, read_texts, Text)

    def work(folder: Path) -> None:
        train_sft(
            folder,
            config=options.config,
            base=options.model,
            demonstrations=rows,
            validation=held_out,
            pretraining=text,
            device=parallel.prepare(options.threads),
            seed=options.seed,
        )

    stage(options.out, "sft", options.config, inputs_of(options, "model", "data", "validation", "text"), work)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RewardOptions:
    """Train a reward model on rankings by the K-wise loss (Eq. 1). Writes OUT/model and OUT/results.json."""

    model: str
    """The model to start from: a folder, usually of an SFT model."""
    data: str
    """Rankings: {"prompt", "responses", "ranking"}, {"prompt", "chosen", "rejected"}, HH transcripts."""
    out: Path
    """The folder to write."""
    validation: str | None = None
    """Held-out rankings by the same raters, to measure accuracy on."""
    held_out_raters: str | None = None
    """Rankings by raters who trained nothing."""
    demonstrations: str | None = None
    """Demonstrations, which are to score 0 on average."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[RewardConfig, Here] = RewardConfig()


def reward(arguments: Sequence[str]) -> None:
    """`tastemaker reward`"""
    options = parse(_RewardOptions, arguments, "reward")
    rows = read_records(options.data, read_rankings, Ranking)
    measured = [read_given(source, read_rankings, Ranking) for source in (options.validation, options.held_out_raters)]
    centred = read_given(options.demonstrations, read_demonstrations, Demonstration)

    def work(folder: Path) -> None:
        train_reward_model(
            folder,
            config=options.config,
            init=options.model,
            rankings=rows,
            validation=measured[0],
            held_out_raters=measured[1],
            demonstrations=centred,
            device=parallel.prepare(options.threads),
            seed=options.seed,
        )

    names = ("model", "data", "validation", "held_out_raters", "demonstrations")
    stage(options.out, "reward", options.config, inputs_of(options, *names), work)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PpoOptions:
    """Optimise a policy for a reward, with a KL penalty (PPO), and pretraining text (PPO-ptx). Writes OUT/model."""

    data: str
    """Prompts: {"prompt"} or {"messages"}."""
    out: Path
    """The folder to write."""
    text: str | None = None
    """Pretraining text for ptx-coef above 0."""
    heldout_text: str | None = None
    """Held-out pretraining text, whose loss is reported as training goes."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[PpoConfig, Here]


def ppo(arguments: Sequence[str]) -> None:
    """`tastemaker ppo`"""
    options = parse(_PpoOptions, arguments, "ppo")
    config = options.config
    rows = read_records(options.data, read_prompts, Prompt)
    text, held_out = (read_given(source, read_texts, Text) for source in (options.text, options.heldout_text))

    def work(folder: Path) -> None:
        device = parallel.prepare(options.threads)
        is_function = is_function_path(config.reward)
        scorer: Scorer
        if is_function:
            scorer = FunctionScorer(load_function(config.reward), name=config.reward)
        else:
            model = load_reward_model(config.reward).to(device)
            scorer = ModelScorer(model, budget=config.microbatch_tokens, precision=config.policy.precision)
        train_ppo(
            folder,
            config=config,
            init=config.init,
            reward=None if is_function else config.reward,
            scorer=scorer,
            prompts=rows,
            pretraining=text,
            heldout_text=held_out,
            device=device,
            seed=options.seed,
        )

    inputs = inputs_of(options, "data", "text", "heldout_text")
    inputs |= {"init": sources.fingerprint(config.init), "reward": sources.fingerprint(config.reward)}
    stage(options.out, "ppo", config, inputs, work)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DpoOptions:
    """Optimise a policy on rankings directly. Writes OUT/model and, with --validation, OUT/results.json."""

    data: str
    """Rankings, as for `tastemaker reward`."""
    out: Path
    """The folder to write."""
    validation: str | None = None
    """Held-out rankings, to measure the implicit reward's accuracy on."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[DpoConfig, Here]


def dpo(arguments: Sequence[str]) -> None:
    """`tastemaker dpo`"""
    options = parse(_DpoOptions, arguments, "dpo")
    rows = read_records(options.data, read_rankings, Ranking)
    held_out = read_given(options.validation, read_rankings, Ranking)

    def work(folder: Path) -> None:
        train_dpo(
            folder,
            config=options.config,
            init=options.config.init,
            rankings=rows,
            validation=held_out,
            device=parallel.prepare(options.threads),
            seed=options.seed,
        )

    inputs = inputs_of(options, "data", "validation") | {"init": sources.fingerprint(options.config.init)}
    stage(options.out, "dpo", options.config, inputs, work)
