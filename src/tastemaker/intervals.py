"""Intervals for numbers computed from clustered answers: what every report of ours rests on.

Answers about one prompt are alike, and so are answers of one rater, so whole prompts or whole raters are the unit and
never single answers. Shares get Wilson's interval at their effective sample size; other statistics get a bootstrap of
whole clusters. InstructGPT (arXiv 2203.02155) prints 95 % intervals and does not say how they were made;
`docs/statistics.md` has the coverage that was measured for each choice here.

Arrays end in their dimensions: N answers, C clusters, F features, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit

from tastemaker.errors import DataError

Floats = NDArray[np.float64]
Labels = Sequence[Hashable]

UPPER = 0.975  # the upper quantile of a two-sided 95 % interval
ROUNDING = 1e-20  # a variance of a share below this is rounding error
DRAWS_AT_ONCE = 4_000_000  # bootstrap weights held in memory at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed 95 % interval."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def to_json(self) -> list[float]:
        return [self.low, self.high]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number, how far it can be trusted, and how many answers it was computed from."""

    value: float
    ci95: Interval
    n: int

    def to_json(self) -> dict[str, float | int | list[float]]:
        return {"value": self.value, "ci95": self.ci95.to_json(), "n": self.n}


def wilson(successes: float, n: float) -> Estimate:
    """A share of `n` independent answers with Wilson's interval. Answers that come in clusters need `accuracy`."""
    if not 0 <= successes <= n or n <= 0:
        raise DataError(f"{successes} successes of {n}: there must be an answer, and at most as many successes.")
    interval = _wilson_interval(successes / n, n, float(ndtri(UPPER)))
    return Estimate(value=successes / n, ci95=interval, n=round(n))


def clustered_share(part_N: Floats, whole_N: Floats, *clusterings: Labels | None) -> Estimate:
    """sum(part) / sum(whole), where 0 <= part <= whole, with the widest interval over the clusterings given.

    The interval is Wilson's at the effective sample size p(1-p)/V, with V the variance between clusters and Student's
    quantile for their number: it stays in [0, 1] and keeps its coverage with few clusters and near 0 and 1, where a
    bootstrap falls short.
    """
    total = float(whole_N.sum())
    if total <= 0:
        raise DataError("There is nothing to take a share of; at least one answer is needed.")
    share = float(np.clip(part_N.sum() / total, 0, 1))  # sums of floats may end a hair outside
    residual_N = part_N - share * whole_N
    given = [clusters for clusters in clusterings if clusters is not None]
    intervals = [
        _share_interval(share, cluster_sums(residual_N[:, None], clusters)[:, 0] / total) for clusters in given
    ]
    # A single cluster tells nothing of the variance between clusters: it counts only where nothing else is known.
    usable = [interval for interval, clusters in zip(intervals, given, strict=True) if len(set(clusters)) > 1]
    return Estimate(value=share, ci95=widest(usable or intervals[:1]), n=round(total))


