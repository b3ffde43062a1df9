"""What stages read of a study's answers: those that count, in the records that training and evaluation take.

The newest revision of each counted answer, by item, then slot, whoever answered when: files written from these are the
same bytes every time. Answers to gold and screening items say something about their raters and nothing about the
outputs: they are not here. `given` reads the database.
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Demonstration, Ranking
from tastemaker.store.given import Given, all_given, as_ranking, of_studies
from tastemaker.store.questions import Study
from tastemaker.store.tasks import (
    LETTERS,
    Comparison,
    ComparisonAnswer,
    DemonstrationAnswer,
    RankingAnswer,
    Rating,
    RatingAnswer,
    StudyKind,
)


def demonstrations(connection: sa.Connection, study: Study) -> list[Demonstration]:
    """All demonstrations of a study."""
    found: list[Demonstration] = []
    for one in _counted(connection, study, "demonstration"):
        assert isinstance(one.answer, DemonstrationAnswer)
        found.append(Demonstration(prompt=one.item.prompt, response=one.answer.text, author=one.author))
    return found


def rankings(connection: sa.Connection, study: Study) -> list[Ranking]:
    """All rankings of a study."""
    found: list[Ranking] = []
    for one in _counted(connection, study, "ranking"):
        assert isinstance(one.answer, RankingAnswer)
        found.append(as_ranking(one.item, one.answer, one.author))
    return found


def comparisons(connection: sa.Connection, study: Study) -> list[Comparison]:
    """All comparisons of a study."""
    found: list[Comparison] = []
    for one in _counted(connection, study, "comparison"):
        assert isinstance(one.answer, ComparisonAnswer)
        first, second = one.item.outputs
        found.append(
            Comparison(
                key=one.item.key,
                prompt=one.item.prompt,
                first_source=first.source,
                second_source=second.source,
                first=first.response,
                second=second.response,
                preference={"A": 1.0, "tie": 0.5, "B": 0.0}[one.answer.choice],
                shown_first=one.item.outputs[one.order_shown[0]].source,
                rater=one.rater,
                rater_group=one.rater_group,
                origin=one.origin,
                guideline_version=one.guideline_version,
                seconds=one.seconds,
            )
        )
    return found


def ratings(connection: sa.Connection, study: Study) -> list[Rating]:
    """All ratings of a study, one an output."""
    found: list[Rating] = []
    for one in _counted(connection, study, "rating"):
        assert isinstance(one.answer, RatingAnswer)
        for place, output in enumerate(one.item.outputs):
            rating = one.answer.ratings[LETTERS[place]]
            found.append(
                Rating(
                    key=one.item.key,
                    prompt=one.item.prompt,
                    response=output.response,
                    source=output.source,
                    likert=rating.likert,
                    flags=rating.flags,
                    position=one.order_shown.index(place),
                    rater=one.rater,
                    rater_group=one.rater_group,
                    origin=one.origin,
                    guideline_version=one.guideline_version,
                    seconds=one.seconds,
                )
            )
    return found


def _counted(connection: sa.Connection, study: Study, kind: StudyKind) -> Iterator[Given]:
    if study.kind != kind:
        raise StoreError(f"Study {study.name!r} asks for a {study.kind}; it has no {kind} answers. Read its own kind.")
    return (one for one in all_given(connection, of_studies([study.id])) if one.counts and one.is_work)
