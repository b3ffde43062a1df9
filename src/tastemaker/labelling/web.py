"""What every page is made with: who asks, the services, templates, redirects with a word, limits, and refusals.

`app` says how to write a page. Handlers get a `Page`, which `require` makes only for callers of the right roles; a
refusal is Starlette's `HTTPException` with one sentence, or any error of the store.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotation of `Requirement.__call__` itself.

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path as FilePath
from typing import Annotated, Any, NoReturn
from urllib.parse import quote, urlsplit

from argon2 import PasswordHasher
from fastapi import Depends, Path
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from tastemaker.errors import TastemakerError
from tastemaker.labelling import rendering
from tastemaker.labelling.security import (
    API,
    SAFE_METHODS,
    SAID,
    VISITOR,
    Caller,
    caller_of,
    cookie_name,
    forget_cookie,
    set_cookie,
)
from tastemaker.labelling.settings import LabellingSettings, Limit
from tastemaker.store import LabelService, Store
from tastemaker.store.access import AccessService, InvitationRefused, SignInRefused
from tastemaker.store.accounts import Account, NoSuchAccount, NotAllowed
from tastemaker.store.adjudication import AdjudicationService
from tastemaker.store.audit import Actor, AuditLog
from tastemaker.store.dashboard import Dashboard
from tastemaker.store.desk import Desk
from tastemaker.store.exports import Exports
from tastemaker.store.lead import LeadService
from tastemaker.store.schema import ROLES
from tastemaker.store.screening import ScreeningService
from tastemaker.store.views import DraftConflict, NotYours, RevisionConflict, StudyLocked

HERE = FilePath(__file__).parent

# A row's number in an address; one that no database could hold would be the server's mistake and not the caller's.
Id = Annotated[int, Path(ge=1, le=2**31 - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """All that pages and API stand on; each is a class over the same store."""

    access: AccessService
    adjudication: AdjudicationService
    audit: AuditLog
    desk: Desk
    dashboard: Dashboard
    exports: Exports
    labels: LabelService
    lead: LeadService
    screening: ScreeningService

    @staticmethod
    def over(
        store: Store, *, clock: Callable[[], float] = time.time, hasher: PasswordHasher | None = None
    ) -> "Services":
        return Services(
            access=AccessService(store, clock=clock, hasher=hasher),
            adjudication=AdjudicationService(store, clock=clock),
            audit=AuditLog(store),
            desk=Desk(store, clock=clock),
            dashboard=Dashboard(store, clock=clock),
            exports=Exports(store, clock=clock),
            labels=LabelService(store, clock=clock),
            lead=LeadService(store, clock=clock),
            screening=ScreeningService(store, clock=clock),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An entry of the navigation, seen by who has one of the roles (all, where none is named)."""

    path: str
    label: str
    roles: frozenset[str] = frozenset()
    about: str = ""  # one sentence, for the home page


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """A style sheet, script or picture; its address holds its hash, so browsers may keep it for ever."""

    body: bytes
    media_type: str
    version: str


@cache
def _templates(folder: FilePath) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "raw": rendering.raw,
        "markdown": rendering.markdown,
        "visible": rendering.visible,
        "when": _when,
        "iso": lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return environment


def _when(at: float) -> str:
    """A time as read by someone whose zone is not known; `tastemaker.js` turns it into theirs."""
    return datetime.fromtimestamp(at, UTC).strftime("%d %b %Y, %H:%M UTC").lstrip("0")


