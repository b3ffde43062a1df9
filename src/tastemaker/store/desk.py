"""The rater's desk: what a rater's pages and the raters' API stand on (InstructGPT section 3.4, appendix B).

Every method takes the rater's name and works on what is theirs; another's task does not exist for them (`NotYours`).
What comes back is blind: `views` has the whole of it. The queue, its leases and the storing of answers are those of
`LabelService`; the desk adds drafts, skips, flags, undo, history, hidden gold, the screening test, and that a rater has
few tasks open at a time.

A lease lasts as long as the study says, and up to four hours where three times the median time of its answers is more.
Nothing that a rater wrote depends on it: an answer or a draft that comes late is kept.

Leases, answers and remarks are append-only rows of their own with rater and time; so acts at the desk are not written
to the audit log a second time, but for what overwrites (`set_topics`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store import audit, claiming, drafts, hidden, questions
from tastemaker.store.admission import Admission, find_study, visible_studies
from tastemaker.store.claiming import Person, find_rater
from tastemaker.store.database import Store
from tastemaker.store.own import OwnLease, find_own, history, made_progress, own_guideline
from tastemaker.store.questions import Study
from tastemaker.store.schema import answers, assignments, leases, rater_profiles, remarks
from tastemaker.store.submitting import Submitting
from tastemaker.store.tasks import Answer, Guideline, Standing, Submission, answer_from_json, check_name
from tastemaker.store.views import (
    FLAG_REASONS,
    SKIP_REASONS,
    TOPIC_LEVELS,
    DeskProgress,
    DeskStudy,
    GivenAnswer,
    HistoryEntry,
    RaterProfile,
    RevisionConflict,
    StudyLocked,
    TaskView,
)

# Label Studio takes three times the mean; the median is not moved by those who went to lunch.
LEASE_MEDIANS = 3.0
# Nobody measures the time of an answer from a file: it has all the days since its task was given out.
LEASE_MOST_SECONDS = 4 * 3600.0
_TIMED_ANSWERS = 101
_TIMES_KEPT_SECONDS = 60.0

MAX_NOTE = 4_000
MAX_TOPICS = 50
MAX_TOPIC_NAME = 100
MAX_HISTORY = 200


@dataclass(frozen=True, slots=True)
class _Median:
    """What a study's answers took, as it was found at a time."""

    at: float
    seconds: float


