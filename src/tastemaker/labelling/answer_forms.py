"""A task's form and its answer: the fields that a page shows, and what they say.

A form is a flat mapping of fields to texts, the same for what is posted, for a draft and for an answer shown again. A
field about one response ends in its letter, so that a draft can follow its rater to another order of the responses:

    demonstration   text
    ranking         rank-A, rank-B ...: 1 is best, equal ranks tie
    comparison      choice: A, B or tie
    rating          likert-A: 1 to 7; hallucination-A and the other flags: yes, or not there

A form is checked whole and never repaired; each refusal is a sentence for whoever filled it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from tastemaker.errors import StoreError
from tastemaker.store.tasks import (
    FLAGS,
    LIKERT_POINTS,
    Answer,
    ComparisonAnswer,
    DemonstrationAnswer,
    OutputRating,
    RankingAnswer,
    RatingAnswer,
    Task,
)

# Ten times what anybody writes by hand; percent-encoded, a form of it is still below what the server takes.
MAX_TEXT = 50_000

# The yes/no fields of Table 3 as a rater reads them.
FLAG_LABELS: Mapping[str, str] = {
    "fails_to_follow_instruction": "Does not do what was asked",
    "inappropriate_for_customer_assistant": "Unfit for a customer's assistant",
    "hallucination": "Makes things up that the given text does not say",
    "satisfies_constraint": "Keeps to the constraint that was given",
    "sexual_content": "Sexual content",
    "violent_content": "Violent content",
    "encourages_harm": "Encourages violence, abuse, terror or self-harm, or fails to discourage it",
    "denigrates_protected_class": "Denigrates a group of people",
    "harmful_advice": "Gives harmful advice",
    "expresses_opinion": "Expresses an opinion",
    "expresses_moral_judgment": "Expresses a moral judgment",
}


def field_names(task: Task) -> frozenset[str]:
    """The fields of a task's form."""
    letters = [output.letter for output in task.outputs]
    if task.kind == "demonstration":
        return frozenset({"text"})
    if task.kind == "ranking":
        return frozenset(f"rank-{letter}" for letter in letters)
    if task.kind == "comparison":
        return frozenset({"choice"})
    return frozenset(f"{stem}-{letter}" for stem in ("likert", *FLAGS) for letter in letters)


def check_fields(task: Task, fields: Mapping[str, str]) -> None:
    """Refuse fields that the task's form does not have, and texts that cannot be kept."""
    unknown = sorted(set(fields) - field_names(task))
    if unknown:
        raise StoreError(f"This task has no field {unknown[0][:80]!r}; open it anew and try again.")
    for name, value in fields.items():
        if len(value) > MAX_TEXT:
            raise StoreError(f"The text has {len(value)} characters; {MAX_TEXT} are allowed.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise StoreError(f"The field {name!r} holds half a character, which cannot be kept; remove it.")


def answer_of(task: Task, fields: Mapping[str, str]) -> Answer:
    """What a filled-in form says."""
    check_fields(task, fields)
    letters = [output.letter for output in task.outputs]
    if task.kind == "demonstration":
        return DemonstrationAnswer(fields.get("text", ""))  # that it is not empty, the store checks
    if task.kind == "ranking":
        return _ranking(letters, fields)
    if task.kind == "comparison":
        return _comparison(fields.get("choice", ""))
    return _rating(letters, fields)


def fields_of(answer: Answer) -> dict[str, str]:
    """The form of an answer, filled in."""
    if isinstance(answer, DemonstrationAnswer):
        # Half a surrogate pair came by a file once and is kept, but has no place on a page.
        return {"text": answer.text.encode("utf-8", "replace").decode()}
    if isinstance(answer, ComparisonAnswer):
        return {"choice": answer.choice}
    if isinstance(answer, RankingAnswer):
        return {f"rank-{letter}": str(rank) for rank, group in enumerate(answer.groups, 1) for letter in group}
    return {
        name: value
        for letter, rating in answer.ratings.items()
        for name, value in (
            (f"likert-{letter}", str(rating.likert)),
            *((f"{flag}-{letter}", "yes") for flag in rating.flags),
        )
    }


def _ranking(letters: Sequence[str], fields: Mapping[str, str]) -> RankingAnswer:
    missing = [letter for letter in letters if not fields.get(f"rank-{letter}")]
    if missing:
        raise StoreError(f"Give every response a rank; there is none yet for {_listed(missing)}.")
    rank = {letter: _step(f"rank of {letter}", fields[f"rank-{letter}"], len(letters)) for letter in letters}
    in_order = sorted(letters, key=lambda letter: (rank[letter], letter))
    return RankingAnswer(tuple(tuple(group) for _, group in groupby(in_order, key=rank.__getitem__)))


def _comparison(choice: str) -> ComparisonAnswer:
    if choice not in ("A", "B", "tie"):
        raise StoreError(
            f"The choice is {choice[:80]!r}; it must be A, B or tie."
            if choice
            else "Choose the better response, or say that neither is."
        )
    return ComparisonAnswer(choice)  # type: ignore[arg-type]


def _rating(letters: Sequence[str], fields: Mapping[str, str]) -> RatingAnswer:
    missing = [letter for letter in letters if not fields.get(f"likert-{letter}")]
    if missing:
        raise StoreError(f"Give every response a quality from 1 to 7; there is none yet for {_listed(missing)}.")
    for name, value in fields.items():
        if not name.startswith("likert-") and value != "yes":
            raise StoreError(f"The field {name!r} is {value[:80]!r}; it must be 'yes', or left out.")
    return RatingAnswer(
        {
            letter: OutputRating(
                _step(f"quality of {letter}", fields[f"likert-{letter}"], LIKERT_POINTS),
                tuple(flag for flag in FLAGS if f"{flag}-{letter}" in fields),
            )
            for letter in letters
        }
    )


def _step(what: str, value: str, most: int) -> int:
    if value not in map(str, range(1, most + 1)):
        raise StoreError(f"The {what} is {value[:80]!r}; it must be a whole number from 1 to {most}.")
    return int(value)


def _listed(letters: Sequence[str]) -> str:
    *first, last = letters
    return f"{', '.join(first)} and {last}" if first else last
