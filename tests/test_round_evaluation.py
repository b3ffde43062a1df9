"""What an evaluation writes down of how far each policy went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models import make_tokenizer, save_model

from tastemaker.config import load_recipe
from tastemaker.errors import ConfigError
from tastemaker.evaluation_sampling import check_text_losses
from tastemaker.inputs import Input
from tastemaker.recipe import Recipe
from tastemaker.records import Prompt, Response
from tastemaker.round import Round
from tastemaker.round_evaluation import _Evaluation, over_optimization
from tastemaker.scoring import FunctionScorer
from tastemaker.stages.evaluation import Check, Claim, Contestant, EvaluationConfig
from tastemaker.stages.evaluation.contestants import Sampled
from tastemaker.stages.ppo import PpoConfig
from tastemaker.tokenizer import as_messages

RECIPE = Path(__file__).parents[1] / "recipes" / "overoptimization.toml"


def test_an_evaluation_writes_what_tells_the_two_apart(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, Recipe)
    config = recipe.evaluation
    assert config is not None
    model = {"kl": -2e-7, "proxy_score": {"value": 1.0}, "gold": {"value": 2.0}}
    rows = over_optimization(Round(recipe, tmp_path), config, dict.fromkeys(config.contestants, model))
    found = {row["policy"]: row for row in rows}
    assert "sft" not in found
    states = {name: (row["variant"], row["state"], row["iteration"]) for name, row in found.items()}
    assert states["b0"] == ("b0", "finished", 120)
    assert states["b0_05"] == ("b0_05", "finished", 120)
    assert states["b0-015"] == ("b0", "checkpoint", 15)
    assert {row["start"] for row in rows} == {"sft"}
    assert {row["kl"] for row in rows} == {0.0}
    assert found["b0_4"]["beta"] == 0.4


def test_a_policy_that_starts_from_the_base_has_it_for_its_start(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, Recipe)
    policy, config = recipe.policy["b0"], recipe.evaluation
    assert isinstance(policy, PpoConfig)
    assert config is not None
    base = replace(config.contestants["sft"], model="base")
    config = replace(config, contestants={**config.contestants, "base": base})
    recipe = replace(recipe, policy={**recipe.policy, "b0": replace(policy, init="base")}, evaluation=config)
    model = {"kl": 0.5, "proxy_score": {"value": 1.0}, "gold": {"value": 2.0}}
    rows = over_optimization(Round(recipe, tmp_path), config, dict.fromkeys(config.contestants, model))
    starts = {row["policy"]: row["start"] for row in rows}
    assert (starts["b0"], starts["b0_05"]) == ("base", "sft")


def test_a_policy_is_scored_by_the_reward_model_that_it_was_optimised_for(tmp_path: Path) -> None:
    """`proxy_score` is the first reward model's. A policy of another has its own, which is no match for the start."""
    recipe = load_recipe(RECIPE, Recipe)
    policy = recipe.policy["b0"]
    assert isinstance(policy, PpoConfig)
    recipe = replace(
        recipe,
        reward={**recipe.reward, "other": recipe.reward["main"]},
        policy={**recipe.policy, "b0": replace(policy, reward="other")},
    )
    config = recipe.evaluation
    assert config is not None
    model = {"kl": 0.5, "proxy_score": {"value": 1.0}, "gold": {"value": 2.0}}
    models = dict.fromkeys(config.contestants, model)
    own = {"b0": {"value": -7.0}, "b0-015": {"value": -8.0}}
    own |= {name: {"value": -9.0} for name in config.contestants if name not in own}
    rows = {row["policy"]: row for row in over_optimization(Round(recipe, tmp_path), config, models, own)}
    assert (rows["b0"]["reward"], rows["b0"]["proxy"], rows["b0"]["start"]) == ("other", {"value": -7.0}, None)
    assert rows["b0-015"]["proxy"] == {"value": -8.0}
    assert (rows["b0_05"]["reward"], rows["b0_05"]["proxy"]) == ("main", {"value": 1.0})
    assert rows["b0_05"]["start"] == "sft"


def test_text_losses_of_other_tokens_are_not_compared(tmp_path: Path) -> None:
    """Nats a token of a tokenizer with longer tokens are more, whichever model is the better one."""
    base, same, other = (str(save_model(tmp_path / name)) for name in ("base", "same", "other"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w1w2"])
    tokenizer.save_pretrained(other)

    def check(a: str, b: str) -> None:
        claim = Claim(id="6", statement="-", checks=(Check(measure="text_loss_difference", a="a", b="b", below=0.0),))
        contestants = {"a": Contestant(model=a), "b": Contestant(model=b)}
        check_text_losses(EvaluationConfig(contestants=contestants, pairs=(("a", "b"),), claims=(claim,)), base)

    check("base", same)
    check("policy/ppo:ema", "sft/baseline")
    for first, second in (("base", other), (other, "policy/ppo"), (same, other)):
        with pytest.raises(ConfigError, match="claim 6 compares the text losses of a and b, whose tokenizers differ"):
            check(first, second)


def test_policies_of_one_reward_are_scored_by_one_loading_of_it() -> None:
    """Two policies of a reward that counts words, one of a reward that counts letters; two prompts."""
    recipe = load_recipe(RECIPE, Recipe)
    config = recipe.evaluation
    assert config is not None
    loaded = list[str]()

    def input_of(name: str, score: Callable[[str], int]) -> Input[FunctionScorer]:
        def load() -> FunctionScorer:
            loaded.append(name)
            return FunctionScorer(lambda _, responses, __: list(map(score, responses)), name=name)

        return Input(name, load)

    words, letters = input_of("words", lambda text: len(text.split())), input_of("letters", len)
    evaluation = object.__new__(_Evaluation)
    evaluation.config, evaluation.prompts = config, [Prompt(messages=as_messages(text)) for text in ("w1", "w2")]
    evaluation._own = {"a": words, "b": letters, "c": words}  # type: ignore[dict-item]
    texts = {"a": ("w1 w2", "w1"), "b": ("w1 w2", ""), "c": ("w3", "w3")}
    decoding = config.decodings[-1].name
    responses = {
        (name, decoding): Sampled(
            responses=tuple(Response(text=text) for text in given), num_tokens=(1, 1), logprob=None, kl=None
        )
        for name, given in texts.items()
    }
    found = evaluation._own_scores(responses)
    assert {name: row["value"] for name, row in found.items()} == {"a": 1.5, "b": 2.5, "c": 1.0}
    assert sorted(loaded) == ["letters", "words"]
