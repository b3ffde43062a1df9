"""Each check on measurements made by hand, on both sides of its threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tastemaker.doctor import KINDS, course, diagnose, supervised
from tastemaker.doctor.findings import Measured, Series, Stage, ends
from tastemaker.metrics import KL_SURPRISE

STEPS = 16
PPO_CONFIG = {
    "batch_size": 64,
    "truncation_penalty": 1.0,
    "policy": {"precision": "float32"},
    "decoding": {"precision": None, "max_new_tokens": 40},
}
Column = float | Sequence[float]
PPO: Mapping[str, Column] = {
    "score": [0.1 * step for step in range(STEPS)],
    "score_spread": 1.0,
    "reward": [0.1 * step - 0.1 * 0.05 * step - 0.25 for step in range(STEPS)],  # score - 0.1 kl - 1.0 * 0.25
    "kl": [0.05 * step for step in range(STEPS)],
    "kl_coef": 0.1,
    "entropy": 2.0,
    "response_tokens": 10.0,
    "truncated_rate": 0.25,
    "explained_variance": 0.5,
    "value_loss": 0.3,
    "value_clip_fraction": 0.1,
    "clip_fraction": 0.02,
    "approx_kl": 0.001,
    "first_log_ratio": 1e-7,
    "sampler_mismatch": 1e-6,
    "learning_rate": 1e-5,
}
SUPERVISED: dict[str, Column] = {
    "loss": [0.69 - 0.01 * step for step in range(STEPS)],
    "grad_norm": 1.0,
    "learning_rate": 1e-5,
    "epoch": [(step + 1) / STEPS for step in range(STEPS)],
}
REWARD: Mapping[str, Column] = {**SUPERVISED, "accuracy": 0.7, "score_gap": 0.8}
DPO: Mapping[str, Column] = {
    **SUPERVISED,
    "loss": [math.log(2) - 0.01 * step for step in range(STEPS)],
    "accuracy": 0.7,
    "margin": [0.05 * step for step in range(STEPS)],
    "chosen_logprob": -60.0,
    "rejected_logprob": -60.0,
}
HELD = {"ppo": PPO, "sft": SUPERVISED, "reward": REWARD, "dpo": DPO}


def measured(
    stage: Stage,
    changes: Mapping[str, Column | None] | None = None,
    *,
    steps: int = STEPS,
    config: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    stopped: Mapping[str, str] | None = None,
) -> Measured:
    """A healthy stage with some metrics changed: a number throughout, or one a step; None for one not measured."""
    columns = {name: column for name, column in {**HELD[stage], **(changes or {})}.items() if column is not None}
    rows = [
        {"step": step, **{name: c if isinstance(c, int | float) else c[step] for name, c in columns.items()}}
        for step in range(steps)
    ]
    given = (PPO_CONFIG if stage == "ppo" else {"optimizer": {"precision": "float32"}}) if config is None else config
    return Measured(folder=Path(stage), stage=stage, rows=rows, config=given, results=results or {}, stopped=stopped)


def names(one: Measured) -> list[str]:
    return [finding.kind.name for finding in diagnose(one).findings]


def late(value: float, before: float, quarter: int = STEPS // 4) -> list[float]:
    """`before`, and `value` in the last quarter."""
    return [before] * (STEPS - quarter) + [value] * quarter


@pytest.mark.parametrize("stage", ["ppo", "sft", "reward", "dpo"])
def test_nothing_is_found_in_what_is_healthy(stage: Stage) -> None:
    assert names(measured(stage)) == []
    assert names(measured(stage, config={})) == []


# What is found in PPO whose metrics are changed so, and what is as near to it on the other side.
PPO_CASES: dict[str, tuple[Mapping[str, Column | None], Mapping[str, Column | None]]] = {
    "ratio-not-1": ({"first_log_ratio": [0.0] * 7 + [2.1e-4] * 9}, {"first_log_ratio": 1.9e-4}),
    "sampler-law": ({"sampler_mismatch": 1.1e-3}, {"sampler_mismatch": 0.9e-3}),
    "sampler-stale": (
        {"sampler_mismatch": [1e-6 * 10**step for step in range(4)] + [0.01] * 12},
        {"sampler_mismatch": [1e-6 + 6e-5 * step for step in range(STEPS)]},
    ),
    # 64 responses an iteration: 16 iterations of -0.02 are -20.48 nats, of -0.019 only -19.5. kl_coef 0: no penalty.
    "kl-negative": (
        {"kl": -0.02, "kl_coef": 0.0, "reward": [0.1 * step - 0.25 for step in range(STEPS)]},
        {"kl": -0.019, "kl_coef": 0.0, "reward": [0.1 * step - 0.25 for step in range(STEPS)]},
    ),
    "reward-does-not-add-up": (
        {"reward": [0.1 * step + 0.1 * 0.05 * step - 0.25 for step in range(STEPS)]},
        {"reward": [0.1 * step - 0.1 * 0.05 * step - 0.25 + 9e-4 for step in range(STEPS)]},
    ),
    "reference-moves": ({"kl": 9e-6, "reward": [0.1 * step - 0.25 for step in range(STEPS)]}, {}),
    "policy-not-moving": (
        {"kl": 9e-6, "reward": [0.1 * step - 0.25 for step in range(STEPS)], "approx_kl": 0.0},
        {"kl": [0.0] * 15 + [1.1e-5], "reward": [0.1 * step - 0.25 for step in range(STEPS)], "approx_kl": 0.0},
    ),
    # Three iterations in a row count, one alone does not: (0.5 + 0.02 + 0.02) / 3 = 0.18.
    "update-too-large": (
        {"clip_fraction": [0.02] * 5 + [0.26] * 3 + [0.02] * 8},
        {"clip_fraction": [0.02] * 5 + [0.5] + [0.02] * 10},
    ),
    "reward-constant": (
        {"score": 0.5, "score_spread": 1e-8, "reward": [0.5 - 0.1 * 0.05 * step - 0.25 for step in range(STEPS)]},
        {"score": 0.5, "score_spread": 1e-3, "kl_coef": 0.0, "reward": 0.25},
    ),
    "all-truncated": (
        {"truncated_rate": 1.0, "reward": [0.1 * step - 0.1 * 0.05 * step - 1.0 for step in range(STEPS)]},
        {"truncated_rate": 0.975, "reward": [0.1 * step - 0.1 * 0.05 * step - 0.975 for step in range(STEPS)]},
    ),
    # 10 tokens a response, so 5.1 nats are 0.51 a token; from 1 in steps that are no jump.
    "kl-exploding": (
        {"kl": [0.425 * min(step, 12) for step in range(STEPS)], "kl_coef": 0.0, "reward": -0.25, "score": 0.0},
        {"kl": [0.415 * min(step, 12) for step in range(STEPS)], "kl_coef": 0.0, "reward": -0.25, "score": 0.0},
    ),
    "entropy-collapse": ({"entropy": late(0.39, 2.0)}, {"entropy": late(0.41, 2.0)}),
    "entropy-rising": ({"entropy": late(3.1, 2.0)}, {"entropy": late(2.9, 2.0)}),
    "length-growth": ({"response_tokens": late(15.1, 10.0)}, {"response_tokens": late(14.9, 10.0)}),
    "length-collapse": ({"response_tokens": late(3.3, 10.0)}, {"response_tokens": late(3.4, 10.0)}),
    # Without noise the standard errors are 0, and a quarter of a standard deviation decides.
    "reward-falling": (
        {"score": late(0.74, 1.0), "kl_coef": 0.0, "reward": [value - 0.25 for value in late(0.74, 1.0)]},
        {"score": late(0.76, 1.0), "kl_coef": 0.0, "reward": [value - 0.25 for value in late(0.76, 1.0)]},
    ),
    "reward-saturated": ({"score_spread": late(0.09, 1.0)}, {"score_spread": late(0.11, 1.0)}),
    "value-not-learning": ({"explained_variance": 0.04}, {"explained_variance": 0.06}),
    "value-clip-binds": ({"value_clip_fraction": 0.81}, {"value_clip_fraction": 0.79}),
    "forgetting": (
        {"heldout_text_loss": [2.0] * 8 + [2.31] * 8},
        {"heldout_text_loss": [2.0] * 8 + [2.29] * 8},
    ),
    "not-finite": ({"value_loss": [0.3] * 9 + [math.nan] + [0.3] * 6}, {}),
}


@pytest.mark.parametrize("name", PPO_CASES)
def test_ppo_on_both_sides_of_a_threshold(name: str) -> None:
    wrong, right = PPO_CASES[name]
    assert names(measured("ppo", wrong)) == [name]
    assert names(measured("ppo", right)) == []


SUPERVISED_CASES: dict[str, tuple[Stage, Mapping[str, Any], Mapping[str, Any]]] = {
    "loss-rising": (
        "sft",
        {"changes": {"loss": late(1.03, 1.0)}},
        {"changes": {"loss": [*late(1.01, 1.0)[:-1], 0.9]}},
    ),
    "loss-not-falling": ("sft", {"changes": {"loss": late(0.996, 1.0)}}, {"changes": {"loss": late(0.994, 1.0)}}),
    "validation-loss-rising": (
        "sft",
        {"changes": {"validation_loss": late(1.11, 1.0)}},
        {"changes": {"validation_loss": late(1.09, 1.0)}},
    ),
    "overfitting": (
        "reward",
        {"changes": {"validation_loss": late(1.11, 1.0)}},
        {"changes": {"validation_loss": late(1.09, 1.0)}},
    ),
    # log 2 = 0.6931, and 2 % more are 0.7070.
    "loss-above-log-2": ("reward", {"changes": {"loss": late(0.708, 0.71)}}, {"changes": {"loss": late(0.706, 0.71)}}),
    "accuracy-at-chance": (
        "reward",
        {"results": {"ci95": [0.46, 0.54], "n": 600}},
        {"results": {"ci95": [0.46, 0.56], "n": 600}},
    ),
    "labels-reversed": (
        "reward",
        {"results": {"ci95": [0.30, 0.44], "n": 600}},
        {"results": {"ci95": [0.30, 0.44], "n": 49}},
    ),
    "margin-exploding": ("dpo", {"changes": {"margin": late(5.1, 0.1)}}, {"changes": {"margin": late(4.9, 0.1)}}),
    "chosen-less-likely": (
        "dpo",
        {"changes": {"chosen_logprob": late(-121.0, -100.0)}},
        {"changes": {"chosen_logprob": late(-119.0, -100.0)}},
    ),
    # log 2 = 0.69315, and a margin of 0.001 nats at a beta of 1 makes 0.0005 of it.
    "dpo-start": (
        "dpo",
        {"changes": {"loss": [0.6938] + [0.6] * 15}, "config": {"beta": 1.0, "optimizer": {"precision": "float32"}}},
        {"changes": {"loss": [0.6936] + [0.6] * 15}, "config": {"beta": 1.0, "optimizer": {"precision": "float32"}}},
    ),
    "policy-not-moving": (
        "dpo",
        {"changes": {"margin": 0.0, "accuracy": 0.7}},
        {"changes": {"margin": [0.0, 0.0, 0.0] + [1e-5] * 13}},
    ),
}


@pytest.mark.parametrize("name", SUPERVISED_CASES)
def test_the_supervised_stages_on_both_sides_of_a_threshold(name: str) -> None:
    stage, wrong, right = SUPERVISED_CASES[name]
    assert names(measured(stage, **wrong)) == [name]
    assert names(measured(stage, **right)) == []


def test_every_kind_is_tried() -> None:
    """`stopped` has a test of its own below."""
    assert {kind.name for kind in KINDS} == {*PPO_CASES, *SUPERVISED_CASES, "stopped"}


def test_training_accuracy_decides_where_nothing_is_held_out() -> None:
    assert names(measured("reward", {"accuracy": 0.5})) == ["accuracy-at-chance"]
    assert names(measured("reward", {"accuracy": [0.1, 0.9] * 8})) == [], "0.5 +- 0.46 says nothing"
    assert names(measured("reward", {"accuracy": 0.5}, results={"ci95": [0.6, 0.7], "n": 100})) == []


def test_a_run_that_a_check_stopped_says_so_by_the_checks_own_name() -> None:
    message = "log-probs differ by 3e-2 nats a token"
    known = diagnose(measured("ppo", steps=3, stopped={"message": message, "finding": "ratio-not-1"}))
    assert [finding.kind.name for finding in known.findings] == ["ratio-not-1"]
    assert known.findings[0].seen == f"The run stopped after step 2: {message}"
    unknown = diagnose(measured("sft", steps=3, stopped={"message": message}))
    assert [finding.kind.name for finding in unknown.findings] == ["stopped"]


def test_one_fault_is_found_once() -> None:
    one = measured("ppo", {"first_log_ratio": 1.0}, stopped={"message": "m", "finding": "ratio-not-1"})
    assert names(one) == ["ratio-not-1"]


def test_too_few_steps_are_no_course() -> None:
    short = measured("ppo", {"entropy": 0.0, "value_clip_fraction": 1.0}, steps=7)
    assert names(short) == []
    assert diagnose(short).is_short
    assert not diagnose(measured("ppo", steps=8)).is_short


def test_bfloat16_and_a_folder_that_does_not_say_have_wider_limits() -> None:
    in_bf16 = PPO_CONFIG | {"policy": {"precision": "bfloat16"}}
    sampled_so = PPO_CONFIG | {"decoding": {"precision": "bfloat16"}}
    for config in (in_bf16, sampled_so, {}):
        assert names(measured("ppo", {"sampler_mismatch": 0.09}, config=config)) == []
        assert names(measured("ppo", {"sampler_mismatch": 0.11}, config=config)) == ["sampler-law"]
    assert names(measured("ppo", {"sampler_mismatch": [0.06] * 8 + [0.17] * 8}, config=in_bf16)) == []
    assert names(measured("ppo", {"sampler_mismatch": [0.05] * 8 + [0.17] * 8}, config=in_bf16)) == ["sampler-stale"]


def test_another_law_is_told_by_the_ratio_where_it_was_measured() -> None:
    """log 1.11 = 0.104 and log 1.10 = 0.095; log 1.0011 = 1.0994e-3. Tokens that are far off weigh more in a ratio."""
    in_bf16 = PPO_CONFIG | {"policy": {"precision": "bfloat16"}}
    few_tokens = {"sampler_mismatch": 0.06, "sampler_ratio": 1.11}
    (finding,) = diagnose(measured("ppo", few_tokens, config=in_bf16)).findings
    assert finding.kind.name == "sampler-law"
    assert finding.seen == (
        "At iteration 0, with the same weights, sampler and trainer are 0.104 nats a token apart (allowed: 0.1)."
    )
    assert names(measured("ppo", few_tokens | {"sampler_ratio": 1.10}, config=in_bf16)) == []
    assert names(measured("ppo", {"sampler_ratio": 1.0011})) == ["sampler-law"]
    assert names(measured("ppo", {"sampler_ratio": 1.0009})) == []


def test_ipo_begins_with_its_own_loss() -> None:
    config = {"variant": "ipo", "beta": 0.25, "optimizer": {"precision": "float32"}}  # (1 / 0.5)^2 = 4
    falling = [4.0 - 0.1 * step for step in range(STEPS)]
    assert names(measured("dpo", {"loss": falling}, config=config)) == []
    assert names(measured("dpo", config=config)) == ["dpo-start"]


@pytest.mark.parametrize(
    ("variant", "precision", "beta", "expected", "within"),
    [
        ("ipo", "bfloat16", 0.1, 25.0, 5.25),  # 0.5 / 0.1 + 0.25
        ("ipo", "float32", 0.1, 25.0, 0.010001),
        ("sigmoid", "bfloat16", 0.1, math.log(2), 0.025),
        ("sigmoid", "float32", 0.1, math.log(2), 1e-4),  # 5e-5 by the margin, which four digits do not show
        ("sigmoid", "float32", 2.0, math.log(2), 1e-3),
    ],
)
def test_dpo_begins_within_what_a_margin_of_two_equal_models_makes_of_its_loss(
    variant: str, precision: str, beta: float, expected: float, within: float
) -> None:
    config = {"variant": variant, "beta": beta, "optimizer": {"precision": precision}}
    for sign in (1, -1):
        for factor, found in ((0.97, []), (1.03, ["dpo-start"])):
            start = expected + sign * factor * within
            loss = [start, *[expected * (0.98 - 0.01 * step) for step in range(STEPS - 1)]]
            assert names(measured("dpo", {"loss": loss}, config=config)) == found


def test_truncated_responses_that_lose_nothing_add_up_too() -> None:
    reward = [0.1 * step - 0.1 * 0.05 * step for step in range(STEPS)]
    for truncated, found in (("score", []), ("mask", []), ("penalty", ["reward-does-not-add-up"])):
        assert names(measured("ppo", {"reward": reward}, config=PPO_CONFIG | {"truncated": truncated})) == found


def test_a_turned_sign_is_recognised() -> None:
    (finding,) = diagnose(measured("ppo", PPO_CASES["reward-does-not-add-up"][0])).findings
    assert finding.seen.endswith("With the KL penalty's sign turned it adds up.")
    (other,) = diagnose(measured("ppo", {"reward": 17.0})).findings
    assert "turned" not in other.seen


def test_an_older_runs_metrics_are_read() -> None:
    """`score_spread` and `first_log_ratio` were not measured always; a score that never moves says enough."""
    older: dict[str, Column | None] = {"score_spread": None, "first_log_ratio": None}
    assert names(measured("ppo", older)) == []
    flat: dict[str, Column | None] = {"score": 0.5, "reward": [0.5 - 0.1 * 0.05 * step - 0.25 for step in range(STEPS)]}
    assert names(measured("ppo", older | flat)) == ["reward-constant"]
    for name in PPO:
        if name not in ("kl", "approx_kl"):
            assert names(measured("ppo", {name: None})) == [], name


def test_a_jump_is_too_large_a_step_even_where_no_ratio_shows_it() -> None:
    """With one minibatch and one inner epoch every ratio is 1. 10 tokens a response: 5 nats are half a nat a token."""
    still: dict[str, Column | None] = {
        "clip_fraction": 0.0,
        "approx_kl": 0.0,
        "kl_coef": 0.0,
        "reward": -0.25,
        "score": 0.0,
    }
    (finding,) = diagnose(measured("ppo", still | {"kl": [0.1] * 9 + [5.2] + [0.1] * 6})).findings
    assert finding.seen == "The KL rose from 0.1 to 5.2 nats a response at iteration 9."
    assert names(measured("ppo", still | {"kl": [0.1] * 9 + [5.0] + [0.1] * 6})) == []
    # It rises by 5.1 nats; three times the error of a difference of 1.2 and 1.2 are 5.09, of 1.21 and 1.21 are 5.13.
    for error, found in ((1.2, ["update-too-large"]), (1.21, [])):
        assert names(measured("ppo", still | {"kl": [0.1] * 9 + [5.2] + [0.1] * 6, "kl_error": error})) == found


def test_with_one_step_an_iteration_a_reference_that_moves_is_named_too() -> None:
    """`approx_kl` is of log-probs before that step, and 0 whatever the step does."""
    still, _ = PPO_CASES["policy-not-moving"]
    for steps, both in (((1, 1), True), ((2, 1), False), ((1, 2), False)):
        config = PPO_CONFIG | {"minibatches": steps[0], "inner_epochs": steps[1]}
        (finding,) = diagnose(measured("ppo", still, config=config)).findings
        assert finding.kind.name == "policy-not-moving"
        assert ("Or the reference moves with the policy" in finding.seen) is both


def test_a_good_stretch_does_not_hide_a_bad_one() -> None:
    """The sum is over the worst stretch: -0.5 x 64 x 2 = -64 nats in two iterations; the whole sum is positive."""
    kl = [1.0] * 7 + [-0.5] * 2 + [1.0] * 7
    (finding,) = diagnose(measured("ppo", {"kl": kl, "kl_coef": 0.0, "reward": -0.25, "score": 0.0})).findings
    assert finding.kind.name == "kl-negative"
    assert "iterations 7-8: over 128 responses that is -64 nats" in finding.seen


def test_chance_alone_reaches_the_kl_limit_hardly_ever() -> None:
    """A bound that is met: where log pi - log ref is -1 with p and c otherwise so that E exp(-x) = 1."""
    p = 0.25  # exp(1) p + exp(-c) (1 - p) = 1
    c = -math.log((1 - math.e * p) / (1 - p))
    assert p * math.e + (1 - p) * math.exp(-c) == pytest.approx(1, abs=1e-12)
    # 20 responses in a row at -1 reach -20: probability p^20, within exp(-20).
    assert p**20 <= math.exp(-KL_SURPRISE)


def test_a_score_that_falls_while_the_reward_rises_is_a_trade() -> None:
    """Learning to end costs score and saves the penalty."""
    saved = {"truncated_rate": late(0.0, 0.5), "reward": late(0.7, 0.5)}
    assert names(measured("ppo", {"score": late(0.7, 1.0), "kl_coef": 0.0, **saved})) == []


def test_a_penalty_that_rises_may_take_from_the_reward() -> None:
    """0.75 - 0.1 x 2 = 0.55, and 0.75 - 0.2 x 2 = 0.35 or 0.75 - 0.1 x 4 = 0.35: a fall of 0.2, spread 0.5."""
    fallen: dict[str, Column | None] = {"score": 1.0, "score_spread": 0.5, "reward": late(0.35, 0.55)}
    assert names(measured("ppo", {**fallen, "kl": 2.0, "kl_coef": late(0.2, 0.1)})) == []
    assert names(measured("ppo", {**fallen, "kl": late(4.0, 2.0), "kl_coef": 0.1})) == ["reward-falling"]


def test_a_reward_that_rose_and_collapsed_has_fallen() -> None:
    """From 0 to 1 and back to 0.45, which is above the first quarter's 0 by more than noise; scores spread by 1."""
    rising = [0.0] * 4 + [0.5] * 2 + [1.0] * 6
    flat: dict[str, Column | None] = {"kl_coef": 0.0, "truncated_rate": 0.0}
    lost = rising + [0.45] * 4
    (finding,) = diagnose(measured("ppo", flat | {"score": lost, "reward": lost})).findings
    assert finding.kind.name == "reward-falling"
    assert finding.seen == "Reward 1 over iterations 6-9, 0.45 over 12-15; the score 1, then 0.45."
    kept = rising + [0.55] * 4
    assert names(measured("ppo", flat | {"score": kept, "reward": kept})) == []
    # 1 - 0.1 x 5.5 = 0.45: the coefficient rose to a tenth after the best stretch, though it was as high at first.
    dear: dict[str, Column | None] = {
        "kl_coef": [0.1] * 4 + [0.0] * 8 + [0.1] * 4,
        "kl": [0.0] * 12 + [5.5] * 4,
        "response_tokens": 20.0,
    }
    paid = flat | {"score": rising + [1.0] * 4, "reward": lost} | dear
    assert "reward-falling" not in names(measured("ppo", paid))
    # Errors of +-0.5: three of the difference of two means of four, 3 x 0.577 / sqrt(2) = 1.22, hide a fall of 0.6.
    shaken = [value + (-1) ** step * 0.5 for step, value in enumerate(rising + [0.4] * 4)]
    assert names(measured("ppo", flat | {"score": shaken, "reward": shaken})) == []


