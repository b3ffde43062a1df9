"""Accounts, invitations, sessions, tokens and rate limits, on both databases, with a clock that is moved by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import argon2
import pytest
import sqlalchemy as sa
from tests.store.accounts import ADMIN, ANOTHER, CHEAP, LEAD, PASSWORD, SAME, Counting, acts, join, refusal
from tests.store.conftest import Clock

from tastemaker.errors import StoreError
from tastemaker.store import LabelService, Store, invitations
from tastemaker.store.access import (
    AccessService,
    InvitationRefused,
    NotAllowed,
    SignedIn,
    SignInRefused,
)
from tastemaker.store.accounts import give_roles
from tastemaker.store.audit import COMMAND_LINE, AuditLog
from tastemaker.store.passwords import LONGEST_PASSWORD
from tastemaker.store.schema import accounts, api_tokens, metadata, raters, sessions, throttles

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def access(store: Store, clock: Clock) -> AccessService:
    return AccessService(store, clock=clock, hasher=CHEAP)


# --- invitations ----------------------------------------------------------------------------------------------------


def test_a_rater_is_invited_and_comes(access: AccessService, store: Store) -> None:
    invitation = access.invite({"rater"}, rater_group="team", actor=LEAD)
    shown = access.invitation(invitation.token)
    assert (sorted(shown.roles), shown.rater_group, shown.invited_by, shown.account) == (["rater"], "team", "lee", None)
    account = access.accept(invitation.token, name="  ann ", password=PASSWORD, request_id="r1")
    assert (account.name, sorted(account.roles), account.rater, account.rater_group) == (
        "ann",
        ["rater"],
        "ann",
        "team",
    )
    assert not account.disabled
    with store.read() as connection:
        assert connection.execute(sa.select(raters.c.name, raters.c.rater_group, raters.c.origin)).all() == [
            ("ann", "team", "human")
        ]
    assert access.sign_in("ann", PASSWORD) == account
    assert acts(store) == [
        ("lee", "invitation.create", f"invitation {invitation.id}"),
        ("ann", "invitation.accept", f"invitation {invitation.id}"),
        ("ann", "session.sign_in", "ann"),
    ]
    assert AuditLog(store).entries(limit=1, action="invitation.accept")[0].request_id == "r1"


def test_who_does_not_rate_is_no_rater(access: AccessService, store: Store) -> None:
    account = join(access, "lee", "lead", "adjudicator")
    assert (account.rater, account.rater_group, sorted(account.roles)) == (None, None, ["adjudicator", "lead"])
    with store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(raters)).scalar() == 0


def test_an_invitation_works_once(access: AccessService) -> None:
    invitation = access.invite({"lead"}, actor=ADMIN)
    access.accept(invitation.token, name="lee", password=PASSWORD)
    with pytest.raises(InvitationRefused, match="used already"):
        access.accept(invitation.token, name="eve", password=PASSWORD)
    with pytest.raises(InvitationRefused, match="used already"):
        access.invitation(invitation.token)
    assert [account.name for account in access.accounts()] == ["lee"]


class Together(argon2.PasswordHasher):
    """The library's own, that waits until all have come so far."""

    meeting: threading.Barrier | None = None

    def hash(self, password: str | bytes, *, salt: bytes | None = None) -> str:
        if self.meeting is not None:
            self.meeting.wait(timeout=60)
        return super().hash(password, salt=salt)


def test_an_invitation_works_once_for_several_at_the_same_moment(store: Store, clock: Clock) -> None:
    hasher = Together(time_cost=1, memory_cost=8, parallelism=1)
    access = AccessService(store, clock=clock, hasher=hasher)
    invitation = access.invite({"lead"}, actor=ADMIN)
    names, refused = ("ann", "bob", "cy"), []
    hasher.meeting = threading.Barrier(len(names))  # each has seen that the invitation is open before any uses it

    def come(name: str) -> None:
        try:
            access.accept(invitation.token, name=name, password=PASSWORD)
        except InvitationRefused as error:
            refused.append(error)

    threads = [threading.Thread(target=come, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refused), len(access.accounts())) == (2, 1)


