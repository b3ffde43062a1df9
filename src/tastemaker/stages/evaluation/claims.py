"""Statements that a run is to bear out, judged by their intervals alone.

A claim is a list of checks; each takes one measured number with its 95 % interval and a bound. The claim holds if every
interval lies wholly beyond its bound. Nothing else enters: neither the point estimate nor what was hoped for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tastemaker.errors import ConfigError
from tastemaker.intervals import Estimate
from tastemaker.ranges import check_range
from tastemaker.store.tasks import FLAGS

Measure = Literal[
    "win_rate",
    "length_controlled_win_rate",
    "flag_rate",
    "flag_rate_difference",
    "likert_difference",
    "text_loss_difference",
    "text_loss_recovered",
    "reference_loss_difference",
    "proxy_difference",
    "reward_accuracy",
    "reward_accuracy_drop",
    "reward_accuracy_difference",
    "reward_log_loss_difference",
    "gold_difference",
]

FIELDS: Mapping[Measure, frozenset[str]] = {
    "win_rate": frozenset({"b", "decoding", "judge", "where"}),
    "length_controlled_win_rate": frozenset({"b", "decoding", "judge", "where"}),
    "flag_rate": frozenset({"flag", "where"}),
    "flag_rate_difference": frozenset({"b", "flag", "where"}),
    "likert_difference": frozenset({"b", "where"}),
    "text_loss_difference": frozenset({"b"}),
    "text_loss_recovered": frozenset({"b", "base"}),
    "reference_loss_difference": frozenset({"b", "decoding", "where"}),
    "proxy_difference": frozenset({"b", "decoding", "where"}),
    "gold_difference": frozenset({"b", "decoding", "where"}),
    "reward_accuracy": frozenset(),
    "reward_accuracy_drop": frozenset(),
    "reward_accuracy_difference": frozenset({"b"}),
    "reward_log_loss_difference": frozenset({"b"}),
}
"""What each measure is told beside `a`: a field that it would not heed is refused, one that it needs is asked for."""
NEEDED = ("b", "base", "flag")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One number and its bound: the interval of `measure` must lie above `above`, or below `below`."""

    measure: Measure
    """The number that is measured."""
    a: str
    """A contestant, or a reward variant for the reward measures."""
    b: str | None = None
    """The other contestant, for measures of two."""
    base: str | None = None
    """For text_loss_recovered: of what `a` lost against this one, the share that `b` did not lose."""
    decoding: str | None = None
    """"greedy" or "T=1"; None: the last one of the evaluation."""
    judge: str | None = None
    """The group of raters; None: the held-out one."""
    flag: str | None = None
    """A yes/no field of the ratings."""
    where: Mapping[str, str] | None = None
    """Only prompts whose record has these fields."""
    above: float | None = None
    """The whole interval must lie above this."""
    below: float | None = None
    """The whole interval must lie below this."""

    def __post_init__(self) -> None:
        check_range(self, "above", "below")
        if (self.above is None) == (self.below is None):
            raise ConfigError(f"a check of {self.measure} needs exactly one of 'above' and 'below'.")
        if self.flag is not None and self.flag not in FLAGS:
            raise ConfigError(f"flag is {self.flag!r}; a check of {self.measure} needs one of {', '.join(FLAGS)}.")
        heeded = FIELDS[self.measure]
        for name in ("b", "base", "decoding", "judge", "flag", "where"):
            given = getattr(self, name) is not None
            if given and name not in heeded:
                raise ConfigError(f"a check of {self.measure} has no use for {name!r}; leave it out.")
            if name in NEEDED and name in heeded and not given:
                what = "compares two; give 'b'" if name == "b" else f"needs {name!r}"
                raise ConfigError(f"a check of {self.measure} {what}.")

    def holds(self, estimate: Estimate) -> bool:
        if self.above is not None:
            return estimate.ci95.low > self.above
        return self.below is not None and estimate.ci95.high < self.below

    def describe(self, estimate: Estimate) -> str:
        of_whom = self.a if self.b is None else f"{self.a} against {self.b}"
        what = self.measure.replace("_", " ") + (f" of {self.flag.replace('_', ' ')}" if self.flag else "")
        where = (
            ""
            if self.where is None
            else " on prompts with "
            + ", ".join(f"{name.replace('_', ' ')} {value.replace('_', ' ')}" for name, value in self.where.items())
        )
        judge = "" if self.judge is None else f", by {self.judge} raters"
        bound = f"> {self.above:g}" if self.above is not None else f"< {self.below:g}"
        decoding = "" if self.decoding is None else f", {self.decoding}"
        low, high = estimate.ci95.low, estimate.ci95.high
        return (
            f"{what}, {of_whom}{where}{decoding}{judge}: {estimate.value:.3f} [{low:.3f}, {high:.3f}], needed {bound}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement and the checks that bear it out."""

    id: str
    """Its name in results and report."""
    statement: str
    """What is claimed, in a sentence."""
    checks: tuple[Check, ...]
    """All of them must hold."""


class Measured(Protocol):
    """Finds the number that a check is about."""

    def find(self, check: Check) -> Estimate: ...


def judge_claims(claims: Sequence[Claim], measured: Measured) -> list[dict[str, Any]]:
    """Each claim with what was measured and whether it holds."""
    rows = []
    for claim in claims:
        found = [(check, measured.find(check)) for check in claim.checks]
        rows.append(
            {
                "id": claim.id,
                "statement": claim.statement,
                "measured": "; ".join(check.describe(estimate) for check, estimate in found),
                "holds": all(check.holds(estimate) for check, estimate in found),
                "checks": [
                    {"description": check.describe(estimate), "holds": check.holds(estimate)} | estimate.to_json()
                    for check, estimate in found
                ],
            }
        )
    return rows
