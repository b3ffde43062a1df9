"""Numbers with intervals: win rates, accuracies, calibration, Bradley-Terry strengths, over-optimisation curves.

InstructGPT (arXiv 2203.02155) reports win rates with 95 % intervals (sections 3.6 and 4.1) and does not say how they
were made. Here an interval always asks "would other prompts, and other raters, say the same?": answers about one prompt
are alike, so whole prompts are the unit, never single answers. The length control is Stiennon et al. 2020 (appendix F),
the over-optimisation curves are Gao et al. 2022 (arXiv 2210.10760), ties in Bradley-Terry are Davidson 1970.
`docs/statistics.md` gives the reasons for each choice and the coverage that was measured.

Arrays end in their dimensions: N answers, C clusters, F features, R resamples, M models, E pairs of models, K outcomes,
P parameters. A preference is 1 where the first response (or model) won, 0 where it lost, 0.5 for a tie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import bdtr, expit, ndtri

from tastemaker.errors import DataError
from tastemaker.intervals import (
    UPPER,
    Estimate,
    Floats,
    Interval,
    Labels,
    checked_numbers,
    cluster_sums,
    clustered_share,
    mean_ci,
    student_quantile,
    widest,
    wilson,
)

__all__ = [
    "BradleyTerry",
    "Calibration",
    "CalibrationBin",
    "Comparison",
    "Estimate",
    "Interval",
    "McNemar",
    "Overoptimization",
    "Peak",
    "accuracy",
    "best_of_n_kl",
    "bradley_terry",
    "calibration_curve",
    "distinct_n",
    "fit_overoptimization",
    "length_controlled_win_rate",
    "mcnemar",
    "mean_ci",
    "ngram_entropy",
    "repetition_rate",
    "wilson",
    "win_rate",
]

Ints = NDArray[np.int64]
Token = Hashable
Objective = Callable[[Floats], tuple[float, Floats, Floats]]  # value, gradient, Hessian


# ------------------------------------------------------------------------------------------ win rates and accuracy


def win_rate(preference_N: ArrayLike, prompt_cluster_N: Labels, rater_cluster_N: Labels | None = None) -> Estimate:
    """How often the first response is preferred, ties counting half.

    With raters given, the interval is the wider of the one over prompts and the one over raters, so that it also says
    what other raters of the same kind would find; without them it speaks of those raters alone.
    """
    preference = checked_numbers("preference_N", preference_N, low=0, high=1)
    return clustered_share(preference, np.ones_like(preference), prompt_cluster_N, rater_cluster_N)


def accuracy(correct_N: ArrayLike, cluster_N: Labels | None = None) -> Estimate:
    """The share of correct answers (half for a tie). Without clusters every answer is its own."""
    correct = checked_numbers("correct_N", correct_N, low=0, high=1)
    return clustered_share(correct, np.ones_like(correct), range(len(correct)) if cluster_N is None else cluster_N)


def paired_share_difference(a_N: ArrayLike, b_N: ArrayLike) -> Estimate:
    """By how much more often the first of two is true than the second, each pair an answer about a prompt of its own.

    The interval is Agresti and Min's (Statistics in Medicine 2005): Wald's, after half an answer is added to each of
    the four outcomes. A bootstrap would give no width at all where every pair differs alike.
    """
    a, b = (checked_numbers(name, values, low=0, high=1) for name, values in (("a_N", a_N), ("b_N", b_N)))
    if len(a) != len(b) or not len(a):
        raise DataError(f"{len(a)} and {len(b)} answers: give one of each about every prompt, and at least one.")
    n = len(a) + 2
    only_a, only_b = ((float(np.sum(np.clip(difference, 0, 1))) + 0.5) / n for difference in (a - b, b - a))
    centre = only_a - only_b
    reach = float(ndtri(UPPER)) * math.sqrt((only_a + only_b - centre**2) / n)
    interval = Interval(max(-1.0, centre - reach), min(1.0, centre + reach))
    return Estimate(value=float(np.mean(a - b)), ci95=interval, n=len(a))


def length_controlled_win_rate(
    preference_N: ArrayLike,
    length_a_N: ArrayLike,
    length_b_N: ArrayLike,
    clusters: Labels,
    rater_cluster_N: Labels | None = None,
) -> Estimate:
    """The win rate that the first model would have if the two responses were equally long.

    Logistic regression of the preference on an intercept and log(length a / length b); the rate is the sigmoid of the
    intercept. Lengths are in any unit that is the same for both; an empty response counts as one. One invented
    cluster of average size, half won and half lost at a typical length ratio of either sign, keeps the fit finite
    where one model wins always or the longer one does; it enters the cluster-robust variance too, so that such an
    interval is wide and not a point.
    """
    preference = checked_numbers("preference_N", preference_N, low=0, high=1)
    length_a = checked_numbers("length_a_N", length_a_N, low=0)
    length_b = checked_numbers("length_b_N", length_b_N, low=0)
    if not len(preference) == len(length_a) == len(length_b):
        raise DataError(f"{len(preference)} preferences, {len(length_a)} and {len(length_b)} lengths: give one each.")
    log_ratio_N = np.log(np.maximum(length_a, 1) / np.maximum(length_b, 1))
    typical = math.sqrt(float(np.mean(log_ratio_N**2)))
    invented_log_ratio = np.array([typical, typical, -typical, -typical])
    x_NP = np.stack([np.ones(len(preference) + 4), np.concatenate([log_ratio_N, invented_log_ratio])], axis=1)
    if typical == 0:  # all pairs are equally long: there is no slope to learn
        x_NP = x_NP[:, :1]
    y_N = np.concatenate([preference, [0, 1, 0, 1]])
    cluster_size = len(preference) / len(set(clusters))
    weight_N = np.concatenate([np.ones(len(preference)), np.full(4, cluster_size / 4)])
    beta_P, hessian_PP = _newton(_logistic_objective(x_NP, y_N, weight_N), x_NP.shape[1])
    bread_PP = np.linalg.inv(hessian_PP)
    score_NP = x_NP * (y_N - expit(x_NP @ beta_P))[:, None]
    invented_PP = cluster_size**2 / 4 * score_NP[-4:].T @ score_NP[-4:]
    intervals = []
    for labels in _usable_clusterings(clusters, rater_cluster_N):
        variance = (bread_PP @ (_meat(score_NP[:-4], labels) + invented_PP) @ bread_PP)[0, 0]
        reach = student_quantile(len(set(labels))) * math.sqrt(variance)
        intervals.append(Interval(float(expit(beta_P[0] - reach)), float(expit(beta_P[0] + reach))))
    return Estimate(value=float(expit(beta_P[0])), ci95=widest(intervals), n=len(preference))


def _logistic_objective(x_NP: Floats, y_N: Floats, weight_N: Floats) -> Objective:
    def objective(beta_P: Floats) -> tuple[float, Floats, Floats]:
        logit_N = x_NP @ beta_P
        p_N = expit(logit_N)
        loss = float(weight_N @ (np.logaddexp(0, logit_N) - y_N * logit_N))
        hessian_PP = (x_NP * (weight_N * p_N * (1 - p_N))[:, None]).T @ x_NP
        return loss, x_NP.T @ (weight_N * (p_N - y_N)), hessian_PP

    return objective


# ------------------------------------------------------------------------------------- two models, one reward model


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Two judges of the same items: how many each alone got right, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a_correct: ArrayLike, b_correct: ArrayLike) -> McNemar:
    """McNemar's exact test that two reward models are equally accurate on the same comparisons.

    It takes the comparisons as independent; with several per prompt, prefer `mean_ci` of the differences by prompt.
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"The two judges answered {a.size} and {b.size} items; they must have judged the same ones.")
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    tail = float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)) if only_a + only_b else 1.0
    return McNemar(only_a=only_a, only_b=only_b, p_value=min(1.0, 2 * tail))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Comparisons about which the reward model was about equally sure."""

    predicted: float
    observed: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A reward model's claims against what raters said.

    `expected_error` is the mean gap between predicted and observed; `chance_error` is the one that a perfectly
    calibrated model would show with bins this small, so only an excess over it means anything.
    """

    bins: tuple[CalibrationBin, ...]
    expected_error: float
    chance_error: float


