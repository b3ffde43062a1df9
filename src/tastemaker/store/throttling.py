"""Rate limits: token buckets in the database, so that several server processes share them and a restart forgets none.

A bucket holds up to `capacity` tokens and refills steadily; an act takes one. What is refused changes nothing, so that
whoever knocks all the time neither waits longer for it nor makes the database write.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa

from tastemaker.store.schema import throttles

# A bucket untouched for so long is full, for any limit worth having.
_KEPT = timedelta(days=30)

# Who has waited as long as they were told has a token, though the clock counts in steps of a fraction of a microsecond.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One bucket. `key` is in hexadecimal digits, sixteen or more."""

    key: str
    capacity: int
    refill_per_second: float

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
            connection.execute(sa.delete(throttles).where(throttles.c.updated_at < now - _KEPT.total_seconds()))
            row = {"key": self.key, "tokens": self.capacity - 1.0, "updated_at": now}
            connection.execute(sa.insert(throttles).values(row))
            return 0.0
        seconds = self._until_one(tokens)
        if seconds == 0.0:
            left = {"tokens": max(0.0, tokens - 1.0), "updated_at": now}
            connection.execute(sa.update(throttles).where(throttles.c.key == self.key).values(left))
        return seconds

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
