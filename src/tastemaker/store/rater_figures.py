"""What a lead may want to know of a rater, as numbers: pure functions of answers given.

InstructGPT (arXiv 2203.02155) reports agreement of groups only; figures of single raters are what keeps a group good.
Every figure is a value with a 95 % interval or says in words why there is none. Answers about one prompt are alike, so
intervals are over whole prompts (`intervals`); times get the distribution-free interval of order statistics.

Preferences are looked at pair by pair of outputs, and a pair of equal texts is passed over. Arrays end in their
dimensions: N answers to single questions, U units (questions), Q categories.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from tastemaker.agreement import LOST, TIED, WON, Answers, Category, Undefined, agreement_by_rater
from tastemaker.intervals import Estimate, Floats, Interval, clustered_share, mean_ci
from tastemaker.store.given import Given
from tastemaker.store.gold import LIKERT_TOLERANCE, outcome, ranks
from tastemaker.store.tasks import FLAGS, LETTERS, LIKERT_POINTS, ComparisonAnswer, RankingAnswer, RatingAnswer

Figure = Estimate | Undefined
Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]

# Outputs whose lengths differ by no more characters than this count as equally long.
LENGTH_MARGIN = 30

# The fewest answers of which a median, and a 5th percentile, have an interval worth the name.
LEAST_FOR_MEDIAN, LEAST_FOR_FIFTH = 6, 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """Answers to single questions of one kind, each beside what else is known of it."""

    answers: Answers
    shown_first_N: Mask
    """Of a pair: whether the output queued first was shown before the other."""
    longer_N: Ints
    """Of a pair: 1 where the output queued first is longer, -1 where the other is, 0 where neither is by much."""

    @property
    def cluster_N(self) -> list[Hashable]:
        return [self.answers.clusters[unit] for unit in self.answers.unit_N]

    def of(self, rater: str) -> Mask:
        """Which answers are a rater's."""
        if rater not in self.answers.raters:
            return np.zeros(len(self.answers.rater_N), dtype=bool)
        mask: Mask = self.answers.rater_N == self.answers.raters.index(rater)
        return mask

    def share(self, part_N: Mask, whole_N: Mask, why_none: str) -> Figure:
        """How many of `whole_N` are in `part_N`, clustered by prompt."""
        if not whole_N.any():
            return Undefined(reason=why_none)
        clusters = self.cluster_N
        chosen = np.flatnonzero(whole_N)
        part = part_N[chosen].astype(np.float64)
        return clustered_share(part, np.ones_like(part), [clusters[index] for index in chosen])


_Row = tuple[Hashable, str, str, int, bool, int]  # unit, cluster, rater, category, shown first, longer


def preferences(given: Sequence[Given]) -> Judged:
    """Every pair of outputs that somebody ranked or compared: lost, tied or won by the one queued first."""
    return _judged(_pair_rows(given), (LOST, TIED, WON))


def qualities(given: Sequence[Given]) -> Judged:
    """Every output that somebody rated, from 1 to 7."""
    rows = (
        ((one.item.id, letter), one.item.prompt.key, one.rater, rating.likert - 1, False, 0)
        for one, ratings in _rated(given)
        for letter, rating in ratings.ratings.items()
    )
    return _judged(rows, tuple(range(1, LIKERT_POINTS + 1)))


def flags(given: Sequence[Given], *, only: str | None = None) -> Judged:
    """Every yes/no field of every output that somebody rated; of one flag alone, if asked."""
    rows = (
        ((one.item.id, letter, flag), one.item.prompt.key, one.rater, int(flag in rating.flags), False, 0)
        for one, ratings in _rated(given)
        for letter, rating in ratings.ratings.items()
        for flag in (FLAGS if only is None else (only,))
    )
    return _judged(rows, (0, 1))


def _rated(given: Sequence[Given]) -> Iterator[tuple[Given, RatingAnswer]]:
    for one in given:
        if isinstance(one.answer, RatingAnswer):
            yield one, one.answer


