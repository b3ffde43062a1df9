"""The answering side of the store's SQL: checking answers whole, and appending them.

An answer hangs on the lease under which it was given. It counts if its lease is the one that the slot names; whoever
submits under an ended lease gets the slot back if nobody has it and else is kept as an extra answer, until the slot
opens again (`claiming.end_leases`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import Origin
from tastemaker.store.claiming import give_back
from tastemaker.store.database import Store
from tastemaker.store.questions import CHUNK, replaced_guidelines
from tastemaker.store.schema import (
    ANSWER_SCHEMA,
    answers,
    assignments,
    leases,
    newest_revision,
    outputs,
    raters,
    studies,
)
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    Standing,
    StudyKind,
    Submission,
    SubmissionError,
    answer_to_json,
    check_answer,
    order_shown,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lease:
    """One rater's go at one slot, the state of that slot, and the newest answer under this lease, if any."""

    id: int
    token: str
    rater: str
    rater_id: int
    origin: Origin
    started_at: float
    task_id: str
    item_id: int
    state: str
    holder: int | None
    claim_token: str | None
    study: str
    kind: StudyKind
    guideline_version: str
    order_seed: int
    count: int
    revision: int | None
    body: object
    seconds: float | None

    @property
    def counts(self) -> bool:
        return self.claim_token == self.token

    def check(self, answer: Answer) -> None:
        check_answer(self.kind, answer, LETTERS[: self.count])


