"""Items on which raters disagree, and the answer that an adjudicator gives in the end.

An adjudicator sees every answer to an item, and neither who gave it nor what wrote the outputs. These stand in an order
of the item's own, since the one in which they were queued may tell what wrote them; all letters of a case are of that
order, and what is stored is in queued letters (A is the output queued first). Adjudications are revisions like answers:
the newest counts, and the raters' own stay.

Items that test raters are not there for adjudicators, who would know them beforehand: gold and screening items are
refused as if there were none of that number.

An adjudicator may also rate. Nobody settles what they answered themselves, and nobody who may still be asked an item
sees what others answered: to them an item is closed until all its answers are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Messages
from tastemaker.store import audit, questions
from tastemaker.store.audit import Actor
from tastemaker.store.database import Store
from tastemaker.store.given import Given, Item, account_id, all_given, all_items, of_studies, one_each
from tastemaker.store.gold import disagreement, in_queued_letters, in_shown_letters
from tastemaker.store.questions import Study, blind_order
from tastemaker.store.schema import accounts, adjudications, items, leases, raters, remarks, studies
from tastemaker.store.schema import assignments as slots
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    ShownOutput,
    StudyKind,
    answer_from_json,
    answer_to_json,
    check_answer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disputed:
    """An item with several answers. `disagreement` is from 0 (all alike) to 1 (opposite)."""

    item: int
    number: int
    answers: int
    disagreement: float
    adjudicated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """An answer without its rater. `counts` is False where it came after its slot had gone to somebody else."""

    answer: Answer
    counts: bool
    guideline_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjudicated:
    """What an adjudicator decided."""

    answer: Answer
    reason: str
    by: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that an adjudicator sees of an item. `remarks` are what raters wrote when they flagged or skipped it."""

    item: int
    number: int
    study: str
    kind: StudyKind
    guideline_version: str
    messages: Messages
    outputs: tuple[ShownOutput, ...]
    answers: tuple[ShownAnswer, ...]
    remarks: tuple[str, ...]
    adjudications: tuple[Adjudicated, ...]


class AdjudicationService:
    """The list of disputes, one dispute, and its end."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def disputed(self, study: str, *, actor: Actor, least: float = 0.0, limit: int = 100) -> list[Disputed]:
        """The items whose answers lie apart by more than `least`, open ones first, the widest apart first.

        Without those that are not for `actor` to settle.
        """
        with self._store.read() as connection:
            found = self._find(connection, study)
            own = _own(connection, found, actor)
            given = all_given(connection, of_studies([found.id]))
            decided = set(newest(connection, [found.id]))
        by_item: dict[int, list[Given]] = {}
        for one in one_each(given):
            if one.is_work and one.item.id not in own:
                by_item.setdefault(one.item.id, []).append(one)
        cases = [
            Disputed(
                item=item,
                number=rows[0].item.position + 1,
                answers=len(rows),
                disagreement=apart,
                adjudicated=item in decided,
            )
            for item, rows in by_item.items()
            if (apart := disagreement([row.answer for row in rows])) is not None and apart > least
        ]
        return sorted(cases, key=lambda case: (case.adjudicated, -case.disagreement, case.number))[:limit]

    def case(self, study: str, item: int, *, actor: Actor) -> Case:
        """One item with every answer to it."""
        with self._store.read() as connection:
            found = self._find(connection, study)
            asked = _open_question(connection, found, item)
            _refuse_own(connection, found, asked, actor)
            given = all_given(connection, items.c.id == item)
            notes = connection.execute(
                sa.select(remarks.c.kind, remarks.c.reason, remarks.c.note)
                .join(leases, leases.c.id == remarks.c.lease_id)
                .join(slots, slots.c.id == leases.c.assignment_id)
                .where(slots.c.item_id == item)
                .order_by(remarks.c.id)
            ).all()
            order = blind_order(found, asked.key, len(asked.outputs))
            earlier = _history(connection, item, found.kind, order)
        shown = [replace(one, answer=in_shown_letters(one.answer, order)) for one in given]
        return Case(
            item=item,
            number=asked.position + 1,
            study=study,
            kind=asked.kind,
            guideline_version=found.guideline_version,
            messages=asked.prompt.messages,
            outputs=tuple(
                ShownOutput(letter=letter, text=asked.outputs[index].response.text)
                for letter, index in zip(LETTERS, order, strict=False)
            ),
            # In an order of their own, so that the place says nothing of who answered first.
            answers=tuple(
                ShownAnswer(answer=one.answer, counts=one.counts, guideline_version=one.guideline_version)
                for one in sorted(shown, key=lambda one: (not one.counts, str(answer_to_json(one.answer))))
            ),
            remarks=tuple(
                ": ".join(part for part in (row.kind, row.reason, row.note) if isinstance(part, str) and part)
                for row in notes
            ),
            adjudications=earlier,
        )

    def adjudicate(self, study: str, item: int, answer: Answer, *, reason: str, actor: Actor) -> None:
        """Settle an item by an answer in the letters of its case. Exports give it in place of the raters' answers."""
        if not reason.strip():
            raise StoreError("An adjudication needs a reason; write a few words.")
        with self._store.write() as connection:
            found = self._find(connection, study)
            self._store.lock_studies(connection, [found.id])
            account = account_id(connection, actor.name)
            asked = _open_question(connection, found, item)
            _refuse_own(connection, found, asked, actor)
            check_answer(found.kind, answer, LETTERS[: len(asked.outputs)])
            queued = in_queued_letters(answer, blind_order(found, asked.key, len(asked.outputs)))
            last = connection.execute(
                sa.select(sa.func.max(adjudications.c.revision)).where(adjudications.c.item_id == item)
            ).scalar()
            now = self._clock()
            row = {
                "item_id": item,
                "revision": 1 if last is None else last + 1,
                "body": answer_to_json(queued),
                "reason": reason,
                "account_id": account,
                "created_at": now,
            }
            connection.execute(sa.insert(adjudications).values(row))
            details = {"item": item, "revision": row["revision"], "answer": row["body"], "reason": reason}
            audit.record(connection, actor, "item.adjudicate", study, details, now=now)

    def _find(self, connection: sa.Connection, study: str) -> Study:
        found = questions.find(connection, study)
        if found.kind == "demonstration":
            raise StoreError(f"Study {study!r} asks for demonstrations, which do not disagree; they are graded.")
        return found


