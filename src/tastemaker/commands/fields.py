"""A recipe as TOML with every field written out: what `tastemaker run --fields` prints, to read or to save as a recipe.

A field without a value is a comment, since TOML has no word for none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tastemaker.config import to_json

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def as_toml(recipe: object) -> str:
    """A config as TOML that reads back as the same config."""
    return "\n".join(_table(to_json(recipe), ())).lstrip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """A table's own values under its header, then the tables inside it."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    own = {key: value for key, value in table.items() if key not in inner}
    lines = []
    if path and (own or not inner):
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    lines += [f"# {_key(key)} =" if value is None else f"{_key(key)} = {_value(value)}" for key, value in own.items()]
    for key, value in inner.items():
        lines += _table(value, (*path, key))
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):  # in a list, where no table can stand
        given = {key: item for key, item in value.items() if item is not None}
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in given.items()) + " }"
    return repr(value)


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    """JSON's string is TOML's, but for one character that TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
