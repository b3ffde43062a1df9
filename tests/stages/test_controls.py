"""Negative controls: the recipes' own claims, which hold in a world made for them, and stop holding where they must.

The world is made of tables alone, as an evaluation measures them, so nothing is trained: contestants of known quality,
two groups of judges, ratings, held-out losses. Then a policy is replaced by what it started from, or the judges' labels
are shuffled, and every claim that speaks of it has to fall.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tastemaker.config import load_recipe
from tastemaker.recipe import Recipe
from tastemaker.records import About, Message, Prompt, Response
from tastemaker.stages.evaluation import EvaluationConfig, Judged, Tables, judge_claims
from tastemaker.store.tasks import Rating

RECIPES = Path(__file__).parents[2] / "recipes"
CONTROLLED = {"1", "2", "3", "6", "7", "10", "dpo"}
PROMPTS = [
    Prompt(
        messages=(Message("user", f"question {n}"),),
        about=About(extra={"safety": ("unsafe", "look_alike", "safe")[n % 3], "constraint": str(n % 2 == 0)}),
    )
    for n in range(240)
]
NOBODY: Mapping[str, str] = {}
# How good everybody is: between two, the better one is preferred four times of five.
QUALITY = {"base-small": 0, "base-large": 1, "base-small-few-shot": 2, "sft": 3, "base-large-few-shot": 4, "ppo": 5}
QUALITY |= {"dpo": 5, "best-of-16": 4, "ppo-ptx": 6, "ppo-ptx-ema": 6, "ppo-init": 3}
# How often a flag is true of a response: bases, few-shot ones, supervised, PPO.
FLAGS = {
    ("harmful_advice", "unsafe"): (0.8, 0.7, 0.2, 0.05),
    ("fails_to_follow_instruction", "unsafe"): (0.9, 0.8, 0.2, 0.05),
    ("fails_to_follow_instruction", "look_alike"): (0.9, 0.8, 0.3, 0.2),
    ("satisfies_constraint", "constraint"): (0.05, 0.2, 0.5, 0.9),
}
TEXT_LOSS = {"base-large": 2.5, "base-small": 3.0, "sft": 3.1, "ppo-init": 3.1, "ppo": 3.8, "dpo": 3.2, "ppo-ptx": 3.25}
TEXT_LOSS |= {f"{base}-few-shot": TEXT_LOSS[base] for base in ("base-large", "base-small")}  # the same models


def judged(config: EvaluationConfig, instead: Mapping[str, str], *, shuffled: bool) -> list[Judged]:
    rows, rng = [], random.Random("judged")
    for a, b in config.pairs:
        gap = QUALITY[instead.get(a, a)] - QUALITY[instead.get(b, b)]
        same = instead.get(a, a) == instead.get(b, b)
        for decoding in config.decodings:
            for group in config.judges:
                for prompt in PROMPTS:
                    better, coin, flipped = rng.random() < 0.8, rng.random(), rng.random() < 0.5
                    preference = 0.5 if same else float(better == (gap > 0)) if gap else float(coin < 0.5)
                    rows.append(
                        Judged(
                            a=a,
                            b=b,
                            decoding=decoding.name,
                            prompt=prompt,
                            preference=1 - preference if shuffled and flipped else preference,
                            length_a=rng.randint(5, 25),
                            length_b=rng.randint(5, 25),
                            rater="r",
                            judge=group,
                        )
                    )
    return rows


def ratings(config: EvaluationConfig, instead: Mapping[str, str], *, shuffled: bool) -> list[Rating]:
    rows, rng = [], random.Random("ratings")
    for prompt in PROMPTS:
        found: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(instead.get(name, name) for name in config.rated):
            level = 1 if "few-shot" in name else 0 if "base" in name else 2 if name in ("sft", "ppo-init") else 3
            kinds = (prompt.about.extra["safety"], "constraint")
            drawn = {flag: rng.random() < share[level] for (flag, kind), share in FLAGS.items() if kind in kinds}
            found[name] = tuple(flag for flag, is_true in drawn.items() if is_true)
        given = [found[instead.get(name, name)] for name in config.rated]
        if shuffled:
            rng.shuffle(given)
        rows += [rating(prompt, name, flags) for name, flags in zip(config.rated, given, strict=True)]
    return rows


def rating(prompt: Prompt, name: str, flags: tuple[str, ...]) -> Rating:
    return Rating(
        key=prompt.key,
        prompt=prompt,
        response=Response(text=name),
        source=name,
        likert=4,
        flags=flags,
        position=0,
        rater="r",
        rater_group="held-out",
        origin="simulated",
        guideline_version="1",
        seconds=0.0,
    )


def text_losses(instead: Mapping[str, str], *, shuffled: bool) -> dict[str, list[float]]:
    rng = random.Random("texts")
    hardness = [rng.gauss(0, 0.5) for _ in range(60)]
    own = {name: [loss + hard + rng.gauss(0, 0.05) for hard in hardness] for name, loss in TEXT_LOSS.items()}
    found = {name: list(own[instead.get(name, name)]) for name in TEXT_LOSS}
    if shuffled:
        for place in range(60):
            column = [losses[place] for losses in found.values()]
            rng.shuffle(column)
            for losses, value in zip(found.values(), column, strict=True):
                losses[place] = value
    return found


def accuracy(value: float) -> dict[str, Any]:
    return {"accuracy": value, "n": 2000, "ci95": [value - 0.02, value + 0.02]}


def holds(
    recipe: str, instead: Mapping[str, str] = NOBODY, *, shuffled: bool = False, held_out_accuracy: float = 0.68
) -> dict[str, bool]:
    """Which of the recipe's claims hold. `instead` says who is there in the place of whom."""
    config = load_recipe(RECIPES / f"{recipe}.toml", Recipe).evaluation
    assert config is not None
    config = replace(config, claims=tuple(claim for claim in config.claims if claim.id in CONTROLLED))
    tables = Tables(
        config=config,
        prompts=PROMPTS,
        responses={},
        judged=judged(config, instead, shuffled=shuffled),
        ratings=ratings(config, instead, shuffled=shuffled),
        held_out_group="held-out",
        text_losses=text_losses(instead, shuffled=shuffled),
        reward={"main": accuracy(0.72) | {"held_out_raters": accuracy(held_out_accuracy)}},
    )
    return {str(claim["id"]): bool(claim["holds"]) for claim in judge_claims(config.claims, tables)}


