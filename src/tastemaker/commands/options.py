"""What the commands share: parsing, reading the user's files, and running one stage alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro

from tastemaker import sources
from tastemaker.artefacts import run_stage
from tastemaker.console import say
from tastemaker.errors import ConfigError

Options = TypeVar("Options")
Record = TypeVar("Record")

# A section that a recipe may leave out is set by its fields all the same, and not chosen as a subcommand.
SETTINGS = (tyro.conf.AvoidSubcommands,)
Here = tyro.conf.arg(name="")  # a config's fields as options of the command itself


def parse(options: type[Options], arguments: Sequence[str], name: str, *, default: Options | None = None) -> Options:
    """Read a command's arguments into its dataclass of options, over those of `default` if that is given.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type.
    """
    prog = f"tastemaker {name}"
    box, settings = io.StringIO(), () if default is None else SETTINGS
    try:
        with redirect_stderr(box):
            parsed = tyro.cli(options, args=list(arguments), prog=prog, default=default, config=settings)
    except SystemExit as exit_:
        if not exit_.code:  # the help was asked for, and printed
            raise
        raise ConfigError(f"{_sentence(box.getvalue())} `{prog} --help` lists the options.") from None
    assert parsed is not None  # tyro's annotation lets through the None that `default` may be
    return parsed


def _sentence(box: str) -> str:
    """What tyro says in a box, as a sentence: the part above its first rule, and the nearest option it knows.

    The box is drawn in characters or, where the terminal has none, in blanks and hyphens.
    """
    parts: list[list[str]] = [[]]
    for row in (line[1:].rstrip("│╮╯ ") for line in box.splitlines()[1:]):
        if row.strip(" ─-"):
            parts[-1].append(row)
        elif parts[-1]:
            parts.append([])
    said, *others = [part for part in parts if part]
    if "Missing from" in said[0]:  # each option stands in its own line, what it means is set further in below it
        missing = [row.split()[0] for row in said[1:] if len(row) - len(row.lstrip()) == 5]
        return f"Required: {', '.join(missing)}."
    near = [part[1].split()[0] for part in others if "Perhaps you meant" in part[0]]
    return " ".join(" ".join(said).split()).rstrip(".") + "." + (f" Did you mean {near[0]}?" if near else "")


def stage(out: Path, stage: str, config: Any, inputs: Mapping[str, Path | str], work: Callable[[Path], None]) -> None:
    """Run one stage alone: refuse to write over something else, skip what is done, continue what was interrupted."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_ours(out)):
        raise ConfigError(f"{out} holds something that is not a stage of ours; give a new folder for --out.")
    outcome = run_stage(out, stage=stage, config=config, inputs=inputs, work=work)
    say(f"{out} is up to date" if outcome.skipped else f"{out} written in {outcome.seconds:.0f} s")


def _is_ours(out: Path) -> bool:
    return (out / "manifest.json").exists() or (out / "started.json").exists()


def inputs(options: Any, *names: str) -> dict[str, Path | str]:
    return {name: sources.fingerprint(getattr(options, name)) for name in names} | {"seed": str(options.seed)}


def read_records(source: str, read: Callable[..., list[Record]], kind: type[Record]) -> list[Record]:
    """Read records; rows that public data sets are known to have and nobody can use are left out, and said to be."""
    return sources.load_reporting(source, read, kind, seed=0)


def read_given(source: str | None, read: Callable[..., list[Record]], kind: type[Record]) -> list[Record]:
    return [] if source is None else read_records(source, read, kind)
