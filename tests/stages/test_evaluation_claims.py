"""Which claims an evaluation can measure, found before training; and shares, whose intervals have a width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.stages.test_controls import PROMPTS, rating
from tests.stages.test_evaluation import config

from tastemaker.config import load_recipe
from tastemaker.errors import ConfigError, DataError
from tastemaker.recipe import Recipe
from tastemaker.stages.evaluation import Check, EvaluationConfig, Tables, check_prompts
from tastemaker.stages.evaluation.claims import FIELDS, Measure
from tastemaker.statistics import accuracy

GIVEN: dict[str, Any] = {
    "b": "base",
    "base": "base",
    "decoding": "greedy",
    "judge": "training",
    "flag": "harmful_advice",
    "where": {"safety": "unsafe"},
}


@pytest.mark.parametrize("measure", FIELDS)
def test_a_check_takes_what_its_measure_heeds_and_nothing_else(measure: Measure) -> None:
    heeded = {name: GIVEN[name] for name in FIELDS[measure]}
    Check(measure=measure, a="policy", above=0.0, **heeded)
    for name in GIVEN.keys() - FIELDS[measure]:
        with pytest.raises(ConfigError, match=f"a check of {measure} has no use for '{name}'; leave it out"):
            Check(measure=measure, a="policy", above=0.0, **heeded, **{name: GIVEN[name]})
    for name in FIELDS[measure] & {"b", "base", "flag"}:
        rest = {other: value for other, value in heeded.items() if other != name}
        with pytest.raises(ConfigError, match=rf"a check of {measure} .*'{name}'\."):
            Check(measure=measure, a="policy", above=0.0, **rest)


@pytest.mark.parametrize(
    ("check", "changes", "message"),
    [
        (
            {"measure": "flag_rate", "a": "policy", "flag": "harmful_advice"},
            {"judge_reward": "judge"},
            "needs raters; a reward model judges here",
        ),
        (
            {"measure": "likert_difference", "a": "policy", "b": "base"},
            {"rated": ["policy"]},
            "needs ratings; add the contestants to rated",
        ),
        (
            {"measure": "reference_loss_difference", "a": "policy", "b": "base"},
            {},
            "'policy' has no reference; give it one",
        ),
        (
            {"measure": "win_rate", "a": "policy", "b": "base", "judge": "training"},
            {"judge_reward": "judge", "judges": ["training"]},
            "'training' raters do not judge",
        ),
        (
            {"measure": "win_rate", "a": "policy", "b": "base"},
            {
                "contestants": {"policy": {"model": "m", "best_of": 4}, "base": {"model": "n"}},
                "decodings": [{"greedy": True}],
            },
            "'policy' is the best of several samples, and has no greedy responses",
        ),
        (
            {"measure": "text_loss_difference", "a": "policy", "b": "base"},
            {
                "contestants": {
                    "policy": {"model": "m"},
                    "base": {"model": "n", "few_shot": {"template": "{prompt} {response} "}},
                }
            },
            "'base' is no plain model, so it has no loss on held-out text",
        ),
        (
            {"measure": "proxy_difference", "a": "policy", "b": "base", "decoding": "greedy"},
            {},
            "the decoding 'greedy' is none of T=1",
        ),
    ],
)
def test_what_can_never_be_measured_is_refused_at_once(
    check: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    claim = {"id": "x", "statement": "s", "checks": [check | {"above": 0.0}]}
    with pytest.raises(ConfigError, match=f"claim x: {check['measure']} of 'policy': .*{message}"):
        config(claims=[claim], **changes)


def test_the_best_of_several_samples_needs_samples() -> None:
    """Whatever is claimed: it would have no responses at all."""
    settings = {"contestants": {"policy": {"model": "m", "best_of": 4}, "base": {"model": "n"}}, "claims": []}
    config(**settings, decodings=[{"greedy": True}, {}])
    with pytest.raises(ConfigError, match="'policy' is the best of several samples; give a decoding that draws"):
        config(**settings, decodings=[{"greedy": True}])


@pytest.mark.parametrize("measure", [name for name in FIELDS if "where" in FIELDS[name]])
def test_prompts_that_no_interval_can_be_had_of_are_refused_before_anybody_responds(measure: Measure) -> None:
    def claiming(category: str) -> EvaluationConfig:
        needed = {name: GIVEN[name] for name in FIELDS[measure] & {"b", "flag"}}
        check = {"measure": measure, "a": "policy", "where": {"category": category}, "above": 0.0, **needed}
        model = {"model": "m", "reference": "n"}
        return config(
            contestants={"policy": model, "base": model},
            claims=[{"id": "x", "statement": "s", "checks": [check]}],
            rated=["policy", "base"],
            gold="module:function",
        )

    prompts = [replace(prompt, about=replace(prompt.about, category="chat")) for prompt in PROMPTS[:3]]
    prompts[2] = replace(prompts[2], about=replace(prompts[2].about, category="open_qa"))
    check_prompts(claiming("chat"), prompts)
    with pytest.raises(ConfigError, match=f"claim x: {measure} of 'policy' needs two test prompts .* there are 1"):
        check_prompts(claiming("open_qa"), prompts)
    for few in (prompts[:1], prompts[:1] * 2, []):
        with pytest.raises(DataError, match=f"needs two test prompts for an interval, and there are {len(few)};"):
            check_prompts(config(claims=[]), few)


def test_a_drop_on_held_out_raters_needs_collected_comparisons(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    smollm2 = (Path(__file__).parents[2] / "recipes" / "smollm2.toml").read_text()
    check = '{ measure = "reward_accuracy_drop", a = "main", below = 0.1 }'
    path.write_text(f'{smollm2}\n[[evaluation.claims]]\nid = "x"\nstatement = "s"\nchecks = [{check}]\n')
    with pytest.raises(ConfigError, match="claim x: reward_accuracy_drop needs rankings by held-out raters"):
        load_recipe(path, Recipe)


def rated(flags_policy: list[bool], flags_base: list[bool]) -> Tables:
    rows = [
        rating(PROMPTS[place], name, ("harmful_advice",) if is_true else ())
        for name, flags in (("policy", flags_policy), ("base", flags_base))
        for place, is_true in enumerate(flags)
    ]
    return Tables(config=config(), prompts=PROMPTS, responses={}, judged=(), ratings=rows, held_out_group="held-out")


def test_no_flag_in_five_answers_is_no_proof() -> None:
    """0 of 5 is compatible with a rate of a third and more; 5 of 5 against 0 of 5 with less than 1."""
    tables = rated([False] * 5, [True] * 5)
    rate = tables.find(Check(measure="flag_rate", a="policy", flag="harmful_advice", below=0.1))
    assert (rate.value, rate.n) == (0, 5)
    assert rate.ci95 == accuracy([0.0] * 5).ci95
    assert rate.ci95.high > 0.33
    difference = tables.find(
        Check(measure="flag_rate_difference", a="policy", b="base", flag="harmful_advice", below=0.0)
    )
    # 0.5 / 7 against 5.5 / 7: -5/7 -+ 1.959964 sqrt((6/7 - 25/49) / 7)
    assert difference.value == -1
    assert difference.ci95.low == -1
    assert difference.ci95.high == pytest.approx(-5 / 7 + 1.959964 * (17 / 343) ** 0.5, abs=1e-6)


def test_a_difference_of_shares_in_both_directions() -> None:
    """7 prompts: three where only the policy is flagged, one where only the base is; and the other way round."""
    one, other = [True, True, True, False, True, False, False], [False, False, False, True, True, False, False]
    reach = 1.959963985 * ((3.5 / 9 + 1.5 / 9 - (2 / 9) ** 2) / 9) ** 0.5
    for first, second, sign in ((one, other, 1), (other, one, -1)):
        check = Check(measure="flag_rate_difference", a="policy", b="base", flag="harmful_advice", below=0.0)
        found = rated(first, second).find(check)
        assert found.value == pytest.approx(sign * 2 / 7, abs=1e-12)
        assert found.ci95.low == pytest.approx(sign * 2 / 9 - reach, abs=1e-8)
        assert found.ci95.high == pytest.approx(sign * 2 / 9 + reach, abs=1e-8)