def test_a_value_function_that_comes_up_from_far_below_is_learning() -> None:
    coming = [-2.0 + 0.1 * step for step in range(STEPS)]
    assert names(measured("ppo", {"explained_variance": coming})) == []
    assert names(measured("ppo", {"explained_variance": -2.0, "value_loss": late(0.2, 0.3)})) == []


def test_windows() -> None:
    series = Series(tuple(range(10)), tuple(float(value) for value in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)))
    first, last = ends(series)
    assert (first.values, last.values) == ((3.0, 1.0, 4.0), (6.0, 5.0, 3.0))
    assert series.worst_mean(3).span == "5-7"  # 9, 2, 6
    assert first.mean == pytest.approx(8 / 3)
    # Deviations 1/3, -5/3, 4/3: sum of squares 42/9, variance 7/3, of a mean of three 7/9.
    assert first.error == pytest.approx(math.sqrt(7 / 9), abs=1e-12)
    assert Series((5,), (2.0,)).error == 0.0


def test_epochs_are_compared_where_there_are_several() -> None:
    """Two epochs of 8 steps: first and last are the whole epochs, of the same data."""
    epoch = [(step + 1) / 8 for step in range(STEPS)]
    loss = [1.0, 0.9, 1.1, 0.8, 1.2, 1.0, 1.0, 1.0] * 2
    (finding,) = diagnose(measured("sft", {"loss": loss, "epoch": epoch})).findings
    assert finding.kind is supervised.NOT_FALLING
    assert finding.seen == "Mean loss 1 over steps 0-7, 1 over 8-15."
    same = diagnose(measured("sft", {"validation_loss": 0.7}))
    assert [finding.seen for finding in same.findings] == ["The validation loss is 0.7 after every epoch."]


