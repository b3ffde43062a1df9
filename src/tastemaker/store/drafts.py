"""Drafts: what a rater has written and not handed in. They hang on leases, and outlive them.

A rater has one draft of an item: where they get the item again under a new lease, it is there again. Every save names
the version that it was made from, so that an older window never overwrites a newer one. The versions go on from a
million for each revision of the answer: a save that was under way when the answer came in is refused, and no draft can
stand up again after its answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store.own import OwnLease
from tastemaker.store.schema import assignments, drafts, leases, outputs
from tastemaker.store.tasks import LETTERS, order_shown
from tastemaker.store.views import Draft, DraftConflict

_VERSIONS_A_REVISION = 1_000_000


def read(connection: sa.Connection, lease: OwnLease) -> Draft | None:
    """The draft of a lease's rater and item, under whichever of their leases it was saved, in this lease's letters."""
    row = connection.execute(
        sa.select(drafts.c.body, drafts.c.version, drafts.c.saved_at, assignments.c.order_seed)
        .join(leases, leases.c.id == drafts.c.lease_id)
        .join(assignments, assignments.c.id == leases.c.assignment_id)
        .where(leases.c.rater_id == lease.rater_id, assignments.c.item_id == lease.item_id)
        .order_by(drafts.c.version.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    body = row.body
    if row.order_seed != lease.order_seed:
        shown = sa.select(sa.func.count()).select_from(outputs).where(outputs.c.item_id == lease.item_id)
        count = connection.execute(shown).scalar_one()
        body = _relettered(body, order_shown(row.order_seed, count), order_shown(lease.order_seed, count))
    return Draft(body=body, version=row.version, saved_at=row.saved_at)


def version_of(draft: Draft | None, lease: OwnLease) -> int:
    """The version that the next save must name."""
    return _VERSIONS_A_REVISION * (lease.revision or 0) if draft is None else draft.version


def save(connection: sa.Connection, lease: OwnLease, body: Mapping[str, object], *, version: int, now: float) -> int:
    """Store a draft and return its version. The transaction is the study's only writer."""
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"The draft cannot be stored ({error}); give a JSON object.") from error
    current = version_of(read(connection, lease), lease)
    if version != current:
        raise DraftConflict(given=version, current=current)
    values = {"body": dict(body), "version": current + 1, "saved_at": now}
    changed = connection.execute(sa.update(drafts).where(drafts.c.lease_id == lease.id).values(values))
    if changed.rowcount == 0:
        connection.execute(sa.insert(drafts).values(lease_id=lease.id, **values))
    return current + 1


def discard(connection: sa.Connection, lease: OwnLease) -> None:
    """Wipe the drafts of a lease's rater and item: the answer has been handed in."""
    theirs = (
        sa.select(leases.c.id)
        .join(assignments, assignments.c.id == leases.c.assignment_id)
        .where(leases.c.rater_id == lease.rater_id, assignments.c.item_id == lease.item_id)
    )
    connection.execute(sa.delete(drafts).where(drafts.c.lease_id.in_(theirs)))


def _relettered(body: Mapping[str, object], before: Sequence[int], now: Sequence[int]) -> dict[str, object]:
    letter = {LETTERS[place]: LETTERS[now.index(index)] for place, index in enumerate(before)}

    def name(field: str) -> str:
        stem, dash, last = field.rpartition("-")
        return f"{stem}-{letter[last]}" if dash and last in letter else field

    def value(field: str, old: object) -> object:
        return letter.get(old, old) if field == "choice" and isinstance(old, str) else old

    return {name(field): value(field, old) for field, old in body.items()}
