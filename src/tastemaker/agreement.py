"""How far raters agree with each other: the yardstick beside every accuracy of a reward model or a judge.

InstructGPT (arXiv 2203.02155, section 3.4) reports raw pairwise agreement alone (72.6 % for its training labelers) and
does not say how ties were counted. Here raw agreement is counted three ways, and coefficients that take out chance
(Krippendorff's alpha, Cohen's and Fleiss' kappa, Gwet's AC1) stand beside it. Where one is undefined (nobody
overlapped, or every answer was the same) the result says so in words instead of being 0, 1 or NaN.

Every measure here is a function of sums over units, so its interval comes from resampling whole clusters of units
(prompts). Arrays end in their dimensions: N answers, U units, Q categories, R resamples, F sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tastemaker.errors import DataError
from tastemaker.intervals import (
    Estimate,
    Floats,
    Interval,
    Labels,
    bootstrap_interval,
    cluster_sums,
    clustered_share,
    wilson,
)
from tastemaker.records import Ranking

Category = str | int | float
Level = Literal["nominal", "ordinal"]
Weights = Literal["none", "linear", "quadratic"]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

LOST, TIED, WON = -1, 0, 1  # the first response of a pair against the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Undefined:
    """A measure that has no value for these answers, and why."""

    reason: str

    def to_json(self) -> dict[str, str | None]:
        return {"value": None, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """Who put which unit (a comparison, a flag, a response) into which category; one row an answer.

    Categories stand in their order, which an ordinal measure needs. Units of one cluster (a prompt) are alike.
    """

    categories: tuple[Category, ...]
    clusters: tuple[Hashable, ...]  # one a unit
    raters: tuple[str, ...]
    unit_N: Ints
    rater_N: Ints
    category_N: Ints

    @property
    def count_UQ(self) -> Floats:
        """How many raters put each unit into each category."""
        return self.counts(np.ones(len(self.unit_N), dtype=np.bool_))

    def counts(self, mask_N: Mask) -> Floats:
        """The same by some of the answers alone."""
        count_UQ = np.zeros((len(self.clusters), len(self.categories)))
        np.add.at(count_UQ, (self.unit_N[mask_N], self.category_N[mask_N]), 1)
        return count_UQ

    def given_by(self, names: Collection[str]) -> Mask:
        """Which answers are of these raters."""
        columns = [index for index, rater in enumerate(self.raters) if rater in names]
        given_N: Mask = np.isin(self.rater_N, columns)
        return given_N


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingAgreement:
    """How often two raters of one pair of responses say the same, by what a tie is taken for.

    `ties_excluded` leaves out every pair that either rater tied; with `tie_is_a_class` a tie agrees with ties alone;
    with `tie_is_half` a tie agrees by half with either preference, and wholly with a tie.
    """

    ties_excluded: Estimate | Undefined
    tie_is_a_class: Estimate | Undefined
    tie_is_half: Estimate | Undefined


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAgreement:
    """A row of a table of agreement: raters with one another, or those of one group with those of another.

    `raters` and `others` count those who share a question with one that they are held against.
    """

    pairwise: RankingAgreement
    majority: Estimate | Undefined  # as in `majority_agreement`
    alpha: Estimate | Undefined | None  # Krippendorff's, nominal; of one group alone
    raters: int
    others: int | None = None  # of the other group

    def to_json(self) -> dict[str, object]:
        row: dict[str, object] = {
            "ties_excluded": self.pairwise.ties_excluded.to_json(),
            "tie_is_a_class": self.pairwise.tie_is_a_class.to_json(),
            "tie_is_half": self.pairwise.tie_is_half.to_json(),
            "majority": self.majority.to_json(),
            "raters": self.raters,
        }
        if self.alpha is not None:
            row["alpha"] = self.alpha.to_json()
        if self.others is not None:
            row["other_raters"] = self.others
        return row


# --------------------------------------------------------------------------------------------------- reading answers


def table_answers(
    table: Sequence[Sequence[Category | None]],
    *,
    categories: Sequence[Category] | None = None,
    clusters: Labels | None = None,
    raters: Sequence[str] | None = None,
) -> Answers:
    """Read a table with one row a unit and one column a rater; None where a rater did not answer.

    Name the `categories`, in order, where raters may have used some of them never: AC1 counts them. Otherwise they are
    the values found, sorted.
    """
    width = len(table[0]) if table else 0
    if any(len(row) != width for row in table):
        raise DataError(f"The table's rows are of {sorted({len(row) for row in table})} raters; give one column each.")
    if clusters is not None and len(clusters) != len(table):
        raise DataError(f"{len(clusters)} clusters for {len(table)} units: give one for each row of the table.")
    if raters is not None and len(raters) != width:
        raise DataError(f"{len(raters)} raters for {width} columns: give one name for each column.")
    rows = [
        (unit, column, value) for unit, row in enumerate(table) for column, value in enumerate(row) if value is not None
    ]
    return _from_rows(
        rows,
        categories=_in_order({value for *_, value in rows}) if categories is None else tuple(categories),
        clusters=tuple(range(len(table)) if clusters is None else clusters),
        raters=tuple(map(str, range(width)) if raters is None else raters),
    )


def pairwise_answers(rankings: Sequence[Ranking]) -> Answers:
    """Each pair of responses of one prompt as a unit, which a rater said was lost, tied or won by the first."""
    clusters: list[str] = []
    rows: list[tuple[int, str, Category]] = []
    for prompt, texts, rank_of_rater in _grouped(rankings):
        for first, second in combinations(range(len(texts)), 2):
            if texts[first] == texts[second]:  # between identical texts there is nothing to agree on
                continue
            for rater, ranks in rank_of_rater.items():
                outcome = (ranks[first] < ranks[second]) - (ranks[first] > ranks[second])
                rows.append((len(clusters), rater, outcome))
            clusters.append(prompt)
    return _named(rows, categories=(LOST, TIED, WON), clusters=clusters)


def comparison_answers(rows: Iterable[tuple[Hashable, Hashable, str, float]]) -> Answers:
    """Comparisons of two responses: what was compared, its cluster (a prompt), the rater, and how far they prefer the
    first (1, 0.5 for a tie, 0). Where one rater compared the same twice, the last counts."""
    unit_of: dict[Hashable, int] = {}
    clusters: list[Hashable] = []
    said: dict[tuple[int, str], int] = {}
    for compared, cluster, rater, preference in rows:
        unit = unit_of.setdefault(compared, len(unit_of))
        if unit == len(clusters):
            clusters.append(cluster)
        said[unit, rater] = (preference > 0.5) - (preference < 0.5)
    given = [(unit, rater, outcome) for (unit, rater), outcome in said.items()]
    return _named(given, categories=(LOST, TIED, WON), clusters=clusters)


def rank_answers(rankings: Sequence[Ranking]) -> Answers:
    """Each response as a unit and its rank as the category, for ordinal measures; tied responses share the mean rank.

    Rankings of different numbers of responses have different scales: give those of one K at a time.
    """
    sizes = sorted({len(ranking.responses) for ranking in rankings})
    if len(sizes) > 1:
        raise DataError(f"The rankings are of {sizes} responses, so their ranks differ in scale; give one size a time.")
    clusters: list[str] = []
    rows: list[tuple[int, str, Category]] = []
    for prompt, texts, rank_of_rater in _grouped(rankings):
        for index in range(len(texts)):
            rows += [(len(clusters), rater, _mean_rank(ranks, index)) for rater, ranks in rank_of_rater.items()]
            clusters.append(prompt)
    return _named(rows, categories=_in_order({value for *_, value in rows}), clusters=clusters)


def _grouped(rankings: Sequence[Ranking]) -> list[tuple[str, tuple[str, ...], dict[str, tuple[int, ...]]]]:
    """The rankings of each response set: prompt, texts in sorted order, and each rater's ranks in that order.

    The order in which responses were stored does not matter. Where one rater ranked a set twice, the last counts.
    """
    groups: dict[tuple[str, tuple[str, ...]], dict[str, tuple[int, ...]]] = {}
    for ranking in rankings:
        if ranking.author.rater is None:
            raise DataError(
                f"A ranking of prompt {ranking.prompt.key!r} names no rater; agreement is between raters, so give one."
            )
        order = sorted(range(len(ranking.responses)), key=lambda index: ranking.responses[index].text)
        texts = tuple(ranking.responses[index].text for index in order)
        ranks = tuple(ranking.ranks[index] for index in order)
        groups.setdefault((ranking.prompt.key, texts), {})[ranking.author.rater] = ranks
    return [(prompt, texts, by_rater) for (prompt, texts), by_rater in groups.items()]


def _mean_rank(ranks: tuple[int, ...], index: int) -> float:
    better = sum(rank < ranks[index] for rank in ranks)
    return better + (ranks.count(ranks[index]) - 1) / 2


def _in_order(values: set[Category]) -> tuple[Category, ...]:
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))


def _named(
    rows: Sequence[tuple[int, str, Category]], *, categories: tuple[Category, ...], clusters: Sequence[Hashable]
) -> Answers:
    raters = tuple(sorted({rater for _, rater, _ in rows}))
    column = {rater: index for index, rater in enumerate(raters)}
    numbered = [(unit, column[rater], value) for unit, rater, value in rows]
    return _from_rows(numbered, categories=categories, clusters=tuple(clusters), raters=raters)


def _from_rows(
    rows: Sequence[tuple[int, int, Category]],
    *,
    categories: tuple[Category, ...],
    clusters: tuple[Hashable, ...],
    raters: tuple[str, ...],
) -> Answers:
    position = {value: index for index, value in enumerate(categories)}
    unknown = sorted({str(value) for *_, value in rows if value not in position})
    if unknown:
        allowed = ", ".join(map(str, categories))
        raise DataError(f"The answers hold {', '.join(unknown)}; the categories given are {allowed}.")
    return Answers(
        categories=categories,
        clusters=clusters,
        raters=raters,
        unit_N=np.array([unit for unit, *_ in rows], dtype=np.int64),
        rater_N=np.array([column for _, column, _ in rows], dtype=np.int64),
        category_N=np.array([position[value] for *_, value in rows], dtype=np.int64),
    )


# ------------------------------------------------------------------------------------------------------ raw agreement


def raw_agreement(answers: Answers) -> Estimate | Undefined:
    """Of all the times that two raters answered one unit, how often they put it into the same category."""
    return _agreement(answers, _rater_pairs(answers.count_UQ), np.eye(len(answers.categories)))


def ranking_agreement(rankings: Sequence[Ranking]) -> RankingAgreement:
    """Raw pairwise agreement of rankings, with ties counted three ways."""
    answers = pairwise_answers(rankings)
    return _three_ways(answers, _rater_pairs(answers.count_UQ))


def agreement_within(answers: Answers) -> GroupAgreement:
    """How far raters who were asked which of two responses is better agree with one another."""
    several_N = (answers.count_UQ.sum(axis=1) > 1)[answers.unit_N]
    return GroupAgreement(
        pairwise=_three_ways(answers, _rater_pairs(answers.count_UQ)),
        majority=majority_agreement(answers),
        alpha=krippendorff_alpha(answers),
        raters=len(np.unique(answers.rater_N[several_N])),
    )


def agreement_between(answers: Answers, group: Collection[str]) -> GroupAgreement:
    """The same of the raters of `group` with all others, whoever agrees among themselves."""
    mine_N = answers.given_by(group)
    mine_UQ, theirs_UQ = answers.counts(mine_N), answers.counts(~mine_N)
    shared_N = ((mine_UQ.sum(axis=1) > 0) & (theirs_UQ.sum(axis=1) > 0))[answers.unit_N]
    return GroupAgreement(
        pairwise=_three_ways(answers, mine_UQ[:, :, None] * theirs_UQ[:, None, :]),
        majority=majority_agreement(answers, group),
        alpha=None,
        raters=len(np.unique(answers.rater_N[mine_N & shared_N])),
        others=len(np.unique(answers.rater_N[~mine_N & shared_N])),
    )


def majority_agreement(answers: Answers, group: Collection[str] | None = None) -> Estimate | Undefined:
    """How often a rater prefers the response that more than half of the others prefer, where at least two others said.

    The others are all that were asked the same; with `group`, those outside it, and its raters are held against them.
    A rater's own tie is left out; a tie among the others counts against there being a majority.
    """
    row_N = np.arange(len(answers.unit_N))
    if group is None:
        mine_N = np.ones(len(row_N), dtype=np.bool_)
        others_NQ = answers.count_UQ[answers.unit_N]
        others_NQ[row_N, answers.category_N] -= 1
    else:
        mine_N = answers.given_by(group)
        others_NQ = answers.counts(~mine_N)[answers.unit_N]
    tie, asked_N = answers.categories.index(TIED), others_NQ.sum(axis=1)
    preferred_N = others_NQ.argmax(axis=1)
    is_majority_N = (asked_N > 1) & (2 * others_NQ.max(axis=1) > asked_N) & (preferred_N != tie)
    counted_N = mine_N & is_majority_N & (answers.category_N != tie)
    if not counted_N.any():
        return Undefined(reason="nobody was asked beside two others of whom more than half preferred the same")
    return _share_of(answers, (preferred_N == answers.category_N).astype(np.float64), counted_N)


def _three_ways(answers: Answers, pairs_UQQ: Floats) -> RankingAgreement:
    """The agreement of these pairs of raters, whose categories are lost, tied and won, with ties counted three ways."""
    assert answers.categories == (LOST, TIED, WON)
    decided = np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 1]])
    half = np.array([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]])
    return RankingAgreement(
        ties_excluded=_agreement(answers, pairs_UQQ, decided, counted_QQ=np.outer([1, 0, 1], [1.0, 0, 1])),
        tie_is_a_class=_agreement(answers, pairs_UQQ, np.eye(3)),
        tie_is_half=_agreement(answers, pairs_UQQ, half),
    )


def _agreement(
    answers: Answers, pairs_UQQ: Floats, credit_QQ: Floats, *, counted_QQ: Floats | None = None
) -> Estimate | Undefined:
    """The credit for two raters' categories, summed over these pairs of raters of a unit, over the pairs counted."""
    part_U = np.einsum("uqk,qk->u", pairs_UQQ, credit_QQ)
    whole_U = np.einsum("uqk,qk->u", pairs_UQQ, np.ones_like(credit_QQ) if counted_QQ is None else counted_QQ)
    if not np.any(whole_U):
        return Undefined(reason=_no_overlap(answers))
    judged = np.flatnonzero(whole_U)
    return clustered_share(part_U[judged], whole_U[judged], [answers.clusters[unit] for unit in judged])


