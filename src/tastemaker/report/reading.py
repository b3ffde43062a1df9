"""Reading a run folder: OUT/results.json and what the stage folders of OUT/round-N/ hold.

The folder of an evaluation alone, which names its judge, has no rounds but OUT/responses.jsonl. Only results.json must
exist. Whatever else is missing is simply absent from the result, because a run that was stopped half way still
deserves its report; what is there and malformed is a DataError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from tastemaker.errors import DataError
from tastemaker.intervals import wilson
from tastemaker.report.fields import Fields, Measured, read_lines, read_object
from tastemaker.report.run import (
    FLAG,
    RECORDS,
    STAGES,
    CalibrationBin,
    Check,
    Claim,
    Comparison,
    Distant,
    Judge,
    JudgeKind,
    Manifest,
    Model,
    Points,
    Results,
    RewardResult,
    Run,
    Sample,
    Setting,
    StageFolder,
    StageTime,
    State,
)

NOT_RECORDS = frozenset({"metrics.jsonl"})
STEP = "step"
Kind = TypeVar("Kind", bound=StrEnum)


def read_run(out: Path) -> Run:
    """Read the run folder `out`. Raises DataError where there is no results.json or something in it is malformed."""
    results_file = out / "results.json"
    if not results_file.is_file():
        there = "the folder does not exist" if not out.is_dir() else "the folder holds no results.json"
        raise DataError(
            f"{there}. A report is written from the results of a run: give the folder that was named by --out in "
            "'tastemaker run RECIPE.toml --out DIR', after its evaluation has run.",
            path=out,
        )
    rounds = sorted((path for path in out.glob("round-*") if _round_number(path)), key=_round_number)
    results = _results(read_object(results_file))
    samples = [path / STAGES[6] / "samples.jsonl" for path in rounds]
    if results.judge is not None:
        samples = [out / "responses.jsonl"]
    prompts = [path / STAGES[0] / "report.json" for path in rounds]
    return Run(
        name=out.resolve().name,
        setting=_setting(out / "recipe.json"),
        results=results,
        folders=tuple(folder for path in rounds for folder in _folders_of_round(path)),
        samples=next((_samples(path) for path in reversed(samples) if path.is_file()), ()),
        prompt_categories=next((_prompt_categories(path) for path in reversed(prompts) if path.is_file()), {}),
    )


def _setting(path: Path) -> Setting:
    if not path.is_file():
        return Setting()
    fields = read_object(path)
    evaluation = fields.inside("evaluation")
    return Setting(
        raters=fields.text("raters") or "",
        judge_reward=(evaluation.text("judge_reward") if evaluation else None) or "",
        baseline=(evaluation.text("baseline") if evaluation else None) or "",
    )


def _results(fields: Fields) -> Results:
    models, agreement = fields.inside("models"), fields.inside("agreement")
    versions = fields.inside("versions")
    return Results(
        recipe=fields.text("recipe") or "",
        seed=fields.whole("seed"),
        started=fields.text("started") or "",
        finished=fields.text("finished") or "",
        seconds=fields.number("seconds"),
        peak_memory_mb=fields.number("peak_memory_mb"),
        versions=versions.texts() if versions else {},
        comparisons=tuple(_comparison(row) for row in fields.list_inside("comparisons")),
        models=tuple(_model(name, models) for name in models.names()) if models else (),
        claims=tuple(_claim(row) for row in fields.list_inside("claims")),
        stages=tuple(
            StageTime(
                name=_needed(row, "name"), seconds=row.number("seconds") or 0.0, skipped=row.flag("skipped") or False
            )
            for row in fields.list_inside("stages")
        ),
        agreement=_flattened(agreement) if agreement else {},
        distances=tuple(point for row in fields.list_inside("over_optimization") for point in _distant(row)),
        decodings=_decodings(models) if models else (),
        judge=_judge(fields.inside("judge")),
    )


def _decodings(models: Fields) -> tuple[str, ...]:
    """Those of a model that has them all: the best of several samples has no greedy one."""
    held = [row.inside("decodings") for name in models.names() if (row := models.inside(name)) is not None]
    return max((tuple(row.names()) for row in held if row is not None), key=len, default=())


def _judge(fields: Fields | None) -> Judge | None:
    if fields is None:
        return None
    kind = _one_of(fields, "kind", JudgeKind, _needed(fields, "kind"))
    return Judge(name=_needed(fields, "name"), kind=kind)


def _comparison(fields: Fields) -> Comparison:
    win_rate = fields.as_measured("win_rate")
    if win_rate is None:
        raise DataError(f"{fields.place!r} has no 'win_rate'.", path=fields.path)
    controlled = fields.inside("length_controlled")
    return Comparison(
        a=_needed(fields, "a"),
        b=_needed(fields, "b"),
        judge=fields.text("judge") or "",
        decoding=fields.text("decoding") or "",
        n=win_rate.n or 0,
        win_rate=win_rate,
        length_controlled=controlled.as_measured("win_rate") if controlled else None,
    )


def _model(name: str, models: Fields) -> Model:
    fields = models.inside(name)
    if fields is None:
        raise DataError(f"'models.{name}' is null; it must be an object.", path=models.path)
    categories = fields.inside("by_category")
    by_category: dict[str, Measured] = {}
    for category in categories.names() if categories else ():
        inner = categories.inside(category) if categories else None
        measured = inner.as_measured("win_rate") if inner else None
        if measured is not None:
            by_category[category] = measured
    measured_by_name = {
        other: measured
        for other in fields.names()
        if other not in {"kind", "parameters", "by_category"} and _is_measurement(fields.values[other])
        for measured in (fields.measured(other),)
        if measured is not None
    }
    flags = fields.inside("flags")
    for flag in flags.names() if flags else ():
        rate = flags.measured(flag) if flags else None
        if rate is not None:
            measured_by_name[FLAG + flag] = rate
    return Model(
        name=name,
        kind=fields.text("kind") or "",
        parameters=fields.number("parameters"),
        measured=measured_by_name,
        by_category=by_category,
    )


def _claim(fields: Fields) -> Claim:
    value = fields.values.get("measured")
    measured: Measured | str | None = fields.measured("measured") if _is_measurement(value) else None
    if measured is None and isinstance(value, str):
        measured = value
    return Claim(
        id=fields.text("id") or "",
        statement=_needed(fields, "statement"),
        measured=measured,
        holds=fields.flag("holds"),
        checks=tuple(
            Check(
                description=row.text("description") or "",
                measured=row.as_measured("value"),
                holds=row.flag("holds"),
            )
            for row in fields.list_inside("checks")
        ),
    )


def _distant(fields: Fields) -> tuple[Distant, ...]:
    """The point, or nothing where the KL is unknown or infinite: it has no place on the axis then.

    A row that does not say of what it is a state stands for a policy at the end of its own training.
    """
    kl = fields.measured("kl")
    if kl is None:
        return ()
    proxy = fields.measured("proxy") if _is_measurement(fields.values.get("proxy")) else None
    gold = fields.measured("gold") if _is_measurement(fields.values.get("gold")) else None
    policy = _needed(fields, "policy")
    return (
        Distant(
            policy=policy,
            beta=fields.number("beta"),
            kl=max(kl.value, 0.0),
            proxy=proxy,
            gold=gold,
            variant=fields.text("variant") or policy,
            state=_one_of(fields, "state", State, fields.text("state") or State.FINISHED),
            iteration=fields.whole("iteration"),
            start=fields.text("start") or "",
            reward=fields.text("reward") or "",
        ),
    )


def _flattened(fields: Fields, prefix: str = "") -> dict[str, Measured | str]:
    """Every measurement of a nested object, by the path to it; one that is undefined gives its reason instead."""
    found: dict[str, Measured | str] = {}
    for name in fields.names():
        value, path = fields.values[name], f"{prefix}{name}"
        if _is_measurement(value):
            measured = fields.measured(name)
            if measured is not None:
                found[path] = measured
        elif isinstance(value, Mapping):
            inner = fields.inside(name)
            reason = value.get("reason", value.get("undefined"))
            if isinstance(reason, str):
                found[path] = reason
            elif inner is not None:
                found |= _flattened(inner, f"{path} · ")
    return found


def _folders_of_round(path: Path) -> list[StageFolder]:
    found: list[StageFolder] = []
    for stage in STAGES:
        folder = path / stage
        if not folder.is_dir():
            continue
        variants = [child for child in sorted(folder.iterdir()) if child.is_dir() and _is_stage_folder(child)]
        if _is_stage_folder(folder) or not variants:
            found.append(_folder(folder, stage, "", _round_number(path)))
        found.extend(_folder(child, stage, child.name, _round_number(path)) for child in variants)
    return found


def _is_stage_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("manifest.json", "metrics.jsonl", "results.json"))


def _folder(path: Path, stage: str, variant: str, round_number: int) -> StageFolder:
    manifest_file, metrics_file, results_file = (
        path / name for name in ("manifest.json", "metrics.jsonl", "results.json")
    )
    manifest = _manifest(read_object(manifest_file)) if manifest_file.is_file() else None
    is_reward = stage == STAGES[4] and results_file.is_file()
    return StageFolder(
        round=round_number,
        stage=stage,
        variant=variant,
        path=path,
        manifest=manifest,
        curves=_curves(metrics_file) if metrics_file.is_file() else {},
        records=_record_count(path, stage, manifest),
        reward=_reward_result(read_object(results_file)) if is_reward else None,
    )


def _manifest(fields: Fields) -> Manifest:
    objects = {name: fields.inside(name) for name in ("inputs", "outputs", "libraries", "code")}
    texts = {name: inner.texts() if inner else {} for name, inner in objects.items()}
    counts, config = fields.inside("counts"), fields.values.get("config")
    numbers = {name: counts.whole(name) for name in counts.names()} if counts else {}
    seed = fields.whole("seed")
    if seed is None and isinstance(config, Mapping) and isinstance(config.get("seed"), int):
        seed = config["seed"]
    return Manifest(
        config=config,
        inputs=texts["inputs"],
        outputs=texts["outputs"],
        code=texts["code"].get("version", ""),
        source=texts["code"].get("source", ""),
        libraries=texts["libraries"],
        seed=seed,
        seconds=fields.number("seconds"),
        peak_memory_mb=fields.number("peak_memory_mb"),
        counts={name: count for name, count in numbers.items() if count is not None},
    )


def _curves(path: Path) -> dict[str, Points]:
    """Every metric as (step, value) points; steps at which it was not logged, or not finite, are left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in read_lines(path):
        step = row.number(STEP)
        if step is None:
            raise DataError("The line has no 'step'.", path=path, line=row.line)
        for name in row.names():
            if name == STEP or not _is_measurement(row.values[name]):
                continue
            value = row.number(name)
            if value is not None:
                curves.setdefault(name, []).append((step, value))
    return {name: tuple(points) for name, points in curves.items()}


