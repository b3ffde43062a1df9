"""The API under /api/v1: what raters' pages do, for programs, and what leads' programs ask.

Callers are known by API token alone (`security`); each handler works by the same services as the pages, in the name of
the token's account. Nothing here sees more than a page does, with one exception: `/tasks/ID/private` tells simulated
raters what is known about a prompt, for the tasks that they themselves hold. No person's account can have the role that
it asks for (`AccessService.create_service` gives it to programs, whose answers are marked as simulated for ever).

Every act but `undo` may be sent again without harm, which is what lets a client go on after a lost connection: the same
answer changes nothing, and `undo` names what it takes back. `wire` has the shapes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tastemaker import __version__
from tastemaker.config import to_json
from tastemaker.errors import StoreError
from tastemaker.labelling import wire
from tastemaker.labelling.web import AsciiJson, LeadPage, Link, Page, open_to_all, require
from tastemaker.store.desk import MAX_HISTORY, Desk
from tastemaker.store.exports import ExportConfig
from tastemaker.store.lead import StudyOverview
from tastemaker.store.tasks import Guideline
from tastemaker.store.views import DeskProgress, DeskStudy, HistoryEntry

PREFIX = "/api/v1"
LINKS: Sequence[Link] = ()

routes = APIRouter(
    prefix=PREFIX, responses={"4XX": {"model": wire.Problem, "description": "Refused; the sentence says why."}}
)

AnyPage = Annotated[Page, open_to_all()]
OwnPage = Annotated[Page, require()]
RaterPage = Annotated[Page, require("rater")]
ServicePage = Annotated[Page, require("service")]
ExportPage = Annotated[Page, require("researcher", "lead", "admin")]

TaskId = Annotated[str, Path(description="A task's `id`. Another rater's is a 404, as one that does not exist.")]


@routes.get("/openapi.json", include_in_schema=False)
def openapi(page: AnyPage) -> Response:
    return AsciiJson(document())


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    found = get_openapi(
        title="Tastemaker labelling",
        version=__version__,
        summary="What raters and leads do on the pages, for programs.",
        description=(
            "Give an API token with each request: `Authorization: Bearer TOKEN`. Tokens are made on the account's "
            "page. A refusal has a status from 400 to 499 and one sentence; after 429 wait as `Retry-After` says."
        ),
        routes=routes.routes,
        tags=[
            {"name": "rater", "description": "The desk of the token's rater."},
            {"name": "simulated raters", "description": "For accounts of programs that answer as simulated raters."},
            {"name": "lead", "description": "For leads and researchers."},
        ],
    )
    found.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"token": []}]
    return found


# --- the rater's desk -------------------------------------------------------------------------------------------------


@routes.get("/me", tags=["rater"], response_model=wire.Me)
def me(page: OwnPage) -> Response:
    """Whose token this is."""
    _count(page)
    return _answered(wire.me(page.account))


@routes.get("/studies", tags=["rater"], response_model=list[DeskStudy])
def studies(page: RaterPage) -> Response:
    """The rater's studies, oldest first: how much they answered, how much is left, and why one is locked."""
    desk, rater = _desk(page)
    return _answered(desk.studies(rater))


@routes.post("/tasks/next", tags=["rater"], response_model=wire.NextTask)
def next_task(page: RaterPage, body: wire.NextTaskBody) -> Response:
    """The task of a study that the rater holds, or else the next one. Asking again gives the same task."""
    desk, rater = _desk(page, "claim")
    view = desk.next_task(rater, body.study)
    return _answered(wire.NextTask(task=None if view is None else wire.shown_task(view)))


@routes.get("/tasks/{task_id}", tags=["rater"], response_model=wire.ShownTask)
def task(page: RaterPage, task_id: TaskId) -> Response:
    """A task that the rater was given, whatever has become of it: with its draft, and their answer."""
    desk, rater = _desk(page)
    return _answered(wire.shown_task(desk.task(rater, task_id)))


@routes.post("/tasks/{task_id}/heartbeat", tags=["rater"], response_model=wire.Lease)
def heartbeat(page: RaterPage, task_id: TaskId) -> Response:
    """Say that the rater is still at it: the lease is extended."""
    desk, rater = _desk(page)
    return _answered(wire.Lease(leased_until=desk.heartbeat(rater, task_id)))


@routes.put("/tasks/{task_id}/draft", tags=["rater"], response_model=wire.DraftSaved)
def save_draft(page: RaterPage, task_id: TaskId, body: wire.DraftBody) -> Response:
    """Keep what was written so far. 409 where a newer draft is there."""
    desk, rater = _desk(page)
    return _answered(wire.DraftSaved(version=desk.save_draft(rater, task_id, body.body, body.version)))


@routes.post("/tasks/{task_id}/answer", tags=["rater"], response_model=wire.Submitted)
def submit(page: RaterPage, task_id: TaskId, body: wire.AnswerBody) -> Response:
    """Hand in the answer, which is stored when this returns. The same again changes nothing, another corrects it."""
    desk, rater = _desk(page, "submit")
    answer = wire.answer_of(body)
    standing = desk.submit(rater, task_id, answer, body.seconds, guideline_version=body.guideline_version)
    return _answered(wire.Submitted(standing=standing))


