"""The command that takes in prompts; it needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from tastemaker import sources
from tastemaker.commands.alone import stage
from tastemaker.commands.options import Here, parse, read_given, read_records
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.files import read_prompts, write_json, write_records
from tastemaker.records import Prompt
from tastemaker.stages.prompts import PromptsConfig, gathered, take_in


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptsConfig(PromptsConfig):
    source: tyro.conf.Suppress[str] = ""  # --data says it
    filter_personal_data: tyro.conf.Suppress[bool] = True  # --keep-personal-data says it, as everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptsOptions:
    """Take in prompts: drop those that share a long prefix, at most 200 a user, no personal data in training; split."""

    data: str
    """A file, a folder saved by datasets, or the name of a data set."""
    out: Path
    """The folder to write."""
    keep_personal_data: bool = False
    """Keep training prompts that hold e-mail addresses, numbers and the like."""
    replace: bool = False
    """Write over a finished result of other settings in OUT."""
    config: Annotated[_PromptsConfig, Here] = _PromptsConfig()


def prompts(arguments: Sequence[str]) -> None:
    """`tastemaker prompts`"""
    options = parse(_PromptsOptions, arguments, "prompts")
    config = replace(options.config, source=options.data, filter_personal_data=not options.keep_personal_data)
    rows = read_records(options.data, read_prompts, Prompt)
    further = read_given(config.test_source, read_prompts, Prompt)

    def work(folder: Path) -> None:
        kept, report = take_in(gathered(rows, further, config), config)
        for split in ("train", "validation", "test"):
            write_records(folder / f"{split}.jsonl", [prompt for prompt in kept if prompt.about.split == split])
        write_json(folder / "report.json", to_json(report))
        say(report.summary())

    inputs = {"data": sources.fingerprint(options.data)}
    if config.test_source is not None:
        inputs["test_source"] = sources.fingerprint(config.test_source)
    stage(options.out, "prompts", config, inputs, work, replace=options.replace)
