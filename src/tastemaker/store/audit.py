"""The audit log: who did what, under which role, in a chain of hashes that shows whether a row was changed or removed.

Every act that changes or reveals something writes its row in its own transaction (`record`), so there is no act without
a row and no row without an act. Row n carries the hash of row n - 1, and its own hash covers all of its columns.

What the chain shows: any column of any row changed, a row removed or put in. What it cannot show alone: a tail that was
cut off, or a whole chain computed anew by someone who may write to the database. So keep the newest row's sequence and
hash elsewhere (`tastemaker label verify-audit` prints them) and give them back as `since`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store.database import Store
from tastemaker.store.schema import audit

# What is known of an act beyond actor, action and object: plain JSON values.
Details = Mapping[str, object]

# What the first row has in place of an earlier row's hash.
GENESIS = "0" * 64

# Rows read at a time while verifying, so that a long log needs little memory.
_PAGE = 1000

# Any fixed number: the name, among PostgreSQL's advisory locks, of the right to write the next row.
_AUDIT_LOCK = 0x7A57EA0D


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, under which of their roles, and in which web request."""

    name: str
    role: str
    request_id: str | None = None


# Who works on the machine itself may do everything, as they may also write to the database.
COMMAND_LINE = Actor("command line", "command line")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the log."""

    sequence: int
    at: float
    actor: str
    role: str
    action: str
    object: str
    details: Details
    request_id: str | None
    hash: str


@dataclass(frozen=True, slots=True)
class Head:
    """A place in the chain: with it, whoever kept it can tell that the chain still has it."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"

    @staticmethod
    def parse(text: str) -> Head:
        """Read what `str` wrote."""
        sequence, _, digest = text.strip().partition(":")
        well_formed = len(digest) == len(GENESIS) and set(digest) <= set("0123456789abcdef")
        if not (sequence.isascii() and sequence.isdigit() and int(sequence) > 0 and well_formed):
            raise StoreError(
                f"{text!r} is no place in an audit log; give SEQUENCE:HASH as `label verify-audit` printed it."
            )
        return Head(int(sequence), digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the chain is whole: how many rows were found good, the last of them, and what is wrong after it."""

    rows: int
    head: Head | None  # None: no row, or not even the first was good
    bad_sequence: int | None = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


def record(
    connection: sa.Connection, actor: Actor, action: str, object: str, details: Details | None = None, *, now: float
) -> None:
    """Write the next row, in the transaction of the act itself.

    Record last: from here to the transaction's end nobody else can record. Who also wants `lock_store` or
    `lock_studies` takes these before, or two acts might wait for each other.
    """
    assert connection.get_execution_options().get("tastemaker_write"), "an act is recorded in its own write transaction"
    if connection.dialect.name != "sqlite":  # there the transaction is the only writer since its start
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_AUDIT_LOCK)))
    last = connection.execute(
        sa.select(audit.c.sequence, audit.c.hash).order_by(audit.c.sequence.desc()).limit(1)
    ).one_or_none()
    row = {
        "sequence": 1 if last is None else last.sequence + 1,
        "at": float(now),
        "actor": actor.name,
        "role": actor.role,
        "action": action,
        "object": object,
        # As it comes back from the database: tuples are lists there, and keys are strings.
        "details": json.loads(_canonical({} if details is None else details)),
        "request_id": actor.request_id,
        "previous_hash": GENESIS if last is None else last.hash,
    }
    connection.execute(sa.insert(audit).values(**row, hash=_hash(row)))


class AuditLog:
    """Reading the log, and finding out whether it is still what was written."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(
        self, *, limit: int, before: int | None = None, action: str | None = None, actor: str | None = None
    ) -> list[Entry]:
        """The newest rows first; `before` a sequence, for the next page."""
        query = sa.select(audit).order_by(audit.c.sequence.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.sequence < before)
        if action is not None:
            query = query.where(audit.c.action == action)
        if actor is not None:
            query = query.where(audit.c.actor == actor)
        with self._store.read() as connection:
            return [
                Entry(
                    sequence=row.sequence,
                    at=row.at,
                    actor=row.actor,
                    role=row.role,
                    action=row.action,
                    object=row.object,
                    details=row.details,
                    request_id=row.request_id,
                    hash=row.hash,
                )
                for row in connection.execute(query)
            ]

    def verify(self, *, since: Head | None = None) -> Verdict:
        """Check every row from the first on, and that the chain still has the place kept from an earlier time."""
        head = None
        with self._store.read() as connection:
            while page := _page(connection, after=0 if head is None else head.sequence):
                for row in page:
                    problem = _problem(row, head, since)
                    if problem is not None:
                        # A row that is gone is named itself, and not the one that stands where it should.
                        bad = min(row.sequence, _next(head))
                        return Verdict(rows=_rows(head), head=head, bad_sequence=bad, problem=problem)
                    head = Head(row.sequence, row.hash)
        if since is not None and _rows(head) < since.sequence:
            problem = f"the log ends with row {_rows(head)}, and row {since.sequence} was there before: its end was cut"
            return Verdict(rows=_rows(head), head=head, bad_sequence=_next(head), problem=problem)
        return Verdict(rows=_rows(head), head=head)


def _rows(head: Head | None) -> int:
    return 0 if head is None else head.sequence  # rows are numbered from 1 without gaps


def _next(head: Head | None) -> int:
    return _rows(head) + 1


def _page(connection: sa.Connection, *, after: int) -> list[sa.Row[tuple[object, ...]]]:
    columns = [column for column in audit.c if column.name != "details"]
    # As text: someone may have put in what is no JSON.
    query = sa.select(*columns, sa.cast(audit.c.details, sa.Text).label("details")).order_by(audit.c.sequence)
    first = after == 0  # someone may have put in rows numbered 0 and less
    return list(connection.execute((query if first else query.where(audit.c.sequence > after)).limit(_PAGE)))


def _problem(row: sa.Row[tuple[object, ...]], head: Head | None, since: Head | None) -> str | None:
    """What is wrong with a row that follows `head`."""
    if row.sequence != _next(head):
        return f"row {_next(head)} is missing" if row.sequence > _next(head) else f"row {row.sequence} was put in"
    if row.previous_hash != (GENESIS if head is None else head.hash):
        return f"row {row.sequence} does not follow from the row before it"
    try:
        given = {**row._mapping, "details": json.loads(row.details)}
        digest = _hash({name: value for name, value in given.items() if name != "hash"})
    except (TypeError, ValueError):
        digest = None
    if digest != row.hash:
        return f"row {row.sequence} is not what was written"
    if since is not None and since.sequence == row.sequence and since.hash != row.hash:
        return f"row {row.sequence} is another one than before: the log was written anew"
    return None


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _hash(row: Mapping[str, object]) -> str:
    return hashlib.blake2b(_canonical(row).encode(), digest_size=32, person=b"tastemaker-audit").hexdigest()
