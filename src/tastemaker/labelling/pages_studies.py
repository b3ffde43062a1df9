"""The leads' pages about studies: making one, filling it from files, staffing, closing, its guideline, unblinding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

from fastapi import APIRouter, Form, UploadFile
from pydantic import BaseModel
from starlette.responses import Response

from tastemaker.errors import StoreError, TastemakerError
from tastemaker.labelling.forms import Asked, Field, Text, at, known_study, number, percent, uploaded, whole
from tastemaker.labelling.web import LEADS, LeadPage, Link, Page
from tastemaker.store.lead import MOST_GOLD, Imported, StudyOverview
from tastemaker.store.tasks import Guideline, Purpose, StudyConfig, StudyKind

routes = APIRouter()
LINKS: Sequence[Link] = (
    Link(
        path="/studies",
        label="Studies",
        roles=frozenset(LEADS),
        about="Set up rounds of questions, fill them from files, see how far they are.",
    ),
)


MOST_OVERLAP = 100
LONGEST_LEASE_MINUTES = 24 * 60


class StudyForm(BaseModel):
    """A new study as it was typed."""

    name: Text = ""
    kind: Text = "ranking"
    purpose: Text = "training"
    rater_group: Text = ""
    overlap: Text = "1"
    lease_minutes: Text = "30"
    gold_share: Text = "0"
    guideline_version: Text = ""
    guideline_text: Text = ""
    screening: Text = ""


# --- all studies ----------------------------------------------------------------------------------------------------


@routes.get("/studies")
def studies(page: LeadPage) -> Response:
    return page.render("lead/studies.html", studies=page.services.lead.studies())


@routes.get("/studies/new")
def new_study(page: LeadPage) -> Response:
    return _new_study(page, StudyForm())


@routes.post("/studies/new")
def create_study(page: LeadPage, form: Annotated[StudyForm, Form()]) -> Response:
    try:
        config = StudyConfig(
            name=form.name.strip(),
            kind=cast(StudyKind, form.kind),  # checked by the config itself
            purpose=cast(Purpose, form.purpose),
            rater_group=form.rater_group.strip(),
            overlap=whole(form.overlap, "number of answers to each item", least=1, most=MOST_OVERLAP),
            lease_minutes=number(form.lease_minutes, "time for a task", least=1, most=LONGEST_LEASE_MINUTES),
            guideline=_guideline(page, form.guideline_version, form.guideline_text),
        )
        page.services.lead.create_study(
            config,
            actor=page.actor,
            screening=bool(form.screening),
            gold_share=percent(form.gold_share, "share of gold items", most=100 * MOST_GOLD),
        )
    except TastemakerError as refusal:
        return _new_study(page, form, status=422, problem=str(refusal))
    return page.redirect(_address(config.name), said=f"The study {config.name} is made; now import its items.")


def _new_study(page: Page, form: StudyForm, *, status: int = 200, problem: str = "") -> Response:
    return page.render(
        "lead/study_new.html",
        status=status,
        form=form,
        problem=problem,
        groups=_groups(page),
        versions=[one.version for one in page.services.lead.guidelines()],
    )


def _guideline(page: Page, version: str, text: str) -> Guideline:
    """A new guideline, or with no text the stored one of that version."""
    version = version.strip()
    if text.strip():
        return Guideline(version=version, text=text)
    for known in page.services.lead.guidelines():
        if known.version == version:
            return Guideline(version=version, text=known.text)
    raise StoreError("The guideline is empty; write what raters are to do, or name a version that exists.")


def _groups(page: Page) -> list[str]:
    """Groups of raters that anything is known of, to choose from."""
    named = {study.rater_group for study in page.services.lead.studies()}
    joined = {account.rater_group for account in page.services.access.accounts()}
    return sorted(named | {group for group in joined if group is not None})


# --- one study ------------------------------------------------------------------------------------------------------


@routes.get("/studies/study")
def study(page: LeadPage, study: Asked = "") -> Response:
    return _study(page, known_study(page, study))


@routes.post("/studies/close")
def close(page: LeadPage, study: Field = "") -> Response:
    page.services.lead.close(known_study(page, study).name, actor=page.actor)
    return page.redirect(_address(study), said="The study is closed; what raters hold can still be answered.")


@routes.post("/studies/reopen")
def reopen(page: LeadPage, study: Field = "") -> Response:
    page.services.lead.reopen(known_study(page, study).name, actor=page.actor)
    return page.redirect(_address(study), said="The study is open again.")


@routes.post("/studies/gold-share")
def set_gold_share(page: LeadPage, study: Field = "", share: Field = "") -> Response:
    found = known_study(page, study)
    try:
        wanted = percent(share, "share of gold items", most=100 * MOST_GOLD)
        page.services.lead.set_gold_share(found.name, wanted, actor=page.actor)
    except TastemakerError as refusal:
        return _study(page, found, status=422, share=share, share_problem=str(refusal))
    return page.redirect(_address(study), said=f"From now on {wanted:.3g} of a rater's tasks are hidden gold items.")


@routes.post("/studies/raters")
def assign_raters(page: LeadPage, study: Field = "", rater: Annotated[list[Text] | None, Form()] = None) -> Response:
    found = known_study(page, study)
    names = rater or []
    try:
        page.services.lead.assign_raters(found.name, names, actor=page.actor)
    except TastemakerError as refusal:
        return _study(page, found, status=422, raters_problem=str(refusal), chosen=names)
    said = f"{len(set(names))} of the group may work on it now." if names else "The whole group may work on it now."
    return page.redirect(_address(study), said=said)


@routes.post("/studies/import")
def import_items(page: LeadPage, study: Field = "", file: UploadFile | None = None) -> Response:
    found = known_study(page, study)
    try:
        with uploaded(file) as (path, name):
            imported = page.services.lead.import_file(found.name, path, actor=page.actor, shown_as=name)
    except TastemakerError as refusal:
        return _study(page, found, status=422, import_problem=str(refusal))
    return page.redirect(_address(study), said=_said(imported, "item"))


@routes.post("/studies/gold/import")
def import_gold(page: LeadPage, study: Field = "", file: UploadFile | None = None) -> Response:
    found = known_study(page, study)
    try:
        with uploaded(file) as (path, name):
            imported = page.services.lead.import_gold_file(found.name, path, actor=page.actor, shown_as=name)
    except TastemakerError as refusal:
        return _study(page, found, status=422, gold_problem=str(refusal))
    return page.redirect(_address(study), said=_said(imported, "gold item"))


def _study(
    page: Page,
    study: StudyOverview,
    *,
    status: int = 200,
    import_problem: str = "",
    gold_problem: str = "",
    share_problem: str = "",
    raters_problem: str = "",
    share: str | None = None,
    chosen: Sequence[str] | None = None,
) -> Response:
    assigned = page.services.lead.assigned_raters(study.name)
    group = {
        account.rater
        for account in page.services.access.accounts()
        if account.rater is not None and account.rater_group == study.rater_group
    }
    return page.render(
        "lead/study.html",
        status=status,
        study=study,
        import_problem=import_problem,
        gold_problem=gold_problem,
        share_problem=share_problem,
        raters_problem=raters_problem,
        share=f"{100 * study.gold_share:.3g}" if share is None else share,
        raters=sorted(group | set(assigned)),
        assigned=assigned if chosen is None else chosen,
    )


def _address(study: str) -> str:
    return at("/studies/study", study=study)


def _said(imported: Imported, what: str) -> str:
    ending = "" if imported.added == 1 else "s"
    known = f"; {imported.known} more were there already" if imported.known else ""
    return f"{imported.added} {what}{ending} added{known}."


# --- its guideline --------------------------------------------------------------------------------------------------


@routes.get("/studies/guideline")
def guideline(page: LeadPage, study: Asked = "") -> Response:
    return _guideline_form(page, known_study(page, study))


@routes.post("/studies/guideline")
def set_guideline(page: LeadPage, study: Field = "", version: Field = "", text: Field = "") -> Response:
    found = known_study(page, study)
    try:
        if not version.strip() or not version.isprintable():
            raise StoreError("The version has no name; give it one, such as a date.")
        page.services.lead.set_guideline(found.name, Guideline(version=version.strip(), text=text), actor=page.actor)
    except TastemakerError as refusal:
        return _guideline_form(page, found, status=422, version=version, text=text, problem=str(refusal))
    return page.redirect(at("/studies/guideline", study=study), said=f"Version {version.strip()} holds from now on.")


def _guideline_form(
    page: Page,
    study: StudyOverview,
    *,
    status: int = 200,
    version: str = "",
    text: str | None = None,
    problem: str = "",
) -> Response:
    versions = page.services.lead.guidelines()
    now = next(one for one in versions if one.version == study.guideline_version)
    return page.render(
        "lead/guideline.html",
        status=status,
        study=study,
        now=now,
        others=[one for one in versions if one is not now],
        version=version,
        text=now.text if text is None else text,
        problem=problem,
    )


# --- unblinding -----------------------------------------------------------------------------------------------------


@routes.get("/studies/unblind")
def unblind_form(page: LeadPage, study: Asked = "", item: Asked = "") -> Response:
    found = known_study(page, study)
    return page.render("lead/unblind.html", study=found, item=item, reason="", problem="", revealed=None)


@routes.post("/studies/unblind")
def unblind(page: LeadPage, study: Field = "", item: Field = "", reason: Field = "") -> Response:
    found = known_study(page, study)
    revealed, problem = None, ""
    try:
        which = whole(item, "item", least=1, most=2**31 - 1) if item.strip() else None
        revealed = page.services.lead.unblind(found.name, reason=reason, actor=page.actor, item=which)
    except TastemakerError as refusal:
        problem = str(refusal)
    return page.render(
        "lead/unblind.html",
        status=422 if problem else 200,
        study=found,
        item=item,
        reason=reason,
        problem=problem,
        revealed=revealed,
    )
