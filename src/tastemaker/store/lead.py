"""What leads do with studies: set them up, fill them, staff them, close them, word their guidelines, unblind them.

Every act is one write transaction with its line in the audit log. Items come in whole or not at all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store import audit, questions
from tastemaker.store.audit import Actor
from tastemaker.store.database import Store
from tastemaker.store.gold import check_expected
from tastemaker.store.importing import GoldItem, read_gold, read_items
from tastemaker.store.questions import Study
from tastemaker.store.schema import (
    assignments,
    gold,
    guidelines,
    items,
    leases,
    outputs,
    raters,
    remarks,
    studies,
    study_raters,
)
from tastemaker.store.tasks import LETTERS, Guideline, NewItem, Purpose, StudyConfig, StudyKind, answer_to_json

# Beyond it, more than half of a rater's work would be tests of the rater.
MOST_GOLD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOverview:
    """A study as leads see it. Slots are those of its open questions; tests of raters have none of their own."""

    name: str
    kind: StudyKind
    purpose: Purpose
    rater_group: str
    overlap: int
    guideline_version: str
    screening: bool
    gold_share: float
    closed: bool
    created_at: float
    items: int
    gold_items: int
    slots: int
    answered: int
    skips: int
    flags: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredGuideline:
    """A version of a guideline, and the studies that work by it now."""

    version: str
    text: str
    created_at: float
    studies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of a file's items: stored, or in the study already with the same content."""

    added: int
    known: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unblinded:
    """What wrote an output. `letter` is by the order of queueing, `shown_as` the one that adjudicators see."""

    item: int
    key: str
    letter: str
    shown_as: str
    source: str


