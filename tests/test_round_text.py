"""What a run refuses before it begins: held-out text that is trained on, and a folder that another process works in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tastemaker.artefacts import claimed
from tastemaker.config import load_recipe
from tastemaker.errors import ConfigError, DataError
from tastemaker.recipe import Recipe
from tastemaker.round import Round
from tastemaker.settings import PpoConfig

RECIPE = Path(__file__).parents[1] / "recipes" / "smoke.toml"


def test_held_out_text_that_is_trained_on_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    """A hundred documents are trained on, and the first ten of them were to be held out."""
    recipe = load_recipe(RECIPE, Recipe)
    assert recipe.text is not None
    text = replace(recipe.text, held_out=recipe.text.source, held_out_documents=10)
    with Round(replace(recipe, text=text), tmp_path) as one:
        with pytest.raises(DataError, match=r"10 of 10 held-out documents are trained on too.* One begins: "):
            one.prompts()
        assert not (one.folder / "1-prompts").exists()


def test_held_out_text_that_is_trained_on_since_the_intake_is_refused_as_well(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, Recipe)
    assert recipe.text is not None
    with Round(recipe, tmp_path) as one:
        one.prompts()
    text = replace(recipe.text, held_out=recipe.text.source, held_out_documents=10)
    with (
        Round(replace(recipe, text=text), tmp_path) as one,
        pytest.raises(DataError, match=r"10 of 10 held-out documents are trained on too"),
    ):
        one.prompts()


def test_text_that_nothing_is_trained_on_may_be_any(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, Recipe)
    assert recipe.text is not None
    text = replace(recipe.text, held_out=recipe.text.source)
    sft = {name: replace(one, pretraining_mix=0.0) for name, one in recipe.sft.items()}
    policy = {
        name: replace(one, ptx_coef=0.0) if isinstance(one, PpoConfig) else one for name, one in recipe.policy.items()
    }
    with Round(replace(recipe, text=text, sft=sft, policy=policy), tmp_path) as one:
        one._check_text()


def test_a_stage_that_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    with (
        Round(load_recipe(RECIPE, Recipe), tmp_path) as one,
        claimed(one.folder / "1-prompts"),
        pytest.raises(ConfigError, match=r"another process works in .*1-prompts"),
    ):
        one.prompts()