def calibration_curve(
    score_gap_N: ArrayLike, agreed_N: ArrayLike, bins: int = 10, cluster_N: Labels | None = None
) -> Calibration:
    """How often raters agree with the reward model, against the sigmoid(|gap|) at which it says they do (Eq. 1).

    `agreed_N` is 1 where the rater preferred the response with the higher score, 0.5 for a tie. The sign of a gap is
    not used, so it does not matter which response stood first. Bins hold equally many comparisons.
    """
    gap, agreed = checked_numbers("score_gap_N", score_gap_N), checked_numbers("agreed_N", agreed_N, low=0, high=1)
    if len(gap) != len(agreed):
        raise DataError(f"{len(gap)} score gaps and {len(agreed)} answers: give one answer for each gap.")
    if not 1 <= bins <= len(gap):
        raise DataError(f"{bins} bins for {len(gap)} comparisons: give from 1 to as many bins as comparisons.")
    predicted_N = expit(np.abs(gap))
    clusters = list(range(len(gap)) if cluster_N is None else cluster_N)
    made, chance = [], 0.0
    for index in np.array_split(np.argsort(predicted_N, kind="stable"), bins):
        observed = accuracy(agreed[index], [clusters[position] for position in index])
        predicted = float(predicted_N[index].mean())
        made.append(CalibrationBin(predicted=predicted, observed=observed))
        variance = float(np.sum(predicted_N[index] * (1 - predicted_N[index])))
        chance += math.sqrt(2 / math.pi * variance) / len(gap)  # the mean of |x| for normal x is sqrt(2/pi) sd
    error = sum(abs(part.predicted - part.observed.value) * part.observed.n for part in made) / len(gap)
    return Calibration(bins=tuple(made), expected_error=error, chance_error=chance)


