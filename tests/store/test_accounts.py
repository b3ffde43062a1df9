"""Roles, accounts that are shut out, services and API tokens, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from tests.store.accounts import ADMIN, CHEAP, LEAD, PASSWORD, join, refusal
from tests.store.conftest import Clock

from tastemaker.errors import StoreError
from tastemaker.store import LabelService, Store
from tastemaker.store.access import (
    AccessService,
    InvitationRefused,
    NoSuchAccount,
    NotAllowed,
    SignInRefused,
)
from tastemaker.store.audit import COMMAND_LINE, Actor, AuditLog
from tastemaker.store.schema import ROLES, raters


@pytest.fixture
def access(store: Store, clock: Clock) -> AccessService:
    return AccessService(store, clock=clock, hasher=CHEAP)


def test_a_change_of_roles_ends_sessions(access: AccessService, store: Store) -> None:
    ann = join(access, "ann", "rater")
    session, secret = access.open_session(ann), access.create_api_token(ann, "script")
    changed = access.set_roles(ann, {"rater", "adjudicator"}, actor=ADMIN)
    assert changed.roles == {"rater", "adjudicator"}
    assert changed.rater == "ann"
    assert access.session(session.token) is None
    assert access.account_of_api_token(secret) == changed  # a token has the roles of now
    (entry,) = AuditLog(store).entries(limit=1)
    assert (entry.actor, entry.action, entry.object) == ("ada", "account.roles", "ann")
    assert entry.details == {"before": ["rater"], "after": ["adjudicator", "rater"], "rater_group": None}


def test_who_begins_to_rate_joins_a_group(access: AccessService) -> None:
    lee = join(access, "lee", "lead")
    with pytest.raises(StoreError, match="name the group"):
        access.set_roles(lee, {"lead", "rater"}, actor=ADMIN)
    rater = access.set_roles(lee, {"lead", "rater"}, rater_group="team", actor=ADMIN)
    assert (rater.rater, rater.rater_group) == ("lee", "team")
    with pytest.raises(StoreError, match="leave 'other' out"):
        access.set_roles(rater, {"rater"}, rater_group="other", actor=ADMIN)
    with pytest.raises(StoreError, match="cannot become"):
        access.set_roles(rater, {"service"}, actor=ADMIN)


@pytest.mark.parametrize("role", [*ROLES, "none", "nobody"])
def test_nobody_raises_themselves(access: AccessService, role: str) -> None:
    """Only an admin makes admins; a lead deals with raters; everyone else with nobody."""
    join(access, "boss", "admin")
    lee, ann = join(access, "lee", "lead"), join(access, "ann", "rater")
    actor = Actor("lee", role)
    acts_of_admins: list[Callable[[], object]] = [
        lambda: access.invite({"admin"}, actor=actor),
        lambda: access.invite({"rater", "admin"}, rater_group="team", actor=actor),
        lambda: access.set_roles(lee, {"admin"}, actor=actor),
        lambda: access.set_roles(ann, {"rater", "lead"}, actor=actor),
        lambda: access.disable(lee, actor=actor),
        lambda: access.enable(lee, actor=actor),
        lambda: access.reset_password(lee, actor=actor),
        lambda: access.end_sessions(lee, actor=actor),
        lambda: access.create_api_token(lee, "mine now", actor=actor),
        lambda: access.create_service("bot", actor=actor),
    ]
    for act in acts_of_admins:
        if role == "admin":
            act()
        else:
            with pytest.raises(NotAllowed, match=f"'lee' as {role} may not"):
                act()
    acts_of_leads: list[Callable[[], object]] = [
        lambda: access.invite({"rater"}, rater_group="team", actor=actor),
        lambda: access.disable(join(access, "bob", "rater"), actor=actor),
    ]
    for act in acts_of_leads:
        if role in ("admin", "lead"):
            act()
        else:
            with pytest.raises(NotAllowed):
                act()


def test_a_reset_link_does_not_outlive_a_promotion(access: AccessService) -> None:
    """Or else a lead's link for a rater would open an admin's account a day later."""
    ann = join(access, "ann", "rater")
    link = access.reset_password(ann, actor=LEAD)
    access.set_roles(ann, {"admin"}, actor=ADMIN)
    with pytest.raises(InvitationRefused, match="no longer valid"):
        access.accept(link.token, name="ann", password=PASSWORD)


def test_links_end_with_the_right_to_make_them(access: AccessService) -> None:
    """Or whoever was shut out comes back by a link of their own, as an admin, a week later."""
    join(access, "ada", "admin")
    ann, eve = join(access, "ann", "rater"), join(access, "eve", "admin")
    as_admin = eve.actor("admin")
    mine = [
        access.invite({"admin"}, actor=as_admin),
        access.invite({"rater"}, rater_group="team", actor=as_admin),
        access.reset_password(join(access, "lee", "lead"), actor=as_admin),
        access.reset_password(ann, actor=as_admin),
    ]
    others = [access.invite({"admin"}, actor=actor) for actor in (ADMIN, COMMAND_LINE)]

    def open_ones() -> list[int]:
        return sorted(each.id for each in access.invitations())

    access.set_roles(eve, {"admin", "auditor"}, actor=ADMIN)
    assert open_ones() == [each.id for each in (*mine, *others)]
    access.set_roles(eve, {"lead"}, actor=ADMIN)  # a lead still invites raters
    assert open_ones() == [mine[1].id, mine[3].id, *(each.id for each in others)]
    access.disable(eve, actor=ADMIN)
    access.enable(eve, actor=ADMIN)
    assert open_ones() == [each.id for each in others]
    for link in mine:
        with pytest.raises(InvitationRefused, match="no longer valid"):
            access.accept(link.token, name="mallory", password=PASSWORD)


def test_a_disabled_account_is_shut_out_and_let_in_again(access: AccessService) -> None:
    ann = join(access, "ann", "rater")
    session, secret, link = (
        access.open_session(ann),
        access.create_api_token(ann, "script"),
        access.reset_password(ann, actor=LEAD),
    )
    assert access.disable(ann, actor=LEAD).disabled
    assert access.session(session.token) is None
    with pytest.raises(SignInRefused, match="disabled"):  # who signed in a moment before
        access.open_session(ann)
    assert access.account_of_api_token(secret) is None
    refusal(access, "ann", PASSWORD)
    with pytest.raises(InvitationRefused):
        access.invitation(link.token)
    with pytest.raises(StoreError, match="enable the account first"):
        access.reset_password(ann, actor=LEAD)
    assert access.enable(ann, actor=LEAD) == ann
    assert access.session(session.token) is None
    assert access.account_of_api_token(secret) == ann
    assert access.sign_in("ann", PASSWORD) == ann


def test_the_last_admin_stays(access: AccessService) -> None:
    ada = join(access, "ada", "admin")
    with pytest.raises(StoreError, match="'ada' is the only admin"):
        access.disable(ada, actor=ADMIN)
    with pytest.raises(StoreError, match="'ada' is the only admin"):
        access.set_roles(ada, {"lead"}, actor=ADMIN)
    bob = join(access, "bob", "admin", "lead")
    access.disable(ada, actor=ADMIN)
    with pytest.raises(StoreError, match="'bob' is the only admin"):
        access.set_roles(bob, {"lead"}, actor=ADMIN)


def test_accounts_are_listed_and_found(access: AccessService) -> None:
    bob, ada = join(access, "bob", "rater"), join(access, "ada", "admin")
    assert access.accounts() == [ada, bob]
    assert access.account(bob.id) == bob
    with pytest.raises(NoSuchAccount, match="no account 77"):
        access.account(77)


def test_a_service_works_by_token_and_answers_as_a_simulated_rater(
    access: AccessService, service: LabelService, store: Store
) -> None:
    service.add_rater("r1", group="bots", origin="simulated")
    service.add_rater("ann", group="team", origin="human")
    known, new, plain = (
        access.create_service("r1", rater_group="bots", actor=ADMIN),
        access.create_service("r2", rater_group="bots", actor=ADMIN),
        access.create_service("exporter", actor=ADMIN),
    )
    assert [(each.rater, each.rater_group) for each in (known, new, plain)] == [
        ("r1", "bots"),
        ("r2", "bots"),
        (None, None),
    ]
    assert (sorted(new.roles), sorted(plain.roles)) == (["rater", "service"], ["service"])
    with store.read() as connection:
        rows = connection.execute(sa.select(raters.c.name, raters.c.origin))
        assert {row.name: row.origin for row in rows} == {
            "r1": "simulated",
            "r2": "simulated",
            "ann": "human",
        }
    for name, group, says in (
        ("r3", "team", "Group 'team' is one of people"),
        ("ann", "bots", "taken by a rater of group 'team'"),
        ("r2", "bots", "taken"),
    ):
        with pytest.raises(StoreError, match=says):
            access.create_service(name, rater_group=group, actor=ADMIN)
    with pytest.raises(StoreError, match="no password"):
        access.reset_password(new, actor=ADMIN)
    secret = access.create_api_token(new, "driver", actor=ADMIN)
    assert access.account_of_api_token(secret) == new
    refusal(access, "r2", "")


def test_a_link_for_a_new_password_ends_api_tokens_and_signing_out_does_not(access: AccessService) -> None:
    """Whoever knew the old password may have made one."""
    ann, bob = join(access, "ann", "rater"), join(access, "bob", "rater")
    mine, other = access.create_api_token(ann, "script"), access.create_api_token(bob, "script")
    access.end_sessions(ann)
    assert access.account_of_api_token(mine) == ann
    access.accept(access.reset_password(ann, actor=LEAD).token, name="ann", password="another good password")
    assert access.account_of_api_token(mine) is None
    assert access.api_tokens(ann) == []
    assert access.account_of_api_token(other) == bob


def test_api_tokens_are_listed_and_revoked(access: AccessService, clock: Clock) -> None:
    ann, bob = join(access, "ann", "rater"), join(access, "bob", "rater")
    first, second = access.create_api_token(ann, "one"), access.create_api_token(ann, "two")
    assert access.account_of_api_token(first) == ann
    listed = access.api_tokens(ann)
    assert [(token.label, token.seen_at) for token in listed] == [("two", None), ("one", clock.now)]
    with pytest.raises(StoreError, match=f"'bob' has no API token {listed[1].id}"):
        access.revoke_api_token(bob, listed[1].id)  # another's
    access.revoke_api_token(ann, listed[1].id)
    with pytest.raises(StoreError, match="no API token"):
        access.revoke_api_token(ann, listed[1].id)
    assert access.account_of_api_token(first) is None
    assert access.account_of_api_token(second) == ann
    assert [token.label for token in access.api_tokens(ann)] == ["two"]
    for label in ("", "\x00", "x" * 101):
        with pytest.raises(StoreError, match="label"):
            access.create_api_token(ann, label)
