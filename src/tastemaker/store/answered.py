"""The reading side of the store's SQL: answers joined again to what produced the outputs.

Only the newest revision of each counted answer, by item, then slot, whoever answered when: files written from these
are the same bytes every time. Letters are turned back into the order in which the outputs were queued. Answers to gold
and screening items say something about their raters and nothing about the outputs: they are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Author, Demonstration, Origin, Prompt, Ranking, Response
from tastemaker.store.claiming import is_work
from tastemaker.store.questions import Study, read_prompt
from tastemaker.store.schema import answers, assignments, items, leases, newest_revision, outputs, raters
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    Comparison,
    ComparisonAnswer,
    DemonstrationAnswer,
    NewOutput,
    RankingAnswer,
    Rating,
    RatingAnswer,
    StudyKind,
    answer_from_json,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """One counted answer with its question. `shown[i]` is the queued place of the output shown under letter i."""

    key: str
    prompt: Prompt
    outputs: tuple[NewOutput, ...]
    answer: Answer
    shown: tuple[int, ...]
    rater: str
    rater_group: str
    origin: Origin
    guideline_version: str
    seconds: float

    @property
    def author(self) -> Author:
        return Author(
            rater=self.rater,
            rater_group=self.rater_group,
            origin=self.origin,
            guideline_version=self.guideline_version,
        )

    def queued_place(self, letter: str) -> int:
        return self.shown[LETTERS.index(letter)]


def demonstrations(connection: sa.Connection, study: Study) -> list[Demonstration]:
    """All demonstrations of a study."""
    found: list[Demonstration] = []
    for row in _answered(connection, study, "demonstration"):
        assert isinstance(row.answer, DemonstrationAnswer)
        found.append(Demonstration(prompt=row.prompt, response=row.answer.text, author=row.author))
    return found


def rankings(connection: sa.Connection, study: Study) -> list[Ranking]:
    """All rankings of a study."""
    found: list[Ranking] = []
    for row in _answered(connection, study, "ranking"):
        assert isinstance(row.answer, RankingAnswer)
        order = tuple(tuple(sorted(row.queued_place(letter) for letter in group)) for group in row.answer.groups)
        responses = tuple(output.response for output in row.outputs)
        found.append(Ranking(prompt=row.prompt, responses=responses, order=order, author=row.author))
    return found


def comparisons(connection: sa.Connection, study: Study) -> list[Comparison]:
    """All comparisons of a study."""
    found: list[Comparison] = []
    for row in _answered(connection, study, "comparison"):
        assert isinstance(row.answer, ComparisonAnswer)
        choice = row.answer.choice
        first, second = row.outputs
        found.append(
            Comparison(
                key=row.key,
                prompt=row.prompt,
                first_source=first.source,
                second_source=second.source,
                first=first.response,
                second=second.response,
                preference=0.5 if choice == "tie" else float(row.queued_place(choice) == 0),
                shown_first=row.outputs[row.shown[0]].source,
                rater=row.rater,
                rater_group=row.rater_group,
                origin=row.origin,
                guideline_version=row.guideline_version,
                seconds=row.seconds,
            )
        )
    return found


def ratings(connection: sa.Connection, study: Study) -> list[Rating]:
    """All ratings of a study, one an output."""
    found: list[Rating] = []
    for row in _answered(connection, study, "rating"):
        assert isinstance(row.answer, RatingAnswer)
        for place, output in enumerate(row.outputs):
            position = row.shown.index(place)
            rating = row.answer.ratings[LETTERS[position]]
            found.append(
                Rating(
                    key=row.key,
                    prompt=row.prompt,
                    response=output.response,
                    source=output.source,
                    likert=rating.likert,
                    flags=rating.flags,
                    position=position,
                    rater=row.rater,
                    rater_group=row.rater_group,
                    origin=row.origin,
                    guideline_version=row.guideline_version,
                    seconds=row.seconds,
                )
            )
    return found


def _answered(connection: sa.Connection, study: Study, kind: StudyKind) -> Iterator[_Answered]:
    if study.kind != kind:
        raise StoreError(f"Study {study.name!r} asks for a {study.kind}; it has no {kind} answers. Read its own kind.")
    queued = _outputs(connection, study)
    prompts: dict[int, Prompt] = {}
    rows = connection.execute(
        sa.select(
            items.c.id.label("item_id"),
            items.c.key,
            items.c.messages,
            items.c.category,
            items.c.private,
            answers.c.body,
            answers.c.order_shown,
            answers.c.origin,
            answers.c.guideline_version,
            answers.c.seconds,
            raters.c.name.label("rater"),
            raters.c.rater_group,
        )
        .select_from(assignments)
        .join(items, items.c.id == assignments.c.item_id)
        .join(leases, sa.and_(leases.c.assignment_id == assignments.c.id, leases.c.token == assignments.c.claim_token))
        .join(answers, sa.and_(answers.c.lease_id == leases.c.id, answers.c.revision == newest_revision()))
        .join(raters, raters.c.id == leases.c.rater_id)
        .where(assignments.c.study_id == study.id, assignments.c.state == "done", is_work(study))
        .order_by(assignments.c.sequence)
    )
    for row in rows:
        if row.item_id not in prompts:
            prompts[row.item_id] = read_prompt(row.messages, row.category, row.private)
        yield _Answered(
            key=row.key,
            prompt=prompts[row.item_id],
            outputs=queued.get(row.item_id, ()),
            answer=answer_from_json(kind, row.body),
            shown=tuple(row.order_shown),
            rater=row.rater,
            rater_group=row.rater_group,
            origin=row.origin,
            guideline_version=row.guideline_version,
            seconds=row.seconds,
        )


def _outputs(connection: sa.Connection, study: Study) -> dict[int, tuple[NewOutput, ...]]:
    found: dict[int, list[NewOutput]] = {}
    for row in connection.execute(
        sa.select(outputs.c.item_id, outputs.c.text, outputs.c.finished, outputs.c.source)
        .join(items, items.c.id == outputs.c.item_id)
        .where(items.c.study_id == study.id)
        .order_by(outputs.c.item_id, outputs.c.position)
    ):
        response = Response(text=row.text, finished=row.finished)
        found.setdefault(row.item_id, []).append(NewOutput(response=response, source=row.source))
    return {item_id: tuple(rows) for item_id, rows in found.items()}
