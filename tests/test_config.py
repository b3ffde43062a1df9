"""Configuration from TOML: nothing is let through, and every message says what to do."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tastemaker.config import from_mapping, load_recipe, to_json
from tastemaker.errors import ConfigError
from tastemaker.recipe import Recipe
from tastemaker.responses import DecodingConfig
from tastemaker.stages.dpo import DpoConfig
from tastemaker.stages.evaluation import Check, EvaluationConfig
from tastemaker.stages.ppo import PpoConfig
from tastemaker.stages.reward import RewardConfig
from tastemaker.stages.sft import SftConfig
from tastemaker.training import OptimizerConfig

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cat:
    kind: Literal["cat"] = "cat"
    lives: int = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Dog:
    kind: Literal["dog"] = "dog"
    tricks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Farm:
    name: str
    pet: Cat | Dog = Cat()
    weight: float = 1.5
    open: bool = False
    folder: Path | None = None
    pair: tuple[int, str] = (1, "a")
    pets: dict[str, Cat | Dog] | None = None
    size: Literal["small", "large"] = "small"


def farm(**given: Any) -> Farm:
    return from_mapping(Farm, {"name": "f"} | given, where="farm.toml")


def test_every_field_converts_to_its_type() -> None:
    built = farm(
        pet={"kind": "dog", "tricks": ["sit", "roll"]},
        weight=2,
        open=True,
        folder="a/b",
        pair=[3, "c"],
        pets={"tom": {"kind": "cat", "lives": 7}, "rex": {"kind": "dog"}},
        size="large",
    )
    assert built == Farm(
        name="f",
        pet=Dog(tricks=("sit", "roll")),
        weight=2.0,
        open=True,
        folder=Path("a/b"),
        pair=(3, "c"),
        pets={"tom": Cat(lives=7), "rex": Dog()},
        size="large",
    )
    assert type(built.weight) is float


def test_a_key_may_have_hyphens() -> None:
    assert from_mapping(SftConfig, {"batch-size": 7}, where="x").batch_size == 7


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"wieght": 2.0}, "farm.toml: unknown key 'wieght'. Did you mean 'weight'?"),
        ({"zzzz": 1}, "farm.toml: unknown key 'zzzz'. Known: folder, name, open, pair, pet, pets, size, weight."),
        ({"pet": {"kind": "cat", "live": 3}}, "farm.toml: pet: unknown key 'live'. Did you mean 'lives'?"),
        ({"pet": {"kind": "cow"}}, "farm.toml: pet: kind is 'cow'; it must be one of 'cat', 'dog'."),
        ({"pet": {"lives": 3}}, "farm.toml: pet: kind is None; it must be one of 'cat', 'dog'."),
        ({"pets": {"rex": {"kind": "cat", "tricks": []}}}, "farm.toml: pets: rex: unknown key 'tricks'."),
        ({"weight": "heavy"}, "farm.toml: weight: 'heavy' was given; it must be a number."),
        ({"weight": True}, "farm.toml: weight: True was given; it must be a number."),
        ({"open": 1}, "farm.toml: open: 1 was given; it must be true or false."),
        ({"name": 3}, "farm.toml: name: 3 was given; it must be a string."),
        ({"pet": {"kind": "cat", "lives": 8.5}}, "farm.toml: pet: lives: 8.5 was given; it must be a whole number."),
        ({"pet": {"kind": "dog", "tricks": "sit"}}, "farm.toml: pet: tricks: 'sit' was given; it must be a list."),
        ({"pair": [1]}, "farm.toml: pair: [1] was given; it must be a list of 2."),
        ({"size": "medium"}, "farm.toml: size: 'medium' was given; it must be one of 'small', 'large'."),
        ({"folder": 4}, "farm.toml: folder: 4 was given; it must be a path."),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        farm(**given)
    assert str(raised.value).startswith(says)


def test_a_required_field_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"farm.toml: 'name' must be given."):
        from_mapping(Farm, {}, where="farm.toml")


def test_a_table_is_needed_where_fields_are() -> None:
    with pytest.raises(ConfigError, match="a table with the fields of Farm"):
        from_mapping(Farm, 3, where="farm.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_comes_back(path: Path) -> None:
    recipe = load_recipe(path, Recipe)
    written = json.loads(json.dumps(to_json(recipe)))
    assert from_mapping(Recipe, written, where="again") == recipe


def test_a_recipe_file_that_is_none(tmp_path: Path) -> None:
    broken, latin = tmp_path / "broken.toml", tmp_path / "latin.toml"
    broken.write_text("name = \n")
    latin.write_bytes('name = "caf\xe9"'.encode("latin-1"))
    for path, says in (
        (tmp_path / "none.toml", "does not exist"),
        (broken, "is not a TOML file"),
        (latin, "is not a TOML file"),
        (tmp_path, "is not a TOML file"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_recipe(path, Recipe)


def test_golden_json_of_a_policy() -> None:
    """What manifests compare: a changed default or a renamed field makes every finished stage run again."""
    config = DpoConfig(init="sft", optimizer=OptimizerConfig(learning_rate=1e-6))
    assert to_json(config) == {
        "kind": "dpo",
        "init": "sft",
        "part": "all",
        "beta": 0.1,
        "variant": "sigmoid",
        "label_smoothing": 0.0,
        "epochs": 1,
        "batch_size": 64,
        "optimizer": {
            "learning_rate": 1e-6,
            "schedule": "cosine",
            "floor": 0.1,
            "warmup_steps": 0,
            "betas": [0.9, 0.95],
            "epsilon": 1e-08,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "precision": "float32",
            "gradient_checkpointing": False,
            "compile": False,
        },
        "max_prompt_tokens": None,
        "microbatch_tokens": 8192,
        "checkpoint_every": 50,
    }


def test_the_defaults_are_the_papers() -> None:
    """Appendix C: supervised, reward model, PPO (1.3B)."""
    sft, reward, ppo = SftConfig(), RewardConfig(), PpoConfig(init="i", reward="r")
    assert (sft.epochs, sft.batch_size, sft.optimizer.learning_rate, sft.residual_dropout) == (16, 32, 9.65e-6, 0.2)
    assert (sft.optimizer.schedule, sft.optimizer.floor, sft.optimizer.warmup_steps) == ("cosine", 0.1, 0)
    assert (reward.epochs, reward.batch_size, reward.optimizer.learning_rate) == (1, 64, 9e-6)
    assert (ppo.kl_coef, ppo.clip, ppo.gamma, ppo.ema_decay, ppo.decoding.temperature) == (0.02, 0.2, 1.0, 0.992, 1.0)
    assert (ppo.iterations * ppo.batch_size, ppo.batch_size // ppo.minibatches, ppo.inner_epochs) == (256_000, 64, 1)
    assert (ppo.policy.schedule, ppo.warmup_iterations, ppo.value.learning_rate) == ("constant", 10, 9e-6)
    assert ppo.policy.betas == (0.9, 0.95)
    assert ppo.ptx_examples_per_episode == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 10, "minibatches": 3}, "not a multiple"),
        ({"minibatches": 0}, "minibatches is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"inner_epochs": 0}, "inner_epochs is 0"),
        ({"decoding": {"greedy": True}}, "greedy"),
        ({"old_logprobs": "sampler", "policy": {"learning_rate": 1.0, "precision": "bfloat16"}}, "bf16"),
        ({"lora": {}, "value_function": "shared"}, "frozen trunk"),
        ({"value": {"learning_rate": 1e-6}, "value_function": "shared"}, "leave value out"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"kl_coef": -0.1}, "kl_coef is -0.1"),
        ({"kl_coef": float("nan")}, "kl_coef is nan"),
        ({"adaptive_kl": {"horizon": 102.4}}, "give a horizon above batch_size / 5 = 102.4"),
        ({"kl_coef": 0.0, "adaptive_kl": {}}, "kl_coef is 0, which adaptive_kl multiplies"),
        ({"lam": 1.5}, "lam is 1.5"),
        ({"truncated": "drop"}, "one of 'penalty', 'score', 'mask'"),
        ({"decoding": {"temperature": 0.0}}, "temperature is 0.0"),
        ({"policy": {"learning_rate": float("nan")}}, "learning_rate is nan"),
        ({"policy": {"learning_rate": -1e-5}}, "learning_rate is -1e-05"),
        ({"policy": {"learning_rate": float("inf")}}, "learning_rate is inf"),
    ],
)
def test_ppo_refuses_what_cannot_work(change: dict[str, Any], says: str) -> None:
    good = {"kind": "ppo", "init": "i", "reward": "r"}
    assert from_mapping(PpoConfig, good | {"adaptive_kl": {"horizon": 103}}, where="x").kind == "ppo"
    with pytest.raises(ConfigError) as raised:
        from_mapping(PpoConfig, good | change, where="policy.x")
    assert says in str(raised.value)


RECIPE: dict[str, Any] = {
    "name": "r",
    "base": {"model": "./m"},
    "prompts": {"source": "p.jsonl"},
    "raters": "simulated",
    "simulation": {"raters": "m:r", "features": "m:f", "training_raters": 2, "held_out_raters": 2},
    "sft": {"base-line": {}},
    "comparisons": {"sources": ["sft/base-line"]},
    "reward": {"main": {"init": "base-line"}},
    "policy": {"ppo": {"kind": "ppo", "init": "base-line", "reward": "main", "keep_every": 10}},
    "evaluation": {
        "contestants": {"a": {"model": "policy/ppo"}, "b": {"model": "sft/base-line"}},
        "pairs": [["a", "b"]],
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """RECIPE with one entry replaced; "x/y" is the entry y of table x, None takes it out."""
    whole: dict[str, Any] = json.loads(json.dumps(RECIPE))
    *tables, last = path.split("/")
    place = whole
    for table in tables:
        place = place.setdefault(table, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    return whole


def claim(**check: Any) -> dict[str, Any]:
    checks = {"contestants": RECIPE["evaluation"]["contestants"], "pairs": [["a", "b"]]}
    return checks | {"claims": [{"id": "1", "statement": "s", "checks": [{"above": 0.5} | check]}]}


def test_the_recipe_that_the_next_test_breaks_is_whole() -> None:
    from_mapping(Recipe, RECIPE, where="r.toml")
    for check in (
        {"measure": "win_rate", "a": "a", "b": "b", "decoding": "greedy"},
        {"measure": "reward_accuracy", "a": "main"},
    ):
        from_mapping(Recipe, changed("evaluation", claim(**check)), where="r.toml")
    for start in ("reward/main/init", "policy/ppo/init"):
        from_mapping(Recipe, changed(start, "base"), where="r.toml")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("simulation", None, "needs a [simulation] section"),
        ("policy/ppo/init", "base-lin", "'base-lin' is no SFT variant of this recipe. Did you mean 'base-line'?"),
        ("policy/ppo/reward", "mian", "'mian' is no reward variant of this recipe. Did you mean 'main'?"),
        ("policy/ppo/ptx_coef", 1.0, "policy.ppo: ptx_coef needs pretraining text"),
        ("sft/base-line/pretraining_mix", 0.1, "sft.base-line: pretraining_mix needs pretraining text"),
        ("sft/..", {}, "a variant is called '..'"),
        ("sft/base", {}, 'an SFT variant is called "base"'),
        ("reward/main/init", "x", "reward.main: init: 'x' is no SFT variant"),
        ("selection", {"base-line": "nobody"}, "selection: base-line: 'nobody' is no reward variant"),
        ("comparisons", None, "learns from rankings; give a [comparisons] section"),
        ("comparisons/sources", ["sft/x"], "comparisons: sources: 'x' is no SFT variant"),
        ("comparisons/sources", ["base"], "comparisons: sources: 'base' cannot respond; name supervised variants"),
        ("comparisons/sources", ["policy/ppo"], "comparisons: sources: 'policy/ppo' cannot respond"),
        ("comparisons/sources", [], "sources is empty"),
        ("comparisons/responses_per_prompt", 1, "it must be from 2 to 9"),
        ("evaluation/contestants/a/model", "policy/x", "evaluation.contestants.a: 'x' is no policy variant"),
        ("evaluation/contestants/a/model", "policy/ppo:emma", "'policy/ppo:emma' is not kept"),
        ("evaluation/contestants/a/model", "policy/ppo:15", "'policy/ppo:15' is not kept"),
        ("evaluation/judge_reward", "main", "'main' is what contestant 'a' was optimised for"),
        ("evaluation/judges_per_comparison", 3, "judges_per_comparison is 3, but the held-out raters of [simulation]"),
        ("comparisons/overlap", 3, "comparisons: overlap is 3, but the training raters of [simulation] are 2 in all"),
        ("comparisons/validation_overlap", 3, "validation_overlap is 3, but the training raters of [simulation]"),
        ("evaluation/contestants/b/few_shot", {"template": "Q: {question}"}, "'Q: {question}' cannot be filled in"),
        ("evaluation/contestants/b/few_shot", {}, "'template' must be given"),
        (
            "evaluation",
            claim(measure="win_rate", a="a", b="b") | {"rated": ["a"], "judge_reward": "main"},
            "rated needs raters; judge_reward has a reward model in their place",
        ),
        ("evaluation/judge_reward", "x", "evaluation: judge_reward: 'x' is no reward variant"),
        ("evaluation/pairs", [["a", "c"]], "'c' is no contestant; contestants are a, b"),
        ("evaluation/decodings", [{}, {"max_new_tokens": 5}], "each with a temperature of its own"),
        ("evaluation", claim(measure="win_rate", a="a", b="c"), "'c' is no contestant"),
        ("evaluation", claim(measure="win_rate", a="b", b="a"), "the pair with 'a' is not judged"),
        ("evaluation", claim(measure="win_rate", a="a"), "compares two; give 'b'"),
        ("evaluation", claim(measure="win_rate", a="a", b="b", below=0.1), "exactly one of 'above' and 'below'"),
        ("evaluation", claim(measure="win_rate", a="a", b="b", decoding="T=2"), "the decoding 'T=2' is none of"),
        ("evaluation", claim(measure="win_rate", a="a", b="b", judge="training"), "'training' raters do not judge"),
        ("evaluation", claim(measure="win_rate", a="a", b="b") | {"judges": ["training"]}, "'held-out' raters do not"),
        (
            "evaluation",
            claim(measure="text_loss_difference", a="a", b="b") | {"heldout_texts": 0},
            "no loss on held-out",
        ),
        ("evaluation", claim(measure="flag_rate", a="a", flag="rude"), "flag is 'rude'"),
        ("evaluation", claim(measure="flag_rate", a="a", flag="hallucination"), "such a claim needs ratings"),
        ("evaluation", claim(measure="gold_difference", a="a", b="b"), "give 'gold'"),
        ("evaluation", claim(measure="reward_accuracy", a="a"), "claim 1: 'a' is no reward variant"),
        ("evaluation", claim(measure="text_loss_difference", a="a", b="b"), "give a [text] section"),
    ],
)
def test_what_one_section_says_of_another_is_checked_when_a_recipe_is_read(path: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_mapping(Recipe, changed(path, value), where="r.toml")
    assert says in str(raised.value)
    assert str(raised.value).startswith("r.toml")


def test_a_kept_iteration_is_a_model() -> None:
    recipe = changed("evaluation/contestants/a/model", "policy/ppo:40")
    assert from_mapping(Recipe, recipe, where="r.toml").evaluation is not None


@given(
    st.builds(
        DecodingConfig,
        max_new_tokens=st.integers(1, 10**6),
        temperature=st.floats(1e-3, 1e3),
        greedy=st.booleans(),
        batch_tokens=st.integers(1, 10**6),
    )
)
def test_a_config_comes_back_from_its_own_json(config: DecodingConfig) -> None:
    assert from_mapping(DecodingConfig, json.loads(json.dumps(to_json(config))), where="x") == config


def test_choices_are_of_one_kind() -> None:
    """A union of configs is told apart by `kind`, so each needs a kind of its own."""
    for cls in (Recipe, EvaluationConfig, Check):
        for field in fields(cls):
            kinds = [
                get_args(get_type_hints(option)["kind"])[0]
                for option in get_args(get_type_hints(cls)[field.name])
                if hasattr(option, "__dataclass_fields__") and "kind" in option.__dataclass_fields__
            ]
            assert len(kinds) == len(set(kinds))


def test_a_table_that_is_given_in_part_keeps_the_rest_of_its_fields_default() -> None:
    """And not of its class: in a recipe as on the command line."""
    given = {
        "kind": "ppo",
        "init": "i",
        "reward": "r",
        "policy": {"learning-rate": 2e-5},
        "value": {"precision": "bfloat16"},
        "decoding": {"temperature": 0.7},
    }
    config = from_mapping(PpoConfig, given, where="x")
    default = from_mapping(PpoConfig, {"kind": "ppo", "init": "i", "reward": "r"}, where="x")
    assert config.policy == replace(default.policy, learning_rate=2e-5)
    assert config.policy.schedule == "constant"
    assert config.value == replace(default.value, precision="bfloat16")
    assert config.decoding == replace(default.decoding, temperature=0.7)
    assert config.decoding.max_new_tokens != DecodingConfig().max_new_tokens


def halved(whole: dict[str, Any]) -> dict[str, Any]:
    """A reward model that judges, of the half that the other does not learn from."""
    whole["reward"] = {
        "main": {"init": "base-line", "part": "first half"},
        "judge": {"init": "base-line", "part": "second half"},
    }
    whole["evaluation"]["judge_reward"] = "judge"
    return whole


def test_a_judge_has_chosen_nothing_and_shares_no_rankings_with_what_it_judges() -> None:
    from_mapping(Recipe, halved(changed("evaluation/contestants/b/best_of", 4)), where="r.toml")
    from_mapping(Recipe, halved(changed("policy/ppo/reward", "module:function")), where="r.toml")
    dpo: dict[str, Any] = {"kind": "dpo", "init": "base-line", "part": "first half"}
    from_mapping(Recipe, halved(changed("policy/ppo", dpo)), where="r.toml")
    best_of = halved(changed("evaluation/contestants/b/best_of", 4))
    best_of["reward"] = dict(reversed(best_of["reward"].items()))
    few_shot = halved(changed("evaluation/contestants/b/few_shot", {"template": "{prompt} {response} "}))
    few_shot["reward"] = dict(reversed(few_shot["reward"].items()))
    overlapping = halved(changed("selection", {}))
    overlapping["reward"]["judge"]["part"] = "all"
    shaped = "'judge' (part 'second half') learned from rankings that shaped contestant 'a' too (part 'all')"
    for whole, says in (
        (best_of, "'judge' is what contestant 'b' is chosen by"),
        (few_shot, "'judge' is what contestant 'b' is chosen by"),
        (halved(changed("selection", {"base-line": "judge"})), "'judge' is what the epoch of sft.base-line is chosen"),
        (halved(changed("policy/ppo", dpo | {"part": "all"})), shaped),
        (overlapping, "'judge' (part 'all') learned from rankings that shaped contestant 'a' too (part 'first half')"),
    ):
        with pytest.raises(ConfigError) as raised:
            from_mapping(Recipe, whole, where="r.toml")
        assert says in str(raised.value)


def test_people_are_as_many_as_there_are() -> None:
    whole = changed("evaluation/judges_per_comparison", 3) | {"raters": "people"}
    from_mapping(Recipe, whole, where="r.toml")
    halved(whole)
    with pytest.raises(ConfigError, match="is 3, but the reward model that judges are 1 in all"):
        from_mapping(Recipe, whole, where="r.toml")


def test_the_folder_of_a_chosen_epoch_is_no_variants() -> None:
    whole = changed("sft/base-line-selected", {})
    from_mapping(Recipe, whole, where="r.toml")
    whole["selection"] = {"base-line": "main"}
    with pytest.raises(ConfigError, match=r"called \"base-line-selected\", as the folder .* of 'base-line' is"):
        from_mapping(Recipe, whole, where="r.toml")
