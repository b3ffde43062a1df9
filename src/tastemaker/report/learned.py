"""What a run learned: how far raters agree with one another, and reward models with raters (sections 3.4 and 4.1).

The figure holds reward models against raters on the same responses, ties aside. The table has every way of counting:
a row is raters with one another, a group with another, or a reward model with a group; a column is a measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tastemaker.report.charts import Bin, Row, calibration_chart, whisker_axis, whisker_chart
from tastemaker.report.families import Inks
from tastemaker.report.fields import Measured
from tastemaker.report.run import STAGES, CalibrationBin, Run, StageFolder
from tastemaker.report.words import (
    capitalised,
    listed,
    number_with_interval,
    percent,
    percent_range,
    percent_with_interval,
    plain,
    rater_words,
    value_and_interval,
)

PATH = " · "  # between the names of nested measurements
TIES_ASIDE = "ties_excluded"
AGAINST = "_against_"
FINAL = "evaluation"  # the agreement of judges on the evaluation's comparisons
COLUMNS = {
    TIES_ASIDE: "ties aside",
    "tie_is_half": "ties half",
    "tie_is_a_class": "ties as a class",
    "majority": "majority",
    "alpha": "Krippendorff's \N{GREEK SMALL LETTER ALPHA}",
}
COUNTS = ("raters", "other_raters")
NO_VALUE = "\N{EN DASH}"
# Coefficients corrected for chance are not shares of agreement, and have no place on the 50 % axis.
CORRECTED_FOR_CHANCE = ("alpha", "kappa", "ac1", "ac2")

Measures = dict[str, Measured | str]
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementRow:
    """Who is held against whom, on what, and each column's value with its interval."""

    who: str
    where: str
    raters: str
    pairs: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementTable:
    """The measures that any row has. `undefined` says why a column has rows without a value."""

    columns: tuple[str, ...]
    rows: tuple[AgreementRow, ...]
    undefined: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Agreement of raters and reward models with raters, and what a predicted probability is worth."""

    ladder: Markup | None
    calibrations: tuple[Markup, ...]
    table: AgreementTable | None
    others: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A row before it is set: its name in the table, its name in the figure where it belongs there, and what it has."""

    who: str
    label: str
    ink: str
    where: str
    measures: Measures


def learned(run: Run, inks: Inks) -> Learned | None:
    """How often choices agree, and what the reward model's probabilities mean."""
    groups, rest = _grouped(run.results.agreement)
    lines = [_group_line(name, measures) for name, measures in groups.items()]
    shares, others = _split(rest, are_ranked=bool(groups))
    lines += [
        _Line(who=label, label=label, ink="f-raters v0", where="", measures={TIES_ASIDE: share})
        for label, share in shares
    ]
    rewards = [(folder, folder.reward) for folder in run.of_stage(STAGES[4]) if folder.reward]
    calibrations = []
    for folder, reward in rewards:
        name, ink = _reward_name(folder, len(rewards)), inks.of(folder.variant or "reward", "reward")
        for value, label, whom in (
            (reward.accuracy, "known raters", "training raters"),
            (reward.held_out, "new raters", "held-out raters"),
        ):
            if value:
                who, label = f"{name} with {whom}", f"{name}, {label}"
                lines.append(_Line(who=who, label=label, ink=ink, where="", measures={TIES_ASIDE: value}))
        if reward.calibration:
            calibrations.append(_calibration(f"{name}: calibration", reward.calibration, ink))
    if not (lines or calibrations or others):
        return None
    return Learned(ladder=_ladder(lines), calibrations=tuple(calibrations), table=_table(lines), others=tuple(others))


def _grouped(agreement: Mapping[str, Measured | str]) -> tuple[dict[str, Measures], Measures]:
    """The measures of each row of the table, by the path to the row; and all the rest."""
    groups: dict[str, Measures] = {}
    rest: Measures = {}
    for path, value in agreement.items():
        group, _, measure = path.rpartition(PATH)
        if group and measure in (*COLUMNS, *COUNTS):
            groups.setdefault(group, {})[measure] = value
        else:
            rest[path] = value
    return groups, rest


