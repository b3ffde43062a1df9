"""What the commands share: parsing, reading the user's files, and running one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from tastemaker import sources
from tastemaker.artefacts import run_stage
from tastemaker.console import say
from tastemaker.errors import ConfigError

Options = TypeVar("Options")
Record = TypeVar("Record")

Here = tyro.conf.arg(name="")  # a config's fields as options of the command itself


def parse(options: type[Options], arguments: Sequence[str], name: str) -> Options:
    """Read a command's arguments into its dataclass of options."""
    return tyro.cli(options, args=list(arguments), prog=f"tastemaker {name}")


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
