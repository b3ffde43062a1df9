"""Commands that train: supervised fine-tuning, the reward model, PPO, DPO, each on the user's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tastemaker import parallel, sources
from tastemaker.checkpoint import load_reward_model
from tastemaker.commands.alone import stage
from tastemaker.commands.options import Here, TrainingRecord, parse, read_given, read_training
from tastemaker.commands.options import inputs as inputs_of
from tastemaker.commands.remarks import (
    Record,
    dpo_result,
    ppo_result,
    reward_result,
    sft_result,
    warn_of_dropout,
    warn_of_unknown_tokens,
)
from tastemaker.files import read_demonstrations, read_prompts, read_rankings, read_texts
from tastemaker.functions import is_function_path, load_function
from tastemaker.ranges import check_seed_and_threads
from tastemaker.records import Demonstration, Prompt, Ranking, Text
from tastemaker.scoring import FunctionScorer, ModelScorer, Scorer
from tastemaker.stages.dpo import DpoConfig, train_dpo
from tastemaker.stages.ppo import PpoConfig, train_ppo
from tastemaker.stages.reward import RewardConfig, train_reward_model
from tastemaker.stages.sft import SftConfig, train_sft


@dataclass(frozen=True, slots=True, kw_only=True)
class _SftOptions:
    """Fine-tune a model on demonstrations; the loss is on the responses. Writes OUT/model.

    With --keep-epochs all every epoch's model is kept, under OUT/epochs; the default here is the last one alone.
    """

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
    keep_personal_data: bool = False
    """Train on records too that hold e-mail addresses, telephone numbers, secrets and the like."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[SftConfig, Here] = SftConfig(keep_epochs="last")

    def __post_init__(self) -> None:
        check_seed_and_threads(self)


def sft(arguments: Sequence[str]) -> None:
    """`tastemaker sft`"""
    options = parse(_SftOptions, arguments, "sft")
    rows = _training_rows(options, read_demonstrations, Demonstration)
    held_out = read_given(options.validation, read_demonstrations, Demonstration)
    text = read_given(options.text, read_texts, Text)

    def work(folder: Path) -> None:
        warn_of_unknown_tokens(options.model, _named(options, data=rows, validation=held_out, text=text))
        warn_of_dropout(options.model, arguments, options.config.residual_dropout)
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

    inputs = _inputs(options, "model", "data", "validation", "text")
    stage(options.out, "sft", options.config, inputs, work, replace=options.replace, result=sft_result)


# The configs as the command line takes them: fields that only a recipe needs are left out of the help.


@dataclass(frozen=True, slots=True, kw_only=True)
class _RewardConfig(RewardConfig):
    init: tyro.conf.Suppress[str] = "baseline"  # --model says it


@dataclass(frozen=True, slots=True, kw_only=True)
class _PpoConfig(PpoConfig):
    kind: tyro.conf.Suppress[Literal["ppo"]] = "ppo"


@dataclass(frozen=True, slots=True, kw_only=True)
class _DpoConfig(DpoConfig):
    kind: tyro.conf.Suppress[Literal["dpo"]] = "dpo"


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
    keep_personal_data: bool = False
    """Train on records too that hold e-mail addresses, telephone numbers, secrets and the like."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[_RewardConfig, Here] = _RewardConfig()

    def __post_init__(self) -> None:
        check_seed_and_threads(self)


def reward(arguments: Sequence[str]) -> None:
    """`tastemaker reward`"""
    options = parse(_RewardOptions, arguments, "reward")
    rows = _training_rows(options, read_rankings, Ranking)
    measured = [read_given(source, read_rankings, Ranking) for source in (options.validation, options.held_out_raters)]
    centred = read_given(options.demonstrations, read_demonstrations, Demonstration)

    def work(folder: Path) -> None:
        named = _named(options, data=rows, validation=measured[0], held_out_raters=measured[1], demonstrations=centred)
        warn_of_unknown_tokens(options.model, named)
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
    inputs = _inputs(options, *names)
    stage(options.out, "reward", options.config, inputs, work, replace=options.replace, result=reward_result)


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
    keep_personal_data: bool = False
    """Train on records too that hold e-mail addresses, telephone numbers, secrets and the like."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[_PpoConfig, Here]

    def __post_init__(self) -> None:
        check_seed_and_threads(self)


def ppo(arguments: Sequence[str]) -> None:
    """`tastemaker ppo`"""
    options = parse(_PpoOptions, arguments, "ppo")
    config = options.config
    rows = _training_rows(options, read_prompts, Prompt)
    text, held_out = (read_given(source, read_texts, Text) for source in (options.text, options.heldout_text))

    def work(folder: Path) -> None:
        warn_of_unknown_tokens(config.init, _named(options, data=rows, text=text, heldout_text=held_out))
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

    inputs = _inputs(options, "data", "text", "heldout_text")
    inputs |= {"init": sources.fingerprint(config.init), "reward": sources.fingerprint(config.reward)}
    stage(options.out, "ppo", config, inputs, work, replace=options.replace, result=ppo_result)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DpoOptions:
    """Optimise a policy on rankings directly. Writes OUT/model and, with --validation, OUT/results.json."""

    data: str
    """Rankings, as for `tastemaker reward`."""
    out: Path
    """The folder to write."""
    validation: str | None = None
    """Held-out rankings, to measure the implicit reward's accuracy on."""
    keep_personal_data: bool = False
    """Train on records too that hold e-mail addresses, telephone numbers, secrets and the like."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""
    config: Annotated[_DpoConfig, Here]

    def __post_init__(self) -> None:
        check_seed_and_threads(self)


def dpo(arguments: Sequence[str]) -> None:
    """`tastemaker dpo`"""
    options = parse(_DpoOptions, arguments, "dpo")
    rows = _training_rows(options, read_rankings, Ranking)
    held_out = read_given(options.validation, read_rankings, Ranking)

    def work(folder: Path) -> None:
        warn_of_unknown_tokens(options.config.init, _named(options, data=rows, validation=held_out))
        train_dpo(
            folder,
            config=options.config,
            init=options.config.init,
            rankings=rows,
            validation=held_out,
            device=parallel.prepare(options.threads),
            seed=options.seed,
        )

    inputs = _inputs(options, "data", "validation") | {"init": sources.fingerprint(options.config.init)}
    stage(options.out, "dpo", options.config, inputs, work, replace=options.replace, result=dpo_result)


_Options = _SftOptions | _RewardOptions | _PpoOptions | _DpoOptions


def _training_rows(
    options: _Options, read: Callable[..., list[TrainingRecord]], kind: type[TrainingRecord]
) -> list[TrainingRecord]:
    return read_training(options.data, read, kind, keep_personal_data=options.keep_personal_data)


def _named(options: _Options, **records: Sequence[Record]) -> Mapping[str, Sequence[Record]]:
    """Records by the name of the file that they are from; they go by the name of the option that names it."""
    return {getattr(options, option): rows for option, rows in records.items() if rows}


def _inputs(options: _Options, *names: str) -> dict[str, Path | str]:
    personal_data = "kept" if options.keep_personal_data else "left out"
    return inputs_of(options, *names) | {"personal_data": personal_data}
