"""What is queued for raters, what a rater sees, and what a rater answers (InstructGPT sections 3.2-3.4, appendix B).

The four kinds of study are the paper's: writing a demonstration, ranking K outputs with ties, rating each output alone
(overall quality 1 to 7 and the yes/no fields of Table 3), and a blind comparison of two outputs. A `Task` is all that
a rater is ever given: letters instead of sources, in an order of its own. Answers speak in those letters; they are
checked whole, never repaired.

Departures from the paper: the paper rates and ranks on two pages of one task; here they are two studies over the same
items, so that either can be left out.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tastemaker.errors import ConfigError, StoreError
from tastemaker.records import Messages, Origin, Prompt, Response

StudyKind = Literal["demonstration", "ranking", "comparison", "rating"]
Purpose = Literal["training", "evaluation"]
Choice = Literal["A", "B", "tie"]

LETTERS = string.ascii_uppercase
LIKERT_POINTS = 7

# The yes/no fields of Table 3, in the paper's order.
FLAGS = (
    "fails_to_follow_instruction",
    "inappropriate_for_customer_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual_content",
    "violent_content",
    "encourages_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "expresses_opinion",
    "expresses_moral_judgment",
)

# How many outputs an item of each kind of study has: at least, at most.
OUTPUTS_ALLOWED: Mapping[StudyKind, tuple[int, int]] = {
    "demonstration": (0, 0),
    "ranking": (2, len(LETTERS)),
    "comparison": (2, 2),
    "rating": (1, len(LETTERS)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Guideline:
    """What raters are told. A changed text needs a new version; every answer names the version it was given under."""

    version: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """One round of questions of one kind, put to one group of raters; `overlap` raters answer each item."""

    name: str
    kind: StudyKind
    purpose: Purpose
    rater_group: str
    guideline: Guideline
    overlap: int = 1
    # A ranking of nine long outputs takes some ten minutes; three times that without a sign of life is abandoned.
    lease_minutes: float = 30.0

    def __post_init__(self) -> None:
        for name, value in (
            ("name", self.name),
            ("rater_group", self.rater_group),
            ("guideline version", self.guideline.version),
        ):
            check_name(f"study {name}", value)
        _check_choice("study kind", self.kind, get_args(StudyKind))
        _check_choice("study purpose", self.purpose, get_args(Purpose))
        if self.overlap < 1:
            raise ConfigError(f"study {self.name!r}: overlap is {self.overlap}; it must be at least 1.")
        if self.lease_minutes <= 0:
            raise ConfigError(f"study {self.name!r}: lease_minutes is {self.lease_minutes}; it must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewOutput:
    """A response to be judged, and what produced it (a model, a run): that is never shown to a rater."""

    response: Response
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewItem:
    """One question of a study; `key` names it there, and what `prompt.about` knows is never shown to a rater."""

    key: str
    prompt: Prompt
    outputs: tuple[NewOutput, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownOutput:
    """An output as a rater sees it."""

    letter: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Everything a rater is given. `id` is random; `token` proves that the task was given to this rater."""

    id: str
    token: str
    kind: StudyKind
    guideline_version: str
    messages: Messages
    outputs: tuple[ShownOutput, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One of `of` equal shares of a study's slots, dealt out in turn: which rater answers what is fixed beforehand."""

    index: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivatePrompt:
    """A task's prompt with all that is known about it, and its responses in the order shown: for simulated raters."""

    prompt: Prompt
    responses: tuple[Response, ...]
    place: int = 0
    """The item's place in its study, from 0: how much of it came before."""


@dataclass(frozen=True, slots=True)
class DemonstrationAnswer:
    """The response a rater wrote."""

    text: str


@dataclass(frozen=True, slots=True)
class RankingAnswer:
    """Groups of letters, best first: `(("C",), ("A", "D"), ("B",))` says that A and D tie."""

    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class ComparisonAnswer:
    """The better of the two outputs, or a tie."""

    choice: Choice


@dataclass(frozen=True, slots=True)
class OutputRating:
    """Overall quality from 1 to 7, and those of the `FLAGS` that are set; a flag not named here was answered "no"."""

    likert: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RatingAnswer:
    """One rating a letter."""

    ratings: Mapping[str, OutputRating]


Answer = DemonstrationAnswer | RankingAnswer | ComparisonAnswer | RatingAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """An answer on its way in.

    `seconds` is the time spent on the task, `guideline_version` the guideline that the rater had before them, where
    the interface knows them; None takes the time since the task was given out, and the study's guideline of now.
    """

    task_id: str
    token: str
    answer: Answer
    seconds: float | None = None
    guideline_version: str | None = None


class SubmissionError(StoreError):
    """One of several submissions is wrong: the one at `index`. None of them was stored."""

    def __init__(self, message: str, index: int) -> None:
        self.index = index
        super().__init__(message)


# "extra": the slot had been given to someone else meanwhile; the answer is kept, and not counted.
Standing = Literal["counted", "extra"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a study is. `extra` answers came in late, after their slot had been given away."""

    slots: int
    answered: int
    leased: int
    open: int
    extra: int = 0

    @property
    def missing(self) -> int:
        return self.slots - self.answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One rater's blind comparison, unblinded. `preference` is 1.0 where the first won, 0.5 for a tie, else 0.0."""

    key: str
    prompt: Prompt
    first_source: str
    second_source: str
    first: Response
    second: Response
    preference: float
    shown_first: str
    rater: str
    rater_group: str
    origin: Origin
    guideline_version: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One rater's rating of one output, unblinded. `position` is where it was shown, from 0."""

    key: str
    prompt: Prompt
    response: Response
    source: str
    likert: int
    flags: tuple[str, ...] = field(default=())
    position: int
    rater: str
    rater_group: str
    origin: Origin
    guideline_version: str
    seconds: float


def order_shown(order_seed: int, count: int) -> tuple[int, ...]:
    """The outputs' indices in the order a slot shows them: uniform over orders, and the same for ever."""

    def place(index: int) -> bytes:
        return hashlib.blake2b(f"{order_seed}|{index}".encode(), digest_size=8).digest()

    return tuple(sorted(range(count), key=place))


def order_seed(study: str, key: str, slot: int) -> int:
    """The seed of a slot's order; 63 bits, the widest whole number that both databases store.

    It follows from public names alone, so that a run is the same to the byte in any store. So whoever knows the study's
    name and the item's key can compute it; raters are not shown keys.
    """
    digest = hashlib.blake2b("\x1f".join((study, key, str(slot))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_name(what: str, name: str) -> None:
    """Refuse a name that is blank or holds characters that cannot be seen (they also separate the parts of seeds)."""
    if not name.strip() or not name.isprintable():
        raise StoreError(f"The {what} is {name!r}; it must have at least one visible character and no control ones.")


def check_answer(kind: StudyKind, answer: Answer, letters: Sequence[str]) -> None:
    """Raise StoreError unless `answer` answers the whole of a task of this kind that showed these letters."""
    if kind == "demonstration" and isinstance(answer, DemonstrationAnswer):
        if not answer.text.strip():
            raise StoreError("The demonstration is empty; write the response that the assistant should give.")
        if any("\ud800" <= character <= "\udfff" for character in answer.text):
            raise StoreError("The demonstration holds half a character (an escape \\ud800-\\udfff alone); remove it.")
    elif kind == "ranking" and isinstance(answer, RankingAnswer):
        _check_letters("ranking", [letter for group in answer.groups for letter in group], letters)
        if not all(answer.groups):
            raise StoreError(f"The ranking {answer.groups!r} holds an empty group; leave it out.")
    elif kind == "comparison" and isinstance(answer, ComparisonAnswer):
        if answer.choice not in get_args(Choice):
            raise StoreError(f"The comparison is {answer.choice!r}; it must be one of {', '.join(get_args(Choice))}.")
    elif kind == "rating" and isinstance(answer, RatingAnswer):
        _check_letters("rating", list(answer.ratings), letters)
        for letter, rating in answer.ratings.items():
            _check_rating(letter, rating)
    else:
        raise StoreError(f"The task is a {kind}, the answer a {type(answer).__name__}; answer with a {kind}.")


def answer_to_json(answer: Answer) -> object:
    """The answer as it is stored and as it stands in files."""
    if isinstance(answer, DemonstrationAnswer):
        return answer.text
    if isinstance(answer, RankingAnswer):
        return [sorted(group) for group in answer.groups]
    if isinstance(answer, ComparisonAnswer):
        return answer.choice
    # The flags' own order, each once: equal ratings are then equal texts.
    return {
        letter: {"likert": rating.likert, "flags": [flag for flag in FLAGS if flag in rating.flags]}
        for letter, rating in sorted(answer.ratings.items())
    }


def answer_from_json(kind: StudyKind, value: object) -> Answer:
    """The inverse of `answer_to_json`; raises StoreError where `value` has another shape."""
    if kind == "demonstration" and isinstance(value, str):
        return DemonstrationAnswer(value)
    if kind == "comparison" and value in ("A", "B", "tie"):
        return ComparisonAnswer(value)
    if kind == "ranking" and isinstance(value, list) and all(isinstance(group, list) for group in value):
        letters = [letter for group in value for letter in group]
        if all(isinstance(letter, str) for letter in letters):
            return RankingAnswer(tuple(tuple(group) for group in value))
    if kind == "rating" and isinstance(value, dict):
        return RatingAnswer({str(letter): _rating_from_json(letter, rating) for letter, rating in value.items()})
    raise StoreError(f"The answer to a {kind} is {value!r}; expected {_EXPECTED[kind]}.")


_EXPECTED: Mapping[StudyKind, str] = {
    "demonstration": "the text of the response, as a string",
    "ranking": 'groups of letters, best first, such as [["C"], ["A", "D"], ["B"]]',
    "comparison": '"A", "B" or "tie"',
    "rating": 'one rating a letter, such as {"A": {"likert": 5, "flags": ["hallucination"]}}',
}


def _rating_from_json(letter: object, value: object) -> OutputRating:
    if isinstance(value, dict) and set(value) <= {"likert", "flags"}:
        likert, flags = value.get("likert"), value.get("flags", [])
        if isinstance(likert, int) and isinstance(flags, list) and all(isinstance(flag, str) for flag in flags):
            return OutputRating(likert, tuple(flags))
    raise StoreError(f'The rating of {letter} is {value!r}; expected such as {{"likert": 5, "flags": []}}.')


def _check_rating(letter: str, rating: OutputRating) -> None:
    likert = rating.likert
    if not isinstance(likert, int) or isinstance(likert, bool) or not 1 <= likert <= LIKERT_POINTS:
        raise StoreError(f"The quality of {letter} is {likert!r}; it must be a whole number from 1 to {LIKERT_POINTS}.")
    unknown = [flag for flag in rating.flags if flag not in FLAGS]
    if unknown:
        raise StoreError(f"The flags of {letter} hold {', '.join(unknown)}; allowed are {', '.join(FLAGS)}.")


def _check_letters(what: str, given: Sequence[str], letters: Sequence[str]) -> None:
    if sorted(given) == sorted(letters):
        return
    problems = [
        f"{problem} {', '.join(found)}"
        for problem, found in (
            ("missing", sorted(set(letters) - set(given))),
            ("unknown", sorted(set(given) - set(letters))),
            ("repeated", sorted({letter for letter in given if given.count(letter) > 1})),
        )
        if found
    ]
    raise StoreError(f"The {what} must name each of {', '.join(letters)} exactly once; {'; '.join(problems)}.")


def _check_choice(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"The {what} is {value!r}; it must be one of {', '.join(allowed)}.")