def leave_one_out_agreement(answers: Answers) -> Estimate | Undefined:
    """How often a rater agrees with the majority of a unit's other raters; between equal majorities, by chance.

    This is what a judge's agreement with people is to be held against (the human row of AlpacaEval).
    """
    agreed_N, overlap_N = _with_majority(answers)
    return _share_of(answers, agreed_N, overlap_N)


def agreement_by_rater(answers: Answers) -> dict[str, Estimate | Undefined]:
    """The same for each rater alone."""
    agreed_N, overlap_N = _with_majority(answers)
    return {
        rater: _share_of(answers, agreed_N, overlap_N & (answers.rater_N == index))
        for index, rater in enumerate(answers.raters)
    }


def _with_majority(answers: Answers) -> tuple[Floats, Mask]:
    """Each answer's agreement with the majority of the others, and where there are others."""
    others_NQ = answers.count_UQ[answers.unit_N]
    row_N = np.arange(len(others_NQ))
    others_NQ[row_N, answers.category_N] -= 1
    is_mode_NQ = others_NQ == others_NQ.max(axis=1, keepdims=True, initial=0)
    agreed_N: Floats = is_mode_NQ[row_N, answers.category_N] / is_mode_NQ.sum(axis=1)
    has_others_N: Mask = others_NQ.sum(axis=1) > 0
    return agreed_N, has_others_N


