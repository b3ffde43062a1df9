"""The leads' pages over hostile text, in the markup and in Chromium; axe and a phone's width on each page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi import FastAPI
from tests.labelling.conftest import PASSWORD, PATIENCE, served
from tests.labelling.lead import RANKING, fill, send, signed_in, upload
from tests.labelling.payloads import HIDING, RUNNING
from tests.labelling.test_rendering import WATCH

from tastemaker.labelling.web import Services
from tastemaker.records import Message, Prompt, Response
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE, Actor
from tastemaker.store.desk import Desk
from tastemaker.store.tasks import DemonstrationAnswer, Guideline, NewItem, NewOutput, RankingAnswer, StudyConfig

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Dialog
    from playwright.sync_api import Page as Tab

# PostgreSQL holds no NUL, and imports from files refuse it as they refuse lone surrogates.
TEXTS = [text for text in (*RUNNING, *(text for text, _ in HIDING)) if text.isprintable() or "\n" in text]
STUDY = "</title><script>alert(1)</script>"
LEAD = '"><img src=x onerror=alert(1)>'
RATERS = ("<svg onload=alert(1)>", "</textarea><script>alert(1)</script>")
GROUP = "'><b onclick=alert(1)>g"
ALL = "\n".join(RUNNING[:40]).replace("\0", "")


def hostile(store: Store, services: Services) -> None:
    """Every name, text, reason and remark is an attack."""
    for name, role in ((LEAD, "lead"), *((name, "rater") for name in RATERS)):
        token = services.access.invite({role}, rater_group=GROUP if role == "rater" else None, actor=COMMAND_LINE).token
        services.access.accept(token, name=name, password=PASSWORD)
    lead = Actor(LEAD, "lead")
    guideline = Guideline(version='v"><script>alert(1)</script>', text=ALL)
    for kind, name in (("ranking", STUDY), ("demonstration", f"{STUDY} test")):
        config = StudyConfig(
            name=name,
            kind=kind,  # type: ignore[arg-type]
            purpose="training",
            rater_group=GROUP,
            overlap=2,
            guideline=guideline,
        )
        services.lead.create_study(config, actor=lead, screening=kind == "demonstration")
    outputs = tuple(NewOutput(response=Response(text=text), source=text) for text in (ALL, *TEXTS[:20]))
    prompt = Prompt(messages=tuple(Message("user", text) for text in TEXTS))
    services.lead.import_items(STUDY, [NewItem(key=STUDY, prompt=prompt, outputs=outputs)], actor=lead)
    services.lead.import_items(f"{STUDY} test", [NewItem(key=STUDY, prompt=prompt)], actor=lead)
    desk = Desk(store)
    for rater in RATERS:
        view = desk.next_task(rater, f"{STUDY} test")
        assert view is not None
        desk.submit(rater, view.task.id, DemonstrationAnswer(ALL))
        services.screening.decide(rater, passed=True, reason=ALL, actor=lead)
        view = desk.next_task(rater, STUDY)
        assert view is not None
        desk.flag(rater, view.task.id, "other", ALL[:400])
        by_text = sorted(view.task.outputs, key=lambda output: output.text, reverse=rater == RATERS[0])
        desk.submit(rater, view.task.id, RankingAnswer(tuple((output.letter,) for output in by_text)))
    answer = RankingAnswer((tuple("ABCDEFGHIJKLMNOPQRSTU"),))
    services.adjudication.adjudicate(STUDY, _item(services), answer, reason=ALL, actor=lead)


def _item(services: Services) -> int:
    return services.adjudication.disputed(STUDY, actor=Actor(LEAD, "lead"))[0].item


def _pages(services: Services, study: str, rater: str, *, disputed: str) -> list[str]:
    item = services.adjudication.disputed(disputed, actor=Actor(LEAD, "lead"))[0].item
    named, person = quote(study, safe=""), next(one.id for one in services.access.accounts() if one.name == rater)
    return [
        "/",
        "/studies",
        "/studies/new",
        f"/studies/study?study={named}",
        f"/studies/guideline?study={named}",
        f"/studies/unblind?study={named}",
        f"/figures?study={named}",
        f"/figures/rater?rater={quote(rater, safe='')}",
        "/screening",
        f"/adjudication?study={named}",
        f"/adjudication/item?study={quote(disputed, safe='')}&item={item}",
        "/people",
        f"/people/{person}",
        "/exports",
        "/audit",
    ]


class _Strict(HTMLParser):
    """Fails on anything that could run or fetch and is not the application's own."""

    scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = "html head meta title link script body a header div nav form input button main h1 h2 h3 p dl dt dd ul li"
        own += " table thead tbody tr th td progress section details summary fieldset legend label select option span"
        own += " datalist textarea code pre time svg rect strong em s br hr ol h4 h5 h6 blockquote aside"
        assert tag in own.split(), tag
        self.scripts += tag == "script"
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "srcdoc", "formaction", "ping"), (tag, name)
            if name in ("href", "src", "action"):
                outside = tag == "a" and (value or "").startswith(("http://", "https://", "mailto:"))
                assert outside or (value or "").startswith(("/", "#")), (tag, value)


