"""Accounts, invitations, sessions, API tokens and rate limits: who is let in, and as what.

    invite -> invitation -> accept -> Account          sign_in -> Account -> open_session -> session -> SignedIn
    create_api_token -> account_of_api_token           throttle: seconds to wait

Nobody gives themselves an account: somebody invites, by a link that works once. Sessions are rows in the database, so
that one can be ended, and each begins with a new token, so that none can be planted beforehand. Whether a role may see
a page is the application's question; who may give a role to whom is decided here (`accounts.check_may_manage`). Each
act writes its row of the audit log in its own transaction.

Hashing a password takes a twentieth of a second on purpose, so it is never done while a transaction is open.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta

import argon2
import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Origin
from tastemaker.store import accounts as people
from tastemaker.store import invitations, schema
from tastemaker.store.accounts import (
    Account,
    NoSuchAccount,
    NotAllowed,
    check_may_manage,
    check_roles,
    checked_name,
    plain_name,
)
from tastemaker.store.audit import Actor, record
from tastemaker.store.database import Store
from tastemaker.store.invitations import Invitation, InvitationRefused, OpenInvitation
from tastemaker.store.passwords import Passwords, check_password, form_token, key_hash, new_token, token_hash
from tastemaker.store.schema import accounts, api_tokens, sessions
from tastemaker.store.tasks import check_name
from tastemaker.store.throttling import Limit

__all__ = [
    "AccessService",
    "Account",
    "ApiToken",
    "Invitation",
    "InvitationRefused",
    "NoSuchAccount",
    "NotAllowed",
    "OpenInvitation",
    "Session",
    "SignInRefused",
    "SignedIn",
]

INVITATION_VALID = timedelta(days=7)
RESET_VALID = timedelta(days=1)
SESSION_IDLE = timedelta(hours=12)
SESSION_ABSOLUTE = timedelta(days=30)
# How old the noted time of the last activity may be: every page would otherwise be a write.
SEEN_EVERY = timedelta(minutes=1)
LONGEST_LABEL = 100
# So that scanners for leaked secrets can know one.
API_TOKEN_PREFIX = "tastemaker_"


class SignInRefused(StoreError):
    """Name and password do not let anybody in. It does not say which of them is wrong, nor whether the name exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A new session's secrets: `token` goes into the cookie, `csrf_token` into every form."""

    token: str = field(repr=False)
    csrf_token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """Whose session a request belongs to."""

    account: Account
    csrf_token: str = field(repr=False)

    def csrf_matches(self, given: str) -> bool:
        """Whether a form carries this session's token."""
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.csrf_token.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiToken:
    """What may be shown of an API token."""

    id: int
    label: str
    created_at: float
    seen_at: float | None


