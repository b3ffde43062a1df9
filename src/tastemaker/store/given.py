"""Every answer that was given, with its question and with who gave it: the store's one reader of answers.

Nothing of it is for raters. Stages take what counts (`answered`); whoever judges raters, settles disputes or exports
needs more: gold and screening items, answers that came late, times. The newest revision of each is read, in the order
of the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Author, Origin, Prompt, Ranking, Response
from tastemaker.store.gold import in_queued_letters
from tastemaker.store.questions import CHUNK, read_prompt
from tastemaker.store.schema import (
    accounts,
    answers,
    assignments,
    gold,
    items,
    leases,
    newest_revision,
    outputs,
    raters,
    remarks,
    studies,
)
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    ComparisonAnswer,
    NewOutput,
    RankingAnswer,
    StudyKind,
    answer_from_json,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question with all that is known about it. `expected` is a gold item's answer, in queued letters."""

    id: int
    study: str
    kind: StudyKind
    key: str
    position: int
    prompt: Prompt
    outputs: tuple[NewOutput, ...]
    expected: Answer | None = None
    screening: bool = False

    @property
    def is_work(self) -> bool:
        """Whether it is an open question, rather than one that tests the rater."""
        return self.expected is None and not self.screening


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One rater's newest answer to one item, in queued letters. `order_shown[i]` was shown in place i.

    `counts` is False where the answer came after its slot had gone to somebody else.
    """

    id: int
    item: Item
    answer: Answer
    order_shown: tuple[int, ...]
    counts: bool
    rater: str
    rater_group: str
    origin: Origin
    guideline_version: str
    seconds: float
    submitted_at: float

    @property
    def author(self) -> Author:
        return Author(
            rater=self.rater,
            rater_group=self.rater_group,
            origin=self.origin,
            guideline_version=self.guideline_version,
        )

    @property
    def is_work(self) -> bool:
        """Whether it answers an open question, rather than one that tests the rater."""
        return self.item.is_work


def as_ranking(item: Item, answer: RankingAnswer | ComparisonAnswer, author: Author) -> Ranking:
    """An answer in queued letters as a weak order of the item's outputs; a comparison is a ranking of two."""
    if isinstance(answer, RankingAnswer):
        groups = answer.groups
    else:
        groups = {"A": (("A",), ("B",)), "B": (("B",), ("A",)), "tie": (("A", "B"),)}[answer.choice]
    return Ranking(
        prompt=item.prompt,
        responses=tuple(output.response for output in item.outputs),
        order=tuple(tuple(sorted(LETTERS.index(letter) for letter in group)) for group in groups),
        author=author,
    )


def all_items(connection: sa.Connection, which: sa.ColumnElement[bool]) -> dict[int, Item]:
    """The items that `which` selects (of `items` and `studies`), by id, in their order."""
    queued: dict[int, list[NewOutput]] = {}
    joined = items.join(studies, studies.c.id == items.c.study_id)
    for row in connection.execute(
        sa.select(outputs.c.item_id, outputs.c.text, outputs.c.finished, outputs.c.source)
        .select_from(joined.join(outputs, outputs.c.item_id == items.c.id))
        .where(which)
        .order_by(outputs.c.item_id, outputs.c.position)
    ):
        response = Response(text=row.text, finished=row.finished)
        queued.setdefault(row.item_id, []).append(NewOutput(response=response, source=row.source))
    rows = connection.execute(
        sa.select(
            items.c.id,
            studies.c.name,
            studies.c.kind,
            studies.c.screening,
            items.c.key,
            items.c.position,
            items.c.messages,
            items.c.category,
            items.c.private,
            gold.c.expected,
        )
        .select_from(joined.outerjoin(gold, gold.c.item_id == items.c.id))
        .where(which)
        .order_by(items.c.study_id, items.c.position)
    )
    return {
        row.id: Item(
            id=row.id,
            study=row.name,
            kind=row.kind,
            key=row.key,
            position=row.position,
            prompt=read_prompt(row.messages, row.category, row.private),
            outputs=tuple(queued.get(row.id, ())),
            expected=None if row.expected is None else answer_from_json(row.kind, row.expected),
            screening=row.screening,
        )
        for row in rows
    }