class Desk:
    """What one rater at a time sees and does."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._medians: dict[int, _Median] = {}

    # --- getting to work ----------------------------------------------------------------------------------------

    def studies(self, rater: str) -> list[DeskStudy]:
        """The rater's studies, oldest first; closed ones while a task of theirs is held."""
        with self._store.read() as connection:
            person = find_rater(connection, rater)
            now = self._clock()
            admission = Admission(connection, person, now=now)
            return [
                _desk_study(connection, study, person, admission, now=now)
                for study in visible_studies(connection, person)
                if study.closed_at is None or study.name in admission.begun
            ]

    def next_task(self, rater: str, study: str) -> TaskView | None:
        """The task that the rater holds, or else the next one; None where nothing is left for them.

        Raises StudyLocked where they may not work on it now.
        """
        with self._store.write() as connection:
            person = find_rater(connection, rater, alone=True)
            self._store.lock_studies(connection, [find_study(connection, person, study).id])
            found = find_study(connection, person, study)  # as it is now: a lead may have closed it meanwhile
            now = self._clock()
            refusal = Admission(connection, person, now=now).refusal(found)
            if refusal is not None:
                raise StudyLocked(refusal)
            until = now + self._lease_seconds(connection, found, now=now)
            task_id = _resume(connection, found, person, until=until)
            if task_id is None:
                task_id = _hand_out(connection, found, person, now=now, until=until)
            return None if task_id is None else self._view(connection, find_own(connection, person, task_id))

    def task(self, rater: str, task_id: str) -> TaskView:
        """A task that the rater was given, whatever has become of it."""
        with self._store.read() as connection:
            return self._view(connection, find_own(connection, find_rater(connection, rater), task_id))

    def heartbeat(self, rater: str, task_id: str) -> float | None:
        """Extend the rater's lease; returns when it ends, or None where the task is not theirs (any more)."""
        with self._store.write() as connection:
            return self._extend(connection, self._own_alone(connection, rater, task_id))

    # --- the answer ---------------------------------------------------------------------------------------------

    def save_draft(self, rater: str, task_id: str, body: Mapping[str, object], version: int) -> int:
        """Keep what the rater has written so far; returns the version that the next save names.

        `version` is the one that this draft was made from. Raises DraftConflict where a newer one is there.
        """
        with self._store.write() as connection:
            lease = self._own_alone(connection, rater, task_id)
            saved = drafts.save(connection, lease, body, version=version, now=self._clock())
            self._extend(connection, lease)  # a sign of life
            return saved

    def submit(
        self,
        rater: str,
        task_id: str,
        answer: Answer,
        seconds: float | None = None,
        guideline_version: str | None = None,
    ) -> Standing:
        """Store the rater's answer and wipe its draft; a changed answer to a task answered already is a revision.

        `guideline_version` is the one that the page showed; a lead may have replaced it meanwhile.
        "extra": the task went to somebody else after its lease; the answer is kept, and not counted.
        """
        with self._store.write() as connection:
            lease = self._own_alone(connection, rater, task_id)
            submission = Submission(
                task_id=task_id,
                token=lease.token,
                answer=answer,
                seconds=self._spent(lease, seconds),
                guideline_version=guideline_version,
            )
            if lease.state in ("lost", "skipped"):
                # Answered on an old page: the same question under a newer lease is asked no more.
                newer = (assignments.c.item_id == lease.item_id, assignments.c.rater_id == lease.rater_id)
                claiming.end_leases(connection, *newer, assignments.c.id != task_id)
            submitting = Submitting(self._store, connection, now=self._clock())
            (standing,) = submitting.submit([submission], correct=True)
            drafts.discard(connection, lease)
            return standing

    def revise(self, rater: str, task_id: str, answer: Answer, seconds: float | None = None) -> None:
        """Correct an answer given earlier: a new revision, which counts from now on. The earlier ones stay."""
        with self._store.write() as connection:
            lease = self._own_alone(connection, rater, task_id)
            self._revise(connection, lease, rater, answer, self._spent(lease, seconds) or 0.0)

    def undo(self, rater: str, task_id: str, *, revision: int) -> Answer:
        """Take back the newest revision: the one before it is given anew, and returned. Nothing is deleted.

        Raises RevisionConflict where `revision` is not the newest, so that undoing once is undoing once, however often
        it is asked for.
        """
        with self._store.write() as connection:
            lease = self._own_alone(connection, rater, task_id)
            if lease.revision is not None and lease.revision != revision:
                raise RevisionConflict(given=revision, newest=lease.revision)
            if lease.revision is None or lease.revision < 2:
                raise StoreError("There is no earlier answer to go back to; change the answer instead.")
            before = sa.select(answers.c.body).where(
                answers.c.lease_id == lease.id, answers.c.revision == lease.revision - 1
            )
            answer = answer_from_json(lease.kind, connection.execute(before).scalar_one())
            self._revise(connection, lease, rater, answer, 0.0)
            return answer

    def _revise(self, connection: sa.Connection, lease: OwnLease, rater: str, answer: Answer, seconds: float) -> None:
        Submitting(self._store, connection, now=self._clock()).revise(lease.task_id, rater, answer, seconds=seconds)
        drafts.discard(connection, lease)

    # --- other things to say about a task -----------------------------------------------------------------------

    def skip(self, rater: str, task_id: str, reason: str | None = None, note: str | None = None) -> None:
        """Pass a task on: its slot is open to others at once, and its item never comes to this rater again."""
        _check_remark(reason, note, SKIP_REASONS)
        with self._store.write() as connection:
            lease = self._own_alone(connection, rater, task_id)
            if lease.state == "answered":
                raise StoreError("This task has been answered; change the answer instead of skipping it.")
            if lease.state != "skipped":
                self._remark(connection, lease, "skip", reason, note)
            held = (assignments.c.item_id == lease.item_id, assignments.c.rater_id == lease.rater_id)
            claiming.end_leases(connection, *held)

    def flag(self, rater: str, task_id: str, reason: str, note: str | None = None) -> None:
        """Ask a lead to look at a task; it is answered all the same. The same flag again changes nothing."""
        _check_remark(reason, note, FLAG_REASONS)
        with self._store.write() as connection:
            lease = self._own_alone(connection, rater, task_id)
            said = connection.execute(
                sa.select(remarks.c.reason, remarks.c.note).where(
                    remarks.c.lease_id == lease.id, remarks.c.kind == "flag"
                )
            )
            if (reason, note) not in [tuple(row) for row in said]:
                self._remark(connection, lease, "flag", reason, note)

    def _remark(
        self, connection: sa.Connection, lease: OwnLease, kind: str, reason: str | None, note: str | None
    ) -> None:
        row = {"lease_id": lease.id, "kind": kind, "reason": reason, "note": note, "created_at": self._clock()}
        connection.execute(sa.insert(remarks).values(row))

    # --- the rater's own pages ----------------------------------------------------------------------------------

    def history(self, rater: str, *, limit: int = 50, before: str | None = None) -> list[HistoryEntry]:
        """The rater's own answers, latest first; `before` is the task id of the last one seen."""
        if not 1 <= limit <= MAX_HISTORY:
            raise StoreError(f"{limit} answers were asked for at once; ask for 1 to {MAX_HISTORY}.")
        with self._store.read() as connection:
            person = find_rater(connection, rater)
            last = None if before is None else find_own(connection, person, before)
            return history(connection, person, limit=limit, before=last)

    def guideline(self, rater: str, version: str) -> Guideline:
        """The text of a guideline that the rater works or has worked under."""
        with self._store.read() as connection:
            return own_guideline(connection, find_rater(connection, rater), version)

    def progress(self, rater: str) -> DeskProgress:
        """How much the rater has done today and in all, over all studies."""
        with self._store.read() as connection:
            return made_progress(connection, find_rater(connection, rater), now=self._clock())

    def profile(self, rater: str) -> RaterProfile:
        """The rater's own page."""
        with self._store.read() as connection:
            person = find_rater(connection, rater)
            topics = sa.select(rater_profiles.c.topics).where(rater_profiles.c.rater_id == person.id)
            return RaterProfile(name=rater, topics=connection.execute(topics).scalar() or {})

    def set_topics(self, rater: str, topics: Mapping[str, int]) -> None:
        """Replace what the rater says of how well they can judge each topic, from 1 to 5."""
        _check_topics(topics)
        values = {"topics": dict(topics), "updated_at": self._clock()}
        with self._store.write() as connection:
            person = find_rater(connection, rater, alone=True)
            changed = connection.execute(
                sa.update(rater_profiles).where(rater_profiles.c.rater_id == person.id).values(values)
            )
            if changed.rowcount == 0:
                connection.execute(sa.insert(rater_profiles).values(rater_id=person.id, **values))
            actor = audit.Actor(rater, "rater")
            audit.record(connection, actor, "rater.set_topics", rater, {"topics": dict(topics)}, now=self._clock())

    # --- within -------------------------------------------------------------------------------------------------

    def _own_alone(self, connection: sa.Connection, rater: str, task_id: str) -> OwnLease:
        """The rater's lease of a task, read when this transaction is its study's only writer."""
        person = find_rater(connection, rater)
        self._store.lock_studies(connection, [find_own(connection, person, task_id).study_id])
        return find_own(connection, person, task_id)

    def _extend(self, connection: sa.Connection, lease: OwnLease) -> float | None:
        if lease.state != "yours":
            return None
        now = self._clock()
        study = questions.find(connection, lease.study)
        until = max(lease.leased_until or now, now + self._lease_seconds(connection, study, now=now))
        held = sa.and_(assignments.c.id == lease.task_id, assignments.c.claim_token == lease.token)
        connection.execute(sa.update(assignments).where(held).values(leased_until=until))
        return until

    def _view(self, connection: sa.Connection, lease: OwnLease) -> TaskView:
        draft = drafts.read(connection, lease)
        given = None
        if lease.revision is not None:
            given = GivenAnswer(
                answer=answer_from_json(lease.kind, lease.body),
                revision=lease.revision,
                standing="counted" if lease.counts else "extra",
                submitted_at=lease.submitted_at or 0.0,
                guideline_version=lease.guideline_version or "",
            )
        return TaskView(
            task=questions.given_out(connection, leases.c.id == lease.id)[lease.id],
            study=lease.study,
            state=lease.state,
            leased_until=lease.leased_until if lease.state == "yours" else None,
            draft=draft,
            draft_version=drafts.version_of(draft, lease),
            given=given,
        )

    def _spent(self, lease: OwnLease, seconds: float | None) -> float | None:
        """The time on task that a page measured: no more than has passed since the lease began."""
        if seconds is None:
            return None
        if not (math.isfinite(seconds) and seconds >= 0):
            raise StoreError(f"The time spent is {seconds!r} seconds; it must be 0 or more, or left out.")
        return min(seconds, max(0.0, self._clock() - lease.started_at))

    def _lease_seconds(self, connection: sa.Connection, study: Study, *, now: float) -> float:
        known = self._medians.get(study.id)
        if known is None or not 0 <= now - known.at < _TIMES_KEPT_SECONDS:
            known = self._medians[study.id] = _Median(now, _median_seconds(connection, study))
        return max(study.lease_seconds, min(LEASE_MEDIANS * known.seconds, LEASE_MOST_SECONDS))


