"""The command that shows what a stage sees: which tokens it reads, learns from, stops at, and reads the score at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from tastemaker.commands.loading import heavy_imports
from tastemaker.commands.options import parse, read_given, read_training
from tastemaker.commands.token_lines import legend, lines_of
from tastemaker.errors import ConfigError
from tastemaker.files import read_demonstrations, read_prompts, read_rankings, read_texts
from tastemaker.functions import is_function_path
from tastemaker.model_places import check_folder, check_policy, resolve_source
from tastemaker.ranges import check_range, check_seed_and_threads
from tastemaker.records import Demonstration, Prompt, Ranking, Text
from tastemaker.settings import DpoConfig, PpoConfig, RewardConfig, SftConfig

if TYPE_CHECKING:
    from tastemaker.inspection import Config, Subject

STAGES = ("sft", "reward", "dpo", "ppo", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class _InspectOptions:
    """Show what a stage sees of its first examples, token by token: prompt, response, what is learned from, the end
    token, where the score is read, what is cut off.

    STAGE is sft, reward, dpo, ppo or text (pretraining text), with --model and --data; or the folder of a stage that
    has finished: of a run, which names all else, or of a stage alone, with --data.
    """

    stage: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STAGE")]
    """sft, reward, dpo, ppo, text, or a stage's folder."""
    model: str | None = None
    """The model that the stage starts from; its tokenizer and its config are read, not its weights."""
    data: str | None = None
    """Records, as the stage itself takes them."""
    reward: str | None = None
    """With ppo and --sample: the reward model, to see what it reads."""
    first: int = 3
    """How many examples."""
    ids: bool = False
    """Show each token's id behind it."""
    plain: bool = False
    """Without colours, as if NO_COLOR were set or the output no terminal."""
    sample: bool = False
    """ppo: load the weights, and sample the first responses that training with this seed would begin with."""
    text: bool = False
    """Of a run: its pretraining text too, where the stage mixes some in."""
    keep_personal_data: bool = False
    """Show records too that hold personal data; the stage leaves them out unless it is told the same."""
    max_prompt_tokens: int | None = None
    """reward, dpo: the longest prompt that is read (none: as the stage has it)."""
    max_new_tokens: int | None = None
    """ppo: where a response is cut off (none: as the stage has it)."""
    max_text_tokens: int | None = None
    """text: the length of a piece (none: as the stage has it)."""
    truncated: Literal["penalty", "score", "mask"] | None = None
    """ppo: what becomes of a response that was cut off (none: as the stage has it)."""
    seed: int | None = None
    """ppo: the seed of what is sampled (none: the run's, or 0)."""
    threads: int | None = None
    """Processor threads (none: all)."""

    def __post_init__(self) -> None:
        check_seed_and_threads(self)
        check_range(self, "first", "max_prompt_tokens", "max_new_tokens", least=1)
        check_range(self, "max_text_tokens", least=2)  # a piece's first token is not predicted


def inspect(arguments: Sequence[str]) -> None:
    """`tastemaker inspect STAGE`"""
    options = parse(_InspectOptions, arguments, "inspect")
    given = _given(options)  # what is wrong with it is said before torch is imported
    with heavy_imports():
        from tastemaker import inspection, parallel
    subject = _finished(options) if given is None else inspection.Subject(**given)
    if options.sample and not isinstance(subject.config, PpoConfig):
        raise ConfigError("--sample is for ppo, which trains on responses that it samples.")
    if options.sample:
        parallel.prepare(options.threads)
    seen = inspection.look(subject, first=options.first, sample=options.sample)
    plain = options.plain or bool(os.environ.get("NO_COLOR"))
    console = Console(color_system=None if plain else "auto", highlight=False)
    for line in (*lines_of(seen, ids=options.ids, width=console.width), *legend(seen)):
        console.print(line, soft_wrap=True)


def _given(options: _InspectOptions) -> dict[str, Any] | None:
    """The subject of a stage that is named, by its fields; None where STAGE is a folder."""
    stage = options.stage
    if stage not in STAGES:
        if not Path(stage).is_dir():
            raise ConfigError(f"{stage!r} is neither a stage ({', '.join(STAGES)}) nor a folder of one.")
        return None
    if options.model is None or options.data is None:
        raise ConfigError(f"{stage} needs --model and --data; the folder of a run's stage needs neither.")
    check_policy(options.model)
    judge = _judge(options.reward)
    if judge is not None:
        check_folder(resolve_source(judge))
    return {
        "config": _changed(_default_config(options, options.model), options),
        "model": options.model,
        "reward": judge,
        "seed": options.seed or 0,
        **_records(stage, options.data, keep_personal_data=options.keep_personal_data),
    }


def _finished(options: _InspectOptions) -> Subject:
    """What a stage read that has finished."""
    from tastemaker.inspection import Subject, models_alone, read_finished, subject_in_run

    finished = read_finished(Path(options.stage))
    config = _changed(finished.config, options)
    if finished.variant is not None:
        if options.model or options.data or options.reward:
            raise ConfigError(f"{options.stage} is of a run, which names its own models and data; leave them out.")
        subject = subject_in_run(finished, config, text=options.text)
        return subject if options.seed is None else replace(subject, seed=options.seed)
    if options.data is None:
        raise ConfigError(f"{options.stage} is of a stage alone, whose manifest does not name its data; give --data.")
    model, reward = models_alone(finished)
    keep = options.keep_personal_data or finished.inputs.get("personal_data") == "kept"
    return Subject(
        config=config,
        model=options.model or model,
        reward=_judge(options.reward) or reward,
        seed=int(finished.inputs.get("seed", 0)) if options.seed is None else options.seed,
        **_records(finished.stage, options.data, keep_personal_data=keep),
    )


def _records(stage: str, data: str, *, keep_personal_data: bool) -> dict[str, Any]:
    """The records of --data, read as the stage itself reads them, by the subject's field that holds them."""
    if stage == "text":
        return {"texts": read_given(data, read_texts, Text)}
    if stage == "sft":
        rows = read_training(data, read_demonstrations, Demonstration, keep_personal_data=keep_personal_data)
        return {"demonstrations": rows}
    if stage == "ppo":
        return {"prompts": read_training(data, read_prompts, Prompt, keep_personal_data=keep_personal_data)}
    return {"rankings": read_training(data, read_rankings, Ranking, keep_personal_data=keep_personal_data)}


def _judge(reward: str | None) -> str | None:
    """A reward model; a Python function reads no tokens."""
    return None if reward is None or is_function_path(reward) else reward


def _default_config(options: _InspectOptions, model: str) -> Config:
    """The stage's config as its command has it by default."""
    if options.stage == "reward":
        return RewardConfig()
    if options.stage == "dpo":
        return DpoConfig(init=model)
    if options.stage == "ppo":
        return PpoConfig(init=model, reward=options.reward or "")
    return SftConfig()


def _changed(config: Config, options: _InspectOptions) -> Config:
    """The config with what is set on the command line.

    Raises:
        ConfigError: something is set that the stage does not have.
    """
    names = ("max_prompt_tokens", "max_text_tokens", "truncated")
    changes: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    unknown = [name for name in changes if not hasattr(config, name)]
    if options.max_new_tokens is not None:
        if isinstance(config, PpoConfig):
            changes["decoding"] = replace(config.decoding, max_new_tokens=options.max_new_tokens)
        else:
            unknown.append("max_new_tokens")
    if unknown:
        raise ConfigError(f"--{unknown[0].replace('_', '-')} is no setting of {options.stage}; leave it out.")
    return replace(config, **changes)
