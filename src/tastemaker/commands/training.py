"""Commands that train: supervised fine-tuning, the reward model, PPO, DPO, each on the user's own files.

What needs torch is imported when a stage is about to run: help, and what is said of a mistyped option or of a file that
is not there, come at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tastemaker import processes, sources
from tastemaker.commands.alone import stage
from tastemaker.commands.loading import heavy_imports
from tastemaker.commands.options import Here, TrainingRecord, parse, read_given, read_training
from tastemaker.commands.options import inputs as inputs_of
from tastemaker.commands.remarks import (
    Record,
    dpo_result,
    ppo_result,
    reward_result,
    sft_result,
    warn_of_dropout,
    warn_of_leaks,
    warn_of_marked,
    warn_of_unknown_tokens,
)
from tastemaker.errors import DataError
from tastemaker.files import read_demonstrations, read_prompts, read_rankings, read_texts
from tastemaker.functions import is_function_path, load_function
from tastemaker.model_places import check_folder, check_policy, resolve_source
from tastemaker.ranges import check_seed_and_threads, parse_size
from tastemaker.records import Demonstration, Prompt, Ranking, Text, records_hash
from tastemaker.settings import DpoConfig, PpoConfig, RewardConfig, SftConfig

if TYPE_CHECKING:
    import torch

    from tastemaker.forecast import Config, Forecast
    from tastemaker.scoring import Scorer


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
    """Processor threads of each process (none: all, or of several processes its share)."""
    max_memory: str | None = None
    """Take the largest micro-batches, up to those set, that are expected to keep within it, such as 6GB. Slower:
    what is freed goes back to the system at once."""
    config: Annotated[SftConfig, Here] = SftConfig(keep_epochs="last")

    def __post_init__(self) -> None:
        _check(self)


def sft(arguments: Sequence[str]) -> None:
    """`tastemaker sft`"""
    options = parse(_SftOptions, arguments, "sft")
    check_policy(options.model)
    rows = _training_rows(options, read_demonstrations, Demonstration)
    held_out = read_given(options.validation, read_demonstrations, Demonstration)
    text = read_given(options.text, read_texts, Text)

    def work(folder: Path, config: SftConfig) -> None:
        from tastemaker.stages.sft import train_sft

        warn_of_unknown_tokens(options.model, _seen_alike(options, data=rows, validation=held_out, text=text))
        warn_of_leaks(rows, held_out)
        warn_of_dropout(options.model, arguments, config.residual_dropout)
        train_sft(
            folder,
            config=config,
            base=options.model,
            demonstrations=rows,
            validation=held_out,
            pretraining=text,
            device=_device(options),
            seed=options.seed,
        )

    def forecast() -> Forecast[SftConfig]:
        from tastemaker.forecast import Place, sft_forecast

        return sft_forecast(options.model, rows, text, Place.here())

    inputs = _inputs(options, "model", "data", "validation", "text")
    _train("sft", options, options.config, inputs, work, forecast, sft_result)


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
    """The model to start from, usually an SFT model's folder; a .gguf file or a hub name too."""
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
    """Processor threads of each process (none: all, or of several processes its share)."""
    max_memory: str | None = None
    """Take the largest micro-batches, up to those set, that are expected to keep within it, such as 6GB. Slower:
    what is freed goes back to the system at once."""
    config: Annotated[_RewardConfig, Here] = _RewardConfig()

    def __post_init__(self) -> None:
        _check(self)


def reward(arguments: Sequence[str]) -> None:
    """`tastemaker reward`"""
    options = parse(_RewardOptions, arguments, "reward")
    check_policy(options.model)
    rows = _training_rows(options, read_rankings, Ranking)
    measured = [read_given(source, read_rankings, Ranking) for source in (options.validation, options.held_out_raters)]
    centred = read_given(options.demonstrations, read_demonstrations, Demonstration)

    def work(folder: Path, config: RewardConfig) -> None:
        from tastemaker.stages.reward import train_reward_model

        named = _seen_alike(
            options, data=rows, validation=measured[0], held_out_raters=measured[1], demonstrations=centred
        )
        warn_of_unknown_tokens(options.model, named)
        warn_of_leaks(rows, [*measured[0], *measured[1]], config.part)
        train_reward_model(
            folder,
            config=config,
            init=options.model,
            rankings=rows,
            validation=measured[0],
            held_out_raters=measured[1],
            demonstrations=centred,
            device=_device(options),
            seed=options.seed,
        )

    def forecast() -> Forecast[RewardConfig]:
        from tastemaker.forecast import Place, reward_forecast

        return reward_forecast(options.model, rows, Place.here())

    inputs = _inputs(options, "model", "data", "validation", "held_out_raters", "demonstrations")
    _train("reward", options, options.config, inputs, work, forecast, reward_result)


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
    """Processor threads of each process (none: all, or of several processes its share)."""
    max_memory: str | None = None
    """Take the largest micro-batches, up to those set, that are expected to keep within it, such as 6GB. Slower:
    what is freed goes back to the system at once."""
    config: Annotated[_PpoConfig, Here]

    def __post_init__(self) -> None:
        _check(self)


