"""Running the labelling application: one process or several, on an address that only this machine reaches.

Passwords never travel in the clear: a bind that others can reach is refused unless people come over TLS, which a proxy
in front ends (`--origin https://...`). The socket is bound before anything else, so that a taken port is one sentence.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from tastemaker.errors import ConfigError
from tastemaker.labelling.app import create_app
from tastemaker.labelling.settings import LOOPBACK, LabellingSettings, is_loopback, loopback_origins
from tastemaker.store import Store
from tastemaker.store.access import AccessService
from tastemaker.store.audit import COMMAND_LINE

ADMIN_LINK_VALID = timedelta(days=1)
# How long requests may go on after the server was told to stop. Answers that were acknowledged are stored already.
STOP_SECONDS = 10
# To the database, of all processes together: PostgreSQL takes 100 if it is not told otherwise, other programs' too.
CONNECTIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to listen, where people think they are, and whose word on their addresses counts."""

    host: str = "127.0.0.1"
    port: int = 8000
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()


def bind(address: Address) -> tuple[socket.socket, LabellingSettings]:
    """Listen, and say under which addresses people reach it.

    Raises:
        ConfigError: others could reach it in the clear, or the address cannot be had.
    """
    proxies = address.proxies or LOOPBACK
    given = LabellingSettings(origins=address.origins, proxies=proxies) if address.origins else None
    behind_tls = given is not None and given.secure
    if not is_loopback(address.host) and not behind_tls:
        raise ConfigError(
            f"--host {address.host} can be reached by others, and passwords would travel in the clear. Put a proxy "
            "that ends TLS in front and give its address, such as --origin https://labels.example.org, or leave out "
            "--host."
        )
    if address.proxies and not behind_tls:
        raise ConfigError(
            f"--proxy {address.proxies[0]} was given without the https:// address that people type; give that too, "
            "such as --origin https://labels.example.org."
        )
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # With its protocol named, or else asyncio would not switch Nagle's algorithm off (TCP_NODELAY) on connections: an
    # answer is written in two pieces, and the second would wait some 40 ms until the browser acknowledges the first.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address.host.strip("[]"), address.port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(
            f"Cannot listen on {address.host}, port {address.port} ({error}); give another --port, or 0 for a free one."
        ) from error
    listening.listen(2048)
    port: int = listening.getsockname()[1]
    return listening, given or LabellingSettings(origins=loopback_origins(port))


def admin_link(store: Store, settings: LabellingSettings) -> str | None:
    """A link that makes its user the administrator; None if there is one already."""
    access = AccessService(store)
    if any("admin" in account.roles and not account.disabled for account in access.accounts()):
        return None
    return invitation_link(
        access.invite({"admin"}, actor=COMMAND_LINE, valid=ADMIN_LINK_VALID).token, settings.origins[0]
    )


def invitation_link(token: str, origin: str) -> str:
    """What to give to who was invited."""
    return f"{origin}/invitation/{token}"


def serve(database: str | Path, listening: socket.socket, settings: LabellingSettings, *, workers: int = 1) -> None:
    """Answer requests until told to stop (SIGTERM or SIGINT), then finish those that run."""
    config = uvicorn.Config(
        partial(_create_app, database, settings, connections_each(workers)),
        factory=True,
        workers=workers,
        log_level="warning",
        access_log=False,  # addresses hold invitations
        server_header=False,
        proxy_headers=settings.secure,  # only then is there a proxy
        forwarded_allow_ips=list(settings.proxies),  # and from nobody else is X-Forwarded-For believed
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # stopping is no failure; uvicorn sees to it and then raises it again
        signal.signal(number, lambda *_: None)
    if workers == 1:
        uvicorn.Server(config).run(sockets=[listening])
    else:
        Multiprocess(config, [listening]).run()


def connections_each(workers: int) -> int:
    """How many connections to the database one of so many processes may have."""
    return max(1, CONNECTIONS // workers)


def _create_app(database: str | Path, settings: LabellingSettings, connections: int) -> FastAPI:
    store = Store.open(database, connections=connections)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = create_app(store, settings)
    app.router.lifespan_context = lifespan
    return app
