"""A rater's pages: what there is to do, a task of each kind, the rater's own answers, guideline and topics.

The paper's interface (Figure 12), with what it leaves unsaid: each response is rated alone or all are ranked, ties
allowed; blind, under letters; the guideline beside the task, its version sent along with the answer. Everything here is
a form that works without JavaScript. With it, drafts save themselves (`task.js`) and keys rank (`task_keys.js`).

A task is one form whose buttons say what to do with it: `act` is submit, draft, flag or skip. So whatever is pressed,
all that was typed comes along, and comes back where something is wrong. Asking for a task is a POST: looking at a
page hands nothing out.

The pages name the kind of a study and never the study: names that a pipeline gives would tell a rater what it is for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Body, Depends, Form
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tastemaker.errors import StoreError
from tastemaker.labelling.answer_forms import FLAG_LABELS, MAX_TEXT, answer_of, check_fields, field_names, fields_of
from tastemaker.labelling.web import Link, Page, require
from tastemaker.store.desk import MAX_NOTE, MAX_TOPIC_NAME, MAX_TOPICS
from tastemaker.store.tasks import StudyKind
from tastemaker.store.views import (
    FLAG_REASONS,
    SKIP_REASONS,
    TOPIC_LEVELS,
    TOPICS,
    DeskStudy,
    DraftConflict,
    NotYours,
    RevisionConflict,
    StudyLocked,
    TaskView,
)

routes = APIRouter()
LINKS = (
    Link(path="/desk", label="Work", roles=frozenset({"rater"}), about="Write, rate, rank and compare responses."),
)

TITLES: Mapping[StudyKind, str] = {
    "demonstration": "Write a response",
    "rating": "Rate responses",
    "ranking": "Rank responses",
    "comparison": "Compare two responses",
}
INSTRUCTIONS: Mapping[StudyKind, str] = {
    "demonstration": "Write what the assistant should answer next.",
    "rating": "Rate each response on its own, as if the others were not there.",
    "ranking": "Give every response a rank, 1 for the best. Responses that are equally good get the same rank.",
    "comparison": "Choose the better response, or say that they are equally good.",
}
HISTORY_PAGE = 50
# What a task's form holds beside the answer.
_CONTROLS = frozenset(
    {"csrf_token", "act", "seconds", "guideline_version", "draft_version", "skip_reason", "flag_reason", "note"}
)

RaterPage = Annotated[Page, require("rater")]
Field = Annotated[str, Form()]


async def _posted(request: Request) -> Mapping[str, str]:
    """The fields of a form whose names only its page knows, with line ends as they were typed."""
    async with request.form() as form:
        fields: dict[str, str] = {}
        for name, value in form.multi_items():
            if not isinstance(value, str):
                raise HTTPException(422, "This form takes no files.")
            if name in fields:
                raise HTTPException(422, f"The field {name[:80]!r} is given twice; open the page anew and try again.")
            fields[name] = value.replace("\r\n", "\n").replace("\r", "\n")  # forms are sent with CRLF
        return fields


Posted = Annotated[Mapping[str, str], Depends(_posted)]


def _rater(page: Page) -> str:
    if page.account.rater is None:
        raise HTTPException(403, "Your account belongs to no group of raters; ask a lead to invite you as a rater.")
    return page.account.rater


# --- what there is to do ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TitledStudy:
    """A study under the title by which its rater knows it."""

    title: str
    study: DeskStudy


def _titled(studies: Sequence[DeskStudy]) -> list[TitledStudy]:
    """Each study's title: its kind, with a number from the second of a kind on."""
    seen: Counter[tuple[str, bool]] = Counter()
    titled = []
    for study in studies:
        seen[study.kind, study.screening] += 1
        number = seen[study.kind, study.screening]
        title = f"{TITLES[study.kind]}{f' ({number})' if number > 1 else ''}"
        titled.append(TitledStudy(title=title, study=study))
    return titled


