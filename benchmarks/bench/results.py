"""Measurements as they lie in their files, and what is worked out from them: medians, rates, shares of the peak.

A case's figure for an engine is the median over its turns of a turn's median step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench.cases import MODELS, PEAK_OF
from benchmarks.bench.driver import FOREIGN, tokens

KERNELS = "M-kernels.json"
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One engine's figures on one case."""

    name: str
    precision: str
    seconds: float
    low: float
    """The fastest turn's median step."""
    high: float
    """The slowest turn's."""
    turns: int
    by_round: Mapping[int, float]
    """The turns' median steps by round: engines that take turns have the same rounds."""
    disturbed: int
    """Turns in which others took more of the processors than is allowed."""
    thrown_away: int
    """Turns that were taken again because others had taken more."""
    foreign: float
    """The largest share of the processors that others took in a turn."""
    memory: float
    """Peak resident memory in GiB; 0 where it was not measured."""
    phases: Mapping[str, float]
    """Seconds by phase, medians over all steps."""
    counts: Mapping[str, int]
    """What a step did: tokens, sequences, steps of each optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that was measured."""

    cases: Mapping[tuple[str, str], Mapping[str, Any]]
    """Model and case, and the file's content: engines with their turns, and `about`, when and where it was measured."""

    def engine(self, model: str, case: str, name: str) -> Measured | None:
        """An engine's figures, or None where it was not measured."""
        record = self.cases.get((model, case), {}).get("engines", {}).get(name)
        return None if record is None or not record["turns"] else summary(record)

    def runs(self) -> list[tuple[Mapping[str, Any], list[tuple[str, str]]]]:
        """What was measured of one commit on one machine on one day, with its models and cases; the largest first."""
        runs: dict[str, tuple[Mapping[str, Any], list[tuple[str, str]]]] = {}
        for place, content in self.cases.items():
            about = {name: value for name, value in content.get("about", {}).items() if name != "gemm"}
            runs.setdefault(json.dumps(about, sort_keys=True), (about, []))[1].append(place)
        return sorted(runs.values(), key=lambda run: -len(run[1]))


def load(folder: Path) -> Results:
    """Everything in a folder of results."""
    cases = {}
    for path in sorted(folder.glob("*-*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "engines" in content:
            cases[content["model"], content["case"]] = content
    return Results(cases=cases)


def summary(record: Mapping[str, Any]) -> Measured:
    """The figures of an engine's turns."""
    turns = record["turns"]
    per_turn = [median(step["seconds"] for step in turn["steps"]) for turn in turns]
    steps = [step for turn in turns for step in turn["steps"]]
    names = list(dict.fromkeys(name for step in steps for name in step.get("phases", {})))
    return Measured(
        name=record["name"],
        precision=record["precision"],
        seconds=median(per_turn),
        low=min(per_turn),
        high=max(per_turn),
        turns=len(turns),
        by_round={turn["round"]: seconds for turn, seconds in zip(turns, per_turn, strict=True)},
        disturbed=sum(turn["foreign"] > FOREIGN for turn in turns),
        thrown_away=sum(turn.get("tries", 1) - 1 for turn in turns),
        foreign=max(turn["foreign"] for turn in turns),
        memory=record.get("peak_rss", 0) / GIB,
        phases={name: median(step["phases"].get(name, 0.0) for step in steps) for name in names},
        counts=steps[-1].get("counts", {}),
    )


def needed_flops(task: str, measured: Measured, sizes: Mapping[str, int], model: str) -> float:
    """Operations of the matrix products that a step needs: 2 a weight and token forward, 4 backward.

    `body` are the weights that every token goes through, `head` those of the output, which responses alone need.
    Attention's own products are left out, and a prompt of several responses is needed once.
    """
    counts, body, head = measured.counts, sizes["body"], sizes["head"]
    responses = counts.get("response", 0)
    all_tokens = counts.get("prompt once", counts.get("prompt", 0)) + responses
    forward = 2.0 * (body * all_tokens + head * responses)
    trunk = 2.0 * body * all_tokens
    if task == "sft":
        return 3 * forward
    if task == "reward":
        return 3 * trunk
    if task == "dpo":
        return 4 * forward  # a pass of the reference, and forward and backward
    if task == "rollout":
        return forward
    shared = measured.name == "ours-shared"
    values = 0.0 if shared else trunk
    epochs = counts["steps of optimizer 1"] / MODELS[model].sizes.minibatches
    update = 3 * forward + 3 * values
    # the rollout, the old log-probs and the reference's; values and scores; the update
    return 3 * forward + values + trunk + epochs * update


def share_of_peak(results: Results, model: str, case: str, measured: Measured) -> float | None:
    """The share of the GEMM peak just before the case that the needed operations take, in the engine's precision."""
    content = results.cases[model, case]
    known = content.get("about", {}).get("gemm", {})
    peak = known.get(PEAK_OF[measured.precision], known.get("fp32"))
    if peak is None or "sizes" not in content or not tokens(measured.counts):
        return None
    flops = needed_flops(content["task"], measured, content["sizes"], model)
    return float(flops / measured.seconds / (peak * 1e9))