def _share_of(answers: Answers, agreed_N: Floats, mask_N: Mask) -> Estimate | Undefined:
    if not mask_N.any():
        return Undefined(reason=_no_overlap(answers))
    cluster_N = [answers.clusters[unit] for unit in answers.unit_N[mask_N]]
    return clustered_share(agreed_N[mask_N], np.ones(len(cluster_N)), cluster_N)


# --------------------------------------------------------------------------------------- agreement beyond chance


def krippendorff_alpha(answers: Answers, level: Level = "nominal", *, seed: int = 0) -> Estimate | Undefined:
    """Krippendorff's alpha: 1 is perfect, 0 is chance. Any number of raters, missing answers allowed.

    `ordinal` weighs a disagreement by how many answers lie between the two categories.
    """
    if level not in ("nominal", "ordinal"):
        raise DataError(f"level is {level!r}; it must be 'nominal' or 'ordinal'.")
    size = len(answers.categories)

    def alpha(sum_RF: Floats) -> Floats:
        total_R = sum_RF.sum(axis=1)
        coincidence_RQQ = sum_RF.reshape(-1, size, size) / total_R[:, None, None]  # as shares: see _ratio
        share_RQ = coincidence_RQQ.sum(axis=2)
        distance_RQQ = _distance(share_RQ, level)
        observed_R = np.sum(coincidence_RQQ * distance_RQQ, axis=(1, 2))
        by_chance_R = np.sum(share_RQ[:, :, None] * share_RQ[:, None, :] * distance_RQQ, axis=(1, 2))
        return 1.0 - _ratio(observed_R * (total_R - 1) / total_R, by_chance_R)

    return _beyond_chance(answers, _coincidences(answers.count_UQ), alpha, seed=seed)