def all_given(connection: sa.Connection, which: sa.ColumnElement[bool]) -> list[Given]:
    """The answers to the items that `which` selects (of `items` and `studies`), by item, then slot, then lease."""
    questions = all_items(connection, which)
    rows = connection.execute(
        sa.select(
            answers.c.id,
            items.c.id.label("item_id"),
            answers.c.body,
            answers.c.order_shown,
            answers.c.origin,
            answers.c.guideline_version,
            answers.c.seconds,
            answers.c.submitted_at,
            (sa.func.coalesce(assignments.c.claim_token, "") == leases.c.token).label("counts"),
            raters.c.name.label("rater"),
            raters.c.rater_group,
        )
        .select_from(items)
        .join(studies, studies.c.id == items.c.study_id)
        .join(assignments, assignments.c.item_id == items.c.id)
        .join(leases, leases.c.assignment_id == assignments.c.id)
        .join(answers, sa.and_(answers.c.lease_id == leases.c.id, answers.c.revision == newest_revision()))
        .join(raters, raters.c.id == leases.c.rater_id)
        .where(which)
        .order_by(items.c.study_id, items.c.position, assignments.c.slot, leases.c.id)
    )
    found: list[Given] = []
    for row in rows:
        item = questions.get(row.item_id)
        if item is None:  # queued after the items were read
            continue
        answer = answer_from_json(item.kind, row.body)
        found.append(
            Given(
                id=row.id,
                item=item,
                answer=in_queued_letters(answer, row.order_shown),
                order_shown=tuple(row.order_shown),
                counts=bool(row.counts),
                rater=row.rater,
                rater_group=row.rater_group,
                origin=row.origin,
                guideline_version=row.guideline_version,
                seconds=row.seconds,
                submitted_at=row.submitted_at,
            )
        )
    return found


def one_each(given: Sequence[Given]) -> list[Given]:
    """One answer of each rater to each item: the one that counts, or else the first.

    A late answer and one under a newer lease may both be there; a rater is not their own peer.
    """
    found: dict[tuple[int, str], Given] = {}
    for one in given:
        known = found.get((one.item.id, one.rater))
        if known is None or (one.counts and not known.counts):
            found[one.item.id, one.rater] = one
    return list(found.values())


def skips(connection: sa.Connection, which: sa.ColumnElement[bool]) -> dict[str, int]:
    """How often each rater skipped one of the items that `which` selects."""
    rows = connection.execute(
        sa.select(raters.c.name, sa.func.count().label("skipped"))
        .select_from(remarks)
        .join(leases, leases.c.id == remarks.c.lease_id)
        .join(assignments, assignments.c.id == leases.c.assignment_id)
        .join(items, items.c.id == assignments.c.item_id)
        .join(studies, studies.c.id == items.c.study_id)
        .join(raters, raters.c.id == leases.c.rater_id)
        .where(remarks.c.kind == "skip", which)
        .group_by(raters.c.name)
    )
    return {row.name: row.skipped for row in rows}


def of_studies(ids: Sequence[int]) -> sa.ColumnElement[bool]:
    """Selects the items of these studies."""
    if len(ids) > CHUNK:
        raise StoreError(f"{len(ids)} studies were asked for at once; ask for at most {CHUNK}.")
    return items.c.study_id.in_(list(ids))


def account_id(connection: sa.Connection, name: str) -> int:
    """The account that an act is bound to."""
    found = connection.execute(sa.select(accounts.c.id).where(accounts.c.name == name)).scalar()
    if found is None:
        raise StoreError(f"There is no account {name!r}; grades and decisions are bound to an account.")
    return int(found)
