"""Answering from files: what a file looks like, and that a bad one is refused whole with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tastemaker.errors import DataError
from tastemaker.store import LabelService, Store
from tastemaker.store.desk import Desk
from tastemaker.store.exchange import FileReport
from tastemaker.store.tasks import StudyKind

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

Row = dict[str, Any]
ANSWERS: dict[StudyKind, tuple[int, object]] = {
    "demonstration": (0, "Gladly.\nIn two lines."),
    "ranking": (3, [["C"], ["A", "B"]]),
    "comparison": (2, "tie"),
    "rating": (2, {"A": {"likert": 5, "flags": ["hallucination"]}, "B": {"likert": 2}}),
}


def fill_in(path: Path, answer: Callable[[int, Row], object]) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    lines = [json.dumps(row | {"answer": answer(index, row)}) for index, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ann.jsonl"


def queued(service: LabelService, make: Make, kind: StudyKind = "ranking", items: int = 3) -> None:
    service.queue(make.study(kind), make.items(items, outputs=ANSWERS[kind][0]))
    make.raters(service, "ann")


@pytest.mark.parametrize("kind", ANSWERS)
def test_every_kind_can_be_answered_from_a_file(service: LabelService, make: Make, path: Path, kind: StudyKind) -> None:
    queued(service, make, kind)
    assert service.tasks_to_file("study", "ann", path) == 3
    fill_in(path, lambda index, row: ANSWERS[kind][1] if index < 2 else None)
    assert service.answers_from_file(path) == FileReport(counted=2, extra=0, unanswered=1)
    assert service.progress("study").missing == 1


def test_the_file_shows_the_task(service: LabelService, make: Make, path: Path) -> None:
    queued(service, make)
    service.tasks_to_file("study", "ann", path, limit=2)
    (task, _) = service.held("study", "ann")
    row = json.loads(path.read_text().splitlines()[0])
    assert row == {
        "task": task.id,
        "token": task.token,
        "kind": "ranking",
        "guideline_version": "v1",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question key-0?"}],
        "outputs": {output.letter: output.text for output in task.outputs},
        "answer": None,
    }


def test_a_file_holds_what_was_claimed_before_too(service: LabelService, make: Make, path: Path) -> None:
    queued(service, make)
    (held,) = service.claim("study", "ann")
    assert service.tasks_to_file("study", "ann", path, limit=1) == 2
    assert json.loads(path.read_text().splitlines()[0])["task"] == held.id


def test_files_may_come_back_days_later(service: LabelService, make: Make, path: Path, clock: Clock) -> None:
    queued(service, make)
    service.tasks_to_file("study", "ann", path)
    clock.now += 6.9 * 24 * 3600
    assert service.progress("study").leased == 3


def test_reading_a_file_again_stores_its_corrections(service: LabelService, make: Make, path: Path) -> None:
    queued(service, make, "demonstration", items=2)
    service.tasks_to_file("study", "ann", path)
    fill_in(path, lambda index, row: f"first {index}")
    service.answers_from_file(path)
    fill_in(path, lambda index, row: "corrected" if index else "first 0")
    assert service.answers_from_file(path) == FileReport(counted=2, extra=0, unanswered=0)
    assert [each.response for each in service.demonstrations("study")] == ["first 0", "corrected"]


def test_a_file_of_tasks_is_not_overwritten(service: LabelService, make: Make, path: Path) -> None:
    queued(service, make)
    path.write_text("answers of an evening")
    with pytest.raises(DataError, match=r"ann\.jsonl: exists already and may hold answers"):
        service.tasks_to_file("study", "ann", path)
    assert service.progress("study").leased == 0


BAD: list[tuple[object, str]] = [
    ([["C"], ["A"]], "missing B"),
    ([["C"], ["A", "B"], ["B"]], "repeated B"),
    ("CAB", r"expected groups of letters, best first"),
    ([["C"], ["A", 2]], "expected groups of letters"),
    ({"A": 1}, "expected groups of letters"),
    ([], "missing A, B, C"),
    ("", "expected groups of letters"),
]


@pytest.mark.parametrize(("answer", "message"), BAD)
def test_a_bad_answer_refuses_the_file_with_its_line(
    service: LabelService, make: Make, path: Path, answer: object, message: str
) -> None:
    queued(service, make)
    service.tasks_to_file("study", "ann", path)
    # The first is left for later, so that lines and submissions are not counted alike.
    fill_in(path, lambda index, row: (None, ANSWERS["ranking"][1], answer)[index])
    with pytest.raises(DataError, match=message) as caught:
        service.answers_from_file(path)
    assert (caught.value.path, caught.value.line) == (path, 3)
    assert service.progress("study").answered == 0


BAD_LINES: list[tuple[str, str]] = [
    ("{", "is not JSON"),
    ("[]", "is no task"),
    ('{"task": "a", "token": "b"}', "is no task"),
    ('{"task": "a", "token": "b", "kind": "poll", "answer": null}', "kind is 'poll'"),
    ('{"task": "a", "token": "b", "kind": "ranking"}', 'has no "answer"'),
    ('{"task": "a", "token": "b", "kind": "rating", "answer": {"A": {"likert": "5"}}}', "rating of A is"),
    ('{"task": "a", "token": "b", "kind": "rating", "answer": {"A": {"stars": 5}}}', "rating of A is"),
    ('{"task": "a", "token": "b", "kind": "comparison", "answer": "both"}', '"A", "B" or "tie"'),
    ('{"task": "a", "token": "b", "kind": "demonstration", "answer": 7}', "text of the response"),
    ('{"task": "a", "token": "b", "kind": "comparison", "answer": "tie"}', "never given out under this token"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_named(service: LabelService, make: Make, path: Path, line: str, message: str) -> None:
    queued(service, make)
    service.tasks_to_file("study", "ann", path)
    fill_in(path, lambda index, row: ANSWERS["ranking"][1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        service.answers_from_file(path)
    assert caught.value.line == 5  # after three tasks and an empty line
    assert service.progress("study").answered == 0


def test_files_that_are_no_task_files(service: LabelService, path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        service.answers_from_file(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no tasks"):
        service.answers_from_file(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        service.answers_from_file(path)


def test_days_that_a_file_was_away_are_no_measure_of_leases(
    service: LabelService, make: Make, path: Path, clock: Clock, store: Store
) -> None:
    queued(service, make, items=5)
    service.tasks_to_file("study", "ann", path, limit=3)
    clock.now += 3 * 24 * 3600.0
    fill_in(path, lambda index, row: ANSWERS["ranking"][1])
    service.answers_from_file(path)
    task = Desk(store, clock=clock).next_task("ann", "study")
    assert task is not None
    assert task.leased_until == clock.now + 4 * 3600.0


def test_half_a_character_refuses_the_file_with_its_line(service: LabelService, make: Make, path: Path) -> None:
    """Or else an export, or the run that reads the answers, would be the first to find that no UTF-8 can hold it."""
    queued(service, make, "demonstration", items=2)
    service.tasks_to_file("study", "ann", path)
    fill_in(path, lambda index, row: "A smile: \ud83d\ude00" if index == 0 else "Half of one: \ud83d")
    with pytest.raises(DataError, match="holds half a character") as caught:
        service.answers_from_file(path)
    assert (caught.value.path, caught.value.line) == (path, 2)
    fill_in(path, lambda index, row: "A smile: \ud83d\ude00")
    assert service.answers_from_file(path).counted == 2
