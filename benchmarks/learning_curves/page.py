"""Writes the figures of docs/precision.md from the results: `python -m benchmarks.learning_curves.page`.

Everything between the two marks of the page is made here, from the committed file of results alone, and the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.bench.driver import ROOT
from benchmarks.bench.table import table
from benchmarks.learning_curves.picture import draw
from benchmarks.learning_curves.results import (
    LAST,
    Comparison,
    Reading,
    Results,
    Run,
    comparisons,
    load,
    spread_of_ratios,
)
from benchmarks.pages import put

from tastemaker.files import atomic_write
from tastemaker.report.figure import standalone

RESULTS = ROOT / "benchmarks/results/learning-curves.json"
PAGE, PICTURE = ROOT / "docs/precision.md", ROOT / "docs/images/learning-curves.svg"
BEGIN, END = "<!-- made by benchmarks/learning_curves from benchmarks/results -->", "<!-- end -->"


def write(results: Results, page: Path = PAGE, picture: Path = PICTURE) -> None:
    """Put the figures between the marks of the page, and draw the picture."""
    with atomic_write(picture) as file:
        file.write(standalone(draw(results)))
    put(page, BEGIN, END, render(results))


def render(results: Results) -> str:
    """All figures, as Markdown."""
    found = comparisons(results)
    parts = [_origin(results), _ends(results), "![Learning curves of every mode](images/learning-curves.svg)"]
    parts += [_verdict(found), _differences(found)] if found else []
    parts += [_first_minibatches(results), _spread(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("python", "torch", "transformers"))
    on = about["device"] if about["device"] != "cpu" else f"{about['processor']}, {about['cores']} cores"
    minutes = sum(run.seconds for run in results.runs) / 60
    return (
        f"Measured on {about['date']}: {on}, threads: {about['threads']}; {versions}. Recipe {about['recipe']}, policy "
        f"{about['policy']}: {about['iterations']} iterations of {about['batch_size']} episodes and "
        f"{about['steps_per_iteration']} optimizer steps; seeds {_listed(results.seeds)}. {len(results.runs)} runs, "
        f"{minutes:.0f} minutes."
    )


def _ends(results: Results) -> str:
    """Where each mode ends, and how far its seeds lie apart there."""
    rows = []
    for mode in results.modes:
        runs = list(results.of(mode.name).values())
        ends = [_with_spread([run.end(name) for run in runs]) for name in ("score", "kl", "entropy")]
        title = f"{mode.title} (refused)" if mode.refused else mode.title
        rows.append([title, *ends, f"{mean(run.seconds_per_iteration for run in runs):.2f}"])
    header = ["mode", "score", "KL, nats a response", "entropy, nats a token", "s an iteration"]
    return f"Means of the last {LAST} iterations ± the standard deviation between seeds:\n\n{table(header, rows)}"


def _verdict(found: Sequence[Comparison]) -> str:
    beyond = [f"{_pair(one)} in {one.quantity}" for one in found if one.reading is Reading.BEYOND]
    less = sum(one.reading is Reading.LESS for one in found)
    told = f"Of {len(found)} differences between modes {len(found) - len(beyond)} are within the noise of seeds: "
    told += f"{less} by an interval that is narrower than seeds lie apart, the others by one that holds 0. "
    told += f"Beyond it: {'; '.join(beyond)}. " if beyond else "None is beyond it. "
    return f"{told}(Where modes differ by noise alone, one interval of twenty misses 0.)"


def _differences(found: Sequence[Comparison]) -> str:
    rows = [
        [
            _pair(one),
            one.quantity,
            f"{one.difference:+.3f}",
            f"[{one.ci95.low:+.3f}, {one.ci95.high:+.3f}]",
            f"{one.between_seeds:.3f}",
            one.reading.value,
        ]
        for one in found
    ]
    return table(["modes", "difference of", "paired by seed", "95 % interval", "seeds of one mode", "reading"], rows)


def _first_minibatches(results: Results) -> str:
    """Ratios of unchanged weights, over all iterations and seeds."""
    rows = []
    for mode in results.modes:
        runs = list(results.of(mode.name).values())
        rows.append(
            [
                mode.title,
                _small(_mean(runs, lambda run: run.curves["sampler_mismatch"])),
                _small(spread_of_ratios(runs)),
                f"{_mean(runs, lambda run: run.first_minibatch['ratio_mean']):.5f}",
                f"{max(max(run.first_minibatch['ratio_max']) for run in runs):.4f}",
                f"{_mean(runs, lambda run: run.first_minibatch['clip_fraction']):.3%}",
                f"{_mean(runs, lambda run: run.first_minibatch['approx_kl']):.1e}",
                f"{_mean(runs, lambda run: run.curves['clip_fraction']):.3%}",
            ]
        )
    header = ["first minibatch, weights unchanged", "sampler against trainer", "spread of ratios", "mean ratio"]
    header += ["largest", "clipped", "approximate KL", "clipped, all minibatches"]
    return table(header, rows)


def _spread(results: Results) -> str:
    """The tiny model's mismatch."""
    runs = list(results.of("bf16-sampler").values())
    if not runs:
        return ""
    spread = spread_of_ratios(runs)
    return (
        f"In bf16 with the sampler's log-probs, ratios of unchanged weights spread by {_small(spread)} on this model; "
        "on a real one by more, as the last table of this page shows."
    )


def _pair(one: Comparison) -> str:
    return f"{one.mode} - {one.against}"


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _mean(runs: Sequence[Run], values: Callable[[Run], Sequence[float]]) -> float:
    return mean(mean(values(run)) for run in runs)


def _small(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


if __name__ == "__main__":
    write(load(RESULTS))
