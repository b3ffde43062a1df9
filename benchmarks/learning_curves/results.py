"""What was measured, mode by mode and seed by seed, and what of it is more than noise between seeds.

Runs of one seed have the same prompts, the same order and the same random numbers in every mode, so modes are compared
within seeds: the mean of the differences with Student's interval over seeds. Beside it stands how far seeds lie apart
within one mode, which is what a learning curve is worth.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from tastemaker.artefacts import read_json
from tastemaker.config import to_json
from tastemaker.errors import DataError
from tastemaker.files import atomic_write
from tastemaker.intervals import Interval, student_quantile
from tastemaker.settings import PpoConfig, Precision

LAST = 10  # iterations whose mean is the end of a run
NUMBER_LIST = re.compile(r"\[([^\[\]{}\"]*)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """What policy, value function and rollouts are computed in, and whose log-probs are the old ones."""

    name: str
    precision: Precision
    old_logprobs: Literal["trainer", "sampler"]

    @property
    def title(self) -> str:
        return self.name.replace("-", ", ")

    @property
    def refused(self) -> bool:
        """Whether the product refuses this combination, so that only an experiment can run it."""
        return self.precision == "bfloat16" and self.old_logprobs == "sampler"

    def settings(self, config: PpoConfig) -> PpoConfig:
        """A recipe's settings in this mode. The value function and the rollouts follow the policy's precision."""
        config = replace(
            config,
            policy=replace(config.policy, precision=self.precision),
            value=replace(config.value, precision=self.precision),
            decoding=replace(config.decoding, precision=self.precision),
            old_logprobs="trainer",
        )
        if not self.refused:
            return replace(config, old_logprobs=self.old_logprobs)
        # The config refuses this when it is made, and nobody can set it in a recipe or a command. What it would do
        # is the reason for the refusal, so this experiment, and nothing else, writes into a finished config.
        object.__setattr__(config, "old_logprobs", self.old_logprobs)
        return config


MODES = {
    mode.name: mode
    for mode in (
        Mode(name="fp32-trainer", precision="float32", old_logprobs="trainer"),
        Mode(name="fp32-sampler", precision="float32", old_logprobs="sampler"),
        Mode(name="bf16-trainer", precision="bfloat16", old_logprobs="trainer"),
        Mode(name="bf16-sampler", precision="bfloat16", old_logprobs="sampler"),
    )
}
# What each is held against: the default of the product first, and in bf16 also the same with the trainer's log-probs.
PAIRS = (
    ("fp32-sampler", "fp32-trainer"),
    ("bf16-trainer", "fp32-trainer"),
    ("bf16-sampler", "fp32-trainer"),
    ("bf16-sampler", "bf16-trainer"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One mode with one seed. Lists have a number for each iteration."""

    mode: str
    seed: int
    seconds: float
    seconds_per_iteration: float
    """The median."""
    curves: Mapping[str, Sequence[float]]
    """Metrics of `tastemaker.metrics`; `sampler_mismatch` is measured at the first minibatch where the old log-probs
    are the sampler's own."""
    first_minibatch: Mapping[str, Sequence[float]]
    """Of the first minibatch of each iteration, before its step: all ratios would be 1 in exact arithmetic."""

    def end(self, name: str) -> float:
        """A curve's mean over the last iterations."""
        return mean(self.curves[name][-LAST:])


class Reading(Enum):
    """A difference beside the noise of seeds, decided by its interval."""

    LESS = "less than seeds lie apart"  # all of the interval is: agreement is shown
    WITHIN = "within seed noise"  # the interval holds 0: no difference is shown
    BEYOND = "beyond seed noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a mode differs from another in one quantity, beside how far seeds of one mode lie apart."""

    mode: str
    against: str
    quantity: str
    difference: float
    ci95: Interval
    between_seeds: float
    """Standard deviation between seeds of the same mode, of both modes together."""

    @property
    def reading(self) -> Reading:
        """What the numbers say."""
        if max(abs(self.ci95.low), abs(self.ci95.high)) < self.between_seeds:
            return Reading.LESS
        return Reading.WITHIN if 0.0 in self.ci95 else Reading.BEYOND


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was measured; `about` says on what and with what."""

    about: Mapping[str, Any]
    runs: tuple[Run, ...]

    def of(self, mode: str) -> dict[int, Run]:
        """The runs of a mode by seed."""
        return {run.seed: run for run in self.runs if run.mode == mode}

    @property
    def modes(self) -> list[Mode]:
        """Those that were run."""
        return [mode for name, mode in MODES.items() if self.of(name)]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})


QUANTITIES: Mapping[str, Callable[[Run], float]] = {
    "score at the end": lambda run: run.end("score"),
    "KL at the end": lambda run: run.end("kl"),
    "score over the whole run": lambda run: mean(run.curves["score"]),
}


def comparisons(results: Results) -> list[Comparison]:
    """Every pair of modes in every quantity; none where there are not two seeds that both modes have."""
    found = []
    for mode, against in PAIRS:
        ones, others = results.of(mode), results.of(against)
        seeds = sorted(ones.keys() & others.keys())
        if len(seeds) < 2:
            continue
        for quantity, value in QUANTITIES.items():
            one, other = [value(ones[seed]) for seed in seeds], [value(others[seed]) for seed in seeds]
            difference, interval = paired_difference(one, other)
            found.append(
                Comparison(
                    mode=mode,
                    against=against,
                    quantity=quantity,
                    difference=difference,
                    ci95=interval,
                    between_seeds=math.sqrt((stdev(one) ** 2 + stdev(other) ** 2) / 2),
                )
            )
    return found


def paired_difference(ones: Sequence[float], others: Sequence[float]) -> tuple[float, Interval]:
    """The mean of the pairs' differences, with Student's 95 % interval."""
    differences = [one - other for one, other in zip(ones, others, strict=True)]
    if len(differences) < 2:
        raise DataError(f"{len(differences)} pairs have no interval; at least two seeds are needed.")
    centre = mean(differences)
    reach = student_quantile(len(differences)) * stdev(differences) / math.sqrt(len(differences))
    return centre, Interval(centre - reach, centre + reach)


def spread_of_ratios(runs: Sequence[Run]) -> float:
    """How far ratios of unchanged weights lie from 1: the root mean square of their logarithms, over all iterations."""
    half_squares = list(itertools.chain.from_iterable(run.first_minibatch["approx_kl"] for run in runs))
    return math.sqrt(2 * mean(half_squares))


def save(path: Path, results: Results) -> None:
    """Write the results, a list of numbers to a line, with the comparisons that they give."""
    found = [{**to_json(one), "ci95": one.ci95.to_json(), "reading": one.reading.value} for one in comparisons(results)]
    content = {**results.about, "comparisons": found, "runs": to_json(results.runs)}
    text = json.dumps(_rounded(content), ensure_ascii=False, allow_nan=False, indent=1)
    with atomic_write(path) as file:
        file.write(NUMBER_LIST.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n")


def load(path: Path) -> Results:
    """What `save` wrote. Comparisons are worked out anew from the runs."""
    content = read_json(path)
    runs = tuple(Run(**run) for run in content.pop("runs"))
    content.pop("comparisons")
    return Results(about=content, runs=runs)


def _rounded(value: Any) -> Any:
    """With six digits of every number: more are noise, and three times the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