_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@cache
def _static_files(folder: FilePath) -> Mapping[str, StaticFile]:
    found = {}
    for path in sorted(folder.iterdir()):
        body = path.read_bytes()
        digest = hashlib.blake2b(body, digest_size=8).hexdigest()
        found[path.name] = StaticFile(body=body, media_type=_MEDIA_TYPES[path.suffix], version=digest)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Web:
    """What all requests share."""

    services: Services
    settings: LabellingSettings
    links: Sequence[Link] = ()
    statics: Mapping[str, StaticFile] = field(default_factory=lambda: _static_files(HERE / "static"))
    templates: Environment = field(default_factory=lambda: _templates(HERE / "templates"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One request, by somebody who may make it."""

    request: Request
    web: Web
    caller: Caller
    role: str  # the role under which the caller is served; "visitor" where none is needed

    @property
    def services(self) -> Services:
        return self.web.services

    @property
    def account(self) -> Account:
        """Who has signed in."""
        assert self.caller.account is not None, "a page for visitors asks for an account"
        return self.caller.account

    @property
    def actor(self) -> Actor:
        """The same as the audit log names them, under the role that let them in."""
        return self.account.actor(self.role, request_id=self.caller.request_id)

    @property
    def links(self) -> Sequence[Link]:
        """The entries of the navigation that the caller sees."""
        return _links(self.web, self.caller)

    def address(self, path: str) -> str:
        """The full address of one of our paths, to be given to somebody."""
        return f"{self.web.settings.origins[0]}{path}"

    def render(self, template: str, *, status: int = 200, **context: object) -> Response:
        """A page: a template with what it shows."""
        return render(self.request, self.web, template, status=status, **context)

    def redirect(self, path: str, *, said: str = "", kind: str = "done") -> Response:
        """Go on to one of our pages, which shows the sentence `said` once at its top (kind: done, note or error)."""
        response = RedirectResponse(path, status_code=303)
        if said:
            value = base64.urlsafe_b64encode(json.dumps([kind, said[:500]]).encode()).decode()
            set_cookie(response, self.web.settings, SAID, value, seconds=60)
        return response

    def throttle(self, what: str, limit: Limit, *, key: str | None = None) -> None:
        """Count one act against a limit, by account unless a key is given; one too many is a 429."""
        throttle(self.services.access, f"{what}:{self.account.id if key is None else key}", limit)


def throttle(access: AccessService, key: str, limit: Limit) -> None:
    """Take a token from the bucket `key`; raise a 429 where there is none."""
    wait = access.throttle(key, capacity=limit.burst, refill_per_second=limit.per_second)
    if wait > 0:
        seconds = max(1, round(wait + 0.5))
        raise HTTPException(
            429, f"Too many requests in a short time; try again in {seconds} s.", headers={"Retry-After": str(seconds)}
        )


# --- who may come in ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Requirement:
    """A dependency that makes the `Page`: for callers who have one of the roles, or for everyone (None)."""

    roles: tuple[str, ...] | None

    async def __call__(self, request: Request) -> Page:
        caller = caller_of(request)
        return Page(request=request, web=web_of(request), caller=caller, role=self._role(request, caller))

    def _role(self, request: Request, caller: Caller) -> str:
        if self.roles is None:
            return "visitor"
        if caller.account is None:
            raise NotSignedIn(request)
        for role in self.roles:
            if role in caller.account.roles:
                return role
        raise HTTPException(
            403, f"This page is for the role {' or '.join(self.roles)}, which your account does not have."
        )


def require(*roles: str) -> Any:
    """Declare whom a handler serves: `RaterPage = Annotated[Page, require("rater")]`. No role named: all accounts."""
    unknown = set(roles) - set(ROLES)
    assert not unknown, f"no such role: {', '.join(unknown)}"
    return Depends(Requirement(roles or ROLES))


# Who sets up studies and looks after raters.
LEADS = ("lead", "admin")
LeadPage = Annotated[Page, require(*LEADS)]


def open_to_all() -> Any:
    """Declare that a handler serves visitors too."""
    return Depends(Requirement(None))


class NotSignedIn(HTTPException):
    """Nobody has signed in; `target` is where they go on to when they have."""

    def __init__(self, request: Request) -> None:
        self.target = sign_in_path(request)
        by_token = request.url.path.startswith(API)
        super().__init__(
            401,
            "Give an API token: Authorization: Bearer TOKEN." if by_token else "Your session has ended; sign in again.",
            headers={"WWW-Authenticate": "Bearer"} if by_token else None,
        )


def sign_in_path(request: Request) -> str:
    """The sign-in page, which goes on to the page asked for now."""
    if request.method != "GET" or request.url.path == "/":
        return "/sign-in"
    asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return f"/sign-in?next={quote(asked, safe='/')}"


def own_path(path: str) -> str:
    """`path` if it leads to one of our pages, else the home page: nobody is sent elsewhere after signing in."""
    if not path.startswith("/") or path[1:2] in ("/", "\\") or not path.isprintable() or "\\" in path:
        return "/"
    try:
        parts = urlsplit(path)
    except ValueError:
        return "/"
    return "/" if parts.scheme or parts.netloc else path


def web_of(request: Request) -> Web:
    web = request.app.state.web
    assert isinstance(web, Web)
    return web


# --- templates and static files -------------------------------------------------------------------------------------


def render(request: Request, web: Web, template: str, *, status: int = 200, **context: object) -> Response:
    """A page, for whoever asks."""
    caller = caller_of(request)
    said = _said(request.cookies.get(cookie_name(web.settings, SAID)))
    text = web.templates.get_template(template).render(
        {
            "account": caller.account,
            "csrf_token": caller.csrf_token,
            "links": _links(web, caller),
            "path": request.url.path,
            "request_id": caller.request_id,
            "said": said,
            "static": lambda name: f"/static/{name}?v={web.statics[name].version}",
            **context,
        }
    )
    response = HTMLResponse(text, status_code=status)
    if said:
        forget_cookie(response, web.settings, SAID)
    if caller.new_visitor and caller.visitor:
        set_cookie(response, web.settings, VISITOR, caller.visitor)
    return response


def _links(web: Web, caller: Caller) -> Sequence[Link]:
    if caller.account is None:
        return ()
    return [link for link in web.links if not link.roles or link.roles & caller.account.roles]


def _said(value: str | None) -> tuple[str, str] | None:
    """What the page before wanted said; it comes back from the browser, so it may be anything."""
    try:
        kind, text = json.loads(base64.urlsafe_b64decode(value or ""))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        return None
    return (kind, text) if kind in ("done", "note", "error") and isinstance(text, str) else None


def static_file(request: Request, name: str, v: str = "") -> Response:
    """GET /static/NAME; without the right hash in its address a file is not kept."""
    found = web_of(request).statics.get(name)
    if found is None:
        raise HTTPException(404, "There is no such file.")
    kept = "public, max-age=31536000, immutable" if v == found.version else "no-cache"
    return Response(found.body, media_type=found.media_type, headers={"Cache-Control": kept})


# --- refusals -------------------------------------------------------------------------------------------------------

# The status of an error of the store, where it is not 422.
STATUS_OF: Mapping[type[TastemakerError], int] = {
    DraftConflict: 409,
    RevisionConflict: 409,
    InvitationRefused: 410,
    NoSuchAccount: 404,
    NotAllowed: 403,
    NotYours: 404,
    SignInRefused: 403,
    StudyLocked: 403,
}


class AsciiJson(JSONResponse):
    """JSON that holds any text: half a surrogate pair, which models may write, is escaped and not an error."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def refuse(request: Request, error: Exception) -> Response:
    """What went wrong in one sentence: as a page, or as JSON to programs."""
    if isinstance(error, NotSignedIn) and request.method in SAFE_METHODS and not _wants_json(request):
        return RedirectResponse(error.target, status_code=303)
    status, sentence, headers = _explained(error)
    if _wants_json(request):
        answer = {"error": sentence, "request_id": caller_of(request).request_id}
        return AsciiJson(answer, status_code=status, headers=headers)
    response = render(
        request,
        web_of(request),
        "error.html",
        status=status,
        title=_TITLES.get(status, "Not possible"),
        sentence=sentence,
    )
    response.headers.update(headers)
    return response


_TITLES = {
    401: "Sign in again",
    403: "Not allowed",
    404: "Not found",
    405: "Not possible",
    409: "Changed meanwhile",
    410: "No longer there",
    413: "Too large",
    422: "Please check",
    429: "Too fast",
    500: "Something went wrong",
}


def _explained(error: Exception) -> tuple[int, str, Mapping[str, str]]:
    if isinstance(error, RequestValidationError):
        return 422, _first_problem(error), {}
    if isinstance(error, TastemakerError):
        return next((STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF), 422), str(error), {}
    if isinstance(error, HTTPException):
        sentence = str(error.detail)
        if not sentence.endswith((".", ")")):  # raised by the framework, which has a phrase and no sentence
            sentence = _SENTENCES.get(error.status_code, f"{sentence}.")
        return error.status_code, sentence, dict(error.headers or {})
    return 500, "The server made a mistake; nothing of this request was stored. Try again, or tell who runs it.", {}


_SENTENCES = {
    400: "The request could not be read.",
    404: "There is no such page.",
    405: "This address does not take that kind of request.",
}


def _first_problem(error: RequestValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"][1:]) or "body"
    what = str(problem["msg"])
    more = len(error.errors()) - 1
    also = f" ({more} more such problems)" if more else ""
    return f"The field {place[:80]!r} is not as it should be: {what[:1].lower()}{what[1:200]}{also}."


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith(API) or "application/json" in request.headers.get("accept", "")


def not_found() -> NoReturn:
    """For what does not exist and, alike, for what is not the caller's."""
    raise HTTPException(404, "There is no such page, or it is not yours.")
