"""Figures of raters and studies as lines of a page: each with its interval as a bar, or with why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tastemaker.agreement import Undefined
from tastemaker.intervals import Estimate
from tastemaker.store.dashboard import RaterReport, StudyReport
from tastemaker.store.rater_figures import Figure

Unit = Literal["share", "chance-corrected", "seconds", "points", "grade"]

_HALF = 50.0  # where sides are balanced, on a bar of a hundred


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """An interval on a line of a hundred, its value, and perhaps a mark to hold it against."""

    low: float
    value: float
    high: float
    mark: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A figure as it is shown. `reason` is empty where there is a value."""

    label: str
    value: str
    interval: str = ""
    n: int = 0
    bar: Bar | None = None
    reason: str = ""


def line(label: str, figure: Figure, unit: Unit = "share", *, mark: float | None = None) -> Line:
    """One figure."""
    if isinstance(figure, Undefined):
        return Line(label=label, value="none", reason=figure.reason)
    low, high = figure.ci95.low, figure.ci95.high
    return Line(
        label=label,
        value=_number(figure.value, unit),
        interval=f"{_number(low, unit)} to {_number(high, unit)}",
        n=figure.n,
        bar=_bar(figure, mark) if unit in ("share", "chance-corrected") else None,
    )


def _number(value: float, unit: Unit) -> str:
    if unit == "share":
        return f"{100 * value:.0f} %"
    if unit == "seconds":
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    if unit == "points":
        return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _bar(figure: Estimate, mark: float | None) -> Bar:
    low, value, high = (
        round(100 * min(1.0, max(0.0, one)), 2) for one in (figure.ci95.low, figure.value, figure.ci95.high)
    )
    return Bar(low=low, value=value, high=high, mark=mark)


def lines_of_rater(report: RaterReport) -> list[Line]:
    """All of a rater's figures."""
    return [
        line("Prefers as other raters do", report.agreement),
        line("Prefers as most of the others do", report.majority),
        line("Rates within a point of others", report.quality_agreement),
        line("Sets flags as others do", report.flag_agreement),
        line("Gold: prefers as known", report.gold),
        line("Gold: sets flags as known", report.gold_flags),
        line("Gold: rates within a point of what is known", report.gold_quality),
        line("Median time", report.seconds_median, "seconds"),
        line("Time of the fastest twentieth", report.seconds_fifth, "seconds"),
        line("Skips", report.skip_rate),
        line("Ties", report.tie_rate),
        line("Prefers what is shown first", report.first_shown_rate, mark=_HALF),
        line("Prefers the longer", report.longer_rate),
        line("Gives their most frequent quality", report.one_quality_rate),
        line("Rates higher (+) or lower (\N{MINUS SIGN}) than others", report.quality_shift, "points"),
    ]


def lines_of_study(report: StudyReport) -> list[Line]:
    """All of a study's figures."""
    return [
        line("Two raters agree, ties left out", report.agreement.ties_excluded),
        line("Two raters agree, a tie being an answer of its own", report.agreement.tie_is_a_class),
        line("Two raters agree, a tie agreeing by half", report.agreement.tie_is_half),
        line("Krippendorff's alpha of preferences", report.alpha, "chance-corrected"),
        line("A rater agrees with most of the others", report.majority),
        line("Krippendorff's alpha of quality", report.quality_alpha, "chance-corrected"),
        *(
            line(f"Gwet's AC1 of “{flag.replace('_', ' ')}”", figure, "chance-corrected")
            for flag, figure in report.flag_ac1.items()
        ),
        line("Gold: preferences as known", report.gold),
        line("Gold: flags as known", report.gold_flags),
        line("Gold: quality within a point of what is known", report.gold_quality),
        line("Median time", report.seconds_median, "seconds"),
        line("Skips", report.skip_rate),
        line("Ties", report.tie_rate),
        line("What is shown first wins", report.first_shown_rate, mark=_HALF),
        line("The longer wins", report.longer_rate),
    ]


def numbered(reports: Sequence[RaterReport]) -> dict[str, str]:
    """Names that say nothing of who it is: raters by how much they answered."""
    by_answers = sorted(reports, key=lambda report: (-report.answers, -len(report.weeks)))
    return {report.rater: f"Rater {number}" for number, report in enumerate(by_answers, start=1)}
