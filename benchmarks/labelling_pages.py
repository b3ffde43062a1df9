"""How heavy are the pages that raters work on, and how soon do they paint? In a real browser, on loopback.

    python benchmarks/labelling_pages.py [--loads 20] [--database URL]

Starts `tastemaker label serve` over a new store (or the empty PostgreSQL database at URL), signs a rater in and opens
each page `--loads` times, the first time with an empty cache, then as a rater meets it, with the style and the script
kept. Reports, as the browser's own timings have them: what came over the wire on the first visit, the time to the first
response byte, to the first contentful paint, and to the end of loading. Prints a Markdown table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from labelling_load import GROUP, items, server
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from tastemaker.store import LabelService, Store
from tastemaker.store.access import AccessService
from tastemaker.store.audit import COMMAND_LINE
from tastemaker.store.tasks import Guideline, StudyConfig, StudyKind

# The responses of each kind of task. A rater may hold three at once; a comparison is a small ranking.
KINDS: dict[StudyKind, int] = {"demonstration": 0, "rating": 5, "ranking": 5}
NAME, PASSWORD = "ann", "four plain words here"
VIEW: ViewportSize = {"width": 1280, "height": 800}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
TIMES = ("response", "paint", "loaded")
TIMINGS = """() => {
    const page = performance.getEntriesByType("navigation")[0];
    const paint = performance.getEntriesByName("first-contentful-paint")[0];
    const all = [page, ...performance.getEntriesByType("resource")];
    return {
        bytes: all.reduce((sum, entry) => sum + entry.transferSize, 0),
        response: page.responseStart, paint: paint ? paint.startTime : null, loaded: page.loadEventEnd,
    };
}"""


def prepare(database: str) -> str:
    """A study of each kind, and an invitation for a rater; its path."""
    guidance = "Prefer what helps, then what is true, then what does no harm.\n" * 20
    with Store.open(database) as store:
        for kind, outputs in KINDS.items():
            guideline = Guideline(version=kind, text=guidance)
            study = StudyConfig(name=kind, kind=kind, purpose="training", rater_group=GROUP, guideline=guideline)
            LabelService(store).queue(study, items(3, seed=1, outputs=outputs))
        invitation = AccessService(store).invite({"rater"}, rater_group=GROUP, actor=COMMAND_LINE)
        return f"/invitation/{invitation.token}"


def enter(browser: Browser, invitation: str) -> Page:
    """A window in which the rater has made an account."""
    page = browser.new_page(viewport=VIEW)
    page.goto(invitation)
    page.fill("#name", NAME)
    page.fill("#password", PASSWORD)
    page.fill("#again", PASSWORD)
    page.press("#again", "Enter")
    page.wait_for_url(lambda now: "invitation" not in now)
    return page


def addresses(page: Page, address: str) -> dict[str, str]:
    """The pages to look at, by name; a task of each kind is begun for it."""
    found = {"desk": f"{address}/desk", "history": f"{address}/desk/history"}
    for kind in KINDS:
        page.goto(found["desk"])
        page.locator("form", has=page.locator(f"input[value='{kind}']")).locator("button").first.click()
        page.wait_for_url("**/desk/tasks/*")
        found[kind] = page.url
    return found


def measure(page: Page, url: str, loads: int) -> dict[str, float]:
    """The timings of one page, in milliseconds: the first visit's, and the median of later ones."""
    page.goto("about:blank")
    page.context.new_cdp_session(page).send("Network.clearBrowserCache")
    first, *later = [look(page, url) for _ in range(loads + 1)]
    return {
        "kilobytes": round(first["bytes"] / 1000, 1),
        "first_visit_paint_ms": round(first["paint"], 1),
        **{f"{name}_ms": round(statistics.median(each[name] for each in later), 1) for name in TIMES},
        "paint_longest_ms": round(max(each["paint"] for each in later), 1),
    }


def look(page: Page, url: str) -> dict[str, float]:
    page.goto(url)
    while (timings := page.evaluate(TIMINGS))["paint"] is None:
        page.wait_for_timeout(5)
    return dict(timings)


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="labelling-pages-") as name:
        database = options.database or str(Path(name) / "labels.db")
        path = prepare(database)
        with server(database, Path(name), workers=1) as address, sync_playwright() as driver:
            installed = next(filter(None, map(shutil.which, BROWSERS)), None)
            browser = driver.chromium.launch(executable_path=installed, args=["--no-sandbox", "--disable-gpu"])
            page = enter(browser, address + path)
            measured = {name: measure(page, url, options.loads) for name, url in addresses(page, address).items()}
            browser.close()
    print("| page | first visit | its first paint | later visits: response | first paint | longest | loaded |")
    print("|---|---|---|---|---|---|---|")
    for name, row in measured.items():
        print(
            f"| {name} | {row['kilobytes']} kB | {row['first_visit_paint_ms']} ms | {row['response_ms']} ms "
            f"| {row['paint_ms']} ms | {row['paint_longest_ms']} ms | {row['loaded_ms']} ms |"
        )
    print(json.dumps(measured))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loads", type=int, default=20, help="how often each page is opened after the first visit")
    parser.add_argument("--database", default=None, help="an empty PostgreSQL database; a new SQLite file if left out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
