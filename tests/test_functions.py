"""Python functions that recipes name: a manifest remembers the code that they stand in."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tastemaker import inputs, sources
from tastemaker.config import load_recipe
from tastemaker.functions import function_fingerprint, load_function
from tastemaker.recipe import Recipe

SMOKE = Path(__file__).parents[1] / "recipes" / "smoke.toml"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_another_text_of_the_module_is_another_function(tmp_path: Path) -> None:
    module = tmp_path / "taste_one.py"
    module.write_text("def score(prompts, responses, records):\n    return [1.0 for _ in responses]\n")
    before = function_fingerprint("taste_one:score")
    assert before.startswith("taste_one:score ")
    assert sources.fingerprint("taste_one:score") == before
    assert load_function("taste_one:score")([], ["a"], []) == [1.0]
    module.write_text(module.read_text().replace("1.0", "2.0"))
    assert function_fingerprint("taste_one:score") != before
    module.write_text(module.read_text().replace("2.0", "1.0"))
    assert function_fingerprint("taste_one:score") == before


def test_raters_of_another_code_are_other_raters(tmp_path: Path) -> None:
    """Their answers lie in studies whose names hold the fingerprint, so they are asked anew."""
    recipe = load_recipe(SMOKE, Recipe)
    assert recipe.simulation is not None
    assert "functions" not in inputs.Inputs(recipe, tmp_path, torch.device("cpu")).raters().fingerprint
    (tmp_path / "taste_two.py").write_text("def features(*_): return {}\n")
    recipe = replace(recipe, simulation=replace(recipe.simulation, features="taste_two:features"))
    before = inputs.Inputs(recipe, tmp_path, torch.device("cpu")).raters().fingerprint
    (tmp_path / "taste_two.py").write_text("def features(*_): return {'length': 1.0}\n")
    assert inputs.Inputs(recipe, tmp_path, torch.device("cpu")).raters().fingerprint != before


def test_a_reward_function_of_another_code_is_another_reward(tmp_path: Path) -> None:
    recipe, module = load_recipe(SMOKE, Recipe), tmp_path / "taste_three.py"
    found = []
    for score in (1.0, 2.0):
        module.write_text(f"def score(prompts, responses, records): return [{score} for _ in responses]\n")
        found.append(inputs.Inputs(recipe, tmp_path, torch.device("cpu")).scorer("taste_three:score").fingerprint)
    assert found[0] != found[1]


def test_of_what_has_no_file_the_name_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "taste_broken").mkdir()
    (tmp_path / "taste_broken/__init__.py").write_text("raise OSError('no')\n")
    for path in ("taste_nowhere:score", "taste_broken.inner:score", "sys:intern"):
        assert function_fingerprint(path) == path


def test_our_own_functions_go_by_their_name() -> None:
    path = "tastemaker.tinyworld.study:gold"
    assert function_fingerprint(path) == path
