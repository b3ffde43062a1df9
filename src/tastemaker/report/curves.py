"""How training went, and how far optimisation should go: curves over steps and over KL.

A training metric is noisy from step to step. What is drawn is its local trend, with a band that holds the middle
80 % of the steps around it: a band of spread, not of confidence. The KL charts follow Gao et al. 2022 and the paper's
appendix E.7: the reward model's score keeps rising with distance from the reference, what people want does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles

from markupsafe import Markup

from tastemaker.metrics import METRICS
from tastemaker.report.charts import LineChart, Point, Series, line_chart
from tastemaker.report.families import Inks
from tastemaker.report.fields import Measured
from tastemaker.report.run import STAGES, Points, Run, StageFolder, SweepPoint
from tastemaker.report.words import NEGATIVE, capitalised, number, plain

DRAWN_POINTS = 80
FEW_POINTS = 30  # up to this many, each point is drawn as it is
WINDOW_SHARE = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The training curves of one stage: the ones that tell the story, and the others."""

    title: str
    note: str
    panels: tuple[Markup, ...]
    further: tuple[Markup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """What distance from the reference is worth."""

    panels: tuple[Markup, ...]
    finding: str
    is_sweep: bool


# Titles where a metric's name alone does not say it; units and meanings are those it was declared with.
TITLES = {
    "kl": "KL from the reference",
    "response_tokens": "Response length",
    "accuracy": "Accuracy on training pairs",
    "validation_accuracy": "Accuracy on held-out prompts",
    "truncated_rate": "Responses cut off",
    "eos_rate": "Responses that end",
    "clip_fraction": "Clipped ratios",
    "ratio_max": "Largest ratio",
    "ratio_mean": "Mean ratio",
    "approx_kl": "KL of one update",
    "ptx_loss": "Pretraining loss",
    "kl_coef": "KL coefficient",
    "grad_norm": "Gradient norm",
    "value_grad_norm": "Gradient norm, value",
    "value_learning_rate": "Learning rate, value",
    "seconds": "Time of a step",
    "heldout_text_loss": "Loss on held-out text",
}
UNITS = {
    "1": "",
    "share": "",
    "nats/response": "nats a response",
    "nats/token": "nats a token",
    "tokens/s": "tokens a second",
}
SHARES = frozenset({"eos_rate"})  # shares that are not declared as such
SFT = ("loss", "validation_loss")
REWARD = ("loss", "validation_loss", "accuracy", "validation_accuracy")
PPO = ("score", "kl", "response_tokens", "entropy")
DPO = ("loss", "accuracy", "margin")
NOT_DRAWN = frozenset({"epoch", "tokens", "episodes", "samples"})
SMOOTHED = "Lines are local trends; bands hold the middle 80% of the steps around them."


def courses(run: Run, inks: Inks) -> tuple[Course, ...]:
    """The training curves of every stage that left some."""
    policies = run.of_stage(STAGES[5])
    by_preference = [folder for folder in policies if "margin" in folder.curves]
    by_reward = [folder for folder in policies if "margin" not in folder.curves]
    wanted = (
        ("Supervised fine-tuning", run.of_stage(STAGES[2]), SFT, "sft"),
        ("Reward model", run.of_stage(STAGES[4]), REWARD, "reward"),
        ("PPO", by_reward, PPO, ""),
        ("DPO", by_preference, DPO, ""),
    )
    made = (
        _course(title, [folder for folder in folders if folder.curves], main, kind, inks, rounds=run.rounds)
        for title, folders, main, kind in wanted
    )
    return tuple(course for course in made if course is not None)


def _course(
    title: str, folders: Sequence[StageFolder], main: Sequence[str], kind: str, inks: Inks, *, rounds: int
) -> Course | None:
    if not folders:
        return None
    logged = dict.fromkeys(name for folder in folders for name in folder.curves if name not in NOT_DRAWN)
    known = [name for name in METRICS if name in logged]
    rest = [name for name in (*known, *logged) if name not in main]

    def panels(names: Sequence[str]) -> tuple[Markup, ...]:
        drawn = (_panel(title, name, folders, kind, inks, rounds=rounds) for name in names if name in logged)
        return tuple(panel for panel in drawn if panel is not None)

    longest = max(len(points) for folder in folders for points in folder.curves.values())
    note = SMOOTHED if longest > FEW_POINTS else ""
    return Course(title=title, note=note, panels=panels(main), further=panels(list(dict.fromkeys(rest))))


def _panel(
    course: str, name: str, folders: Sequence[StageFolder], kind: str, inks: Inks, *, rounds: int
) -> Markup | None:
    series, told = [], []
    for folder in folders:
        points = folder.curves.get(name, ())
        if not points:
            continue
        label = folder.variant or plain(folder.stage.partition("-")[2])
        ink = inks.of(label if folder.round == 1 else f"{label} of round {folder.round}", kind)
        if rounds > 1:
            label = f"{folder.round}: {label}"
        series.append(Series(label=label, ink=ink, points=smoothed(points)))
        told.append(f"{label} goes from {number(points[0][1])} to {number(points[-1][1])}")
    if not series:
        return None
    return line_chart(
        LineChart(
            title=TITLES.get(name, capitalised(plain(name))),
            unit=_unit(name),
            description=f"{course}: {_meaning(name)}{'; '.join(told)}.",
            series=tuple(series),
            y_text=_small_rate if name.endswith("learning_rate") else None,
            is_share=name in SHARES or (name in METRICS and METRICS[name].unit == "share"),
        )
    )


def _unit(name: str) -> str:
    declared = METRICS.get(name)
    return UNITS.get(declared.unit, declared.unit) if declared else ""


def _meaning(name: str) -> str:
    declared = METRICS.get(name)
    return f"{declared.meaning}. " if declared else ""


def _small_rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", f"e{NEGATIVE}") if value else "0"


def smoothed(points: Points) -> tuple[Point, ...]:
    """The trend, with the middle 80 % of the steps around; few points are kept as they are."""
    if len(points) <= FEW_POINTS:
        return tuple(Point(x=x, y=y) for x, y in points)
    half = max(2, round(len(points) * WINDOW_SHARE / 2))
    stride = max(1, len(points) // DRAWN_POINTS)
    centres = list(range(0, len(points), stride))
    if centres[-1] != len(points) - 1:
        centres.append(len(points) - 1)
    return tuple(_window(points, centre, half) for centre in centres)


def _window(points: Points, centre: int, half: int) -> Point:
    """The trend at `centre`: a straight line through the window, which unlike a mean is true to a slope at the ends."""
    window = points[max(0, centre - half) : centre + half + 1]
    at = points[centre][0]
    mean_x, mean_y = (sum(values) / len(window) for values in zip(*window, strict=True))
    spread_x = sum((x - mean_x) ** 2 for x, _ in window)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in window) / spread_x if spread_x else 0.0
    trend = mean_y + slope * (at - mean_x)
    apart = [y - mean_y - slope * (x - mean_x) for x, y in window]
    deciles = quantiles(apart, n=10, method="inclusive")
    return Point(x=at, y=trend, low=trend + min(deciles[0], 0.0), high=trend + max(deciles[-1], 0.0))


def distance(run: Run, inks: Inks) -> Distance | None:
    """Score and gold against KL: from the sweep where there is one, else from the models that were measured."""
    sweep = run.results.sweep
    is_sweep = bool(sweep)
    if not is_sweep:
        sweep = tuple(
            SweepPoint(
                policy=model.name,
                beta=None,
                kl=model.measured["kl"].value,
                proxy=model.measured.get("proxy_score"),
                gold=model.measured.get("gold"),
            )
            for model in run.results.models
            if "kl" in model.measured
        )
    proxy = _distance_panel("What the reward model sees", "score", sweep, inks, lambda point: point.proxy, is_sweep)
    gold = _distance_panel("What is true", "gold score", sweep, inks, lambda point: point.gold, is_sweep)
    panels = tuple(panel for panel in (proxy, gold) if panel is not None)
    return Distance(panels=panels, finding=_finding(sweep, is_sweep=is_sweep), is_sweep=is_sweep) if panels else None


def _finding(sweep: Sequence[SweepPoint], *, is_sweep: bool) -> str:
    """What the points say of over-optimisation, by value where the intervals of best and furthest overlap."""
    judged = [(point, point.gold) for point in sweep if point.gold is not None]
    if len(judged) < 2:
        return "Whether people would agree was not measured in this run."
    if not is_sweep:  # policies trained in different ways: what differs between them is not their distance alone
        return "Each point is one policy of this run; they differ in more than their distance."
    best, best_gold = max(judged, key=lambda pair: pair[1].value)
    furthest, far_gold = max(judged, key=lambda pair: pair[0].kl)
    if best is furthest:
        return "In this run the policy that went furthest is also the best by the gold score."
    apart = far_gold.has_interval and best_gold.has_interval and far_gold.bounds[1] < best_gold.bounds[0]
    verdict = "it has over-optimised" if apart else "the intervals overlap, so this may be chance"
    return (
        f"In this run gold is highest ({best_gold.value:.3g}) at {best.kl:.3g} nats; the policy that went furthest, "
        f"{furthest.kl:.3g} nats, is at {far_gold.value:.3g}: {verdict}."
    )


def _distance_panel(
    title: str,
    unit: str,
    sweep: Sequence[SweepPoint],
    inks: Inks,
    value_of: Callable[[SweepPoint], Measured | None],
    is_sweep: bool,
) -> Markup | None:
    lines: dict[str, list[Point]] = {}
    ink_of: dict[str, str] = {}
    for point in sweep:
        measured = value_of(point)
        if measured is None:
            continue
        # The policies of a sweep that differ in beta alone are one line, drawn in their family's first shade.
        family = inks.family(point.policy)
        name = family.name.lower().replace("_", "-") if is_sweep and point.beta is not None else point.policy
        ink_of[name] = f"{family.css} v0" if name != point.policy else inks.of(point.policy)
        low, high = measured.bounds if measured.has_interval else (None, None)
        note = f"β {point.beta:g}" if point.beta is not None else ""
        lines.setdefault(name, []).append(Point(x=point.kl, y=measured.value, low=low, high=high, note=note))
    if sum(len(points) for points in lines.values()) < 2:  # one point is no relation
        return None
    told = "; ".join(f"{name}: {_course_in_words(points)}" for name, points in lines.items())
    return line_chart(
        LineChart(
            title=title,
            unit=unit,
            description=f"Against the KL from the reference. {told}.",
            series=tuple(Series(label=name, ink=ink_of[name], points=tuple(points)) for name, points in lines.items()),
            x_label="KL, nats",
            x_by_root=True,
            marked=True,
        ),
        width=390,
        height=260,
    )


def _course_in_words(points: Sequence[Point]) -> str:
    ordered = sorted(points, key=lambda point: point.x)
    return ", ".join(f"{number(point.y)} at {number(point.x)} nats" for point in ordered)
