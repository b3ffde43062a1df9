"""What a finding is, and how a stage's measurements are read by the checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["fault", "warning", "note"]
Stage = Literal["sft", "reward", "ppo", "dpo"]
Check = Callable[["Measured"], "Finding | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of finding. A fault is what no correct run shows; a note is to be known and no alarm."""

    name: str
    severity: Severity
    title: str
    when: str
    """What is measured and the threshold, for the documentation."""
    causes: tuple[str, ...]
    """Likely causes, the likeliest first."""
    tries: tuple[str, ...]
    """What to try."""

    def seen(self, what: str) -> Finding:
        return Finding(self, what)


@dataclass(frozen=True, slots=True)
class Finding:
    """A kind, and what was seen of it: numbers and steps."""

    kind: Kind
    seen: str

    @property
    def is_alarm(self) -> bool:
        return self.kind.severity != "note"

    def to_json(self) -> dict[str, Any]:
        kind = self.kind
        return {
            "name": kind.name,
            "severity": kind.severity,
            "title": kind.title,
            "seen": self.seen,
            "causes": list(kind.causes),
            "try": list(kind.tries),
        }


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over the steps that have it."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    def part(self, start: int, end: int) -> Series:
        return Series(self.steps[start:end], self.values[start:end])

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean, the steps taken to be independent; 0 of a single one."""
        if len(self) < 2:
            return 0.0
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (len(self) - 1) / len(self))

    @property
    def span(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        return f"{first}" if first == last else f"{first}-{last}"

    def worst_mean(self, width: int) -> Series:
        """The consecutive `width` values (all, if there are fewer) whose mean is the highest."""
        width = min(width, len(self))
        return max((self.part(start, start + width) for start in range(len(self) - width + 1)), key=lambda p: p.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A stage's measurements, with what its folder says of how it was run (nothing, where it has no manifest)."""

    folder: Path
    stage: Stage
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True
    stopped: Mapping[str, str] | None = None
    """Why a check of the stage stopped it: the `message`, and the `finding` that the check knows by name."""

    def series(self, name: str) -> Series:
        """The metric over its steps; empty where it was not measured. What is not finite is left to `not-finite`."""
        held = [row for row in self.rows if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
        return Series(tuple(int(row["step"]) for row in held), tuple(float(row[name]) for row in held))

    def together(self, *names: str) -> list[tuple[int, tuple[float, ...]]]:
        """Step and values of the steps that have all of these metrics."""
        of = [dict(zip(series.steps, series.values, strict=True)) for series in map(self.series, names)]
        return [(step, tuple(one[step] for one in of)) for step in of[0] if all(step in one for one in of)]

    def setting(self, name: str, default: Any = None) -> Any:
        """A field of the config; `policy.precision` is one of a section."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def in_bfloat16(self) -> bool:
        """Whether a network computes in bfloat16, or may do so for all that the folder says."""
        names = ("policy.precision", "decoding.precision") if self.stage == "ppo" else ("optimizer.precision",)
        return not self.config or any(self.setting(name) == "bfloat16" for name in names)


def ends(series: Series, *, share: float = 0.25, least: int = 3) -> tuple[Series, Series]:
    """The first and the last `share` of a series, `least` values of it at least."""
    width = min(len(series), max(least, int(len(series) * share)))
    return series.part(0, width), series.part(len(series) - width, len(series))


def number(value: float) -> str:
    """Three digits, as a reader likes them."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
