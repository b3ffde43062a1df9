"""Numbers in words: rounding must not turn "nearly all" into "all", nor a small lead into a larger one."""

# ruff: noqa: RUF001 - the signs of the page: a true minus and an en dash

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tastemaker.report import words
from tastemaker.report.families import Family, Inks, family_of
from tastemaker.report.fields import Measured


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.814, "81%"), (0.0, "0%"), (1.0, "100%"), (0.999, "99.9%"), (0.002, "0.2%"), (-0.12, "−12%"), (-0.0001, "0%")],
)
def test_percent(value: float, text: str) -> None:
    assert words.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1.00"), (-1.528, "−1.53"), (12345.6, "12,346"), (0.061, "0.0610"), (0.00002, "2.0e-05")],
)
def test_number(value: float, text: str) -> None:
    assert words.number(value) == text


def test_interval_decides_the_decimals() -> None:
    # Half-width 0.03: two decimals. Half-width 0.015 begins with a 1: one more. Half-width 12: none.
    assert words.number_with_interval(Measured(value=0.8312, low=0.8012, high=0.8612)) == "0.83 (0.80 to 0.86)"
    assert words.number_with_interval(Measured(value=-0.120, low=-0.135, high=-0.105)) == "−0.120 (−0.135 to −0.105)"
    assert words.number_with_interval(Measured(value=100.0, low=70.0, high=130.0)) == "100 (70 to 130)"
    assert words.number_with_interval(Measured(value=0.5)) == "0.500"


def test_a_row_shares_its_decimals() -> None:
    # 0.771 deserves three, 1.85 two; one more than the largest deserves is allowed. 17.1 beside 0.002 is held to two.
    assert words.common_decimals([1.85, 0.771]) == 3
    assert words.common_decimals([17.1, 0.002]) == 2
    assert words.common_decimals([0.0]) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.8, "0.8 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (331.7, "5 min 32 s"),
        (3600, "1 h 00 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.7, "1.7 times"), (2.0, "twice"), (5.52, "more than five times"), (9.9, "ten times"), (100, "a hundred times")],
)
def test_size_is_not_overstated(ratio: float, text: str) -> None:
    assert words.times_larger(ratio) == text


def test_names_of_judges_and_decodings() -> None:
    assert words.rater_words("held-out") == "held-out raters"
    assert words.rater_words("held_out_raters") == "held-out raters"
    assert words.decoding_words("T=1") == "sampling at T=1"
    assert words.decoding_words("greedy") == "greedy decoding"
    assert words.plain("closed_qa") == "closed QA"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.compact(4_910_000) == "4.91\u202fM"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_turning_a_win_rate_twice_is_identity(value: float, one: float, other: float) -> None:
    measured = Measured(value=value, low=min(one, other), high=max(one, other), n=7)
    again = measured.of_the_other_side().of_the_other_side()
    assert again.value == pytest.approx(value, abs=1e-12)
    assert again.bounds == pytest.approx(measured.bounds, abs=1e-12)
    turned = measured.of_the_other_side()
    assert turned.bounds[0] <= turned.bounds[1]


@pytest.mark.parametrize(
    ("name", "kind", "family"),
    [
        ("ppo-ptx", "policy", Family.PPO_PTX),
        ("ppo-init", "sft", Family.SFT),
        ("dpo", "policy", Family.DPO),
        ("assistant", "policy", Family.PPO),
        ("base-large 4-shot", "base", Family.FEW_SHOT),
        ("base-large", "few-shot", Family.FEW_SHOT),
        ("sft-bo8", "best of 8", Family.BEST_OF),
        ("gpt-small", "", Family.BASE),
        ("mystery", "", Family.OTHER),
    ],
)
def test_families(name: str, kind: str, family: Family) -> None:
    assert family_of(name, kind) is family


def test_a_model_keeps_its_ink_and_no_two_share_one() -> None:
    inks = Inks.for_models([("base-small", "base"), ("base-large", "base"), ("ppo", "policy")])
    small, large = inks.of("base-small"), inks.of("base-large")
    assert small != large
    assert inks.of("base-small") == small
    assert inks.of("6-policy/ppo") == inks.of("ppo")
    assert inks.of("baseline", "sft") == inks.of("sft", "sft")
    assert inks.of("ppo-init", "sft") != inks.of("sft", "sft")