@routes.put("/tasks/{task_id}/answer", tags=["rater"], response_model=wire.ShownTask)
def revise(page: RaterPage, task_id: TaskId, body: wire.AnswerBody) -> Response:
    """Correct an answer given earlier, which stays as an earlier revision. 422 where there is none."""
    desk, rater = _desk(page, "submit")
    if body.guideline_version is not None:
        raise StoreError("A correction is given under the study's guideline of now; leave out guideline_version.")
    desk.revise(rater, task_id, wire.answer_of(body), body.seconds)
    return _answered(wire.shown_task(desk.task(rater, task_id)))


@routes.post("/tasks/{task_id}/undo", tags=["rater"], response_model=wire.Undone)
def undo(page: RaterPage, task_id: TaskId, body: wire.UndoBody) -> Response:
    """Take back the newest revision: the one before it stands again. 409 where `revision` is not the newest."""
    desk, rater = _desk(page, "submit")
    answer = desk.undo(rater, task_id, revision=body.revision)
    kind = desk.task(rater, task_id).task.kind
    return _answered(wire.Undone(kind=kind, answer=wire.answer_json(answer, kind)["answer"]))


@routes.post("/tasks/{task_id}/skip", tags=["rater"], status_code=204)
def skip(page: RaterPage, task_id: TaskId, body: wire.RemarkBody) -> Response:
    """Pass the task on to others; its question never comes to this rater again."""
    desk, rater = _desk(page, "submit")
    desk.skip(rater, task_id, body.reason, body.note)
    return Response(status_code=204)


@routes.post("/tasks/{task_id}/flag", tags=["rater"], status_code=204)
def flag(page: RaterPage, task_id: TaskId, body: wire.FlagBody) -> Response:
    """Ask a lead to look at the task; it is answered all the same."""
    desk, rater = _desk(page, "submit")
    desk.flag(rater, task_id, body.reason, body.note)
    return Response(status_code=204)


@routes.get("/history", tags=["rater"], response_model=list[HistoryEntry])
def history(
    page: RaterPage,
    limit: Annotated[int, Query(ge=1, le=MAX_HISTORY)] = 50,
    before: Annotated[str | None, Query(description="The `task_id` of the last entry seen.")] = None,
) -> Response:
    """The rater's own answers, latest first."""
    desk, rater = _desk(page)
    return _answered(desk.history(rater, limit=limit, before=before))


@routes.get("/guideline", tags=["rater"], response_model=Guideline)
def guideline(page: RaterPage, version: str) -> Response:
    """The text of a guideline that the rater works or has worked under."""
    desk, rater = _desk(page)
    return _answered(desk.guideline(rater, version))


@routes.get("/progress", tags=["rater"], response_model=DeskProgress)
def progress(page: RaterPage) -> Response:
    """How much the rater has done today and in all."""
    desk, rater = _desk(page)
    return _answered(desk.progress(rater))


# --- simulated raters -------------------------------------------------------------------------------------------------


@routes.get("/tasks/{task_id}/private", tags=["simulated raters"], response_model=wire.ShownPrivate)
def private(page: ServicePage, task_id: TaskId) -> Response:
    """What is known about the prompt of a task that this simulated rater holds. People's tokens get a 403."""
    desk, rater = _desk(page)
    if desk.task(rater, task_id).state != "yours":  # another's is a 404
        raise HTTPException(409, "You do not hold this task any more; ask for the next one.")
    return _answered(wire.shown_private(page.services.labels.private_prompts([task_id])[task_id]))


# --- leads ------------------------------------------------------------------------------------------------------------


@routes.get("/lead/studies", tags=["lead"], response_model=list[StudyOverview])
def lead_studies(page: LeadPage) -> Response:
    """All studies and how far they are, newest first."""
    _count(page)
    return _answered(page.services.lead.studies())


@routes.post(
    "/lead/exports",
    tags=["lead"],
    response_class=Response,
    responses={200: {"content": {"application/jsonl": {}}, "description": "One answer a line."}},
)
def export(page: ExportPage, body: wire.ExportBody) -> Response:
    """The answers of studies of one kind as JSONL, in the shape that training reads; `split` says where each belongs.
    Raters go by pseudonyms, what wrote the outputs is left out, and the export stands in the audit log."""
    _count(page)
    config = ExportConfig(validation=body.validation, test=body.test, adjudicated=body.adjudicated)
    with tempfile.TemporaryDirectory() as folder:
        written = FilePath(folder) / "export"
        report = page.services.exports.export(body.studies, written, actor=page.actor, config=config)
        rows = b"".join((written / name).read_bytes() for name in sorted(report.answers))
    return Response(rows, media_type="application/jsonl")


# --- within -----------------------------------------------------------------------------------------------------------


def _desk(page: Page, what: str = "api") -> tuple[Desk, str]:
    """The desk, and the name of the rater who sits at it."""
    _count(page, what)
    rater = page.account.rater
    if rater is None:
        raise HTTPException(403, "Your account answers as no rater; ask an admin for one that does.")
    return page.services.desk, rater


def _count(page: Page, what: str = "api") -> None:
    """Count a request against the limit of its kind: people's claims and answers together with those on the pages."""
    settings = page.web.settings
    if what == "claim" and "service" not in page.account.roles:
        page.throttle("claim", settings.claim)
    elif what == "submit" and "service" not in page.account.roles:
        page.throttle("submit", settings.submit)
    else:
        page.throttle("api", settings.api)


def _answered(record: object) -> Response:
    """A record, or a list of them, as JSON."""
    return AsciiJson(to_json(record))