def test_what_one_epoch_cannot_tell_is_no_alarm() -> None:
    """The means of four steps that scatter by 0.01 have errors of 0.0058, and their difference one of 0.0082.

    So a fall of 0.004 may be one of 0.020. Two epochs of eight steps have seen the same data: there it is what it is.
    """
    scattered = [value + 0.01 * (-1) ** step for step, value in enumerate(late(0.996, 1.0))]
    assert "loss-not-falling" not in names(measured("sft", {"loss": scattered}))
    halves = [value + 0.01 * (-1) ** step for step, value in enumerate([1.0] * 8 + [0.996] * 8)]
    epoch = [(step + 1) / 8 for step in range(STEPS)]
    assert "loss-not-falling" in names(measured("sft", {"loss": halves, "epoch": epoch}))


def test_a_first_batch_that_happens_to_be_easy_is_no_blow_up() -> None:
    """A pair that is right by chance has a loss of 0.3; then come ordinary ones, at log 2."""
    config = {"batch_size": 2, "optimizer": {"precision": "float32"}}
    pairs = {"loss": [0.3, *[0.69 - 0.01 * step for step in range(15)]]}
    assert names(measured("reward", pairs, config=config)) == []
    assert "loss-rising" in names(measured("reward", {"loss": [0.3, 1.5, 1.4, 1.4, *pairs["loss"][4:]]}, config=config))
    answers = {"loss": [0.5, 2.1, 1.9, *[2.0 - 0.02 * step for step in range(13)]]}  # 1.5 on the average of three
    assert "loss-rising" not in names(measured("sft", answers, config=config))
    assert "loss-rising" in names(measured("sft", answers, config={**config, "batch_size": 8}))


