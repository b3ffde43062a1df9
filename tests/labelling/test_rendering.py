"""Hostile text neither runs, nor fetches, nor hides: in the markup, and in a real browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Annotated

import pytest
from fastapi import APIRouter, FastAPI
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import ChoiceLoader, DictLoader
from starlette.responses import Response
from tests.labelling.conftest import PATIENCE, served
from tests.labelling.payloads import HIDING, PLAIN, RUNNING

from tastemaker.labelling.rendering import markdown, raw, visible
from tastemaker.labelling.web import Page, open_to_all
from tastemaker.records import Message
from tastemaker.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Dialog

MODES = {"raw": raw, "markdown": markdown}
TAGS = set(
    "div p br hr strong em s code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th td a span".split()
)
CLASSES = {"text raw", "text markdown", "mark", "address"}


class Markup(HTMLParser):
    """The tags and the text of rendered markup."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(str(markup))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(f"a declaration: {decl}")


def check_harmless(markup: str) -> None:
    """Only tags, attributes, classes and addresses of the allow-list, spelled out here once more."""
    for tag, attributes in Markup(markup).tags:
        assert tag in TAGS
        for name, value in attributes.items():
            if name == "href":
                assert tag == "a"
                assert re.match(r"(https?://|mailto:)", value or "")
            elif name == "class":
                assert value in CLASSES
            elif name == "start":
                assert tag == "ol"
            else:
                assert (name, value) in {("dir", "auto"), ("rel", "noopener noreferrer nofollow")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", [*RUNNING, *(text for text, _ in HIDING)])
def test_nothing_runs_or_fetches(mode: str, text: str) -> None:
    assert len(RUNNING) >= 40
    check_harmless(MODES[mode](text))


@given(st.text(st.characters() | st.sampled_from("<>&\"'`[]()!*_|\\ \n:/#-"), max_size=200))
def test_no_text_runs_or_breaks(text: str) -> None:
    for render in MODES.values():
        check_harmless(render(text))


@pytest.mark.parametrize("text", RUNNING)
def test_raw_shows_every_character(text: str) -> None:
    shown = Markup(raw(text)).text
    assert shown == text.replace("\x00", "U+0000").replace("\ufeff", "U+FEFF")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("text", "points"), HIDING)
def test_invisible_characters_are_shown(mode: str, text: str, points: list[str]) -> None:
    markup = MODES[mode](text)
    for point in points:
        assert f"U+{point}" in markup
    for character in text:
        if f"{ord(character):04X}" in points:
            assert character not in markup


@pytest.mark.parametrize(
    "text", ["a&zwj;b", "a&#x202e;b", "`a\u202eb`", "```\na\u202eb\n```", "[a\u202eb](https://x.example)"]
)
def test_markdown_hides_them_nowhere(text: str) -> None:
    markup = markdown(text)
    assert '<span class="mark">U+20' in markup
    assert not set(markup) & set("\u202e\u200d")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", PLAIN)
def test_what_writing_needs_is_left_alone(mode: str, text: str) -> None:
    assert 'class="mark"' not in MODES[mode](text)
    assert text in MODES[mode](text)


def test_a_flood_of_invisible_characters_is_counted() -> None:
    assert raw("\u200b" * 100_000).count("U+") == 3
    assert "and 99997 more" in raw("\u200b" * 100_000)


def test_a_link_says_where_it_goes() -> None:
    shown = Markup(markdown("[your bank](https://evil.example/?a=<b>)")).text
    assert "your bank (https://evil.example/?a=%3Cb%3E)" in shown
    assert Markup(markdown("<https://a.example/>")).text.count("https://a.example/") == 1


def test_markdown_is_rendered() -> None:
    rendered = "<p><strong>b</strong> <em>i</em> <s>s</s><br>\nnew <code>c</code></p>\n"
    assert markdown("**b** *i* ~~s~~\nnew `c`") == f'<div class="text markdown" dir="auto">{rendered}</div>'
    assert "<td>1</td>" in markdown("|a|\n|-|\n|1|")
    assert '<ol start="7">' in markdown("7. seven")


