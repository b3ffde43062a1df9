"""The dashboard of leads: every rater and every study in figures, and what about a rater gives cause for concern.

Figures are values with 95 % intervals or say why there is none (`rater_figures`). A concern is raised only where the
whole interval lies beyond a threshold, so that few answers raise none. Where there is no absolute yardstick, the others
are it: agreement is held against a point between chance and what is typical of the raters here, lengths and
times against those of the others. `docs/labelling.md` says how often that catches whom, and how often it is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import median
from typing import Literal

import sqlalchemy as sa

from tastemaker import agreement
from tastemaker.agreement import RankingAgreement, Undefined
from tastemaker.intervals import Estimate, wilson
from tastemaker.records import Origin
from tastemaker.store import given as reading
from tastemaker.store import questions
from tastemaker.store import rater_figures as figures
from tastemaker.store.database import Store
from tastemaker.store.given import Given, as_ranking, one_each
from tastemaker.store.rater_figures import LEAST_FOR_FIFTH, LEAST_FOR_MEDIAN, Figure, Judged
from tastemaker.store.schema import studies
from tastemaker.store.screening import gold_share
from tastemaker.store.tasks import FLAGS, ComparisonAnswer, RankingAnswer, StudyKind

ConcernKind = Literal[
    "agreement", "gold", "quality", "flags", "side", "length", "ties", "one quality", "speed", "skips", "drift"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Beyond which a whole interval must lie for a concern."""

    agreement: float = 0.75
    """Where between chance (0) and the typical agreement of the raters here (1) the floor of agreement lies."""
    gold: float = 0.65
    """The least share of known preferences; the screening's cut-off is higher, as it is a value and no interval."""
    gold_flags: float = 0.75
    """The least share of known flags."""
    side: float = 0.05
    """How far from a half the share of wins of what is shown first may be."""
    length: float = 0.05
    """How far from the others' the share of wins of the longer output may be."""
    ties: float = 0.6
    """The largest share of ties."""
    one_quality: float = 0.8
    """The largest share of ratings that have the rater's most frequent quality."""
    speed: float = 1 / 3
    """The least median time, as a part of the others'."""
    skips: float = 0.3
    """The largest share of skipped tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Concern:
    """Something about a rater that a lead should look at."""

    kind: ConcernKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Week:
    """A calendar week, such as 2026-W47."""

    week: str
    answers: int
    agreement: Figure
    gold: Figure
    seconds_median: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class RaterReport:
    """A rater in figures. `agreement` is with every other rater's preference, `majority` with what most others say."""

    rater: str
    rater_group: str
    origin: Origin
    answers: int
    extra: int
    agreement: Figure
    majority: Figure
    quality_agreement: Figure
    flag_agreement: Figure
    gold: Figure
    gold_flags: Figure
    gold_quality: Figure
    seconds_median: Figure
    seconds_fifth: Figure
    skip_rate: Figure
    tie_rate: Figure
    first_shown_rate: Figure
    longer_rate: Figure
    one_quality_rate: Figure
    quality_shift: Figure
    weeks: tuple[Week, ...]
    concerns: tuple[Concern, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """A study in figures. `agreement` counts ties three ways; alpha is Krippendorff's, AC1 Gwet's."""

    study: str
    kind: StudyKind
    raters: int
    answers: int
    agreement: RankingAgreement
    alpha: Figure
    majority: Figure
    quality_alpha: Figure
    flag_ac1: Mapping[str, Figure]
    gold: Figure
    gold_flags: Figure
    gold_quality: Figure
    seconds_median: Figure
    skip_rate: Figure
    tie_rate: Figure
    first_shown_rate: Figure
    longer_rate: Figure
    weeks: tuple[Week, ...]


class Dashboard:
    """Reads what the figures are made of."""

    def __init__(
        self, store: Store, *, clock: Callable[[], float] = time.time, thresholds: Thresholds = Thresholds()
    ) -> None:
        self._store = store
        self._clock = clock
        self._thresholds = thresholds

    def raters(self, study: str | None = None) -> list[RaterReport]:
        """Every rater who has answered something: in one study, or in all but the screening studies."""
        given, skips = self._read(study)
        return rater_reports(given, skips, self._thresholds)

    def study(self, study: str) -> StudyReport:
        """One study."""
        with self._store.read() as connection:
            kind = questions.find(connection, study).kind
        given, skips = self._read(study)
        return study_report(study, kind, given, sum(skips.values()))

    def _read(self, study: str | None) -> tuple[list[Given], dict[str, int]]:
        with self._store.read() as connection:
            if study is None:
                which: sa.ColumnElement[bool] = ~studies.c.screening
            else:
                which = reading.of_studies([questions.find(connection, study).id])
            return reading.all_given(connection, which), reading.skips(connection, which)


# --- reports --------------------------------------------------------------------------------------------------------


def rater_reports(
    given: Sequence[Given], skips: Mapping[str, int], thresholds: Thresholds = Thresholds()
) -> list[RaterReport]:
    """A report of each rater, by group, then name; raters are held against those of their own group."""
    groups: dict[tuple[str, Origin], list[Given]] = {}
    for one in given:
        groups.setdefault((one.rater_group, one.origin), []).append(one)
    found: list[RaterReport] = []
    for (group, origin), answers in sorted(groups.items()):
        found += _Group(group, origin, answers, skips, thresholds).reports()
    return found


class _Group:
    """The answers of one group's raters, prepared once for the reports of all of them."""

    def __init__(
        self, group: str, origin: Origin, given: Sequence[Given], skips: Mapping[str, int], thresholds: Thresholds
    ) -> None:
        self.group, self.origin, self.skips, self.thresholds = group, origin, skips, thresholds
        self.by_rater: dict[str, list[Given]] = {}
        for one in given:
            self.by_rater.setdefault(one.rater, []).append(one)
        # Gold items are for figures of their own: everybody knows the easy ones alike.
        work = one_each([one for one in given if one.item.expected is None])
        self.pairs = figures.preferences(work)
        self.qualities = figures.qualities(work)
        self.flags = figures.flags(work)
        self.agreement = figures.preference_agreement(self.pairs)
        self.majority = figures.majority_agreement(self.pairs)
        self.quality_agreement = figures.quality_agreement(self.qualities)
        self.flag_agreement = figures.flag_agreement(self.flags)
        self.agreement_by_week = _agreement_by_week(work)

    def reports(self) -> list[RaterReport]:
        return [self._report(rater) for rater in sorted(self.by_rater)]

    def _report(self, rater: str) -> RaterReport:
        own = self.by_rater[rater]
        pairs_N, qualities_N = self.pairs.of(rater), self.qualities.of(rater)
        seconds = [one.seconds for one in own]
        none = Undefined(reason="the rater has no such answers")
        report = RaterReport(
            rater=rater,
            rater_group=self.group,
            origin=self.origin,
            answers=len(own),
            extra=sum(not one.counts for one in own),
            agreement=self.agreement.get(rater, none),
            majority=self.majority.get(rater, none),
            quality_agreement=self.quality_agreement.get(rater, none),
            flag_agreement=self.flag_agreement.get(rater, none),
            gold=gold_share(own, ("order",)),
            gold_flags=gold_share(own, ("flags",)),
            gold_quality=gold_share(own, ("quality",)),
            seconds_median=figures.quantile(seconds, 0.5, least=LEAST_FOR_MEDIAN),
            seconds_fifth=figures.quantile(seconds, 0.05, least=LEAST_FOR_FIFTH),
            skip_rate=_skip_rate(self.skips.get(rater, 0), len(own)),
            tie_rate=figures.tie_rate(self.pairs, pairs_N),
            first_shown_rate=figures.first_shown_rate(self.pairs, pairs_N),
            longer_rate=figures.longer_rate(self.pairs, pairs_N),
            one_quality_rate=figures.one_quality_rate(self.qualities, qualities_N),
            quality_shift=figures.quality_shift(self.qualities, rater),
            weeks=_weeks(own, {week: shares.get(rater, none) for week, shares in self.agreement_by_week.items()}),
            concerns=(),
        )
        return replace(report, concerns=tuple(self._concerns(report)))

    def _concerns(self, report: RaterReport) -> list[Concern]:
        limits = self.thresholds
        others = [one.seconds for rater, answers in self.by_rater.items() if rater != report.rater for one in answers]
        usual_length = figures.longer_rate(self.pairs, ~self.pairs.of(report.rater))
        length = usual_length.value if isinstance(usual_length, Estimate) else None
        found = [
            self._agreement("agreement", "prefers as others do", report.agreement, self.agreement, 0.5),
            self._agreement(
                "quality",
                "rates within a point of others",
                report.quality_agreement,
                self.quality_agreement,
                figures.chance_of_quality(self.qualities),
            ),
            self._agreement(
                "flags",
                "sets flags as others do",
                report.flag_agreement,
                self.flag_agreement,
                figures.chance_of_flags(self.flags),
            ),
            _below("gold", "prefers as known", report.gold, limits.gold),
            _below("gold", "sets flags as known", report.gold_flags, limits.gold_flags),
            _outside("side", "prefers what is shown first", report.first_shown_rate, 0.5, limits.side),
            _outside("length", "prefers the longer", report.longer_rate, length, limits.length),
            _above("ties", "ties", report.tie_rate, limits.ties),
            _above("one quality", "gives one and the same quality", report.one_quality_rate, limits.one_quality),
            _too_fast(report.seconds_median, others, limits.speed),
            _above("skips", "skips", report.skip_rate, limits.skips),
            _drift(report.weeks, self.agreement_by_week),
        ]
        return [concern for concern in found if concern is not None]

    def _agreement(
        self, kind: ConcernKind, what: str, figure: Figure, everybody: Mapping[str, Figure], chance: float
    ) -> Concern | None:
        """Against the point between chance and the median rater. Where that is chance itself there is no yardstick."""
        known = [each.value for each in everybody.values() if isinstance(each, Estimate)]
        if len(known) < 3:
            return None
        typical = median(known)
        if typical <= chance:
            return None
        return _below(kind, what, figure, chance + self.thresholds.agreement * (typical - chance))


def study_report(study: str, kind: StudyKind, given: Sequence[Given], skips: int) -> StudyReport:
    """A study in figures. Answers to gold items count as gold only."""
    work = one_each([one for one in given if one.item.expected is None])
    rankings = [
        as_ranking(one.item, one.answer, one.author)
        for one in work
        if isinstance(one.answer, RankingAnswer | ComparisonAnswer)
    ]
    pairs, qualities = figures.preferences(work), figures.qualities(work)
    everybody_N = pairs.answers.unit_N >= 0
    units = agreement.pairwise_answers(rankings)
    return StudyReport(
        study=study,
        kind=kind,
        raters=len({one.rater for one in given}),
        answers=len(given),
        agreement=agreement.ranking_agreement(rankings),
        alpha=agreement.krippendorff_alpha(units),
        majority=agreement.leave_one_out_agreement(units),
        quality_alpha=agreement.krippendorff_alpha(qualities.answers, "ordinal"),
        flag_ac1={flag: agreement.gwet_ac1(figures.flags(work, only=flag).answers) for flag in FLAGS},
        gold=gold_share(given, ("order",)),
        gold_flags=gold_share(given, ("flags",)),
        gold_quality=gold_share(given, ("quality",)),
        seconds_median=figures.quantile([one.seconds for one in given], 0.5, least=LEAST_FOR_MEDIAN),
        skip_rate=_skip_rate(skips, len(given)),
        tie_rate=figures.tie_rate(pairs, everybody_N),
        first_shown_rate=figures.first_shown_rate(pairs, everybody_N),
        longer_rate=figures.longer_rate(pairs, everybody_N),
        weeks=_weeks(given, _agreement_of_weeks(work)),
    )


# --- weeks ----------------------------------------------------------------------------------------------------------


def _week(at: float) -> str:
    year, week, _ = datetime.fromtimestamp(at, UTC).isocalendar()
    return f"{year}-W{week:02}"


def _judged_by_week(work: Sequence[Given]) -> dict[str, Judged]:
    """The preferences given in each week."""
    weeks: dict[str, list[Given]] = {}
    for one in work:
        weeks.setdefault(_week(one.submitted_at), []).append(one)
    return {week: figures.preferences(answers) for week, answers in sorted(weeks.items())}


def _agreement_by_week(work: Sequence[Given]) -> dict[str, dict[str, Figure]]:
    """Each rater's agreement with the others' answers of the same week."""
    return {week: figures.preference_agreement(judged) for week, judged in _judged_by_week(work).items()}


def _agreement_of_weeks(work: Sequence[Given]) -> dict[str, Figure]:
    return {
        week: agreement.raw_agreement(judged.answers)
        if len(judged.answers.unit_N)
        else Undefined(reason="no pair of outputs has been judged")
        for week, judged in _judged_by_week(work).items()
    }


def _weeks(given: Sequence[Given], agreement_of: Mapping[str, Figure]) -> tuple[Week, ...]:
    by_week: dict[str, list[Given]] = {}
    for one in given:
        by_week.setdefault(_week(one.submitted_at), []).append(one)
    return tuple(
        Week(
            week=week,
            answers=len(answers),
            agreement=agreement_of.get(week, Undefined(reason="only gold items were answered in that week")),
            gold=gold_share(answers, ("order",)),
            seconds_median=figures.quantile([one.seconds for one in answers], 0.5, least=LEAST_FOR_MEDIAN),
        )
        for week, answers in sorted(by_week.items())
    )


# --- concerns -------------------------------------------------------------------------------------------------------


def _below(kind: ConcernKind, what: str, figure: Figure, floor: float) -> Concern | None:
    if isinstance(figure, Undefined) or figure.ci95.high >= floor:
        return None
    return Concern(kind=kind, text=f"{what} in {_percent(figure)}; at least {floor:.0%} is asked")


def _above(kind: ConcernKind, what: str, figure: Figure, ceiling: float) -> Concern | None:
    if isinstance(figure, Undefined) or figure.ci95.low <= ceiling:
        return None
    return Concern(kind=kind, text=f"{what} in {_percent(figure)}; at most {ceiling:.0%} is usual")


def _outside(kind: ConcernKind, what: str, figure: Figure, usual: float | None, margin: float) -> Concern | None:
    if usual is None or isinstance(figure, Undefined):
        return None
    if figure.ci95.low <= usual + margin and figure.ci95.high >= usual - margin:
        return None
    return Concern(kind=kind, text=f"{what} in {_percent(figure)}; {usual:.0%} is usual")


def _too_fast(seconds: Figure, others: Sequence[float], part: float) -> Concern | None:
    if isinstance(seconds, Undefined) or not others or seconds.ci95.high >= part * median(others):
        return None
    return Concern(kind="speed", text=f"takes {seconds.value:.0f} seconds a task; the others take {median(others):.0f}")


def _drift(weeks: Sequence[Week], everybody: Mapping[str, Mapping[str, Figure]]) -> Concern | None:
    """The newest week against the first that has answers enough to compare: intervals that do not meet.

    The first, since who drifts slowly is little worse than the week before; and not the best of all, which grows the
    better by chance the more weeks there are.
    Where one rater turns, all the others agree less too: only who is below the median of that week is meant.
    """
    known = [(week.week, week.agreement) for week in weeks if isinstance(week.agreement, Estimate)]
    if len(known) < 2:
        return None
    (week, newest), earlier = known[-1], [figure for _, figure in known[:-1]]
    enough = max(figure.n for figure in earlier) / 2
    before = next(figure for figure in earlier if figure.n >= enough)
    of_all = [figure.value for figure in everybody[week].values() if isinstance(figure, Estimate)]
    if newest.ci95.high >= before.ci95.low or newest.value >= median(of_all):
        return None
    return Concern(
        kind="drift", text=f"agreed with others in {_percent(newest)} in {week}, and in {_percent(before)} earlier"
    )


def _percent(figure: Estimate) -> str:
    return f"{figure.value:.0%} ({figure.ci95.low:.0%} to {figure.ci95.high:.0%})"


def _skip_rate(skipped: int, answered: int) -> Figure:
    if not skipped + answered:
        return Undefined(reason="no task was given out")
    return wilson(skipped, skipped + answered)
