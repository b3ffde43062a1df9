"""A store as leads find it in the middle of a round: studies of each kind, answers, a test half taken, all roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from fastapi import FastAPI
from httpx2 import Response
from tests.labelling.conftest import PASSWORD, Browser
from tests.store.conftest import Make
from tests.store.people import know_secrets, rating, work

from tastemaker.labelling.web import Services
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE, Actor
from tastemaker.store.desk import Desk
from tastemaker.store.importing import GoldItem
from tastemaker.store.schema import metadata
from tastemaker.store.tasks import DemonstrationAnswer, OutputRating, RankingAnswer

if TYPE_CHECKING:
    from tests.store.conftest import Clock

LEAD = Actor("lea", "lead")
ROLES = {
    "lea": "lead",
    "root": "admin",
    "ada": "adjudicator",
    "rea": "researcher",
    "aud": "auditor",
    "ann": "rater",
    "bob": "rater",
}
# A slash, a space and an ampersand: a name may hold anything that can be seen.
RANKING = "round 1/rankings & ties"


def open_accounts(services: Services) -> None:
    """One account for each role, named as in `ROLES`."""
    for name, role in ROLES.items():
        group = "team" if role == "rater" else None
        token = services.access.invite({role}, rater_group=group, actor=COMMAND_LINE).token
        services.access.accept(token, name=name, password=PASSWORD)


def signed_in(app: FastAPI, name: str) -> Browser:
    """A browser that sends its session's token in a header; that pages hold it is tested with their markup."""
    browser = Browser(app).sign_in(name)
    browser.headers["x-csrf-token"] = browser.token("/account")
    return browser


Fields = dict[str, str | list[str]]


def send(browser: Browser, path: str, **fields: str | list[str]) -> Response:
    """Send a form."""
    return browser.post(path, data=fields)


def upload(browser: Browser, path: str, study: str, name: str, content: bytes) -> Response:
    """Send a form with a file."""
    return browser.post(path, data={"study": study}, files={"file": (name, content)})


def fill(store: Store, services: Services, clock: Clock | None = None) -> None:
    """Rankings that ann and bob disagree on, ratings, and a demonstration that waits for a grade."""
    make = Make()
    open_accounts(services)
    services.lead.create_study(make.study("ranking", name=RANKING, overlap=2), actor=LEAD)
    services.lead.import_items(RANKING, make.items(3), actor=LEAD)
    gold = GoldItem(item=make.item("gold"), expected=RankingAnswer((("A",), ("B",), ("C",))))
    services.lead.add_gold(RANKING, [gold], actor=LEAD)
    services.lead.set_gold_share(RANKING, 0.5, actor=LEAD)
    services.lead.create_study(make.study("rating", name="ratings", overlap=2), actor=LEAD)
    services.lead.import_items("ratings", make.items(2, 2), actor=LEAD)
    services.lead.create_study(make.study("comparison", name="pairs", overlap=2), actor=LEAD)
    services.lead.import_items("pairs", make.items(1, 2), actor=LEAD)
    know_secrets(store)
    desk = Desk(store) if clock is None else Desk(store, clock=clock)
    alike = {f"key-{index}": [[0], [1], [2]] for index in range(3)} | {"gold": [[0], [1], [2]]}
    work(desk, "ann", RANKING, alike)
    work(desk, "bob", RANKING, alike | {"key-1": [[2], [0, 1]]})
    for name, quality, flags in (("ann", 6, ()), ("bob", 2, ("hallucination",))):
        while (view := desk.next_task(name, "ratings")) is not None:
            rated = rating(view.task, {0: OutputRating(quality, flags), 1: OutputRating(4)})
            desk.submit(name, view.task.id, rated)
    work(desk, "ann", "pairs", {"key-0": 0})
    work(desk, "bob", "pairs", {"key-0": 1})
    services.lead.create_study(make.study("demonstration", name="test"), actor=LEAD, screening=True)
    services.lead.import_items("test", make.items(1, 0), actor=LEAD)
    view = desk.next_task("ann", "test")
    assert view is not None
    desk.submit("ann", view.task.id, DemonstrationAnswer("What ann wrote."))


Rows = Mapping[str, Sequence[Mapping[str, Any]]]
_FILLED: dict[str, Rows] = {}  # by the store's URL


def fill_again(url: str, store: Store, services: Services, clock: Clock) -> None:
    """As `fill`, with one clock; after the first time the same rows are put back, which takes a tenth of the time."""
    if url in _FILLED:
        put_back(store, _FILLED[url])
    else:
        fill(store, services, clock)
        _FILLED[url] = rows_of(store)


def rows_of(store: Store) -> Rows:
    """All that a store holds, by its tables."""
    with store.read() as connection:
        return {
            name: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for name, table in metadata.tables.items()
        }


def put_back(store: Store, rows: Rows) -> None:
    """What a store held, into an empty one."""
    with store.write() as connection:
        for table in metadata.sorted_tables:
            if rows[table.name]:
                connection.execute(sa.insert(table), rows[table.name])
