"""How training went: curves over steps.

A training metric is noisy from step to step. What is drawn is its local trend, with a band that holds the middle
80 % of the steps around it: a band of spread, not of confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from markupsafe import Markup

from tastemaker.metrics import METRICS
from tastemaker.report.charts import LineChart, Point, Series, line_chart
from tastemaker.report.families import Inks
from tastemaker.report.run import STAGES, Points, Run, StageFolder
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


# Titles where a metric's name alone does not say it; units and meanings are those it was declared with.
TITLES = {
    "kl": "KL from the reference",
    "response_tokens": "Response length",
    "length_correlation": "Score against length",
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
ALL_OF_PPO = ("score", "reward", "kl", "response_tokens", "entropy")
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
        charts = (_chart(title, name, folders, kind, inks, rounds=rounds) for name in names if name in logged)
        return tuple(line_chart(chart) for chart in charts if chart is not None)

    return Course(title=title, note=_note(folders), panels=panels(main), further=panels(list(dict.fromkeys(rest))))


def policy_course(run: Run, variant: str, inks: Inks, *, width: float, height: float) -> Course | None:
    """The curves of one policy alone, a line for each round that trained it; None where it left none."""
    folders = [folder for folder in run.of_stage(STAGES[5]) if folder.variant == variant and folder.curves]
    if not folders:
        return None
    title = f"Training of {variant}"
    names = DPO if any("margin" in folder.curves for folder in folders) else ALL_OF_PPO
    charts = (_chart(title, name, folders, "", inks, rounds=run.rounds, labelled=len(folders) > 1) for name in names)
    panels = tuple(line_chart(chart, width=width, height=height) for chart in charts if chart is not None)
    return Course(title=title, note=_note(folders), panels=panels, further=())


def _note(folders: Sequence[StageFolder]) -> str:
    longest = max(len(points) for folder in folders for points in folder.curves.values())
    return SMOOTHED if longest > FEW_POINTS else ""


def _chart(
    course: str,
    name: str,
    folders: Sequence[StageFolder],
    kind: str,
    inks: Inks,
    *,
    rounds: int,
    labelled: bool = True,
) -> LineChart | None:
    series, told = [], []
    for folder in folders:
        points = folder.curves.get(name, ())
        if not points:
            continue
        label = folder.variant or plain(folder.stage.partition("-")[2])
        ink = inks.of(label if folder.round == 1 else f"{label} of round {folder.round}", kind)
        if rounds > 1:
            label = f"{folder.round}: {label}"
        series.append(Series(label=label if labelled else "", ink=ink, points=smoothed(points)))
        told.append(f"{label} goes from {number(points[0][1])} to {number(points[-1][1])}")
    if not series:
        return None
    return LineChart(
        title=TITLES.get(name, capitalised(plain(name))),
        unit=_unit(name),
        description=f"{course}: {_meaning(name)}{'; '.join(told)}.",
        series=tuple(series),
        y_text=_small_rate if name.endswith("learning_rate") else None,
        is_share=name in SHARES or (name in METRICS and METRICS[name].unit == "share"),
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
