"""Reading JSON objects by field name and type, for files that may lack anything but must not lie.

A run folder may be half finished, so an absent field is `None`; a field of the wrong type is a DataError that names
the file and the field. Numbers that are not finite are read as absent: a diverged metric has no place on an axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tastemaker.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number, with its 95 % interval and the number of observations where they are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval, or the bare value twice where no interval is known."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high

    def of_the_other_side(self) -> Measured:
        """A win rate of a over b as the win rate of b over a."""
        low, high = self.bounds
        known = self.has_interval
        return Measured(
            value=1 - self.value, low=1 - high if known else None, high=1 - low if known else None, n=self.n
        )


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object; `place` is its path inside the file, for messages."""

    values: Mapping[str, object]
    path: Path
    place: str = ""
    line: int | None = None

    def names(self) -> Iterator[str]:
        return iter(self.values)

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise self._wrong(name, "a text")

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(name, "true or false")

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a number")
        return float(value) if math.isfinite(value) else None

    def whole(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else round(value)

    def interval(self, name: str) -> tuple[float, float] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_number(end) for end in value):
            raise self._wrong(name, "an interval such as [0.55, 0.65]")
        low, high = float(value[0]), float(value[1])
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def measured(self, name: str) -> Measured | None:
        """A bare number (its interval may stand beside it as NAME_ci95), or {"value", "ci95", "n"}."""
        if isinstance(self.values.get(name), Mapping):
            inner = self.inside(name)
            return None if inner is None else inner.as_measured("value")
        value, interval = self.number(name), self.interval(f"{name}_ci95")
        return None if value is None else _with_interval(value, interval, None)

    def as_measured(self, name: str) -> Measured | None:
        """This object itself as a measurement whose number is called `name`."""
        value = self.number(name)
        return None if value is None else _with_interval(value, self.interval("ci95"), self.whole("n"))

    def inside(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return Fields(value, self.path, self._inner_place(name), self.line)

    def list_inside(self, name: str) -> tuple[Fields, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise self._wrong(name, "a list of objects")
        place = self._inner_place(name)
        return tuple(Fields(item, self.path, f"{place}[{index}]", self.line) for index, item in enumerate(value))

    def texts(self) -> dict[str, str]:
        """Every field of this object as a text: hashes, versions."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.values.items()}

    def _inner_place(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def _wrong(self, name: str, wanted: str) -> DataError:
        given = json.dumps(self.values.get(name), default=str)
        return DataError(
            f"{self._inner_place(name)!r} is {given[:80]}; it must be {wanted}.", path=self.path, line=self.line
        )


def read_object(path: Path) -> Fields:
    """Read a file that holds one JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"This is not JSON ({error}); run the stage that writes it again.", path=path) from error
    if not isinstance(value, dict):
        raise DataError("The file must hold one JSON object.", path=path)
    return Fields(value, path)


def read_lines(path: Path) -> list[Fields]:
    """Read a file of one JSON object a line. An unfinished last line is a run that was cut off, and is left out."""
    rows: list[Fields] = []
    # JSON leaves Unicode's other ends of a line in a text as they are, so splitlines would cut through the text.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"The line is not JSON ({error.msg}).", path=path, line=number) from error
        if not isinstance(value, dict):
            raise DataError("Each line must hold one JSON object.", path=path, line=number)
        rows.append(Fields(value, path, "", number))
    return rows


def _with_interval(value: float, interval: tuple[float, float] | None, n: int | None) -> Measured:
    low, high = interval if interval is not None else (None, None)
    return Measured(value=value, low=low, high=high, n=n)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
