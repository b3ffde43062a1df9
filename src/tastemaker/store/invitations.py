"""Invitations as they are stored: links that let one person in once; `access` is what the application calls.

One that names an account sets that account's password anew; any other makes a new account.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store.accounts import Account
from tastemaker.store.audit import Actor, record
from tastemaker.store.passwords import new_token, token_hash
from tastemaker.store.schema import accounts, invitations


class InvitationRefused(StoreError):
    """The invitation is unknown, used, withdrawn or too old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenInvitation:
    """An invitation that nobody has used yet."""

    id: int
    roles: frozenset[str]
    rater_group: str | None  # which a rater joins
    invited_by: str
    created_at: float
    expires_at: float
    account: str | None  # whose password it sets anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation(OpenInvitation):
    """An invitation as it is made, the only time that its token is known."""

    token: str = field(repr=False)


def create(
    connection: sa.Connection,
    roles: Collection[str],
    *,
    rater_group: str | None,
    account: Account | None,
    actor: Actor,
    valid: timedelta,
    now: float,
) -> Invitation:
    """A new invitation, written into the audit log."""
    token, expires_at = new_token(), now + valid.total_seconds()
    invitation_id = connection.execute(
        sa.insert(invitations)
        .values(
            token_hash=token_hash(token),
            roles=sorted(roles),
            rater_group=rater_group,
            invited_by=actor.name,
            created_at=now,
            expires_at=expires_at,
            account_id=None if account is None else account.id,
        )
        .returning(invitations.c.id)
    ).scalar_one()
    name = None if account is None else account.name
    details = {"roles": sorted(roles), "rater_group": rater_group, "expires_at": expires_at, "account": name}
    record(connection, actor, "invitation.create", f"invitation {invitation_id}", details, now=now)
    return Invitation(
        id=invitation_id,
        roles=frozenset(roles),
        rater_group=rater_group,
        invited_by=actor.name,
        created_at=now,
        expires_at=expires_at,
        account=name,
        token=token,
    )


def find_open(connection: sa.Connection, token: str, *, now: float) -> OpenInvitation:
    """The invitation with that token, as long as it is open."""
    row = connection.execute(_SELECT.where(invitations.c.token_hash == token_hash(token))).one_or_none()
    if row is None:
        raise InvitationRefused("There is no such invitation; check that the whole link was copied.")
    if row.used_at is not None:
        raise InvitationRefused("This invitation has been used already; sign in, or ask for a new one.")
    if row.expires_at <= now:
        raise InvitationRefused("This invitation is no longer valid; ask for a new one.")
    return _as_invitation(row)


def select_open(connection: sa.Connection, *which: sa.ColumnElement[bool], now: float) -> list[OpenInvitation]:
    """The open invitations of which `which` is true, newest first."""
    still_open = (invitations.c.used_at.is_(None), invitations.c.expires_at > now)
    rows = connection.execute(_SELECT.where(*still_open, *which).order_by(invitations.c.id.desc()))
    return [_as_invitation(row) for row in rows]


def use(connection: sa.Connection, invitation_id: int, account: Account, *, now: float) -> None:
    """Note who came."""
    used = {"used_at": now, "account_id": account.id}
    connection.execute(sa.update(invitations).where(invitations.c.id == invitation_id).values(used))


def close(connection: sa.Connection, *which: sa.ColumnElement[bool], now: float) -> int:
    """Make the open invitations of which `which` is true void; returns how many."""
    still_open = (invitations.c.used_at.is_(None), invitations.c.expires_at > now)
    return connection.execute(sa.update(invitations).where(*still_open, *which).values(expires_at=now)).rowcount


_SELECT = sa.select(
    *(column for column in invitations.c if column.name != "token_hash"), accounts.c.name.label("account")
).select_from(invitations.outerjoin(accounts, accounts.c.id == invitations.c.account_id))


def _as_invitation(row: sa.Row[*tuple[Any, ...]]) -> OpenInvitation:
    return OpenInvitation(
        id=row.id,
        roles=frozenset(row.roles),
        rater_group=row.rater_group,
        invited_by=row.invited_by,
        created_at=row.created_at,
        expires_at=row.expires_at,
        account=row.account,
    )