def ppo(arguments: Sequence[str]) -> None:
    """`tastemaker ppo`"""
    options = parse(_PpoOptions, arguments, "ppo")
    init, reward = options.config.init, options.config.reward
    is_function = is_function_path(reward)
    check_policy(init)
    if not is_function:
        check_folder(resolve_source(reward))
    rows = _training_rows(options, read_prompts, Prompt)
    text, held_out = (read_given(source, read_texts, Text) for source in (options.text, options.heldout_text))

    def work(folder: Path, config: PpoConfig) -> None:
        from tastemaker.stages.ppo import train_ppo

        warn_of_unknown_tokens(init, _seen_alike(options, data=rows, text=text, heldout_text=held_out))
        warn_of_marked(rows)
        device = _device(options)
        train_ppo(
            folder,
            config=config,
            init=init,
            reward=None if is_function else reward,
            scorer=_scorer(config, device),
            prompts=rows,
            pretraining=text,
            heldout_text=held_out,
            device=device,
            seed=options.seed,
        )

    def forecast() -> Forecast[PpoConfig]:
        from tastemaker.forecast import Place, ppo_forecast

        return ppo_forecast(init, None if is_function else reward, rows, text, Place.here())

    inputs = _inputs(options, "data", "text", "heldout_text")
    inputs |= {"init": sources.fingerprint(init), "reward": sources.fingerprint(reward)}
    _train("ppo", options, options.config, inputs, work, forecast, ppo_result)


def _scorer(config: PpoConfig, device: torch.device) -> Scorer:
    from tastemaker.checkpoint import load_reward_model
    from tastemaker.model import freeze
    from tastemaker.scoring import FunctionScorer, ModelScorer

    if is_function_path(config.reward):
        return FunctionScorer(load_function(config.reward), name=config.reward)
    model = freeze(load_reward_model(config.reward), config.policy.precision).to(device)
    return ModelScorer(model, budget=config.microbatch_tokens, precision=config.policy.precision)


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
    """Processor threads of each process (none: all, or of several processes its share)."""
    max_memory: str | None = None
    """Take the largest micro-batches, up to those set, that are expected to keep within it, such as 6GB. Slower:
    what is freed goes back to the system at once."""
    config: Annotated[_DpoConfig, Here]

    def __post_init__(self) -> None:
        _check(self)


def dpo(arguments: Sequence[str]) -> None:
    """`tastemaker dpo`"""
    options = parse(_DpoOptions, arguments, "dpo")
    init = options.config.init
    check_policy(init)
    rows = _training_rows(options, read_rankings, Ranking)
    held_out = read_given(options.validation, read_rankings, Ranking)

    def work(folder: Path, config: DpoConfig) -> None:
        from tastemaker.stages.dpo import train_dpo

        warn_of_unknown_tokens(init, _seen_alike(options, data=rows, validation=held_out))
        warn_of_leaks(rows, held_out, config.part)
        train_dpo(
            folder,
            config=config,
            init=init,
            rankings=rows,
            validation=held_out,
            device=_device(options),
            seed=options.seed,
        )

    def forecast() -> Forecast[DpoConfig]:
        from tastemaker.forecast import Place, dpo_forecast

        return dpo_forecast(init, rows, Place.here())

    inputs = _inputs(options, "data", "validation") | {"init": sources.fingerprint(init)}
    _train("dpo", options, options.config, inputs, work, forecast, dpo_result)


_Options = _SftOptions | _RewardOptions | _PpoOptions | _DpoOptions


def _check(options: _Options) -> None:
    """The options that all these commands have."""
    check_seed_and_threads(options)
    if options.max_memory is not None:
        parse_size(options.max_memory, "max_memory")


def _train(
    name: str,
    options: _Options,
    config: Config,
    inputs: Mapping[str, Path | str],
    work: Callable[[Path, Config], None],
    forecast: Callable[[], Forecast[Config]],
    result: Callable[[Path], str],
) -> None:
    """Run a stage that trains: within a limit of memory if one is given, and what it takes is told beside the rest."""
    forecast = cache(forecast)
    if options.max_memory is not None:
        with heavy_imports():
            from tastemaker.forecast import fitted
        config = fitted(config, forecast(), parse_size(options.max_memory, "max_memory"))

    def observed(folder: Path) -> Mapping[str, Any]:
        with heavy_imports():
            from tastemaker.forecast import watched
        return watched(partial(work, folder, config), forecast, config)

    stage(options.out, name, config, inputs, observed, replace=options.replace, result=result)


def _device(options: _Options) -> torch.device:
    from tastemaker import parallel

    return parallel.prepare(options.threads, tight=options.max_memory is not None)


def _training_rows(
    options: _Options, read: Callable[..., list[TrainingRecord]], kind: type[TrainingRecord]
) -> list[TrainingRecord]:
    return read_training(options.data, read, kind, keep_personal_data=options.keep_personal_data)


def _seen_alike(options: _Options, **records: Sequence[Record]) -> Mapping[str, Sequence[Record]]:
    """Records by the name of the file that they are from; they go by the name of the option that names it.

    Raises:
        DataError: several processes have not all read the same.
    """
    if processes.several():
        from tastemaker import parallel

        mine = {option: records_hash(rows) for option, rows in records.items()}
        first, *others = parallel.in_shares(processes.count(), lambda _: [mine])
        for number, theirs in enumerate(others, 1):
            for option in records:
                if theirs[option] != first[option]:
                    raise DataError(
                        f"process {number} has read other records of --{option.replace('_', '-')} than the first, or "
                        "in another order. All must see the same files; what a function makes of a set it has to sort.",
                        path=getattr(options, option),
                    )
    return {getattr(options, option): rows for option, rows in records.items() if rows}


def _inputs(options: _Options, *names: str) -> dict[str, Path | str]:
    personal_data = "kept" if options.keep_personal_data else "left out"
    return inputs_of(options, *names) | {"personal_data": personal_data}
