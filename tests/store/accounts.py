"""Accounts in few words."""

from __future__ import annotations

import argon2
import pytest
from argon2.exceptions import VerifyMismatchError

from tastemaker.store import Store
from tastemaker.store.access import AccessService, Account, SignInRefused
from tastemaker.store.audit import COMMAND_LINE, Actor, AuditLog

PASSWORD = "correct horse battery staple"
ADMIN, LEAD = Actor("ada", "admin"), Actor("lee", "lead")
# What tests can afford.
CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


def join(access: AccessService, name: str, *roles: str, group: str | None = None) -> Account:
    """An account with these roles; a rater's group is `team` unless another is given."""
    rater_group = group or "team" if "rater" in roles else None
    invitation = access.invite(roles, rater_group=rater_group, actor=COMMAND_LINE)
    return access.accept(invitation.token, name=name, password=PASSWORD)


def acts(store: Store) -> list[tuple[str, str, str]]:
    """Who did what to what, in order."""
    entries = AuditLog(store).entries(limit=100)
    return [(entry.actor, entry.action, entry.object) for entry in reversed(entries)]


def refusal(access: AccessService, name: str, password: str) -> str:
    with pytest.raises(SignInRefused) as caught:
        access.sign_in(name, password)
    return str(caught.value)


SAME, ANOTHER = "hashed, and it is the same", "hashed, and it is another"


class Counting(argon2.PasswordHasher):
    """The library's own, that counts."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=8, parallelism=1)
        self.calls: list[str] = []
        self.costs: list[argon2.Parameters] = []

    def hash(self, password: str | bytes, *, salt: bytes | None = None) -> str:
        self.calls.append("hash")
        return super().hash(password, salt=salt)

    def verify(self, hash: str | bytes, password: str | bytes) -> bool:  # type: ignore[override]
        self.costs.append(argon2.extract_parameters(str(hash)))
        try:
            found = super().verify(hash, password)
        except VerifyMismatchError:
            self.calls.append(ANOTHER)
            raise
        self.calls.append(SAME)
        return found
