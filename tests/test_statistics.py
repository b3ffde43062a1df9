"""Statistics: values derived by hand, other libraries as oracles, and the coverage of every kind of interval."""

from __future__ import annotations

import math
from collections.abc import Callable

import choix
import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import t as student
from statsmodels.discrete.conditional_models import ConditionalLogit
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from tastemaker.errors import DataError
from tastemaker.statistics import (
    Comparison,
    Estimate,
    Interval,
    accuracy,
    best_of_n_kl,
    bradley_terry,
    calibration_curve,
    distinct_n,
    fit_overoptimization,
    length_controlled_win_rate,
    mcnemar,
    mean_ci,
    ngram_entropy,
    repetition_rate,
    wilson,
    win_rate,
)

Floats = NDArray[np.float64]
preferences = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 6)), min_size=2, max_size=40)


def bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def covered(estimate_of: Callable[[np.random.Generator], Estimate], truth: float, repeats: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    return float(np.mean([truth in estimate_of(rng).ci95 for _ in range(repeats)]))


# --------------------------------------------------------------------------------------------- win rates and accuracy


def test_win_rate_by_hand() -> None:
    # Prompts: x has 1, 1, 0.5 (2.5 of 3), y has 0, 0.5 (0.5 of 2), z has 0, 1 (1 of 2): share 4/7.
    # Residuals part - share * whole: x 11/14, y -9/14, z -2/14. V = 3/2 * (121 + 81 + 4)/196 / 49 = 0.0321741.
    # n_eff = (12/49) / V = 7.6116505, Student's quantile for two degrees of freedom 4.3026527, its square over n_eff
    # 2.4321690: centre (4/7 + 1.2160845) / 3.4321690 = 0.5208115,
    # reach 4.3026527 / 3.4321690 * sqrt(0.0321741 + 2.4321690 / (4 * 7.6116505)) = 1.2536250 * 0.3347495 = 0.4196503.
    estimate = win_rate([1, 0, 1, 0.5, 0.5, 0, 1], ["x", "y", "x", "x", "y", "z", "z"])
    assert estimate.value == pytest.approx(4 / 7, abs=1e-12)
    assert estimate.n == 7
    assert bounds(estimate.ci95) == pytest.approx([0.5208115 - 0.4196503, 0.5208115 + 0.4196503], abs=1e-6)


def test_without_clusters_accuracy_is_wilson_but_for_students_quantile() -> None:
    # V is unbiased, so n_eff is n - 1, and the quantile is Student's: both vanish as n grows.
    assert bounds(accuracy([True] * 7000 + [False] * 3000).ci95) == pytest.approx(
        bounds(wilson(7000, 10000).ci95), abs=1e-5
    )


def test_a_share_without_variation_gets_one_answer_a_cluster() -> None:
    estimate = win_rate([1] * 30, [index % 5 for index in range(30)])
    # All won: Wilson's lower end is 1 / (1 + q^2/n), here with 5 clusters and q = t_4 = 2.7764451.
    assert estimate.value == 1
    assert bounds(estimate.ci95) == pytest.approx([1 / (1 + 2.7764451**2 / 5), 1], abs=1e-6)
    assert win_rate([0.5] * 4, "wxyz").ci95.width > 0.5
    assert accuracy([1, 1, 1], ["same"] * 3).ci95.low == pytest.approx(wilson(1, 1).ci95.low, abs=1e-12)


def test_the_wider_of_prompts_and_raters_is_reported() -> None:
    # Rater r always prefers the first, s the second: over prompts nothing varies, over raters everything.
    preference, prompts, raters = [1, 0] * 6, [index // 2 for index in range(12)], ["r", "s"] * 6
    assert win_rate(preference, prompts, raters).ci95 == win_rate(preference, raters).ci95
    assert win_rate(preference, raters, prompts).ci95 == win_rate(preference, raters).ci95
    assert win_rate(preference, prompts, ["only"] * 12) == win_rate(preference, prompts)


@settings(deadline=None)  # a shared machine may be slow
@given(preferences)
def test_exchanging_the_models_mirrors_the_win_rate(rows: list[tuple[float, int]]) -> None:
    preference, clusters = np.array([row[0] for row in rows]), [row[1] for row in rows]
    forward, back = win_rate(preference, clusters), win_rate(1 - preference, clusters)
    assert back.value == pytest.approx(1 - forward.value, abs=1e-9)
    assert bounds(back.ci95) == pytest.approx([1 - forward.ci95.high, 1 - forward.ci95.low], abs=1e-7)
    assert 0 <= forward.ci95.low <= forward.value + 1e-12
    assert forward.value - 1e-12 <= forward.ci95.high <= 1


@settings(deadline=None)  # a shared machine may be slow
@given(preferences, st.integers(2, 5), st.randoms(use_true_random=False))
def test_saying_everything_twice_within_its_prompt_adds_no_certainty(
    rows: list[tuple[float, int]], times: int, random: object
) -> None:
    once = win_rate([row[0] for row in rows], [row[1] for row in rows])
    again = rows * times
    random.shuffle(again)  # type: ignore[attr-defined]
    repeated = win_rate([row[0] for row in again], [row[1] for row in again])
    assert repeated.value == pytest.approx(once.value, abs=1e-9)
    assert bounds(repeated.ci95) == pytest.approx(bounds(once.ci95), abs=1e-7)


@pytest.mark.parametrize(
    ("prompts", "answers", "mean", "spread", "ties"),
    [(12, 1, 0.5, 0.0, 0.0), (30, 4, 0.6, 1.5, 0.3), (30, 4, 3.0, 1.5, 0.0), (100, 2, 0.5, 1.0, 0.0)],
)
def test_win_rate_intervals_cover_the_truth(
    prompts: int, answers: int, mean: float, spread: float, ties: float
) -> None:
    truth = expit(mean + spread * np.random.default_rng(9).normal(size=200_000)).mean() * (1 - ties) + ties / 2
    clusters = np.repeat(np.arange(prompts), answers).tolist()

    def draw(rng: np.random.Generator) -> Estimate:
        chance = np.repeat(expit(mean + spread * rng.normal(size=prompts)), answers)
        preference = np.where(rng.random(len(chance)) < ties, 0.5, rng.random(len(chance)) < chance)
        return win_rate(preference, clusters)

    assert 0.93 <= covered(draw, truth, 600) <= 0.995


def test_answers_as_rows_would_not_cover_and_raters_must_count() -> None:
    """150 prompts, 8 raters of differing taste: only the interval over raters knows what other raters would say."""
    prompts, raters = np.repeat(np.arange(150), 2).tolist(), (np.arange(300) % 8).tolist()
    truth = float(expit(0.4 + math.hypot(1, 0.6) * np.random.default_rng(9).normal(size=200_000)).mean())

    def preference(rng: np.random.Generator) -> Floats:
        taste = np.repeat(rng.normal(size=150), 2) + 0.6 * rng.normal(size=8)[np.arange(300) % 8]
        first_won: Floats = (rng.random(300) < expit(0.4 + taste)).astype(np.float64)
        return first_won

    assert covered(lambda rng: accuracy(preference(rng)), truth, 300) < 0.85
    assert covered(lambda rng: win_rate(preference(rng), prompts), truth, 300) < 0.87
    assert covered(lambda rng: win_rate(preference(rng), prompts, raters), truth, 300) >= 0.925


# ------------------------------------------------------------------------------------------------- length control


def test_length_control_by_hand() -> None:
    # Four wins of equal length in four clusters; the invented cluster holds half a win and half a loss:
    # p = 4.5 / 5 = 0.9. Bread 1 / (5 * 0.09); meat 4/3 * 4 * 0.1^2 + (2 * 0.9^2 + 2 * 0.1^2) / 4 = 0.4633333.
    # Standard error sqrt(0.4633333) / 0.45 = 1.5126387; t_3 = 3.1824463; logit(0.9) = 2.1972246.
    estimate = length_controlled_win_rate([1, 1, 1, 1], [5, 6, 7, 8], [5, 6, 7, 8], "wxyz")
    assert estimate.value == pytest.approx(0.9, abs=1e-9)
    reach = 3.1824463 * 1.5126387
    assert bounds(estimate.ci95) == pytest.approx(expit([2.1972246 - reach, 2.1972246 + reach]).tolist(), abs=1e-6)


def test_the_invented_cluster_is_as_large_as_the_others() -> None:
    # Twelve wins in three clusters count like three wins in three: 3.5 / 4.
    estimate = length_controlled_win_rate(np.ones(12), np.full(12, 7), np.full(12, 7), "xyz" * 4)
    assert estimate.value == pytest.approx(0.875, abs=1e-9)
    once = length_controlled_win_rate(np.ones(3), np.full(3, 7), np.full(3, 7), "xyz")
    assert bounds(estimate.ci95) == pytest.approx(bounds(once.ci95), abs=1e-9)


def test_length_control_is_a_logistic_regression_on_the_log_ratio() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(1, 90, size=211), rng.integers(1, 70, size=211)
    ratio = np.log(a / b)
    preference = (rng.random(211) < expit(-0.7 + 1.3 * ratio)).astype(float)
    estimate = length_controlled_win_rate(preference, a, b, list(range(211)))
    typical = math.sqrt(np.mean(ratio**2))
    design = sm.add_constant(np.r_[ratio, typical, typical, -typical, -typical])
    fit = sm.GLM(
        np.r_[preference, 0, 1, 0, 1], design, sm.families.Binomial(), freq_weights=np.r_[np.ones(211), [0.25] * 4]
    ).fit(tol=1e-12)
    assert estimate.value == pytest.approx(expit(fit.params[0]), abs=1e-8)
    robust = sm.Logit(preference, sm.add_constant(ratio)).fit(
        disp=False, cov_type="cluster", cov_kwds={"groups": np.arange(211)}
    )
    width = logit(estimate.ci95.high) - logit(estimate.ci95.low)
    assert width / (2 * student.ppf(0.975, 210)) == pytest.approx(robust.bse[0], rel=0.02)


def test_length_control_sees_through_length() -> None:
    """The first model wins two times in three, only because it writes twice as much and the raters love length."""
    rng = np.random.default_rng(1)
    length_b = rng.integers(20, 60, size=900)
    length_a = length_b * rng.choice([1, 2, 4], size=900)
    preference = (rng.random(900) < expit(np.log(length_a / length_b))).astype(float)
    prompts = list(range(900))
    assert win_rate(preference, prompts).ci95.low > 0.6
    assert 0.5 in length_controlled_win_rate(preference, length_a, length_b, prompts).ci95


def test_length_control_credits_the_model_that_wins_as_often_with_fewer_words() -> None:
    rng = np.random.default_rng(1)
    length_a = rng.integers(20, 60, size=900)
    length_b = length_a * rng.choice([1, 3, 9], size=900)
    preference = (rng.random(900) < expit(math.log(3) + np.log(length_a / length_b))).astype(float)
    prompts = list(range(900))
    assert 0.5 in win_rate(preference, prompts).ci95
    controlled = length_controlled_win_rate(preference, length_a, length_b, prompts)
    assert 0.75 in controlled.ci95  # the sigmoid of log 3
    assert controlled.ci95.low > 0.65


@settings(deadline=None)  # a shared machine may be slow
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 50), st.integers(0, 50), st.integers(0, 4)),
        min_size=1,
        max_size=30,
    )
)
def test_length_control_mirrors_and_never_fails(rows: list[tuple[float, int, int, int]]) -> None:
    preference, a, b, clusters = (np.array(column) for column in zip(*rows, strict=True))
    forward = length_controlled_win_rate(preference, a, b, clusters.tolist())
    back = length_controlled_win_rate(1 - preference, b, a, clusters.tolist())
    assert back.value == pytest.approx(1 - forward.value, abs=1e-6)
    assert bounds(back.ci95) == pytest.approx([1 - forward.ci95.high, 1 - forward.ci95.low], abs=1e-5)
    assert 0 <= forward.ci95.low < forward.value < forward.ci95.high <= 1


