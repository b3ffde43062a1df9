"""Items that judge raters: hidden gold among a study's tasks, and the items of screening studies.

They have as many slots as raters meet them; a slot is made when a rater comes to it, and is never another rater's. So
an answer to one is never late. For the rater nothing distinguishes such a task: same lease, same history, and the count
of what is left falls by one with it as with any other.

Which of a rater's tasks are gold follows from a hash of the study's secret, the rater and the number of tasks that they
have done with: it is the same whenever it is asked, and nobody who only knows names can tell it.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterator

import sqlalchemy as sa

from tastemaker.store.claiming import Person, has_met, is_finished
from tastemaker.store.questions import Study
from tastemaker.store.schema import assignments, gold, items, leases
from tastemaker.store.tasks import order_seed

# Places whose fate one hash decides: 64 bytes are 16 numbers of 32 bits.
_BLOCK = 16


def is_gold_place(secret: str, rater: str, place: int, share: float) -> bool:
    """Whether a rater's task number `place` in the study with this secret is a gold item, while there are any that they
    have not met."""
    return _numbers(secret, rater, place // _BLOCK)[place % _BLOCK] < share * 2**32


def tasks_ahead(secret: str, rater: str, share: float, *, place: int, work: int, gold_items: int) -> int:
    """How many tasks lie ahead of a rater at `place`: the open questions, and the gold items that come before the last.

    So it falls by one with every task done, whichever it was.
    """
    ahead = 0
    fates = _places(secret, rater, share, place)
    while work > 0:
        if gold_items > 0 and next(fates):
            gold_items -= 1
        else:
            work -= 1
        ahead += 1
    return ahead


def _places(secret: str, rater: str, share: float, first: int) -> Iterator[bool]:
    bound = share * 2**32
    block, skipped = divmod(first, _BLOCK)
    while True:
        for number in _numbers(secret, rater, block)[skipped:]:
            yield number < bound
        block, skipped = block + 1, 0


def _numbers(secret: str, rater: str, block: int) -> tuple[int, ...]:
    return struct.unpack(f"<{_BLOCK}I", _digest(secret, rater, str(block)))


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\x1f".join(parts).encode()).digest()


def tasks_done(connection: sa.Connection, study: Study, person: Person) -> int:
    """How many items of a study a rater has done with, by answer or skip."""
    done = (
        sa.select(sa.func.count(assignments.c.item_id.distinct()))
        .select_from(leases.join(assignments, assignments.c.id == leases.c.assignment_id))
        .where(leases.c.rater_id == person.id, assignments.c.study_id == study.id, is_finished())
    )
    return int(connection.execute(done).scalar_one())


def count_ahead(connection: sa.Connection, study: Study, person: Person) -> int:
    """How many gold items of a study, or items of a screening study, a rater has not met yet."""
    unmet = _unmet(study, person)
    return int(connection.execute(sa.select(sa.func.count()).select_from(unmet.subquery())).scalar_one())


def next_slot(connection: sa.Connection, study: Study, person: Person) -> str | None:
    """An open slot of the gold or screening item that is next for a rater, made for them; None where none is left.

    Screening items come in their order, gold items in an order of each rater's own: colleagues cannot tell each other
    which tasks they had in common.
    """
    unmet = connection.execute(_unmet(study, person).order_by(items.c.position)).all()
    if not unmet:
        return None
    item = unmet[0] if study.screening else min(unmet, key=lambda row: _digest(study.secret, person.name, row.key))
    return _own_slot(connection, item.id, person) or _new_slot(connection, study, item.id, item.key, item.position)


def _unmet(study: Study, person: Person) -> sa.Select[int, str, int]:
    unmet = sa.select(items.c.id, items.c.key, items.c.position).where(
        items.c.study_id == study.id, ~has_met(person.id, items.c.id)
    )
    return unmet if study.screening else unmet.where(sa.exists().where(gold.c.item_id == items.c.id))


def _own_slot(connection: sa.Connection, item_id: int, person: Person) -> str | None:
    """An open slot of the item that was nobody's but this rater's; best the one that they had, with its order."""
    theirs = sa.exists().where(leases.c.assignment_id == assignments.c.id, leases.c.rater_id == person.id)
    others = sa.exists().where(leases.c.assignment_id == assignments.c.id, leases.c.rater_id != person.id)
    return connection.execute(
        sa.select(assignments.c.id)
        .where(assignments.c.item_id == item_id, assignments.c.state == "open", ~others)
        .order_by(sa.case((theirs, 0), else_=1), assignments.c.slot)
        .limit(1)
    ).scalar()


def _new_slot(connection: sa.Connection, study: Study, item_id: int, key: str, position: int) -> str:
    taken = sa.select(sa.func.coalesce(sa.func.max(assignments.c.slot), -1)).where(assignments.c.item_id == item_id)
    slot = int(connection.execute(taken).scalar_one()) + 1
    task_id = secrets.token_hex(16)
    connection.execute(
        sa.insert(assignments).values(
            id=task_id,
            study_id=study.id,
            item_id=item_id,
            slot=slot,
            sequence=position * study.overlap + slot,
            order_seed=order_seed(study.name, key, slot),
            state="open",
        )
    )
    return task_id
