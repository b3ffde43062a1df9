"""Commands about whole runs: run a recipe, compare policies, write the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from tastemaker import sources
from tastemaker.commands.alone import stage
from tastemaker.commands.fields import as_toml
from tastemaker.commands.loading import heavy_imports
from tastemaker.commands.options import also, check_pairs, parse, read_records
from tastemaker.commands.options import inputs as inputs_of
from tastemaker.config import load_recipe, read_toml
from tastemaker.console import say
from tastemaker.errors import ConfigError
from tastemaker.files import read_prompts
from tastemaker.ranges import check_seed_and_threads, parse_size
from tastemaker.records import Prompt
from tastemaker.settings import Precision


def run(arguments: Sequence[str]) -> None:
    """`tastemaker run RECIPE --out DIR [--seed N] [--max-memory SIZE] [--section.field VALUE]`"""
    parser = _Parser(
        prog="tastemaker run",
        description="Run a recipe. Finished stages are skipped while their inputs stay; interrupted ones continue.",
        epilog="Any field of the recipe can be set, such as --policy.ppo-ptx.kl-coef 0.05; --fields lists them all.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="a TOML file, such as recipes/tiny.toml")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--max-memory", metavar="SIZE", help="train in micro-batches that keep within it, such as 6GB; slower"
    )
    parser.add_argument("--fields", action="store_true", help="print the whole recipe, every field with its value")
    known, overrides = parser.parse_known_args(list(arguments))
    max_memory = None if known.max_memory is None else parse_size(known.max_memory, "max_memory")
    read_toml(known.recipe)  # what is no recipe at all is refused before torch is imported
    with heavy_imports():
        from tastemaker.pipeline import run as run_pipeline
        from tastemaker.recipe import Recipe
    recipe = load_recipe(known.recipe, Recipe)
    if overrides:
        recipe = parse(Recipe, overrides, "run RECIPE", default=recipe)
    if known.fields:
        print(as_toml(recipe), end="")
        return
    run_pipeline(recipe, known.out, max_memory=max_memory)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. `{self.prog} --help` lists the options.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _EvaluateOptions:
    """Compare policies on prompts, judged by a reward model that none of them was trained on, or by a Python function.

    The first policy is compared with each of the others. For blind judging by people, use a recipe.
    """

    policies: dict[str, str]
    """Names and model folders: --policies new out/ppo/model old out/sft/model."""
    data: str
    """Prompts."""
    judge: str
    """A reward model's folder, or a Python function module:function."""
    out: Path
    """The folder to write: results.json and responses.jsonl."""
    max_new_tokens: Annotated[int, also("--decoding.max-new-tokens")] = 256
    """Where a response is cut off; `--decoding.max-new-tokens`, as ppo has it, is the same."""
    temperature: Annotated[float, also("--decoding.temperature")] = 1.0
    """Logits are divided by it."""
    greedy: Annotated[bool, also("--decoding.greedy")] = False
    """Take the likeliest token each time."""
    precision: Annotated[Precision | None, also("--decoding.precision")] = None
    """What matrix products are computed in (none: float32); bfloat16 is faster, and its words differ in places."""
    stop: tuple[str, ...] = ()
    """Texts that end a response too, and are left out of it: a base model goes on with the next question after
    `--stop "Q:"`."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""

    def __post_init__(self) -> None:
        check_seed_and_threads(self)


def evaluate(arguments: Sequence[str]) -> None:
    """`tastemaker evaluate`"""
    from tastemaker.evaluation_alone import evaluate_alone
    from tastemaker.responses import DecodingConfig

    check_pairs(arguments)
    options = parse(_EvaluateOptions, arguments, "evaluate")
    if len(options.policies) < 2:
        raise ConfigError("give at least two policies to compare: --policies new PATH old PATH.")
    decoding = DecodingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        greedy=options.greedy,
        precision=options.precision,
        stop_texts=options.stop,
    )
    rows = read_records(options.data, read_prompts, Prompt)

    def work(folder: Path) -> None:
        evaluate_alone(
            folder, options.policies, rows, options.judge, decoding, seed=options.seed, threads=options.threads
        )

    inputs = inputs_of(options, "data", "judge") | {"order": json.dumps(list(options.policies))}
    inputs |= {f"policy/{name}": sources.fingerprint(path) for name, path in options.policies.items()}
    stage(options.out, "evaluate", decoding, inputs, work, replace=options.replace)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReportOptions:
    """Write OUT/report.html anew, from the results of a run or an evaluation that has finished."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The run's folder."""


def report(arguments: Sequence[str]) -> None:
    """`tastemaker report OUT`"""
    from tastemaker.report import write_report

    say(f"report: {write_report(parse(_ReportOptions, arguments, 'report').out)}")
