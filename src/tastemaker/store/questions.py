"""The asking side of the store's SQL: studies and their items going in, blind tasks coming out."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.records import About, Message, Messages, Prompt, Response
from tastemaker.store.schema import assignments, audit, guidelines, items, leases, outputs, raters, studies
from tastemaker.store.tasks import (
    LETTERS,
    OUTPUTS_ALLOWED,
    Guideline,
    NewItem,
    PrivatePrompt,
    ShownOutput,
    StudyConfig,
    StudyKind,
    Task,
    check_name,
    order_seed,
    order_shown,
)

# Rows named one by one in a query: below the limits of both databases with room to spare.
CHUNK = 500

# What the audit log calls it when a lead gives a study another guideline.
GUIDELINE_SET = "guideline.set"


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study as it is stored."""

    id: int
    name: str
    kind: StudyKind
    overlap: int
    rater_group: str
    lease_seconds: float
    guideline_version: str
    screening: bool
    gold_share: float
    closed_at: float | None
    secret: str = field(repr=False)  # in no view, file or export


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedItem:
    """An item whose parts are fit to be stored; equal contents have equal hashes."""

    item: NewItem
    messages: list[dict[str, str]]
    private: Mapping[str, object]
    content_hash: str


def checked(study: StudyConfig | Study, item: NewItem) -> CheckedItem:
    """Check an item against its study's kind."""
    check_name("item's key", item.key)
    least, most = OUTPUTS_ALLOWED[study.kind]
    if not least <= len(item.outputs) <= most:
        allowed = str(least) if least == most else f"{least} to {most}"
        raise StoreError(
            f"Item {item.key!r} has {len(item.outputs)} outputs; an item of the {study.kind} study {study.name!r} has "
            f"{allowed}."
        )
    messages = [message.to_json() for message in item.prompt.messages]
    about = item.prompt.about
    private = {"id": about.id, "user": about.user, "split": about.split, "extra": dict(about.extra)}
    judged = [[output.response.text, output.response.finished, output.source] for output in item.outputs]
    try:
        content = json.dumps([messages, about.category, private, judged], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"Item {item.key!r}: what is known about its prompt cannot be stored ({error}); use plain JSON values."
        ) from error
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return CheckedItem(item=item, messages=messages, private=private, content_hash=digest)


def find(connection: sa.Connection, name: str) -> Study:
    """The study of that name."""
    row = connection.execute(sa.select(studies).where(studies.c.name == name)).one_or_none()
    if row is None:
        known = ", ".join(connection.execute(sa.select(studies.c.name).order_by(studies.c.id).limit(20)).scalars())
        raise StoreError(f"There is no study {name!r}; the store has {known or 'none yet'}.")
    return as_study(row)


def every(connection: sa.Connection) -> list[Study]:
    """All studies, oldest first."""
    return [as_study(row) for row in connection.execute(sa.select(studies).order_by(studies.c.id))]


def as_study(row: sa.Row[tuple[object, ...]]) -> Study:
    """A row of `studies`."""
    return Study(
        id=row.id,
        name=row.name,
        kind=row.kind,
        overlap=row.overlap,
        rater_group=row.rater_group,
        lease_seconds=row.lease_seconds,
        guideline_version=row.guideline_version,
        screening=row.screening,
        gold_share=row.gold_share,
        closed_at=row.closed_at,
        secret=row.secret,
    )


def blind_order(study: Study, key: str, count: int) -> tuple[int, ...]:
    """An item's outputs, by index, in the order in which adjudicators and readers of blinded exports see them.

    The order queued often tells what wrote them; this one follows from the study's secret, and is the item's for ever.
    """
    digest = hashlib.blake2b("\x1f".join((study.secret, "blind order", key)).encode(), digest_size=8).digest()
    return order_shown(int.from_bytes(digest), count)


