"""Accounts as they are stored, and the rules on who may have which role; `access` is what the application calls.

These functions work within a transaction of the caller's. Those that write need the store's lock (`Store.lock_store`):
names are compared with all others, and the last administrator is not taken away.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Origin
from tastemaker.store.audit import COMMAND_LINE, Actor
from tastemaker.store.schema import ROLES, account_roles, accounts, raters
from tastemaker.store.tasks import check_name

LONGEST_NAME = 64

# Who acts where nobody is signed in; no account has such a name.
NOBODY = "nobody"
_RESERVED = (COMMAND_LINE.name, NOBODY)

# The roles that the holders of a role may give to others and take from them. Nobody raises themselves.
_MAY_GIVE = {COMMAND_LINE.role: frozenset(ROLES), "admin": frozenset(ROLES), "lead": frozenset({"rater"})}


class NotAllowed(StoreError):
    """The actor's role does not allow the act."""


class NoSuchAccount(StoreError):
    """There is no account with that id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who may sign in or hold an API token, and what they may do."""

    id: int
    name: str
    roles: frozenset[str]
    rater: str | None  # under which name they answer
    rater_group: str | None
    disabled: bool

    def actor(self, role: str | None = None, *, request_id: str | None = None) -> Actor:
        """This account as whoever acts, under one of its roles; without one, in its own affairs."""
        return Actor(self.name, role or ", ".join(sorted(self.roles)) or "none", request_id)


def checked_name(name: str) -> str:
    """A new account's name in the one form in which it is kept and looked up."""
    plain = plain_name(name)
    if max(len(name), len(plain)) > LONGEST_NAME:
        raise StoreError(f"The name has {len(name)} characters; it may have at most {LONGEST_NAME}.")
    check_name("name", plain or name)
    if plain.casefold() in _RESERVED:
        raise StoreError(f"The name {plain!r} is what the audit log calls someone else; take another one.")
    return plain


def plain_name(name: str) -> str:
    """A name as it is looked up: what looks alike is alike. Empty, and so nobody's, if no account may have it."""
    # Normalising what is very long may take very long, and PostgreSQL refuses to compare with a NUL.
    plain = "" if len(name) > 4 * LONGEST_NAME else unicodedata.normalize("NFKC", name).strip()
    return plain if plain.isprintable() else ""


def check_roles(roles: Collection[str]) -> frozenset[str]:
    """Refuse a set of roles that no account may have."""
    unknown = sorted(set(roles) - set(ROLES))
    if unknown or not roles:
        raise StoreError(
            f"The roles are {', '.join(sorted(roles)) or 'none'}; an account has one or more of {', '.join(ROLES)}."
        )
    return frozenset(roles)


def may_give(holder: Collection[str], roles: Collection[str]) -> bool:
    """Whether one of the holder's roles allows to give or take all of these."""
    return any(set(roles) <= _MAY_GIVE.get(role, frozenset()) for role in holder)


def check_may_manage(actor: Actor, roles: Collection[str], what: str) -> None:
    """Refuse an actor who may not give or take these roles."""
    if not may_give({actor.role}, roles):
        raise NotAllowed(
            f"{actor.name!r} as {actor.role} may not {what} with the roles {', '.join(sorted(roles))}; an admin may, "
            "and a lead where the only role is rater."
        )


def select(connection: sa.Connection, *which: sa.ColumnElement[bool]) -> list[Account]:
    """The accounts of which `which` is true, by name."""
    query = (
        sa.select(
            accounts.c.id,
            accounts.c.name,
            accounts.c.disabled_at,
            raters.c.name.label("rater"),
            raters.c.rater_group,
            account_roles.c.role,
        )
        .select_from(accounts)
        .outerjoin(raters, raters.c.id == accounts.c.rater_id)
        .outerjoin(account_roles, account_roles.c.account_id == accounts.c.id)
        .where(*which)
        .order_by(accounts.c.name)
    )
    rows, roles = {}, dict[int, set[str]]()
    for row in connection.execute(query):
        rows[row.id] = row
        roles.setdefault(row.id, set()).update([row.role] if row.role is not None else [])
    return [
        Account(
            id=row.id,
            name=row.name,
            roles=frozenset(roles[row.id]),
            rater=row.rater,
            rater_group=row.rater_group,
            disabled=row.disabled_at is not None,
        )
        for row in rows.values()
    ]


def get(connection: sa.Connection, account_id: int) -> Account:
    """The account with that id."""
    for account in select(connection, accounts.c.id == account_id):
        return account
    raise NoSuchAccount(f"There is no account {account_id}.")


def create(
    connection: sa.Connection,
    *,
    name: str,
    password_hash: str | None,
    roles: Collection[str],
    rater_group: str | None,
    origin: Origin,
    now: float,
) -> Account:
    """A new account, and with the role `rater` its row among the raters. `name` is a checked one."""
    taken = (other.casefold() for other in connection.execute(sa.select(accounts.c.name)).scalars())
    if name.casefold() in taken:
        raise StoreError(f"The name {name!r} is taken; take another one.")
    rater_id = None
    if "rater" in roles:
        rater_id = register_rater(connection, name, group=rater_group, origin=origin, now=now)
    row = {"name": name, "password_hash": password_hash, "rater_id": rater_id, "created_at": now}
    account_id = connection.execute(sa.insert(accounts).values(row).returning(accounts.c.id)).scalar_one()
    give_roles(connection, account_id, roles)
    return get(connection, account_id)


def give_roles(connection: sa.Connection, account_id: int, roles: Collection[str]) -> None:
    """Replace an account's roles."""
    connection.execute(sa.delete(account_roles).where(account_roles.c.account_id == account_id))
    connection.execute(sa.insert(account_roles), [{"account_id": account_id, "role": role} for role in sorted(roles)])


def check_group(connection: sa.Connection, group: str | None, *, origin: Origin) -> str:
    """Refuse a group that raters of this origin cannot join: it is of people, or of simulated raters, never of both."""
    if group is None:
        raise StoreError("Whoever rates belongs to a group of raters; name the group that they join.")
    check_name("rater's group", group)
    other = sa.select(raters.c.name).where(raters.c.rater_group == group, raters.c.origin != origin).limit(1)
    if connection.execute(other).scalar() is not None:
        kinds = ("people", "simulated raters") if origin == "simulated" else ("simulated raters", "people")
        raise StoreError(f"Group {group!r} is one of {kinds[0]}, and {kinds[1]} cannot join it; name another group.")
    return group


def register_rater(connection: sa.Connection, name: str, *, group: str | None, origin: Origin, now: float) -> int:
    """A row among the raters. A simulated rater may have one already; a person's name must be new, or whoever takes
    it would have another's answers."""
    group = check_group(connection, group, origin=origin)
    known = connection.execute(sa.select(raters).where(raters.c.name == name)).one_or_none()
    if known is not None:
        if origin == "human" or (known.rater_group, known.origin) != (group, origin):
            raise StoreError(f"The name {name!r} is taken by a rater of group {known.rater_group!r}; take another one.")
        return int(known.id)
    row = {"name": name, "rater_group": group, "origin": origin, "created_at": now}
    return int(connection.execute(sa.insert(raters).values(row).returning(raters.c.id)).scalar_one())


def check_an_admin_is_left(connection: sa.Connection, without: Account) -> None:
    """Refuse to lose the last one who could let anybody in again."""
    others = select(connection, accounts.c.id != without.id, accounts.c.disabled_at.is_(None))
    if "admin" in without.roles and not without.disabled and not any("admin" in other.roles for other in others):
        raise StoreError(f"{without.name!r} is the only admin; make somebody else one first.")