def test_no_page_takes_text_for_markup(app: FastAPI, store: Store, services: Services) -> None:
    hostile(store, services)
    lead = signed_in(app, LEAD)
    answers = [lead.get(path) for path in _pages(services, STUDY, RATERS[0], disputed=STUDY)]
    answers += [
        send(lead, "/studies/unblind", study=STUDY, reason="r"),
        send(lead, "/studies/unblind", study=STUDY, reason="", item=ALL),
        send(lead, "/studies/new", name=STUDY, rater_group=GROUP, guideline_text=ALL, guideline_version=STUDY),
        send(lead, "/studies/guideline", study=STUDY, version=STUDY, text=ALL + " "),
        upload(lead, "/studies/import", STUDY, "<img src=x>.jsonl", b'{"prompt": "<script>"}'),
        send(lead, "/screening/decide", rater=RATERS[1], reason=ALL, passed=ALL),
        send(lead, "/screening/cut-offs", group=GROUP, flags=STUDY, rankings=ALL, demonstrations="9", unasked=[ALL]),
        send(lead, "/adjudication/item", study=STUDY, item=str(_item(services)), reason=ALL),
        send(lead, "/people/invite", role=[RATERS[1]], rater_group=GROUP),
        send(lead, "/exports", study=[STUDY], then="manifest", reason=ALL),
        send(lead, "/exports", study=[STUDY], format=ALL),
        send(lead, "/audit/verify", since=ALL),
    ]
    for answer in answers:
        assert answer.status_code in (200, 303, 422), answer.url
        parsed = _Strict(convert_charrefs=True)
        parsed.feed(answer.text)
        parsed.close()
        assert answer.text.count('<form method="post"') == answer.text.count('name="csrf_token"'), answer.url
        assert parsed.scripts == (answer.status_code != 303), answer.url


# --- in a real browser ----------------------------------------------------------------------------------------------


def _sign_in(tab: Tab, address: str, name: str) -> None:
    tab.goto(f"{address}/sign-in")
    tab.fill("[name=name]", name)
    tab.fill("[name=password]", PASSWORD)
    tab.keyboard.press("Enter")
    tab.wait_for_url(f"{address}/")


def test_nothing_runs_in_chromium(chromium: Chromium, sqlite: str) -> None:
    with Store.open(sqlite) as store, served(store) as address:
        services = Services.over(store)
        hostile(store, services)
        context = chromium.new_context()
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.add_init_script(WATCH)
        dialogs: list[str] = []
        fetched: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            dialogs.append(dialog.message)
            dialog.dismiss()

        tab.on("dialog", dismiss)
        tab.on("request", lambda request: fetched.append(request.url))
        _sign_in(tab, address, LEAD)
        paths = _pages(services, STUDY, RATERS[0], disputed=STUDY)
        for path in (path for path in paths if path.startswith(("/adjudication/item", "/screening"))):
            tab.goto(f"{address}{path}")
            tab.wait_for_load_state("networkidle")
            tab.evaluate("document.querySelectorAll('main *').forEach(e => e.dispatchEvent(new Event('mouseover')))")
            assert (dialogs, tab.evaluate("violations")) == ([], [])
            assert tab.locator(".text :is(script, img, svg, iframe, form, input, style, object, embed)").count() == 0
        assert all(url.startswith(f"{address}/") for url in fetched)
        context.close()


def test_every_page_is_accessible_and_fits_a_phone(chromium: Chromium, sqlite: str) -> None:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

    with Store.open(sqlite) as store, served(store) as address:
        services = Services.over(store)
        fill(store, services)
        context = chromium.new_context(viewport={"width": 390, "height": 800})
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        _sign_in(tab, address, "root")
        for path in _pages(services, RANKING, "ann", disputed="ratings"):
            if path.startswith("/adjudication?"):
                path = "/adjudication?study=ratings"
            tab.goto(f"{address}{path}")
            found = Axe().run(tab).response["violations"]
            serious = [
                (one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")
            ]
            assert serious == [], path
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than a phone"
        context.close()
