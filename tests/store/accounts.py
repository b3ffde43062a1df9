"""Accounts in few words."""

from __future__ import annotations

import argon2
import pytest

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
