"""The account pages, as forms without JavaScript, and what they leave in the store."""

from __future__ import annotations

from fastapi import FastAPI
from tests.labelling.conftest import ORIGIN, PASSWORD, Browser, People

from tastemaker.labelling.serve import admin_link
from tastemaker.labelling.settings import LabellingSettings
from tastemaker.labelling.web import HERE, Services
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE

MOST_BYTES = 100_000


def test_from_the_first_link_to_an_account(
    store: Store, settings: LabellingSettings, browser: Browser, services: Services
) -> None:
    link = admin_link(store, settings)
    assert link is not None
    path = link.removeprefix(ORIGIN)
    assert "You are invited as admin" in browser.get(path).text
    short = browser.submit(path, name="root", password="short", again="short")
    assert short.status_code == 422
    assert "at least 12" in short.text
    assert 'value="root"' in short.text, "what was typed is kept"
    differs = browser.submit(path, name="root", password=PASSWORD, again="something else")
    assert "The two passwords differ" in differs.text
    done = browser.submit(path, name="root", password=PASSWORD, again=PASSWORD)
    assert (done.status_code, done.headers["location"]) == (303, "/")
    assert "Welcome, root." in browser.get("/").text
    assert "Welcome, root." not in browser.get("/").text, "said once"
    (account,) = services.access.accounts()
    assert account.roles == {"admin"}
    assert admin_link(store, settings) is None
    used = browser.get(path)
    assert used.status_code == 410
    assert "used already" in used.text


def test_a_rater_joins_their_group(app: FastAPI, services: Services) -> None:
    token = services.access.invite({"rater"}, rater_group="team", actor=COMMAND_LINE).token
    rater = Browser(app)
    assert "as rater in the group team" in rater.get(f"/invitation/{token}").text
    rater.submit(f"/invitation/{token}", name="ann", password=PASSWORD, again=PASSWORD)
    (account,) = services.access.accounts()
    assert (account.rater, account.rater_group) == ("ann", "team")
    assert "team" in rater.get("/account").text


def test_a_forgotten_password_is_set_anew_by_link(app: FastAPI, people: People, services: Services) -> None:
    ann = people.browser("ann", "rater")
    (account,) = services.access.accounts()
    token = services.access.reset_password(account, actor=COMMAND_LINE).token
    new = "quite another phrase"
    other = Browser(app)
    assert "your API tokens work no longer" in other.get(f"/invitation/{token}").text
    assert "Signing out ends no API token" in ann.get("/account").text
    assert other.submit(f"/invitation/{token}", name="ann", password=new, again=new).status_code == 303
    assert ann.get("/account").status_code == 303, "the earlier session has ended"
    Browser(app).sign_in("ann", new)


def test_wrong_names_and_wrong_passwords_get_the_same_page(app: FastAPI, people: People) -> None:
    people.account("ann", "rater")
    pages = []
    for name in ("ann", "bob"):
        answer = Browser(app).submit("/sign-in", name=name, password="wrong")
        assert answer.status_code == 403
        pages.append(answer.text.split("<main", 1)[1].replace(name, "NAME").partition("csrf_token")[0])
    assert pages[0] == pages[1]


def test_changing_the_password_ends_other_sessions(app: FastAPI, people: People) -> None:
    ann = people.browser("ann", "rater")
    elsewhere = Browser(app).sign_in("ann")
    new = "quite another phrase"
    fields = {"current": PASSWORD, "new": new, "again": new}
    assert ann.submit("/account/password", form="/account", **{**fields, "current": "x"}).status_code == 422
    assert ann.submit("/account/password", form="/account", **{**fields, "again": "x"}).status_code == 422
    assert elsewhere.get("/account").status_code == 200
    assert ann.submit("/account/password", form="/account", **fields).status_code == 303
    assert "Your password is changed" in ann.get("/account").text
    assert elsewhere.get("/account").status_code == 303
    assert Browser(app).submit("/sign-in", name="ann", password=PASSWORD).status_code == 403


def test_signing_out_elsewhere_and_everywhere(app: FastAPI, people: People) -> None:
    ann = people.browser("ann", "rater")
    elsewhere = Browser(app).sign_in("ann")
    ann.submit("/account/sign-out-elsewhere", form="/account")
    assert "Signed out in 1 other browser." in ann.get("/account").text
    assert elsewhere.get("/account").status_code == 303
    elsewhere.sign_in("ann")
    ann.submit("/sign-out-everywhere", form="/account")
    assert elsewhere.get("/account").status_code == ann.get("/account").status_code == 303


def test_tokens_are_shown_once_and_revoked_by_their_owner(people: People, services: Services) -> None:
    ann, mallory = people.browser("ann", "rater"), people.browser("mallory", "rater")
    page = ann.submit("/account/tokens", form="/account", label="<b>script</b>").text
    secret = page.split('id="new-token" tabindex="0">')[1].partition("<")[0]
    assert services.access.account_of_api_token(secret)
    assert secret not in ann.get("/account").text
    assert "&lt;b&gt;script" in ann.get("/account").text
    assert ann.submit("/account/tokens", form="/account", label=" ").status_code == 422
    account = next(one for one in services.access.accounts() if one.name == "ann")
    (token,) = services.access.api_tokens(account)
    assert mallory.submit(f"/account/tokens/{token.id}/revoke", form="/account").status_code == 422
    assert services.access.account_of_api_token(secret), "it is not theirs to revoke"
    ann.submit(f"/account/tokens/{token.id}/revoke", form="/account")
    assert services.access.account_of_api_token(secret) is None


def test_acts_are_in_the_audit_log_under_their_request(people: People, services: Services) -> None:
    ann = people.browser("ann", "rater")
    answer = ann.submit("/sign-out", form="/account")
    (entry,) = services.audit.entries(limit=1)
    assert (entry.actor, entry.action) == ("ann", "session.sign_out")
    assert entry.request_id == answer.headers["x-request-id"]


def test_every_page_is_light_and_its_parts_are_kept(people: People) -> None:
    ann = people.browser("ann", "rater", "lead")
    parts = {path.name: len(path.read_bytes()) for path in (HERE / "static").iterdir()}
    for path in ("/", "/account", "/nowhere", "/sign-in"):
        assert len(ann.get(path).content) + sum(parts.values()) < MOST_BYTES
    page = ann.get("/account").text
    for name in ("tastemaker.css", "tastemaker.js", "favicon.svg"):
        address = page.split(f"/static/{name}?v=")[1].partition('"')[0]
        assert "immutable" in ann.get(f"/static/{name}?v={address}").headers["cache-control"]
        assert ann.get(f"/static/{name}?v=older").headers["cache-control"] == "no-cache"
    for name in ("..%2Fapp.py", "%2e%2e/app.py", "nothing.css", "%00"):
        assert ann.get(f"/static/{name}").status_code == 404