# ------------------------------------------------------------------------------------------------- Bradley-Terry


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One rater's preference between two models' responses to one prompt: 1 where `a` won, 0.5 for a tie."""

    a: str
    b: str
    preference: float
    prompt: str
    rater: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BradleyTerry:
    """Strengths on the log-odds scale, with mean zero.

    `tie_strength` is Davidson's: equal models tie with probability tie_strength / (2 + tie_strength). `unbeaten` names
    the groups of models in which no outsider ever beat or tied a member: how far they lie ahead is bounded by the
    ridge alone.
    """

    models: tuple[str, ...]
    strengths: Mapping[str, Estimate]
    tie_strength: float
    unbeaten: tuple[frozenset[str], ...]
    covariances: tuple[tuple[float, Floats], ...]  # a quantile and the strengths' covariance, one a clustering

    def win_rate(self, a: str, b: str) -> Estimate:
        """How often `a` is preferred to `b` by the fitted model, ties counting half, whether or not they ever met."""
        for name in (a, b):
            if name not in self.strengths:
                raise DataError(f"There is no model {name!r}; the models compared are {', '.join(self.models)}.")
        contrast_M = np.array([float(name == a) - float(name == b) for name in self.models])
        gap = self.strengths[a].value - self.strengths[b].value
        reach = _reach(contrast_M, self.covariances)
        low, middle, high = (self._preferred(value) for value in (gap - reach, gap, gap + reach))
        n = min(self.strengths[a].n, self.strengths[b].n)
        return Estimate(value=middle, ci95=Interval(low, high), n=n)

    def elo(self, model: str) -> float:
        """The strength on the scale of chess: 1000 is average, 400 points are odds of ten to one."""
        return 1000 + 400 / math.log(10) * self.strengths[model].value

    def _preferred(self, gap: float) -> float:
        win, loss = float(expit(gap)), float(expit(-gap))
        tie = self.tie_strength * math.sqrt(win * loss)
        return (win + tie / 2) / (1 + tie)


def bradley_terry(
    comparisons: Sequence[Comparison], *, ties: Literal["davidson", "half"] = "davidson", ridge: float = 0.1
) -> BradleyTerry:
    """Strengths of models from comparisons of any pairs, with ties, by penalised maximum likelihood.

    P(a beats b) : P(tie) : P(b beats a) = e^(s/2) : tie_strength : e^(-s/2) with s the difference of strengths. The
    penalty ridge/2 times the squared strengths (and log tie_strength) keeps a model that never lost finite. Models
    that no chain of comparisons connects are refused: nothing says which is better. Each interval is the widest of the
    likelihood's own, which bounds an unbeaten model, the one clustered by prompt and the one clustered by rater.
    """
    if ridge <= 0:
        raise DataError(f"ridge is {ridge}; it must be above 0, or a model that never lost has no finite strength.")
    models, index_N2, preference_N = _indexed(comparisons)
    unbeaten = _check_connected(models, index_N2, preference_N)
    with_ties = ties == "davidson" and bool(np.any(preference_N == 0.5))
    contrast_EM, pair_N = _pair_contrasts(index_N2, len(models))
    outcome_NK, design_EKP = _outcomes(preference_N, contrast_EM, with_ties=with_ties)
    count_EK = np.zeros(design_EKP.shape[:2])
    np.add.at(count_EK, pair_N, outcome_NK)
    beta_P, hessian_PP = _newton(_choice_objective(design_EKP, count_EK, ridge), design_EKP.shape[2])

    surprise_NK = outcome_NK - _choice_shares(design_EKP, beta_P)[pair_N]
    score_NP: Floats = np.einsum("nk,nkp->np", surprise_NK, design_EKP[pair_N])
    bread_PP = np.asarray(np.linalg.inv(hessian_PP), dtype=np.float64)
    covariances = _covariances(comparisons, score_NP, bread_PP, len(models))
    played = Counter(name for row in comparisons for name in (row.a, row.b))
    strengths = {}
    for position, name in enumerate(models):
        reach = _reach(np.eye(len(models))[position], covariances)
        value = float(beta_P[position])
        strengths[name] = Estimate(value=value, ci95=Interval(value - reach, value + reach), n=played[name])
    return BradleyTerry(
        models=models,
        strengths=strengths,
        tie_strength=math.exp(beta_P[-1]) if with_ties else 0.0,
        unbeaten=unbeaten,
        covariances=covariances,
    )


def _outcomes(preference_N: Floats, contrast_EM: Floats, *, with_ties: bool) -> tuple[Floats, Floats]:
    """What happened, one column an outcome (win, loss, tie), and each outcome's logit as a row of coefficients.

    Without a column for ties, a tie is half a win and half a loss.
    """
    design_EKP = np.stack([contrast_EM / 2, -contrast_EM / 2], axis=1)
    if not with_ties:
        return np.stack([preference_N, 1 - preference_N], axis=1), design_EKP
    outcome_NK = np.stack([preference_N == 1, preference_N == 0, preference_N == 0.5], axis=1).astype(np.float64)
    pairs, _, models = design_EKP.shape
    with_tie_EKP = np.zeros((pairs, 3, models + 1))
    with_tie_EKP[:, :2, :models] = design_EKP
    with_tie_EKP[:, 2, models] = 1
    return outcome_NK, with_tie_EKP


def _choice_shares(design_EKP: Floats, beta_P: Floats) -> Floats:
    logit_EK = design_EKP @ beta_P
    shares_EK: Floats = np.exp(logit_EK - np.logaddexp.reduce(logit_EK, axis=1, keepdims=True))
    return shares_EK


def _choice_objective(design_EKP: Floats, count_EK: Floats, ridge: float) -> Objective:
    n_E1 = count_EK.sum(axis=1, keepdims=True)

    def objective(beta_P: Floats) -> tuple[float, Floats, Floats]:
        logit_EK = design_EKP @ beta_P
        total_E1 = np.logaddexp.reduce(logit_EK, axis=1, keepdims=True)
        loss = float(np.sum(count_EK * (total_E1 - logit_EK))) + ridge / 2 * float(beta_P @ beta_P)
        p_EK = np.exp(logit_EK - total_E1)
        gradient_P = np.einsum("ek,ekp->p", n_E1 * p_EK - count_EK, design_EKP) + ridge * beta_P
        centred_EKP = design_EKP - np.einsum("ek,ekp->ep", p_EK, design_EKP)[:, None]
        hessian_PP = np.einsum("ek,ekp,ekq->pq", n_E1 * p_EK, centred_EKP, centred_EKP, optimize=True)
        return loss, gradient_P, hessian_PP + ridge * np.eye(len(beta_P))

    return objective


def _reach(contrast_M: Floats, covariances: Sequence[tuple[float, Floats]]) -> float:
    """Half the width of the widest interval for a sum of strengths; rounding may leave a variance just below 0."""
    return max(q * math.sqrt(max(float(contrast_M @ cov_MM @ contrast_M), 0.0)) for q, cov_MM in covariances)


def _indexed(comparisons: Sequence[Comparison]) -> tuple[tuple[str, ...], Ints, Floats]:
    if not comparisons:
        raise DataError("There are no comparisons; strengths need at least one between two models.")
    for row in comparisons:
        if row.preference not in (0, 0.5, 1) or row.a == row.b:
            raise DataError(f"{row}: a comparison is between two models, with preference 1, 0 or 0.5 (a tie).")
    models = tuple(sorted({name for row in comparisons for name in (row.a, row.b)}))
    position = {name: index for index, name in enumerate(models)}
    pair_N2 = np.array([[position[row.a], position[row.b]] for row in comparisons])
    return models, pair_N2, np.array([row.preference for row in comparisons], dtype=np.float64)


def _check_connected(models: tuple[str, ...], index_N2: Ints, preference_N: Floats) -> tuple[frozenset[str], ...]:
    """Refuse models that cannot be compared; return the groups that no outsider ever beat or tied, if any."""
    held = np.concatenate([index_N2[preference_N > 0], index_N2[preference_N < 1][:, ::-1]])  # the first held its own
    graph = coo_array((np.ones(len(held)), (held[:, 0], held[:, 1])), shape=(len(models), len(models)))
    groups, group_M = connected_components(graph, directed=True, connection="weak")
    if groups > 1:
        names = "; ".join(", ".join(np.array(models)[group_M == group]) for group in range(groups))
        raise DataError(f"No chain of comparisons connects these groups of models: {names}. Compare across them.")
    groups, group_M = connected_components(graph, directed=True, connection="strong")
    challenged = {int(group_M[loser]) for winner, loser in held if group_M[winner] != group_M[loser]}
    unbeaten = [group for group in range(groups) if groups > 1 and group not in challenged]
    return tuple(frozenset(np.array(models)[group_M == group].tolist()) for group in unbeaten)


def _pair_contrasts(index_N2: Ints, models: int) -> tuple[Floats, Ints]:
    """The distinct ordered pairs as rows of +1 and -1, and which of them each comparison is."""
    pair_E2, pair_N = np.unique(index_N2, axis=0, return_inverse=True)
    contrast_EM = np.zeros((len(pair_E2), models))
    contrast_EM[np.arange(len(pair_E2)), pair_E2[:, 0]] = 1
    contrast_EM[np.arange(len(pair_E2)), pair_E2[:, 1]] = -1
    return contrast_EM, pair_N.reshape(-1)


def _covariances(
    comparisons: Sequence[Comparison], score_NP: Floats, bread_PP: Floats, models: int
) -> tuple[tuple[float, Floats], ...]:
    """The likelihood's covariance of the strengths and the cluster-robust ones, each with its quantile."""
    prompts = [row.prompt for row in comparisons]
    raters = None if any(row.rater is None for row in comparisons) else [row.rater for row in comparisons]
    covariances = [(float(ndtri(UPPER)), bread_PP)]
    for labels in _usable_clusterings(prompts, raters):
        covariances.append((student_quantile(len(set(labels))), bread_PP @ _meat(score_NP, labels) @ bread_PP))
    # Strengths are relative to their mean, of which only the ridge speaks: take its part out.
    centre_MM = np.eye(models) - 1 / models
    return tuple((quantile, centre_MM @ cov_PP[:models, :models] @ centre_MM) for quantile, cov_PP in covariances)


