"""What was sampled, kept in the stage's folder: people's answers belong to these very words.

People take days to answer. When the run goes on, a library, a processor or a number of threads may have changed, and
one other token would make another question. So what was sampled is written down before anybody is asked, under a key
that says what it depends on, and is taken from there ever after.

One line of the file is one entry, `{"key": [...], "value": ...}`; the file is always whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tastemaker.errors import DataError
from tastemaker.files import atomic_write

Key = tuple[str, ...]


class Kept:
    """A table on disk. Entries are added and never changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[Key, Any] = {}
        if not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                self._rows[tuple(row["key"])] = row["value"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    "is no entry of what was sampled. Delete the line, and it is sampled again.", path=path, line=number
                ) from error

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __getitem__(self, key: Key) -> Any:
        return self._rows[key]

    def add(self, rows: Mapping[Key, Any]) -> None:
        """Keep further entries; they are on the disk when this returns."""
        self._rows |= {key: value for key, value in rows.items() if key not in self._rows}
        with atomic_write(self._path) as file:
            for key, value in self._rows.items():
                file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")


def digest(value: object, *, size: int = 8) -> str:
    """A short hash of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()