def test_labels_that_held_out_raters_would_reverse_are_said_to_be_theirs() -> None:
    apart = {"n": 400, "value": 0.3, "ci95": [0.26, 0.35]}
    results = {"n": 400, "value": 0.7, "ci95": [0.65, 0.74], "held_out_raters": apart}
    (finding,) = diagnose(measured("reward", results=results)).findings
    assert finding.kind.name == "labels-reversed"
    assert "by held-out raters: 26.0 to 35.0 %" in finding.seen


def test_one_response_an_iteration_has_no_spread_and_is_no_constant_reward() -> None:
    assert names(measured("ppo", {"score_spread": 0.0}, config={**PPO_CONFIG, "batch_size": 1})) == []


def test_one_iteration_alone_is_no_update_that_is_too_large() -> None:
    assert names(measured("ppo", {"clip_fraction": 0.5}, steps=2)) == []
    assert names(measured("ppo", {"clip_fraction": 0.5}, steps=3)) == ["update-too-large"]


def test_three_iterations_show_that_all_responses_are_cut_off() -> None:
    cut, _ = PPO_CASES["all-truncated"]
    assert names(measured("ppo", cut, steps=2)) == []
    assert names(measured("ppo", cut, steps=3)) == ["all-truncated"]


def test_of_several_epochs_the_last_is_judged() -> None:
    """Two epochs of 8 steps: the last four have a mean of 6 and 0.5, the last eight of 4.5 and 0.7."""
    epoch = [(step + 1) / 8 for step in range(STEPS)]
    for name, last, quarter, found in (("margin", 3.0, 6.0, "margin-exploding"), ("accuracy", 0.9, 0.5, "at-chance")):
        column = [last] * 12 + [quarter] * 4
        assert not [one for one in names(measured("dpo", {name: column, "epoch": epoch})) if found in one]
        assert [one for one in names(measured("dpo", {name: column})) if found in one], "one epoch: the last quarter"
    sinking = {"chosen_logprob": [-100.0] * 12 + [-130.0] * 4}  # by 30 in the quarter, by 15 in the epoch
    assert names(measured("dpo", sinking | {"epoch": epoch})) == []
    assert names(measured("dpo", sinking)) == ["chosen-less-likely"]


def test_which_loss_dpo_has_only_its_config_says() -> None:
    """The first loss of IPO with a beta of 0.1 is 25."""
    ipo = {"loss": [25.0 - 0.5 * step for step in range(STEPS)]}
    assert names(measured("dpo", ipo, config={})) == []


def test_a_loss_that_blew_up_and_came_back_has_risen() -> None:
    loss = [1.0, 1.9, 2.0, 2.2, *[0.8 - 0.02 * step for step in range(12)]]  # 2.03 over steps 1-3
    (finding,) = diagnose(measured("sft", {"loss": loss})).findings
    assert finding.seen == "Mean loss 2.03 over steps 1-3, 1 at first."
    assert names(measured("sft", {"loss": [1.0, 1.9, 2.0, 2.0, *loss[4:]]})) == []


def test_thresholds_leave_room_for_what_docs_call_usual() -> None:
    assert course.CLIP_FRACTION > 0.1
    assert course.EXPLAINED < 0.3
