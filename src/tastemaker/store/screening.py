"""The test that new raters take, and what leads decide by it (InstructGPT, arXiv 2203.02155, appendix B.1).

Its four parts: agreement with known answers on sensitive flags, agreement with them on rankings, demonstrations graded
from 1 to 7, and what raters say themselves about the topics they can judge. The paper's soft cut-offs (75 %, 75 %, 6 of
7) hold until a lead sets others for a group; soft means that they advise and a lead decides. Only where every cut-off
is met may the advice be followed without one (`pass_if_met`). The newest cut-offs hold for tests taken before them too;
decisions stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import sqlalchemy as sa

from tastemaker.agreement import Undefined
from tastemaker.errors import ConfigError, StoreError
from tastemaker.intervals import Estimate, clustered_share, mean_ci
from tastemaker.records import Messages
from tastemaker.store import audit
from tastemaker.store.audit import Actor
from tastemaker.store.claiming import find_rater, is_assigned
from tastemaker.store.database import Store
from tastemaker.store.given import Given, account_id, all_given, one_each
from tastemaker.store.gold import Measure, against_gold
from tastemaker.store.schema import (
    accounts,
    answers,
    assignments,
    grades,
    items,
    leases,
    rater_profiles,
    raters,
    screening_cut_offs,
    screening_decisions,
    studies,
)
from tastemaker.store.tasks import DemonstrationAnswer

GRADES = (1, 7)

Advice = Literal["pass", "fail", "incomplete"]
Figure = Estimate | Undefined


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOffs:
    """The least that is asked of a new rater; by default the paper's. None: that part is not asked."""

    flags: float | None = 0.75
    rankings: float | None = 0.75
    demonstrations: float | None = 6.0

    def __post_init__(self) -> None:
        for name in ("flags", "rankings"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(
                    f"The cut-off for {name} is {share}; it must be a share from 0 to 1, or None where it is not asked."
                )
        least, most = GRADES
        if self.demonstrations is not None and not least <= self.demonstrations <= most:
            raise ConfigError(
                f"The cut-off for demonstrations is {self.demonstrations}; it must be a mean grade from {least} to "
                f"{most}, or None where it is not asked."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCutOffs:
    """What is asked of a group's new raters. `by` and `at` are None where nobody has set anything: the paper's hold."""

    rater_group: str
    cut_offs: CutOffs
    by: str | None = None
    at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a rater may work. `by` is None where every cut-off was met and no lead was asked."""

    passed: bool
    reason: str
    by: str | None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a rater's test came to, against the group's cut-offs.

    `asked` counts the items of open screening studies that the rater may see, and what else of a test they answered.
    """

    rater: str
    rater_group: str
    answered: int
    asked: int
    flags: Figure
    rankings: Figure
    demonstrations: Figure
    ungraded: int
    topics: dict[str, object]
    cut_offs: CutOffs
    advice: Advice
    unmet: tuple[str, ...]
    decision: Decision | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToGrade:
    """A demonstration that waits for a grade, without its author."""

    answer: int
    study: str
    messages: Messages
    text: str


class ScreeningService:
    """Cut-offs, results, grades and decisions."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def cut_offs(self) -> list[GroupCutOffs]:
        """What is asked of each group that has a screening study, by name."""
        with self._store.read() as connection:
            return [_newest_cut_offs(connection, group) for group in _tested_groups(connection)]

    def set_cut_offs(self, rater_group: str, cut_offs: CutOffs, *, actor: Actor) -> bool:
        """Ask this of a group's new raters from now on; says whether that is a change.

        The advice on who has taken the test already follows; decisions stay as they are.
        """
        with self._store.write() as connection:
            self._store.lock_store(connection)  # two leads at once: who is written down last is whose values count
            groups = _tested_groups(connection)
            if rater_group not in groups:
                raise StoreError(
                    f"The group {rater_group!r} has no screening study, so it has no cut-offs; groups with one: "
                    f"{', '.join(groups) or 'none yet'}."
                )
            before = _newest_cut_offs(connection, rater_group)
            if before.by is not None and before.cut_offs == cut_offs:
                return False
            now = self._clock()
            values = asdict(cut_offs)
            row = {"rater_group": rater_group, "account_id": account_id(connection, actor.name), "created_at": now}
            connection.execute(sa.insert(screening_cut_offs).values(row | values))
            details = {"from": asdict(before.cut_offs), "to": values}
            audit.record(connection, actor, "screening.cut-offs", rater_group, details, now=now)
            return True

    def results(self) -> list[Result]:
        """Every rater whose group has a screening study, by name."""
        with self._store.read() as connection:
            return self._results(connection)

    def result(self, rater: str) -> Result:
        """One rater's result."""
        with self._store.read() as connection:
            return self._result(connection, rater)

    def decide(self, rater: str, *, passed: bool, reason: str, actor: Actor) -> None:
        """Let a rater work or not. The newest decision counts; the earlier ones stay."""
        if not reason.strip():
            raise StoreError("A decision needs a reason; write a few words.")
        with self._store.write() as connection:
            account = account_id(connection, actor.name)
            self._decide(connection, rater, passed, reason, account, actor)

    def pass_if_met(self, rater: str, *, actor: Actor) -> bool:
        """Let a rater work if the whole test is answered and every cut-off is met; says whether that is so."""
        with self._store.write() as connection:
            found = self._result(connection, rater)
            if found.decision is not None:
                return found.decision.passed
            if found.advice != "pass":
                return False
            self._decide(connection, rater, True, "every cut-off was met", None, actor)
            return True

    def to_grade(self, *, limit: int = 50) -> list[ToGrade]:
        """Demonstrations of screening studies that nobody has graded yet, oldest first."""
        with self._store.read() as connection:
            graded = set(connection.execute(sa.select(grades.c.answer_id)).scalars())
            given = all_given(connection, sa.and_(studies.c.screening, studies.c.kind == "demonstration"))
        waiting = sorted((one for one in given if one.id not in graded), key=lambda one: one.id)
        return [
            ToGrade(answer=one.id, study=one.item.study, messages=one.item.prompt.messages, text=one.answer.text)
            for one in waiting[:limit]
            if isinstance(one.answer, DemonstrationAnswer)
        ]

    def grade(self, answer: int, score: int, *, actor: Actor) -> None:
        """Grade a demonstration from 1 to 7. A lead's newest grade counts; several leads' are averaged."""
        least, most = GRADES
        if isinstance(score, bool) or not isinstance(score, int) or not least <= score <= most:
            raise StoreError(f"The grade is {score!r}; it must be a whole number from {least} to {most}.")
        with self._store.write() as connection:
            account = account_id(connection, actor.name)
            kind = connection.execute(
                sa.select(studies.c.kind)
                .join(assignments, assignments.c.study_id == studies.c.id)
                .join(leases, leases.c.assignment_id == assignments.c.id)
                .join(answers, answers.c.lease_id == leases.c.id)
                .where(answers.c.id == answer)
            ).scalar()
            if kind != "demonstration":
                raise StoreError(f"Answer {answer} is not a demonstration; only demonstrations are graded.")
            now = self._clock()
            row = {"answer_id": answer, "account_id": account, "score": score, "created_at": now}
            connection.execute(sa.insert(grades).values(row))
            audit.record(connection, actor, "demonstration.grade", f"answer {answer}", {"score": score}, now=now)

    def _decide(
        self, connection: sa.Connection, rater: str, passed: bool, reason: str, account: int | None, actor: Actor
    ) -> None:
        now = self._clock()
        row = {
            "rater_id": find_rater(connection, rater).id,
            "passed": passed,
            "reason": reason,
            "account_id": account,
            "created_at": now,
        }
        connection.execute(sa.insert(screening_decisions).values(row))
        details = {"passed": passed, "reason": reason, "by_cut_offs": account is None}
        audit.record(connection, actor, "screening.decide", rater, details, now=now)

    def _result(self, connection: sa.Connection, rater: str) -> Result:
        find_rater(connection, rater)
        found = [result for result in self._results(connection) if result.rater == rater]
        if not found:
            raise StoreError(f"Rater {rater!r} has no screening to take: no screening study is for their group.")
        return found[0]

    def _results(self, connection: sa.Connection) -> list[Result]:
        by_rater: dict[str, list[Given]] = {}
        for one in one_each(all_given(connection, studies.c.screening)):
            by_rater.setdefault(one.rater, []).append(one)
        graded = _grades(connection)
        decided = _decisions(connection)
        topics = {
            row.rater_id: dict(row.topics)
            for row in connection.execute(sa.select(rater_profiles.c.rater_id, rater_profiles.c.topics))
        }
        tests = _tests(connection)
        cut_offs = {group: _newest_cut_offs(connection, group).cut_offs for group in _tested_groups(connection)}
        found: list[Result] = []
        everybody = sa.select(raters.c.id, raters.c.name, raters.c.rater_group).order_by(raters.c.name)
        for row in connection.execute(everybody):
            if row.rater_group in cut_offs:
                given = by_rater.get(row.name, ())
                found.append(
                    judge(
                        given,
                        graded,
                        cut_offs[row.rater_group],
                        rater=row.name,
                        rater_group=row.rater_group,
                        asked=len(tests.get(row.id, set()).union(one.item.id for one in given)),
                        topics=topics.get(row.id, {}),
                        decision=decided.get(row.id),
                    )
                )
        return found


def judge(
    given: Sequence[Given],
    graded: dict[int, float],
    cut_offs: CutOffs,
    *,
    rater: str,
    rater_group: str,
    asked: int,
    topics: dict[str, object],
    decision: Decision | None,
) -> Result:
    """A rater's screening answers against the cut-offs. `graded` holds the mean grade of each graded answer."""
    demonstrations = [one for one in given if isinstance(one.answer, DemonstrationAnswer)]
    scores = [graded[one.id] for one in demonstrations if one.id in graded]
    figures: dict[str, Figure] = {
        "flags": gold_share(given, ("flags",)),
        "rankings": gold_share(given, ("order",)),
        "demonstrations": _mean_grade(scores),
    }
    reached = {name: figure.value for name, figure in figures.items() if isinstance(figure, Estimate)}
    if scores:  # a single grade has a value, if no interval
        reached["demonstrations"] = sum(scores) / len(scores)
    ungraded = len(demonstrations) - len(scores)
    # A part that the group's test does not have is not held against anybody.
    unmet = tuple(
        name for name, value in reached.items() if (cut_off := getattr(cut_offs, name)) is not None and value < cut_off
    )
    whole = 0 < asked <= len(given) and not ungraded
    advice: Advice = "incomplete" if not whole else "fail" if unmet else "pass"
    return Result(
        rater=rater,
        rater_group=rater_group,
        answered=len(given),
        asked=asked,
        flags=figures["flags"],
        rankings=figures["rankings"],
        demonstrations=figures["demonstrations"],
        ungraded=ungraded,
        topics=topics,
        cut_offs=cut_offs,
        advice=advice,
        unmet=unmet,
        decision=decision,
    )


def gold_share(given: Sequence[Given], measures: Sequence[Measure]) -> Figure:
    """How much of what gold items ask was answered as expected; answers to one item belong together."""
    agreed: list[int] = []
    asked: list[int] = []
    for one in given:
        if one.item.expected is not None:
            counted = [each for each in against_gold(one.answer, one.item.expected) if each.measure in measures]
            if counted:
                agreed.append(sum(each.agreed for each in counted))
                asked.append(sum(each.of for each in counted))
    if not asked:
        return Undefined(reason="no item with a known answer of this kind has been answered")
    part, whole = np.array(agreed, dtype=np.float64), np.array(asked, dtype=np.float64)
    return clustered_share(part, whole, range(len(agreed)))


def _mean_grade(scores: Sequence[float]) -> Figure:
    if not scores:
        return Undefined(reason="no demonstration has been graded")
    if len(scores) == 1:
        return Undefined(reason="a single graded demonstration says nothing of the next")
    return mean_ci(scores, range(len(scores)))


def _grades(connection: sa.Connection) -> dict[int, float]:
    """The mean grade of each answer, of every lead's newest."""
    newest: dict[tuple[int, int], int] = {}
    for row in connection.execute(sa.select(grades).order_by(grades.c.id)):
        newest[row.answer_id, row.account_id] = row.score
    by_answer: dict[int, list[int]] = {}
    for (answer, _), score in newest.items():
        by_answer.setdefault(answer, []).append(score)
    return {answer: sum(scores) / len(scores) for answer, scores in by_answer.items()}


def _tests(connection: sa.Connection) -> dict[int, set[int]]:
    """The items of the open screening studies that each rater may see."""
    may_see = sa.and_(studies.c.rater_group == raters.c.rater_group, is_assigned(raters.c.id, studies.c.id))
    rows = connection.execute(
        sa.select(raters.c.id.label("rater"), items.c.id)
        .select_from(raters.join(studies, may_see).join(items, items.c.study_id == studies.c.id))
        .where(studies.c.screening, studies.c.closed_at.is_(None))
    )
    found: dict[int, set[int]] = {}
    for row in rows:
        found.setdefault(row.rater, set()).add(row.id)
    return found


def _tested_groups(connection: sa.Connection) -> list[str]:
    """The groups of raters that have a screening study."""
    return sorted(connection.execute(sa.select(studies.c.rater_group).where(studies.c.screening).distinct()).scalars())


def _newest_cut_offs(connection: sa.Connection, rater_group: str) -> GroupCutOffs:
    row = connection.execute(
        sa.select(screening_cut_offs, accounts.c.name.label("by"))
        .join(accounts, accounts.c.id == screening_cut_offs.c.account_id)
        .where(screening_cut_offs.c.rater_group == rater_group)
        .order_by(screening_cut_offs.c.id.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        return GroupCutOffs(rater_group=rater_group, cut_offs=CutOffs())
    cut_offs = CutOffs(flags=row.flags, rankings=row.rankings, demonstrations=row.demonstrations)
    return GroupCutOffs(rater_group=rater_group, cut_offs=cut_offs, by=row.by, at=row.created_at)


def _decisions(connection: sa.Connection) -> dict[int, Decision]:
    rows = connection.execute(
        sa.select(screening_decisions, accounts.c.name.label("by"))
        .outerjoin(accounts, accounts.c.id == screening_decisions.c.account_id)
        .order_by(screening_decisions.c.id)
    )
    return {row.rater_id: Decision(passed=row.passed, reason=row.reason, by=row.by, at=row.created_at) for row in rows}
