"""Commands about whole runs: run a recipe, compare policies, write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tyro

from tastemaker import sources
from tastemaker.commands.options import inputs as inputs_of
from tastemaker.commands.options import parse, read_records, stage
from tastemaker.config import load_recipe
from tastemaker.console import say
from tastemaker.errors import ConfigError
from tastemaker.files import read_prompts
from tastemaker.records import Prompt


def run(arguments: Sequence[str]) -> None:
    """`tastemaker run RECIPE --out DIR [--seed N] [--section.field VALUE]`"""
    from tastemaker.pipeline import run as run_pipeline
    from tastemaker.recipe import Recipe

    parser = _Parser(
        prog="tastemaker run",
        description="Run a recipe. Finished stages are skipped while their inputs stay; interrupted ones continue.",
        epilog="Any field of the recipe can be set, such as --policy.ppo-ptx.kl-coef 0.05; --fields lists them all.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="a TOML file, such as recipes/tiny.toml")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--fields", action="store_true", help="list the recipe's fields with their values, and stop")
    known, overrides = parser.parse_known_args(list(arguments))
    recipe = load_recipe(known.recipe, Recipe)
    if known.fields or overrides:
        extra = ["--help"] if known.fields else overrides
        recipe = parse(Recipe, extra, "run RECIPE", default=recipe)
    run_pipeline(recipe, known.out)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. `{self.prog} --help` lists the options.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _EvaluateOptions:
    """Compare policies on prompts, judged by a reward model that none of them was trained on.

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
    max_new_tokens: int = 256
    """Where a response is cut off."""
    temperature: float = 1.0
    """Logits are divided by it."""
    greedy: bool = False
    """Take the likeliest token each time."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (none: all)."""


def evaluate(arguments: Sequence[str]) -> None:
    """`tastemaker evaluate`"""
    from tastemaker.evaluation_alone import evaluate_alone
    from tastemaker.responses import DecodingConfig

    options = parse(_EvaluateOptions, arguments, "evaluate")
    if len(options.policies) < 2:
        raise ConfigError("give at least two policies to compare: --policies new PATH old PATH.")
    rows = read_records(options.data, read_prompts, Prompt)
    decoding = DecodingConfig(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, greedy=options.greedy
    )

    def work(folder: Path) -> None:
        evaluate_alone(
            folder, options.policies, rows, options.judge, decoding, seed=options.seed, threads=options.threads
        )

    inputs: dict[str, Path | str] = {name: sources.fingerprint(path) for name, path in options.policies.items()}
    inputs |= inputs_of(options, "data", "judge")
    stage(options.out, "evaluate", decoding, inputs, work)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReportOptions:
    """Write OUT/report.html from what a run has measured so far."""

    out: tyro.conf.Positional[Path]
    """The run's folder."""


def report(arguments: Sequence[str]) -> None:
    """`tastemaker report OUT`"""
    from tastemaker.report import write_report

    say(f"report: {write_report(parse(_ReportOptions, arguments, 'report').out)}")
