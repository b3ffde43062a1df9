"""A task's form says exactly what its answer says, and nothing else is taken for an answer."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tastemaker.errors import StoreError
from tastemaker.labelling.answer_forms import FLAG_LABELS, MAX_TEXT, answer_of, field_names, fields_of
from tastemaker.records import Message
from tastemaker.store.tasks import (
    FLAGS,
    LETTERS,
    Answer,
    ComparisonAnswer,
    DemonstrationAnswer,
    OutputRating,
    RankingAnswer,
    RatingAnswer,
    ShownOutput,
    StudyKind,
    Task,
    check_answer,
)


def task(kind: StudyKind, outputs: int) -> Task:
    shown = tuple(ShownOutput(letter=letter, text="Text") for letter in LETTERS[:outputs])
    question = (Message("user", "Question?"),)
    return Task(id="0", token="0", kind=kind, guideline_version="v1", messages=question, outputs=shown)


@st.composite
def answered(draw: st.DrawFn) -> tuple[Task, Answer]:
    kind = draw(st.sampled_from(("demonstration", "ranking", "comparison", "rating")))
    if kind == "demonstration":
        return task("demonstration", 0), DemonstrationAnswer(draw(st.text(st.characters(exclude_categories=["Cs"]))))
    if kind == "comparison":
        return task("comparison", 2), ComparisonAnswer(draw(st.sampled_from(("A", "B", "tie"))))
    count = draw(st.integers(2, 26))
    letters = LETTERS[:count]
    if kind == "ranking":
        ranks = draw(st.lists(st.integers(1, count), min_size=count, max_size=count))
        groups = [
            tuple(letter for letter, own in zip(letters, ranks, strict=True) if own == rank) for rank in set(ranks)
        ]
        return task("ranking", count), RankingAnswer(tuple(groups))
    flags = st.lists(st.sampled_from(FLAGS), unique=True).map(lambda some: tuple(sorted(some, key=FLAGS.index)))
    ratings = {letter: OutputRating(draw(st.integers(1, 7)), draw(flags)) for letter in letters}
    return task("rating", count), RatingAnswer(ratings)


@given(answered())
def test_an_answer_shown_again_says_the_same(found: tuple[Task, Answer]) -> None:
    asked, answer = found
    fields = fields_of(answer)
    assert set(fields) <= field_names(asked)
    assert answer_of(asked, fields) == answer
    if asked.kind != "demonstration":
        check_answer(asked.kind, answer_of(asked, fields), [output.letter for output in asked.outputs])


def test_equal_ranks_tie_and_gaps_between_ranks_mean_nothing() -> None:
    fields = {"rank-A": "3", "rank-B": "1", "rank-C": "3"}
    assert answer_of(task("ranking", 3), fields) == RankingAnswer((("B",), ("A", "C")))


def test_every_flag_has_its_words() -> None:
    assert tuple(FLAG_LABELS) == FLAGS
    assert len(set(FLAG_LABELS.values())) == len(FLAGS)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        ("ranking", {"rank-A": "1", "rank-B": "2"}, "no.* yet for C"),
        ("ranking", {}, "none yet for A, B and C"),
        ("ranking", {"rank-A": "1", "rank-B": "2", "rank-C": "4"}, "rank of C is '4'; .* from 1 to 3"),
        ("ranking", {"rank-A": "1", "rank-B": "0", "rank-C": "1"}, "rank of B is '0'"),
        ("ranking", {"rank-A": "NaN", "rank-B": "2", "rank-C": "1"}, "rank of A is 'NaN'"),
        ("ranking", {"rank-A": "1", "rank-B": "²", "rank-C": "1"}, "rank of B"),
        ("ranking", {"rank-A": "1", "rank-B": "2", "rank-C": "1", "rank-D": "1"}, "no field 'rank-D'"),
        ("comparison", {}, "Choose the better response"),
        ("comparison", {"choice": "C"}, "must be A, B or tie"),
        ("comparison", {"choice": "A", "rank-A": "1"}, "no field 'rank-A'"),
        ("rating", {"likert-A": "7", "likert-B": "1"}, "none yet for C"),
        ("rating", {"likert-A": "7", "likert-B": "8", "likert-C": "1"}, "quality of B is '8'; .* from 1 to 7"),
        ("rating", {"likert-A": "7", "likert-B": "1e0", "likert-C": "1"}, "quality of B is '1e0'"),
        ("rating", {"likert-A": "7", "likert-B": "1", "likert-C": "1", "hallucination-A": "no"}, "must be 'yes'"),
        ("rating", {"likert-A": "7", "likert-B": "1", "likert-C": "1", "kindness-A": "yes"}, "no field 'kindness-A'"),
        ("demonstration", {"text": "x" * (MAX_TEXT + 1)}, f"{MAX_TEXT} are allowed"),
        ("demonstration", {"text": "\ud800"}, "half a character"),
        ("demonstration", {"text": "x", "choice": "A"}, "no field 'choice'"),
    ],
)
def test_what_is_no_answer_is_refused_in_a_sentence(kind: StudyKind, fields: dict[str, str], sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence) as refusal:
        answer_of(task(kind, {"demonstration": 0, "comparison": 2}.get(kind, 3)), fields)
    assert re.fullmatch(r"[A-Z].*\.", str(refusal.value))