def test_length_control_of_separated_data_is_wide_and_not_a_point() -> None:
    ones, prompts = np.ones(100), list(range(100))
    same = length_controlled_win_rate(ones, ones * 9, ones * 9, prompts)
    assert same.value == pytest.approx(100.5 / 101, abs=1e-9)
    assert 0.9 < same.ci95.low < wilson(100, 100).ci95.low
    # Always won and always ten times as long: the data cannot say which of the two it was.
    assert length_controlled_win_rate(ones, ones * 90, ones * 9, prompts).ci95.low < 0.5
    longer = np.tile([3.0, 1 / 3], 50)
    by_length = length_controlled_win_rate(longer > 1, longer * 9, ones * 9, prompts)
    assert by_length.value == pytest.approx(0.5, abs=1e-9)


def test_length_control_intervals_cover_the_truth() -> None:
    clusters = np.repeat(np.arange(50), 2).tolist()
    truth = float(expit(0.4 + np.random.default_rng(9).normal(size=200_000)).mean())

    def draw(rng: np.random.Generator) -> Estimate:
        ratio = 0.3 + 0.5 * rng.normal(size=100)
        chance = expit(0.4 + ratio + np.repeat(rng.normal(size=50), 2))
        preference = (rng.random(100) < chance).astype(float)
        return length_controlled_win_rate(preference, 50 * np.exp(ratio), np.full(100, 50), clusters)

    assert 0.93 <= covered(draw, truth, 300) <= 0.995