def _pair_rows(given: Sequence[Given]) -> Iterator[_Row]:
    for one in given:
        if not isinstance(one.answer, RankingAnswer | ComparisonAnswer):
            continue
        texts = [output.response.text for output in one.item.outputs]
        rank = ranks(one.answer)
        place = {index: shown for shown, index in enumerate(one.order_shown)}
        for first, second in combinations(range(len(texts)), 2):
            if texts[first] != texts[second]:
                gap = len(texts[first]) - len(texts[second])
                yield (
                    (one.item.id, first, second),
                    one.item.prompt.key,
                    one.rater,
                    outcome(rank, LETTERS[first], LETTERS[second]) + 1,
                    place[first] < place[second],
                    (gap > LENGTH_MARGIN) - (gap < -LENGTH_MARGIN),
                )


def _judged(rows: Iterator[_Row], categories: tuple[Category, ...]) -> Judged:
    units: dict[Hashable, int] = {}
    names: dict[str, int] = {}
    clusters: list[str] = []
    table: list[tuple[int, int, int, bool, int]] = []
    for unit, cluster, rater, category, shown_first, longer in rows:
        if unit not in units:
            units[unit] = len(units)
            clusters.append(cluster)
        table.append((units[unit], names.setdefault(rater, len(names)), category, shown_first, longer))
    array = np.array(table, dtype=np.int64).reshape(len(table), 5)
    return Judged(
        answers=Answers(
            categories=categories,
            clusters=tuple(clusters),
            raters=tuple(names),
            unit_N=array[:, 0],
            rater_N=array[:, 1],
            category_N=array[:, 2],
        ),
        shown_first_N=array[:, 3].astype(bool),
        longer_N=array[:, 4],
    )


# --- agreement with the other raters --------------------------------------------------------------------------------


def peer_agreement(judged: Judged, credit_QQ: Floats, counted_QQ: Floats) -> dict[str, Figure]:
    """Each rater's agreement with every other answer to the same question, by what two categories are worth."""
    answers = judged.answers
    others_NQ = answers.count_UQ[answers.unit_N]
    row_N = np.arange(len(others_NQ))
    others_NQ[row_N, answers.category_N] -= 1
    part_N = np.sum(others_NQ * credit_QQ[answers.category_N], axis=1)
    whole_N = np.sum(others_NQ * counted_QQ[answers.category_N], axis=1)
    clusters = judged.cluster_N
    found: dict[str, Figure] = {}
    for rater in answers.raters:
        chosen = np.flatnonzero(judged.of(rater) & (whole_N > 0))
        found[rater] = (
            clustered_share(part_N[chosen], whole_N[chosen], [clusters[index] for index in chosen])
            if len(chosen)
            else Undefined(reason="nobody else has answered the same questions")
        )
    return found


def preference_agreement(judged: Judged) -> dict[str, Figure]:
    """On pairs that neither ties: how often the same output is preferred. By chance it would be a half."""
    decided = np.array([1.0, 0, 1])
    return peer_agreement(judged, np.diag(decided), np.outer(decided, decided))


def quality_agreement(judged: Judged) -> dict[str, Figure]:
    """How often two qualities lie within a point of each other."""
    return peer_agreement(judged, _near(), np.ones((LIKERT_POINTS, LIKERT_POINTS)))


def flag_agreement(judged: Judged) -> dict[str, Figure]:
    """How often a yes/no field is answered alike."""
    return peer_agreement(judged, np.eye(2), np.ones((2, 2)))


def majority_agreement(judged: Judged) -> dict[str, Figure]:
    """How often a rater says what most of the others do; a tie is an answer of its own."""
    return dict(agreement_by_rater(judged.answers))