class AccessService:
    """Who may come in. One for a server; safe to share between threads."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        hasher: argon2.PasswordHasher | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._passwords = Passwords(argon2.PasswordHasher() if hasher is None else hasher)

    # --- invitations --------------------------------------------------------------------------------------------

    def invite(
        self,
        roles: Collection[str],
        *,
        rater_group: str | None = None,
        actor: Actor,
        valid: timedelta = INVITATION_VALID,
    ) -> Invitation:
        """Invite one person, who joins `rater_group` if they are to rate."""
        given = check_roles(roles)
        check_may_manage(actor, given, "invite anybody")
        if "service" in given:
            raise StoreError("A service has no password to choose; make it with `create_service`.")
        with self._store.write() as connection:
            if "rater" in given:
                rater_group = people.check_group(connection, rater_group, origin="human")
            elif rater_group is not None:
                raise StoreError(f"Only raters join a group; leave {rater_group!r} out or invite a rater.")
            return invitations.create(
                connection, given, rater_group=rater_group, account=None, actor=actor, valid=valid, now=self._clock()
            )

    def reset_password(self, account: Account, *, actor: Actor, valid: timedelta = RESET_VALID) -> Invitation:
        """An invitation to set an account's password anew, for who has forgotten it. The old one works until then."""
        with self._store.write() as connection:
            self._store.lock_store(connection)
            now = self._clock()
            known = people.get(connection, account.id)
            check_may_manage(actor, known.roles, "reset the password of an account")
            if "service" in known.roles:
                raise StoreError(f"{known.name!r} is a service, which has no password; give it another API token.")
            if known.disabled:
                raise StoreError(f"{known.name!r} is disabled; enable the account first.")
            self._close_resets(connection, known, now=now)
            return invitations.create(
                connection,
                known.roles,
                rater_group=known.rater_group,
                account=known,
                actor=actor,
                valid=valid,
                now=now,
            )

    def invitation(self, token: str) -> OpenInvitation:
        """The invitation that a link holds.

        Raises:
            InvitationRefused: it is not open.
        """
        with self._store.read() as connection:
            return invitations.find_open(connection, token, now=self._clock())

    def invitations(self) -> list[OpenInvitation]:
        """The invitations that are open, newest first."""
        with self._store.read() as connection:
            return invitations.select_open(connection, now=self._clock())

    def withdraw_invitation(self, invitation_id: int, *, actor: Actor) -> None:
        """Make an open invitation void."""
        this = schema.invitations.c.id == invitation_id
        with self._store.write() as connection:
            now = self._clock()
            found = invitations.select_open(connection, this, now=now)
            if not found:
                raise InvitationRefused(f"There is no open invitation {invitation_id}.")
            check_may_manage(actor, found[0].roles, "withdraw an invitation")
            if not invitations.close(connection, this, now=now):  # somebody came meanwhile
                raise InvitationRefused(f"There is no open invitation {invitation_id}.")
            record(connection, actor, "invitation.withdraw", f"invitation {invitation_id}", now=now)

    def accept(self, token: str, *, name: str, password: str, request_id: str | None = None) -> Account:
        """Use an invitation: a new account, or a new password for the one that it names, whose sessions and API tokens
        end.

        Raises:
            InvitationRefused: the invitation is not open, perhaps no longer.
        """
        invited = self.invitation(token)
        name = checked_name(name)
        if invited.account is not None and name != invited.account:
            raise StoreError(f"This invitation is for {invited.account!r}; it sets no other account's password.")
        check_password(password, name=name)
        password_hash = self._passwords.hash(password)
        with self._store.write() as connection:
            self._store.lock_store(connection)
            now = self._clock()
            invited = invitations.find_open(connection, token, now=now)  # somebody else may have been quicker
            if invited.account is None:
                account = people.create(
                    connection,
                    name=name,
                    password_hash=password_hash,
                    roles=invited.roles,
                    rater_group=invited.rater_group,
                    origin="human",
                    now=now,
                )
            else:
                (account,) = people.select(connection, accounts.c.name == name)
                if invited.roles != account.roles:  # who made the link might not make one for these
                    raise InvitationRefused("This link was made for other roles than you have now; ask for a new one.")
                self._set_password(connection, account, password_hash)
                self._end_sessions(connection, account, now=now)
                # Whoever knew the old password may have made one.
                theirs = sa.update(api_tokens).where(api_tokens.c.account_id == account.id)
                connection.execute(theirs.where(api_tokens.c.revoked_at.is_(None)).values(revoked_at=now))
            invitations.use(connection, invited.id, account, now=now)
            actor = account.actor(request_id=request_id)
            details = {"account": account.name, "roles": sorted(account.roles), "rater_group": account.rater_group}
            record(connection, actor, "invitation.accept", f"invitation {invited.id}", details, now=now)
        return account

    # --- signing in ---------------------------------------------------------------------------------------------

    def sign_in(self, name: str, password: str, *, request_id: str | None = None) -> Account:
        """The account with that name and password.

        Raises:
            SignInRefused: there is none, or it is disabled; the same words and the same work in each case.
        """
        with self._store.read() as connection:
            account, stored = self._look_up(connection, name)
        right = self._passwords.verify(stored, password)
        outdated = right and stored is not None and self._passwords.is_outdated(stored)
        newer = self._passwords.hash(password) if outdated else None
        with self._store.write() as connection:
            self._store.lock_store(connection)  # or an outdated hash, made anew, could undo a change of the password
            now, before = self._clock(), stored
            account, stored = self._look_up(connection, name)  # another password since, or shut out?
            if account is not None and right and stored == before and not account.disabled:
                if newer is not None:
                    self._set_password(connection, account, newer)
                actor = account.actor(request_id=request_id)
                record(connection, actor, "session.sign_in", account.name, {"rehashed": outdated}, now=now)
                return account
            # A name that nobody has may be a password, typed into the wrong field: it is not written down.
            whom = "unknown" if account is None else account.name
            record(connection, Actor(people.NOBODY, "none", request_id), "session.refuse", whom, now=now)
        raise SignInRefused("Name and password do not belong together; check both, or ask whoever invited you.")

    def open_session(self, account: Account, *, replacing: str | None = None) -> Session:
        """A new session for who has just signed in or accepted; `replacing`: the token of the browser's earlier one."""
        token = new_token()
        with self._store.write() as connection:
            now = self._clock()
            if people.get(connection, account.id).disabled:
                raise SignInRefused(f"{account.name!r} is disabled.")
            if replacing is not None:
                self._end(connection, sessions.c.token_hash == token_hash(replacing), now=now)
            row = {"token_hash": token_hash(token), "account_id": account.id, "created_at": now, "seen_at": now}
            connection.execute(sa.insert(sessions).values(row))
        return Session(token=token, csrf_token=form_token(token))

    def session(self, token: str) -> SignedIn | None:
        """Whose session it is; None if there is none, or it has ended, or its time is over."""
        now = self._clock()
        with self._store.read() as connection:
            row = connection.execute(
                sa.select(sessions).where(
                    sessions.c.token_hash == token_hash(token),
                    sessions.c.ended_at.is_(None),
                    sessions.c.seen_at > now - SESSION_IDLE.total_seconds(),
                    sessions.c.created_at > now - SESSION_ABSOLUTE.total_seconds(),
                )
            ).one_or_none()
            account = None if row is None else people.get(connection, row.account_id)
        if row is None or account is None or account.disabled:
            return None
        self._seen(sessions, row.id, row.seen_at, now)
        return SignedIn(account=account, csrf_token=form_token(token))

    def end_session(self, token: str, *, request_id: str | None = None) -> None:
        """Sign out. A session that has ended already is no error."""
        with self._store.write() as connection:
            now = self._clock()
            for account_id in self._end(connection, sessions.c.token_hash == token_hash(token), now=now):
                account = people.get(connection, account_id)
                actor = account.actor(request_id=request_id)
                record(connection, actor, "session.sign_out", account.name, now=now)

    def end_sessions(
        self,
        account: Account,
        except_token: str | None = None,
        *,
        actor: Actor | None = None,
        request_id: str | None = None,
    ) -> int:
        """Sign an account out everywhere, or everywhere else; returns how many sessions ended. Without an actor it is
        the account itself that does it."""
        with self._store.write() as connection:
            now = self._clock()
            known = people.get(connection, account.id)
            if actor is not None:
                check_may_manage(actor, known.roles, "sign out an account")
            ended = self._end_sessions(connection, known, except_token, now=now)
            doer = actor or known.actor(request_id=request_id)
            record(connection, doer, "session.sign_out_everywhere", known.name, {"sessions": ended}, now=now)
        return ended

    def change_password(
        self,
        account: Account,
        *,
        current: str,
        new: str,
        except_token: str | None = None,
        request_id: str | None = None,
    ) -> None:
        """Set another password, by who knows the current one. Every other session ends.

        Raises:
            SignInRefused: the current password is another one.
        """
        check_password(new, name=account.name)
        with self._store.read() as connection:
            _, stored = self._look_up(connection, account.name)
        right = self._passwords.verify(stored, current)
        password_hash = self._passwords.hash(new) if right else None
        with self._store.write() as connection:
            self._store.lock_store(connection)
            now = self._clock()
            known, before = people.get(connection, account.id), stored
            _, stored = self._look_up(connection, known.name)
            actor = known.actor(request_id=request_id)
            if password_hash is not None and stored == before:
                self._set_password(connection, known, password_hash)
                ended = self._end_sessions(connection, known, except_token, now=now)
                record(connection, actor, "password.change", known.name, {"sessions": ended}, now=now)
                return
            record(connection, actor, "password.refuse", known.name, now=now)
        raise SignInRefused("The current password is another one; nothing was changed.")

    # --- accounts -----------------------------------------------------------------------------------------------

    def accounts(self) -> list[Account]:
        """All accounts, by name."""
        with self._store.read() as connection:
            return people.select(connection)

    def account(self, account_id: int) -> Account:
        """The account with that id.

        Raises:
            NoSuchAccount: there is none.
        """
        with self._store.read() as connection:
            return people.get(connection, account_id)

    def create_service(self, name: str, *, rater_group: str | None = None, actor: Actor) -> Account:
        """An account for a program, which has no password and works by API token. With a group it answers too, as a
        simulated rater of its name."""
        roles = {"service"} if rater_group is None else {"service", "rater"}
        check_may_manage(actor, roles, "make an account")
        name = checked_name(name)
        with self._store.write() as connection:
            self._store.lock_store(connection)
            now = self._clock()
            account = people.create(
                connection,
                name=name,
                password_hash=None,
                roles=roles,
                rater_group=rater_group,
                origin="simulated",
                now=now,
            )
            details = {"roles": sorted(roles), "rater_group": rater_group}
            record(connection, actor, "account.create", account.name, details, now=now)
        return account

    def set_roles(
        self, account: Account, roles: Collection[str], *, rater_group: str | None = None, actor: Actor
    ) -> Account:
        """Give an account other roles; its sessions end. Who rates from now on joins `rater_group`."""
        given = check_roles(roles)
        with self._store.write() as connection:
            self._store.lock_store(connection)
            now = self._clock()
            known = people.get(connection, account.id)
            check_may_manage(actor, given | known.roles, "change an account")
            if ("service" in given) != ("service" in known.roles):
                raise StoreError("A service cannot become a person's account, nor a person's a service.")
            if "admin" not in given:
                people.check_an_admin_is_left(connection, known)
            if "rater" in given and known.rater is None:
                origin: Origin = "simulated" if "service" in given else "human"
                rater_id = people.register_rater(connection, known.name, group=rater_group, origin=origin, now=now)
                connection.execute(sa.update(accounts).where(accounts.c.id == known.id).values(rater_id=rater_id))
            elif rater_group not in (None, known.rater_group):
                raise StoreError(f"Only who begins to rate joins a group; leave {rater_group!r} out.")
            people.give_roles(connection, known.id, given)
            self._end_sessions(connection, known, now=now)
            self._close_resets(connection, known, now=now)  # whoever made one might not make one for the new roles
            self._close_made_by(connection, known, given, now=now)
            details = {"before": sorted(known.roles), "after": sorted(given), "rater_group": rater_group}
            record(connection, actor, "account.roles", known.name, details, now=now)
            return people.get(connection, known.id)

    def disable(self, account: Account, *, actor: Actor) -> Account:
        """Shut an account out, sessions and API tokens too. What it said and did stays."""
        return self._set_disabled(account, self._clock(), "account.disable", actor)

    def enable(self, account: Account, *, actor: Actor) -> Account:
        """Let a disabled account in again."""
        return self._set_disabled(account, None, "account.enable", actor)

    def _set_disabled(self, account: Account, at: float | None, action: str, actor: Actor) -> Account:
        with self._store.write() as connection:
            self._store.lock_store(connection)
            now = self._clock()
            known = people.get(connection, account.id)
            check_may_manage(actor, known.roles, "disable or enable an account")
            if at is not None:
                people.check_an_admin_is_left(connection, known)
                self._end_sessions(connection, known, now=now)
                self._close_resets(connection, known, now=now)
                self._close_made_by(connection, known, (), now=now)
            connection.execute(sa.update(accounts).where(accounts.c.id == known.id).values(disabled_at=at))
            record(connection, actor, action, known.name, now=now)
            return people.get(connection, known.id)

    # --- API tokens ---------------------------------------------------------------------------------------------

    def create_api_token(self, account: Account, label: str, *, actor: Actor | None = None) -> str:
        """A new token by which a program acts for the account; the only time that it is known. Without an actor the
        account makes it for itself."""
        check_name("token's label", label)
        if len(label) > LONGEST_LABEL:
            raise StoreError(f"The token's label has {len(label)} characters; it may have at most {LONGEST_LABEL}.")
        secret = API_TOKEN_PREFIX + new_token()
        with self._store.write() as connection:
            now = self._clock()
            known = people.get(connection, account.id)
            if actor is not None:
                check_may_manage(actor, known.roles, "make an API token of an account")
            row = {"token_hash": token_hash(secret), "account_id": known.id, "label": label, "created_at": now}
            token_id = connection.execute(sa.insert(api_tokens).values(row).returning(api_tokens.c.id)).scalar_one()
            details = {"token": token_id, "label": label}
            record(connection, actor or known.actor(), "api_token.create", known.name, details, now=now)
        return secret

    def api_tokens(self, account: Account) -> list[ApiToken]:
        """An account's tokens that work, newest first."""
        mine = (api_tokens.c.account_id == account.id, api_tokens.c.revoked_at.is_(None))
        with self._store.read() as connection:
            rows = connection.execute(sa.select(api_tokens).where(*mine).order_by(api_tokens.c.id.desc()))
            return [
                ApiToken(id=row.id, label=row.label, created_at=row.created_at, seen_at=row.seen_at) for row in rows
            ]

    def account_of_api_token(self, secret: str) -> Account | None:
        """Who a program acts for; None if the token is unknown or revoked, or the account is disabled."""
        now = self._clock()
        with self._store.read() as connection:
            row = connection.execute(
                sa.select(api_tokens).where(
                    api_tokens.c.token_hash == token_hash(secret), api_tokens.c.revoked_at.is_(None)
                )
            ).one_or_none()
            account = None if row is None else people.get(connection, row.account_id)
        if row is None or account is None or account.disabled:
            return None
        self._seen(api_tokens, row.id, row.seen_at, now)
        return account

    def revoke_api_token(self, account: Account, token_id: int, *, actor: Actor | None = None) -> None:
        """Make one of an account's tokens void, by its number."""
        with self._store.write() as connection:
            now = self._clock()
            known = people.get(connection, account.id)
            if actor is not None:
                check_may_manage(actor, known.roles, "revoke an API token of an account")
            revoked = connection.execute(
                sa.update(api_tokens)
                .where(api_tokens.c.id == token_id, api_tokens.c.account_id == known.id)
                .where(api_tokens.c.revoked_at.is_(None))
                .values(revoked_at=now)
            ).rowcount
            if not revoked:
                raise StoreError(f"{known.name!r} has no API token {token_id}.")
            details = {"token": token_id}
            record(connection, actor or known.actor(), "api_token.revoke", known.name, details, now=now)

    # --- rate limits --------------------------------------------------------------------------------------------

    def throttle(self, key: str, *, capacity: int, refill_per_second: float) -> float:
        """Seconds to wait; 0.0: the act is allowed, and counted. `key` says whose acts of what kind are counted."""
        limit = Limit(key=key_hash(key), capacity=capacity, refill_per_second=refill_per_second)
        now = self._clock()
        with self._store.read() as connection:
            seconds = limit.wait(connection, now=now)
        if seconds > 0.0:
            return seconds
        with self._store.write() as connection:
            return limit.take(connection, now=now)

    # --- what several of these do -------------------------------------------------------------------------------

    def _look_up(self, connection: sa.Connection, name: str) -> tuple[Account | None, str | None]:
        """The account with that name and the hash of its password; the same queries if there is none."""
        is_it = accounts.c.name == plain_name(name)
        stored = connection.execute(sa.select(accounts.c.password_hash).where(is_it)).scalar_one_or_none()
        return next(iter(people.select(connection, is_it)), None), stored

    def _set_password(self, connection: sa.Connection, account: Account, password_hash: str) -> None:
        this = accounts.c.id == account.id
        connection.execute(sa.update(accounts).where(this).values(password_hash=password_hash))

    def _end_sessions(
        self, connection: sa.Connection, account: Account, except_token: str | None = None, *, now: float
    ) -> int:
        which = [sessions.c.account_id == account.id]
        if except_token is not None:
            which.append(sessions.c.token_hash != token_hash(except_token))
        return len(self._end(connection, *which, now=now))

    def _end(self, connection: sa.Connection, *which: sa.ColumnElement[bool], now: float) -> list[int]:
        """End the sessions of which `which` is true; returns whose they were."""
        ended = sa.update(sessions).where(sessions.c.ended_at.is_(None), *which).values(ended_at=now)
        return list(connection.execute(ended.returning(sessions.c.account_id)).scalars())

    def _close_resets(self, connection: sa.Connection, account: Account, *, now: float) -> None:
        invitations.close(connection, schema.invitations.c.account_id == account.id, now=now)

    def _close_made_by(
        self, connection: sa.Connection, account: Account, roles: Collection[str], *, now: float
    ) -> None:
        """Close the account's invitations and links that it could not make any more with these roles: or they would
        let it in again."""
        made = invitations.select_open(connection, schema.invitations.c.invited_by == account.name, now=now)
        void = [each.id for each in made if not people.may_give(roles, each.roles)]
        if void:
            invitations.close(connection, schema.invitations.c.id.in_(void), now=now)

    def _seen(self, table: sa.Table, row_id: int, seen_at: float | None, now: float) -> None:
        """Note an activity, unless one was noted less than a minute ago."""
        if seen_at is None or now - seen_at >= SEEN_EVERY.total_seconds():
            with self._store.write() as connection:
                connection.execute(sa.update(table).where(table.c.id == row_id).values(seen_at=now))
