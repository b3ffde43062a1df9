"""Reads a stage's folder, or every training stage's of a run, and puts each to its checks.

What stage it is, its measurements say themselves, so a folder without a manifest is read too: the metrics of an older
version, or of a run that was killed. What a check needs and the folder does not have, that check leaves alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tastemaker.artefacts import CHECKPOINT, MANIFEST, STARTED
from tastemaker.doctor import course, exact, supervised
from tastemaker.doctor.findings import Check, Finding, Kind, Measured, Stage
from tastemaker.errors import DataError
from tastemaker.metrics import read_metrics

METRICS_FILE = "metrics.jsonl"

CHECKS: Mapping[Stage, Sequence[tuple[Kind, Check]]] = {
    "sft": (*exact.OF_EVERY_STAGE, *supervised.OF_SFT),
    "reward": (*exact.OF_EVERY_STAGE, *supervised.OF_REWARD),
    "ppo": (*exact.OF_EVERY_STAGE, *exact.OF_PPO, *course.OF_PPO),
    "dpo": (*exact.OF_EVERY_STAGE, *exact.OF_DPO, *supervised.OF_DPO),
}
# Every kind of finding once, in the order in which they are looked for.
KINDS: Sequence[Kind] = tuple({kind.name: kind for checks in CHECKS.values() for kind, _ in checks}.values())
LEAST: Mapping[Stage, int] = {
    "sft": supervised.LEAST,
    "reward": supervised.LEAST,
    "ppo": course.LEAST,
    "dpo": supervised.LEAST,
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A stage and what was found in it."""

    measured: Measured
    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether there is no alarm; notes may be there."""
        return not any(finding.is_alarm for finding in self.findings)

    @property
    def is_short(self) -> bool:
        """Whether there are too few steps for a course to be judged."""
        return len(self.measured.rows) < LEAST[self.measured.stage]

    def to_json(self) -> dict[str, Any]:
        measured = self.measured
        return {
            "folder": str(measured.folder),
            "stage": measured.stage,
            "steps": len(measured.rows),
            "finished": measured.finished,
            "too_short_to_judge": self.is_short,
            "healthy": self.is_healthy,
            "findings": [finding.to_json() for finding in self.findings],
        }


def examine(run: Path) -> list[Diagnosis]:
    """The diagnosis of a stage's folder, or of every training stage in a run's.

    Raises:
        DataError: there is no such folder, or no stage in it has measured anything.
    """
    if not run.is_dir():
        raise DataError("is not a folder; give a stage's, or a run's that has round-1/ in it.", path=run)
    found = sorted(
        path.parent
        for path in run.rglob(METRICS_FILE)
        if CHECKPOINT not in path.relative_to(run).parts
        and not any(part.startswith(".") for part in path.relative_to(run).parts)
    )
    read = [measured for folder in found if (measured := read_stage(folder)) is not None]
    if not read:
        raise DataError(f"holds no {METRICS_FILE} with a step in it; a stage writes one while it trains.", path=run)
    return [diagnose(measured) for measured in read]


def diagnose(measured: Measured) -> Diagnosis:
    """Put a stage to its checks; what is wrong further up may explain what is wrong below, so their order stays."""
    findings = list[Finding]()
    for _, check in CHECKS[measured.stage]:
        finding = check(measured)
        if finding is not None and all(finding.kind != other.kind for other in findings):
            findings.append(finding)
    return Diagnosis(measured, tuple(findings))


def read_stage(folder: Path) -> Measured | None:
    """What a stage's folder tells; None if it has measured nothing and no check has stopped it."""
    try:
        rows = read_metrics(folder / METRICS_FILE)
    except UnicodeDecodeError as error:
        raise DataError(f"is not text: {error}.", path=folder / METRICS_FILE) from error
    if any(not isinstance(row, dict) or not isinstance(row.get("step"), int) for row in rows):
        raise DataError("has a line without a step; it is not a stage's.", path=folder / METRICS_FILE)
    manifest, started = _read(folder / MANIFEST), _read(folder / STARTED)
    task = manifest or started
    given, why = task.get("config"), started.get("stopped")
    config = given if isinstance(given, dict) else {}
    stopped = why if isinstance(why, dict) and "message" in why else None
    if not rows and stopped is None:
        return None
    return Measured(
        folder=folder,
        stage=_stage(rows[0]) if rows else _stage_by_name(str(task.get("stage")), config),
        rows=rows,
        config=config,
        results=_read(folder / "results.json"),
        finished=bool(manifest) and not started,
        stopped=stopped,
    )


def _stage(row: Mapping[str, Any]) -> Stage:
    for name, stage in (("kl", "ppo"), ("margin", "dpo"), ("score_gap", "reward")):
        if name in row:
            return stage  # type: ignore[return-value]
    return "sft"


def _stage_by_name(name: str, config: Mapping[str, Any]) -> Stage:
    """Of one that stopped before it had measured anything: `ppo`, or in a run `6-policy/ppo-ptx`."""
    kind = name.partition("/")[0].rpartition("-")[2]
    if kind == "policy":
        kind = "ppo" if "iterations" in config else "dpo"
    return next((stage for stage in CHECKS if stage == kind), "sft")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that may be missing, or cut short by a kill."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return held if isinstance(held, dict) else {}