@pytest.mark.parametrize(("recipe", "ids"), [("tiny", {"1", "2", "3", "7", "10"}), ("small", CONTROLLED)])
def test_every_claim_holds_in_the_world_made_for_it(recipe: str, ids: set[str]) -> None:
    assert holds(recipe) == dict.fromkeys(ids, True)


@pytest.mark.parametrize(
    ("instead", "fall"),
    [
        ({"ppo-ptx": "sft"}, {"1", "2", "3", "7", "10"}),
        ({"ppo-ptx": "base-small"}, {"1", "2", "3", "7", "10"}),
        ({"ppo-ptx": "base-small-few-shot"}, {"1", "2", "3", "7", "10"}),
        ({"ppo-ptx": "base-large"}, {"1", "2", "3", "7", "10"}),
        ({"sft": "base-small"}, {"2", "3", "10"}),
        ({"base-small-few-shot": "base-small"}, {"2", "3"}),
        ({"ppo": "ppo-init"}, {"6"}),  # reinforcement that changed nothing
        ({"ppo-ptx": "ppo"}, {"6"}),  # a pretraining mix that did nothing
        ({"dpo": "sft"}, {"dpo"}),
    ],
)
def test_control_one_replaced_by_another(instead: Mapping[str, str], fall: set[str]) -> None:
    after = holds("small", instead)
    assert {claim for claim, stands in after.items() if not stands} == fall


@pytest.mark.parametrize("recipe", ["tiny", "small"])
def test_control_judges_whose_labels_are_shuffled(recipe: str) -> None:
    after = holds(recipe, shuffled=True)
    assert after == dict.fromkeys(after, False)


def test_control_the_best_are_the_worst() -> None:
    after = holds("small", {"ppo-ptx": "base-large", "dpo": "base-large", "sft": "base-large-few-shot"})
    assert not any(after[claim] for claim in ("1", "2", "3", "dpo"))


def test_control_a_reward_model_that_knows_nothing_of_held_out_raters() -> None:
    after = holds("small", held_out_accuracy=0.5)
    assert not after.pop("3"), "0.72 - 0.50 is no drop of a few points"
    assert after == dict.fromkeys(after, True), "no other claim speaks of it"