def mean_ci(values: ArrayLike, clusters: Labels, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """The mean of any numbers (scores, lengths, losses) with a cluster-bootstrap interval. Shares need `accuracy`."""
    value_N = checked_numbers("values", values)
    sum_CF = cluster_sums(np.stack([value_N, np.ones_like(value_N)], axis=1), clusters)
    if len(sum_CF) < 2:
        raise DataError("An interval of a mean needs at least two clusters (prompts, raters); one was given.")
    interval = bootstrap_interval(sum_CF, lambda sum_RF: sum_RF[:, 0] / sum_RF[:, 1], seed=seed, resamples=resamples)
    return Estimate(value=float(value_N.mean()), ci95=interval, n=len(value_N))


def bootstrap_interval(
    sum_CF: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    seed: int = 0,
    resamples: int = 2000,
    bounds: Interval | None = None,
) -> Interval:
    """The interval of a statistic of sums, by resampling whole clusters: BCa, widened for few clusters.

    `statistic` maps sums `[R, F]` to values `[R]`; NaN where a resample leaves it undefined, which then counts as the
    worst value of `bounds` at either end. BCa (Efron 1987) corrects bias and skewness; Hesterberg's expanded quantiles
    (arXiv 1411.5279, section 5.3) correct the narrowness of every bootstrap of few clusters.
    """
    count = len(sum_CF)
    total_F = sum_CF.sum(axis=0)
    value = float(statistic(total_F[None])[0])
    value_R = statistic(_resampled_sums(sum_CF, seed=seed, resamples=resamples))
    defined_R = value_R[np.isfinite(value_R)]

    tolerance = 1e-12 * (1 + abs(value))  # a resample equal to the whole but for rounding is a tie with it
    below = np.mean(defined_R < value - tolerance) + 0.5 * np.mean(np.abs(defined_R - value) <= tolerance)
    bias = float(ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples)))
    leave_one_out_C = statistic(total_F - sum_CF)
    leave_one_out_C = leave_one_out_C[np.isfinite(leave_one_out_C)]
    deviation_C = leave_one_out_C.mean() - leave_one_out_C if len(leave_one_out_C) else np.zeros(1)
    spread = float(np.sum(deviation_C**2))
    skewness = float(np.sum(deviation_C**3)) / (6 * spread**1.5) if spread > ROUNDING else 0.0

    reach = student_quantile(count) * math.sqrt(count / (count - 1))
    shifted = bias + np.array([-reach, reach])
    quantile = ndtr(bias + shifted / (1 - skewness * shifted))
    worst = bounds or Interval(float(defined_R.min()), float(defined_R.max()))
    low = np.quantile(np.where(np.isfinite(value_R), value_R, worst.low), quantile[0])
    high = np.quantile(np.where(np.isfinite(value_R), value_R, worst.high), quantile[1])
    return Interval(float(low), float(high))


def checked_numbers(name: str, values: ArrayLike, *, low: float = -math.inf, high: float = math.inf) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"{name} has shape {array.shape}; it must be a list of at least one number.")
    if not np.all(np.isfinite(array) & (array >= low) & (array <= high)):
        wrong = array[~(np.isfinite(array) & (array >= low) & (array <= high))][0]
        allowed = "finite" if math.isinf(low) else f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise DataError(f"{name} holds {wrong}; every value must be {allowed}.")
    return array


def cluster_sums(feature_NF: Floats, clusters: Labels) -> Floats:
    if len(clusters) != len(feature_NF):
        raise DataError(f"{len(clusters)} cluster labels for {len(feature_NF)} answers: give one label for each.")
    code: dict[Hashable, int] = {}
    cluster_N = np.array([code.setdefault(label, len(code)) for label in clusters])
    return np.stack([np.bincount(cluster_N, weights=column, minlength=len(code)) for column in feature_NF.T], axis=1)


def _resampled_sums(sum_CF: Floats, *, seed: int, resamples: int) -> Floats:
    """Sums over clusters drawn with replacement: how often each was drawn, times its sums. No row is copied."""
    count, rng = len(sum_CF), np.random.default_rng(seed)
    sums = []
    for start in range(0, resamples, max(1, DRAWS_AT_ONCE // count)):
        rows = min(resamples - start, max(1, DRAWS_AT_ONCE // count))
        draw_RC = rng.integers(0, count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times_RC = np.bincount(draw_RC.ravel(), minlength=rows * count).reshape(rows, count)
        sums.append(times_RC.astype(np.float64) @ sum_CF)
    return np.concatenate(sums)


def _share_interval(share: float, residual_C: Floats) -> Interval:
    """`residual_C`: each cluster's part minus what the share would give it, over the whole total."""
    count = len(residual_C)
    variance = count / (count - 1) * float(np.sum(residual_C**2)) if count > 1 else 0.0
    # Without variation (all won, all tied) every cluster said the same and counts as one answer.
    effective_n = share * (1 - share) / variance if variance > ROUNDING else float(count)
    return _wilson_interval(share, effective_n, student_quantile(count))


def _wilson_interval(share: float, n: float, quantile: float) -> Interval:
    square = quantile**2 / n
    centre = (share + square / 2) / (1 + square)
    reach = quantile / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def student_quantile(clusters: int) -> float:
    """Student's quantile for the mean of this many clusters; the normal one where a single cluster leaves none."""
    return float(stdtrit(clusters - 1, UPPER)) if clusters > 1 else float(ndtri(UPPER))


def widest(intervals: Sequence[Interval]) -> Interval:
    return max(intervals, key=lambda interval: interval.width)
