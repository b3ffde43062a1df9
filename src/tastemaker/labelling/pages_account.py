"""The pages about oneself: signing in and out, accepting an invitation, password, sessions and API tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Form
from starlette.responses import Response

from tastemaker.errors import StoreError
from tastemaker.labelling.security import SESSION, VISITOR, forget_cookie, set_cookie
from tastemaker.labelling.settings import network_of
from tastemaker.labelling.web import Id, Link, Page, open_to_all, own_path, require
from tastemaker.store.access import SESSION_ABSOLUTE
from tastemaker.store.accounts import Account, plain_name
from tastemaker.store.passwords import SHORTEST_PASSWORD

routes = APIRouter()
LINKS: Sequence[Link] = ()  # these pages stand in the page's head, not in its navigation

AnyPage = Annotated[Page, open_to_all()]
OwnPage = Annotated[Page, require()]
Field = Annotated[str, Form()]


# --- coming and going -----------------------------------------------------------------------------------------------


@routes.get("/sign-in")
def sign_in_form(page: AnyPage, next: str = "/") -> Response:
    if page.caller.account is not None:
        return page.redirect(own_path(next))
    return page.render("sign_in.html", next=own_path(next), name="", problem="")


@routes.post("/sign-in")
def sign_in(page: AnyPage, name: Field = "", password: Field = "", next: Field = "/") -> Response:
    _slow_down(page)
    page.throttle("sign-in name", page.web.settings.sign_in_by_account, key=plain_name(name).casefold())
    try:
        account = page.services.access.sign_in(name, password, request_id=page.caller.request_id)
    except StoreError as refusal:
        return page.render("sign_in.html", status=403, next=own_path(next), name=name, problem=str(refusal))
    return _begin_session(page, account, page.redirect(own_path(next)))


@routes.post("/sign-out")
def sign_out(page: OwnPage) -> Response:
    assert page.caller.session is not None
    page.services.access.end_session(page.caller.session, request_id=page.caller.request_id)
    return _end_session(page, page.redirect("/sign-in", said="You are signed out."))


@routes.post("/sign-out-everywhere")
def sign_out_everywhere(page: OwnPage) -> Response:
    page.services.access.end_sessions(page.account, request_id=page.caller.request_id)
    return _end_session(page, page.redirect("/sign-in", said="You are signed out, here and everywhere else."))


@routes.get("/invitation/{token}")
def invitation(page: AnyPage, token: str) -> Response:
    _slow_down(page)
    return _invitation_form(page, token)


@routes.post("/invitation/{token}")
def accept(page: AnyPage, token: str, name: Field = "", password: Field = "", again: Field = "") -> Response:
    _slow_down(page)
    try:
        if password != again:
            raise StoreError("The two passwords differ; type the same one twice.")
        account = page.services.access.accept(token, name=name, password=password, request_id=page.caller.request_id)
    except StoreError as refusal:
        return _invitation_form(page, token, status=422, name=name, problem=str(refusal))
    return _begin_session(page, account, page.redirect("/", said=f"Welcome, {account.name}."))


def _invitation_form(page: Page, token: str, *, status: int = 200, name: str = "", problem: str = "") -> Response:
    """The form, as long as the invitation is open: else its refusal rises."""
    invited = page.services.access.invitation(token)
    return page.render(
        "invitation.html", status=status, invited=invited, name=name, problem=problem, shortest=SHORTEST_PASSWORD
    )


def _slow_down(page: Page) -> None:
    client = page.request.client
    network = network_of(client.host if client else "")
    page.throttle("sign-in address", page.web.settings.sign_in_by_address, key=network)


def _begin_session(page: Page, account: Account, response: Response) -> Response:
    """A new session with a new secret: one planted in this browser beforehand is worth nothing."""
    session = page.services.access.open_session(account, replacing=page.caller.session)
    set_cookie(response, page.web.settings, SESSION, session.token, seconds=round(SESSION_ABSOLUTE.total_seconds()))
    forget_cookie(response, page.web.settings, VISITOR)
    return response


def _end_session(page: Page, response: Response) -> Response:
    forget_cookie(response, page.web.settings, SESSION)
    return response


# --- one's own account ----------------------------------------------------------------------------------------------


@routes.get("/account")
def account(page: OwnPage) -> Response:
    return _account(page)


@routes.post("/account/password")
def change_password(page: OwnPage, current: Field = "", new: Field = "", again: Field = "") -> Response:
    page.throttle("password", page.web.settings.sign_in_by_account)
    try:
        if new != again:
            raise StoreError("The two new passwords differ; type the same one twice.")
        page.services.access.change_password(
            page.account,
            current=current,
            new=new,
            except_token=page.caller.session,
            request_id=page.caller.request_id,
        )
    except StoreError as refusal:
        return _account(page, status=422, password_problem=str(refusal))
    return page.redirect("/account", said="Your password is changed. Other browsers are signed out.")


@routes.post("/account/sign-out-elsewhere")
def sign_out_elsewhere(page: OwnPage) -> Response:
    ended = page.services.access.end_sessions(
        page.account, except_token=page.caller.session, request_id=page.caller.request_id
    )
    said = (
        f"Signed out in {ended} other browser{'' if ended == 1 else 's'}." if ended else "You were signed in only here."
    )
    return page.redirect("/account", said=said)


@routes.post("/account/tokens")
def create_token(page: OwnPage, label: Field = "") -> Response:
    try:
        secret = page.services.access.create_api_token(page.account, label.strip())
    except StoreError as refusal:
        return _account(page, status=422, token_problem=str(refusal))
    return _account(page, new_token=secret)


@routes.post("/account/tokens/{token_id}/revoke")
def revoke_token(page: OwnPage, token_id: Id) -> Response:
    page.services.access.revoke_api_token(page.account, token_id)
    return page.redirect("/account#tokens", said="The token works no longer.")


def _account(
    page: Page, *, status: int = 200, password_problem: str = "", token_problem: str = "", new_token: str = ""
) -> Response:
    return page.render(
        "account.html",
        status=status,
        tokens=page.services.access.api_tokens(page.account),
        password_problem=password_problem,
        token_problem=token_problem,
        new_token=new_token,
        shortest=SHORTEST_PASSWORD,
    )