def test_an_invitation_expires(access: AccessService, clock: Clock) -> None:
    invitation = access.invite({"lead"}, actor=ADMIN, valid=timedelta(hours=1))
    clock.now += HOUR - 1
    assert access.invitation(invitation.token).id == invitation.id
    assert [each.id for each in access.invitations()] == [invitation.id]
    clock.now += 1
    assert access.invitations() == []
    with pytest.raises(InvitationRefused, match="no longer valid"):
        access.accept(invitation.token, name="lee", password=PASSWORD)


def test_an_invitation_is_withdrawn(access: AccessService) -> None:
    kept = access.invite({"rater"}, rater_group="team", actor=LEAD)
    invitation = access.invite({"admin"}, actor=ADMIN)
    with pytest.raises(NotAllowed):
        access.withdraw_invitation(invitation.id, actor=LEAD)
    access.withdraw_invitation(invitation.id, actor=ADMIN)
    with pytest.raises(InvitationRefused, match="no longer valid"):
        access.invitation(invitation.token)
    with pytest.raises(InvitationRefused, match=f"no open invitation {invitation.id}"):
        access.withdraw_invitation(invitation.id, actor=ADMIN)
    assert [each.id for each in access.invitations()] == [kept.id]


@pytest.mark.parametrize("token", ["", "x", "\x00", "\ud800", "a" * 10_000])
def test_an_unknown_token_opens_nothing(access: AccessService, token: str) -> None:
    with pytest.raises(InvitationRefused, match="no such invitation"):
        access.invitation(token)
    assert access.session(token) is None
    assert access.account_of_api_token(token) is None
    access.end_session(token)


@pytest.mark.parametrize(
    ("roles", "group", "says"),
    [
        ((), None, "The roles are none; an account has one or more of"),
        (("boss",), None, "The roles are boss"),
        (("rater",), None, "name the group"),
        (("rater",), "\n", "rater's group"),
        (("lead",), "team", "leave 'team' out"),
        (("service",), None, "create_service"),
        (("rater",), "bots", "Group 'bots' is one of simulated raters"),
    ],
)
def test_invitations_that_make_no_sense(
    access: AccessService, service: LabelService, roles: tuple[str, ...], group: str | None, says: str
) -> None:
    service.add_rater("r1", group="bots", origin="simulated")
    with pytest.raises(StoreError, match=says):
        access.invite(roles, rater_group=group, actor=COMMAND_LINE)
    assert access.invitations() == []


def test_a_group_that_became_one_of_simulated_raters_is_refused(access: AccessService, service: LabelService) -> None:
    invitation = access.invite({"rater"}, rater_group="team", actor=LEAD)
    service.add_rater("r1", group="team", origin="simulated")
    with pytest.raises(StoreError, match="Group 'team' is one of simulated raters, and people cannot join it"):
        access.accept(invitation.token, name="ann", password=PASSWORD)
    assert access.accounts() == []
    assert access.invitation(invitation.token).id == invitation.id  # nothing happened: it can be used


@pytest.mark.parametrize(
    ("name", "password", "says"),
    [
        ("ann", "elevenchars", "11 characters; it must have at least 12"),
        ("ann", "x" * (LONGEST_PASSWORD + 1), "at most 1000"),
        ("ann", "abcabcabcabcabc", "easily guessed"),
        ("Long enough name", "long enough NAME", "easily guessed"),
        ("", PASSWORD, "name"),
        ("  ", PASSWORD, "visible character"),
        ("a\x00b", PASSWORD, "visible character"),
        ("a\ud800", PASSWORD, "visible character"),
        ("a\u202eb", PASSWORD, "visible character"),
        ("a" * 65, PASSWORD, "at most 64"),
        ("Command Line", PASSWORD, "audit log calls someone else"),
        ("nobody", PASSWORD, "audit log calls someone else"),
        ("BOB", PASSWORD, "The name 'BOB' is taken"),
        ("\uff42\uff4f\uff42", PASSWORD, "The name 'bob' is taken"),
        ("amy", PASSWORD, "taken by a rater of group 'team'"),
    ],
)
def test_names_and_passwords_that_are_refused(
    access: AccessService, service: LabelService, name: str, password: str, says: str
) -> None:
    join(access, "bob", "admin")
    service.add_rater("amy", group="team", origin="human")  # has answered from a file
    invitation = access.invite({"rater"}, rater_group="team", actor=LEAD)
    with pytest.raises(StoreError, match=says):
        access.accept(invitation.token, name=name, password=password)
    assert access.accept(invitation.token, name="ann", password="twelve chars").name == "ann"


