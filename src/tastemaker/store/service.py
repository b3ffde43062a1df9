"""The labelling service: the queue, its leases and its blindness. People and simulated raters use the same methods.

A study's items are queued once and handed out slot by slot, in the items' order. A claim leases slots to a rater by
one conditional UPDATE; while the lease runs the slot is that rater's, afterwards anyone's. A rater never gets an item
twice. An answer is stored before `submit` returns, and is never lost: one that comes late, after its slot went to
someone else, is kept beside the counted ones. Raters see tasks and nothing else; only the methods at the end
of the class, for the stages that train and evaluate, join answers to what produced the outputs.

No part of the data depends on chance: task ids and tokens are random but appear in no export, orders shown follow from
study, item and slot, and `Turn` fixes beforehand which rater has which slot.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

from tastemaker.errors import DataError, StoreError
from tastemaker.records import Demonstration, Origin, Ranking
from tastemaker.store import answered, claiming, exchange, questions
from tastemaker.store.claiming import check_assigned, end_leases, is_work, open_slots, rater_in_group
from tastemaker.store.database import Store
from tastemaker.store.exchange import FileReport
from tastemaker.store.questions import Study
from tastemaker.store.schema import answers, assignments, leases, raters
from tastemaker.store.submitting import Submitting
from tastemaker.store.tasks import (
    Answer,
    Comparison,
    NewItem,
    PrivatePrompt,
    Progress,
    Rating,
    Standing,
    StudyConfig,
    Submission,
    SubmissionError,
    Task,
    Turn,
    check_name,
)

# A person who takes tasks away in a file brings them back within days, not minutes.
FILE_LEASE = timedelta(days=7)


class LabelService:
    """What raters, stages and the labelling application ask of the label store."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    # --- filling the queue --------------------------------------------------------------------------------------

    def add_rater(self, name: str, *, group: str, origin: Origin) -> None:
        """Register a rater; again is no error. A group is of people or of simulated raters, never of both."""
        check_name("rater's name", name)
        check_name("rater's group", group)
        with self._store.write() as connection:
            self._store.lock_store(connection)
            known = connection.execute(
                sa.select(raters.c.rater_group, raters.c.origin).where(raters.c.name == name)
            ).one_or_none()
            if known is not None:
                if tuple(known) != (group, origin):
                    raise StoreError(
                        f"Rater {name!r} is already registered, as {known.origin} in group {known.rater_group!r}; "
                        f"given was {origin} in {group!r}. Take another name."
                    )
                return
            other = connection.execute(
                sa.select(raters.c.name).where(raters.c.rater_group == group, raters.c.origin != origin).limit(1)
            ).scalar()
            if other is not None:
                raise StoreError(
                    f"Rater {name!r} is {origin}, but group {group!r} holds {other!r}, who is not; people and "
                    "simulated raters never share a group. Name another group."
                )
            row = {"name": name, "rater_group": group, "origin": origin, "created_at": self._clock()}
            connection.execute(sa.insert(raters).values(row))

    def queue(self, study: StudyConfig, items: Sequence[NewItem]) -> None:
        """Add items to a study, creating it at first; items that it has already are left alone. All or nothing."""
        checked = [questions.checked(study, item) for item in items]
        with self._store.write() as connection:
            self._store.lock_store(connection)
            study_id = questions.find_or_create(connection, study, now=self._clock())
            self._store.lock_studies(connection, [study_id])
            questions.add_items(connection, study, study_id, checked)

    # --- what raters do -----------------------------------------------------------------------------------------

    def claim(
        self,
        study: str,
        rater: str,
        *,
        limit: int = 1,
        turn: Turn | None = None,
        lease: timedelta | None = None,
    ) -> list[Task]:
        """Lease up to `limit` slots to a rater, first items first; an empty list says that none is left for them.

        With a `turn`, only the slots of that turn; without, an open slot of each item the rater has not had.
        A closed study has nothing left for anybody. Gold and screening items are handed out at the desk alone.
        """
        with self._store.write() as connection:
            self._store.lock_studies(connection, [questions.find(connection, study).id])
            found = questions.find(connection, study)  # as it is now: a lead may have closed it meanwhile
            rater_id = rater_in_group(connection, rater, found)
            if turn is not None and turn.of < found.overlap:
                raise StoreError(
                    f"Study {study!r} wants {found.overlap} answers an item, from as many raters; turns of {turn.of} "
                    f"would give a rater an item twice. Work with at least {found.overlap} raters."
                )
            check_assigned(connection, rater, rater_id, found)
            if found.closed_at is not None:
                return []
            now = self._clock()
            end_leases(connection, assignments.c.study_id == found.id, assignments.c.leased_until < now)
            until = now + (found.lease_seconds if lease is None else lease.total_seconds())
            chosen = open_slots(found, rater_id, turn).order_by(assignments.c.sequence).limit(limit)
            token = claiming.lease(connection, chosen, rater_id, now=now, until=until)
            return [] if token is None else questions.tasks(connection, found, assignments.c.claim_token == token)

    def held(self, study: str, rater: str) -> list[Task]:
        """The tasks that a rater has claimed and not answered, so that they can be resumed."""
        with self._store.read() as connection:
            found = questions.find(connection, study)
            rater_id = rater_in_group(connection, rater, found)
            return questions.tasks(connection, found, assignments.c.rater_id == rater_id)

    def submit(self, task_id: str, token: str, answer: Answer, *, seconds: float | None = None) -> Standing:
        """Store an answer; the same answer again changes nothing.

        Returns "extra" where the slot went to someone else meanwhile: the answer is kept, and not counted.
        """
        return self.submit_many([Submission(task_id=task_id, token=token, answer=answer, seconds=seconds)])[0]

    def submit_many(self, submissions: Sequence[Submission], *, correct: bool = False) -> list[Standing]:
        """Store answers in one transaction, all or none. With `correct`, a changed answer is a new revision.

        Raises SubmissionError, which names the submission that is wrong.
        """
        if not submissions:
            return []
        with self._store.write() as connection:
            return Submitting(self._store, connection, now=self._clock()).submit(submissions, correct=correct)

    def revise(self, task_id: str, rater: str, answer: Answer, *, seconds: float = 0.0) -> None:
        """Correct an answer given earlier: a new revision, which counts from now on. The earlier ones stay."""
        with self._store.write() as connection:
            Submitting(self._store, connection, now=self._clock()).revise(task_id, rater, answer, seconds=seconds)

    def release(self, study: str, rater: str) -> int:
        """Give back what a rater has claimed and not answered; returns how many slots are open again."""
        with self._store.write() as connection:
            found = questions.find(connection, study)
            self._store.lock_studies(connection, [found.id])
            holder = assignments.c.rater_id == rater_in_group(connection, rater, found)
            return end_leases(connection, assignments.c.study_id == found.id, holder)

    def release_simulated(self, study: str) -> int:
        """Give back what simulated raters of an interrupted run still hold."""
        with self._store.write() as connection:
            found = questions.find(connection, study)
            self._store.lock_studies(connection, [found.id])
            simulated = sa.select(raters.c.id).where(raters.c.origin == "simulated")
            return end_leases(connection, assignments.c.study_id == found.id, assignments.c.rater_id.in_(simulated))

    # --- answers in files ---------------------------------------------------------------------------------------

    def tasks_to_file(self, study: str, rater: str, path: Path, *, limit: int = 100) -> int:
        """Claim up to `limit` tasks and write all that the rater holds to a JSONL file to be filled in."""
        if path.exists():
            raise DataError(
                "exists already and may hold answers that have not been handed in; read it with answers_from_file "
                "first, or name another file.",
                path=path,
            )
        self.claim(study, rater, limit=limit, lease=FILE_LEASE)
        tasks = self.held(study, rater)
        exchange.write_tasks(path, tasks)
        return len(tasks)

    def answers_from_file(self, path: Path) -> FileReport:
        """Store the answers of a filled-in file: all of them, or none and a DataError that names the line.

        Tasks left unanswered are passed over; reading a file again after correcting it stores the corrections.
        """
        rows = exchange.read_answers(path)
        try:
            standings = self.submit_many([row.submission for row in rows if row.submission], correct=True)
        except SubmissionError as error:
            lines = [row.line for row in rows if row.submission]
            raise DataError(str(error), path=path, line=lines[error.index]) from error
        counted = Counter(standings)
        return FileReport(counted=counted["counted"], extra=counted["extra"], unanswered=len(rows) - len(standings))

    # --- what stages read, and raters never ---------------------------------------------------------------------

    def studies(self) -> list[Study]:
        """All studies, oldest first."""
        with self._store.read() as connection:
            return questions.every(connection)

    def progress(self, study: str) -> Progress:
        """How many slots a study has, and how many are answered, leased and open; those that test raters left out."""
        with self._store.read() as connection:
            found = questions.find(connection, study)
            leased = sa.and_(assignments.c.state == "leased", assignments.c.leased_until >= self._clock())
            total, done, held = connection.execute(
                sa.select(
                    sa.func.count(),
                    sa.func.count(sa.case((assignments.c.state == "done", 1))),
                    sa.func.count(sa.case((leased, 1))),
                ).where(assignments.c.study_id == found.id, is_work(found))
            ).one()
            extra = connection.execute(
                sa.select(sa.func.count())
                .select_from(assignments)
                .join(leases, leases.c.assignment_id == assignments.c.id)
                .join(answers, answers.c.lease_id == leases.c.id)
                .where(assignments.c.study_id == found.id, answers.c.revision == 1, is_work(found))
                .where(sa.func.coalesce(assignments.c.claim_token, "") != leases.c.token)
            ).scalar_one()
        return Progress(slots=total, answered=done, leased=held, open=total - done - held, extra=extra)

    def private_prompts(self, task_ids: Sequence[str]) -> dict[str, PrivatePrompt]:
        """What simulated raters need beside a task: the prompt's private record. Refused for tasks people hold."""
        with self._store.read() as connection:
            return questions.private_prompts(connection, task_ids)

    def demonstrations(self, study: str) -> list[Demonstration]:
        """The demonstrations of a study, by item, then slot."""
        with self._store.read() as connection:
            return answered.demonstrations(connection, questions.find(connection, study))

    def rankings(self, study: str) -> list[Ranking]:
        """The rankings of a study, by item, then slot; responses in the order in which they were queued."""
        with self._store.read() as connection:
            return answered.rankings(connection, questions.find(connection, study))

    def comparisons(self, study: str) -> list[Comparison]:
        """The comparisons of a study, by item, then slot; "first" is the output queued first, wherever it was shown."""
        with self._store.read() as connection:
            return answered.comparisons(connection, questions.find(connection, study))

    def ratings(self, study: str) -> list[Rating]:
        """The ratings of a study, one an output: by item, then slot, then output as queued."""
        with self._store.read() as connection:
            return answered.ratings(connection, questions.find(connection, study))