def fleiss_kappa(answers: Answers, *, seed: int = 0) -> Estimate | Undefined:
    """Fleiss' kappa over the units with two answers or more; units may differ in how many they have."""
    features_UF = _unit_shares(answers.count_UQ)

    def kappa(sum_RF: Floats) -> Floats:
        agreed_R, units_R = sum_RF[:, 0], sum_RF[:, 1]
        count_RQ = sum_RF[:, 2 + len(answers.categories) :]
        expected_R = np.sum((count_RQ / count_RQ.sum(axis=1, keepdims=True)) ** 2, axis=1)
        return 1.0 - _ratio(1 - agreed_R / units_R, 1 - expected_R)

    return _beyond_chance(answers, features_UF, kappa, seed=seed)


def gwet_ac1(answers: Answers, *, seed: int = 0) -> Estimate | Undefined:
    """Gwet's AC1 (2008): for flags that are rarely raised, where kappa falls though raters hardly ever differ."""
    size = len(answers.categories)
    if size < 2:
        return Undefined(reason="only one category is known; name all the categories that raters could have chosen")

    def ac1(sum_RF: Floats) -> Floats:
        share_RQ = sum_RF[:, 2 : 2 + size] / sum_RF[:, 1:2]
        expected_R = np.sum(share_RQ * (1 - share_RQ), axis=1) / (size - 1)
        return 1.0 - _ratio(1 - sum_RF[:, 0] / sum_RF[:, 1], 1 - expected_R)

    return _beyond_chance(answers, _unit_shares(answers.count_UQ), ac1, seed=seed)


