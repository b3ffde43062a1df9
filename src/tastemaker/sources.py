"""Where records come from: a file, a `datasets` name, or a Python function.

`module:function` calls `function(seed)`; `module:function?train=2000&test=500` passes whole numbers by name too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from tastemaker import artefacts
from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import Skipped, describe_skipped, is_saved_dataset
from tastemaker.functions import function_fingerprint, is_function_path, load_function

Record = TypeVar("Record")


def load(source: str, read: Callable[[str], list[Record]], kind: type[Record], *, seed: int) -> list[Record]:
    """The records of a source; `read` reads files and data sets, `kind` is what a function must return."""
    if not is_function_path(source):
        return read(source)
    path, _, query = source.partition("?")
    try:
        options = {name: int(value) for name, value in parse_qsl(query, strict_parsing=bool(query))}
    except ValueError as error:
        raise ConfigError(f"{source!r}: what follows the '?' must be like train=2000&test=500.") from error
    records: Any = load_function(path)(seed, **options)
    if not isinstance(records, list) or not all(isinstance(record, kind) for record in records):
        raise DataError(f"{path} did not return a list of {kind.__name__} records.")
    return records


def load_reporting(source: str, read: Callable[..., list[Record]], kind: type[Record], *, seed: int) -> list[Record]:
    """The same, leaving out rows of public data sets that nobody can use, and saying how many and why."""
    skipped: list[Skipped] = []
    rows = load(source, partial(read, skipped=skipped), kind, seed=seed)
    if skipped:
        say(f"  {describe_skipped(skipped, source=source)}")
    return rows


def fingerprint(source: str | None) -> Path | str:
    """What a stage's manifest remembers of a source: the content of a file or folder or of a function's module, the
    name of anything else.
    """
    if source is None:
        return "none"
    if is_function_path(source):
        return function_fingerprint(source)
    folder, split, _ = source.partition(":")
    if split and is_saved_dataset(Path(folder)):
        return f"{source} {artefacts.hash_path(Path(folder))}"
    return Path(source) if Path(source).exists() else source
