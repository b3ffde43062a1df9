"""A lead with an account, and raters who answer by what the outputs say, wherever these are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa

from tastemaker.store import Store
from tastemaker.store.audit import Actor, AuditLog
from tastemaker.store.desk import Desk
from tastemaker.store.schema import accounts, studies
from tastemaker.store.tasks import Answer, ComparisonAnswer, OutputRating, RankingAnswer, RatingAnswer, Task

if TYPE_CHECKING:
    from tests.store.conftest import Clock

LEAD = Actor("lea", "lead")
LATER = Actor("otto", "lead")


def open_accounts(store: Store) -> None:
    with store.write() as connection:
        rows = [{"name": actor.name, "created_at": 0.0} for actor in (LEAD, LATER)]
        connection.execute(sa.insert(accounts), rows)


def know_secrets(store: Store) -> None:
    """Give every study its name as its secret: hidden gold then comes at the same places whenever a test is run."""
    with store.write() as connection:
        connection.execute(sa.update(studies).values(secret=studies.c.name))


def actions(store: Store) -> list[str]:
    """What the audit log says was done, oldest first; the chain holds."""
    log = AuditLog(store)
    assert log.verify().ok
    return [entry.action for entry in log.entries(limit=100)][::-1]


def letters(task: Task) -> dict[int, str]:
    """The letter under which each queued output is shown; its text begins "Text INDEX"."""
    return {int(output.text.split()[1]): output.letter for output in task.outputs}


def ranking(task: Task, groups: Sequence[Sequence[int]]) -> RankingAnswer:
    shown = letters(task)
    return RankingAnswer(tuple(tuple(shown[index] for index in group) for group in groups))


def choice(task: Task, index: int | None) -> ComparisonAnswer:
    picked = "tie" if index is None else letters(task)[index]
    return ComparisonAnswer(picked)  # type: ignore[arg-type]


def rating(task: Task, by_output: Mapping[int, OutputRating]) -> RatingAnswer:
    shown = letters(task)
    return RatingAnswer({shown[index]: each for index, each in by_output.items()})


def work(
    desk: Desk,
    rater: str,
    study: str,
    answers: Mapping[str, object],
    *,
    seconds: float = 0.0,
    clock: Clock | None = None,
) -> list[str]:
    """Answer every task that the desk has; `answers` gives the groups, choice or ratings by what the prompt asks.

    Times that are reported count as far as the clock moved too.
    """
    done: list[str] = []
    while (view := desk.next_task(rater, study)) is not None:
        task = view.task
        key = task.messages[-1].content.removeprefix("Question ").removesuffix("?")
        given = answers[key]
        answer: Answer
        if task.kind == "ranking":
            answer = ranking(task, given)  # type: ignore[arg-type]
        elif task.kind == "comparison":
            answer = choice(task, given)  # type: ignore[arg-type]
        else:
            answer = rating(task, given)  # type: ignore[arg-type]
        if clock is not None:
            clock.now += seconds
        desk.submit(rater, task.id, answer, seconds=seconds)
        done.append(key)
    return done
