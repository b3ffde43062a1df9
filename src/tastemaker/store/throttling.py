"""Rate limits: token buckets in the database, so that several server processes share them and a restart forgets none.

A bucket holds up to `capacity` tokens and refills steadily; an act takes one. What is refused changes nothing, so that
whoever knocks all the time neither waits longer for it nor makes the database write.

Anybody can make buckets, by typing names. One that must be full again is forgotten: every new one takes a few of these
with it, so that there are never many more than an hour's, and no act ever waits for the deleting of many.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa

from tastemaker.store.schema import throttles

# A bucket untouched for so long is full: no limit takes longer to refill.
KEPT = timedelta(hours=1)
_FORGOTTEN_AT_ONCE = 20

# Who has waited as long as they were told has a token, though the clock counts in steps of a fraction of a microsecond.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One bucket. `key` is in hexadecimal digits, sixteen or more."""

    key: str
    capacity: int
    refill_per_second: float

    def __post_init__(self) -> None:
        assert self.capacity / self.refill_per_second <= KEPT.total_seconds(), "it would be forgotten before it is full"

    def wait(self, connection: sa.Connection, *, now: float) -> float:
        """Seconds until the bucket holds a token; 0.0: it does."""
        tokens = self._tokens(connection, now)
        return 0.0 if tokens is None else self._until_one(tokens)

    def take(self, connection: sa.Connection, *, now: float) -> float:
        """Take a token, if the bucket holds one; returns what `wait` does."""
        if connection.dialect.name != "sqlite":  # there the transaction is the only writer since its start
            number = int.from_bytes(bytes.fromhex(self.key)[:8], signed=True)
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.literal(number, sa.BigInteger))))
        tokens = self._tokens(connection, now)
        if tokens is None:
            self._forget_some(connection, now)
            row = {"key": self.key, "tokens": self.capacity - 1.0, "updated_at": now}
            connection.execute(sa.insert(throttles).values(row))
            return 0.0
        seconds = self._until_one(tokens)
        if seconds == 0.0:
            left = {"tokens": max(0.0, tokens - 1.0), "updated_at": now}
            connection.execute(sa.update(throttles).where(throttles.c.key == self.key).values(left))
        return seconds

    def _forget_some(self, connection: sa.Connection, now: float) -> None:
        full = (
            sa.select(throttles.c.key)
            .where(throttles.c.updated_at < now - KEPT.total_seconds())
            .order_by(throttles.c.updated_at)
            .limit(_FORGOTTEN_AT_ONCE)
            .with_for_update(skip_locked=True)  # on PostgreSQL two who forget the same would wait for each other
        )
        connection.execute(sa.delete(throttles).where(throttles.c.key.in_(full)))

    def _tokens(self, connection: sa.Connection, now: float) -> float | None:
        """How many tokens the bucket holds by now; None: there is none yet, so it would be full."""
        row = connection.execute(sa.select(throttles).where(throttles.c.key == self.key)).one_or_none()
        if row is None:
            return None
        passed = max(0.0, now - row.updated_at)  # clocks are set back now and then
        tokens: float = row.tokens + passed * self.refill_per_second
        return min(float(self.capacity), tokens)

    def _until_one(self, tokens: float) -> float:
        seconds = (1.0 - tokens) / self.refill_per_second
        return seconds if seconds > _ROUNDING else 0.0