# --- signing in -----------------------------------------------------------------------------------------------------


def test_every_refusal_is_the_same_and_takes_the_same_work(store: Store, clock: Clock) -> None:
    hasher = Counting()
    access = AccessService(store, clock=clock, hasher=hasher)
    join(access, "ada", "admin")
    access.disable(join(access, "eve", "lead"), actor=ADMIN)
    access.create_service("bot", actor=ADMIN)
    tries = [("ada", "a wrong password"), ("eve", PASSWORD), ("eve", "a wrong password"), ("bot", PASSWORD)]
    tries += [("unknown", PASSWORD), ("", ""), ("\x00", "\x00"), ("\ud800", "\ud800"), ("a" * 9999, PASSWORD)]
    tries += [("ada", "x" * 100_000), ("ada", ""), ("ADA", PASSWORD)]
    said = set()
    for name, password in tries:
        hasher.calls.clear()
        said.add(refusal(access, name, password))
        is_right = (name, password) == ("eve", PASSWORD)  # of an account that is disabled
        assert hasher.calls == [SAME if is_right else ANOTHER], name
    assert said == {"Name and password do not belong together; check both, or ask whoever invited you."}
    hasher.calls.clear()
    assert access.sign_in("ada", PASSWORD).name == "ada"
    assert hasher.calls == [SAME]
    assert all(costs == hasher.costs[0] for costs in hasher.costs), (
        "at the same costs, whether or not there is an account"
    )


def test_refused_sign_ins_are_in_the_log_without_what_was_typed(access: AccessService, store: Store) -> None:
    join(access, "ada", "admin")
    refusal(access, "ada", "a wrong password")
    refusal(access, PASSWORD, "ada")  # typed into the wrong fields
    assert acts(store)[-2:] == [("nobody", "session.refuse", "ada"), ("nobody", "session.refuse", "unknown")]


def test_a_password_may_be_typed_on_any_keyboard(access: AccessService) -> None:
    invitation = access.invite({"admin"}, actor=COMMAND_LINE)
    access.accept(invitation.token, name="Zoé", password="café au lait, merci")
    assert access.sign_in("Zoe\u0301", "cafe\u0301 au lait, merci").name == "Zoé"
    refusal(access, "Zoé", "cafe au lait, merci")


def test_a_hash_of_other_parameters_is_renewed_at_sign_in(access: AccessService, store: Store, clock: Clock) -> None:
    join(access, "ada", "admin")
    before = password_hashes(store)
    access.sign_in("ada", PASSWORD)
    assert password_hashes(store) == before
    dearer = AccessService(store, clock=clock, hasher=argon2.PasswordHasher(time_cost=2, memory_cost=16, parallelism=1))
    refusal(dearer, "ada", "a wrong password")
    assert password_hashes(store) == before
    dearer.sign_in("ada", PASSWORD)
    (renewed,) = password_hashes(store)
    assert renewed.startswith("$argon2id$v=19$m=16,t=2,p=1$")
    assert dearer.sign_in("ada", PASSWORD).name == "ada"
    assert password_hashes(store) == [renewed]


def password_hashes(store: Store) -> list[str]:
    with store.read() as connection:
        return list(connection.execute(sa.text("SELECT password_hash FROM accounts")).scalars())


def test_the_default_is_what_the_library_recommends(store: Store) -> None:
    access = AccessService(store)
    join(access, "ada", "admin")
    assert password_hashes(store)[0].startswith("$argon2id$v=19$m=65536,t=3,p=4$")


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_is_its_account_s(access: AccessService) -> None:
    ada, bob = join(access, "ada", "admin"), join(access, "bob", "lead")
    one, two = access.open_session(ada), access.open_session(bob)
    first, second = access.session(one.token), access.session(two.token)
    assert first == SignedIn(account=ada, csrf_token=one.csrf_token)
    assert second == SignedIn(account=bob, csrf_token=two.csrf_token)
    assert first is not None
    assert first.csrf_matches(one.csrf_token)
    assert not first.csrf_matches(two.csrf_token)
    assert not first.csrf_matches("")
    assert not first.csrf_matches("\ud800")


