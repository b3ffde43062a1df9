"""How far optimisation should go: the reward model's score and the truth against the KL from the reference.

After Gao et al. 2023 and the paper's appendix E.7: the score keeps rising with the distance, what people want does not.
There are two ways of going further, and each is a view of its own. In a sweep the points are policies at the end of
their training, which differ in the strength of the KL penalty. In a course they are the checkpoints of one policy,
joined in the order of training. A checkpoint is no point of a sweep: it was stopped early, its learning rate still
high. Where a run has neither, its models are shown as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tastemaker.report.charts import LABEL_GAP, LineChart, Point, Series, line_chart
from tastemaker.report.families import SHADES, Inks
from tastemaker.report.fields import Measured
from tastemaker.report.run import Distant, Run, State
from tastemaker.report.words import listed, number, value_and_interval

UNJUDGED = "What they are truly worth was not measured here; the win rates tell what the judges preferred."
ENOUGH = 3  # judged points for a sentence: two, one of which must be the better, show no shape
HEIGHT, ROOM_FOR_AXES = 260.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One way of going further, and what it shows in a sentence."""

    name: str
    title: str
    note: str
    finding: str
    panels: tuple[Markup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Points that are joined; `start` is the model with which their training began, where it was measured."""

    name: str
    ink: str
    points: tuple[Distant, ...]
    start: Distant | None = None


def distance(run: Run, inks: Inks) -> tuple[View, ...]:
    """The views that this run affords."""
    views = tuple(view for view in (_sweep(run, inks), _course(run, inks)) if view is not None)
    models = None if views else _models(run, inks)
    return views if models is None else (models,)


def _sweep(run: Run, inks: Inks) -> View | None:
    """The finished policies; those of a family and a reward, which differ in beta alone, are one line.

    Scores by different rewards are on different scales, so each reward has lines, and a sentence, of its own.
    """
    finished = [point for point in run.results.distances if point.state is State.FINISHED and point.beta is not None]
    rewards = {name: [one for one in finished if one.reward == name] for name in {one.reward: None for one in finished}}
    if all(len({point.beta for point in points}) < 2 for points in rewards.values()):
        return None
    lines, found = [], []
    for shade, (reward, points) in enumerate(rewards.items()):
        with_reward = f", {reward}" if len(rewards) > 1 else ""
        starts = {point.start for point in points}
        start = _as_distant(run, starts.pop()) if len(starts) == 1 else None
        found.append(_found_in_sweep(points, f"With the reward {reward}" if with_reward else "In this run"))
        for family in dict.fromkeys(inks.family(point.policy) for point in points):
            members = sorted((one for one in points if inks.family(one.policy) is family), key=lambda one: one.kl)
            name = family.name.lower().replace("_", "-") + with_reward if len(members) > 1 else members[0].policy
            ink = f"{family.css} v{shade % SHADES}"
            lines.append(_Line(name=name, ink=ink, points=tuple(members), start=start))
    return _view(
        "sweep",
        "At several strengths of the KL penalty",
        "Each point is one policy at the end of its training, with its KL coefficient β"
        + _beginning([line.start for line in lines]),
        " ".join(dict.fromkeys(filter(None, found))),
        lines,
        lambda point: "" if point.beta is None else f"β {point.beta:g}",
    )


def _course(run: Run, inks: Inks) -> View | None:
    """The policies of which checkpoints were measured, each from its beginning to its end."""
    stations = [point for point in run.results.distances if point.state is not State.EMA]
    kept = list(dict.fromkeys(point.variant for point in stations if point.state is State.CHECKPOINT))
    lines = []
    for variant in kept:
        own = sorted((one for one in stations if one.variant == variant), key=lambda one: one.iteration or 0)
        start = _as_distant(run, own[0].start)
        lines.append(_Line(name=variant, ink=inks.of(variant, "policy"), points=tuple(own), start=start))
    if not lines:
        return None
    return _view(
        "course",
        f"While {listed(kept)} {'trains' if len(kept) == 1 else 'train'}",
        "Each point is a checkpoint after so many iterations of PPO" + _beginning([line.start for line in lines]),
        " ".join(dict.fromkeys(found for line in lines if (found := _found_in_course(line)))),
        lines,
        lambda point: "" if point.iteration is None else str(point.iteration),
    )


def _models(run: Run, inks: Inks) -> View | None:
    """Models trained in different ways: what differs between them is not their distance alone."""
    points = [point for model in run.results.models for point in (_as_distant(run, model.name),) if point is not None]
    return _view(
        "models",
        "The models of this run",
        "Each point is one model; they differ in more than their distance.",
        "" if any(point.gold is not None for point in points) else UNJUDGED,
        [_Line(name=point.policy, ink=inks.of(point.policy), points=(point,)) for point in points],
        lambda point: "",
    )


def _as_distant(run: Run, name: str) -> Distant | None:
    """An evaluated model as a point, if its KL was measured."""
    measured = next((model.measured for model in run.results.models if model.name == name), {})
    if "kl" not in measured:
        return None
    kl = max(measured["kl"].value, 0.0)
    return Distant(policy=name, beta=None, kl=kl, proxy=measured.get("proxy_score"), gold=measured.get("gold"))


def _beginning(starts: Sequence[Distant | None]) -> str:
    names = list(dict.fromkeys(start.policy for start in starts if start is not None))
    return f"; the hollow one is the start, {listed(names)}." if names else "."


def _found_in_sweep(points: Sequence[Distant], where: str) -> str:
    """What the points say of over-optimisation, by value where the intervals of best and furthest overlap."""
    judged = [(point, point.gold) for point in points if point.gold is not None]
    if len(judged) < ENOUGH:
        return "" if judged else UNJUDGED
    best, best_gold = max(judged, key=lambda pair: pair[1].value)
    furthest, far_gold = max(judged, key=lambda pair: pair[0].kl)
    if best is furthest:
        return f"{where} the policy that went furthest is also the best by the gold score."
    highest, far = (value_and_interval(gold)[0] for gold in (best_gold, far_gold))
    return (
        f"{where} gold is highest ({highest}) at {best.kl:.3g} nats; the policy that went furthest, "
        f"{furthest.kl:.3g} nats, is at {far}: {_verdict(best, furthest)}."
    )


def _found_in_course(line: _Line) -> str:
    points = line.points if line.start is None else (line.start, *line.points)
    judged = [(point, point.gold) for point in points if point.gold is not None]
    if len(judged) < ENOUGH:
        return "" if judged else UNJUDGED
    best, best_gold = max(judged, key=lambda pair: pair[1].value)
    last, last_gold = judged[-1]
    if best is last:
        return f"{line.name} is at its best by the gold score at the end."
    highest, at_end = (value_and_interval(gold)[0] for gold in (best_gold, last_gold))
    when = "at the beginning" if best is line.start else f"after {best.iteration} iterations"
    return (
        f"Gold is highest ({highest}) {when}, at {best.kl:.3g} nats; at the end, {last.kl:.3g} nats, it is "
        f"{at_end}: {_verdict(best, last)}."
    )


def _verdict(best: Distant, later: Distant) -> str:
    """Over-optimised is what has a lower gold and a higher score: where both fall, training failed in another way."""
    if best.gold is None or later.gold is None:
        return "not judged"
    if not (best.gold.has_interval and later.gold.has_interval and later.gold.bounds[1] < best.gold.bounds[0]):
        return "the intervals overlap, so this may be chance"
    if best.proxy is not None and later.proxy is not None and later.proxy.value <= best.proxy.value:
        return "it has become worse, and by the reward model's score too"
    return "it has over-optimised"


def _view(
    name: str, title: str, note: str, finding: str, lines: Sequence[_Line], note_of: Callable[[Distant], str]
) -> View | None:
    proxy = _panel("What the reward model sees", "score", lines, lambda point: point.proxy, note_of)
    gold = _panel("What is true", "gold score", lines, lambda point: point.gold, note_of)
    panels = tuple(panel for panel in (proxy, gold) if panel is not None)
    return View(name=name, title=title, note=note, finding=finding, panels=panels) if panels else None


def _panel(
    title: str,
    unit: str,
    lines: Sequence[_Line],
    value_of: Callable[[Distant], Measured | None],
    note_of: Callable[[Distant], str],
) -> Markup | None:
    series: list[Series] = []
    begun: set[str] = set()  # several lines may begin with one model, which is named once
    for line in lines:
        points = [_point(one, measured, note_of(one)) for one in line.points if (measured := value_of(one)) is not None]
        start = None if line.start is None else value_of(line.start)
        if points and line.start is not None and start is not None:
            named = "" if line.start.policy in begun else line.start.policy
            begun.add(line.start.policy)
            points.insert(0, _point(line.start, start, named, hollow=True))
        if points:
            series.append(Series(label=line.name, ink=line.ink, points=tuple(points)))
    if sum(len(one.points) for one in series) < 2:  # one point is no relation
        return None
    told = "; ".join(f"{one.label}: {_in_words(one.points)}" for one in series)
    chart = LineChart(
        title=title,
        unit=unit,
        description=f"Against the KL from the reference. {told}.",
        series=tuple(series),
        x_label="KL, nats",
        x_by_root=True,
        marked=True,
    )
    return line_chart(chart, width=390, height=max(HEIGHT, ROOM_FOR_AXES + LABEL_GAP * len(series)))


def _point(one: Distant, measured: Measured, note: str, *, hollow: bool = False) -> Point:
    low, high = measured.bounds if measured.has_interval else (None, None)
    return Point(x=one.kl, y=measured.value, low=low, high=high, note=note, hollow=hollow)


def _in_words(points: Sequence[Point]) -> str:
    return ", ".join(f"{number(point.y)} at {number(point.x)} nats" for point in points)