def _record_count(path: Path, stage: str, manifest: Manifest | None) -> int | None:
    """How many records a data stage made: its manifest's own count, or the lines of its file, or of all its files."""
    records = RECORDS.get(stage)
    if records is None:
        return None
    if manifest is not None and records in manifest.counts:
        return manifest.counts[records]
    named = path / f"{records}.jsonl"
    files = [named] if named.is_file() else [file for file in path.glob("*.jsonl") if file.name not in NOT_RECORDS]
    return sum(_line_count(file) for file in files) if files else None


def _line_count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _reward_result(fields: Fields) -> RewardResult:
    held_out = fields.inside("held_out_raters")
    bins = (_calibration_bin(row) for row in _calibration_rows(fields))
    return RewardResult(
        accuracy=fields.as_measured("accuracy"),
        held_out=held_out.as_measured("accuracy") if held_out else None,
        calibration=tuple(one for one in bins if one is not None),
    )


def _calibration_rows(fields: Fields) -> tuple[Fields, ...]:
    """The bins, given as a list or as the `bins` of an object."""
    if isinstance(fields.values.get("calibration"), Mapping):
        inner = fields.inside("calibration")
        return inner.list_inside("bins") if inner else ()
    return fields.list_inside("calibration")


def _calibration_bin(row: Fields) -> CalibrationBin | None:
    """The bin, with Wilson's interval where only its number of pairs is given; nothing where it is empty."""
    predicted, observed, n = row.number("predicted"), row.measured("observed"), row.whole("n")
    if predicted is None or observed is None:
        return None
    if not observed.has_interval and n and 0 <= observed.value <= 1:
        interval = wilson(observed.value * n, n).ci95
        observed = Measured(value=observed.value, low=interval.low, high=interval.high, n=n)
    return CalibrationBin(predicted=predicted, observed=observed) if observed.n else None