# ------------------------------------------------------------------------------------ two judges; calibration


@pytest.mark.parametrize(("both", "only_a", "only_b"), [(11, 7, 2), (3, 0, 5), (4, 6, 6), (2, 0, 0), (9, 1, 13)])
def test_mcnemar_is_statsmodels_exact_test(both: int, only_a: int, only_b: int) -> None:
    a = [True] * both + [True] * only_a + [False] * only_b
    b = [True] * both + [False] * only_a + [True] * only_b
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    oracle = statsmodels_mcnemar([[both, only_a], [only_b, 0]], exact=True)
    assert result.p_value == pytest.approx(oracle.pvalue, abs=1e-12)


def test_mcnemar_by_hand() -> None:
    # 5 against 0: 2 * 0.5^5 = 0.0625.
    assert mcnemar([1] * 5, [0] * 5).p_value == pytest.approx(0.0625, abs=1e-12)


def test_calibration_by_hand() -> None:
    # |gaps| log 3 three times and log 4 twice claim 0.75 and 0.8; raters agreed 1.5 of 3 and 1.5 of 2.
    # Expected error (3 * 0.25 + 2 * 0.05) / 5 = 0.17; by chance sqrt(2/pi) (sqrt(3 * 3/16) + sqrt(2 * 0.16)) / 5.
    gaps = [math.log(4), -math.log(3), math.log(3), -math.log(4), math.log(3)]
    curve = calibration_curve(gaps, [1, 1, 0, 0.5, 0.5], bins=2)
    assert [part.predicted for part in curve.bins] == pytest.approx([0.75, 0.8], abs=1e-12)
    assert [part.observed.value for part in curve.bins] == pytest.approx([0.5, 0.75], abs=1e-12)
    assert [part.observed.n for part in curve.bins] == [3, 2]
    assert curve.expected_error == pytest.approx(0.17, abs=1e-12)
    expected = math.sqrt(2 / math.pi) * (0.75 + math.sqrt(0.32)) / 5
    assert curve.chance_error == pytest.approx(expected, abs=1e-12)