def test_a_session_fixed_before_signing_in_is_never_taken_over(access: AccessService) -> None:
    ada = join(access, "ada", "admin")
    planted = "p" * 43
    session = access.open_session(ada, replacing=planted)
    assert session.token != planted
    assert access.session(planted) is None
    assert access.session(session.token) is not None


def test_each_sign_in_has_a_new_session_and_the_browser_s_old_one_ends(access: AccessService) -> None:
    ada = join(access, "ada", "admin")
    elsewhere, first = access.open_session(ada), access.open_session(ada)
    second = access.open_session(ada, replacing=first.token)
    assert len({elsewhere.token, first.token, second.token}) == 3
    assert len({elsewhere.csrf_token, first.csrf_token, second.csrf_token}) == 3
    assert access.session(first.token) is None
    assert access.session(second.token) is not None
    assert access.session(elsewhere.token) is not None


def test_a_session_idles_out_and_activity_extends_it(access: AccessService, clock: Clock) -> None:
    token = access.open_session(join(access, "ada", "admin")).token
    for _ in range(3):
        clock.now += 12 * HOUR - 1
        assert access.session(token) is not None
    clock.now += 12 * HOUR
    assert access.session(token) is None
    clock.now -= 1  # a clock that is set back brings back a session that was not ended
    assert access.session(token) is not None


def test_no_activity_extends_a_session_beyond_thirty_days(access: AccessService, clock: Clock) -> None:
    token = access.open_session(join(access, "ada", "admin")).token
    for _ in range(60):
        clock.now += 12 * HOUR - 1
        assert access.session(token) is not None
    clock.now += 59
    assert access.session(token) is not None  # a second before thirty days
    clock.now += 1
    assert access.session(token) is None


def test_activity_is_written_at_most_once_a_minute(access: AccessService, store: Store, clock: Clock) -> None:
    ada = join(access, "ada", "admin")
    token, secret, opened = access.open_session(ada).token, access.create_api_token(ada, "script"), clock.now

    def seen() -> tuple[float, float | None]:
        access.session(token)
        access.account_of_api_token(secret)
        with store.read() as connection:
            return (
                connection.execute(sa.select(sessions.c.seen_at)).scalar_one(),
                connection.execute(sa.select(api_tokens.c.seen_at)).scalar_one(),
            )

    assert seen() == (opened, opened)
    clock.now += 59
    assert seen() == (opened, opened)
    clock.now += 1
    assert seen() == (opened + 60, opened + 60)


def test_signing_out(access: AccessService, store: Store) -> None:
    ada = join(access, "ada", "admin")
    here, there = access.open_session(ada), access.open_session(ada)
    access.end_session(here.token)
    access.end_session(here.token)
    assert access.session(here.token) is None
    assert access.session(there.token) is not None
    assert acts(store)[-1:] == [("ada", "session.sign_out", "ada")]
    assert [act for _, act, _ in acts(store)].count("session.sign_out") == 1


def test_signing_out_everywhere(access: AccessService, store: Store) -> None:
    ada, bob = join(access, "ada", "admin"), join(access, "bob", "lead")
    here, there, other = access.open_session(ada), access.open_session(ada), access.open_session(bob)
    assert access.end_sessions(ada, except_token=here.token) == 1
    assert access.session(there.token) is None
    assert access.session(here.token) is not None
    assert access.end_sessions(ada) == 1
    assert access.session(here.token) is None
    assert access.end_sessions(ada) == 0
    assert access.end_sessions(bob, actor=ADMIN) == 1
    assert access.session(other.token) is None
    assert acts(store)[-1] == ("ada", "session.sign_out_everywhere", "bob")


def test_a_new_password_ends_the_other_sessions(access: AccessService) -> None:
    ada = join(access, "ada", "admin")
    here, there = access.open_session(ada), access.open_session(ada)
    new = "another good password"
    with pytest.raises(SignInRefused, match="nothing was changed"):
        access.change_password(ada, current="a wrong password", new=new)
    with pytest.raises(StoreError, match="at least 12"):
        access.change_password(ada, current=PASSWORD, new="short")
    assert access.session(there.token) is not None
    access.change_password(ada, current=PASSWORD, new=new, except_token=here.token)
    assert access.session(here.token) is not None
    assert access.session(there.token) is None
    refusal(access, "ada", PASSWORD)
    assert access.sign_in("ada", new).name == "ada"