def _in_titles(reason: str, titled: Sequence[TitledStudy]) -> str:
    """Why a study is locked, with the titles of the studies begun in place of their names."""
    begun = sorted((one.study.name, one.title) for one in titled if one.study.begun)
    names, titles = (", ".join(pair[place] for pair in begun) for place in (0, 1))
    return reason.replace(f"({names})", f"({titles})")


def _open(titled: Sequence[TitledStudy]) -> list[TitledStudy]:
    return [one for one in titled if one.study.left and one.study.locked_because is None]


@routes.get("/desk")
def work(page: RaterPage) -> Response:
    rater, desk = _rater(page), page.services.desk
    titled = _titled(desk.studies(rater))
    return page.render(
        "rater_work.html",
        screening=[one for one in titled if one.study.screening],
        ready=[one for one in _open(titled) if not one.study.screening],
        locked=[
            (one.title, _in_titles(one.study.locked_because, titled))
            for one in titled
            if one.study.locked_because is not None and one.study.left
        ],
        finished=[one for one in titled if not one.study.left and not one.study.screening],
        progress=desk.progress(rater),
        topics_said=bool(desk.profile(rater).topics),
    )


@routes.post("/desk/next")
def next_task(page: RaterPage, study: Field = "") -> Response:
    page.throttle("claim", page.web.settings.claim)
    return _go_on(page, study)


def _go_on(page: Page, study: str, *, said: str = "") -> Response:
    """On to the rater's next task of a study, or to the page that says why there is none."""
    rater, desk = _rater(page), page.services.desk
    try:
        view = desk.next_task(rater, study)
    except StudyLocked as locked:
        reason = _in_titles(str(locked), _titled(desk.studies(rater)))
        return page.redirect("/desk", said=f"{said} {reason}".strip(), kind="note")
    if view is None:
        return page.redirect(f"/desk/finished?study={quote(study, safe='')}", said=said)
    return page.redirect(f"/desk/tasks/{view.task.id}", said=said)


@routes.get("/desk/finished")
def finished(page: RaterPage, study: str = "") -> Response:
    rater, desk = _rater(page), page.services.desk
    titled = _titled(desk.studies(rater))
    return page.render(
        "rater_finished.html",
        done=next((one for one in titled if one.study.name == study), None),
        others=[one for one in _open(titled) if one.study.name != study],
        progress=desk.progress(rater),
    )


# --- a task -----------------------------------------------------------------------------------------------------------


@routes.get("/desk/tasks/{task_id}")
def task(page: RaterPage, task_id: str) -> Response:
    return _task_page(page, page.services.desk.task(_rater(page), task_id))


@routes.post("/desk/tasks/{task_id}")
def act_on_task(page: RaterPage, task_id: str, posted: Posted) -> Response:
    page.throttle("submit", page.web.settings.submit)
    view = page.services.desk.task(_rater(page), task_id)
    act = _ACTS.get(posted.get("act", "submit"))
    if act is None:
        raise HTTPException(422, f"A task cannot be asked to {posted['act'][:80]!r}; press one of its buttons.")
    try:
        return act(page, view, posted)
    except DraftConflict as conflict:
        return _task_page(page, view, posted=posted, problem=str(conflict), status=409)
    except StoreError as error:
        return _task_page(page, view, posted=posted, problem=str(error), status=422)


def _submit(page: Page, view: TaskView, posted: Mapping[str, str]) -> Response:
    standing = page.services.desk.submit(
        _rater(page),
        view.task.id,
        answer_of(view.task, _answer_fields(posted)),
        seconds=_seconds(posted.get("seconds", "")),
        guideline_version=posted.get("guideline_version") or None,
    )
    if view.given is not None:
        return page.redirect(f"/desk/tasks/{view.task.id}", said="Your answer is stored as it is now.")
    said = "Your answer is stored."
    if standing == "extra":
        said = "Your answer is kept. The task had gone to somebody else meanwhile, so theirs is the one that counts."
    return _go_on(page, view.study, said=said)


def _save(page: Page, view: TaskView, posted: Mapping[str, str]) -> Response:
    fields = {**_answer_fields(posted), "seconds": posted.get("seconds", "")}
    _keep_draft(page, view, fields, _draft_version(view, posted))
    return page.redirect(f"/desk/tasks/{view.task.id}", said="Your draft is saved.")