def test_calibration_tells_a_calibrated_model_from_a_boastful_one() -> None:
    rng = np.random.default_rng(2)
    gap = rng.normal(scale=1.5, size=4000)
    agreed = rng.random(4000) < expit(np.abs(gap))
    honest, boastful = calibration_curve(gap, agreed), calibration_curve(3 * gap, agreed)
    assert honest.expected_error < 2 * honest.chance_error
    assert boastful.expected_error > 5 * boastful.chance_error
    assert sum(part.predicted in part.observed.ci95 for part in honest.bins) >= 8


# ------------------------------------------------------------------------------------------------- Bradley-Terry


def played(a: str, b: str, wins: int, ties: int, losses: int, prefix: str = "") -> list[Comparison]:
    outcomes = [1.0] * wins + [0.5] * ties + [0.0] * losses
    return [
        Comparison(a=a, b=b, preference=outcome, prompt=f"{prefix}{a}{b}{index}")
        for index, outcome in enumerate(outcomes)
    ]


LEAGUE = played("a", "b", 13, 5, 4) + played("b", "c", 7, 2, 11) + played("c", "a", 3, 1, 6) + played("c", "d", 5, 3, 2)


def test_two_models_with_ties_by_hand() -> None:
    # Davidson for two models: strength gap log(wins / losses), tie strength ties / sqrt(wins * losses).
    result = bradley_terry(played("new", "old", 18, 6, 8), ridge=1e-9)
    gap = math.log(18 / 8)
    assert result.strengths["new"].value == pytest.approx(gap / 2, abs=1e-7)
    assert result.strengths["old"].value == pytest.approx(-gap / 2, abs=1e-7)
    assert result.tie_strength == pytest.approx(6 / 12, abs=1e-7)
    # With all four parameters free the fit is exact: the win rate is the observed one, (18 + 3) / 32.
    assert result.win_rate("new", "old").value == pytest.approx(21 / 32, abs=1e-7)
    assert result.win_rate("old", "new").value == pytest.approx(11 / 32, abs=1e-7)
    assert result.elo("new") - result.elo("old") == pytest.approx(400 * math.log10(18 / 8), abs=1e-4)
    assert result.unbeaten == ()


