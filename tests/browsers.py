"""The browser that tests drive: found, or installed. `python -m tests.browsers` sees to it before the tests run.

A Chromium on the path is taken first, then Playwright's own. Where there is neither, Playwright downloads its own where
the network allows it, and as root on Debian its packages have one. Of each the shell without windows is preferred: it
draws the same pages in two thirds of the time. Where nothing helps, the tests that need a browser are skipped, which is
said; with TASTEMAKER_BROWSER=required, as in continuous integration, they fail instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NoReturn

import pytest
from playwright.sync_api import Browser, Error, Playwright, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium-headless-shell", "chromium")  # Debian's; older ones have the second alone
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
DOWNLOAD_WITHIN, PACKAGES_WITHIN = 600, 1200  # seconds


def launch(driver: Playwright) -> Browser:
    """Start the browser there is; playwright's `Error` where none starts."""
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    return driver.chromium.launch(executable_path=installed, args=list(OPTIONS))


def is_required() -> bool:
    return os.environ.get("TASTEMAKER_BROWSER") == "required"


def fail_or_skip(why: str) -> NoReturn:
    """End the test that cannot have a browser, loudly."""
    if is_required():
        pytest.fail(f"TASTEMAKER_BROWSER=required, and no browser can be started: {why}")
    pytest.skip(f"NO BROWSER TESTS: no Chromium can be started ({why})")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A real browser, or a loud skip where there is none.

    It ends with its module, because while it is driven a loop of asyncio counts as running in this thread, and tests of
    another file that start one of their own would be refused.
    """
    with sync_playwright() as driver:
        try:
            found = launch(driver)
        except Error as error:
            fail_or_skip(str(error).strip().splitlines()[0])
        yield found
        found.close()


def why_none_starts() -> str | None:
    """What the browser says that does not start; None if it does."""
    with sync_playwright() as driver:
        try:
            launch(driver).close()
        except Error as error:
            return str(error).strip().splitlines()[0]
    return None


def download() -> None:
    """Playwright's own Chromium, for this user alone."""
    attempt([sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"], DOWNLOAD_WITHIN)


def install_packages() -> None:
    """Debian's Chromium with the libraries it needs; root only."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        attempt([*quiet, "update"], PACKAGES_WITHIN)
        any(attempt([*quiet, "install", "--yes", "--no-install-recommends", one], PACKAGES_WITHIN) for one in PACKAGES)


def attempt(command: list[str], within: float) -> bool:
    """Run it and say whether it succeeded; whether it helped is for the browser to show."""
    print("$", " ".join(command), flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        ended = subprocess.run(command, env=environment, timeout=within, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        print(f"  not done after {within:.0f} s")
        return False
    said = (ended.stderr or ended.stdout).strip().splitlines()
    why = next((line.strip() for line in said if "rror" in line), said[-1] if said else "it says nothing")
    print("  done" if ended.returncode == 0 else f"  failed: {why}", flush=True)
    return ended.returncode == 0


def main() -> int:
    """Have a browser, or say loudly that there is none; 1 where one is required."""
    why = why_none_starts()
    for get in (download, install_packages):
        if why is None:
            return 0
        get()
        why = why_none_starts()
    if why is None:
        return 0
    print("\n".join(("=" * 72, "NO BROWSER: the tests of pages in a browser will not run.", why, "=" * 72)))
    print("Install one: `python -m playwright install --with-deps chromium`, or Debian's package chromium.")
    return int(is_required())


if __name__ == "__main__":
    sys.exit(main())
