"""The documentation that is made from the code is up to date, and says something about everything."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from tests.scripts import load_script

from tastemaker.cli import COMMANDS
from tastemaker.metrics import METRICS
from tastemaker.recipe import Recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The script that makes them."""
    return load_script("make_docs")


def test_the_committed_files_are_what_the_script_makes(made: ModuleType) -> None:
    for name, text in (("configuration.md", made.configuration()), ("metrics.md", made.metrics())):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name}: run scripts/make-docs"


def test_every_command_is_documented(made: ModuleType) -> None:
    text = made.configuration()
    for command in COMMANDS:
        assert f"### tastemaker {command}\n" in text
    assert set(made.OPTIONS) | {"run"} == set(COMMANDS)


def test_every_config_field_is_documented(made: ModuleType) -> None:
    for cls in (*made.configs(Recipe), *made.OPTIONS.values()):
        for entry in made.entries(cls):
            assert entry.meaning or entry.name in ("kind", "config"), f"{cls.__name__}.{entry.name} has no docstring"


def test_every_metric_is_documented(made: ModuleType) -> None:
    text = made.metrics()
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.unit} | {metric.meaning} |" in text
