"""The pages about people: accounts, invitations, roles, shutting out, links for forgotten passwords, programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Form
from starlette.responses import Response

from tastemaker.errors import TastemakerError
from tastemaker.labelling.forms import Field, Text
from tastemaker.labelling.web import Id, Link, Page, require
from tastemaker.store.accounts import Account
from tastemaker.store.schema import ROLES

# The first role that an account has is the one it acts under, and an admin may do more here.
ADMITTING = ("admin", "lead")

routes = APIRouter()
LINKS: Sequence[Link] = (
    Link(
        path="/people",
        label="People",
        roles=frozenset(ADMITTING),
        about="Invite people, give them roles, disable accounts, make links for forgotten passwords.",
    ),
)

AdmittingPage = Annotated[Page, require(*ADMITTING)]
AdminPage = Annotated[Page, require("admin")]
Roles = Annotated[list[Text] | None, Form()]

# What a program that is given its token may do is said by the account; the token needs only a name of its own.
FIRST_TOKEN = "first token"


@routes.get("/people")
def people(page: AdmittingPage) -> Response:
    return _people(page)


@routes.post("/people/invite")
def invite(page: AdmittingPage, role: Roles = None, rater_group: Field = "") -> Response:
    roles, group = role or [], rater_group.strip()
    try:
        invited = page.services.access.invite(roles, rater_group=group or None, actor=page.actor)
    except TastemakerError as refusal:
        return _people(page, status=422, roles=roles, rater_group=rater_group, problem=str(refusal))
    return _people(page, secret=page.address(f"/invitation/{invited.token}"), secret_is="invitation")


@routes.post("/people/invitations/{invitation_id}/withdraw")
def withdraw(page: AdmittingPage, invitation_id: Id) -> Response:
    page.services.access.withdraw_invitation(invitation_id, actor=page.actor)
    return page.redirect("/people", said="The invitation is void.")


@routes.post("/people/program")
def create_program(page: AdminPage, name: Field = "", rater_group: Field = "") -> Response:
    try:
        made = page.services.access.create_service(name, rater_group=rater_group.strip() or None, actor=page.actor)
    except TastemakerError as refusal:
        return _people(page, status=422, program=name, program_group=rater_group, program_problem=str(refusal))
    return _people(page, secret=page.services.access.create_api_token(made, FIRST_TOKEN, actor=page.actor))


def _people(
    page: Page,
    *,
    status: int = 200,
    roles: Sequence[str] = ("rater",),
    rater_group: str = "",
    problem: str = "",
    secret: str = "",
    secret_is: str = "token",
    program: str = "",
    program_group: str = "",
    program_problem: str = "",
) -> Response:
    accounts = page.services.access.accounts()
    return page.render(
        "lead/people.html",
        status=status,
        accounts=accounts,
        invitations=page.services.access.invitations(),
        groups=sorted({account.rater_group for account in accounts if account.rater_group is not None}),
        is_admin=page.role == "admin",
        may_give=[one for one in ROLES if one != "service"] if page.role == "admin" else ["rater"],
        roles=roles,
        rater_group=rater_group,
        problem=problem,
        secret=secret,
        secret_is=secret_is,
        program=program,
        program_group=program_group,
        program_problem=program_problem,
    )


def _may_manage(page: Page, account: Account) -> bool:
    """Whether to show the forms; whether the act itself is allowed is decided by the store."""
    return page.role == "admin" or account.roles == {"rater"}


# --- one person -----------------------------------------------------------------------------------------------------


@routes.get("/people/{account_id}")
def person(page: AdmittingPage, account_id: Id) -> Response:
    return _person(page, page.services.access.account(account_id))


@routes.post("/people/{account_id}/roles")
def set_roles(page: AdminPage, account_id: Id, role: Roles = None, rater_group: Field = "") -> Response:
    found = page.services.access.account(account_id)
    roles, group = role or [], rater_group.strip()
    try:
        page.services.access.set_roles(found, roles, rater_group=group or None, actor=page.actor)
    except TastemakerError as refusal:
        return _person(page, found, status=422, roles=roles, rater_group=rater_group, problem=str(refusal))
    if found.id == page.account.id:
        return page.redirect("/sign-in", said="Your roles are changed; sign in again.")
    return page.redirect(f"/people/{account_id}", said=f"{found.name} has other roles now, and signs in anew.")


@routes.post("/people/{account_id}/disable")
def disable(page: AdmittingPage, account_id: Id) -> Response:
    account = page.services.access.disable(page.services.access.account(account_id), actor=page.actor)
    return page.redirect(f"/people/{account_id}", said=f"{account.name} is shut out; what they said and did stays.")


@routes.post("/people/{account_id}/enable")
def enable(page: AdmittingPage, account_id: Id) -> Response:
    account = page.services.access.enable(page.services.access.account(account_id), actor=page.actor)
    return page.redirect(f"/people/{account_id}", said=f"{account.name} may sign in again.")


@routes.post("/people/{account_id}/password")
def reset_password(page: AdmittingPage, account_id: Id) -> Response:
    account = page.services.access.account(account_id)
    link = page.services.access.reset_password(account, actor=page.actor)
    return _person(page, account, secret=page.address(f"/invitation/{link.token}"))


def _person(
    page: Page,
    account: Account,
    *,
    status: int = 200,
    roles: Sequence[str] | None = None,
    rater_group: str = "",
    problem: str = "",
    secret: str = "",
) -> Response:
    return page.render(
        "lead/person.html",
        status=status,
        person=account,
        is_admin=page.role == "admin",
        is_program="service" in account.roles,
        manageable=_may_manage(page, account),
        may_give=("service", "rater") if "service" in account.roles else [one for one in ROLES if one != "service"],
        roles=account.roles if roles is None else roles,
        rater_group=rater_group,
        problem=problem,
        secret=secret,
    )
