"""The command that says what looks wrong with a run; it needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from tastemaker.commands.options import parse
from tastemaker.doctor import Diagnosis, Finding, examine

STAGES = {"sft": "SFT", "reward": "reward model", "ppo": "PPO", "dpo": "DPO"}
STYLES = {"fault": "bold red", "warning": "bold yellow", "note": "bold"}
SOMETHING_WRONG = 1  # the exit code


@dataclass(frozen=True, slots=True, kw_only=True)
class _DoctorOptions:
    """Say in plain words what looks wrong with a run, the likely cause and what to try.

    Reads the metrics of every training stage in RUN. Exits with 0 if nothing is wrong, with 1 if something is.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A stage's folder, or a whole run's; it may still be running."""
    json: bool = False
    """Print JSON: each stage with its findings."""


def doctor(arguments: Sequence[str]) -> int:
    """`tastemaker doctor RUN`"""
    options = parse(_DoctorOptions, arguments, "doctor")
    diagnoses = examine(options.run)
    if options.json:
        print(as_json(diagnoses))
    else:
        show(diagnoses, options.run, Console(highlight=False))
    return 0 if all(diagnosis.is_healthy for diagnosis in diagnoses) else SOMETHING_WRONG


def as_json(diagnoses: Sequence[Diagnosis]) -> str:
    healthy = all(diagnosis.is_healthy for diagnosis in diagnoses)
    return json.dumps({"healthy": healthy, "stages": [diagnosis.to_json() for diagnosis in diagnoses]}, indent=2)


def show(diagnoses: Sequence[Diagnosis], run: Path, console: Console) -> None:
    """Each stage in a line, its findings below it, and the sum of it all."""
    for diagnosis in diagnoses:
        measured = diagnosis.measured
        place = measured.folder.relative_to(run) if measured.folder != run else measured.folder
        count = f"{len(measured.rows)} {'iterations' if measured.stage == 'ppo' else 'steps'}"
        state = "" if measured.finished else ", not finished"
        console.print(
            Text.assemble((str(place), "bold"), f"  {STAGES[measured.stage]}, {count}{state}"), soft_wrap=True
        )
        for finding in diagnosis.findings:
            _show_finding(finding, console)
        if diagnosis.is_short:
            _print(Text("too short for its course to be judged"), console, indent=2)
        elif not diagnosis.findings:
            _print(Text("nothing looks wrong", style="green"), console, indent=2)
        console.print()
    console.print(Text(_sum(diagnoses)), soft_wrap=not console.is_terminal)


def _show_finding(finding: Finding, console: Console) -> None:
    kind = finding.kind
    _print(Text.assemble((kind.severity, STYLES[kind.severity]), f"  {kind.title} ({kind.name})"), console, indent=2)
    parts = (("Seen", (finding.seen,)), ("Likely cause", kind.causes), ("Try", kind.tries))
    for name, lines in parts:
        for number, line in enumerate(lines):
            lead = f"{name}: " if number == 0 else "or: "
            _print(Text(f"{lead}{line}"), console, indent=4 if number == 0 else 6)


def _print(text: Text, console: Console, *, indent: int) -> None:
    """A line that is set in; on a terminal what it is broken into as well."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)


def _sum(diagnoses: Sequence[Diagnosis]) -> str:
    alarms = [finding for diagnosis in diagnoses for finding in diagnosis.findings if finding.is_alarm]
    stages = f"{len(diagnoses)} stage{'s' if len(diagnoses) != 1 else ''}"
    if not alarms:
        return f"{stages} looked at; nothing looks wrong."
    wrong = sum(not diagnosis.is_healthy for diagnosis in diagnoses)
    return (
        f"{stages} looked at; {len(alarms)} {'things look' if len(alarms) != 1 else 'thing looks'} wrong in {wrong} of "
        "them. What stands first may explain what follows."
    )
