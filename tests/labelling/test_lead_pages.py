"""The leads' pages: every act as a form without JavaScript, on both databases, and who may do what."""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from tests.labelling.conftest import ORIGIN, PASSWORD, Browser
from tests.labelling.lead import LEAD, RANKING, ROLES, Fields, fill_again, open_accounts, send, signed_in, upload
from tests.store.conftest import Clock, Make
from tests.store.people import work

from tastemaker.labelling import pages_figures, pages_people, pages_records, pages_review, pages_studies
from tastemaker.labelling.web import Services
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE
from tastemaker.store.importing import GoldItem
from tastemaker.store.tasks import ComparisonAnswer, OutputRating, RankingAnswer, RatingAnswer

LEADS = {"lead", "admin"}
OURS = (pages_studies, pages_figures, pages_review, pages_people, pages_records)
# Who is served, spelled out here once more.
TABLE = {
    ("GET", "/studies"): LEADS,
    ("GET", "/studies/new"): LEADS,
    ("POST", "/studies/new"): LEADS,
    ("GET", "/studies/study"): LEADS,
    ("POST", "/studies/close"): LEADS,
    ("POST", "/studies/reopen"): LEADS,
    ("POST", "/studies/gold-share"): LEADS,
    ("POST", "/studies/raters"): LEADS,
    ("POST", "/studies/import"): LEADS,
    ("POST", "/studies/gold/import"): LEADS,
    ("GET", "/studies/guideline"): LEADS,
    ("POST", "/studies/guideline"): LEADS,
    ("GET", "/studies/unblind"): LEADS,
    ("POST", "/studies/unblind"): LEADS,
    ("GET", "/figures"): LEADS | {"researcher"},
    ("GET", "/figures/rater"): LEADS,
    ("GET", "/screening"): LEADS,
    ("POST", "/screening/cut-offs"): LEADS,
    ("POST", "/screening/decide"): LEADS,
    ("POST", "/screening/grade"): LEADS,
    ("GET", "/adjudication"): LEADS | {"adjudicator"},
    ("GET", "/adjudication/item"): LEADS | {"adjudicator"},
    ("POST", "/adjudication/item"): LEADS | {"adjudicator"},
    ("GET", "/people"): LEADS,
    ("POST", "/people/invite"): LEADS,
    ("POST", "/people/program"): {"admin"},
    ("POST", "/people/invitations/{invitation_id}/withdraw"): LEADS,
    ("GET", "/people/{account_id}"): LEADS,
    ("POST", "/people/{account_id}/roles"): {"admin"},
    ("POST", "/people/{account_id}/disable"): LEADS,
    ("POST", "/people/{account_id}/enable"): LEADS,
    ("POST", "/people/{account_id}/password"): LEADS,
    ("GET", "/exports"): LEADS | {"researcher"},
    ("POST", "/exports"): LEADS | {"researcher"},
    ("GET", "/audit"): LEADS | {"auditor"},
    ("POST", "/audit/verify"): LEADS | {"auditor"},
}
STUDY = f"/studies/study?study={quote(RANKING)}"
PROBLEM = re.compile(r'<p class="message error"[^>]*>([^<]+)')


@pytest.fixture
def filled(url: str, store: Store, services: Services, clock: Clock) -> None:
    fill_again(url, store, services, clock)


@pytest.fixture
def lea(app: FastAPI, services: Services) -> Browser:
    open_accounts(services)
    return signed_in(app, "lea")


@pytest.fixture
def lead(app: FastAPI, filled: None) -> Browser:
    """A lead in the middle of a round."""
    return signed_in(app, "lea")


def problem(answer: object) -> str:
    """The one sentence of a form that was refused."""
    assert getattr(answer, "status_code", 0) == 422, getattr(answer, "text", "")
    (found,) = PROBLEM.findall(getattr(answer, "text", ""))
    assert found.endswith(".")
    return str(found)


def jsonl(*rows: object) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


