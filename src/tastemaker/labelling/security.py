"""The guard in front of every request: what is not let in here reaches no handler.

In this order: the Host header is one of ours (a name rebound to this machine is not); the caller is known by cookie or,
under /api/, by bearer token and never by cookie; an unsafe request comes from our own pages, by the browser's word
(Origin, Sec-Fetch-Site) and by the token that only our pages hold (CSRF); its body is neither too large nor too slow.
Whatever the answer, it leaves with a content security policy that lets nothing run that is not ours.

All of this is one ASGI middleware that denies by default, so no handler can forget it. A handler itself declares
the roles it serves (`web.require`).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio.to_thread import run_sync
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tastemaker.labelling.settings import LabellingSettings
from tastemaker.store.access import AccessService
from tastemaker.store.accounts import Account

_log = logging.getLogger("tastemaker.labelling")

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
CSRF_FIELD, CSRF_HEADER = "csrf_token", "x-csrf-token"
API, STATIC = "/api/", "/static/"
IMPORTERS = frozenset({"admin", "lead"})

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ]
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    # Not `no-referrer`: browsers then send `Origin: null` with our own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=()",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request: an account, or a visitor who has not signed in."""

    request_id: str
    csrf_token: str = ""
    account: Account | None = None
    session: str | None = None  # the cookie's secret
    visitor: str | None = None  # the secret from which a visitor's CSRF token is made
    new_visitor: bool = False  # the browser does not have that secret yet


def caller_of(request: Request) -> Caller:
    """Whom the guard found behind this request."""
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


# --- cookies --------------------------------------------------------------------------------------------------------


def cookie_name(settings: LabellingSettings, what: str) -> str:
    """`__Host-` makes browsers refuse the cookie from another host, from a path, or without TLS."""
    return f"__Host-tastemaker{what}" if settings.secure else f"tastemaker{what}"


def set_cookie(
    response: Response, settings: LabellingSettings, what: str, value: str, *, seconds: int | None = None
) -> None:
    """Set one of our cookies; without `seconds` it goes when the browser is closed."""
    response.set_cookie(
        cookie_name(settings, what),
        value,
        max_age=seconds,
        path="/",
        secure=settings.secure,
        httponly=True,
        samesite="lax",
    )


def forget_cookie(response: Response, settings: LabellingSettings, what: str) -> None:
    """Make the browser drop one of our cookies."""
    set_cookie(response, settings, what, "", seconds=0)


# What comes after the product's name in the name of a cookie.
SESSION, VISITOR, SAID = "", "-visitor", "-said"


def _visitor_token(secret: str) -> str:
    return hashlib.blake2b(secret.encode(), digest_size=24, person=b"csrf").hexdigest()


# --- the guard ------------------------------------------------------------------------------------------------------


class Guard:
    """ASGI middleware; `refuse` makes the response to what is not let in."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: LabellingSettings,
        access: AccessService,
        refuse: Callable[[Request, Exception], Response],
    ) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # starting and stopping; there are no websockets
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        caller = Caller(request_id=secrets.token_hex(8))
        state = scope.setdefault("state", {})
        state["caller"] = caller
        started = False

        async def sender(message: Message) -> None:
            nonlocal started
            started = True
            await send(self._with_headers(message, caller.request_id))

        try:
            receive = await self._admit(request, receive)
            await self._app(scope, receive, sender)
        except ClientDisconnect:
            return
        except Exception as error:
            if not isinstance(error, HTTPException):  # a mistake of ours
                _log.exception("request %s: %s %s", caller.request_id, request.method, request.scope.get("route", ""))
            if started:
                raise
            await self._refuse(request, error)(scope, receive, sender)

    async def _admit(self, request: Request, receive: Receive) -> Receive:
        """Find out who asks and let the request in, or raise; what is returned gives its body."""
        state = request.scope["state"]
        self._check_host(request)
        state["caller"] = caller = await self._identify(request, state["caller"].request_id)
        if request.method in SAFE_METHODS:
            return receive
        by_token = request.scope["path"].startswith(API)
        if not by_token:
            self._check_origin(request)
        body = await self._read(request, caller)
        if not by_token:
            await _check_csrf_token(Request(request.scope, _replay(body, receive)), caller)
        return _replay(body, receive)

    def _with_headers(self, message: Message, request_id: str) -> Message:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(HEADERS)
            headers["x-request-id"] = request_id
            headers.setdefault("cache-control", "no-store")
            if self._settings.secure:
                headers["strict-transport-security"] = "max-age=31536000"
        return message

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "").lower()
        if host not in self._settings.hosts:
            raise HTTPException(
                421, f"This server does not answer to the name {host[:80]!r}; it is at {self._settings.origins[0]}."
            )

    async def _identify(self, request: Request, request_id: str) -> Caller:
        path = request.scope["path"]
        if path.startswith(STATIC):
            return Caller(request_id=request_id)
        if path.startswith(API):
            scheme, _, secret = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secret.strip():
                return Caller(request_id=request_id)
            account = await run_sync(self._access.account_of_api_token, secret.strip())
            return Caller(request_id=request_id, account=account)
        token = request.cookies.get(cookie_name(self._settings, SESSION))
        signed_in = await run_sync(self._access.session, token) if token else None
        if signed_in is not None:
            return Caller(
                request_id=request_id, csrf_token=signed_in.csrf_token, account=signed_in.account, session=token
            )
        known = request.cookies.get(cookie_name(self._settings, VISITOR))
        visitor = known or secrets.token_urlsafe(24)
        return Caller(
            request_id=request_id, csrf_token=_visitor_token(visitor), visitor=visitor, new_visitor=known is None
        )

    def _check_origin(self, request: Request) -> None:
        """Every browser of the last years says where a form comes from; who says nothing is not let in."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        scheme = "https" if self._settings.secure else "http"
        ours = (None, f"{scheme}://{request.headers['host'].lower()}")
        if origin not in ours or site not in (None, "same-origin") or (origin is None and site is None):
            raise HTTPException(
                403, "This request did not come from a page of this server; open the page and try again."
            )

    async def _read(self, request: Request, caller: Caller) -> bytes:
        limit = self._settings.body_limit
        if request.scope["path"].endswith("/import") and caller.account and caller.account.roles & IMPORTERS:
            limit = self._settings.import_limit
        refusal = HTTPException(413, f"The request is larger than {limit >> 20} MB, which is the most that is taken.")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise refusal
        chunks, size = [], 0
        try:
            with anyio.fail_after(self._settings.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise refusal
                    chunks.append(chunk)
        except TimeoutError:
            raise HTTPException(408, "The request took too long to arrive; try again.") from None
        return b"".join(chunks)


async def _check_csrf_token(request: Request, caller: Caller) -> None:
    given = request.headers.get(CSRF_HEADER, "")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not given and kind in ("application/x-www-form-urlencoded", "multipart/form-data"):
        async with request.form() as form:
            field = form.get(CSRF_FIELD)
            given = field if isinstance(field, str) else ""
    if not hmac.compare_digest(given.encode(errors="replace"), caller.csrf_token.encode()):
        raise HTTPException(
            403, "This page is out of date, perhaps because you signed in or out elsewhere; open it anew and try again."
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
