"""Who won: the blind comparisons (paper section 4.1, figures 1 and 3) as a headline, as charts and as a table.

A comparison may have been written from either side; here it is turned so that the model lower on the paper's ladder
is the opponent. The headline is chosen by rule and not by how good it looks: the highest policy of the ladder against
the largest base model, else against the next rung up, by raters whose answers trained nothing where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tastemaker.report.charts import Row, WhiskerAxis, whisker_axis, whisker_chart
from tastemaker.report.families import Family, Inks
from tastemaker.report.fields import Measured
from tastemaker.report.run import Comparison, Model, Results, Run
from tastemaker.report.words import (
    capitalised,
    compact,
    counted,
    decoding_words,
    listed,
    percent,
    percent_range,
    percent_with_interval,
    plain,
    rater_words,
    times_larger,
)

OPPONENTS = (Family.BASE, Family.FEW_SHOT, Family.OTHER, Family.SFT)
EVEN = 0.5
NOTABLY_LARGER = 1.5
UNBROKEN_NAME = 22  # a longer name may be broken where the line ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The result in one sentence, what qualifies it, and the numbers drawn beneath it."""

    sentence: Markup
    qualifiers: tuple[Markup, ...]
    figure: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opponent:
    """All models against one opponent, a panel for each way of decoding."""

    name: str
    ink: str
    panels: tuple[Markup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Winners:
    """The charts of the main judge, and the table of every comparison by every judge."""

    judge: str
    are_raters: bool
    other_judges: str
    has_controlled: bool
    prompts: str
    opponents: tuple[Opponent, ...]
    table: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Jury:
    """Who judged, in words that a verb can follow: raters (in the plural), or one thing in their place."""

    words: str
    are_raters: bool


class Standings:
    """The comparisons of a run, turned to face down the ladder, with the judge that the charts go by.

    Those of an evaluation alone are shown as they were asked for: the first policy against each other one.
    """

    def __init__(self, results: Results, inks: Inks) -> None:
        self._inks = inks
        self._size = {model.name: model.parameters for model in results.models}
        self._as_asked = results.judge is not None
        self.all = tuple(self._facing_down(comparison) for comparison in results.comparisons)
        judges = list(dict.fromkeys(comparison.judge for comparison in self.all))
        self.judge = next((judge for judge in judges if "held" in judge.lower()), judges[0] if judges else "")
        self.other_judges = [judge for judge in judges if judge != self.judge]
        self.main = tuple(comparison for comparison in self.all if comparison.judge == self.judge)
        met = dict.fromkeys(comparison.decoding for comparison in self.main)
        self.decodings = [name for name in dict.fromkeys((*results.decodings, *met)) if name in met]

    def _facing_down(self, comparison: Comparison) -> Comparison:
        rung_a, rung_b = self._inks.family(comparison.a), self._inks.family(comparison.b)
        return comparison.turned() if rung_a < rung_b and not self._as_asked else comparison

    def opponents(self) -> list[str]:
        """Those to be beaten: the largest base first, SFT last."""
        names = list(dict.fromkeys(comparison.b for comparison in self.main))
        if self._as_asked:
            return names
        usual = [name for name in names if self._inks.family(name) in OPPONENTS]
        return sorted(usual or names, key=lambda name: (self._inks.family(name), -(self._size.get(name) or 0.0)))

    def against(self, opponent: str, decoding: str) -> list[Comparison]:
        return [one for one in self.main if one.b == opponent and one.decoding == decoding]

    def headline(self) -> Comparison | None:
        """The comparison that the run is about."""
        for opponent in self.opponents():
            met = self.against(opponent, self.decodings[-1])  # the last is the one that claims are about
            if met:
                return max(met, key=lambda one: self._inks.family(one.a))  # the first of equals
        return self.main[0] if self.main else None


def headline(run: Run, inks: Inks) -> Headline:
    """The result in words. Where the interval includes 50 % the sentence says that there is no winner."""
    results = run.results
    standings = Standings(results, inks)
    main = standings.headline()
    if main is None:
        return Headline(sentence=_unjudged(results, inks), qualifiers=(), figure=None)
    return Headline(
        sentence=_sentence(main, results, jury(standings.judge, run), inks),
        qualifiers=_qualifiers(main, standings, inks, results),
        figure=_headline_figure(main, standings, inks),
    )


def _sentence(main: Comparison, results: Results, judge: Jury, inks: Inks) -> Markup:
    sizes = {model.name: model.parameters for model in results.models}
    a, b = name_of(main.a, inks), name_of(main.b, inks)
    size = _size_words(sizes.get(main.a), sizes.get(main.b))
    who, share = capitalised(judge.words), percent(main.win_rate.value)
    low, high = main.win_rate.bounds
    if not main.win_rate.has_interval or low <= EVEN <= high:
        prefer = "they prefer" if judge.are_raters else "it prefers"
        form = Markup("{} cannot tell {} from {}{}: {} the first {} of the time.")
        return form.format(who, a, b, size, prefer, share)
    prefer = "prefer" if judge.are_raters else "prefers"
    if low > EVEN:
        return Markup("{} {} {} to {}{}, {} of the time.").format(who, prefer, a, b, size, share)
    # Seen from the other side the sizes trade places, and a large model's victory over a small one needs no comment.
    return Markup("{} {} {} to {}, {} of the time.").format(who, prefer, b, a, percent(1 - main.win_rate.value))


def _unjudged(results: Results, inks: Inks) -> Markup:
    names = [str(name_of(model.name, inks)) for model in results.models]
    if not names:
        return Markup("This run has not been evaluated yet.")
    return Markup("This run has made {}, and nobody has compared them yet.").format(Markup(listed(names)))


def _size_words(own: float | None, other: float | None) -> str:
    if not own or not other or max(own, other) < NOTABLY_LARGER * min(own, other):
        return ""
    if other > own:
        return f", a model {times_larger(other / own)} its size"
    return f", a model of {compact(other)} parameters against {compact(own)}"


def _qualifiers(main: Comparison, standings: Standings, inks: Inks, results: Results) -> tuple[Markup, ...]:
    told = [_interval_words(main)]
    if main.length_controlled is not None:
        told.append(Markup("At equal length it would be {}.").format(percent_with_spread(main.length_controlled)))
    others = [
        Markup("{} against {}").format(percent_with_spread(one.win_rate), name_of(one.b, inks))
        for opponent in standings.opponents()
        for one in standings.against(opponent, main.decoding)
        if one.a == main.a and one.b != main.b
    ]
    if others:
        told.append(Markup("Its other opponents: {}.").format(Markup(listed([str(other) for other in others]))))
    elsewhere = [one for one in standings.main if (one.a, one.b) == (main.a, main.b) and one.decoding != main.decoding]
    for one in elsewhere:
        told.append(Markup("With {}: {}.").format(decoding_words(one.decoding), percent_with_spread(one.win_rate)))
    decided = [claim for claim in results.claims if claim.holds is not None]
    if decided:
        held = sum(claim.holds is True for claim in decided)
        told.append(_claims_words(held, len(decided)))
    return tuple(told)


def _claims_words(held: int, decided: int) -> Markup:
    if decided == 1:
        verb = "holds" if held else "does not hold"
        return Markup('<a href="#claims">The one claim</a> {}.').format(verb)
    return Markup('<a href="#claims">{} of {} claims</a> {}.').format(held, decided, "holds" if held == 1 else "hold")


def _interval_words(main: Comparison) -> Markup:
    interval = percent_range(main.win_rate)
    decoding = f" with {decoding_words(main.decoding)}" if main.decoding else ""
    if not interval:
        return Markup("{}{}; no interval was measured.").format(counted(main.n, "judgement"), decoding)
    return Markup('The 95% interval is <span class="kept">{}</span>, from {}{}.').format(
        interval, counted(main.n, "judgement"), decoding
    )


def _headline_figure(main: Comparison, standings: Standings, inks: Inks) -> Markup | None:
    met = [one for name in standings.opponents() for one in standings.against(name, main.decoding) if one.a == main.a]
    if not met:
        return None
    rows = [Row(label=one.b, ink=inks.of(one.a), value=one.win_rate, controlled=one.length_controlled) for one in met]
    return whisker_chart(
        rows,
        title=f"{main.a} against",
        unit="win rate",
        description=_described([(row.label, row.value) for row in rows]),
    )


def winners(run: Run, inks: Inks) -> Winners | None:
    """Every opponent with its panels; None where nothing was compared."""
    standings = Standings(run.results, inks)
    if not standings.all:
        return None
    counts = sorted({one.n for one in standings.main if one.n})
    prompts = "" if not counts else f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    axis = whisker_axis([_row(one, inks) for one in standings.main])
    judge = jury(standings.judge, run)
    return Winners(
        judge=judge.words,
        are_raters=judge.are_raters,
        other_judges=listed([rater_words(other) for other in standings.other_judges]),
        has_controlled=any(one.length_controlled for one in standings.main),
        prompts=prompts,
        opponents=tuple(_opponent(name, standings, axis, inks) for name in standings.opponents()),
        table=standings.all,
    )


def _opponent(name: str, standings: Standings, axis: WhiskerAxis, inks: Inks) -> Opponent:
    panels = []
    order: dict[str, int] = {}
    for decoding in standings.decodings:
        met = sorted(standings.against(name, decoding), key=lambda one: -one.win_rate.value)
        order = order or {one.a: place for place, one in enumerate(met)}  # the first panel's order, so that rows align
        met.sort(key=lambda one: order.get(one.a, len(order)))
        rows = [_row(one, inks) for one in met]
        if rows:
            panels.append(
                whisker_chart(
                    rows,
                    title=capitalised(plain(decoding)) or "Win rate",
                    unit=f"preferred to {name}",
                    axis=axis,
                    description=_described([(row.label, row.value) for row in rows]),
                )
            )
    return Opponent(name=name, ink=inks.of(name), panels=tuple(panels))


def _row(one: Comparison, inks: Inks) -> Row:
    return Row(label=one.a, ink=inks.of(one.a), value=one.win_rate, controlled=one.length_controlled)


def category_panels(models: Sequence[Model], inks: Inks, *, baseline: str) -> tuple[Markup, ...]:
    """Win rates by category, a panel for each model above the base models, categories in one order throughout."""
    shown = [
        model for model in models if model.by_category and inks.family(model.name) not in (Family.BASE, Family.FEW_SHOT)
    ]
    shown = sorted(shown, key=lambda model: -inks.family(model.name)) or [
        model for model in models if model.by_category
    ]
    if not shown:
        return ()
    leading = shown[0].by_category
    order = sorted(leading, key=lambda name: -leading[name].value)
    order += [name for model in shown for name in model.by_category if name not in leading]
    names = list(dict.fromkeys(order))
    rows_of = {
        model.name: [
            Row(label=plain(name), ink=inks.of(model.name), value=model.by_category[name])
            for name in names
            if name in model.by_category
        ]
        for model in shown
    }
    axis = whisker_axis([row for rows in rows_of.values() for row in rows])
    panels = []
    for model_name, rows in rows_of.items():
        described = _described([(row.label, row.value) for row in rows])
        panels.append(
            whisker_chart(
                rows,
                title=model_name,
                unit=f"preferred to {baseline}" if baseline else "win rate",
                description=described,
                axis=axis,
            )
        )
    return tuple(panels)


def name_of(name: str, inks: Inks) -> Markup:
    """A model's name in its colour."""
    kept = " kept" if len(name) <= UNBROKEN_NAME else ""
    return Markup('<b class="model {}{}">{}</b>').format(inks.of(name), kept, name)


def jury(group: str, run: Run) -> Jury:
    """Who judged: raters, said to be simulated where they are, or a reward model or a function in their place."""
    judge, setting = run.results.judge, run.setting
    if judge is not None:
        return Jury(f"the {judge.kind} {judge.name}", are_raters=False)
    if setting.judge_reward:
        return Jury(f"the reward model {setting.judge_reward}", are_raters=False)
    simulated = "simulated " if setting.raters == "simulated" else ""
    return Jury(f"{simulated}{rater_words(group)}", are_raters=True)


def percent_with_spread(measured: Measured) -> str:
    """ "71% (67–75%)"."""
    interval = percent_range(measured)
    return Markup('<span class="kept">{}</span>').format(
        percent(measured.value) + (f" ({interval})" if interval else "")
    )


def _described(rows: Sequence[tuple[str, Measured]]) -> str:
    return "; ".join(f"{label}: {percent_with_interval(value)}" for label, value in rows) + "."
