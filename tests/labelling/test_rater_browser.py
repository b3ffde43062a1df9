"""A rater at a real browser: by keyboard alone, on a phone, without JavaScript, and with work not to be lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from tests.labelling.conftest import PASSWORD, PATIENCE, QUICK, served
from tests.store.conftest import Make

from tastemaker.store import LabelService, Store
from tastemaker.store.access import AccessService
from tastemaker.store.audit import COMMAND_LINE

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page


class Rater:
    """Ann, whose group has a study of each kind, and the server that she works at."""

    def __init__(self, store: Store, address: str, chromium: Chromium) -> None:
        self.labels = LabelService(store)
        self.address = address
        self._chromium = chromium
        make = Make()
        access = AccessService(store, hasher=QUICK)
        invited = access.invite({"rater"}, rater_group="team", actor=COMMAND_LINE)
        access.accept(invited.token, name="ann", password=PASSWORD)
        for kind, outputs in (("demonstration", 0), ("ranking", 5), ("comparison", 2), ("rating", 2)):
            self.labels.queue(make.study(kind, name=kind), make.items(2, outputs))  # type: ignore[arg-type]

    def window(self, *, javascript: bool = True) -> Page:
        """A browser of its own, at the sign-in page."""
        context = self._chromium.new_context(java_script_enabled=javascript, viewport={"width": 390, "height": 800})
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{self.address}/desk")
        return page

    def signed_in(self, *, javascript: bool = True) -> Page:
        page = self.window(javascript=javascript)
        self.sign_in(page)
        return page

    def sign_in(self, page: Page) -> None:
        page.fill("#name", "ann")
        page.fill("#password", PASSWORD)
        page.press("#password", "Enter")
        page.wait_for_url(f"{self.address}/desk")

    def start(self, page: Page, title: str) -> str:
        """Press Start; the task's address."""
        page.goto(f"{self.address}/desk")
        page.locator(f"button[aria-label$='{title}']").click()
        page.wait_for_url("**/desk/tasks/*")
        return page.url


@pytest.fixture
def ann(chromium: Chromium, sqlite: str) -> Iterator[Rater]:
    with Store.open(sqlite) as store, served(store) as address:
        yield Rater(store, address, chromium)
        for context in chromium.contexts:
            context.close()


def tab_to(page: Page, selector: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"the keyboard does not reach {selector}")


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def test_by_keyboard_alone(ann: Rater) -> None:
    page = ann.window()
    page.locator("#name:focus").wait_for()  # it has the focus by itself, soon after the page is there
    page.keyboard.type("ann")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{ann.address}/desk")
    # Write one: keys are letters in a text field.
    tab_to(page, "button[aria-label$='Write a response']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/desk/tasks/*")
    first = page.url
    tab_to(page, "textarea")
    page.keyboard.type("A 1 and a ? of mine.")
    page.keyboard.press("Control+Enter")
    page.wait_for_url(lambda url: "/tasks/" in url and url != first)
    assert [one.response for one in ann.labels.demonstrations("demonstration")] == ["A 1 and a ? of mine."]
    # Rank five with a tie: by letter and digit, by Tab and digit, by arrows.
    page.goto(f"{ann.address}/desk")
    tab_to(page, "button[aria-label$='Rank responses']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/desk/tasks/*")
    ranked = page.url
    press(page, "1")
    assert page.locator("[data-answer] :checked").count() == 0, "a digit ranks nothing while no response has the focus"
    press(page, "c 1 a 3 Tab 2 d 2")
    assert page.locator("[data-order]").inner_text() == "Best first: C, then B = D, then A · 1 to go"
    tab_to(page, "input[name=rank-E]")
    press(page, "ArrowRight")
    assert page.locator("input[name=rank-E]:checked").get_attribute("value") == "2"
    press(page, "5 Control+Enter")
    page.wait_for_url(lambda url: "/tasks/" in url and url != ranked)
    (given,) = ann.labels.rankings("ranking")
    assert [len(group) for group in given.order] == [1, 2, 1, 1]
    # Change it, and undo.
    tab_to(page, f"a[href='{ranked.removeprefix(ann.address)}']")
    page.keyboard.press("Enter")
    page.wait_for_url(ranked)
    press(page, "c 5 Control+Enter")
    page.wait_for_selector("text=Your answer is stored as it is now.")
    assert ann.labels.rankings("ranking")[0].order != given.order
    tab_to(page, "form[action$='/undo'] button")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The answer before counts again.")
    assert ann.labels.rankings("ranking")[0].order == given.order


def test_single_keys_choose_and_can_be_switched_off(ann: Rater) -> None:
    page = ann.signed_in()
    ann.start(page, "Compare two responses")
    page.keyboard.press("b")
    assert page.locator("[name=choice]:checked").get_attribute("value") == "B"
    page.keyboard.press("?")
    page.locator("[data-keys-on]").uncheck()
    page.keyboard.press("t")
    assert page.locator("[name=choice]:checked").get_attribute("value") == "B"
    page.goto(f"{ann.address}/desk")
    ann.start(page, "Compare two responses")
    page.keyboard.press("t")
    assert page.locator("[name=choice]:checked").get_attribute("value") == "B", "the draft, and the switch as it was"
    page.locator("button[value=submit]").click()
    page.wait_for_selector("text=Your answer is stored.")
    (given,) = ann.labels.comparisons("comparison")
    assert 0 < given.seconds < 60