def chance_of_quality(judged: Judged) -> float:
    """How often two qualities drawn from all that were given lie within a point."""
    share_Q = np.bincount(judged.answers.category_N, minlength=LIKERT_POINTS) / max(len(judged.answers.category_N), 1)
    return float(share_Q @ _near() @ share_Q)


def chance_of_flags(judged: Judged) -> float:
    """How often two answers to a yes/no field would be alike if all were drawn with the share of "yes" there is."""
    yes = float(np.mean(judged.answers.category_N)) if len(judged.answers.category_N) else 0.0
    return yes**2 + (1 - yes) ** 2


def _near() -> Floats:
    points = np.arange(LIKERT_POINTS)
    near: Floats = (np.abs(np.subtract.outer(points, points)) <= LIKERT_TOLERANCE).astype(np.float64)
    return near


# --- habits ---------------------------------------------------------------------------------------------------------


def tie_rate(judged: Judged, mask_N: Mask) -> Figure:
    """The share of pairs that are tied."""
    return judged.share(judged.answers.category_N == 1, mask_N, "no pair of outputs has been judged")


def first_shown_rate(judged: Judged, mask_N: Mask) -> Figure:
    """Of the pairs not tied, how often the output that was shown first wins; a half where place does not matter."""
    first_won_N = (judged.answers.category_N == 2) == judged.shown_first_N
    return judged.share(first_won_N, mask_N & (judged.answers.category_N != 1), "no pair was preferred either way")


def longer_rate(judged: Judged, mask_N: Mask) -> Figure:
    """Of the pairs not tied whose lengths differ, how often the longer output wins."""
    longer_won_N = (judged.answers.category_N == 2) == (judged.longer_N > 0)
    counted_N = mask_N & (judged.answers.category_N != 1) & (judged.longer_N != 0)
    return judged.share(longer_won_N, counted_N, f"no pair with lengths more than {LENGTH_MARGIN} characters apart")


def one_quality_rate(judged: Judged, mask_N: Mask) -> Figure:
    """The share of ratings that have the rater's most frequent quality."""
    if not mask_N.any():
        return Undefined(reason="no output has been rated")
    usual = int(np.bincount(judged.answers.category_N[mask_N]).argmax())
    return judged.share(judged.answers.category_N == usual, mask_N, "no output has been rated")


def quality_shift(judged: Judged, rater: str) -> Figure:
    """By how many points the rater's qualities lie above the others' of the same outputs."""
    answers = judged.answers
    count_UQ = answers.count_UQ
    others_N = count_UQ.sum(axis=1)[answers.unit_N] - 1
    own_N = answers.category_N.astype(np.float64)
    sum_N = (count_UQ @ np.arange(LIKERT_POINTS))[answers.unit_N] - own_N
    chosen = np.flatnonzero(judged.of(rater) & (others_N > 0))
    clusters = [answers.clusters[answers.unit_N[index]] for index in chosen]
    if len(set(clusters)) < 2:
        return Undefined(reason="fewer than two prompts were rated by somebody else too")
    return mean_ci(own_N[chosen] - sum_N[chosen] / others_N[chosen], clusters)


def quantile(values: Sequence[float], share: float, *, least: int) -> Figure:
    """A quantile of times with the interval between the order statistics that cover it in 95 % of samples.

    Where no observed value is low enough to be the lower end, that is 0: no time is shorter.
    """
    if len(values) < least:
        return Undefined(reason=f"there are {len(values)} answers; at least {least} are needed")
    ordered, count = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    up_to_K = np.asarray(bdtr(np.arange(count + 1, dtype=np.float64), count, share))  # P(at most k values lie below)
    low, high = int(np.searchsorted(up_to_K, 0.025)), int(np.searchsorted(up_to_K, 0.975))
    value = float(np.quantile(ordered, share))
    low_end = float(ordered[low - 1]) if low > 0 else 0.0
    high_end = float(ordered[min(high, count - 1)])
    return Estimate(value=value, ci95=Interval(min(low_end, value), max(high_end, value)), n=count)
