"""The remaining sections of a report: the flow, the claims, the models in numbers, samples, cost, lineage.

Each function gives what its template shows, or nothing where the run has nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tastemaker.report.charts import (
    Stop,
    bar_chart,
    flow_chart,
)
from tastemaker.report.families import Inks
from tastemaker.report.fields import Measured
from tastemaker.report.run import (
    FLAG,
    RECORDS,
    STAGES,
    Check,
    Claim,
    Model,
    Run,
    Sample,
    StageFolder,
    StageTime,
)
from tastemaker.report.words import (
    capitalised,
    common_decimals,
    compact,
    counted,
    duration,
    interval_decimals,
    listed,
    memory,
    number,
    number_with_interval,
    percent,
    percent_range,
    plain,
    value_and_interval,
)

STAGE_NAMES = ("Prompts", "Demonstrations", "SFT", "Comparisons", "Reward model", "Policy", "Evaluation")
VARIANTS = {STAGES[2]: ("model", "models"), STAGES[4]: ("model", "models"), STAGES[5]: ("policy", "policies")}
SHARE_METRICS = frozenset({"eos_rate", "truncated_rate", "win_rate"})
MODEL_METRICS = {
    "gold": "Gold score",
    "proxy_score": "Score by the reward model",
    "score": "Score by the judge",
    "likert": "Likert rating, 1 to 7",
    "kl": "KL from the reference, nats a response",
    "mean_tokens": "Response length, tokens",
    "eos_rate": "Responses that end",
    "heldout_text_loss": "Loss on held-out text, nats a token",
    "entropy": "Entropy, nats a token",
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct word pairs",
}
VERDICTS = {True: "holds", False: "fails", None: "open"}
SAMPLES = 12
SAMPLE_CHARACTERS = 1500
CONFIG_CHARACTERS = 20_000
SHORT_HASH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """The seven stages, drawn for a page and for a phone, and what people asked."""

    across: Markup
    upright: Markup
    categories: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """What was measured, its value with the interval, the bound it had to pass, and whether it did."""

    what: str
    value: str
    bound: str
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRow:
    """A claim, its verdict (`holds`, `fails` or `open`) and the measurements that decide it."""

    id: str
    statement: str
    verdict: str
    checks: tuple[CheckRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelColumn:
    """A model at the head of a column of the table of models."""

    name: str
    ink: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """What was measured of every model: a row a metric, a column a model; a cell is a value and its interval."""

    columns: tuple[ModelColumn, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One model's response in the samples; `cut` is how many characters were left out."""

    name: str
    ink: str
    text: str
    score: str
    cut: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt of a category with every model's response."""

    category: str
    turns: tuple[tuple[str, str], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What a stage cost; `share` is its time in per cent of the longest stage's."""

    name: str
    time: str
    share: float
    memory: str
    skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of every stage and of the run."""

    rows: tuple[CostRow, ...]
    total: str
    peak_memory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """From what a stage's results came."""

    name: str
    summary: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    config: str


def flow(run: Run) -> Flow:
    """The stages with what they made and how long they took."""
    stops = [_stop(run, stage, name) for stage, name in zip(STAGES, STAGE_NAMES, strict=True)]
    told = [listed([part for part in (stop.count, stop.time) if part]) or "not run" for stop in stops]
    description = "; ".join(f"{stop.name}: {words}" for stop, words in zip(stops, told, strict=True)) + "."
    again = run.rounds > 1
    asked = sorted(run.prompt_categories.items(), key=lambda item: -item[1])
    bars = [(plain(name), float(count)) for name, count in asked]
    return Flow(
        across=flow_chart(stops, description=description, again=again, upright=False),
        upright=flow_chart(stops, description=description, again=again, upright=True),
        categories=bar_chart(
            bars,
            title="Prompts by category",
            description="; ".join(f"{name}: {amount:,.0f}" for name, amount in bars) + ".",
        )
        if bars
        else None,
    )


def _stop(run: Run, stage: str, name: str) -> Stop:
    folders = run.of_stage(stage)
    seconds = [folder.manifest.seconds for folder in folders if folder.manifest and folder.manifest.seconds is not None]
    if not seconds:
        seconds = [one.seconds for one in run.results.stages if stage in one.name]
    count = _stop_count(run, stage, folders)
    return Stop(name=name, count=count, time=duration(sum(seconds)) if seconds else "", done=bool(folders or count))


def _stop_count(run: Run, stage: str, folders: Sequence[StageFolder]) -> str:
    if stage == STAGES[6] and run.results.comparisons:
        return counted(sum(one.n for one in run.results.comparisons), "judgement")
    if stage in VARIANTS:
        names = {folder.variant for folder in folders}
        return counted(len(names), *VARIANTS[stage]) if names else ""
    counts = [folder.records for folder in folders if folder.records is not None]
    return counted(sum(counts), RECORDS[stage].removesuffix("s")) if counts else ""


def claim_rows(claims: Sequence[Claim]) -> tuple[ClaimRow, ...]:
    """The claims as the run gives them; nothing is left out for failing."""
    return tuple(
        ClaimRow(
            id=claim.id, statement=claim.statement, verdict=VERDICTS[claim.holds], checks=tuple(_check_rows(claim))
        )
        for claim in claims
    )


def _check_rows(claim: Claim) -> list[CheckRow]:
    if claim.checks:
        return [_check_row(check) for check in claim.checks]
    if claim.measured is None:
        return []
    verdict = VERDICTS[claim.holds]
    if isinstance(claim.measured, str):
        return [CheckRow(what=claim.measured, value="", bound="", verdict=verdict)]
    return [CheckRow(what="", value=number_with_interval(claim.measured), bound="", verdict=verdict)]


def _check_row(check: Check) -> CheckRow:
    """A description reads "WHAT: NUMBERS, needed BOUND"; the numbers are set here, with the digits they deserve."""
    what, _, numbers = check.description.rpartition(": ")
    bound = numbers.partition("needed ")[2]
    if check.measured is None or not what or not bound:
        return CheckRow(what=check.description, value="", bound="", verdict=VERDICTS[check.holds])
    value = number_with_interval(check.measured)
    return CheckRow(what=what, value=value, bound=bound, verdict=VERDICTS[check.holds])


def model_table(run: Run, inks: Inks) -> ModelTable | None:
    """Every measurement of every model, the ones that matter most first."""
    models = run.results.models
    if not models:
        return None
    found = dict.fromkeys(name for model in models for name in model.measured)
    order = [*(name for name in MODEL_METRICS if name in found), *(name for name in found if name not in MODEL_METRICS)]
    rows = [(_metric_title(name), _cells(name, [_measured_of(model, name) for model in models])) for name in order]
    columns = [
        ModelColumn(
            name=model.name,
            ink=inks.of(model.name),
            about=f"{compact(model.parameters)} parameters" if model.parameters else plain(model.kind),
        )
        for model in models
    ]
    return ModelTable(columns=tuple(columns), rows=tuple(rows))


def _metric_title(name: str) -> str:
    if name.startswith(FLAG):
        return f"Flagged: {plain(name.removeprefix(FLAG))}"
    return MODEL_METRICS.get(name, capitalised(plain(name)))


def _measured_of(model: Model, name: str) -> Measured | None:
    """What was measured; a flag that nobody set on a model that was rated is a flag set on none of its responses."""
    never_set = name.startswith(FLAG) and "likert" in model.measured
    return model.measured.get(name, Measured(value=0.0) if never_set else None)


def _cells(name: str, row: Sequence[Measured | None]) -> tuple[tuple[str, str], ...]:
    """A row's values and intervals, all with the same decimals, so that they can be compared down to the last digit."""
    known = [one for one in row if one is not None]
    by_width = [interval_decimals(one) for one in known if one.has_interval]
    decimals = max(by_width) if by_width else common_decimals([one.value for one in known])
    return tuple(("", "") if one is None else _cell(name, one, decimals) for one in row)


def _cell(name: str, measured: Measured, decimals: int) -> tuple[str, str]:
    if name in SHARE_METRICS or name.startswith(FLAG):
        return percent(measured.value), percent_range(measured)
    return value_and_interval(measured, decimals)


def examples(samples: Sequence[Sample], inks: Inks) -> tuple[Example, ...]:
    """The first sample of each category, in the file's order: picked by position, so not by how well it went.

    Where all are of one category, the first few.
    """
    answered = [sample for sample in samples if sample.responses]
    first: dict[str, Sample] = {}
    for sample in answered:
        first.setdefault(sample.category, sample)
    picked = list(first.values()) if len(first) > 1 else answered
    return tuple(_example(sample, inks) for sample in picked[:SAMPLES])


def _example(sample: Sample, inks: Inks) -> Example:
    answers = [
        Answer(
            name=name,
            ink=inks.of(name),
            text=response[:SAMPLE_CHARACTERS],
            score=number(sample.scores[name]) if name in sample.scores else "",
            cut=max(0, len(response) - SAMPLE_CHARACTERS),
        )
        for name, response in sample.responses.items()
    ]
    return Example(category=plain(sample.category) or "prompt", turns=sample.messages, answers=tuple(answers))


def cost(run: Run) -> Cost | None:
    """Time of each stage as the run counted it, else as the manifests do."""
    manifests = {folder.name: folder.manifest for folder in run.folders if folder.manifest}
    times = run.results.stages or tuple(
        StageTime(name=name, seconds=manifest.seconds or 0.0, skipped=False) for name, manifest in manifests.items()
    )
    if not times:
        return None
    whole, longest = sum(time.seconds for time in times), max(time.seconds for time in times) or 1.0
    peaks = {name: manifest.peak_memory_mb for name, manifest in manifests.items()}
    rows = []
    for time in times:
        peak = peaks.get(time.name)
        rows.append(
            CostRow(
                name=time.name,
                time=duration(time.seconds),
                share=100 * time.seconds / longest,
                memory=memory(peak) if peak else "",
                skipped=time.skipped,
            )
        )
    seconds = run.results.seconds if run.results.seconds is not None else whole
    peak = run.results.peak_memory_mb
    return Cost(rows=tuple(rows), total=duration(seconds), peak_memory=memory(peak) if peak else "")


def origins(run: Run) -> tuple[Origin, ...]:
    """Where each stage's results came from, in the order of the flow."""
    return tuple(_origin(folder, run.rounds) for folder in run.folders if folder.manifest)


def _origin(folder: StageFolder, rounds: int) -> Origin:
    manifest = folder.manifest
    assert manifest is not None
    parts = [
        f"seed {manifest.seed}" if manifest.seed is not None else "",
        counted(len(manifest.inputs), "input") if manifest.inputs else "",
        counted(len(manifest.outputs), "output") if manifest.outputs else "",
        f"code {manifest.code} {manifest.source[:SHORT_HASH]}".rstrip() if manifest.code or manifest.source else "",
    ]
    config = json.dumps(manifest.config, indent=2, ensure_ascii=False) if manifest.config is not None else ""
    if len(config) > CONFIG_CHARACTERS:
        config = f"{config[:CONFIG_CHARACTERS]}\n… {len(config) - CONFIG_CHARACTERS:,} more characters in manifest.json"
    return Origin(
        name=f"round {folder.round} · {folder.name}" if rounds > 1 else folder.name,
        summary=" · ".join(part for part in parts if part),
        inputs=_sorted_hashes(manifest.inputs),
        outputs=_sorted_hashes(manifest.outputs),
        config=config,
    )


def _sorted_hashes(hashes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(hashes.items()))
