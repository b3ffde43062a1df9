"""What the store knows of one rater's own work: their leases, answers and guidelines. Another's do not exist here."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.store.admission import visible_studies
from tastemaker.store.claiming import Person
from tastemaker.store.questions import read_messages
from tastemaker.store.schema import (
    answers,
    assignments,
    guidelines,
    items,
    leases,
    newest_revision,
    remarks,
    studies,
)
from tastemaker.store.tasks import Guideline, StudyKind
from tastemaker.store.views import DeskProgress, HistoryEntry, NotYours, TaskState

DAY = 86_400.0
OPENING_CHARACTERS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLease:
    """A rater's lease of a task, the state of its slot, and the newest answer under it, if any."""

    id: int
    token: str
    rater_id: int
    started_at: float
    task_id: str
    item_id: int
    order_seed: int
    study_id: int
    study: str
    kind: StudyKind
    counts: bool
    held: bool
    skipped: bool
    leased_until: float | None
    revision: int | None
    body: object
    submitted_at: float | None
    guideline_version: str | None

    @property
    def state(self) -> TaskState:
        if self.revision is not None:
            return "answered"
        if self.held:
            return "yours"
        return "skipped" if self.skipped else "lost"


def find_own(connection: sa.Connection, person: Person, task_id: str) -> OwnLease:
    """The lease under which a task is or was this rater's: the answered one, else the one that counts, or the last."""
    # An id of another form is nobody's, and databases refuse some characters.
    asked = _OWN.where(assignments.c.id == task_id, leases.c.rater_id == person.id)
    rows = connection.execute(asked).all() if re.fullmatch("[0-9a-f]{32}", task_id) else ()
    found = [OwnLease(**row._mapping) for row in rows]
    if not found:
        raise NotYours(f"There is no task {task_id!r} for you; your home page shows where to go on.")
    return max(found, key=lambda lease: (lease.revision is not None, lease.counts, lease.id))


def history(connection: sa.Connection, person: Person, *, limit: int, before: OwnLease | None) -> list[HistoryEntry]:
    """A rater's answers, latest first by when each was first given: correcting one does not move it."""
    first = answers.alias()
    query = (
        sa.select(
            assignments.c.id,
            studies.c.name,
            studies.c.kind,
            items.c.messages,
            answers.c.revision,
            _COUNTS.label("counts"),
            first.c.submitted_at,
        )
        .select_from(leases)
        .join(first, sa.and_(first.c.lease_id == leases.c.id, first.c.revision == 1))
        .join(answers, sa.and_(answers.c.lease_id == leases.c.id, answers.c.revision == newest_revision()))
        .join(assignments, assignments.c.id == leases.c.assignment_id)
        .join(items, items.c.id == assignments.c.item_id)
        .join(studies, studies.c.id == assignments.c.study_id)
        .where(leases.c.rater_id == person.id)
        .order_by(first.c.id.desc())
        .limit(limit)
    )
    if before is not None:
        seen = answers.alias()
        last = sa.select(seen.c.id).where(seen.c.lease_id == before.id, seen.c.revision == 1).scalar_subquery()
        query = query.where(first.c.id < last)
    return [
        HistoryEntry(
            task_id=row.id,
            study=row.name,
            kind=row.kind,
            opening=_opening(read_messages(row.messages)[-1].content),
            revision=row.revision,
            standing="counted" if row.counts else "extra",
            answered_at=row.submitted_at,
        )
        for row in connection.execute(query)
    ]


def made_progress(connection: sa.Connection, person: Person, *, now: float) -> DeskProgress:
    """How many tasks a rater has answered, today and in all."""
    today = answers.c.submitted_at >= now - now % DAY
    total, count, seconds = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count(sa.case((today, 1))),
            sa.func.coalesce(sa.func.sum(sa.case((today, answers.c.seconds))), 0.0),
        )
        .select_from(leases)
        .join(answers, answers.c.lease_id == leases.c.id)
        .where(leases.c.rater_id == person.id, answers.c.revision == 1)
    ).one()
    return DeskProgress(today=count, total=total, seconds_today=seconds)


def own_guideline(connection: sa.Connection, person: Person, version: str) -> Guideline:
    """A guideline under which a rater was given a task, or that a study which they may see has now."""
    answered = (
        sa.exists()
        .where(answers.c.guideline_version == version, leases.c.id == answers.c.lease_id)
        .where(leases.c.rater_id == person.id)
    )
    readable = version.isprintable() and (
        version in [study.guideline_version for study in visible_studies(connection, person)]
        or connection.execute(sa.select(sa.literal(1)).where(answered)).one_or_none() is not None
    )
    if not readable:
        raise NotYours(f"There is no guideline {version!r} for you; each task says which it goes by.")
    text = connection.execute(sa.select(guidelines.c.text).where(guidelines.c.version == version)).scalar_one()
    return Guideline(version=version, text=text)


def _opening(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= OPENING_CHARACTERS else words[: OPENING_CHARACTERS - 1] + "…"


# Whether the slot names the lease: an answer under it is the slot's answer.
_COUNTS = sa.func.coalesce(assignments.c.claim_token, "") == leases.c.token

_OWN = (
    sa.select(
        leases.c.id,
        leases.c.token,
        leases.c.rater_id,
        leases.c.started_at,
        assignments.c.id.label("task_id"),
        assignments.c.item_id,
        assignments.c.order_seed,
        assignments.c.study_id,
        studies.c.name.label("study"),
        studies.c.kind,
        _COUNTS.label("counts"),
        sa.and_(_COUNTS, assignments.c.state == "leased").label("held"),
        sa.exists().where(remarks.c.lease_id == leases.c.id, remarks.c.kind == "skip").label("skipped"),
        assignments.c.leased_until,
        answers.c.revision,
        answers.c.body,
        answers.c.submitted_at,
        answers.c.guideline_version,
    )
    .select_from(leases)
    .join(assignments, assignments.c.id == leases.c.assignment_id)
    .join(studies, studies.c.id == assignments.c.study_id)
    .outerjoin(answers, sa.and_(answers.c.lease_id == leases.c.id, answers.c.revision == newest_revision()))
)
