"""What a recipe names outside itself: models, files and Python functions, looked up before any work begins.

A run may take days; a mistyped path in its last section must not be found at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from tastemaker.errors import ConfigError, DataError, ModelError
from tastemaker.files import READERS
from tastemaker.functions import is_function_path, load_function
from tastemaker.model_places import resolve_source
from tastemaker.recipe import Recipe
from tastemaker.settings import PpoConfig
from tastemaker.store.tasks import Purpose

LOCAL = (".", "/", "~")  # a path that begins so is no name on the hub


def check(recipe: Recipe) -> None:
    """Look up everything that the recipe names.

    Raises:
        ModelError, DataError, ConfigError: a model, a file or a function is not there.
    """
    for model in _models(recipe):
        place = resolve_source(model)
        if place.startswith(LOCAL) and not Path(place).exists():
            raise ModelError(f"{model} does not exist; give a model folder, a .gguf file or a name on the hub.")
    for source in _sources(recipe):
        if is_function_path(source):
            _check_function(source.partition("?")[0])
        elif Path(source).suffix in READERS and not Path(source).exists():
            raise DataError("there is no such file.", path=source)
    for purpose in get_args(Purpose):
        recipe.guidelines.guideline(purpose)
    for function in _functions(recipe):
        _check_function(function)


def _check_function(path: str) -> None:
    if not callable(load_function(path)):
        raise ConfigError(f"{path!r} is not a function; name one as module:function.")


def _models(recipe: Recipe) -> list[str]:
    models = [recipe.base.model]
    if recipe.evaluation is not None:
        for contestant in recipe.evaluation.contestants.values():
            models += [name for name in (contestant.model, contestant.reference) if name is not None]
    return [name for name in models if name != "base" and name.partition("/")[0] not in ("sft", "policy")]


def _sources(recipe: Recipe) -> list[str]:
    named = [recipe.prompts.source, recipe.prompts.test_source, recipe.demonstrations.source]
    if recipe.text is not None:
        named += [recipe.text.source, recipe.text.held_out]
    if recipe.comparisons is not None:
        named.append(recipe.comparisons.source)
    if recipe.evaluation is not None:
        shown = [contestant.few_shot for contestant in recipe.evaluation.contestants.values()]
        named += [few_shot.source for few_shot in shown if few_shot is not None]
    return [source for source in named if source is not None]


def _functions(recipe: Recipe) -> list[str]:
    named: list[str | None] = []
    simulation = recipe.simulation if recipe.raters == "simulated" else None
    if simulation is not None:
        named += [simulation.raters, simulation.features, simulation.write, simulation.flags]
    named += [
        policy.reward
        for policy in recipe.policy.values()
        if isinstance(policy, PpoConfig) and policy.reward not in recipe.reward
    ]
    if recipe.evaluation is not None:
        named.append(recipe.evaluation.gold)
    return [path for path in named if path is not None]