def test_drafts_save_themselves(ann: Rater) -> None:
    page = ann.signed_in()
    task = ann.start(page, "Write a response")
    page.fill("textarea#text", "after a pause")
    page.wait_for_selector("text=Draft saved")
    page.fill("textarea#text", "on leaving")
    page.goto(f"{ann.address}/desk/history")
    page.wait_for_load_state("networkidle")
    elsewhere = ann.signed_in()
    elsewhere.goto(task)
    assert elsewhere.input_value("textarea#text") == "on leaving"
    # The first window comes back as well; then it is the older one.
    page.goto(task)
    elsewhere.fill("textarea#text", "newest")
    elsewhere.wait_for_selector("text=Draft saved")
    page.fill("textarea#text", "from an older window")
    page.wait_for_selector("text=This draft was saved elsewhere meanwhile")
    elsewhere.goto(f"{ann.address}/desk")
    elsewhere.goto(task)
    assert elsewhere.input_value("textarea#text") == "newest"


def test_nothing_is_lost_when_the_session_has_ended(ann: Rater) -> None:
    page = ann.signed_in()
    ann.start(page, "Write a response")
    other = page.context.new_page()
    other.goto(f"{ann.address}/account")
    other.click("text=Sign out everywhere")
    other.wait_for_url("**/sign-in")
    page.fill("textarea#text", "written meanwhile")
    page.click("button[value=submit]")
    page.wait_for_selector("text=Your session has ended.")
    assert page.input_value("textarea#text") == "written meanwhile"
    other.goto(f"{ann.address}/desk")
    ann.sign_in(other)
    page.click("button[value=submit]")
    page.wait_for_selector("text=Your answer is stored.")
    assert [one.response for one in ann.labels.demonstrations("demonstration")] == ["written meanwhile"]


def test_nothing_is_lost_when_the_server_is_away(ann: Rater) -> None:
    page = ann.signed_in()
    ann.start(page, "Write a response")
    page.fill("textarea#text", "written offline")
    page.context.set_offline(True)
    page.click("button[value=submit]")
    page.wait_for_selector("text=The server cannot be reached.")
    page.context.set_offline(False)
    page.click("button[value=submit]")
    page.wait_for_selector("text=Your answer is stored.")
    assert [one.response for one in ann.labels.demonstrations("demonstration")] == ["written offline"]


def test_pages_are_accessible_and_fit_a_phone(ann: Rater) -> None:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

    page = ann.signed_in()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def check() -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # or it measures colours half-way
            found = Axe().run(page).response["violations"]
            bad = [
                (one["id"], page.url, [(node["html"], node["failureSummary"]) for node in one["nodes"]])
                for one in found
                if one["impact"] in ("serious", "critical")
            ]
            assert bad == [], scheme
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{page.url} is wider than a phone"

    check()
    for title in ("Write a response", "Rank responses", "Compare two responses"):
        ann.start(page, title)
        check()
    for path in ("**/desk/tasks/*", "**/desk/finished*"):  # a rater may have three tasks open, so finish these
        page.locator(".choices label").first.click()
        page.click("button[value=submit]")
        page.wait_for_selector("text=Your answer is stored.")
        page.wait_for_url(path)
    ann.start(page, "Rate responses")
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    check()
    page.goto(f"{ann.address}/desk/history")
    check()
    page.click("ul.list a")
    page.wait_for_url("**/desk/tasks/*")
    check()
    for path in ("/desk/topics", "/desk/finished?study=comparison", "/desk/guideline?version=v1"):
        page.goto(f"{ann.address}{path}")
        check()
    assert errors == []


def test_everything_works_without_javascript(ann: Rater) -> None:
    page = ann.signed_in(javascript=False)
    ann.start(page, "Rank responses")
    assert page.locator("details.keys").is_hidden(), "keys need JavaScript"
    for letter, rank in zip("ABCDE", "21345", strict=True):
        page.check(f"input[name=rank-{letter}][value='{rank}']", force=True)
    page.click("button[value=draft]")
    page.wait_for_selector("text=Your draft is saved.")
    page.goto(f"{ann.address}/desk")
    ann.start(page, "Rank responses")
    assert page.locator("[data-answer] :checked").count() == 5
    page.click("button[value=submit]")
    page.wait_for_selector("text=Your answer is stored.")
    (given,) = ann.labels.rankings("ranking")
    assert [len(group) for group in given.order] == [1] * 5
    page.click("details.remarks summary")
    page.select_option("[name=skip_reason]", "language")
    page.click("text=Skip with this reason")
    page.wait_for_selector("text=Nothing left here")
