"""What a run folder says, as records: the results, the stage folders with their curves, and the samples.

Whatever a run does not have (yet) is None or empty. `reading` fills these from the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tastemaker.report.fields import Measured

STAGES = (
    "1-prompts",
    "2-demonstrations",
    "3-sft",
    "4-comparisons",
    "5-reward",
    "6-policy",
    "7-evaluation",
)
# What a stage leaves behind, in the files that hold it when its manifest gives no counts.
RECORDS = {
    "1-prompts": "prompts",
    "2-demonstrations": "demonstrations",
    "4-comparisons": "rankings",
    "7-evaluation": "samples",
}

FLAG = "flag:"  # before the name of a yes/no field of the ratings, among the measurements of a model

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How often `a` is preferred to `b`, ties counting half."""

    a: str
    b: str
    judge: str
    decoding: str
    n: int
    win_rate: Measured
    length_controlled: Measured | None

    def turned(self) -> Comparison:
        """The same comparison seen from the other side."""
        controlled = self.length_controlled
        return Comparison(
            a=self.b,
            b=self.a,
            judge=self.judge,
            decoding=self.decoding,
            n=self.n,
            win_rate=self.win_rate.of_the_other_side(),
            length_controlled=None if controlled is None else controlled.of_the_other_side(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What was measured of one model; `measured` holds every plain number by its name."""

    name: str
    kind: str
    parameters: float | None
    measured: Mapping[str, Measured]
    by_category: Mapping[str, Measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One measurement that a claim rests on, in the run's words, and whether it is beyond its bound."""

    description: str
    measured: Measured | None
    holds: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement decided by measurements. `holds` is None where the run did not measure it."""

    id: str
    statement: str
    measured: Measured | str | None
    holds: bool | None
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """What a stage cost."""

    name: str
    seconds: float
    skipped: bool


class State(StrEnum):
    """What of a policy's training a contestant is."""

    FINISHED = "finished"
    CHECKPOINT = "checkpoint"  # kept on the way
    EMA = "ema"  # the average of the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Distant:
    """One contestant that optimisation has moved: how far it went and what that was worth.

    `variant` is the policy in whose training it came to be, after `iteration`; `start` the contestant that training
    began with; `reward` what `proxy` is by.
    """

    policy: str
    beta: float | None
    kl: float
    proxy: Measured | None
    gold: Measured | None
    variant: str = ""
    state: State = State.FINISHED
    iteration: int | None = None
    start: str = ""
    reward: str = ""


class JudgeKind(StrEnum):
    """What judges an evaluation that is no part of a run."""

    REWARD_MODEL = "reward model"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Who judged in place of raters: the name is a path, or MODULE:FUNCTION."""

    name: str
    kind: JudgeKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """OUT/results.json. `judge` is that of an evaluation alone; a run has raters or names its judge in the recipe.

    `decodings` are in the evaluation's order, so that the one which claims are about is the last.
    """

    recipe: str
    seed: int | None
    started: str
    finished: str
    seconds: float | None
    peak_memory_mb: float | None
    versions: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    models: tuple[Model, ...]
    claims: tuple[Claim, ...]
    stages: tuple[StageTime, ...]
    agreement: Mapping[str, Measured | str]
    distances: tuple[Distant, ...]
    decodings: tuple[str, ...] = ()
    judge: Judge | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Pairs whose winner the reward model predicted with about this probability, and how often it was right."""

    predicted: float
    observed: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """How well a reward model predicts raters: those it learned from, and others."""

    accuracy: Measured | None
    held_out: Measured | None
    calibration: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a stage ran with."""

    config: object
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    code: str
    source: str
    libraries: Mapping[str, str]
    seed: int | None
    seconds: float | None
    peak_memory_mb: float | None
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFolder:
    """One folder of the run: a stage, or one variant of it."""

    round: int
    stage: str
    variant: str
    path: Path
    manifest: Manifest | None
    curves: Mapping[str, Points]
    records: int | None
    reward: RewardResult | None

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.variant}" if self.variant else self.stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt and what every model answered."""

    messages: tuple[tuple[str, str], ...]
    category: str
    responses: Mapping[str, str]
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the recipe says of the judgements: who the raters are, or which reward model judged in their place."""

    raters: str = ""
    judge_reward: str = ""
    baseline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder, read."""

    name: str
    setting: Setting
    results: Results
    folders: tuple[StageFolder, ...]
    samples: tuple[Sample, ...]
    prompt_categories: Mapping[str, int]

    @property
    def rounds(self) -> int:
        return max((folder.round for folder in self.folders), default=1)

    def of_stage(self, stage: str) -> tuple[StageFolder, ...]:
        return tuple(folder for folder in self.folders if folder.stage == stage)