def _samples(path: Path) -> tuple[Sample, ...]:
    found = []
    for row in read_lines(path):
        responses, scores = row.inside("responses"), row.inside("scores")
        score_of = {name: scores.number(name) for name in scores.names()} if scores else {}
        messages = row.list_inside("prompt")
        found.append(
            Sample(
                messages=tuple((turn.text("role") or "user", turn.text("content") or "") for turn in messages),
                category=row.text("category") or "",
                responses=responses.texts() if responses else {},
                scores={name: score for name, score in score_of.items() if score is not None},
            )
        )
    return tuple(found)


def _prompt_categories(path: Path) -> dict[str, int]:
    fields = read_object(path)
    for name in ("by_category", "categories", "category"):
        if isinstance(fields.values.get(name), Mapping):
            inner = fields.inside(name)
            counts = {category: inner.whole(category) for category in inner.names()} if inner else {}
            return {category: count for category, count in counts.items() if count}
    return {}


def _one_of(fields: Fields, name: str, kinds: type[Kind], value: str) -> Kind:
    if value not in set(kinds):
        allowed = ", ".join(repr(str(one)) for one in kinds)
        raise DataError(f"{fields.place!r} has the {name} {value!r}; it must be one of {allowed}.", path=fields.path)
    return kinds(value)


def _needed(fields: Fields, name: str) -> str:
    value = fields.text(name)
    if not value:
        raise DataError(f"{fields.place!r} has no {name!r}.", path=fields.path)
    return value


def _is_measurement(value: object) -> bool:
    """A number, or an object with a number called `value`."""
    if isinstance(value, Mapping):
        value = value.get("value")
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _round_number(path: Path) -> int:
    match = re.fullmatch(r"round-(\d+)", path.name)
    return int(match.group(1)) if match and path.is_dir() else 0
