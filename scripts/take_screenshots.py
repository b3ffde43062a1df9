"""Take the screenshots of the labelling application for the documentation: `python scripts/take_screenshots.py`.

A new store is filled with the prompts and responses of `screenshots.toml`; a team of simulated raters answers some of
them, over three weeks of a clock of its own. The application serves that store, and Chromium looks at it. Whoever
changes the look of a page takes the pictures again, and looks at them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from tastemaker.labelling.app import create_app
from tastemaker.labelling.serve import Address, bind
from tastemaker.labelling.web import Services
from tastemaker.raters import RaterProfile, SimulatedRater, average, careful, random_clicker
from tastemaker.records import Message, Prompt, Response, Role
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE, Actor
from tastemaker.store.exports import ExportConfig
from tastemaker.store.importing import GoldItem
from tastemaker.store.tasks import (
    DemonstrationAnswer,
    Guideline,
    NewItem,
    NewOutput,
    PrivatePrompt,
    RankingAnswer,
    StudyConfig,
    StudyKind,
)

ROOT = Path(__file__).parent.parent
CONTENT = Path(__file__).with_name("screenshots.toml")
GROUP, RANKINGS, SCREENING = "team", "helpfulness, November", "first test"
PASSWORD = "made up for pictures"
LEAD = Actor("lea", "lead")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
VIEWER = "amara"  # whose desk is shown
MONDAY_AT_NINE = 1_793_005_200.0  # 26 October 2026, UTC
DAY = 86_400.0
WORKDAYS = [day for day in range(19) if day % 7 < 5]
SEED, NOISE, HURRY = 7, 0.7, 0.15
GOLD_SHARE = 0.2
WORTH = (3.0, 2.0, 1.0, 0.0, -1.0)
"""What a response is worth to all raters, by its place in the file."""
PATIENCE = 120_000.0  # milliseconds


@dataclass(slots=True)
class Clock:
    """The time in the store, which goes on when somebody works."""

    now: float = MONDAY_AT_NINE

    def __call__(self) -> float:
        return self.now


# --- what is in the store ---------------------------------------------------------------------------------------------


class Content:
    """The prompts and responses of the file, as items."""

    def __init__(self, path: Path) -> None:
        self._raw: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        self.guideline = Guideline(version="2026-10", text=self._raw["guideline"].strip())
        self.worth: dict[str, float] = {}

    def shown(self, name: str) -> list[NewItem]:
        """The items that are seen on the pictures."""
        return [
            self._item(f"{name}-{index}", one["messages"], one["responses"])
            for index, one in enumerate(self._raw[name])
        ]

    def others(self, count: int) -> list[NewItem]:
        """The items of which only figures are seen, with the best responses of each."""
        raw = self._raw["others"]
        return [
            self._item(
                f"{subject}-{index}",
                [asking.format(subject)],
                [text.format(subject) + f" ({index + 1})" for text in raw["responses"][:count]],
            )
            for index, asking in enumerate(raw["askings"])
            for subject in raw["subjects"]
        ]

    def prompts(self) -> list[NewItem]:
        return [self._item(f"write-{index}", [text], []) for index, text in enumerate(self._raw["demonstrations"])]

    def _item(self, key: str, texts: Sequence[str], responses: Sequence[str]) -> NewItem:
        self.worth |= zip(responses, WORTH, strict=False)
        roles: tuple[Role, Role] = ("user", "assistant")
        return NewItem(
            key=key,
            prompt=Prompt(messages=tuple(Message(roles[index % 2], text) for index, text in enumerate(texts))),
            outputs=tuple(
                NewOutput(response=Response(text=text), source=f"policy {number}")
                for number, text in enumerate(responses, start=1)
            ),
        )


class Round:
    """A team in the middle of its work."""

    def __init__(self, services: Services, clock: Clock, content: Content) -> None:
        self._services, self._clock, self._content = services, clock, content
        self._team = {profile.name: self._rater(profile) for profile in _profiles()}

    def fill(self, folder: Path) -> None:
        """Accounts, studies, a test that all have passed, three weeks of answers, an export."""
        self._account("root", "admin")
        self._account(LEAD.name, "lead")
        for name in self._team:
            self._account(name, "rater")
        self._screen()
        lead, content = self._services.lead, self._content
        self._study(RANKINGS, "ranking", content.others(4), overlap=5)
        self._gold()
        self._study("quality, November", "rating", content.others(2)[::4])
        self._study("side by side", "comparison", content.others(2)[::3])
        self._answer()
        self._services.exports.export([RANKINGS], folder, actor=LEAD, config=ExportConfig(pairs=True))
        self._clock.now += 3 * 3600
        lead.set_guideline(
            RANKINGS, replace(content.guideline, version="2026-11", text=content.guideline.text + "\n"), actor=LEAD
        )
        lead.import_items(RANKINGS, content.shown("rankings"), actor=LEAD)
        lead.import_items("quality, November", content.shown("ratings"), actor=LEAD)
        lead.import_items("side by side", content.shown("comparisons"), actor=LEAD)
        self._study("demonstrations", "demonstration", content.prompts())

    def _account(self, name: str, role: str) -> None:
        access = self._services.access
        invited = access.invite({role}, rater_group=GROUP if role == "rater" else None, actor=COMMAND_LINE)
        access.accept(invited.token, name=name, password=PASSWORD)

    def _study(
        self, name: str, kind: StudyKind, items: Sequence[NewItem], *, overlap: int = 2, screening: bool = False
    ) -> None:
        config = StudyConfig(
            name=name,
            kind=kind,
            purpose="training",
            rater_group=GROUP,
            overlap=1 if screening else overlap,
            guideline=self._content.guideline,
        )
        self._services.lead.create_study(config, actor=LEAD, screening=screening)
        self._clock.now += 240
        self._services.lead.import_items(name, items, actor=LEAD)

    def _screen(self) -> None:
        """All have taken the test, and were let in."""
        self._study(SCREENING, "demonstration", self._content.prompts()[:1], screening=True)
        desk, screening = self._services.desk, self._services.screening
        for name in self._team:
            view = desk.next_task(name, SCREENING)
            assert view is not None
            self._clock.now += 200
            desk.submit(name, view.task.id, DemonstrationAnswer("To the rain, and to buses that are late."), 180)
        for waiting in screening.to_grade():
            screening.grade(waiting.answer, 6, actor=LEAD)
        for name in self._team:
            screening.decide(name, passed=True, reason="A warm toast, and of three sentences.", actor=LEAD)

    def _gold(self) -> None:
        """Items whose best response is beyond doubt, hidden among the others."""
        known = [replace(item, key=f"gold {item.key}") for item in self._content.others(4)[::6]]
        expected = RankingAnswer((("A",), ("B",), ("C",), ("D",)))
        self._services.lead.add_gold(RANKINGS, [GoldItem(item=item, expected=expected) for item in known], actor=LEAD)
        self._services.lead.set_gold_share(RANKINGS, GOLD_SHARE, actor=LEAD)

    def _answer(self) -> None:
        """Three weeks of answers, everybody taking turns every day; on the last one all that is left."""
        slots = sum(study.slots for study in self._services.lead.studies() if not study.screening)
        each = slots // (len(self._team) * len(WORKDAYS))
        for day in WORKDAYS:
            self._clock.now = max(self._clock.now, MONDAY_AT_NINE + day * DAY)
            for rater in self._team.values():
                for _ in range(each):
                    self._do_one(rater)
        while any([self._do_one(rater) for rater in self._team.values()]):
            pass

    def _do_one(self, rater: SimulatedRater) -> bool:
        """The rater's next task, of whatever study has one; False where none has."""
        name, desk = rater.profile.name, self._services.desk
        for study in desk.studies(name):
            view = desk.next_task(name, study.name) if study.left else None
            if view is None:
                continue
            private = PrivatePrompt(
                prompt=Prompt(messages=view.task.messages),
                responses=tuple(Response(text=output.text) for output in view.task.outputs),
            )
            answer = rater.answer(view.task, private, study=study.name)
            seconds = rater.seconds(private, answer, study=study.name) * (HURRY if rater.profile.lapse == 1 else 1)
            self._clock.now += seconds
            desk.submit(name, view.task.id, answer, seconds)
            return True
        return False

    def _rater(self, profile: RaterProfile) -> SimulatedRater:
        return SimulatedRater(profile, SEED, lambda _prompt, response: {"worth": self._content.worth[response.text]})


