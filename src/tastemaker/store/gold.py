"""Answers held against known ones: the letters they speak in, and how far they agree. Pure functions.

A rater's answer speaks in the letters that were shown; `order_shown[i]` is the queued place of the output under letter
i. Expected answers of gold items and adjudicated answers speak in *queued* letters: A is the output queued first.
Everything here that compares answers compares them in queued letters.

How an answer agrees with gold, as InstructGPT's screening does (arXiv 2203.02155, appendix B.1, which gives no
formula): a ranking by the share of the gold's untied pairs that are ordered alike; a comparison wholly or not at all; a
rating by its flags (each of the eleven of each output is one question) and by the qualities that lie within one point.
A demonstration is graded by a lead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from tastemaker.errors import StoreError
from tastemaker.store.tasks import (
    FLAGS,
    LETTERS,
    Answer,
    Choice,
    ComparisonAnswer,
    DemonstrationAnswer,
    RankingAnswer,
    RatingAnswer,
    StudyKind,
    check_answer,
)

LIKERT_TOLERANCE = 1

Measure = Literal["order", "flags", "quality"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """Of how many questions that one item asks, how many were answered as expected."""

    measure: Measure
    agreed: int
    of: int


def in_queued_letters(answer: Answer, order_shown: Sequence[int]) -> Answer:
    """An answer in the letters that a rater was shown, as the same answer in queued letters."""
    if isinstance(answer, DemonstrationAnswer):
        return answer
    queued = {LETTERS[place]: LETTERS[index] for place, index in enumerate(order_shown)}
    return _renamed(answer, queued)


def in_shown_letters(answer: Answer, order_shown: Sequence[int]) -> Answer:
    """The inverse: an answer in queued letters, as a rater who saw this order would have given it."""
    if isinstance(answer, DemonstrationAnswer):
        return answer
    shown = {LETTERS[index]: LETTERS[place] for place, index in enumerate(order_shown)}
    return _renamed(answer, shown)


def _renamed(answer: RankingAnswer | ComparisonAnswer | RatingAnswer, names: dict[str, str]) -> Answer:
    if isinstance(answer, RankingAnswer):
        return RankingAnswer(tuple(tuple(sorted(names[letter] for letter in group)) for group in answer.groups))
    if isinstance(answer, ComparisonAnswer):
        renamed: dict[str, Choice] = {"A": "A", "B": "B"}
        return answer if answer.choice == "tie" else ComparisonAnswer(renamed[names[answer.choice]])
    return RatingAnswer({names[letter]: rating for letter, rating in sorted(answer.ratings.items())})


def check_expected(kind: StudyKind, expected: Answer, outputs: int) -> None:
    """Refuse an expected answer that no answer could be held against."""
    if kind == "demonstration":
        raise StoreError("A demonstration has no expected answer; a lead grades it. Leave the expected answer out.")
    check_answer(kind, expected, LETTERS[:outputs])
    if isinstance(expected, RankingAnswer) and len(expected.groups) < 2:
        raise StoreError("The expected ranking ties all outputs, so no order agrees with it; give two groups or more.")


def ranks(answer: RankingAnswer | ComparisonAnswer) -> dict[str, int]:
    """The rank of each letter: 0 is best, equal ranks are ties."""
    if isinstance(answer, ComparisonAnswer):
        return {"A": int(answer.choice == "B"), "B": int(answer.choice == "A")}
    return {letter: rank for rank, group in enumerate(answer.groups) for letter in group}


def outcome(rank: Mapping[str, int], first: str, second: str) -> int:
    """1 where the first of two letters is preferred, 0 where they tie, -1 where the second is."""
    return (rank[first] < rank[second]) - (rank[first] > rank[second])


def against_gold(answer: Answer, expected: Answer) -> tuple[Agreed, ...]:
    """How far an answer agrees with the expected one, both in queued letters; empty for a demonstration."""
    if isinstance(answer, RankingAnswer) and isinstance(expected, RankingAnswer):
        wanted, given = ranks(expected), ranks(answer)
        pairs = [(a, b) for a, b in combinations(sorted(wanted), 2) if wanted[a] != wanted[b]]
        # A pair that the rater ties is not ordered alike.
        alike = sum(outcome(wanted, a, b) == outcome(given, a, b) for a, b in pairs)
        return (Agreed(measure="order", agreed=alike, of=len(pairs)),)
    if isinstance(answer, ComparisonAnswer) and isinstance(expected, ComparisonAnswer):
        return (Agreed(measure="order", agreed=int(answer == expected), of=1),)
    if isinstance(answer, RatingAnswer) and isinstance(expected, RatingAnswer):
        pairs_of_ratings = [(answer.ratings[letter], wanted) for letter, wanted in expected.ratings.items()]
        flags = sum(
            (flag in given.flags) == (flag in wanted.flags) for given, wanted in pairs_of_ratings for flag in FLAGS
        )
        near = sum(abs(given.likert - wanted.likert) <= LIKERT_TOLERANCE for given, wanted in pairs_of_ratings)
        count = len(pairs_of_ratings)
        return (
            Agreed(measure="flags", agreed=flags, of=count * len(FLAGS)),
            Agreed(measure="quality", agreed=near, of=count),
        )
    return ()


def disagreement(answers: Sequence[Answer]) -> float | None:
    """How far the answers to one item lie apart, from 0 to 1, over all pairs of answers; None below two answers.

    Of rankings and comparisons: the share of pairs of outputs that two raters order otherwise, a tie against a
    preference counting half. Of ratings: half for the distance in quality (6 points are 1), half where flags differ.
    """
    judged = [answer for answer in answers if not isinstance(answer, DemonstrationAnswer)]
    gaps = [_gap(first, second) for first, second in combinations(judged, 2)]
    return sum(gaps) / len(gaps) if gaps else None


def _gap(first: Answer, second: Answer) -> float:
    if isinstance(first, RatingAnswer) and isinstance(second, RatingAnswer):
        both = [(rating, second.ratings[letter]) for letter, rating in first.ratings.items()]
        gaps = [abs(a.likert - b.likert) / 12 + (set(a.flags) != set(b.flags)) / 2 for a, b in both]
        return sum(gaps) / len(gaps)
    assert isinstance(first, RankingAnswer | ComparisonAnswer)
    assert isinstance(second, RankingAnswer | ComparisonAnswer)
    one, other = ranks(first), ranks(second)
    pairs = list(combinations(sorted(one), 2))
    return sum(abs(outcome(one, a, b) - outcome(other, a, b)) for a, b in pairs) / (2 * len(pairs))