class LeadService:
    """Studies from a lead's side."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    # --- studies ------------------------------------------------------------------------------------------------

    def create_study(
        self, config: StudyConfig, *, actor: Actor, screening: bool = False, gold_share: float = 0.0
    ) -> None:
        """A new study. Every item of a screening study is put to every new rater of the group."""
        _check_gold_share(gold_share)
        with self._store.write() as connection:
            self._store.lock_store(connection)
            taken = connection.execute(sa.select(studies.c.id).where(studies.c.name == config.name)).scalar()
            if taken is not None:
                raise StoreError(f"There is a study {config.name!r} already; give the new one another name.")
            now = self._clock()
            study_id = questions.find_or_create(connection, config, now=now)
            values = {"screening": screening, "gold_share": gold_share}
            connection.execute(sa.update(studies).where(studies.c.id == study_id).values(**values))
            details = {
                "kind": config.kind,
                "purpose": config.purpose,
                "rater_group": config.rater_group,
                "overlap": config.overlap,
                "guideline": config.guideline.version,
                **values,
            }
            audit.record(connection, actor, "study.create", config.name, details, now=now)

    def studies(self) -> list[StudyOverview]:
        """All studies, newest first."""
        with self._store.read() as connection:
            return _overviews(connection)

    def close(self, study: str, *, actor: Actor) -> None:
        """Nobody can claim its slots from now on; what is claimed can still be answered."""
        self._change(study, "study.close", actor, {"closed_at": self._clock()}, {})

    def reopen(self, study: str, *, actor: Actor) -> None:
        """Its slots can be claimed again."""
        self._change(study, "study.reopen", actor, {"closed_at": None}, {})

    def set_gold_share(self, study: str, share: float, *, actor: Actor) -> None:
        """The share of a rater's tasks that are hidden gold items; 0.05 to 0.1 is usual."""
        _check_gold_share(share)
        self._change(study, "study.gold-share", actor, {"gold_share": share}, {"share": share})

    def _change(
        self, study: str, action: str, actor: Actor, values: Mapping[str, object], details: Mapping[str, object]
    ) -> None:
        with self._store.write() as connection:
            found = self._locked(connection, study)
            connection.execute(sa.update(studies).where(studies.c.id == found.id).values(**values))
            audit.record(connection, actor, action, study, details, now=self._clock())

    def assign_raters(self, study: str, names: Sequence[str], *, actor: Actor) -> None:
        """Only these raters of its group may work on a study; with none named, the whole group may."""
        with self._store.write() as connection:
            found = self._locked(connection, study)
            rows = connection.execute(sa.select(raters.c.id, raters.c.name, raters.c.rater_group))
            known = {row.name: row for row in rows}
            for name in names:
                group = known[name].rater_group if name in known else None
                if group != found.rater_group:
                    is_in = "not known" if group is None else f"in group {group!r}"
                    raise StoreError(
                        f"Rater {name!r} is {is_in}; study {study!r} is for group {found.rater_group!r}. Name raters "
                        "of that group."
                    )
            connection.execute(sa.delete(study_raters).where(study_raters.c.study_id == found.id))
            chosen = sorted({int(known[name].id) for name in names})
            if chosen:
                connection.execute(
                    sa.insert(study_raters), [{"study_id": found.id, "rater_id": rater} for rater in chosen]
                )
            details = {"raters": sorted(set(names))}
            audit.record(connection, actor, "study.assign", study, details, now=self._clock())

    def assigned_raters(self, study: str) -> list[str]:
        """The raters that a study is kept to; none where the whole group may work on it."""
        with self._store.read() as connection:
            found = questions.find(connection, study)
            statement = (
                sa.select(raters.c.name)
                .join(study_raters, study_raters.c.rater_id == raters.c.id)
                .where(study_raters.c.study_id == found.id)
                .order_by(raters.c.name)
            )
            return list(connection.execute(statement).scalars())

    # --- questions ----------------------------------------------------------------------------------------------

    def import_file(self, study: str, path: Path, *, actor: Actor, shown_as: str | None = None) -> Imported:
        """Add the items of a file (JSONL, parquet, ...), whole or not at all: an error names the file and the line.

        `shown_as` names the file in errors where it was uploaded and lies under another name.
        """
        with self._store.read() as connection:
            found = questions.find(connection, study)
            known = _known(connection, found)
        return self.import_items(study, read_items(path, found, known, shown_as=shown_as), actor=actor)

    def import_items(self, study: str, new: Sequence[NewItem], *, actor: Actor) -> Imported:
        """Add items; those that the study has already, with the same content, are left alone."""
        with self._store.write() as connection:
            found = self._locked(connection, study)
            imported = _add(connection, found, new, slots=not found.screening)
            self._record_import(connection, actor, "items.import", study, imported)
            return imported

    def import_gold_file(self, study: str, path: Path, *, actor: Actor, shown_as: str | None = None) -> Imported:
        """Add gold items from a file whose rows have an `expected` answer; whole or not at all."""
        with self._store.read() as connection:
            found = questions.find(connection, study)
            known = _known(connection, found)
        return self.add_gold(study, read_gold(path, found, known, shown_as=shown_as), actor=actor)

    def add_gold(self, study: str, new: Sequence[GoldItem], *, actor: Actor) -> Imported:
        """Add questions whose answers are known: hidden among the others, or the whole of a screening study.

        They get no slots, count in no progress and stand in no export. A demonstration has no expected answer and
        belongs in a screening study, where a lead grades it.
        """
        with self._store.write() as connection:
            found = self._locked(connection, study)
            if found.kind == "demonstration" and not found.screening:
                raise StoreError(
                    f"Study {study!r} asks for demonstrations, which have no known answer; put them into a screening "
                    "study and grade them."
                )
            for one in new:
                if one.expected is not None:
                    check_expected(found.kind, one.expected, len(one.item.outputs))
                elif found.kind != "demonstration":
                    raise StoreError(f"Gold item {one.item.key!r} has no expected answer; give one.")
            before = set(_known(connection, found))
            imported = _add(connection, found, [one.item for one in new], slots=False)
            _keep_expected(connection, found, new, before, now=self._clock())
            self._record_import(connection, actor, "gold.import", study, imported)
            return imported

    def _record_import(
        self, connection: sa.Connection, actor: Actor, action: str, study: str, imported: Imported
    ) -> None:
        details = {"added": imported.added, "known": imported.known}
        audit.record(connection, actor, action, study, details, now=self._clock())

    # --- guidelines ---------------------------------------------------------------------------------------------

    def guidelines(self) -> list[StoredGuideline]:
        """All versions, newest first."""
        with self._store.read() as connection:
            users: dict[str, list[str]] = {}
            for row in connection.execute(
                sa.select(studies.c.name, studies.c.guideline_version).order_by(studies.c.id)
            ):
                users.setdefault(row.guideline_version, []).append(row.name)
            rows = connection.execute(
                sa.select(guidelines).order_by(guidelines.c.created_at.desc(), guidelines.c.version)
            )
            return [
                StoredGuideline(
                    version=row.version,
                    text=row.text,
                    created_at=row.created_at,
                    studies=tuple(users.get(row.version, ())),
                )
                for row in rows
            ]

    def set_guideline(self, study: str, guideline: Guideline, *, actor: Actor) -> None:
        """Give a study another guideline: a changed text is a new version. Answers given keep the version of theirs."""
        if not guideline.text.strip():
            raise StoreError("The guideline is empty; write what raters are to do.")
        with self._store.write() as connection:
            self._store.lock_store(connection)
            found = self._locked(connection, study)
            now = self._clock()
            questions.keep_guideline(connection, guideline, now=now)
            connection.execute(
                sa.update(studies).where(studies.c.id == found.id).values(guideline_version=guideline.version)
            )
            details = {"from": found.guideline_version, "to": guideline.version}
            audit.record(connection, actor, questions.GUIDELINE_SET, study, details, now=now)

    # --- unblinding ---------------------------------------------------------------------------------------------

    def unblind(self, study: str, *, reason: str, actor: Actor, item: int | None = None) -> list[Unblinded]:
        """Which model or run wrote the outputs of a study, or of one item of it; with a reason, and audited."""
        if not reason.strip():
            raise StoreError("Unblinding needs a reason; it is written into the audit log.")
        with self._store.write() as connection:
            found = questions.find(connection, study)
            rows = connection.execute(
                sa.select(items.c.id, items.c.key, outputs.c.position, outputs.c.source)
                .join(outputs, outputs.c.item_id == items.c.id)
                .where(items.c.study_id == found.id, sa.true() if item is None else items.c.id == item)
                .order_by(items.c.position, outputs.c.position)
            ).all()
            if not rows:
                what = f"Study {study!r}" if item is None else f"Item {item} of study {study!r}"
                raise StoreError(f"{what} has no outputs, so there is nothing to unblind.")
            details = {"reason": reason, "item": item, "outputs": len(rows)}
            audit.record(connection, actor, "study.unblind", study, details, now=self._clock())
        counts = Counter(row.id for row in rows)
        return [
            Unblinded(
                item=row.id,
                key=row.key,
                letter=LETTERS[row.position],
                shown_as=LETTERS[questions.blind_order(found, row.key, counts[row.id]).index(row.position)],
                source=row.source,
            )
            for row in rows
        ]

    def _locked(self, connection: sa.Connection, study: str) -> Study:
        found = questions.find(connection, study)
        self._store.lock_studies(connection, [found.id])
        return questions.find(connection, study)


