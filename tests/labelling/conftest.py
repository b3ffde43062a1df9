"""The labelling application over both databases, and browsers that use it as people do."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import argon2
import pytest
import uvicorn
from fastapi import FastAPI
from httpx2 import Response
from starlette.testclient import TestClient
from tests.browsers import chromium  # noqa: F401
from tests.store.conftest import (  # noqa: F401
    Clock,
    Make,
    clock,
    compiled,
    make,
    postgresql,
    postgresql_server,
    service,
    sqlite,
    sqlite_template,
    store,
    url,
)

from tastemaker.labelling.app import create_app
from tastemaker.labelling.serve import Address, bind
from tastemaker.labelling.settings import LabellingSettings
from tastemaker.labelling.web import Services
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE

ORIGIN = "http://127.0.0.1:8000"
PASSWORD = "four plain words here"
PATIENCE = 120_000.0  # milliseconds that a page may take on a machine with more to do than this
CSRF = re.compile(r'name="csrf_token" value="([^"]+)"')
# The real function with the least work: a test of the work itself takes the default.
QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


class Browser(TestClient):
    """A browser without JavaScript: it keeps cookies, sends Origin, and fills in the forms that pages hold."""

    __test__ = False  # pytest takes names that begin with Test for tests, the base's is one

    def __init__(self, app: FastAPI, address: str = "127.0.0.1") -> None:
        super().__init__(app, base_url=ORIGIN, follow_redirects=False, client=(address, 50000))
        self.headers["origin"] = ORIGIN

    def token(self, path: str = "/sign-in") -> str:
        """The CSRF token of a page's forms."""
        found = CSRF.search(self.get(path).text)
        assert found, f"{path} has no form"
        return found[1]

    def submit(self, path: str, *, form: str | None = None, **fields: str) -> Response:
        """Fill in the form of the page `form` (the path itself) and send it to the path."""
        return self.post(path, data={"csrf_token": self.token(form or path), **fields})

    def sign_in(self, name: str, password: str = PASSWORD) -> Browser:
        answer = self.submit("/sign-in", name=name, password=password)
        assert answer.status_code == 303, answer.text
        return self


class People:
    """Accounts by few words."""

    def __init__(self, app: FastAPI, services: Services) -> None:
        self._app, self._services = app, services

    def account(self, name: str, *roles: str) -> None:
        invited = self._services.access.invite(
            set(roles), rater_group="team" if "rater" in roles else None, actor=COMMAND_LINE
        )
        self._services.access.accept(invited.token, name=name, password=PASSWORD)

    def browser(self, name: str, *roles: str) -> Browser:
        """A browser in which a new account has signed in."""
        self.account(name, *roles)
        return Browser(self._app).sign_in(name)


@pytest.fixture
def settings() -> LabellingSettings:
    return LabellingSettings(origins=(ORIGIN, "http://localhost:8000"))


@pytest.fixture
def app(store: Store, clock: Clock, settings: LabellingSettings) -> FastAPI:  # noqa: F811
    return create_app(store, settings, clock=clock, hasher=QUICK)


@pytest.fixture
def services(app: FastAPI) -> Services:
    found = app.state.web.services
    assert isinstance(found, Services)
    return found


@pytest.fixture
def browser(app: FastAPI) -> Iterator[Browser]:
    """A visitor's browser."""
    with Browser(app) as found:
        yield found


@pytest.fixture
def people(app: FastAPI, services: Services) -> People:
    return People(app, services)


@contextmanager
def served(store: Store, add: Callable[[FastAPI], None] = lambda _app: None) -> Iterator[str]:  # noqa: F811
    """The application answering on a port of this machine; its address. `add` may give it further routes."""
    listening, found = bind(Address(port=0))
    app = create_app(store, found, hasher=QUICK)
    add(app)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield found.origins[0]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