# --- who may do what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_every_route_serves_the_roles_of_the_table_alone(app: FastAPI, services: Services) -> None:
    found = {
        (method, route.path)
        for module in OURS
        for route in module.routes.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert found == set(TABLE)
    open_accounts(services)
    victim = next(one.id for one in services.access.accounts() if one.name == "bob")
    for name in ("lea", "root", "ada", "rea", "aud", "ann"):
        browser = signed_in(app, name)
        token = browser.token("/account")
        for (method, path), roles in TABLE.items():
            address = path.replace("{account_id}", str(victim)).replace("{invitation_id}", "1")
            answer = browser.request(method, address, data={"csrf_token": token} if method == "POST" else None)
            served = answer.status_code != 403
            assert served == (ROLES[name] in roles), (name, method, path, answer.status_code)
            assert answer.status_code < 500, (method, path)
    visitor = Browser(app)
    token = visitor.token()
    for method, path in TABLE:
        address = re.sub(r"\{\w+\}", "1", path)
        answer = visitor.request(method, address, data={"csrf_token": token} if method == "POST" else None)
        assert answer.status_code == (303 if method == "GET" else 401), (method, path)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_each_role_sees_its_links_alone(app: FastAPI, services: Services) -> None:
    open_accounts(services)
    paths = {path for method, path in TABLE if method == "GET" and path.count("/") == 1}
    for name in ("lea", "root", "ada", "rea", "aud", "ann"):
        browser = signed_in(app, name)
        page = browser.get("/account").text + browser.get("/").text
        seen = {path for path in paths if f'href="{path}"' in page}
        may = {path for path in paths if ROLES[name] in TABLE["GET", path]}
        assert seen == (may if len(may) > 1 or name == "ann" else set()), name
        if len(may) == 1 and ROLES[name] != "rater":
            assert browser.get("/").headers["location"] in may, "there is but one thing to do"


# --- studies --------------------------------------------------------------------------------------------------------


def test_a_study_is_made_and_nothing_typed_is_lost(lea: Browser, services: Services) -> None:
    fields = {
        "name": "round 1/a & b",
        "kind": "comparison",
        "purpose": "evaluation",
        "rater_group": "team",
        "overlap": "many",
        "lease_minutes": "45",
        "gold_share": "5",
        "guideline_version": "v1",
        "guideline_text": "\r\nFirst line.\r\n<b>Second</b>.",
    }
    refused = send(lea, "/studies/new", **fields)
    assert problem(refused).startswith("The number of answers to each item is &#39;many&#39;")
    for kept in ('value="round 1/a &amp; b"', 'value="many"', '"comparison" selected', '"evaluation" selected'):
        assert kept in refused.text
    assert "<textarea" in refused.text
    assert "\n\nFirst line.\n&lt;b&gt;Second&lt;/b&gt;." in refused.text, "the first line break is kept too"
    for name, value in (
        ("name", " "),
        ("kind", "quiz"),
        ("overlap", "0"),
        ("overlap", "9" * 30),
        ("gold_share", "nan"),
        ("gold_share", "51"),
        ("lease_minutes", "0"),
        ("rater_group", ""),
        ("guideline_text", " "),
        ("guideline_version", ""),
    ):
        problem(send(lea, "/studies/new", **{**fields, "overlap": "3", name: value}))
    assert services.lead.studies() == []
    made = send(lea, "/studies/new", **{**fields, "overlap": "3"})
    assert made.status_code == 303
    assert "The study round 1/a &amp; b is made" in lea.get(made.headers["location"]).text
    (study,) = services.lead.studies()
    assert (study.kind, study.purpose, study.overlap, study.gold_share) == ("comparison", "evaluation", 3, 0.05)
    (guideline,) = services.lead.guidelines()
    assert guideline.text == "\nFirst line.\n<b>Second</b>."
    assert "already" in problem(send(lea, "/studies/new", **{**fields, "overlap": "3"}))
    # Another study by the same guideline, which need not be typed again.
    again = {**fields, "overlap": "1", "name": "test", "guideline_text": "", "screening": "yes"}
    assert send(lea, "/studies/new", **again).status_code == 303
    assert services.lead.studies()[0].screening


def test_items_come_from_files_whole_or_not_at_all(lea: Browser, services: Services) -> None:
    send(
        lea, "/studies/new", name="s", kind="comparison", rater_group="team", guideline_version="1", guideline_text="x"
    )
    good = {"prompt": "Which?", "responses": ["a", "b"], "sources": ["m1", "m2"]}
    bad = upload(lea, "/studies/import", "s", "mine.jsonl", jsonl(good, {"prompt": "No"}))
    assert problem(bad).startswith("mine.jsonl, line 2:")
    assert problem(send(lea, "/studies/import", study="s"))
    for name, content in (
        ("", b""),
        ("x.gz", b"x"),
        ("x.jsonl", b""),
        ("x.jsonl", b"\xff\xfe{"),
        ("x.jsonl", b"[" * 100_000),
        ("x.parquet", b"PAR1 but not really"),
        ("../../<b>x</b>.jsonl", b"nothing"),
        ("x.jsonl", jsonl({"prompt": "W\0?", "responses": ["a\0", "b"]})),
        ("x.jsonl", b'{"prompt": "W\\ud800?", "responses": ["a", "b\\udfff"]}'),
    ):
        answer = upload(lea, "/studies/import", "s", name, content)
        assert answer.status_code == 422, (name, content[:80])
    assert services.lead.studies()[0].items == 0
    done = upload(lea, "/studies/import", "s", "mine.jsonl", jsonl(good, good | {"prompt": "2"}))
    assert "2 items added." in lea.get(done.headers["location"]).text
    again = upload(lea, "/studies/import", "s", "mine.jsonl", jsonl(good))
    assert "0 items added; 1 more were there already." in lea.get(again.headers["location"]).text
    gold = upload(lea, "/studies/gold/import", "s", "g.jsonl", jsonl(good | {"prompt": "g"}))
    assert "line 1" in problem(gold)
    gold = upload(lea, "/studies/gold/import", "s", "g.jsonl", jsonl(good | {"prompt": "g", "expected": "A"}))
    assert "1 gold item added." in lea.get(gold.headers["location"]).text
    study = services.lead.studies()[0]
    assert (study.items, study.gold_items, study.slots) == (3, 1, 2)


def test_parquet_is_read(lea: Browser, services: Services, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    send(lea, "/studies/new", name="s", kind="ranking", rater_group="team", guideline_version="1", guideline_text="x")
    parquet.write_table(pyarrow.table({"prompt": ["Q"], "responses": [["a", "b", "c"]]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    assert upload(lea, "/studies/import", "s", "x.parquet", content).status_code == 303
    assert services.lead.studies()[0].items == 1


def test_closing_staffing_and_gold_share(lead: Browser, services: Services) -> None:
    def study() -> object:
        return next(one for one in services.lead.studies() if one.name == RANKING)

    assert send(lead, "/studies/close", study=RANKING).headers["location"].startswith("/studies/study?study=")
    assert getattr(study(), "closed", False)
    assert "nobody is given its tasks" in lead.get(STUDY).text
    send(lead, "/studies/reopen", study=RANKING)
    assert not getattr(study(), "closed", True)
    send(lead, "/studies/raters", study=RANKING, rater=["ann"])
    assert services.lead.assigned_raters(RANKING) == ["ann"]
    assert 'value="ann" checked' in lead.get(STUDY).text
    assert "not known" in problem(send(lead, "/studies/raters", study=RANKING, rater=["ann", "zoe"]))
    send(lead, "/studies/raters", study=RANKING)
    assert services.lead.assigned_raters(RANKING) == []
    refused = send(lead, "/studies/gold-share", study=RANKING, share="lots")
    assert problem(refused)
    assert 'value="lots"' in refused.text
    send(lead, "/studies/gold-share", study=RANKING, share="7,5 %")
    assert getattr(study(), "gold_share", 0) == pytest.approx(0.075, abs=1e-12)
    for path in ("close", "reopen", "raters", "gold-share", "import", "gold/import", "guideline", "unblind"):
        assert send(lead, f"/studies/{path}", study="no such").status_code == 404
    for name in ("no such", "%00", ""):
        assert lead.get(f"/studies/study?study={name}").status_code in (404, 422)


def test_a_changed_guideline_is_a_new_version(lead: Browser, services: Services) -> None:
    path = f"/studies/guideline?study={quote(RANKING)}"
    assert "Prefer the helpful." in lead.get(path).text
    for version in ("v1", " ", "a\nb"):
        refused = send(lead, "/studies/guideline", study=RANKING, version=version, text="Prefer the true.")
        assert problem(refused)
        assert "\nPrefer the true.</textarea>" in refused.text
    assert problem(send(lead, "/studies/guideline", study=RANKING, version="v2", text=" "))
    done = send(lead, "/studies/guideline", study=RANKING, version="v2", text="Prefer the *true*.\r\nYes.")
    page = lead.get(done.headers["location"]).text
    assert "<em>true</em>" in page
    assert "Prefer the helpful." in page, "the former version is shown"
    assert {one.version: one.text for one in services.lead.guidelines()}["v2"] == "Prefer the *true*.\nYes."
    assert services.audit.entries(limit=1)[0].details == {"from": "v1", "to": "v2"}


def test_unblinding_asks_for_a_reason_and_is_audited(lead: Browser, services: Services) -> None:
    path = f"/studies/unblind?study={quote(RANKING)}"
    assert "model-" not in lead.get(path).text + lead.get(STUDY).text
    refused = send(lead, "/studies/unblind", study=RANKING, item="1", reason=" ")
    assert "needs a reason" in problem(refused)
    assert 'value="1"' in refused.text
    assert "model-" not in refused.text
    shown = send(lead, "/studies/unblind", study=RANKING, reason="the round is over")
    assert {f"model-{index}" for index in range(3)} <= set(re.findall(r"model-\d", shown.text))
    (entry,) = services.audit.entries(limit=1)
    assert (entry.action, entry.actor, entry.details["reason"]) == ("study.unblind", "lea", "the round is over")
    for item in ("0", "x", "9" * 20, "2147483647"):
        assert problem(send(lead, "/studies/unblind", study=RANKING, item=item, reason="r"))


# --- people ---------------------------------------------------------------------------------------------------------


def secret_of(page: str) -> str:
    return page.split('id="secret" tabindex="0">')[1].partition("<")[0]


def test_invitations_are_shown_once_and_let_in(app: FastAPI, lea: Browser, services: Services) -> None:
    refused = send(lea, "/people/invite", role=["rater"], rater_group="")
    assert "name the group" in problem(refused)
    assert "may not invite" in problem(send(lea, "/people/invite", role=["admin"]))
    assert problem(send(lea, "/people/invite"))
    page = send(lea, "/people/invite", role=["rater"], rater_group="team").text
    link = secret_of(page)
    assert link not in lea.get("/people").text
    visitor = Browser(app)
    visitor.submit(link.removeprefix(ORIGIN), name="cleo", password=PASSWORD, again=PASSWORD)
    assert next(one for one in services.access.accounts() if one.name == "cleo").rater_group == "team"
    send(lea, "/people/invite", role=["rater"], rater_group="team")
    (invited,) = services.access.invitations()
    assert send(lea, f"/people/invitations/{invited.id}/withdraw").status_code == 303
    assert services.access.invitations() == []


def test_accounts_are_changed_by_who_may(app: FastAPI, lea: Browser, services: Services) -> None:
    ids = {one.name: one.id for one in services.access.accounts()}
    ann, root = signed_in(app, "ann"), signed_in(app, "root")
    path = f"/people/{ids['ann']}"
    link = secret_of(send(lea, f"{path}/password").text)
    assert "new password" in Browser(app).get(link.removeprefix(ORIGIN)).text
    send(lea, f"{path}/disable")
    assert ann.get("/account").status_code == 303
    assert "disabled" in lea.get(path).text
    send(lea, f"{path}/enable")
    assert signed_in(app, "ann").get("/account").status_code == 200
    for act in ("disable", "password"):
        assert send(lea, f"/people/{ids['root']}/{act}").status_code == 403
    assert "Only an admin" in lea.get(f"/people/{ids['root']}").text
    assert problem(send(root, f"{path}/roles"))
    assert "only admin" in problem(send(root, f"/people/{ids['root']}/roles", role=["lead"]))
    refused = send(root, f"/people/{ids['aud']}/roles", role=["auditor", "rater"], rater_group="")
    assert problem(refused)
    assert 'value="rater" checked' in refused.text
    send(root, f"/people/{ids['aud']}/roles", role=["auditor", "rater"], rater_group="others")
    assert services.access.account(ids["aud"]).rater_group == "others"
    assert lea.get("/people/999").status_code == 404
    assert lea.get(f"/people/{2**40}").status_code == 422


def test_a_program_gets_an_account_and_a_token(app: FastAPI, services: Services) -> None:
    open_accounts(services)
    root = signed_in(app, "root")
    assert problem(send(root, "/people/program", name=" "))
    assert "people" in problem(send(root, "/people/program", name="bot", rater_group="team"))
    token = secret_of(send(root, "/people/program", name="bot", rater_group="simulated").text)
    account = services.access.account_of_api_token(token)
    assert account is not None
    assert (account.name, sorted(account.roles), account.rater_group) == ("bot", ["rater", "service"], "simulated")


# --- figures, screening ---------------------------------------------------------------------------------------------


def test_figures_have_intervals_or_reasons(app: FastAPI, lead: Browser) -> None:
    page = lead.get(f"/figures?study={quote(RANKING)}").text
    assert "ann" in page
    assert re.search(r'<rect class="interval" x="[\d.]+" y="2.5" width="[\d.]+"', page)
    assert "Krippendorff" in page
    assert "no output has been rated" not in lead.get("/figures/rater?rater=ann").text
    own = lead.get(f"/figures/rater?rater=ann&study={quote(RANKING)}").text
    assert "no output has been rated" in own
    assert "Prefers as other raters do" in own
    assert lead.get("/figures/rater?rater=nobody").status_code == 404
    assert lead.get("/figures/rater?rater=ann&study=test").status_code == 200
    assert lead.get("/figures/rater?rater=bob&study=test").headers["location"] == "/figures"
    assert "bob has answered nothing there yet." in lead.get("/figures").text
    assert lead.get("/figures?study=none").status_code == 404
    assert lead.get("/figures?study=test").status_code == 200
    researcher = signed_in(app, "rea")
    shown = researcher.get("/figures").text.split("<main", 1)[1]
    assert "Rater 1" in shown
    assert "Rater 2" in shown
    assert not re.search(r"\b(ann|bob)\b", shown)


def test_screening_from_grade_to_decision(lead: Browser, services: Services) -> None:
    page = lead.get("/screening").text
    assert "What ann wrote." in page
    assert "1 to grade" in page
    (waiting,) = services.screening.to_grade()
    for score in ("", "0", "8", "x"):
        assert problem(send(lead, "/screening/grade", answer=str(waiting.answer), score=score))
    assert problem(send(lead, "/screening/grade", answer="99999", score="5"))
    send(lead, "/screening/grade", answer=str(waiting.answer), score="6")
    assert services.screening.to_grade() == []
    refused = send(lead, "/screening/decide", rater="ann", passed="yes", reason=" ")
    assert "needs a reason" in problem(refused)
    kept = send(lead, "/screening/decide", rater="ann", passed="perhaps", reason="is <careful>")
    assert problem(kept)
    assert "\nis &lt;careful&gt;</textarea>" in kept.text
    send(lead, "/screening/decide", rater="ann", passed="no", reason="too hasty")
    send(lead, "/screening/decide", rater="ann", passed="yes", reason="on second thought")
    decision = services.screening.result("ann").decision
    assert decision is not None
    assert (decision.passed, decision.by, decision.reason) == (True, "lea", "on second thought")
    assert send(lead, "/screening/decide", rater="nobody", passed="yes", reason="r").status_code == 404


def test_cut_offs_are_set_and_hold(lead: Browser, services: Services) -> None:
    def fields() -> dict[str, str]:
        """What the form holds."""
        shown = lead.get("/screening").text.partition('action="/screening/cut-offs"')[2].partition("</form>")[0]
        return dict(re.findall(r'name="(flags|rankings|demonstrations)" type="text" value="([^"]*)"', shown))

    (waiting,) = services.screening.to_grade()
    services.screening.grade(waiting.answer, 5, actor=LEAD)
    page = lead.get("/screening").text
    assert "At least 75 % of flags as known, 75 % of rankings as known, a mean grade of 6 of 7." in page
    assert "the paper's cut-offs" in page
    assert "below demonstrations" in page
    assert fields() == {"flags": "75", "rankings": "75", "demonstrations": "6"}

    typed: Fields = {
        "group": "team",
        "flags": "66,5 %",
        "rankings": "<many>",
        "demonstrations": "4.5",
        "unasked": ["flags"],
    }
    refused = send(lead, "/screening/cut-offs", **typed)
    assert problem(refused) == (
        "The share of rankings, in percent, is &#39;&lt;many&gt;&#39;; it must be a number from 0 to 100."
    )
    for kept in ('value="66,5 %"', 'value="&lt;many&gt;"', 'value="4.5"', 'value="flags" checked', "<details open>"):
        assert kept in refused.text
    for name, value in (("flags", "101"), ("flags", " "), ("rankings", "nan"), ("demonstrations", "0,9")):
        fixed: Fields = {**typed, "rankings": "80", "unasked": [], name: value}
        problem(send(lead, "/screening/cut-offs", **fixed))
    assert services.screening.cut_offs()[0].by is None
    for group in ("nobody", ""):
        elsewhere: Fields = {**typed, "rankings": "80", "group": group}
        assert send(lead, "/screening/cut-offs", **elsewhere).status_code == 404

    mended: Fields = {**typed, "rankings": "66.67"}
    done = send(lead, "/screening/cut-offs", **mended)
    page = lead.get(done.headers["location"]).text
    assert "The cut-offs of the group team hold from now on." in page
    assert "At least 66.67 % of rankings as known, a mean grade of 4.5 of 7." in page
    assert "set by lea" in page
    assert "cut-offs met" in page
    (now,) = services.screening.cut_offs()
    assert (now.cut_offs.flags, now.cut_offs.demonstrations) == (None, 4.5)
    assert now.cut_offs.rankings == pytest.approx(0.6667, abs=1e-12)
    assert fields() == {"flags": "", "rankings": "66.67", "demonstrations": "4.5"}
    (entry,) = services.audit.entries(limit=1)
    assert (entry.action, entry.actor, entry.object) == ("screening.cut-offs", "lea", "team")
    again = send(lead, "/screening/cut-offs", group="team", **fields(), unasked=["flags"])
    assert "are as they were" in lead.get(again.headers["location"]).text
    assert services.audit.entries(limit=1) == [entry]
    parts = ["flags", "rankings", "demonstrations"]
    assert send(lead, "/screening/cut-offs", group="team", unasked=parts).status_code == 303
    assert "Nothing beyond answering the whole test." in lead.get("/screening").text


def test_the_marks_of_the_figures_are_the_cut_offs(lead: Browser, services: Services) -> None:
    services.lead.create_study(Make().study("ranking", name="gold test"), actor=LEAD, screening=True)
    gold = GoldItem(item=Make().item("g"), expected=RankingAnswer((("A",), ("B",), ("C",))))
    services.lead.add_gold("gold test", [gold], actor=LEAD)
    work(services.desk, "ann", "gold test", {"g": [[0], [1], [2]]})

    def marks() -> list[str]:
        return re.findall(r'<rect class="at" x="([\d.]+)"', lead.get("/screening").text)

    assert marks() == ["74.7"]  # of rankings alone, 0.3 to the left of the middle of the mark
    send(lead, "/screening/cut-offs", group="team", flags="75", rankings="60", demonstrations="6")
    assert marks() == ["59.7"]
    send(lead, "/screening/cut-offs", group="team", flags="75", rankings="60", demonstrations="6", unasked=["rankings"])
    assert marks() == []


# --- adjudication ---------------------------------------------------------------------------------------------------


def test_a_dispute_is_shown_blind_and_settled(app: FastAPI, lead: Browser, services: Services) -> None:
    ada = signed_in(app, "ada")
    (disputed,) = services.adjudication.disputed(RANKING, actor=LEAD)
    item = f"/adjudication/item?study={quote(RANKING)}&item={disputed.item}"
    page = ada.get(f"/adjudication?study={quote(RANKING)}").text
    address = re.search(r'href="(/adjudication/item[^"]+)"', page)
    assert address is not None
    shown = ada.get(address[1].replace("&amp;", "&")).text
    assert "Text 0 of key-1" in shown
    for hidden in ("ann", "bob", "model-", "truth", "user-of", "Unblind"):
        assert not re.search(rf"\b{hidden}", shown.split("<main", 1)[1]), hidden
    places = {"rank-A": "2", "rank-B": "1", "rank-C": "2"}
    fields = {"study": RANKING, "item": str(disputed.item), **places}
    refused = send(ada, "/adjudication/item", **fields, reason=" ")
    assert "needs a reason" in problem(refused)
    assert refused.text.count("<option selected>2</option>") == 2
    for wrong in ({"rank-A": ""}, {"rank-A": "4"}, {"rank-A": "x"}):
        kept = send(ada, "/adjudication/item", **{**fields, **wrong}, reason="because <it> is so")
        assert problem(kept)
        assert "\nbecause &lt;it&gt; is so</textarea>" in kept.text
    done = send(ada, "/adjudication/item", **fields, reason="B alone is right")
    assert "is settled" in ada.get(done.headers["location"]).text
    (settled,) = services.adjudication.case(RANKING, disputed.item, actor=LEAD).adjudications
    assert (settled.answer, settled.by) == (RankingAnswer((("B",), ("A", "C"))), "ada")
    assert "Unblind" in lead.get(item).text
    for path in ("?study=test", "?study=no", "/item?study=test&item=1", f"/item?study={quote(RANKING)}&item=99999"):
        assert ada.get(f"/adjudication{path}").status_code == 404


def test_comparisons_and_ratings_are_settled_too(lead: Browser, services: Services) -> None:
    (pair,) = services.adjudication.disputed("pairs", actor=LEAD)
    assert problem(send(lead, "/adjudication/item", study="pairs", item=str(pair.item), reason="r"))
    send(lead, "/adjudication/item", study="pairs", item=str(pair.item), choice="tie", reason="r")
    assert services.adjudication.case("pairs", pair.item, actor=LEAD).adjudications[0].answer == ComparisonAnswer("tie")
    rated = services.adjudication.disputed("ratings", actor=LEAD)[0].item
    fields = {"likert-A": "5", "flag-A-hallucination": "yes", "likert-B": "1"}
    kept = send(lead, "/adjudication/item", study="ratings", item=str(rated), **{**fields, "likert-B": ""}, reason="r")
    assert "quality of B" in problem(kept)
    assert 'name="flag-A-hallucination" value="yes" checked' in kept.text
    send(lead, "/adjudication/item", study="ratings", item=str(rated), **fields, reason="r")
    answer = services.adjudication.case("ratings", rated, actor=LEAD).adjudications[0].answer
    assert answer == RatingAnswer({"A": OutputRating(5, ("hallucination",)), "B": OutputRating(1)})


# --- exports, the audit log -----------------------------------------------------------------------------------------


def test_an_export_is_a_zip_and_leaves_nothing_behind(
    app: FastAPI, lead: Browser, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rea = signed_in(app, "rea")
    fields: Fields = {"study": [RANKING], "format": "jsonl", "validation": "0", "test": "0"}
    answer = send(rea, "/exports", **fields, pairs="yes", adjudicated="yes")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == 'attachment; filename="round-1-rankings-ties.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert sorted(files) == ["manifest.json", "pairs/train.jsonl", "train.jsonl"]
    assert len(files["train.jsonl"].splitlines()) == 6
    everything = b"".join(files.values())
    assert not re.search(rb'"(ann|bob)"|model-', everything)
    assert list(tmp_path.iterdir()) == []
    shown = send(rea, "/exports", **fields, then="manifest")
    assert "pairs/train.jsonl" not in shown.text
    assert "train.jsonl" in shown.text
    assert send(rea, "/exports", **fields, reason="curious").status_code == 403
    refused: tuple[Fields, ...] = (
        {"study": []},
        {"study": ["test"]},
        {"study": [RANKING, "pairs"]},
        {"validation": "x"},
        {"test": "100"},
        {"format": "xml"},
    )
    for wrong in refused:
        assert problem(send(rea, "/exports", **{**fields, **wrong}))
    assert list(tmp_path.iterdir()) == []
    unblinded = send(lead, "/exports", **fields, reason="the round is over")
    with zipfile.ZipFile(io.BytesIO(unblinded.content)) as archive:
        assert b"model-0" in archive.read("round-1-rankings-ties/train.jsonl")
    assert [one.action for one in services.audit.entries(limit=2)] == ["study.unblind", "export"]


def test_the_audit_log_is_filtered_paged_and_verified(app: FastAPI, lea: Browser, services: Services) -> None:
    for index in range(40):
        services.access.create_service(f"bot {index}", actor=COMMAND_LINE)
    aud = signed_in(app, "aud")
    page = aud.get("/audit").text
    assert "account.create" in page
    older = re.search(r'href="(/audit\?[^"]+before=\d+)"', page)
    assert older is not None
    assert "invitation.accept" in aud.get(older[1].replace("&amp;", "&")).text
    rows = aud.get("/audit?action=session.sign_in&actor=lea").text
    assert rows.count("session.sign_in</th>") == 1
    assert "No act matches" in aud.get("/audit?actor=nobody+at+all").text
    for query in ("before=0", "before=x", "action=%00", f"before={2**40}"):
        assert aud.get(f"/audit?{query}").status_code == 422
    verified = send(aud, "/audit/verify").text
    place = verified.split('id="head">')[1].partition("<")[0]
    services.access.create_service("one more", actor=COMMAND_LINE)
    assert "rows follow from one another" in send(aud, "/audit/verify", since=place).text
    assert problem(send(aud, "/audit/verify", since="7:x"))
    assert problem(send(aud, "/audit/verify", since="9" * 5000 + ":" + "0" * 64))
    other = place.partition(":")[0] + ":" + "0" * 64
    answer = send(aud, "/audit/verify", since=other)
    assert "is not what was written" in answer.text


def test_addresses_stay_ours(lead: Browser) -> None:
    for page in ("/studies", STUDY, "/people", "/figures", "/screening", "/adjudication", "/exports", "/audit"):
        for address in re.findall(r'(?:href|action)="([^"]+)"', lead.get(page).text):
            assert urlsplit(address).netloc == ""