def cohen_kappa(
    first: Sequence[Category],
    second: Sequence[Category],
    *,
    categories: Sequence[Category] | None = None,
    weights: Weights = "none",
    clusters: Labels | None = None,
    seed: int = 0,
) -> Estimate | Undefined:
    """Cohen's kappa of two raters of the same units; weighted by distance in the order of `categories` if asked."""
    if weights not in ("none", "linear", "quadratic"):
        raise DataError(f"weights is {weights!r}; it must be 'none', 'linear' or 'quadratic'.")
    if len(first) != len(second):
        raise DataError(f"The raters answered {len(first)} and {len(second)} units; give both for the same units.")
    answers = table_answers(list(zip(first, second, strict=True)), categories=categories, clusters=clusters)
    size = len(answers.categories)
    gap_QQ = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    cost_QQ = {"none": gap_QQ > 0, "linear": gap_QQ, "quadratic": gap_QQ**2}[weights]
    both_UQQ = np.zeros((len(first), size, size))
    both_UQQ[np.arange(len(first)), answers.category_N[0::2], answers.category_N[1::2]] = 1

    def kappa(sum_RF: Floats) -> Floats:
        both_RQQ = sum_RF.reshape(-1, size, size) / sum_RF.sum(axis=1)[:, None, None]
        by_chance_RQQ = both_RQQ.sum(axis=2)[:, :, None] * both_RQQ.sum(axis=1)[:, None, :]
        return 1.0 - _ratio(np.sum(both_RQQ * cost_QQ, axis=(1, 2)), np.sum(by_chance_RQQ * cost_QQ, axis=(1, 2)))

    return _beyond_chance(answers, both_UQQ.reshape(len(first), size * size), kappa, seed=seed)