@pytest.mark.parametrize(
    "text", ["<b>bold</b>", "<h1>Title</h1>", "a <em>b</em> c", "<a href='https://x.example'>x</a>"]
)
def test_markup_in_markdown_is_shown_and_not_taken(text: str) -> None:
    assert text in Markup(markdown(text)).text


@pytest.mark.parametrize("text", [">" * 500 + "deep", "x" * 50_001, "\n".join("  " * n + "- deep" for n in range(60))])
def test_text_too_deep_or_long_is_shown_raw_and_whole(text: str) -> None:
    assert markdown(text) == raw(text)


def test_names_are_shown_in_one_line() -> None:
    assert visible("<b>ann\u202e") == '&lt;b&gt;ann<span class="mark">U+202E</span>'


# --- in a real browser ----------------------------------------------------------------------------------------------

PAGE = """{% extends "base.html" %}{% block title %}Texts{% endblock %}{% block content %}<h1>Texts</h1>
{{ ui.conversation(messages) }}{{ ui.conversation(messages, "markdown") }}
{% if unguarded %}{{ unguarded | safe }}{% endif %}{% endblock %}"""
WATCH = (
    "window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(e.violatedDirective));"
)


def add_page(app: FastAPI) -> None:
    """A page that shows all payloads as a task's page does, and one that forgets to escape one of them."""
    router, environment = APIRouter(), app.state.web.templates
    environment.loader = ChoiceLoader([environment.loader, DictLoader({"texts.html": PAGE})])

    @router.get("/texts")
    def texts(page: Annotated[Page, open_to_all()], unguarded: str = "") -> Response:
        found = [Message("user", text) for text in (*RUNNING, *(text for text, _ in HIDING), *PLAIN)]
        return page.render("texts.html", messages=found, unguarded=unguarded)

    app.include_router(router)


def test_nothing_runs_in_chromium(chromium: Chromium, sqlite: str) -> None:
    with Store.open(sqlite) as store, served(store, add_page) as address:
        page = chromium.new_page()
        page.set_default_timeout(PATIENCE)
        page.add_init_script(WATCH)
        dialogs: list[str] = []
        fetched: list[str] = []
        errors: list[str] = []

        def dismiss(dialog: Dialog) -> None:
            dialogs.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", dismiss)
        page.on("request", lambda request: fetched.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/texts")
        page.wait_for_load_state("networkidle")
        page.evaluate("document.querySelectorAll('.text *').forEach(e => e.dispatchEvent(new Event('mouseover')))")
        assert (dialogs, errors, page.evaluate("violations")) == ([], [], [])
        assert all(url.startswith(f"{address}/") for url in fetched)
        assert page.locator(".text.raw").first.inner_text() == RUNNING[0]
        assert page.locator(".text :is(script, img, svg, iframe, form, input, style, object, embed, link)").count() == 0
        # If a page forgot to escape, the policy would still let nothing run; and this test would see it.
        page.goto(f"{address}/texts?unguarded=<script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>")
        page.wait_for_load_state("networkidle")
        assert dialogs == []
        assert {"script-src-elem", "img-src"} <= set(page.evaluate("violations"))
        page.close()


def test_account_pages_in_chromium(chromium: Chromium, sqlite: str) -> None:
    """Signing in by keyboard alone, and no serious finding of axe on any page, in light and dark, on a phone."""
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

    from tastemaker.store.access import AccessService
    from tastemaker.store.audit import COMMAND_LINE

    with Store.open(sqlite) as store, served(store) as address:
        token = AccessService(store).invite({"rater"}, rater_group="team", actor=COMMAND_LINE).token
        context = chromium.new_context(viewport={"width": 390, "height": 800})
        context.set_default_timeout(PATIENCE)
        page = context.new_page()

        def check() -> None:
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # or it measures colours half-way
                found = Axe().run(page).response["violations"]
                assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == [], scheme
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than a phone"

        page.goto(f"{address}/invitation/{token}")
        check()
        for word in ("ann", "four plain words", "four plain words"):
            page.keyboard.type(word)
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url(f"{address}/desk")  # a rater has but one section
        check()
        for path in ("/account", "/nowhere"):
            page.goto(f"{address}{path}")
            check()
        page.click("text=Sign out")
        page.wait_for_url(f"{address}/sign-in")
        check()
        context.close()