def _median_seconds(connection: sa.Connection, study: Study) -> float:
    """What the study's latest answers took at the median, revisions left out."""
    latest = (
        sa.select(answers.c.seconds)
        .join(leases, leases.c.id == answers.c.lease_id)
        .join(assignments, assignments.c.id == leases.c.assignment_id)
        .where(assignments.c.study_id == study.id, answers.c.revision == 1)
        .order_by(answers.c.id.desc())
        .limit(_TIMED_ANSWERS)
    )
    return float(statistics.median(connection.execute(latest).scalars().all() or [0.0]))


def _resume(connection: sa.Connection, study: Study, person: Person, *, until: float) -> str | None:
    """The oldest task of the study that the rater holds, its lease extended; past its end, unless somebody asked."""
    task_id = connection.execute(
        sa.select(assignments.c.id)
        .join(leases, leases.c.assignment_id == assignments.c.id)
        .where(assignments.c.study_id == study.id, assignments.c.state == "leased")
        .where(assignments.c.rater_id == person.id, leases.c.token == assignments.c.claim_token)
        .order_by(leases.c.id)
        .limit(1)
    ).scalar()
    if task_id is not None:
        shorter = sa.and_(assignments.c.id == task_id, assignments.c.leased_until < until)
        connection.execute(sa.update(assignments).where(shorter).values(leased_until=until))
    return task_id


