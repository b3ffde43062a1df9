"""The handing-out side of the store's SQL: which slots a rater may have, leasing them, and giving them back.

The one queue behind `LabelService.claim` and the rater's desk. Two kinds of item are not in it: hidden gold items and
the items of screening studies, which judge raters and not models. Their slots are made for a rater on demand
(`hidden`), and nothing that stages read counts them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store.questions import CHUNK, Study
from tastemaker.store.schema import again, answers, assignments, gold, leases, raters, remarks, study_raters
from tastemaker.store.tasks import Turn

# One for each place where a table stands in a query for a second time.
_MET_SLOT, _MET_LEASE, _OTHER_SLOT, _BEGUN = again(assignments), again(leases), again(assignments), again(leases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Who works: a rater as stored."""

    id: int
    name: str
    group: str


def find_rater(connection: sa.Connection, name: str, *, alone: bool = False) -> Person:
    """The rater of that name; with `alone`, no other transaction that asks so goes on for them before this one ends."""
    found = sa.select(raters.c.id, raters.c.rater_group).where(raters.c.name == name)
    row = connection.execute(found.with_for_update(key_share=True) if alone else found).one_or_none()
    if row is None:
        raise StoreError(f"There is no rater {name!r}; register them with add_rater first.")
    return Person(id=row.id, name=name, group=row.rater_group)


def rater_in_group(connection: sa.Connection, name: str, study: Study) -> int:
    """The id of a rater of a study's group."""
    person = find_rater(connection, name)
    if person.group != study.rater_group:
        raise StoreError(
            f"Rater {name!r} is in group {person.group!r}; study {study.name!r} is for group {study.rater_group!r}."
        )
    return person.id


def check_assigned(connection: sa.Connection, name: str, rater_id: int, study: Study) -> None:
    """Refuse a rater whom a study that names its raters does not name."""
    if not connection.execute(sa.select(is_assigned(rater_id, study.id))).scalar_one():
        raise StoreError(f"Study {study.name!r} is for raters that a lead has named, and {name!r} is not one of them.")


def is_work(study: Study) -> sa.ColumnElement[bool]:
    """Of a study's slots: their item is an open question, rather than one that tests the rater."""
    return sa.false() if study.screening else ~sa.exists().where(gold.c.item_id == assignments.c.item_id)