def _beyond_chance(
    answers: Answers, feature_UF: Floats, statistic: Callable[[Floats], Floats], *, seed: int
) -> Estimate | Undefined:
    """The statistic of the summed features with its bootstrap interval, or why there is none."""
    judged = np.flatnonzero(answers.count_UQ.sum(axis=1) > 1)
    if not len(judged):
        return Undefined(reason=_no_overlap(answers))
    sum_CF = cluster_sums(feature_UF[judged], [answers.clusters[unit] for unit in judged])
    value = float(statistic(sum_CF.sum(axis=0)[None])[0])
    if not np.isfinite(value):
        return Undefined(reason="no variation: every answer was the same, so agreement by chance is certain too")
    if len(sum_CF) < 2:
        return Undefined(reason="all the units belong to one cluster, so nothing says how far the value can be trusted")
    if value > 1 - 1e-12:
        # No disagreement to resample. A share of units answered at random would have cost about that share.
        interval = Interval(wilson(len(sum_CF), len(sum_CF)).ci95.low, 1.0)
    else:
        interval = bootstrap_interval(sum_CF, statistic, seed=seed, bounds=Interval(-1.0, 1.0))
    return Estimate(value=value, ci95=interval, n=len(judged))


def _no_overlap(answers: Answers) -> str:
    return f"none of the {len(answers.clusters)} units counts two answers by different raters"


def _rater_pairs(count_UQ: Floats) -> Floats:
    """How many (unordered) pairs of a unit's raters gave each two categories; symmetric, halves off the diagonal."""
    pairs_UQQ: Floats = count_UQ[:, :, None] * count_UQ[:, None, :]
    diagonal = np.arange(count_UQ.shape[1])
    pairs_UQQ[:, diagonal, diagonal] -= count_UQ
    return pairs_UQQ / 2


def _coincidences(count_UQ: Floats) -> Floats:
    """Krippendorff's coincidence matrix of each unit, flat: its pairs of answers, each answer weighing one."""
    answered_U = count_UQ.sum(axis=1)
    weight_U = 2 / np.maximum(answered_U - 1, 1)  # each pair stands twice, once in either order
    coincidence_UQQ: Floats = _rater_pairs(count_UQ) * weight_U[:, None, None]
    return coincidence_UQQ.reshape(len(count_UQ), count_UQ.shape[1] ** 2)


def _unit_shares(count_UQ: Floats) -> Floats:
    """Each unit's share of agreeing rater pairs, 1, the shares of its answers in each category, and their counts."""
    answered_U = count_UQ.sum(axis=1)
    agreeing_U = np.sum(count_UQ * (count_UQ - 1), axis=1) / np.maximum(answered_U * (answered_U - 1), 1)
    share_UQ = count_UQ / np.maximum(answered_U, 1)[:, None]
    return np.concatenate([np.stack([agreeing_U, np.ones_like(agreeing_U)], axis=1), share_UQ, count_UQ], axis=1)


def _distance(share_RQ: Floats, level: Level) -> Floats:
    """The squared distance of two categories: 1, or the squared share of answers between their middles."""
    if level == "nominal":
        different_1QQ: Floats = 1.0 - np.eye(share_RQ.shape[1])[None, :, :]
        return different_1QQ
    middle_RQ = np.cumsum(share_RQ, axis=1) - share_RQ / 2
    squared_RQQ: Floats = (middle_RQ[:, :, None] - middle_RQ[:, None, :]) ** 2
    return squared_RQQ


def _ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, both of order 1; NaN where whole is 0 but for rounding: there is then no chance to take out."""
    known = whole > 1e-12
    ratio: Floats = np.where(known, part / np.where(known, whole, 1), np.nan)
    return ratio
