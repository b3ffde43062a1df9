"""`make test` has a browser, or says that it has none; in continuous integration that is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # nothing answers there


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m tests.browsers`, as `make test` runs it."""
    names = {"TASTEMAKER_BROWSER", "PLAYWRIGHT_BROWSERS_PATH", "PLAYWRIGHT_DOWNLOAD_HOST"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-m", "tests.browsers"],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def without_any(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same on a machine with no browser, no packages and no network."""
    return run(PATH=str(folder), PLAYWRIGHT_BROWSERS_PATH=str(folder), PLAYWRIGHT_DOWNLOAD_HOST=NOWHERE, **environment)


def test_a_browser_that_is_there_is_found_and_nothing_is_said(chromium: object) -> None:
    found = run(PLAYWRIGHT_DOWNLOAD_HOST=NOWHERE)
    assert (found.returncode, found.stdout) == (0, "")


def test_none_to_be_had_is_said_loudly(tmp_path: Path) -> None:
    none = without_any(tmp_path)
    assert none.returncode == 0
    assert "playwright install" in none.stdout, "the download was tried"
    assert "NO BROWSER: the tests of pages in a browser will not run." in none.stdout


def test_none_to_be_had_fails_where_one_is_required(tmp_path: Path) -> None:
    assert without_any(tmp_path, TASTEMAKER_BROWSER="required").returncode == 1
    assert "TASTEMAKER_BROWSER=required" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize(("required", "outcome"), [("", "skipped"), ("required", "error")])
def test_the_tests_themselves_skip_or_fail(tmp_path: Path, required: str, outcome: str) -> None:
    """Without the other tests' fixtures and plugins, which take ten times as long to import."""
    options = ["-q", "--noconftest", "-p", "tests.browsers", "-p", "no:cacheprovider", "-k", "is_there"]
    environment = {
        "PATH": str(tmp_path),
        "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TASTEMAKER_BROWSER": required,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/labelling/test_browsers.py"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"1 {outcome}" in ended.stdout.splitlines()[-1], ended.stdout