def find_or_create(connection: sa.Connection, study: StudyConfig, *, now: float) -> int:
    """The id of a study, which must be as it was when it was created, but for a guideline that a lead has replaced."""
    keep_guideline(connection, study.guideline, now=now)
    wanted = {
        "kind": study.kind,
        "purpose": study.purpose,
        "guideline_version": study.guideline.version,
        "overlap": study.overlap,
        "rater_group": study.rater_group,
        "lease_seconds": study.lease_minutes * 60,
    }
    row = connection.execute(sa.select(studies).where(studies.c.name == study.name)).one_or_none()
    if row is None:
        new = {"name": study.name, "created_at": now, "secret": secrets.token_hex(16), **wanted}
        return int(connection.execute(sa.insert(studies).values(new).returning(studies.c.id)).scalar_one())
    stored = dict(row._mapping)
    if study.guideline.version in replaced_guidelines(connection, study.name):
        stored["guideline_version"] = study.guideline.version
    changed = [f"{name} was {stored[name]!r}, is {wanted[name]!r}" for name in wanted if stored[name] != wanted[name]]
    if changed:
        raise StoreError(f"Study {study.name!r} exists and differs: {'; '.join(changed)}. Give the new one a new name.")
    return int(row.id)


def replaced_guidelines(connection: sa.Connection, study: str) -> set[str]:
    """The versions of the guideline that a study once had."""
    replaced = sa.select(audit.c.details).where(audit.c.action == GUIDELINE_SET, audit.c.object == study)
    return {details["from"] for details in connection.execute(replaced).scalars()}


def keep_guideline(connection: sa.Connection, guideline: Guideline, *, now: float) -> None:
    """Store a guideline, or find it stored with the same text."""
    version, text = guideline.version, guideline.text
    stored = connection.execute(sa.select(guidelines.c.text).where(guidelines.c.version == version)).one_or_none()
    if stored is None:
        connection.execute(sa.insert(guidelines).values(version=version, text=text, created_at=now))
    elif stored.text != text:
        raise StoreError(
            f"Guideline {version!r} is stored with another text; answers name the version they were given under. "
            "Give the changed text a new version."
        )


def add_items(
    connection: sa.Connection,
    study: StudyConfig | Study,
    study_id: int,
    new: Sequence[CheckedItem],
    *,
    slots: bool = True,
) -> None:
    """Store those items that the study does not have, with their outputs and their slots.

    Items that test raters (gold, screening) get no slots: one is made for each rater who is given the item.
    """
    rows = connection.execute(sa.select(items.c.key, items.c.content_hash).where(items.c.study_id == study_id))
    known: dict[str, str] = {row.key: row.content_hash for row in rows}
    first_position = len(known)
    fresh: list[CheckedItem] = []
    for item in new:
        key = item.item.key
        if key not in known:
            known[key] = item.content_hash
            fresh.append(item)
        elif known[key] != item.content_hash:
            raise StoreError(
                f"Item {key!r} is in study {study.name!r} already, with another content; answers belong to what was "
                "asked. Give the new item another key, or queue it in another study."
            )
    if not fresh:
        return
    connection.execute(
        sa.insert(items),
        [
            {
                "study_id": study_id,
                "position": position,
                "key": item.item.key,
                "messages": item.messages,
                "category": item.item.prompt.about.category,
                "private": item.private,
                "content_hash": item.content_hash,
            }
            for position, item in enumerate(fresh, first_position)
        ],
    )
    stored = sa.select(items.c.key, items.c.id).where(items.c.study_id == study_id, items.c.position >= first_position)
    id_of: dict[str, int] = {row.key: row.id for row in connection.execute(stored)}
    _add_outputs(connection, fresh, id_of)
    if slots:
        _add_slots(connection, study, study_id, fresh, id_of, first_position)


def _add_outputs(connection: sa.Connection, fresh: Sequence[CheckedItem], id_of: Mapping[str, int]) -> None:
    rows = [
        {
            "item_id": id_of[item.item.key],
            "position": position,
            "text": output.response.text,
            "finished": output.response.finished,
            "source": output.source,
        }
        for item in fresh
        for position, output in enumerate(item.item.outputs)
    ]
    if rows:
        connection.execute(sa.insert(outputs), rows)


def _add_slots(
    connection: sa.Connection,
    study: StudyConfig | Study,
    study_id: int,
    fresh: Sequence[CheckedItem],
    id_of: Mapping[str, int],
    first_position: int,
) -> None:
    connection.execute(
        sa.insert(assignments),
        [
            {
                "id": secrets.token_hex(16),
                "study_id": study_id,
                "item_id": id_of[item.item.key],
                "slot": slot,
                "sequence": position * study.overlap + slot,
                "order_seed": order_seed(study.name, item.item.key, slot),
                "state": "open",
            }
            for position, item in enumerate(fresh, first_position)
            for slot in range(study.overlap)
        ],
    )


