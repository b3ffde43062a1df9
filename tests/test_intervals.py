"""Intervals: Wilson's and the cluster bootstrap against hand-derived values, scipy and statsmodels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from tastemaker.intervals import Estimate, Interval, bootstrap_interval, cluster_sums, mean_ci, wilson

Floats = NDArray[np.float64]


def bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def covered(estimate_of: Callable[[np.random.Generator], Estimate], truth: float, repeats: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    return float(np.mean([truth in estimate_of(rng).ci95 for _ in range(repeats)]))


def test_an_estimate_is_written_as_the_results_file_has_it() -> None:
    estimate = Estimate(value=0.6, ci95=Interval(0.5, 0.7), n=10)
    assert json.loads(json.dumps(estimate.to_json())) == {"value": 0.6, "ci95": [0.5, 0.7], "n": 10}
    assert 0.5 in estimate.ci95
    assert 0.71 not in estimate.ci95
    assert estimate.ci95.width == pytest.approx(0.2)


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (61, 113)])
def test_wilson_is_statsmodels_wilson(successes: int, n: int) -> None:
    assert bounds(wilson(successes, n).ci95) == pytest.approx(
        proportion_confint(successes, n, method="wilson"), abs=1e-12
    )


def test_wilson_by_hand() -> None:
    # 2 of 5, z = 1.959964, z^2 = 3.841459: centre (0.4 + 0.3841459) / 1.7682918 = 0.4434482;
    # reach 1.959964 / 1.7682918 * sqrt(0.24/5 + 3.841459/100) = 1.1083939 * 0.2939634 = 0.3258272.
    assert bounds(wilson(2, 5).ci95) == pytest.approx([0.1176210, 0.7692754], abs=2e-6)


def test_mean_ci_by_hand_for_two_clusters() -> None:
    # Two clusters (sums 3 of 2 answers, 12 of 1) give resamples 1.5, 5 and 12 with chances 1/4, 1/2, 1/4; with t_1 the
    # expanded quantiles reach beyond both ends.
    estimate = mean_ci([1, 2, 12], ["a", "a", "b"])
    assert estimate.value == pytest.approx(5, abs=1e-12)
    assert bounds(estimate.ci95) == pytest.approx([1.5, 12], abs=1e-12)
    assert estimate.n == 3


def test_mean_ci_agrees_with_student_for_many_even_clusters() -> None:
    rng = np.random.default_rng(3)
    effect = rng.normal(size=400)
    value_N = np.repeat(effect, 3) + rng.normal(size=1200)
    estimate = mean_ci(value_N, np.repeat(np.arange(400), 3).tolist(), resamples=20_000)
    mean_C = value_N.reshape(400, 3).mean(axis=1)
    reach = student.ppf(0.975, 399) * mean_C.std(ddof=1) / math.sqrt(400)
    assert bounds(estimate.ci95) == pytest.approx([mean_C.mean() - reach, mean_C.mean() + reach], abs=0.04 * reach)


def test_skewed_means_get_the_bca_interval() -> None:
    values = np.random.default_rng(8).gamma(0.2, size=150)
    interval = mean_ci(values, list(range(150)), resamples=20_000).ci95
    options = {"n_resamples": 20_000, "rng": np.random.default_rng(1)}
    oracle = scipy_bootstrap((values,), np.mean, method="BCa", **options).confidence_interval
    percentile = scipy_bootstrap((values,), np.mean, method="percentile", **options).confidence_interval
    # Ours is a hair wider (Student's quantile for 150 clusters); the percentile interval lies clearly lower.
    assert bounds(interval) == pytest.approx([oracle.low, oracle.high], abs=0.03 * interval.width)
    assert interval.high - percentile.high > 0.06 * interval.width


def test_mean_ci_repeats_itself_and_depends_on_its_seed_alone() -> None:
    values, clusters = [1.0, 4.0, 2.0, 8.0, 5.0], ["a", "b", "c", "d", "e"]
    assert mean_ci(values, clusters, seed=1) == mean_ci(values, clusters, seed=1)
    assert mean_ci(values, clusters, seed=1, resamples=50) != mean_ci(values, clusters, seed=2, resamples=50)


def test_bootstrap_in_pieces_is_a_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_CF = np.random.default_rng(0).normal(size=(11, 1))
    whole = bootstrap_interval(sum_CF, lambda sum_RF: sum_RF[:, 0], resamples=5000)
    monkeypatch.setattr("tastemaker.intervals.DRAWS_AT_ONCE", 70)
    pieces = bootstrap_interval(sum_CF, lambda sum_RF: sum_RF[:, 0], resamples=5000)
    assert bounds(pieces) == pytest.approx(bounds(whole), abs=1e-12)  # the same draws, in the same order


def test_mean_ci_covers_the_mean_of_skewed_values_from_few_prompts() -> None:
    clusters = np.repeat(np.arange(20), 3).tolist()

    def draw(rng: np.random.Generator) -> Estimate:
        return mean_ci(np.repeat(rng.gamma(2.0, size=20), 3) + rng.gamma(2.0, size=60), clusters, resamples=1000)

    assert 0.92 <= covered(draw, 4.0, 400) <= 0.985


def test_an_undefined_resample_counts_as_the_worst() -> None:
    def share_of_first(sum_RF: Floats) -> Floats:
        defined = sum_RF[:, 1] > 0
        return np.where(defined, sum_RF[:, 0] / np.where(defined, sum_RF[:, 1], 1), np.nan)

    # One cluster in five has any say, so a third of the resamples (0.8^5) have none.
    sum_CF = np.array([[3.0, 4.0], [0, 0], [0, 0], [0, 0], [0, 0]])
    interval = bootstrap_interval(sum_CF, share_of_first, bounds=Interval(0, 1))
    assert bounds(interval) == [0, 1]


def test_cluster_sums_by_hand() -> None:
    feature_NF = np.array([[1.0, -1], [2, -2], [3, -3], [5, -5], [7, -7]])
    assert cluster_sums(feature_NF, ["q", "p", "q", None, "p"]).tolist() == [[4, -4], [9, -9], [5, -5]]