def test_a_forgotten_password_is_reset_by_a_link(access: AccessService, clock: Clock) -> None:
    ann = join(access, "ann", "rater")
    session, new = access.open_session(ann), "another good password"
    older = access.reset_password(ann, actor=LEAD)
    link = access.reset_password(ann, actor=LEAD)
    with pytest.raises(InvitationRefused):  # the newer link has taken its place
        access.invitation(older.token)
    assert access.invitation(link.token).account == "ann"
    assert access.sign_in("ann", PASSWORD) == ann
    with pytest.raises(StoreError, match="is for 'ann'"):
        access.accept(link.token, name="bob", password=new)
    assert access.accept(link.token, name="ann", password=new) == ann
    assert access.session(session.token) is None
    refusal(access, "ann", PASSWORD)
    assert access.sign_in("ann", new) == ann
    with pytest.raises(InvitationRefused):
        access.accept(link.token, name="ann", password=PASSWORD)
    late = access.reset_password(ann, actor=LEAD)
    clock.now += DAY
    with pytest.raises(InvitationRefused):
        access.accept(late.token, name="ann", password=PASSWORD)


# --- what two do at once --------------------------------------------------------------------------------------------


def meanwhile(store: Store, change: Callable[[sa.Connection], object], act: Callable[[], object]) -> object:
    """What an act comes to that begins just before somebody else's change is committed."""
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(act())
        except StoreError as refused:
            outcomes.append(type(refused))

    acting = threading.Thread(target=run)
    with store.write() as connection:
        store.lock_store(connection)
        change(connection)
        acting.start()
        acting.join(0.5)
    acting.join(60.0)
    (outcome,) = outcomes
    return outcome


def test_no_lead_makes_a_link_for_who_is_being_promoted(access: AccessService, store: Store) -> None:
    ann = join(access, "ann", "rater")
    outcome = meanwhile(
        store,
        lambda connection: give_roles(connection, ann.id, {"admin"}),
        lambda: access.reset_password(ann, actor=LEAD),
    )
    assert outcome is NotAllowed
    assert access.invitations() == []


def test_a_reset_link_opens_no_account_with_other_roles(access: AccessService, store: Store) -> None:
    ann = join(access, "ann", "rater")
    link = access.reset_password(ann, actor=LEAD)
    with store.write() as connection:
        give_roles(connection, ann.id, {"admin"})
    with pytest.raises(InvitationRefused, match="other roles than you have now"):
        access.accept(link.token, name="ann", password="another good password")
    assert access.sign_in("ann", PASSWORD).roles == {"admin"}


@pytest.mark.parametrize("act", ["sign in", "change"])
def test_an_old_password_never_comes_back(access: AccessService, store: Store, clock: Clock, act: str) -> None:
    """Neither by the renewal of its hash, nor by a change that began before it was set anew."""
    ann, new = join(access, "ann", "rater"), "another good password"
    renewing = AccessService(
        store, clock=clock, hasher=argon2.PasswordHasher(time_cost=2, memory_cost=16, parallelism=1)
    )
    by_now = CHEAP.hash(new)
    outcome = meanwhile(
        store,
        lambda connection: connection.execute(sa.update(accounts).values(password_hash=by_now)),
        lambda: (
            renewing.sign_in("ann", PASSWORD)
            if act == "sign in"
            else access.change_password(ann, current=PASSWORD, new="a third good password")
        ),
    )
    assert outcome is SignInRefused
    assert password_hashes(store) == [by_now]


def test_an_invitation_that_is_being_used_is_not_withdrawn(access: AccessService, store: Store) -> None:
    ann, invitation = join(access, "ann", "admin"), access.invite({"rater"}, rater_group="team", actor=ADMIN)
    outcome = meanwhile(
        store,
        lambda connection: invitations.use(connection, invitation.id, ann, now=0.0),
        lambda: access.withdraw_invitation(invitation.id, actor=ADMIN),
    )
    assert outcome is InvitationRefused
    assert ("ada", "invitation.withdraw", f"invitation {invitation.id}") not in acts(store)