def _profiles() -> list[RaterProfile]:
    kinds = {VIEWER: careful, "jonas": average, "mei": careful, "priya": average, "tomas": average, "yusuf": average}
    kinds["kit"] = random_clicker
    return [kind(name, group=GROUP, weights={"worth": 1.0}, noise=NOISE) for name, kind in kinds.items()]


# --- what is looked at ------------------------------------------------------------------------------------------------


class Camera:
    """Takes pictures of pages into a folder."""

    def __init__(self, chromium: Browser, address: str, out: Path) -> None:
        self._chromium, self._address, self._out = chromium, address, out

    def window(self, name: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> Page:
        """A window in which somebody has signed in."""
        context = self._chromium.new_context(
            viewport={"width": width, "height": height},
            device_scale_factor=1 if width > 1000 else 1.5,
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            locale="en-GB",
            timezone_id="UTC",
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        self.open(page, "/sign-in")
        page.fill("#name", name)
        page.fill("#password", PASSWORD)
        page.press("#password", "Enter")
        page.wait_for_url(lambda url: "sign-in" not in url)
        return page

    def open(self, page: Page, path: str) -> None:
        page.goto(f"{self._address}{path}")

    def start(self, page: Page, title: str) -> None:
        """Begin a task."""
        self.open(page, "/desk")
        page.locator(f"button[aria-label$='{title}']").click()
        page.wait_for_url("**/desk/tasks/*")

    def take(self, page: Page, name: str, *, height: int | None = None) -> None:
        """A picture of what the window shows, of another height if one is given."""
        path = self._out / f"labelling-{name}.png"
        if height is not None and page.viewport_size is not None:
            page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
        page.wait_for_load_state("networkidle")
        page.screenshot(path=path, animations="disabled", caret="hide")
        print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def of_a_rater(camera: Camera, texts: Sequence[str]) -> None:
    """The pages of a rater; `texts` are the responses of the ranking, from the best on."""
    page = camera.window(VIEWER)
    camera.open(page, "/desk")
    camera.take(page, "desk", height=640)
    camera.start(page, "Rank responses")
    page.locator(".guideline summary").click()
    for text, rank in zip(texts, "12245", strict=True):
        page.keyboard.press(page.locator(".response", has_text=text).get_attribute("data-response") or "")
        page.keyboard.press(rank)
    page.evaluate("scrollTo(0, 0)")
    camera.take(page, "ranking", height=760)
    page.locator(".guideline summary").click()  # it stays folded on the next page
    camera.start(page, "Rate responses")
    for key in "a6":
        page.keyboard.press(key)
    page.evaluate("scrollTo(0, 0)")
    camera.take(page, "rating", height=800)
    phone = camera.window(VIEWER, width=390, height=844, dark=True)
    camera.start(phone, "Compare two responses")
    phone.keyboard.press("a")
    phone.locator(".turn").last.evaluate("turn => scrollTo(0, turn.offsetTop - 24)")
    camera.take(phone, "phone")


def of_a_lead(camera: Camera) -> None:
    """The pages of a lead."""
    page = camera.window(LEAD.name)
    named = quote(RANKINGS, safe="")
    for name, path in (
        ("study", f"/studies/study?study={named}"),
        ("agreement", f"/figures?study={named}"),
        ("audit", "/audit"),
        ("figures", "/figures"),
    ):
        camera.open(page, path)
        camera.take(page, name)


@contextmanager
def served(store: Store, clock: Clock) -> Iterator[str]:
    """The application answering on a port of this machine; its address."""
    listening, settings = bind(Address(port=0))
    app = create_app(store, settings, clock=clock)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield settings.origins[0]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def main() -> None:
    """Fill a store, serve it, and take all pictures."""
    parser = argparse.ArgumentParser(description="Take the screenshots of the labelling application.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="the folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "labels.db") as store:
        content = Content(CONTENT)
        Round(Services.over(store, clock=clock), clock, content).fill(Path(folder) / "export")
        ranked = [output.response.text for output in content.shown("rankings")[0].outputs]
        with served(store, clock) as address, sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=installed, args=["--no-sandbox", "--disable-gpu"])
            camera = Camera(chromium, address, out)
            of_a_rater(camera, ranked)
            of_a_lead(camera)
            chromium.close()


if __name__ == "__main__":
    main()