def test_davidson_is_the_conditional_logit_of_three_outcomes() -> None:
    """Each comparison chooses one of won, lost, tied, whose utilities are s/2, -s/2 and log tie strength."""
    names = "abcd"
    design, chosen, groups = [], [], []
    for group, row in enumerate(LEAGUE):
        contrast = np.array([(name == row.a) - (name == row.b) for name in names[1:]], dtype=float)
        outcomes = ((contrast / 2, 0.0, 1.0), (-contrast / 2, 0.0, 0.0), (0 * contrast, 1.0, 0.5))
        for utility, tie, preference in outcomes:
            design.append([*utility, tie])
            chosen.append(row.preference == preference)
            groups.append(group)
    oracle = ConditionalLogit(np.array(chosen, dtype=int), np.array(design), groups=np.array(groups))
    result = bradley_terry(LEAGUE, ridge=1e-9)
    strength = [result.strengths[name].value - result.strengths["a"].value for name in names[1:]]
    params = np.array([*strength, math.log(result.tie_strength)])
    # Its own fit stops 1e-4 away from the optimum; at ours its score is zero, and its curvature gives our variances.
    assert oracle.fit(disp=False).params == pytest.approx(params, abs=1e-3)
    assert oracle.score(params) == pytest.approx(np.zeros(4), abs=1e-6)
    covariance = np.linalg.inv(-oracle.hessian(params))
    likelihood = result.covariances[0][1]
    for index in (1, 2, 3):
        variance = likelihood[index, index] + likelihood[0, 0] - 2 * likelihood[0, index]
        assert variance == pytest.approx(covariance[index - 1, index - 1], rel=1e-5)


def test_without_ties_it_is_choix() -> None:
    decided = [row for row in LEAGUE if row.preference != 0.5]
    pairs = [("abcd".index(row.a), "abcd".index(row.b)) for row in decided]
    data = [pair if row.preference == 1 else pair[::-1] for pair, row in zip(pairs, decided, strict=True)]
    result = bradley_terry(decided, ridge=0.1)  # choix's alpha is half the ridge
    oracle = choix.opt_pairwise(4, data, alpha=0.05, tol=1e-9)
    assert [result.strengths[name].value for name in "abcd"] == pytest.approx(
        (oracle - oracle.mean()).tolist(), abs=1e-5
    )
    assert result.tie_strength == 0


def test_ties_as_halves_are_half_a_win_and_half_a_loss() -> None:
    halves = bradley_terry(played("a", "b", 6, 4, 2), ties="half", ridge=1e-9)
    assert halves.win_rate("a", "b").value == pytest.approx(8 / 12, abs=1e-7)
    assert halves.tie_strength == 0


def test_a_model_that_never_lost_is_finite_and_named() -> None:
    result = bradley_terry(played("a", "b", 10, 0, 0) + played("b", "c", 5, 0, 0))
    assert result.unbeaten == (frozenset({"a"}),)
    values = [result.strengths[name].value for name in "abc"]
    assert values == sorted(values, reverse=True)
    # Both gaps: 10 (1 - sigmoid(x)) = 0.1 theta_a and 5 (1 - sigmoid(y)) = -0.1 theta_c at the optimum.
    assert 10 * (1 - expit(values[0] - values[1])) == pytest.approx(0.1 * values[0], abs=1e-6)
    assert 5 * (1 - expit(values[1] - values[2])) == pytest.approx(-0.1 * values[2], abs=1e-6)
    win = result.win_rate("a", "b")
    assert 0.4 < win.ci95.low < 0.8 < win.value < 1