def _flag(page: Page, view: TaskView, posted: Mapping[str, str]) -> Response:
    reason = posted.get("flag_reason")
    if not reason:
        raise StoreError("Choose what a lead should look at.")
    page.services.desk.flag(_rater(page), view.task.id, reason, posted.get("note") or None)
    if any(_answer_fields(posted).values()):
        _save(page, view, posted)
    said = "Thank you, a lead will look at it. Please answer the task all the same, or skip it."
    return page.redirect(f"/desk/tasks/{view.task.id}", said=said)


def _skip(page: Page, view: TaskView, posted: Mapping[str, str]) -> Response:
    page.services.desk.skip(_rater(page), view.task.id, posted.get("skip_reason") or None, posted.get("note") or None)
    return _go_on(page, view.study, said="Skipped. This task will not come to you again.")


_ACTS: Mapping[str, Callable[[Page, TaskView, Mapping[str, str]], Response]] = {
    "submit": _submit,
    "draft": _save,
    "flag": _flag,
    "skip": _skip,
}


@routes.post("/desk/tasks/{task_id}/undo")
def undo(page: RaterPage, task_id: str, revision: Field = "") -> Response:
    page.throttle("submit", page.web.settings.submit)
    newest = int(revision) if revision.isascii() and revision.isdecimal() and len(revision) < 10 else 0
    try:
        page.services.desk.undo(_rater(page), task_id, revision=newest)
    except RevisionConflict:  # a second click, or a page from before the newest change
        said = "Nothing was undone by that: your answer had changed already. This is how it stands."
        return page.redirect(f"/desk/tasks/{task_id}", said=said, kind="note")
    return page.redirect(f"/desk/tasks/{task_id}", said="The answer before counts again.")


@routes.post("/desk/tasks/{task_id}/draft")
def save_draft(
    page: RaterPage, task_id: str, body: Annotated[dict[str, str], Body()], version: Annotated[int, Body()]
) -> Response:
    """For scripts: keep what is on the page, `seconds` so far included; answers with the next save's version."""
    page.throttle("draft", page.web.settings.submit)
    view = page.services.desk.task(_rater(page), task_id)
    return JSONResponse({"version": _keep_draft(page, view, body, version)})


@routes.post("/desk/tasks/{task_id}/heartbeat")
def heartbeat(page: RaterPage, task_id: str) -> Response:
    """For scripts: the page is still looked at; answers whether the task is still held."""
    page.throttle("draft", page.web.settings.submit)
    return JSONResponse({"held": page.services.desk.heartbeat(_rater(page), task_id) is not None})


def _keep_draft(page: Page, view: TaskView, fields: Mapping[str, str], version: int) -> int:
    """Save the fields of an answer and the `seconds` that it took so far; returns the draft's version."""
    _seconds(fields.get("seconds", ""))
    check_fields(view.task, {name: value for name, value in fields.items() if name != "seconds"})
    return page.services.desk.save_draft(_rater(page), view.task.id, fields, version)


def _answer_fields(posted: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in posted.items() if name not in _CONTROLS}


def _seconds(value: str) -> float | None:
    """The time on task that a page counted; a page without JavaScript counts none."""
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,9}([.][0-9]{1,9})?", value):
        raise StoreError(f"The time spent is {value[:80]!r}; it must be a number of seconds.")
    return float(value)


