"""The labelling application: `create_app(store, settings)` joins the guard, the pages and the API.

How to write a page, in a module of its own (`pages_account` is an example):

    routes, LeadPage = APIRouter(), Annotated[Page, require("lead", "admin")]
    LINKS = (Link(path="/studies", label="Studies", roles=frozenset({"lead", "admin"}), about="One sentence."),)

    @routes.get("/studies")
    def studies(page: LeadPage) -> Response:
        return page.render("studies.html", studies=page.services.labels.studies())

    @routes.post("/studies/{name}/close")
    def close(page: LeadPage, name: str, reason: Annotated[str, Form()] = "") -> Response:
        page.services.lead.close(name, reason, actor=page.actor)
        return page.redirect("/studies", said="The study is closed.")

and name it in `MODULES` below; a new service goes into `web.Services`.

- **Roles.** Each handler takes a `Page` by `require(*roles)` (any of them; none: all accounts) or `open_to_all()`. One
  without keeps the application from starting. `page.account` is who asks, `page.actor` the same for the audit log.
- **Errors.** Let the store's errors rise: each becomes a page (JSON under /api/ and for who accepts JSON) with its one
  sentence, 422 unless `web.STATUS_OF` says otherwise; `not_found()` for what is not theirs; else `HTTPException(status,
  "A sentence.")`. Form fields have a default of "" and are checked by the service, so that an empty one gets its words.
- **A word at the top of the next page:** `page.redirect(path, said=...)`; after a POST always redirect, except to show
  a secret or a form with its problem.
- **Forms:** `<form method="post">{{ ui.csrf(csrf_token) }}`; scripts send the header X-CSRF-Token with the content of
  `<meta name="csrf-token">`. Without it, or from elsewhere, a POST reaches no handler. Uploads (files of a
  multipart form) beyond 1 MB go to paths that end in /import, by leads.
- **Text of models and people:** `{{ text | raw }}` or `{{ text | markdown }}` (blocks), `{{ name | visible }}` (a
  line); never `| safe`. Conversations: `ui.conversation(messages)`.
- **Limits:** `page.throttle("claim", page.web.settings.claim)`.
- **Look:** templates extend base.html and import macros.html as ui; the style sheet names its parts at its top.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated

from argon2 import PasswordHasher
from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tastemaker import __version__
from tastemaker.errors import TastemakerError
from tastemaker.labelling import (
    api,
    pages_account,
    pages_figures,
    pages_people,
    pages_rater,
    pages_records,
    pages_review,
    pages_studies,
)
from tastemaker.labelling.security import Guard
from tastemaker.labelling.settings import LabellingSettings
from tastemaker.labelling.web import Page, Requirement, Services, Web, open_to_all, refuse, require, static_file
from tastemaker.store import Store

# The modules of pages: each has `routes` and `LINKS`, its entries of the navigation.
MODULES = (
    pages_account,
    pages_rater,
    pages_studies,
    pages_figures,
    pages_review,
    pages_people,
    pages_records,
    api,
)

routes = APIRouter()


@routes.get("/")
def home(page: Annotated[Page, require()]) -> Response:
    """Where people land: what their roles let them do, or the one thing if there is only one."""
    links = page.links
    if len(links) == 1:
        return page.redirect(links[0].path)
    return page.render("home.html")


@routes.get("/health")
def health(page: Annotated[Page, open_to_all()]) -> Response:
    """For whoever watches the server: that it answers."""
    return Response("ok\n", media_type="text/plain")


@routes.get("/static/{name}")
def static(request: Request, page: Annotated[Page, open_to_all()], name: str, v: str = "") -> Response:
    """Style sheets, scripts and pictures."""
    return static_file(request, name, v)


def create_app(
    store: Store,
    settings: LabellingSettings,
    *,
    clock: Callable[[], float] = time.time,
    hasher: PasswordHasher | None = None,
) -> FastAPI:
    """The application over a store."""
    services = Services.over(store, clock=clock, hasher=hasher)
    routers = (routes, *(module.routes for module in MODULES))
    for router in routers:
        check_declared(router)
    # As they are: `include_router` would make each of them anew, which the first people to come would wait for.
    app = FastAPI(
        routes=[route for router in routers for route in router.routes],
        title="Tastemaker labelling",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would be made of the Host header
    )
    links = [link for module in MODULES for link in module.LINKS]
    app.state.web = Web(services=services, settings=settings, links=links)
    app.add_middleware(Guard, settings=settings, access=services.access, refuse=refuse)
    for kind in (HTTPException, RequestValidationError, TastemakerError):  # the guard sees to all others
        app.add_exception_handler(kind, refuse)
    return app


def check_declared(router: APIRouter) -> None:
    """Refuse a handler that does not say whom it serves."""
    for route in router.routes:
        declared = isinstance(route, APIRoute) and any(
            isinstance(one.call, Requirement) for one in _dependencies(route.dependant)
        )
        assert declared, f"{route} does not say whom it serves; give its handler a Page by require() or open_to_all()"


def _dependencies(dependant: Dependant) -> Iterator[Dependant]:
    for one in dependant.dependencies:
        yield one
        yield from _dependencies(one)