def _group_line(path: str, measures: Measures) -> _Line:
    place, _, group = path.rpartition(PATH)
    first, against, second = group.partition(AGAINST)
    if against:
        who = f"{rater_words(first)} with {rater_words(second)}"
        label = f"{plain(first)} with {plain(second)}"
    else:
        who, label = f"{rater_words(first)} with one another", rater_words(first)
    where = "the final comparisons" if place == FINAL else plain(place)
    # Other comparisons than those that the reward models were measured on are no yardstick for them.
    return _Line(
        who=capitalised(who),
        label="" if where else capitalised(label),
        ink="f-raters v0",
        where=where,
        measures=measures,
    )


def _split(rest: Measures, *, are_ranked: bool) -> tuple[list[tuple[str, Measured]], list[tuple[str, str]]]:
    """Shares of agreement that are given without a way of counting ties; and what is no such share."""
    shares: list[tuple[str, Measured]] = []
    others: list[tuple[str, str]] = []
    for name, value in rest.items():
        if not are_ranked and isinstance(value, Measured) and _is_share_of_agreement(name, value):
            shares.append((capitalised(rater_words(name)), value))
        else:
            title = "Noise of the simulated raters" if name == "noise" else capitalised(plain(name))
            others.append((title, value if isinstance(value, str) else number_with_interval(value)))
    return shares, others


def _is_share_of_agreement(name: str, value: Measured) -> bool:
    return (
        value.has_interval and 0 <= value.value <= 1 and not any(sign in name.lower() for sign in CORRECTED_FOR_CHANCE)
    )


def _ladder(lines: Sequence[_Line]) -> Markup | None:
    rows = [
        Row(label=line.label, ink=line.ink, value=value)
        for line in lines
        if line.label and isinstance(value := line.measures.get(TIES_ASIDE), Measured)
    ]
    if not rows:
        return None
    return whisker_chart(
        rows,
        title="Agreement on which response is better",
        description="; ".join(f"{row.label}: {percent_with_interval(row.value)}" for row in rows) + ".",
        unit="ties aside",
        middle="chance",
        axis=whisker_axis(rows, widest_label=196),
    )


def _table(lines: Sequence[_Line]) -> AgreementTable | None:
    """Nothing where there is but one way of counting: the figure has said it."""
    shown = [name for name in COLUMNS if any(isinstance(line.measures.get(name), Measured) for line in lines)]
    if len(shown) < 2:
        return None
    lacking: dict[str, dict[str, None]] = {}  # the columns that a reason is about, each once
    for line in lines:
        for name in shown:
            if isinstance(reason := line.measures.get(name), str):
                lacking.setdefault(reason, {})[COLUMNS[name]] = None
    return AgreementTable(
        columns=tuple(COLUMNS[name] for name in shown),
        rows=tuple(
            AgreementRow(
                who=line.who,
                where=line.where,
                raters=_raters(line.measures),
                pairs=_pairs(line.measures),
                cells=tuple(_cell(name, line.measures.get(name)) for name in shown),
            )
            for line in lines
        ),
        undefined=tuple(f"A dash under {listed(list(names))}: {reason}" for reason, names in lacking.items()),
    )


def _raters(measures: Measures) -> str:
    counts = [f"{value.value:,.0f}" for name in COUNTS if isinstance(value := measures.get(name), Measured)]
    return " with ".join(counts)


def _pairs(measures: Measures) -> str:
    """How often two answers met: of all ways of counting the most, for one leaves ties out."""
    counts = [value.n for value in measures.values() if isinstance(value, Measured) and value.n]
    return f"{max(counts):,}" if counts else ""


def _cell(name: str, value: Measured | str | None) -> Cell:
    if value is None:
        return "", ""
    if isinstance(value, str):
        return NO_VALUE, ""
    return value_and_interval(value) if name == "alpha" else (percent(value.value), percent_range(value))


def _calibration(title: str, bins: Sequence[CalibrationBin], ink: str) -> Markup:
    pairs = sum(one.observed.n or 0 for one in bins)
    told = (f"predicted {percent(one.predicted)}, observed {percent_with_interval(one.observed)}" for one in bins)
    return calibration_chart(
        [Bin(predicted=one.predicted, observed=one.observed, share=(one.observed.n or 0) / pairs) for one in bins],
        title=title,
        description="; ".join(told) + ".",
        ink=ink,
    )


def _reward_name(folder: StageFolder, count: int) -> str:
    return f"RM {folder.variant}" if folder.variant and count > 1 else "Reward model"
