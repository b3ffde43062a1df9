"""The learning curves as a picture: of every mode the mean of its seeds, and a band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.learning_curves.results import Mode, Results

from tastemaker.metrics import METRICS
from tastemaker.report.charts import LineChart, Point, Series, line_chart
from tastemaker.report.curves import smoothed
from tastemaker.report.figure import Figure, Part

# Hue tells the precision; every line is named at its end too.
INKS = {
    "fp32-trainer": "f-ppo-ptx v0",
    "fp32-sampler": "f-best-of v0",
    "bf16-trainer": "f-ppo v0",
    "bf16-sampler": "f-sft v0",
}
PANELS = {
    "score": ("Score", ""),
    "kl": ("KL from the reference", "nats a response"),
    "entropy": ("Entropy", "nats a token"),
    "sampler_mismatch": ("Sampler against trainer", "nats a token"),
}


def draw(results: Results) -> Figure:
    """The picture of all modes that were run."""
    about = results.about
    seeds = ", ".join(map(str, results.seeds))
    return Figure(
        title="Precision and old log-probs",
        subtitle=f"recipe {about['recipe']}, policy {about['policy']}, seeds {seeds}",
        parts=(Part(panels=tuple(line_chart(_chart(results, name)) for name in PANELS)),),
        columns=2,
        words="Lines are the means of the seeds' trends; bands reach from the lowest seed to the highest. A mode is "
        "named after its precision and after whose log-probs are the old ones.",
    )


def _chart(results: Results, name: str) -> LineChart:
    title, unit = PANELS[name]
    series = tuple(_series(results, mode, name) for mode in results.modes)
    ends = "; ".join(f"{one.label} ends at {one.points[-1].y:.3g}" for one in series)
    return LineChart(
        title=title,
        unit=unit,
        x_label="iteration",
        description=f"{METRICS[name].meaning}. {ends}.",
        series=series,
    )


def _series(results: Results, mode: Mode, name: str) -> Series:
    trends = [smoothed(tuple(enumerate(run.curves[name]))) for run in results.of(mode.name).values()]
    points = tuple(_across(at) for at in zip(*trends, strict=True))
    return Series(label=mode.title, ink=INKS[mode.name], points=points)


def _across(points: Sequence[Point]) -> Point:
    """The seeds' values at one iteration as one point with its band."""
    values = [point.y for point in points]
    banded = len(values) > 1
    return Point(
        x=points[0].x,
        y=mean(values),
        low=min(values) if banded else None,
        high=max(values) if banded else None,
    )
