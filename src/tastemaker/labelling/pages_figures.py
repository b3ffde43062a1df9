"""The dashboard: each study and each rater in figures with intervals, and in words what a lead should look at.

Researchers see figures only: raters are numbered there, and what concerns single ones is left to leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter
from starlette.responses import Response

from tastemaker.labelling.figures import Line, line, lines_of_rater, lines_of_study, numbered
from tastemaker.labelling.forms import Asked, known_study
from tastemaker.labelling.web import LEADS, LeadPage, Link, Page, not_found, require
from tastemaker.store.dashboard import RaterReport, Week

READERS = (*LEADS, "researcher")

routes = APIRouter()
LINKS: Sequence[Link] = (
    Link(
        path="/figures",
        label="Figures",
        roles=frozenset(READERS),
        about="Agreement, gold, times and habits, of studies and of raters.",
    ),
)

ReaderPage = Annotated[Page, require(*READERS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rater:
    """A row of the raters' table."""

    name: str
    report: RaterReport
    agreement: Line
    gold: Line
    seconds: Line


@dataclass(frozen=True, slots=True, kw_only=True)
class _Week:
    """A row of the weeks' table."""

    week: str
    answers: int
    agreement: Line
    gold: Line
    seconds: Line


@routes.get("/figures")
def figures(page: ReaderPage, study: Asked = "") -> Response:
    found = known_study(page, study) if study else None
    report = page.services.dashboard.study(found.name) if found is not None else None
    reports = page.services.dashboard.raters(None if found is None else found.name)
    named = page.role in LEADS
    names = {one.rater: one.rater for one in reports} if named else numbered(reports)
    rows = [
        _Rater(
            name=names[one.rater],
            report=one,
            agreement=line("", one.agreement),
            gold=line("", one.gold),
            seconds=line("", one.seconds_median, "seconds"),
        )
        for one in reports
    ]
    if not named:  # the order of the names would tell something of them
        rows.sort(key=lambda row: int(row.name.split()[1]))
    return page.render(
        "lead/figures.html",
        studies=[one.name for one in page.services.lead.studies()],
        study=study,
        report=report,
        lines=[] if report is None else lines_of_study(report),
        weeks=[] if report is None else [_week(week) for week in report.weeks],
        raters=rows,
        named=named,
    )


@routes.get("/figures/rater")
def rater(page: LeadPage, rater: Asked = "", study: Asked = "") -> Response:
    found = known_study(page, study).name if study else None
    for report in page.services.dashboard.raters(found):
        if report.rater == rater:
            return page.render(
                "lead/rater.html",
                study=study,
                report=report,
                lines=lines_of_rater(report),
                weeks=[_week(week) for week in report.weeks],
            )
    if rater in {account.rater for account in page.services.access.accounts() if account.rater}:
        return page.redirect("/figures", said=f"{rater} has answered nothing there yet.", kind="note")
    not_found()


def _week(week: Week) -> _Week:
    return _Week(
        week=week.week,
        answers=week.answers,
        agreement=line("", week.agreement),
        gold=line("", week.gold),
        seconds=line("", week.seconds_median, "seconds"),
    )
