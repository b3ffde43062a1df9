"""Which studies a rater may see, and why they may not work on one now.

A rater sees the studies of their group, and of those that name their raters the ones that name them. Where the group
has a screening study, the others open when the newest decision on the rater says "passed" (InstructGPT appendix B.1);
a closed screening study still guards them, or closing it would let everybody in.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from tastemaker.store import hidden
from tastemaker.store.claiming import Person, is_assigned
from tastemaker.store.questions import Study, as_study
from tastemaker.store.schema import assignments, leases, screening_decisions, studies
from tastemaker.store.views import NotYours

# Somebody who opens task after task keeps them from others.
MAX_LEASES = 3


def visible_studies(connection: sa.Connection, person: Person) -> list[Study]:
    """The studies that a rater may see, oldest first."""
    rows = connection.execute(sa.select(studies).where(_is_visible(person)).order_by(studies.c.id))
    return [as_study(row) for row in rows]


def find_study(connection: sa.Connection, person: Person, name: str) -> Study:
    """The study of that name, if the rater may see it."""
    # A name with control characters is nobody's, and databases refuse some of them.
    found = sa.select(studies).where(studies.c.name == name, _is_visible(person))
    row = connection.execute(found).one_or_none() if name.isprintable() else None
    if row is None:
        raise NotYours(f"There is no study {name!r} for you; your home page lists those that there are.")
    return as_study(row)


def _is_visible(person: Person) -> sa.ColumnElement[bool]:
    return sa.and_(studies.c.rater_group == person.group, is_assigned(person.id, studies.c.id))


class Admission:
    """Why a rater may not work on a study now, read once for all of their studies."""

    def __init__(self, connection: sa.Connection, person: Person, *, now: float) -> None:
        runs = sa.func.count(sa.case((assignments.c.leased_until >= now, 1)))
        rows = connection.execute(
            sa.select(studies.c.name, sa.func.count(), runs)
            .select_from(leases)
            .join(assignments, assignments.c.id == leases.c.assignment_id)
            .join(studies, studies.c.id == assignments.c.study_id)
            .where(leases.c.rater_id == person.id, leases.c.token == assignments.c.claim_token)
            .where(assignments.c.state == "leased")
            .group_by(studies.c.name)
        ).all()
        # A task whose lease has ended stays theirs while nobody else asks for one; it keeps nothing from anybody.
        self.begun = {name: begun for name, begun, _ in rows}
        self._running = sum(running for _, _, running in rows)
        self._gate = _screening_gate(connection, person, self.begun)

    def refusal(self, study: Study) -> str | None:
        """The reason in a sentence that says what to do, or None where the rater may work."""
        if not study.screening and self._gate is not None:
            return self._gate
        if study.name not in self.begun and self._running >= MAX_LEASES:
            places = ", ".join(sorted(self.begun))
            return f"You have begun {self._running} tasks elsewhere ({places}): finish or skip one of them first."
        return None


def _screening_gate(connection: sa.Connection, person: Person, begun: Collection[str]) -> str | None:
    guard = sa.and_(studies.c.screening, studies.c.rater_group == person.group)
    if connection.execute(sa.select(studies.c.id).where(guard).limit(1)).scalar() is None:
        return None
    decided = (
        sa.select(screening_decisions.c.passed)
        .where(screening_decisions.c.rater_id == person.id)
        .order_by(screening_decisions.c.id.desc())
        .limit(1)
    )
    passed = connection.execute(decided).scalar()
    if passed:
        return None
    if passed is not None:
        return "After your screening test this study was not opened to you; ask a lead if you would like to know more."
    tests = [study for study in visible_studies(connection, person) if study.screening and study.closed_at is None]
    if any(test.name in begun or hidden.count_ahead(connection, test, person) for test in tests):
        return "This study opens when you have passed the screening test: please answer that first."
    return "You have finished the screening test, thank you; this study opens when a lead has looked at your answers."