def _draft_version(view: TaskView, posted: Mapping[str, str]) -> int:
    """The version that the page was made from; one that says none has the one of now."""
    value = posted.get("draft_version", "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 16 else view.draft_version


def _task_page(
    page: Page, view: TaskView, *, posted: Mapping[str, str] | None = None, problem: str = "", status: int = 200
) -> Response:
    """A task: as it was posted with its problem, or else with the draft, the answer given, or nothing filled in."""
    rater, desk = _rater(page), page.services.desk
    names = field_names(view.task) | {"seconds"}
    if posted is not None:
        fields: Mapping[str, str] = posted
    elif view.draft is not None:
        fields = {name: str(value) for name, value in view.draft.body.items() if name in names}
    else:
        fields = fields_of(view.given.answer) if view.given is not None else {}
    before = next((one for one in desk.history(rater, limit=2) if one.task_id != view.task.id), None)
    return page.render(
        "rater_task.html",
        status=status,
        view=view,
        task=view.task,
        fields=fields,
        draft_version=_draft_version(view, posted or {}),
        problem=problem,
        restored=posted is None and view.draft is not None,
        guideline=_guideline_text(page, view.task.guideline_version),
        unfold=before is None and view.given is None,  # a rater's very first task
        before=before,
        title=TITLES[view.task.kind],
        instruction=INSTRUCTIONS[view.task.kind],
        flag_labels=FLAG_LABELS,
        skip_reasons=SKIP_REASONS,
        flag_reasons=FLAG_REASONS,
        longest={"text": MAX_TEXT, "note": MAX_NOTE},
    )


def _guideline_text(page: Page, version: str) -> str | None:
    """What the task goes by; None where its study was closed to the rater since."""
    try:
        return page.services.desk.guideline(_rater(page), version).text
    except NotYours:
        return None


# --- the rater's own pages --------------------------------------------------------------------------------------------


@routes.get("/desk/guideline")
def guideline(page: RaterPage, version: str = "") -> Response:
    return page.render("rater_guideline.html", guideline=page.services.desk.guideline(_rater(page), version))


@routes.get("/desk/history")
def history(page: RaterPage, before: str = "") -> Response:
    rater, desk = _rater(page), page.services.desk
    entries = desk.history(rater, limit=HISTORY_PAGE, before=before or None)
    return page.render(
        "rater_history.html",
        entries=entries,
        titles=TITLES,
        older=entries[-1].task_id if len(entries) == HISTORY_PAGE else None,
        later=bool(before),
        progress=desk.progress(rater),
    )


@routes.get("/desk/topics")
def topics(page: RaterPage) -> Response:
    said = page.services.desk.profile(_rater(page)).topics
    names = [*TOPICS, *sorted(set(said) - set(TOPICS))]
    fields = {f"topic-{index}": name for index, name in enumerate(names)}
    fields |= {f"level-{index}": str(said[name]) for index, name in enumerate(names) if name in said}
    return _topics_page(page, fields)


@routes.post("/desk/topics")
def set_topics(page: RaterPage, posted: Posted) -> Response:
    try:
        page.services.desk.set_topics(_rater(page), _topics_of(posted))
    except StoreError as error:
        return _topics_page(page, posted, problem=str(error), status=422)
    return page.redirect("/desk", said="Thank you; what you say of your topics is stored.")


def _topics_of(posted: Mapping[str, str]) -> dict[str, int]:
    said: dict[str, int] = {}
    for index in range(MAX_TOPICS + 1):
        name, level = posted.get(f"topic-{index}", "").strip(), posted.get(f"level-{index}", "")
        if not level:
            continue  # nobody has to judge themselves on every topic
        if not name:
            raise StoreError("Name the topic that you added, or leave its level out.")
        if level not in map(str, range(1, TOPIC_LEVELS + 1)):
            raise StoreError(f"{name[:80]!r} is {level[:80]!r}; it must be a whole number from 1 to {TOPIC_LEVELS}.")
        if name in said:
            raise StoreError(f"The topic {name[:80]!r} stands there twice; say it once.")
        said[name] = int(level)
    return said


def _topics_page(page: Page, fields: Mapping[str, str], *, problem: str = "", status: int = 200) -> Response:
    named = [index for index in range(MAX_TOPICS) if f"topic-{index}" in fields]
    return page.render(
        "rater_topics.html",
        status=status,
        rows=named,
        # A posted form has its row for a new topic already.
        new=None if problem or len(named) >= MAX_TOPICS else len(named),
        given=len(TOPICS),
        fields=fields,
        levels=range(1, TOPIC_LEVELS + 1),
        longest=MAX_TOPIC_NAME,
        problem=problem,
    )