def test_unconnected_models_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"a, b; c, d"):
        bradley_terry(played("a", "b", 3, 0, 2) + played("c", "d", 1, 1, 1))


@example(rows=[("a", "b", 0.0), ("a", "c", 0.5)])  # the robust variance of c is 0, or a hair below
@settings(deadline=None)  # a shared machine may be slow
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
        max_size=25,
    )
)
def test_who_is_named_first_does_not_matter(rows: list[tuple[str, str, float]]) -> None:
    anchor = [("a", "b", 1.0), ("b", "c", 0.5)]
    games = [
        Comparison(a=a, b=b, preference=preference, prompt=str(index % 7))
        for index, (a, b, preference) in enumerate(anchor + rows)
        if a != b
    ]
    turned = [Comparison(a=row.b, b=row.a, preference=1 - row.preference, prompt=row.prompt) for row in games]
    first, second = bradley_terry(games), bradley_terry(turned)
    for name in first.models:
        assert first.strengths[name].value == pytest.approx(second.strengths[name].value, abs=1e-6)
        assert first.strengths[name].ci95.width == pytest.approx(second.strengths[name].ci95.width, rel=1e-5)
    assert sum(estimate.value for estimate in first.strengths.values()) == pytest.approx(0, abs=1e-9)
    assert first.win_rate("a", "c").value == pytest.approx(1 - first.win_rate("c", "a").value, abs=1e-12)


def test_bradley_terry_intervals_of_rankings_cover_and_its_own_alone_would_not() -> None:
    """Five responses ranked per prompt, models better on some prompts than on others: ten pairs, not ten answers."""
    quality = np.array([0.5, 0.2, 0.0, -0.2, -0.5])
    # True gaps by a large sample of the same design.
    rng = np.random.default_rng(4)

    def league(rng: np.random.Generator, prompts: int) -> list[Comparison]:
        utility = quality + rng.normal(size=(prompts, 5)) + rng.gumbel(size=(prompts, 5))
        return [
            Comparison(a="vwxyz"[i], b="vwxyz"[j], preference=float(utility[p, i] > utility[p, j]), prompt=str(p))
            for p in range(prompts)
            for i in range(5)
            for j in range(i + 1, 5)
        ]

    truth = bradley_terry(league(rng, 6000)).strengths["v"].value
    results = [bradley_terry(league(rng, 40)) for _ in range(150)]
    hits = [truth in result.strengths["v"].ci95 for result in results]
    own = [
        abs(truth - result.strengths["v"].value) <= 1.96 * math.sqrt(result.covariances[0][1][0, 0])
        for result in results
    ]
    assert np.mean(own) < 0.9
    assert 0.91 <= np.mean(hits) <= 0.99


# ---------------------------------------------------------------------------------------------- over-optimisation


@pytest.mark.parametrize(
    ("kind", "peak_kl", "peak_gold"),
    # d* = exp(a/b - 1) = e for a = 0.8, b = 0.4: KL e^2, gold 0.4 e. Best of n: d* = a/2b = 1, gold a^2/4b = 0.4.
    [("rl", math.e**2, 0.4 * math.e), ("best-of-n", 1.0, 0.4)],
)
def test_the_curves_return_their_parameters(kind: str, peak_kl: float, peak_gold: float) -> None:
    kl = np.array([0.0, 0.3, 1.0, 2.5, 7.0, 19.0])
    d = np.sqrt(kl)
    gold = d * (0.8 - 0.4 * (np.log(np.where(d > 0, d, 1)) if kind == "rl" else d))
    fit = fit_overoptimization(kl, gold, kind)  # type: ignore[arg-type]
    assert (fit.a, fit.b) == pytest.approx((0.8, 0.4), abs=1e-9)
    assert fit.peak is not None
    assert (fit.peak.kl, fit.peak.gold) == pytest.approx((peak_kl, peak_gold), abs=1e-6)
    assert fit.peak.measured
    assert fit.predict(kl) == pytest.approx(gold, abs=1e-9)
    assert fit.predict([peak_kl])[0] == pytest.approx(peak_gold, abs=1e-6)
    assert fit.rmse == pytest.approx(0, abs=1e-9)


