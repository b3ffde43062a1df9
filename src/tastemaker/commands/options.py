"""What the commands share: parsing, and reading the user's files."""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro

from tastemaker import sources
from tastemaker.console import say
from tastemaker.errors import ConfigError
from tastemaker.records import Demonstration, Prompt, Ranking

Options = TypeVar("Options")
Record = TypeVar("Record")
TrainingRecord = TypeVar(
    "TrainingRecord", Prompt, Demonstration, Ranking
)  # what people wrote, and may have written of themselves

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
    words = _with_sections_chosen(arguments, _sections(options)) if default is None else list(arguments)
    try:
        with redirect_stderr(box):
            parsed = tyro.cli(options, args=words, prog=prog, default=default, config=settings)
    except SystemExit as exit_:
        if not exit_.code:  # the help was asked for, and printed
            raise
        raise ConfigError(f"{_sentence(box.getvalue())} `{prog} --help` lists the options.") from None
    assert parsed is not None  # tyro's annotation lets through the None that `default` may be
    return parsed


def _sections(options: type[Any]) -> dict[str, str]:
    """The sections that a command's config may lack, each with the word by which tyro has it chosen."""
    found = {}
    config = typing.get_type_hints(options).get("config")
    for name, kind in typing.get_type_hints(config).items() if dataclasses.is_dataclass(config) else ():
        choices = typing.get_args(kind)
        for choice in choices if type(None) in choices else ():
            if dataclasses.is_dataclass(choice) and isinstance(choice, type):
                name, word = name.replace("_", "-"), re.sub(r"(?<!^)(?=[A-Z])", "-", choice.__name__).lower()
                found[name] = f"{name}:{word}"
    return found


def _with_sections_chosen(arguments: Sequence[str], sections: Mapping[str, str]) -> list[str]:
    """`--lora.rank 4` says that there is a section `lora`; tyro wants `lora:lora-config` before it, behind all else."""
    if any(word.partition(":")[0] in sections for word in arguments if ":" in word):
        return list(arguments)  # whoever chooses sections puts things in order
    options: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or not options:
            options.append([])
        options[-1].append(word)
    places = {name: [o for o in options if _section_of(o[0]) == name] for name in sections}
    words = [word for option in options if _section_of(option[0]) not in sections for word in option]
    for name, chosen in sections.items():
        words += [chosen, *(word for option in places[name] for word in option)] if places[name] else []
    return words


def _section_of(option: str) -> str:
    section, dot, _ = option.partition("=")[0].removeprefix("--").partition(".")
    return section.replace("_", "-") if dot else ""


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
        unknown = [row.split()[0] for part in others if "Unrecognized" in part[0] for row in part[1:]]
        return " ".join([*_unknown([word for word in unknown if word.startswith("--")], missing), _required(missing)])
    near = [part[1].split()[0] for part in others if "Perhaps you meant" in part[0]]
    return " ".join(" ".join(said).split()).rstrip(".") + "." + (f" Did you mean {near[0]}?" if near else "")


def _required(missing: Sequence[str]) -> str:
    return f"Required: {', '.join(missing)}."


def _unknown(options: Sequence[str], missing: Sequence[str]) -> list[str]:
    """What is said of each option that is unknown: most often it is a required one, misspelt."""
    said = []
    for option in options:
        close = difflib.get_close_matches(option.partition("=")[0], missing, n=1)
        said.append(f"Unknown: {option}." + (f" Did you mean {close[0]}?" if close else ""))
    return said


def also(name: str) -> Any:
    """Another spelling of an option: decoding is a section of its own where there are many sections."""
    return tyro.conf.arg(aliases=[name])


def check_pairs(arguments: Sequence[str]) -> None:
    """Of `--policies new PATH old PATH` the parser only knows that it failed."""
    words = list(arguments)
    if "--policies" in words:
        rest = words[words.index("--policies") + 1 :]
        given = next((place for place, word in enumerate(rest) if word.startswith("-")), len(rest))
        if given % 2:
            raise ConfigError(f"--policies takes names and folders in pairs: new PATH old PATH; {given} were given.")


def inputs(options: Any, *names: str) -> dict[str, Path | str]:
    """What a command's result depends on besides its config: the content of what `names` name, and the seed."""
    return {name: sources.fingerprint(getattr(options, name)) for name in names} | {"seed": str(options.seed)}


def read_records(source: str, read: Callable[..., list[Record]], kind: type[Record]) -> list[Record]:
    """Read records; rows that public data sets are known to have and nobody can use are left out, and said to be."""
    return sources.load_reporting(source, read, kind, seed=0)


def read_training(
    source: str, read: Callable[..., list[TrainingRecord]], kind: type[TrainingRecord], *, keep_personal_data: bool
) -> list[TrainingRecord]:
    """Read records to train on; those that hold personal data are left out unless they are to be kept, and counted."""
    from tastemaker.personal_data import without_personal_data

    rows = read_records(source, read, kind)
    if keep_personal_data:
        return rows
    kept, dropped = without_personal_data(rows)
    if dropped:
        say(
            f"{dropped} of the {len(rows)} records of {source} hold personal data or secrets and are left out; "
            "--keep-personal-data keeps them"
        )
    return kept


def read_given(source: str | None, read: Callable[..., list[Record]], kind: type[Record]) -> list[Record]:
    return [] if source is None else read_records(source, read, kind)
