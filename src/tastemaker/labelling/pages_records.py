"""Exports and the audit log: what leaves the store, and what has been done in it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, cast

from fastapi import APIRouter, Form, Query
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from tastemaker.errors import StoreError, TastemakerError
from tastemaker.labelling.forms import Asked, Field, Text, percent
from tastemaker.labelling.settings import Limit
from tastemaker.labelling.web import LEADS, Link, Page, require
from tastemaker.store.audit import Head
from tastemaker.store.exports import MANIFEST, ExportConfig, Format

READERS = (*LEADS, "researcher")
AUDITORS = ("auditor", *LEADS)

routes = APIRouter()
LINKS: Sequence[Link] = (
    Link(
        path="/exports",
        label="Exports",
        roles=frozenset(READERS),
        about="Answers as files that training reads, under pseudonyms, with a manifest.",
    ),
    Link(
        path="/audit",
        label="Audit log",
        roles=frozenset(AUDITORS),
        about="Who did what, under which role, and whether the log is whole.",
    ),
)

ReaderPage = Annotated[Page, require(*READERS)]
AuditorPage = Annotated[Page, require(*AUDITORS)]

ENTRIES_SHOWN = 50
# Both read the whole of something large.
EXPORT_LIMIT = Limit(burst=20, per_second=1 / 15)
VERIFY_LIMIT = Limit(burst=10, per_second=1 / 30)
LONGEST_HEAD = 100


class ExportForm(BaseModel):
    """An export as it was asked for."""

    study: list[Text] = []
    format: Text = "jsonl"
    validation: Text = "10"
    test: Text = "0"
    held_out: list[Text] = []
    pairs: Text = ""
    adjudicated: Text = ""
    reason: Text = ""
    then: Text = "download"


# --- exports --------------------------------------------------------------------------------------------------------


@routes.get("/exports")
def exports(page: ReaderPage, study: Asked = "") -> Response:
    return _exports(page, ExportForm(study=[study] if study else [], adjudicated="yes"))


@routes.post("/exports")
def export(page: ReaderPage, form: Annotated[ExportForm, Form()]) -> Response:
    """The export as a zip, or only its manifest. Nothing of it stays on the server."""
    page.throttle("export", EXPORT_LIMIT)
    if form.reason.strip() and page.role not in LEADS:
        raise HTTPException(403, "Only a lead may unblind an export.")
    folder = Path(tempfile.mkdtemp(prefix="tastemaker-export-"))
    try:
        manifest = _write(page, form, folder / "export")
        if form.then == "manifest":
            return _exports(page, form, manifest=manifest)
        packed = _packed(folder / "export", _file_name(form.study))
    except TastemakerError as refusal:
        return _exports(page, form, status=422, problem=str(refusal))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    headers = {"Content-Disposition": f'attachment; filename="{_file_name(form.study)}.zip"'}
    return StreamingResponse(_chunks(packed), media_type="application/zip", headers=headers)


def _write(page: Page, form: ExportForm, folder: Path) -> dict[str, object]:
    known = {study.name: study for study in page.services.lead.studies() if not study.screening}
    if not form.study or not set(form.study) <= set(known):
        raise StoreError("No study was chosen; choose one or more of one kind.")
    config = ExportConfig(
        format=cast(Format, form.format),  # checked by the config itself
        validation=percent(form.validation, "share for validation"),
        test=percent(form.test, "share for the test"),
        held_out_groups=tuple(sorted(set(form.held_out))),
        pairs=bool(form.pairs),
        adjudicated=bool(form.adjudicated),
    )
    reason = form.reason if form.reason.strip() else None
    page.services.exports.export(form.study, folder, actor=page.actor, config=config, unblind_reason=reason)
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _packed(folder: Path, name: str) -> IO[bytes]:
    """The folder as a zip in a file that has no name, so that nothing is left when it is closed."""
    packed = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who sends it
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{name}/{path.relative_to(folder).as_posix()}")
    packed.seek(0)
    return packed


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(1 << 16):
            yield chunk


def _file_name(studies: Sequence[str]) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", " ".join(studies).lower()).strip("-")[:60].strip("-")
    return words or "export"


def _exports(
    page: Page, form: ExportForm, *, status: int = 200, problem: str = "", manifest: dict[str, object] | None = None
) -> Response:
    studies = [study for study in page.services.lead.studies() if not study.screening]
    return page.render(
        "lead/exports.html",
        status=status,
        studies=studies,
        groups=sorted({study.rater_group for study in studies}),
        form=form,
        problem=problem,
        manifest=manifest,
        manifest_text=json.dumps(manifest, indent=2, ensure_ascii=False) if manifest else "",
        may_unblind=page.role in LEADS,
    )


# --- the audit log --------------------------------------------------------------------------------------------------


@routes.get("/audit")
def audit(
    page: AuditorPage,
    action: Asked = "",
    actor: Asked = "",
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
) -> Response:
    return _audit(page, action=action.strip(), actor=actor.strip(), before=before)


@routes.post("/audit/verify")
def verify(page: AuditorPage, since: Field = "") -> Response:
    page.throttle("verify", VERIFY_LIMIT)
    try:
        if len(since.strip()) > LONGEST_HEAD:
            raise StoreError("That is no place in an audit log; give SEQUENCE:HASH as this page showed it.")
        verdict = page.services.audit.verify(since=Head.parse(since) if since.strip() else None)
    except StoreError as refusal:
        return _audit(page, status=422, since=since, problem=str(refusal))
    return _audit(page, since=since, verdict=verdict)


def _audit(
    page: Page,
    *,
    status: int = 200,
    action: str = "",
    actor: str = "",
    before: int | None = None,
    since: str = "",
    problem: str = "",
    verdict: object = None,
) -> Response:
    entries = page.services.audit.entries(
        limit=ENTRIES_SHOWN + 1, before=before, action=action or None, actor=actor or None
    )
    shown = entries[:ENTRIES_SHOWN]
    return page.render(
        "lead/audit.html",
        status=status,
        entries=[(entry, json.dumps(entry.details, ensure_ascii=False) if entry.details else "") for entry in shown],
        older=shown[-1].sequence if len(entries) > ENTRIES_SHOWN else None,
        action=action,
        actor=actor,
        before=before,
        since=since,
        problem=problem,
        verdict=verdict,
    )
