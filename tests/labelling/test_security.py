"""Each guard of the labelling application, with a test that fails when the guard is taken away."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Annotated

import anyio
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, FastAPI
from starlette.responses import Response
from starlette.types import Message
from tests.labelling.conftest import ORIGIN, PASSWORD, QUICK, Browser, People
from tests.store.conftest import Clock, Make

from tastemaker.errors import ConfigError
from tastemaker.labelling import pages_account
from tastemaker.labelling.app import MODULES, check_declared, create_app
from tastemaker.labelling.settings import LabellingSettings, Limit, network_of
from tastemaker.labelling.web import Page, Services, own_path, require
from tastemaker.store import Store
from tastemaker.store.schema import accounts

SENTENCE = re.compile(r"<p>([A-Z][^<]+[.])</p>")


def refused(answer: Response | object, status: int) -> None:
    """A refusal has its status and says one sentence."""
    assert getattr(answer, "status_code", None) == status, getattr(answer, "text", "")
    assert SENTENCE.search(getattr(answer, "text", ""))


# --- where a request comes from ---------------------------------------------------------------------------------------


def test_a_form_without_its_token_is_refused(browser: Browser, people: People) -> None:
    people.account("ann", "rater")
    fields = {"name": "ann", "password": PASSWORD}
    browser.get("/sign-in")
    refused(browser.post("/sign-in", data=fields), 403)
    refused(browser.post("/sign-in", data={**fields, "csrf_token": ""}), 403)
    refused(browser.post("/sign-in", data={**fields, "csrf_token": "é" * 48}), 403)
    refused(browser.post("/sign-in", json={**fields, "csrf_token": browser.token()}), 403)
    assert browser.submit("/sign-in", **fields).status_code == 303


def test_a_token_of_another_session_is_refused(people: People) -> None:
    ann, mallory = people.browser("ann", "rater"), people.browser("mallory", "rater")
    foreign = mallory.token("/account")
    refused(ann.post("/account/tokens", data={"csrf_token": foreign, "label": "x"}), 403)
    # A visitor's token, planted before signing in, is no good after it either.
    visitor = Browser(ann.app)  # type: ignore[arg-type]
    planted = visitor.token()
    visitor.sign_in("ann")
    refused(visitor.post("/account/tokens", data={"csrf_token": planted, "label": "x"}), 403)


def test_a_token_of_another_visitor_is_refused(app: FastAPI, people: People) -> None:
    """Or somebody could be signed in to an account that is not theirs, and work there."""
    people.account("ann", "rater")
    victim, foreign = Browser(app), Browser(app).token()
    assert victim.token() != foreign
    refused(victim.post("/sign-in", data={"csrf_token": foreign, "name": "ann", "password": PASSWORD}), 403)


def test_scripts_send_the_token_in_a_header(people: People) -> None:
    ann = people.browser("ann", "rater")
    assert ann.post("/sign-out", headers={"x-csrf-token": ann.token("/account")}).status_code == 303


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8001"},
        {"origin": "http://localhost:8000"},  # ours too, but not where the form is sent
        {"origin": ORIGIN, "sec-fetch-site": "cross-site"},
        {"origin": ORIGIN, "sec-fetch-site": "same-site"},
        {"origin": ORIGIN, "sec-fetch-site": "none"},
    ],
)
def test_a_form_from_elsewhere_is_refused_even_with_its_token(people: People, headers: dict[str, str]) -> None:
    ann = people.browser("ann", "rater")
    token = ann.token("/account")
    refused(ann.post("/sign-out", data={"csrf_token": token}, headers=headers), 403)
    assert ann.get("/account").status_code == 200


def test_a_form_that_does_not_say_where_it_comes_from_is_refused(people: People) -> None:
    ann = people.browser("ann", "rater")
    token = ann.token("/account")
    del ann.headers["origin"]
    refused(ann.post("/sign-out", data={"csrf_token": token}), 403)
    answer = ann.post("/sign-out", data={"csrf_token": token}, headers={"sec-fetch-site": "same-origin"})
    assert answer.status_code == 303


def test_a_name_that_someone_else_made_point_here_is_refused(browser: Browser) -> None:
    refused(browser.get("/sign-in", headers={"host": "evil.example"}), 421)
    refused(browser.get("/sign-in", headers={"host": "evil.example:8000"}), 421)
    assert browser.get("/sign-in", headers={"host": "LOCALHOST:8000"}).status_code == 200


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_planted_session_is_never_taken_up(app: FastAPI, people: People) -> None:
    mallory = people.browser("mallory", "rater")
    theirs = mallory.cookies["tastemaker"]
    people.account("ann", "rater")
    victim = Browser(app)
    for planted in ("chosen-by-mallory", theirs):
        victim.cookies.clear()
        victim.cookies.set("tastemaker", planted)
        token = victim.token("/account" if planted == theirs else "/sign-in")
        answer = victim.post("/sign-in", data={"csrf_token": token, "name": "ann", "password": PASSWORD})
        assert answer.status_code == 303
        assert planted not in answer.headers["set-cookie"]
    assert mallory.get("/account").status_code == 303, "the session that was planted has ended"


def test_signing_out_ends_the_session_itself(people: People) -> None:
    ann = people.browser("ann", "rater")
    kept = ann.cookies["tastemaker"]
    assert ann.submit("/sign-out", form="/account").status_code == 303
    ann.cookies.set("tastemaker", kept)
    assert ann.get("/account").headers["location"] == "/sign-in?next=/account"


def test_sessions_end_when_idle(people: People, clock: Clock) -> None:
    ann = people.browser("ann", "rater")
    clock.now += 11 * 3600
    assert ann.get("/account").status_code == 200
    clock.now += 11 * 3600
    assert ann.get("/account").status_code == 200, "activity extends it"
    clock.now += 12 * 3600 + 1
    assert ann.get("/account").status_code == 303


def test_cookies_are_kept_from_scripts_and_other_sites(browser: Browser, people: People) -> None:
    people.account("ann", "rater")
    answer = browser.submit("/sign-in", name="ann", password=PASSWORD)
    (cookie,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith("tastemaker=")]
    assert {"HttpOnly", "Path=/", "SameSite=lax"} <= set(cookie.split("; "))


def test_over_tls_cookies_stay_there(store: Store, clock: Clock) -> None:
    app = create_app(store, LabellingSettings(origins=("https://labels.example.org",)), clock=clock)
    browser = Browser(app)
    answer = browser.get("https://labels.example.org/sign-in")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-tastemaker-visitor=")
    assert {"Secure", "HttpOnly", "Path=/"} <= set(cookie.split("; "))
    assert "domain" not in cookie.lower()
    assert answer.headers["strict-transport-security"]


@pytest.mark.parametrize(
    "path",
    ["//evil.example", "/\\evil.example", "https://evil.example", "javascript:alert(1)", "/a\n/b", "", "a", "/\t/x"],
)
def test_nobody_is_sent_elsewhere_after_signing_in(browser: Browser, people: People, path: str) -> None:
    assert own_path(path) == "/"
    people.account("ann", "rater")
    assert browser.submit("/sign-in", name="ann", password=PASSWORD, next=path).headers["location"] == "/"


def test_the_page_asked_for_is_shown_after_signing_in(browser: Browser, people: People) -> None:
    people.account("ann", "rater")
    target = browser.get("/account?a=1&b=2").headers["location"]
    assert target == "/sign-in?next=/account%3Fa%3D1%26b%3D2"
    assert 'value="/account?a=1&amp;b=2"' in browser.get(target).text
    assert own_path("/account?a=1&b=2#c") == "/account?a=1&b=2#c"


# --- roles ----------------------------------------------------------------------------------------------------------


def add_lead_page(app: FastAPI) -> None:
    router = APIRouter()

    @router.get("/for-leads")
    @router.post("/for-leads")
    @router.post("/for-leads/import")
    @router.get("/api/v1/for-leads")
    @router.post("/api/v1/for-leads")
    def for_leads(page: Annotated[Page, require("lead", "admin")]) -> Response:
        return Response(f"{page.actor.name} as {page.actor.role}")

    @router.get("/broken")
    def broken(page: Annotated[Page, require()]) -> Response:
        raise ZeroDivisionError("a secret of the server")

    app.include_router(router)


@pytest.mark.parametrize("role", ["rater", "researcher", "auditor", "adjudicator"])
def test_a_page_serves_its_roles_alone(app: FastAPI, people: People, role: str) -> None:
    add_lead_page(app)
    refused(people.browser("ann", role).get("/for-leads"), 403)


def test_a_page_is_served_under_the_role_that_lets_in(app: FastAPI, people: People) -> None:
    add_lead_page(app)
    assert people.browser("ann", "admin", "rater").get("/for-leads").text == "ann as admin"
    assert Browser(app).get("/for-leads").status_code == 303
    refused(Browser(app).submit("/for-leads", form="/sign-in"), 401)


def test_a_handler_must_say_whom_it_serves() -> None:
    router = APIRouter()

    @router.get("/forgotten")
    def forgotten() -> str:
        return "everybody sees this"

    with pytest.raises(AssertionError, match="does not say whom it serves"):
        check_declared(router)


def test_the_application_does_not_start_with_a_handler_that_does_not_say(
    store: Store, settings: LabellingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = APIRouter()
    router.add_api_route("/forgotten", lambda: "everybody sees this")
    monkeypatch.setattr(pages_account, "routes", router)
    with pytest.raises(AssertionError, match="does not say whom it serves"):
        create_app(store, settings)


def test_the_application_serves_the_routes_that_are_there_and_makes_none_anew(app: FastAPI) -> None:
    served = {id(route) for route in app.routes}
    assert served >= {id(route) for module in MODULES for route in module.routes.routes}


# --- passwords ------------------------------------------------------------------------------------------------------


def test_the_application_hashes_as_the_library_recommends(store: Store, settings: LabellingSettings) -> None:
    app = create_app(store, settings)
    People(app, app.state.web.services).account("ann", "rater")
    with store.read() as connection:
        stored = connection.execute(sa.select(accounts.c.password_hash)).scalar_one()
    assert stored.startswith("$argon2id$v=19$m=65536,t=3,p=4$")


# --- the API: by token, never by cookie -----------------------------------------------------------------------------


def test_the_api_takes_tokens_and_never_cookies(app: FastAPI, people: People, services: Services) -> None:
    add_lead_page(app)
    ann = people.browser("ann", "lead")
    answer = ann.get("/api/v1/for-leads")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"].startswith("Give an API token")
    assert ann.post("/api/v1/for-leads", data={"csrf_token": ann.token("/account")}).status_code == 401
    (account,) = services.access.accounts()
    program = Browser(app)
    program.headers["authorization"] = f"Bearer {services.access.create_api_token(account, 'x')}"
    del program.headers["origin"]
    assert program.post("/api/v1/for-leads").text == "ann as lead"
    assert program.get("/for-leads").status_code == 303, "pages take no tokens"
    program.headers["authorization"] = "Bearer tastemaker_wrong"
    assert program.get("/api/v1/for-leads").status_code == 401


# --- size, pace, mistakes -------------------------------------------------------------------------------------------


def test_large_requests_are_refused(browser: Browser, people: People) -> None:
    big = "x" * (1 << 20)
    refused(browser.post("/sign-in", data={"name": big}), 413)
    declared = {"content-length": str(1 << 30)}
    refused(browser.post("/sign-in", content=b"x", headers=declared), 413)  # before any of it has come
    refused(browser.post("/sign-in", content=iter([b"x" * (1 << 19)] * 3)), 413)  # its length is not declared
    refused(people.browser("ann", "rater").post("/for-leads/import", files={"rows": big}), 413)


def test_leads_may_import_more(app: FastAPI, people: People) -> None:
    add_lead_page(app)
    lead = people.browser("ann", "lead")
    token, rows = {"csrf_token": lead.token("/account")}, {"rows": b"x" * (1 << 20)}
    assert lead.post("/for-leads/import", data=token, files=rows).text == "ann as lead"
    refused(lead.post("/for-leads", data=token, files=rows), 413)


def test_guessing_a_password_is_slowed_by_account(app: FastAPI, people: People, clock: Clock) -> None:
    people.account("ann", "rater")
    for attempt in range(10):
        guesser = Browser(app, address=f"10.0.0.{attempt}")
        assert guesser.submit("/sign-in", name="ann", password="wrong").status_code == 403
    for spelling in ("ann", " ANN ", "\uff41nn"):
        answer = Browser(app, address="10.0.1.1").submit("/sign-in", name=spelling, password=PASSWORD)
        refused(answer, 429)
        assert int(answer.headers["retry-after"]) == pytest.approx(30, abs=1)
    clock.now += 31
    assert Browser(app).submit("/sign-in", name="ann", password=PASSWORD).status_code == 303


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:0:1:ffff::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_what_a_caller_is_counted_by(address: str, counted: str) -> None:
    assert network_of(address) == counted


@pytest.mark.parametrize(
    ("mine", "another"),
    [(["10.0.0.1"] * 12, "10.0.0.2"), ([f"fd00::{n}:1" for n in range(12)], "fd00:0:0:1::1")],
    ids=["IPv4", "IPv6"],
)
def test_guessing_is_slowed_by_address(app: FastAPI, mine: list[str], another: str) -> None:
    """Of IPv6 by the network, since each has 2**64 addresses."""
    app.state.web = app.state.web.__class__(
        services=app.state.web.services,
        settings=LabellingSettings(origins=(ORIGIN,), sign_in_by_address=app.state.web.settings.sign_in_by_account),
    )
    guessers = [Browser(app, address=address) for address in mine]
    for attempt in range(10):
        assert guessers[attempt].submit("/sign-in", name=f"name {attempt}", password="wrong").status_code == 403
    refused(guessers[10].submit("/sign-in", name="another", password="wrong"), 429)
    refused(guessers[11].get("/invitation/guessed"), 429)
    assert Browser(app, address=another).submit("/sign-in", name="x", password="wrong").status_code == 403


def test_guessing_the_password_of_an_open_session_is_slowed(people: People, clock: Clock) -> None:
    ann, new = people.browser("ann", "rater"), "quite another phrase"
    fields = {"csrf_token": ann.token("/account"), "new": new, "again": new}
    for attempt in range(10):
        assert ann.post("/account/password", data={**fields, "current": f"guess {attempt}"}).status_code == 422
    refused(ann.post("/account/password", data={**fields, "current": PASSWORD}), 429)
    clock.now += 31
    assert ann.post("/account/password", data={**fields, "current": PASSWORD}).status_code == 303


def test_raters_are_slowed_down(app: FastAPI, people: People, services: Services, make: Make) -> None:
    web, few = app.state.web, Limit(burst=2, per_second=1.0)
    app.state.web = replace(web, settings=replace(web.settings, claim=few, submit=few))
    services.labels.queue(make.study("demonstration"), make.items(1, 0))
    ann = people.browser("ann", "rater")
    fields = {"csrf_token": ann.token("/account"), "study": "study", "text": "Once", "act": "draft"}
    path = "/desk/next"
    for _ in range(2):
        answer = ann.post("/desk/next", data=fields)
        assert answer.status_code == 303
        path = answer.headers["location"]
    refused(ann.post("/desk/next", data=fields), 429)
    for _ in range(2):
        assert ann.post(path, data={**fields, "study": []}).status_code in (303, 409, 422)
    refused(ann.post(path, data={**fields, "study": []}), 429)


def test_a_body_that_does_not_arrive_is_given_up(store: Store, clock: Clock) -> None:
    app = create_app(store, LabellingSettings(origins=(ORIGIN,), body_seconds=0.1), clock=clock, hasher=QUICK)
    said: list[Message] = []

    async def dribble() -> Message:
        await anyio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def listen(message: Message) -> None:
        said.append(message)

    async def ask() -> None:
        headers = [(b"host", ORIGIN.removeprefix("http://").encode()), (b"origin", ORIGIN.encode())]
        request = {"type": "http", "method": "POST", "path": "/sign-in", "query_string": b"", "headers": headers}
        with anyio.fail_after(5):  # at this pace a megabyte takes three hours
            await app({**request, "scheme": "http", "http_version": "1.1", "root_path": ""}, dribble, listen)

    anyio.run(ask)
    assert said[0]["status"] == 408


# What browsers may load from where, spelled out here once more; the last three are not covered by `default-src`.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
    "base-uri": "'none'",
}


def test_the_policy_lets_nothing_in_from_elsewhere(browser: Browser) -> None:
    policy = browser.get("/sign-in").headers["content-security-policy"]
    assert dict(each.split(" ", 1) for each in policy.split("; ")) == POLICY


@pytest.mark.parametrize("planted", [["done", "<script>alert(1)</script>"], ["<script>", "x"], ["done", ["x"]], 7])
def test_a_planted_word_is_shown_as_text_or_not_at_all(browser: Browser, planted: object) -> None:
    value = base64.urlsafe_b64encode(json.dumps(planted).encode()).decode()
    page = browser.get("/sign-in", headers={"cookie": f"tastemaker-said={value}"}).text
    assert "<script>" not in page
    assert ("&lt;script&gt;alert(1)" in page) == (planted == ["done", "<script>alert(1)</script>"])


def test_every_answer_has_the_headers(app: FastAPI, people: People) -> None:
    add_lead_page(app)
    ann = people.browser("ann", "rater")
    for path in ("/", "/account", "/nowhere", "/for-leads", "/broken", "/api/v1/for-leads", "/static/tastemaker.css"):
        answer = ann.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])
        kept = "no-cache" if path.startswith("/static") else "no-store"
        assert answer.headers["cache-control"] == kept, path


def test_a_mistake_of_ours_tells_nothing(app: FastAPI, people: People) -> None:
    add_lead_page(app)
    answer = people.browser("ann", "rater").get("/broken")
    refused(answer, 500)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.text


@pytest.mark.parametrize("number", ["0", "-1", "2147483648", "1" + "0" * 30, "x", "%00", "1.5"])
def test_numbers_that_no_row_has_are_refused(people: People, number: str) -> None:
    ann = people.browser("ann", "rater")
    refused(ann.submit(f"/account/tokens/{number}/revoke", form="/account"), 422)


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800", "a" * 100_000, "'; DROP TABLE accounts; --", "<script>alert(1)</script>"]
)
def test_whatever_is_typed_is_answered(browser: Browser, text: str) -> None:
    sent = text.encode("utf-8", "surrogatepass")
    assert browser.submit("/sign-in", name=sent, password=sent).status_code == 403  # type: ignore[arg-type]
    assert browser.get("/sign-in", params={"next": text.replace("\ud800", "")[:1000]}).status_code == 200
    assert "<script>alert" not in browser.submit("/sign-in", name=sent, password="x").text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xff\xfe=%zz&&&=", "application/x-www-form-urlencoded"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data"),
        (b"{", "application/json"),
        (b"&" * 5000, "application/x-www-form-urlencoded"),
    ],
)
def test_broken_bodies_are_refused(browser: Browser, content: bytes, kind: str) -> None:
    answer = browser.post("/sign-in", content=content, headers={"content-type": kind})
    assert answer.status_code in (400, 403)
    assert SENTENCE.search(answer.text)


@pytest.mark.parametrize(
    "origin",
    [
        "http://labels.example.org",
        "https://labels.example.org/",
        "https://labels.example.org:443",
        "labels.example.org",
        "https://Labels.example.org",
        "https://ann@labels.example.org",
        "ftp://127.0.0.1",
        "https://",
        "https://a:99999",
        "",
    ],
)
def test_origins_that_browsers_do_not_send_are_refused(origin: str) -> None:
    with pytest.raises(ConfigError):
        LabellingSettings(origins=(origin,))