class Submitting:
    """The submissions of one write transaction."""

    def __init__(self, store: Store, connection: sa.Connection, *, now: float) -> None:
        self._store = store
        self._connection = connection
        self._now = now

    def submit(self, submissions: Sequence[Submission], *, correct: bool) -> list[Standing]:
        """Check all answers, then store all."""
        accepted = self._checked(submissions, correct=correct)
        self._finish([lease for _, lease in accepted if lease.counts and lease.state == "leased"])
        standings: list[Standing] = []
        rows: list[dict[str, object]] = []
        for submission, lease in accepted:
            counts = lease.counts or (lease.revision is None and self._give_back(lease))
            standings.append("counted" if counts else "extra")
            row = self._row(lease, submission.answer, submission.seconds, submission.guideline_version)
            if lease.revision is None or row["body"] != lease.body:
                rows.append(row)
        if rows:
            self._connection.execute(sa.insert(answers), rows)
        return standings

    def revise(
        self, task_id: str, rater: str, answer: Answer, *, seconds: float, guideline_version: str | None = None
    ) -> None:
        """Append a revision to the rater's answer to a task."""
        given = [
            lease for lease in self._leases([task_id]).values() if lease.rater == rater and lease.revision is not None
        ]
        if not given:
            raise StoreError(f"Rater {rater!r} has not answered task {task_id!r}; submit an answer before revising it.")
        lease = max(given, key=lambda lease: (lease.counts, lease.id))
        lease.check(answer)
        self._check_guideline(lease, guideline_version)
        row = self._row(lease, answer, seconds, guideline_version)
        if row["body"] != lease.body:
            self._connection.execute(sa.insert(answers), [row])

    def _checked(self, submissions: Sequence[Submission], *, correct: bool) -> list[tuple[Submission, _Lease]]:
        found = self._leases([submission.task_id for submission in submissions])
        accepted: list[tuple[Submission, _Lease]] = []
        seen: set[tuple[str, str]] = set()
        for index, submission in enumerate(submissions):
            name = (submission.task_id, submission.token)
            if name in seen:
                raise SubmissionError(f"Task {submission.task_id!r} is answered twice at once; answer it once.", index)
            seen.add(name)
            lease = found.get(name)
            if lease is None:
                raise SubmissionError(
                    f"Task {submission.task_id!r} was never given out under this token; answer tasks with the id and "
                    "the token they were claimed with.",
                    index,
                )
            try:
                lease.check(submission.answer)
                self._check_guideline(lease, submission.guideline_version)
            except StoreError as error:
                raise SubmissionError(str(error), index) from error
            if lease.revision is not None and not correct and answer_to_json(submission.answer) != lease.body:
                raise SubmissionError(
                    f"Task {submission.task_id!r} has been answered otherwise already; to correct it, revise it.", index
                )
            accepted.append((submission, lease))
        return accepted

    def _leases(self, task_ids: Sequence[str]) -> dict[tuple[str, str], _Lease]:
        """All leases of these tasks by task and token; from here on this transaction is the studies' only writer."""
        chunks = [task_ids[start : start + CHUNK] for start in range(0, len(task_ids), CHUNK)]
        concerned: set[int] = set()
        for chunk in chunks:
            statement = sa.select(assignments.c.study_id).where(assignments.c.id.in_(chunk)).distinct()
            concerned.update(self._connection.execute(statement).scalars())
        self._store.lock_studies(self._connection, concerned)
        return {
            (row.task_id, row.token): _Lease(**row._mapping)
            for chunk in chunks
            for row in self._connection.execute(_LEASES.where(assignments.c.id.in_(chunk)))
        }

    def _finish(self, done: Sequence[_Lease]) -> None:
        """Mark slots answered. They are leased under these very tokens, which only this transaction may change."""
        if done:
            self._connection.execute(
                sa.update(assignments)
                .where(assignments.c.id == sa.bindparam("task"))
                .values(state="done", leased_until=None),
                [{"task": lease.task_id} for lease in done],
            )

    def _give_back(self, lease: _Lease) -> bool:
        return give_back(self._connection, lease.task_id, lease.item_id, lease.rater_id, lease.token)

    def _check_guideline(self, lease: _Lease, version: str | None) -> None:
        if version is None or version == lease.guideline_version:
            return
        if version not in replaced_guidelines(self._connection, lease.study):
            raise StoreError(
                f"Study {lease.study!r} never had the guideline {version!r}; it has {lease.guideline_version!r} now."
            )

    def _row(
        self, lease: _Lease, answer: Answer, seconds: float | None, guideline_version: str | None
    ) -> dict[str, object]:
        if lease.seconds is not None:
            spent = lease.seconds + (seconds or 0.0)
        else:
            spent = max(0.0, self._now - lease.started_at) if seconds is None else seconds
        return {
            "lease_id": lease.id,
            "revision": 1 if lease.revision is None else lease.revision + 1,
            "body": answer_to_json(answer),
            "answer_schema": ANSWER_SCHEMA,
            "guideline_version": guideline_version or lease.guideline_version,
            "order_shown": list(order_shown(lease.order_seed, lease.count)),
            "started_at": lease.started_at,
            "submitted_at": self._now,
            "seconds": spent,
            "origin": lease.origin,
        }


def _lease_query() -> sa.Select[tuple[object, ...]]:
    count = (
        sa.select(sa.func.count())
        .select_from(outputs)
        .where(outputs.c.item_id == assignments.c.item_id)
        .correlate(assignments)
        .scalar_subquery()
    )
    return (
        sa.select(
            leases.c.id,
            leases.c.token,
            raters.c.name.label("rater"),
            leases.c.rater_id,
            raters.c.origin,
            leases.c.started_at,
            assignments.c.id.label("task_id"),
            assignments.c.item_id,
            assignments.c.state,
            assignments.c.rater_id.label("holder"),
            assignments.c.claim_token,
            studies.c.name.label("study"),
            studies.c.kind,
            studies.c.guideline_version,
            assignments.c.order_seed,
            count.label("count"),
            answers.c.revision,
            answers.c.body,
            answers.c.seconds,
        )
        .join(assignments, assignments.c.id == leases.c.assignment_id)
        .join(studies, studies.c.id == assignments.c.study_id)
        .join(raters, raters.c.id == leases.c.rater_id)
        .outerjoin(answers, sa.and_(answers.c.lease_id == leases.c.id, answers.c.revision == newest_revision()))
    )


_LEASES = _lease_query()
