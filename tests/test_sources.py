"""Where records come from: files, data sets and functions are told apart as docs/data-formats.md says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tastemaker import preflight, sources
from tastemaker.config import load_recipe
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import read_prompts
from tastemaker.functions import is_function_path
from tastemaker.recipe import Recipe
from tastemaker.records import Prompt

SMOKE = Path(__file__).parents[1] / "recipes" / "smoke.toml"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def saved(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "One"}, {"prompt": "Two"}])
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(folder))


def texts(source: str) -> list[str]:
    return [prompt.messages[-1].content for prompt in sources.load(source, read_prompts, Prompt, seed=0)]


@pytest.mark.parametrize("name", ["owner/name:train", "owner/name:configuration:train", "./folder:train"])
def test_the_name_of_a_data_set_is_no_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_function_path(name)
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python itself leaves where an import is to fail
    with pytest.raises(DataError, match=r"tastemaker\[datasets\]"):  # it came as far as the library
        texts(name)
    recipe = load_recipe(SMOKE, Recipe)
    preflight.check(replace(recipe, prompts=replace(recipe.prompts, source=name)))


@pytest.mark.parametrize("name", ["several:test", "./several:test", "{}/several:test"])
def test_one_split_of_a_saved_data_set(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "several")
    assert texts(name.format(tmp_path)) == ["Two"]


def test_another_content_of_a_saved_data_set_is_another_source(tmp_path: Path) -> None:
    saved(tmp_path / "several")
    before = sources.fingerprint("several:test")
    assert str(before).startswith("several:test ")
    assert sources.fingerprint("several:train") != before
    (tmp_path / "several/test/more.arrow").write_bytes(b"1")
    assert sources.fingerprint("several:test") != before


def test_a_function_in_a_package_of_this_folder(tmp_path: Path) -> None:
    (tmp_path / "taste_mine").mkdir()
    (tmp_path / "taste_mine/__init__.py").write_text(
        "from tastemaker.records import Message, Prompt\n"
        "def prompts(seed, n=1):\n"
        "    return [Prompt(messages=(Message(role='user', content=str(seed + place)),)) for place in range(n)]\n"
    )
    assert texts("taste_mine:prompts?n=3") == ["0", "1", "2"]


def test_a_data_set_without_its_owner_is_taken_for_a_function_and_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"no module 'squad' to import.*OWNER/NAME:SPLIT"):
        texts("squad:train")