# ---------------------------------------------------------------------------------------------- over-optimisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Where the gold score is highest. `measured` is False where that lies beyond the KL that was measured."""

    kl: float
    gold: float
    measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Overoptimization:
    """A fitted curve of the gold score against KL. `peak` is None where the gold score only rises (or never does)."""

    kind: Literal["rl", "best-of-n"]
    a: float
    b: float
    peak: Peak | None
    rmse: float
    n: int

    def predict(self, kl: ArrayLike) -> Floats:
        """The gold score at these KL, relative to the initial policy's."""
        first_N, second_N = _curve_features(np.sqrt(np.asarray(kl, dtype=np.float64)), self.kind)
        return self.a * first_N - self.b * second_N


def fit_overoptimization(kl: ArrayLike, gold: ArrayLike, kind: Literal["rl", "best-of-n"]) -> Overoptimization:
    """Gao et al.'s curves, d = sqrt(KL): gold = d (a - b log d) for RL, d (a - b d) for best of n; least squares.

    `gold` is the gain in gold score over the initial policy, which stands at KL 0 and gold 0. Points of one run are
    not independent, so the fit has no interval: repeat the run with other seeds to get one.
    """
    if kind not in ("rl", "best-of-n"):
        raise DataError(f"kind is {kind!r}; it must be 'rl' or 'best-of-n'.")
    kl_N, gold_N = checked_numbers("kl", kl, low=0), checked_numbers("gold", gold)
    if len(kl_N) != len(gold_N):
        raise DataError(f"{len(kl_N)} KL values and {len(gold_N)} gold scores: give one score for each.")
    if len(np.unique(kl_N[kl_N > 0])) < 2:
        raise DataError("A curve with two parameters needs gold scores at two or more different KL above 0.")
    distance_N = np.sqrt(kl_N)
    first_N, second_N = _curve_features(distance_N, kind)
    (a, b), *_ = np.linalg.lstsq(np.stack([first_N, -second_N], axis=1), gold_N, rcond=None)
    rmse = math.sqrt(float(np.mean((a * first_N - b * second_N - gold_N) ** 2)))
    peak = _peak(float(a), float(b), kind, furthest=float(kl_N.max()))
    return Overoptimization(kind=kind, a=float(a), b=float(b), peak=peak, rmse=rmse, n=len(kl_N))