def _hand_out(connection: sa.Connection, study: Study, person: Person, *, now: float, until: float) -> str | None:
    """Lease the next task of a study to a rater."""
    if study.closed_at is not None:
        return None
    claiming.end_leases(connection, assignments.c.study_id == study.id, assignments.c.leased_until < now)
    slot = _next_slot(connection, study, person)
    if slot is None:
        return None
    chosen = sa.select(assignments.c.id).where(assignments.c.id == slot)
    token = claiming.lease(connection, chosen, person.id, now=now, until=until)
    assert token is not None, "the slot was open, and this transaction is the study's only writer"
    return slot


def _next_slot(connection: sa.Connection, study: Study, person: Person) -> str | None:
    if study.screening:
        return hidden.next_slot(connection, study, person)
    in_order = claiming.open_slots(study, person.id).order_by(assignments.c.sequence)
    slot: str | None = connection.execute(in_order.limit(1)).scalar()
    if slot is None or study.gold_share <= 0:
        return slot
    place = hidden.tasks_done(connection, study, person)
    if not hidden.is_gold_place(study.secret, person.name, place, study.gold_share):
        return slot
    return hidden.next_slot(connection, study, person) or slot


def _desk_study(
    connection: sa.Connection, study: Study, person: Person, admission: Admission, *, now: float
) -> DeskStudy:
    held = admission.begun.get(study.name, 0)
    answered = connection.execute(
        sa.select(sa.func.count(assignments.c.item_id.distinct()))
        .select_from(leases.join(assignments, assignments.c.id == leases.c.assignment_id))
        .where(leases.c.rater_id == person.id, assignments.c.study_id == study.id)
        .where(sa.exists().where(answers.c.lease_id == leases.c.id))
    ).scalar_one()
    return DeskStudy(
        name=study.name,
        kind=study.kind,
        guideline_version=study.guideline_version,
        screening=study.screening,
        answered=answered,
        left=held + (0 if study.closed_at is not None else _ahead(connection, study, person, held, now=now)),
        begun=held > 0,
        locked_because=admission.refusal(study),
    )


def _ahead(connection: sa.Connection, study: Study, person: Person, held: int, *, now: float) -> int:
    """How many tasks are ahead of a rater, beyond those that they hold."""
    if study.screening:
        return hidden.count_ahead(connection, study, person)
    work = connection.execute(
        sa.select(sa.func.count(assignments.c.item_id.distinct())).where(
            claiming.is_free(study, now), ~claiming.has_met(person.id, assignments.c.item_id)
        )
    ).scalar_one()
    if study.gold_share <= 0 or work == 0:
        return work
    return hidden.tasks_ahead(
        study.secret,
        person.name,
        study.gold_share,
        place=hidden.tasks_done(connection, study, person) + held,
        work=work,
        gold_items=hidden.count_ahead(connection, study, person),
    )


def _check_remark(reason: str | None, note: str | None, allowed: Mapping[str, str]) -> None:
    if reason is not None and reason not in allowed:
        raise StoreError(f"The reason is {reason!r}; it must be one of {', '.join(allowed)}.")
    if note is not None and len(note) > MAX_NOTE:
        raise StoreError(f"The note has {len(note)} characters; {MAX_NOTE} are allowed.")


def _check_topics(topics: Mapping[str, int]) -> None:
    if len(topics) > MAX_TOPICS:
        raise StoreError(f"{len(topics)} topics were given; {MAX_TOPICS} are allowed.")
    for topic, level in topics.items():
        check_name("topic", topic)
        if len(topic) > MAX_TOPIC_NAME:
            raise StoreError(f"A topic has {len(topic)} characters; {MAX_TOPIC_NAME} are allowed.")
        if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= TOPIC_LEVELS:
            raise StoreError(f"{topic!r} is {level!r}; it must be a whole number from 1 to {TOPIC_LEVELS}.")