def tasks(connection: sa.Connection, study: Study, which: sa.ColumnElement[bool]) -> list[Task]:
    """The leased tasks of a study, blind."""
    held = sa.and_(
        assignments.c.study_id == study.id, assignments.c.state == "leased", leases.c.token == assignments.c.claim_token
    )
    return list(given_out(connection, sa.and_(held, which)).values())


def given_out(connection: sa.Connection, which: sa.ColumnElement[bool]) -> dict[int, Task]:
    """Tasks by the lease under which they were given out, blind: this is the only place where tasks are made."""
    given = leases.join(assignments, assignments.c.id == leases.c.assignment_id)
    texts: dict[int, list[str]] = {}
    for row in connection.execute(
        sa.select(leases.c.id, outputs.c.text)
        .select_from(given.join(outputs, outputs.c.item_id == assignments.c.item_id))
        .where(which)
        .order_by(leases.c.id, outputs.c.position)
    ):
        texts.setdefault(row.id, []).append(row.text)
    rows = connection.execute(
        sa.select(
            leases.c.id.label("lease"),
            leases.c.token,
            assignments.c.id,
            assignments.c.order_seed,
            studies.c.kind,
            studies.c.guideline_version,
            items.c.messages,
        )
        .select_from(
            given.join(items, items.c.id == assignments.c.item_id).join(studies, studies.c.id == assignments.c.study_id)
        )
        .where(which)
        .order_by(assignments.c.sequence, leases.c.id)
    )
    return {
        row.lease: Task(
            id=row.id,
            token=row.token,
            kind=row.kind,
            guideline_version=row.guideline_version,
            messages=read_messages(row.messages),
            outputs=_shown(texts.get(row.lease, []), row.order_seed),
        )
        for row in rows
    }


def private_prompts(connection: sa.Connection, task_ids: Sequence[str]) -> dict[str, PrivatePrompt]:
    """The private records of tasks that simulated raters hold."""
    found: dict[str, PrivatePrompt] = {}
    for start in range(0, len(task_ids), CHUNK):
        mine = sa.and_(
            assignments.c.id.in_(task_ids[start : start + CHUNK]),
            assignments.c.state == "leased",
            raters.c.origin == "simulated",
        )
        responses: dict[str, list[Response]] = {}
        for row in connection.execute(
            sa.select(assignments.c.id, outputs.c.text, outputs.c.finished)
            .join(raters, raters.c.id == assignments.c.rater_id)
            .join(outputs, outputs.c.item_id == assignments.c.item_id)
            .where(mine)
            .order_by(outputs.c.item_id, outputs.c.position)
        ):
            responses.setdefault(row.id, []).append(Response(text=row.text, finished=row.finished))
        asked = sa.select(
            assignments.c.id,
            assignments.c.order_seed,
            items.c.position,
            items.c.messages,
            items.c.category,
            items.c.private,
        )
        for task in connection.execute(
            asked.join(raters, raters.c.id == assignments.c.rater_id)
            .join(items, items.c.id == assignments.c.item_id)
            .where(mine)
        ):
            queued = responses.get(task.id, [])
            shown = tuple(queued[index] for index in order_shown(task.order_seed, len(queued)))
            prompt = read_prompt(task.messages, task.category, task.private)
            found[task.id] = PrivatePrompt(prompt=prompt, responses=shown, place=task.position)
    if len(found) < len(set(task_ids)):
        lacking = next(task_id for task_id in task_ids if task_id not in found)
        raise StoreError(
            f"Task {lacking!r} is not leased to a simulated rater; what is known about its prompt stays private."
        )
    return found


def _shown(texts: Sequence[str], seed: int) -> tuple[ShownOutput, ...]:
    order = order_shown(seed, len(texts))
    return tuple(ShownOutput(letter=letter, text=texts[index]) for letter, index in zip(LETTERS, order, strict=False))


def read_messages(rows: Sequence[Mapping[str, str]]) -> Messages:
    """Messages as they are stored. Their roles were checked when they were queued."""
    return tuple(Message(row["role"], row["content"]) for row in rows)  # type: ignore[arg-type]


def read_prompt(messages: Sequence[Mapping[str, str]], category: str | None, private: Mapping[str, object]) -> Prompt:
    """A prompt as it was queued."""
    about = About(category=category, **private)  # type: ignore[arg-type]  # the stored fields are About's own
    return Prompt(messages=read_messages(messages), about=about)
