"""Commands about prompts and people; they need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tastemaker import sources
from tastemaker.commands.options import parse, read_records, stage
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import read_prompts, write_json, write_records
from tastemaker.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _PromptsOptions:
    """Take in prompts: drop those that share a long prefix, at most 200 a user, no personal data in training; split."""

    data: str
    """A file, a folder saved by datasets, or the name of a data set."""
    out: Path
    """The folder to write."""
    max_per_user: int = 200
    """Prompts kept of one user."""
    prefix_characters: int = 128
    """Prompts that begin with the same so many characters are taken for one."""
    validation_share: float = 0.1
    """Share of users whose prompts are for validation."""
    test_share: float = 0.1
    """Share of users whose prompts are for the final evaluation."""
    languages: tuple[str, ...] = ()
    """Languages to keep, such as "en"; none named keeps all."""
    keep_personal_data: bool = False
    """Keep training prompts that hold e-mail addresses, numbers and the like."""


def prompts(arguments: Sequence[str]) -> None:
    """`tastemaker prompts`"""
    from tastemaker.stages.prompts import PromptsConfig, take_in

    options = parse(_PromptsOptions, arguments, "prompts")
    config = PromptsConfig(
        source=options.data,
        max_per_user=options.max_per_user,
        prefix_characters=options.prefix_characters,
        validation_share=options.validation_share,
        test_share=options.test_share,
        languages=options.languages,
        filter_personal_data=not options.keep_personal_data,
    )
    rows = read_records(options.data, read_prompts, Prompt)

    def work(folder: Path) -> None:
        kept, report = take_in(rows, config)
        for split in ("train", "validation", "test"):
            write_records(folder / f"{split}.jsonl", [prompt for prompt in kept if prompt.about.split == split])
        write_json(folder / "report.json", to_json(report))
        say(report.summary())

    stage(options.out, "prompts", config, {"data": sources.fingerprint(options.data)}, work)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LabelOptions:
    """See what people have to answer, hand out tasks as a file, take the answers in."""

    action: tyro.conf.Positional[Literal["status", "tasks", "answers"]]
    """status: every study and what is missing. tasks: write tasks for a rater. answers: read a filled-in file."""
    database: str
    """The label store: a file such as out/demo/labels.db, or a database URL."""
    study: str | None = None
    """The study that tasks are taken from."""
    rater: str | None = None
    """The rater's name; registered in the study's group at the first time."""
    file: Path | None = None
    """The JSONL file to write or to read."""
    limit: int = 100
    """Tasks to hand out at most."""


def label(arguments: Sequence[str]) -> None:
    """`tastemaker label`"""
    from tastemaker.store import LabelService, Store

    options = parse(_LabelOptions, arguments, "label")
    if "://" not in options.database and not Path(options.database).exists():
        raise DataError("does not exist; a run with raters = 'people' creates it.", path=options.database)
    store = Store.open(options.database)
    try:
        service = LabelService(store)
        if options.action == "status":
            for study in service.studies():
                progress = service.progress(study.name)
                print(f"{study.name}\t{study.kind}\t{study.rater_group}\t{progress.answered}/{progress.slots} answered")
        elif options.action == "tasks":
            study, rater, path = _required(options, "study", "rater", "file")
            group = next((known.rater_group for known in service.studies() if known.name == study), None)
            if group is None:
                raise DataError(f"there is no study {study!r}; `tastemaker label status` lists them.")
            service.add_rater(rater, group=group, origin="human")
            count = service.tasks_to_file(study, rater, path, limit=options.limit)
            say(f'{count} tasks for {rater} in {path}: fill in each "answer", then `tastemaker label answers --file`')
        else:
            (path,) = _required(options, "file")
            report = service.answers_from_file(path)
            say(str(report))
    finally:
        store.close()


def _required(options: Any, *names: str) -> tuple[Any, ...]:
    missing = [f"--{name}" for name in names if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"`tastemaker label {options.action}` needs {' and '.join(missing)}.")
    return tuple(getattr(options, name) for name in names)