def best_of_n_kl(n: int) -> float:
    """The KL from the policy to the best of `n` of its samples: log n - (n-1)/n."""
    if n < 1:
        raise DataError(f"Best of {n}: at least one sample is needed.")
    return math.log(n) - (n - 1) / n


def _curve_features(distance_N: Floats, kind: str) -> tuple[Floats, Floats]:
    if kind == "best-of-n":
        return distance_N, distance_N**2
    return distance_N, distance_N * np.log(np.where(distance_N > 0, distance_N, 1))  # d log d tends to 0 at 0


def _peak(a: float, b: float, kind: str, *, furthest: float) -> Peak | None:
    if b <= 0 or (kind == "best-of-n" and a <= 0):
        return None
    distance = a / (2 * b) if kind == "best-of-n" else math.exp(min(a / b - 1, 300))  # 300: far beyond any KL
    gold = a * a / (4 * b) if kind == "best-of-n" else b * distance
    return Peak(kl=distance**2, gold=gold, measured=distance**2 <= furthest)


# --------------------------------------------------------------------------------------------------- text measures


def distinct_n(responses: Sequence[Sequence[Token]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of a sample (Li et al. 2016); None where no response is n tokens long.

    It falls as text grows longer: compare only samples with about as many tokens.
    """
    grams = Counter(gram for response in responses for gram in _ngrams(response, n))
    return len(grams) / grams.total() if grams else None


def ngram_entropy(responses: Sequence[Sequence[Token]], n: int) -> float | None:
    """Entropy in nats of the n-grams of a sample: low where the policy says the same to every prompt."""
    grams = Counter(gram for response in responses for gram in _ngrams(response, n))
    share_G = np.array(list(grams.values()), dtype=np.float64) / max(grams.total(), 1)
    return float(-(share_G @ np.log(share_G))) + 0.0 if grams else None  # + 0.0: no negative zero


def repetition_rate(responses: Sequence[Sequence[Token]], n: int) -> float | None:
    """The mean share of a response's n-grams that it has said before: high where a policy loops."""
    rates = [1 - len(set(grams)) / len(grams) for response in responses if (grams := _ngrams(response, n))]
    return sum(rates) / len(rates) if rates else None


def _ngrams(tokens: Sequence[Token], n: int) -> list[tuple[Token, ...]]:
    if n < 1:
        raise DataError(f"n-grams of {n} tokens: n must be at least 1.")
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


# ------------------------------------------------------------------------------------------------ shared machinery


def _usable_clusterings(prompts: Labels, raters: Labels | None) -> list[Labels]:
    """The clusterings to take the wider interval of: a single rater says nothing about other raters."""
    return [prompts] if raters is None or len(set(raters)) < 2 else [prompts, raters]


def _meat(score_NP: Floats, clusters: Labels) -> Floats:
    """The middle of the cluster-robust variance: outer products of the clusters' scores."""
    score_CP = cluster_sums(score_NP, clusters)
    count = len(score_CP)
    return score_CP.T @ score_CP * (count / (count - 1) if count > 1 else 1)


def _newton(objective: Objective, size: int) -> tuple[Floats, Floats]:
    """Minimise a strictly convex function given as value, gradient and Hessian; steps are halved until it falls."""
    beta = np.zeros(size)
    loss, gradient, hessian = objective(beta)
    for _ in range(100):
        step = np.linalg.solve(hessian, gradient)
        if float(gradient @ step) < 1e-20 * (1 + abs(loss)):
            break
        for halving in range(40):
            trial = objective(beta - step / 2**halving)
            if trial[0] <= loss + 1e-14 * (1 + abs(loss)):  # the last steps change the loss by less than its rounding
                break
        beta, (loss, gradient, hessian) = beta - step / 2**halving, trial
    return beta, hessian