def is_assigned(rater_id: int | sa.ColumnElement[int], study_id: int | sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Whether a study is for this one of its group's raters: it names them, or it names nobody."""
    named = sa.exists().where(study_raters.c.study_id == study_id)
    return sa.or_(~named, named.where(study_raters.c.rater_id == rater_id))


def is_finished(lease: sa.FromClause = leases) -> sa.ColumnElement[bool]:
    """Of leases: their rater has answered under them, or skipped. Such an item never comes to that rater again."""
    return sa.or_(
        sa.exists().where(answers.c.lease_id == lease.c.id),
        sa.exists().where(remarks.c.lease_id == lease.c.id, remarks.c.kind == "skip"),
    )


def has_met(rater_id: int, item_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Whether a rater holds, has answered or has skipped an item."""
    slot, lease = _MET_SLOT, _MET_LEASE
    return sa.or_(
        sa.exists().where(slot.c.item_id == item_id, slot.c.rater_id == rater_id),
        sa.exists().where(
            slot.c.item_id == item_id,
            lease.c.assignment_id == slot.c.id,
            lease.c.rater_id == rater_id,
            is_finished(lease),
        ),
    )


def is_free(study: Study, now: float) -> sa.ColumnElement[bool]:
    """Of slots: they are the study's, and somebody's for the asking."""
    ended = sa.and_(assignments.c.state == "leased", assignments.c.leased_until < now)
    return sa.and_(assignments.c.study_id == study.id, sa.or_(assignments.c.state == "open", ended), is_work(study))


def open_slots(study: Study, rater_id: int, turn: Turn | None = None) -> sa.Select[str]:
    """The open slots that a rater may have, one an item: of items that they have not met.

    Without a turn it is the item's slot that they have had before, or else one that waits for nobody, or else any; of
    several the first.
    """
    is_open = (assignments.c.study_id == study.id, assignments.c.state == "open", is_work(study))
    select = sa.select(assignments.c.id).where(*is_open, ~has_met(rater_id, assignments.c.item_id))
    if turn is not None:
        # Turns are at least as many as an item's slots, so that none meets an item twice.
        # After each round of items the turns move on by one, so that raters do not always meet the same others.
        shift = assignments.c.sequence // (study.overlap * turn.of)
        return select.where((assignments.c.sequence + shift) % turn.of == turn.index)
    # A slot whose lease ended unanswered waits for its rater as long as another will do. Taken at once, it would make
    # their late answer an extra one, and leave a slot over that neither of them may have.
    other = _OTHER_SLOT
    better = sa.tuple_(_waiting(other, rater_id), other.c.slot) < sa.tuple_(
        _waiting(assignments, rater_id), assignments.c.slot
    )
    return select.where(
        ~sa.exists().where(
            other.c.item_id == assignments.c.item_id,
            other.c.slot != assignments.c.slot,
            other.c.state == "open",
            better,
        )
    )


def _waiting(slot: sa.FromClause, rater_id: int) -> sa.ColumnElement[int]:
    """Of open slots: 0 where this rater has had it, 2 where it waits for another's answer, 1 where for nobody's."""
    begun = _BEGUN
    of_slot = sa.exists().where(begun.c.assignment_id == slot.c.id).correlate(slot)
    return sa.case(
        (of_slot.where(begun.c.rater_id == rater_id), 0),
        (of_slot.where(begun.c.rater_id != rater_id, ~is_finished(begun)), 2),
        else_=1,
    )


def lease(connection: sa.Connection, chosen: sa.Select[str], rater_id: int, *, now: float, until: float) -> str | None:
    """Lease those of the chosen slots that are open to a rater; returns the leases' token, or None for no slot.

    Within a transaction that is the study's only writer; the condition in the UPDATE holds even so.
    """
    token = secrets.token_hex(16)
    claimed = connection.execute(
        sa.update(assignments)
        .where(assignments.c.id.in_(chosen), assignments.c.state == "open")
        .values(state="leased", rater_id=rater_id, claim_token=token, leased_until=until)
        .returning(assignments.c.id)
    ).scalars()
    rows = [{"assignment_id": slot, "token": token, "rater_id": rater_id, "started_at": now} for slot in claimed]
    if not rows:
        return None
    connection.execute(sa.insert(leases), rows)
    return token


def end_leases(connection: sa.Connection, *which: sa.ColumnElement[bool]) -> int:
    """Open the leased slots that `which` selects to everybody; returns how many are open then.

    A slot under whose earlier lease an extra answer was given is not: that answer takes it, the earliest lease's first.
    """
    ended = connection.execute(
        sa.update(assignments)
        .where(assignments.c.state == "leased", *which)
        .values(state="open", rater_id=None, claim_token=None, leased_until=None)
        .returning(assignments.c.id)
    ).scalars()
    slots = list(ended)
    taken = 0
    for start in range(0, len(slots), CHUNK):
        late = (
            sa.select(leases.c.assignment_id, assignments.c.item_id, leases.c.rater_id, leases.c.token)
            .join(assignments, assignments.c.id == leases.c.assignment_id)
            .where(leases.c.assignment_id.in_(slots[start : start + CHUNK]))
            .where(sa.exists().where(answers.c.lease_id == leases.c.id))
            .order_by(leases.c.id)
        )
        for row in connection.execute(late).all():
            taken += give_back(connection, row.assignment_id, row.item_id, row.rater_id, row.token)
    return len(slots) - taken


def give_back(connection: sa.Connection, slot: str, item_id: int, rater_id: int, token: str) -> bool:
    """Give a slot to an answer under a lease that has ended, unless someone else has it or its rater another one."""
    other = _OTHER_SLOT
    elsewhere = sa.exists().where(other.c.item_id == item_id, other.c.rater_id == rater_id, other.c.id != slot)
    free = sa.or_(
        assignments.c.state == "open", sa.and_(assignments.c.state == "leased", assignments.c.rater_id == rater_id)
    )
    given = connection.execute(
        sa.update(assignments)
        .where(assignments.c.id == slot, free, ~elsewhere)
        .values(state="done", rater_id=rater_id, claim_token=token, leased_until=None)
    )
    return given.rowcount == 1