def test_a_peak_beyond_the_data_says_so_and_a_rise_has_none() -> None:
    kl = np.array([0.5, 1.0, 2.0])
    beyond = fit_overoptimization(kl, np.sqrt(kl) * (2 - 0.1 * np.sqrt(kl)), "best-of-n")
    assert beyond.peak is not None
    assert beyond.peak.kl == pytest.approx(100, abs=1e-6)
    assert not beyond.peak.measured
    assert fit_overoptimization(kl, kl, "rl").peak is None
    assert fit_overoptimization(kl, -kl, "best-of-n").peak is None


def test_noise_leaves_a_residual() -> None:
    # Best of n through (1, 1), (1, 3), (4, 4): at d = 1 the mean is 2 = a - b, at d = 2 it is 4 = 2a - 4b.
    fit = fit_overoptimization([1, 1, 4], [1, 3, 4], "best-of-n")
    assert (fit.a, fit.b) == pytest.approx((2, 0), abs=1e-9)
    assert fit.rmse == pytest.approx(math.sqrt(2 / 3), abs=1e-9)


@pytest.mark.parametrize(("n", "kl"), [(1, 0), (4, 0.6363), (8, 1.2044), (64, 3.1745), (128, 3.8598), (512, 5.2403)])
def test_best_of_n_kl(n: int, kl: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-5)


# --------------------------------------------------------------------------------------------------- text measures


def test_text_measures_by_hand() -> None:
    said = [["a", "b", "a", "b", "a"], ["a", "b"], ["c"]]
    # Bigrams: ab, ba, ab, ba; ab. Two distinct of five; counts ab 3, ba 2.
    assert distinct_n(said, 2) == pytest.approx(2 / 5, abs=1e-12)
    assert ngram_entropy(said, 2) == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)), abs=1e-12)
    # The first response says 2 of its 4 again, the second none; the third has no bigram.
    assert repetition_rate(said, 2) == pytest.approx((0.5 + 0) / 2, abs=1e-12)
    assert ngram_entropy([[7, 7]], 1) == 0
    assert distinct_n([["x"]], 2) is None
    assert ngram_entropy([], 1) is None
    assert repetition_rate([["x"]], 2) is None


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(3, 2), "3 successes of 2"),
        (lambda: win_rate([], []), "at least one number"),
        (lambda: win_rate([1.5], ["a"]), r"holds 1\.5; every value must be from 0 to 1"),
        (lambda: win_rate([1, 0], ["a"]), "1 cluster labels for 2 answers"),
        (lambda: accuracy([math.nan]), "holds nan"),
        (lambda: mean_ci([1.0, 2.0], ["a", "a"]), "at least two clusters"),
        (lambda: length_controlled_win_rate([1], [2, 3], [4], ["a"]), "1 preferences, 2 and 1 lengths"),
        (lambda: length_controlled_win_rate([1], [-2], [4], ["a"]), "at least 0"),
        (lambda: mcnemar([1, 0], [1]), "2 and 1 items"),
        (lambda: calibration_curve([1.0], [1], bins=2), "2 bins for 1 comparisons"),
        (lambda: calibration_curve([1.0, 2.0], [1]), "2 score gaps and 1 answers"),
        (lambda: bradley_terry([]), "no comparisons"),
        (lambda: bradley_terry(played("a", "b", 1, 0, 0), ridge=0), "above 0"),
        (lambda: bradley_terry([Comparison(a="a", b="b", preference=0.7, prompt="p")]), "preference 1, 0 or 0.5"),
        (lambda: bradley_terry(played("a", "a", 1, 0, 0)), "between two models"),
        (lambda: bradley_terry(played("a", "b", 1, 1, 0)).win_rate("a", "z"), "no model 'z'"),
        (lambda: fit_overoptimization([-1, 1, 2], [0, 1, 2], "rl"), "at least 0"),
        (lambda: fit_overoptimization([0, 1, 1], [0, 1, 2], "rl"), "two or more different KL"),
        (lambda: fit_overoptimization([1, 2], [1], "rl"), "2 KL values and 1 gold"),
        (lambda: fit_overoptimization([1, 2], [1, 2], "bon"), "must be 'rl' or 'best-of-n'"),  # type: ignore[arg-type]
        (lambda: best_of_n_kl(0), "at least one sample"),
        (lambda: distinct_n([["a"]], 0), "at least 1"),
    ],
)
def test_bad_input_is_refused_in_words(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()