# --- secrets --------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_database(access: AccessService, store: Store) -> None:
    invitation = access.invite({"admin"}, actor=COMMAND_LINE)
    open_invitation = access.invite({"lead"}, actor=COMMAND_LINE)
    ada = access.accept(invitation.token, name="ada", password=PASSWORD)
    refusal(access, "my-other-password", "my-third-password")
    session, secret = access.open_session(ada), access.create_api_token(ada, "script")
    reset = access.reset_password(ada, actor=ADMIN)
    access.throttle("address-of-someone", capacity=1, refill_per_second=1.0)
    access.change_password(ada, current=PASSWORD, new="another good password")
    with store.read() as connection:
        text = "\n".join(
            repr(row) for table in metadata.sorted_tables for row in connection.execute(sa.select(table)).all()
        )
    assert "ada" in text
    secrets = (invitation.token, open_invitation.token, reset.token, session.token, session.csrf_token, secret)
    typed = (PASSWORD, "another good password", "my-other-password", "my-third-password", "address-of-someone")
    assert [each for each in (*secrets, secret.removeprefix("tastemaker_"), *typed) if each in text] == []
    shown = repr((invitation, open_invitation, session, access.session(session.token)))
    assert [each for each in secrets if each in shown] == []


# --- rate limits ----------------------------------------------------------------------------------------------------


def test_throttling_is_exact(access: AccessService, clock: Clock) -> None:
    def attempt() -> float:
        return access.throttle("sign-in ann", capacity=3, refill_per_second=0.25)

    assert [attempt() for _ in range(4)] == [0.0, 0.0, 0.0, 4.0]  # three at once, then one in four seconds
    clock.now += 1.0
    assert [attempt(), attempt()] == [3.0, 3.0]  # asking again costs nothing
    clock.now += 2.5
    assert attempt() == 0.5
    clock.now += 0.5
    assert [attempt(), attempt()] == [0.0, 4.0]
    clock.now += 1000.0  # full, and no fuller
    assert [attempt() for _ in range(4)] == [0.0, 0.0, 0.0, 4.0]
    clock.now -= 500.0  # a clock that is set back gives nothing
    assert attempt() == 4.0


@pytest.mark.parametrize("refill", [1 / 3, 0.7, 1 / 60, 200 / DAY, 17.0])
def test_who_waits_as_long_as_they_were_told_is_let_in(access: AccessService, clock: Clock, refill: float) -> None:
    clock.now = 1_795_000_000.123
    for _ in range(20):
        if seconds := access.throttle("key", capacity=2, refill_per_second=refill):
            clock.now += seconds
            assert access.throttle("key", capacity=2, refill_per_second=refill) == 0.0


@pytest.mark.parametrize("key", ["other", "", "\x00", "\ud800", "key" * 1000])
def test_keys_are_throttled_apart(access: AccessService, key: str) -> None:
    assert access.throttle("key", capacity=1, refill_per_second=1.0) == 0.0
    assert access.throttle(key, capacity=1, refill_per_second=1.0) == 0.0
    assert access.throttle(key, capacity=1, refill_per_second=1.0) == 1.0


def test_throttling_holds_for_many_at_once(access: AccessService) -> None:
    waits, start = [], threading.Barrier(8)

    def attempt() -> None:
        start.wait()
        for _ in range(2):
            waits.append(access.throttle("key", capacity=5, refill_per_second=1.0))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == [0.0] * 5 + [1.0] * 11


def test_full_buckets_are_forgotten_a_few_at_a_time(access: AccessService, store: Store, clock: Clock) -> None:
    def come(name: str) -> int:
        access.throttle(name, capacity=1, refill_per_second=1.0)
        with store.read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(throttles)).scalar_one())

    for index in range(30):
        come(f"old {index}")
    clock.now += HOUR
    assert come("in time") == 31
    clock.now += 1
    assert [come(f"new {index}") for index in range(3)] == [12, 3, 4]  # 20 forgotten, then 10, for each that comes
    clock.now += HOUR - 1
    assert come("in time") == 4  # it was not forgotten, so that none is new
    with pytest.raises(AssertionError, match="before it is full"):
        access.throttle("slow", capacity=2, refill_per_second=2 / (HOUR + 1))