def newest(connection: sa.Connection, ids: Sequence[int]) -> Mapping[int, Answer]:
    """The adjudicated answer of each item that has one, in queued letters."""
    rows = connection.execute(
        sa.select(adjudications.c.item_id, adjudications.c.body, studies.c.kind)
        .join(items, items.c.id == adjudications.c.item_id)
        .join(studies, studies.c.id == items.c.study_id)
        .where(of_studies(ids))
        .order_by(adjudications.c.revision)
    )
    return {row.item_id: answer_from_json(row.kind, row.body) for row in rows}


def _open_question(connection: sa.Connection, study: Study, item: int) -> Item:
    asked = all_items(connection, sa.and_(of_studies([study.id]), items.c.id == item)).get(item)
    if asked is None or not asked.is_work:
        raise StoreError(f"Study {study.name!r} has no item {item}.")
    return asked


def _own(connection: sa.Connection, study: Study, actor: Actor) -> set[int]:
    """The items that this actor answered as a rater, or may still be asked."""
    rater = connection.execute(
        sa.select(accounts.c.rater_id)
        .join(raters, raters.c.id == accounts.c.rater_id)
        .where(accounts.c.name == actor.name, raters.c.rater_group == study.rater_group)
    ).scalar()
    if rater is None:
        return set()
    answered = slots.c.id.in_(sa.select(leases.c.assignment_id).where(leases.c.rater_id == rater))
    rows = connection.execute(
        sa.select(items.c.id)
        .join(slots, slots.c.item_id == items.c.id)
        .where(items.c.study_id == study.id, sa.or_(answered, slots.c.state != "done"))
    )
    return set(rows.scalars())


def _refuse_own(connection: sa.Connection, study: Study, item: Item, actor: Actor) -> None:
    if item.id in _own(connection, study, actor):
        raise StoreError(
            f"Item {item.position + 1} of study {study.name!r} is not yours to settle: you rate in its group, and "
            "answered it or may still be asked. Leave it to another adjudicator, or wait for its answers."
        )


def _history(connection: sa.Connection, item: int, kind: StudyKind, order: Sequence[int]) -> tuple[Adjudicated, ...]:
    rows = connection.execute(
        sa.select(adjudications, accounts.c.name)
        .join(accounts, accounts.c.id == adjudications.c.account_id)
        .where(adjudications.c.item_id == item)
        .order_by(adjudications.c.revision)
    )
    return tuple(
        Adjudicated(
            answer=in_shown_letters(answer_from_json(kind, row.body), order),
            reason=row.reason,
            by=row.name,
            at=row.created_at,
        )
        for row in rows
    )