def _overviews(connection: sa.Connection) -> list[StudyOverview]:
    asked = studies.join(items, items.c.study_id == studies.c.id).outerjoin(gold, gold.c.item_id == items.c.id)
    counted = {
        row.id: row
        for row in connection.execute(
            sa.select(
                studies.c.id, sa.func.count(items.c.id).label("items"), sa.func.count(gold.c.item_id).label("gold")
            )
            .select_from(asked)
            .group_by(studies.c.id)
        )
    }
    slots = {
        row.id: row
        for row in connection.execute(
            sa.select(
                studies.c.id,
                sa.func.count().label("slots"),
                sa.func.count(sa.case((assignments.c.state == "done", 1))).label("done"),
            )
            .select_from(asked.join(assignments, assignments.c.item_id == items.c.id))
            .where(gold.c.item_id.is_(None), ~studies.c.screening)
            .group_by(studies.c.id)
        )
    }
    remarked = {
        (row.study_id, row.kind): row.number
        for row in connection.execute(
            sa.select(assignments.c.study_id, remarks.c.kind, sa.func.count().label("number"))
            .select_from(remarks)
            .join(leases, leases.c.id == remarks.c.lease_id)
            .join(assignments, assignments.c.id == leases.c.assignment_id)
            .group_by(assignments.c.study_id, remarks.c.kind)
        )
    }
    return [
        StudyOverview(
            name=row.name,
            kind=row.kind,
            purpose=row.purpose,
            rater_group=row.rater_group,
            overlap=row.overlap,
            guideline_version=row.guideline_version,
            screening=row.screening,
            gold_share=row.gold_share,
            closed=row.closed_at is not None,
            created_at=row.created_at,
            items=counted[row.id].items if row.id in counted else 0,
            gold_items=counted[row.id].gold if row.id in counted else 0,
            slots=slots[row.id].slots if row.id in slots else 0,
            answered=slots[row.id].done if row.id in slots else 0,
            skips=remarked.get((row.id, "skip"), 0),
            flags=remarked.get((row.id, "flag"), 0),
        )
        for row in connection.execute(sa.select(studies).order_by(studies.c.id.desc()))
    ]


def _add(connection: sa.Connection, study: Study, new: Sequence[NewItem], *, slots: bool) -> Imported:
    checked = [questions.checked(study, item) for item in new]
    before = len(_known(connection, study))
    questions.add_items(connection, study, study.id, checked, slots=slots)
    added = len(_known(connection, study)) - before
    return Imported(added=added, known=len(new) - added)


def _keep_expected(
    connection: sa.Connection, study: Study, new: Sequence[GoldItem], before: Set[str], *, now: float
) -> None:
    """Store the expected answers of new items; those of items that were there `before` must be what they were."""
    wanted = {one.item.key: answer_to_json(one.expected) for one in new if one.expected is not None}
    stored = sa.select(items.c.id, items.c.key, gold.c.expected).outerjoin(gold, gold.c.item_id == items.c.id)
    fresh = []
    for row in connection.execute(stored.where(items.c.study_id == study.id)):
        if row.key in wanted and row.key not in before:
            fresh.append({"item_id": row.id, "expected": wanted[row.key], "created_at": now})
        elif row.key in wanted and row.expected != wanted[row.key]:
            was = "an open question" if row.expected is None else f"gold with the answer {row.expected!r}"
            raise StoreError(
                f"Item {row.key!r} is in study {study.name!r} already, as {was}; answers were judged by that. Give the "
                "gold item another id."
            )
    if fresh:
        connection.execute(sa.insert(gold), fresh)


def _known(connection: sa.Connection, study: Study) -> dict[str, str]:
    """The content hashes of a study's items, by key."""
    rows = connection.execute(sa.select(items.c.key, items.c.content_hash).where(items.c.study_id == study.id))
    return {row.key: row.content_hash for row in rows}


def _check_gold_share(share: float) -> None:
    if not 0 <= share <= MOST_GOLD:
        raise StoreError(f"The share of gold items is {share}; it must be from 0 to {MOST_GOLD}.")
