"""Tasks out to a file and answers back in, so that people can answer with any editor.

One task a line: what the rater sees, and an `answer` that is null until they fill it in. The same file comes back. It
is read whole or refused whole, with the line that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tastemaker.errors import DataError, StoreError
from tastemaker.files import atomic_write
from tastemaker.store.tasks import StudyKind, Submission, Task, answer_from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """A line of a filled-in file; no submission where its answer is still null."""

    line: int
    submission: Submission | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """What a file held: answers counted, answers kept as extra because they came late, tasks not answered yet."""

    counted: int
    extra: int
    unanswered: int

    def __str__(self) -> str:
        late = f", {self.extra} more kept that came in late" if self.extra else ""
        return f"{self.counted} answers counted{late}; {self.unanswered} tasks not answered yet"


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Write tasks for a rater to fill in."""
    with atomic_write(path) as file:
        for task in tasks:
            line = json.dumps(
                {
                    "task": task.id,
                    "token": task.token,
                    "kind": task.kind,
                    "guideline_version": task.guideline_version,
                    "messages": [message.to_json() for message in task.messages],
                    "outputs": {output.letter: output.text for output in task.outputs},
                    "answer": None,
                },
                ensure_ascii=False,
            )
            # Half a surrogate pair, which a model may produce, has no UTF-8; as an escape it is JSON all the same.
            file.write(line.encode("utf-8", "backslashreplace").decode() + "\n")


def read_answers(path: Path) -> list[AnswerRow]:
    """Read a filled-in file. Answers are checked for their shape here and against their task when they are stored."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError("there is no such file; name the one that was filled in.", path=path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason} at byte {error.start}).", path=path) from error
    rows = [_read_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError("holds no tasks; name a file that tasks were written to.", path=path)
    return rows


def _read_row(path: Path, number: int, line: str) -> AnswerRow:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON: {error.msg} at column {error.colno}.", path=path, line=number) from error
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("task", "token", "kind")):
        raise DataError(
            'is no task; expected an object with "task", "token", "kind" and "answer", as it was written.',
            path=path,
            line=number,
        )
    kind: StudyKind = row["kind"]
    if kind not in get_args(StudyKind):
        raise DataError(
            f"its kind is {kind!r}; it was one of {', '.join(get_args(StudyKind))}.", path=path, line=number
        )
    if "answer" not in row:
        raise DataError('has no "answer"; give one, or null to leave the task for later.', path=path, line=number)
    if row["answer"] is None:
        return AnswerRow(line=number, submission=None)
    try:
        answer = answer_from_json(kind, row["answer"])
    except StoreError as error:
        raise DataError(str(error), path=path, line=number) from error
    version = row.get("guideline_version")
    if version is not None and not isinstance(version, str):
        raise DataError("its guideline_version is no text; leave it as it was written.", path=path, line=number)
    submission = Submission(task_id=row["task"], token=row["token"], answer=answer, guideline_version=version)
    return AnswerRow(line=number, submission=submission)
