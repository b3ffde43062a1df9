"""A person at a browser who has no mouse: controls are reached by Tab and known by the names that are read out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.labelling.conftest import PATIENCE

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Download


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """What has the focus, as the browser tells it to a screen reader, and the names of what it stands in."""

    node: int
    role: str
    name: str
    within: tuple[str, ...]


class Keyboard:
    """A browser of its own, opened at an address that somebody was given; from there on by keys alone."""

    def __init__(self, chromium: Chromium, address: str) -> None:
        context = chromium.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
        context.set_default_timeout(PATIENCE)
        self._page = context.new_page()
        self._devtools = context.new_cdp_session(self._page)
        self._devtools.send("Accessibility.enable")
        self._page.on("filechooser", lambda _opened: None)  # so that no dialogue opens that nobody could close
        self._page.goto(address)

    def close(self) -> None:
        """Leave."""
        self._page.context.close()

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        for key in keys:
            self._page.keyboard.press(key)

    def reads(self, text: str) -> None:
        """Wait until the page that comes says this; an `h1` is `# ` and its words."""
        heading = text.startswith("# ")
        found = (
            self._page.get_by_role("heading", level=1, name=text.removeprefix("# "), exact=True)
            if heading
            else self._page.get_by_text(text).first
        )
        found.wait_for()
        self._page.wait_for_load_state("load")
        if self._page.locator("[autofocus]").count():
            self._page.locator(":focus").wait_for()

    def text(self, selector: str) -> str:
        """What stands somewhere on the page: eyes need no keys."""
        return self._page.locator(selector).inner_text()

    def stop(self) -> Stop:
        """What has the focus now."""
        focused = self._devtools.send("Runtime.evaluate", {"expression": "document.activeElement"})["result"]
        nodes = self._devtools.send("Accessibility.getAXNodeAndAncestors", {"objectId": focused["objectId"]})["nodes"]
        names = [str(node.get("name", {}).get("value", "")).strip() for node in nodes]
        role = str(nodes[0].get("role", {}).get("value", ""))
        return Stop(node=nodes[0]["backendDOMNodeId"], role=role, name=names[0], within=tuple(filter(None, names[1:])))

    def to(self, name: str, *, within: str | None = None) -> Stop:
        """Press Tab until the control of that name has the focus; fails when all of the page has been gone through."""
        seen: set[str] = set()
        for stop in self._round():
            if stop.name == name and (within is None or within in stop.within):
                return stop
            seen.add(repr(stop.name))
        raise AssertionError(f"Tab does not reach {name!r} on {self._page.url}; it reaches {', '.join(sorted(seen))}")

    def _round(self) -> Iterator[Stop]:
        """Every stop of the page, from the one that has the focus on."""
        seen: set[int] = set()
        while (stop := self.stop()).node not in seen:
            seen.add(stop.node)
            yield stop
            self.press("Tab")

    def activate(self, name: str, *, within: str | None = None) -> None:
        """Go to a link or button and press Enter."""
        self.to(name, within=within)
        self.press("Enter")

    def write(self, name: str, text: str) -> None:
        """Go to a field and type; what stands in it is replaced."""
        self.to(name)
        self.press("Control+a")
        self._page.keyboard.type(text)

    def pick(self, name: str, option: str) -> None:
        """Go to a list of choices and type how the wanted one begins."""
        self.to(name)
        self._page.keyboard.type(option)
        chosen = self._page.evaluate("document.activeElement.selectedOptions[0].label")
        assert chosen.startswith(option), f"{name} says {chosen!r}"

    def tick(self, name: str) -> None:
        """Go to a box and tick it."""
        self.to(name)
        self.press("Space")
        assert self._page.evaluate("document.activeElement.checked"), f"{name} is not ticked"

    def choose(self, group: str, value: str) -> None:
        """Go to a group of radio buttons and take one by the arrows."""
        if not any(group in stop.within for stop in self._round()):
            raise AssertionError(f"Tab does not reach {group!r} on {self._page.url}")
        first = self.stop()
        stop = first
        while stop.name != value:
            self.press("ArrowRight")
            stop = self.stop()
            assert stop != first, f"{group} has no {value!r}"
        self.press("Space")

    def choose_file(self, name: str, path: Path) -> None:
        """Go to a field for files and open its dialogue, which the system answers with a path."""
        self.to(name)
        with self._page.expect_file_chooser() as opened:
            self.press("Enter")
        opened.value.set_files(path)

    def download(self, name: str) -> Download:
        """Go to a button that answers with a file."""
        self.to(name)
        with self._page.expect_download() as begun:
            self.press("Enter")
        return begun.value
