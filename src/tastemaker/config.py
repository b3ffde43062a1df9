"""Typed configuration from plain mappings: recipes in TOML become frozen dataclasses, and nothing is let through.

The dataclasses live beside the code that they configure. An unknown key is an error that names the nearest known one; a
value of the wrong type says what was given and what is allowed. Where a field may be one of several dataclasses, each
has a field `kind` with a single allowed value, and that value chooses. Where tables have names, one may say that it is
like another, and then only what is different: that is resolved here, on the mappings, and no config knows of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from tastemaker.errors import ConfigError

Config = TypeVar("Config")
LIKE = "like"


def load_recipe(path: Path, recipe: type[Config]) -> Config:
    """Read a TOML file into the dataclass `recipe`.

    Raises:
        ConfigError: the file is missing, is not TOML, or holds a key or value that the recipe does not know.
    """
    return from_mapping(recipe, read_toml(path), where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds, whatever it means.

    Raises:
        ConfigError: the file is missing, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a recipe (a .toml file).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from error


def from_mapping(cls: type[Config], data: Any, *, where: str) -> Config:
    """Build the dataclass `cls` from a mapping; `where` names the place in error messages."""
    value = _convert(cls, data, where)
    assert isinstance(value, cls)
    return value


def resolve_likes(tables: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Named tables, where `like = "OTHER"` in one of them means: the settings of OTHER, and over them its own.

    Tables inside are merged key by key; everything else, lists too, is replaced whole. OTHER may be like a third, and
    may come later in the file. A setting of OTHER cannot be taken away: the fuller of two is like the plainer.

    Raises:
        ConfigError: `like` names no other table, or leads back to where it came from.
    """
    return {name: _resolved(name, tables, where) for name in tables}


def to_json(value: Any) -> Any:
    """A config as plain JSON values, every field written out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest known one, or all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(choices)}."


def _resolved(name: str, tables: Mapping[str, Any], where: str) -> Any:
    if not isinstance(tables[name], Mapping):
        return tables[name]
    chain = [name]
    while LIKE in tables[chain[-1]]:
        other = _other(chain[-1], tables, where)
        if other in chain:
            circle = " is like ".join(map(repr, [*chain[chain.index(other) :], other]))
            raise ConfigError(f"{where}: {circle}, a circle; one of them must do without {LIKE!r}.")
        chain.append(other)
    resolved: dict[str, Any] = {}
    for link in reversed(chain):
        resolved = _merged(resolved, {key: value for key, value in tables[link].items() if key != LIKE})
    return resolved


def _other(name: str, tables: Mapping[str, Any], where: str) -> str:
    """The table that the one called `name` is like."""
    other = tables[name][LIKE]
    others = [known for known, table in tables.items() if known != name and isinstance(table, Mapping)]
    if other != name and other not in others:
        hint = nearest(str(other), others) if others else "There is no other."
        raise ConfigError(f"{where}: {name}: {LIKE}: {other!r} was given; it must name another of these tables. {hint}")
    return str(other)


def _merged(original: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(original)
    spelled = {_field_name(key): key for key in original}  # kl-coef in one table is kl_coef in the other
    for key, value in own.items():
        key = spelled.get(_field_name(key), key)
        inside = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if inside else value
    return merged


def _field_name(key: object) -> str:
    return str(key).replace("-", "_")


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else _convert_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(kind), value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise _wrong(where, value, "one of " + ", ".join(repr(choice) for choice in get_args(kind)))
        return value
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a table")
        if _is_config(get_args(kind)[1]):
            value = resolve_likes(value, where=where)
        return {str(key): _convert(get_args(kind)[1], item, f"{where}: {key}") for key, item in value.items()}
    if origin is tuple:
        return _convert_tuple(get_args(kind), value, where)
    return _convert_plain(kind, value, where)


def _convert_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a table with the fields of " + cls.__name__)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {_field_name(key): item for key, item in value.items()}
    for key, item in given.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}. {nearest(key, fields)}")
        given[key] = _over(hints[key], fields[key].default, item)
    missing = [
        name
        for name, field in fields.items()
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {', '.join(map(repr, missing))} must be given.")
    try:
        return cls(**{key: _convert(hints[key], item, f"{where}: {key}") for key, item in given.items()})
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from error


def _over(kind: Any, default: Any, value: Any) -> Any:
    """A table that is given in part, over the default of its field: what it leaves out stays as it is there.

    Where the field may hold tables of several kinds, the table stands for itself.
    """
    kinds: list[Any] = [option for option in (kind, *get_args(kind)) if dataclasses.is_dataclass(option)]
    if len(kinds) != 1 or not isinstance(default, kinds[0]) or not isinstance(value, Mapping):
        return value
    hints = typing.get_type_hints(kinds[0])
    kept = {name: getattr(default, name) for name in hints}
    given = {_field_name(key): item for key, item in value.items()}
    return {**kept, **{key: _over(hints.get(key), kept.get(key), item) for key, item in given.items()}}


def _is_config(kind: Any) -> bool:
    return any(dataclasses.is_dataclass(option) for option in (kind, *get_args(kind)))


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    options = [choice for choice in choices if choice is not type(None)]
    tagged = {_kind_of(option): option for option in options if dataclasses.is_dataclass(option)}
    if len(tagged) > 1:
        if not isinstance(value, Mapping) or value.get("kind") not in tagged:
            given = value.get("kind") if isinstance(value, Mapping) else value
            raise ConfigError(f"{where}: kind is {given!r}; it must be one of {', '.join(map(repr, tagged))}.")
        return _convert(tagged[value["kind"]], value, where)
    errors = []
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _kind_of(cls: Any) -> str:
    kind = typing.get_type_hints(cls).get("kind")
    return str(get_args(kind)[0]) if kind is not None else str(cls.__name__)


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise _wrong(where, value, "a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_convert(kinds[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if len(value) != len(kinds):
        raise _wrong(where, value, f"a list of {len(kinds)}")
    return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def _convert_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
        raise _wrong(where, value, names.get(kind, str(kind)))
    return value


def _wrong(where: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{where}: {value!r} was given; it must be {allowed}.")
