"""The pages on which people's answers are judged: the screening of new raters, and items on which raters disagree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Form
from pydantic import BaseModel
from starlette.datastructures import FormData
from starlette.responses import Response

from tastemaker.errors import StoreError, TastemakerError
from tastemaker.labelling.figures import Line, line
from tastemaker.labelling.forms import (
    Asked,
    Field,
    Fields,
    Text,
    answer_in,
    at,
    known_study,
    number,
    percent,
    plain,
    whole,
)
from tastemaker.labelling.web import LEADS, LeadPage, Link, Page, not_found, require
from tastemaker.store.lead import StudyOverview
from tastemaker.store.screening import GRADES, CutOffs, GroupCutOffs, Result
from tastemaker.store.tasks import FLAGS, LIKERT_POINTS

ADJUDICATORS = ("adjudicator", *LEADS)

routes = APIRouter()
LINKS: Sequence[Link] = (
    Link(
        path="/screening",
        label="Screening",
        roles=frozenset(LEADS),
        about="What new raters' tests came to, demonstrations to grade, and who may work.",
    ),
    Link(
        path="/adjudication",
        label="Adjudication",
        roles=frozenset(ADJUDICATORS),
        about="Items on which raters disagree, and the answer that counts in the end.",
    ),
)

AdjudicatorPage = Annotated[Page, require(*ADJUDICATORS)]


class CutOffsForm(BaseModel):
    """A group's cut-offs as they were typed, shares in percent; `unasked` names the parts that have none."""

    group: Text = ""
    flags: Text = ""
    rankings: Text = ""
    demonstrations: Text = ""
    unasked: list[Text] = []

    @staticmethod
    def of(asked: GroupCutOffs) -> CutOffsForm:
        values = asked.cut_offs
        return CutOffsForm(
            group=asked.rater_group,
            flags="" if values.flags is None else f"{100 * values.flags:.10g}",
            rankings="" if values.rankings is None else f"{100 * values.rankings:.10g}",
            demonstrations="" if values.demonstrations is None else f"{values.demonstrations:.10g}",
            unasked=[name for name in ("flags", "rankings", "demonstrations") if getattr(values, name) is None],
        )

    def read(self) -> CutOffs:
        """What was typed, or an error of one sentence."""
        least, most = GRADES
        return CutOffs(
            flags=self._part("flags", lambda typed: percent(typed, "share of flags")),
            rankings=self._part("rankings", lambda typed: percent(typed, "share of rankings")),
            demonstrations=self._part(
                "demonstrations",
                lambda typed: number(typed, "mean grade of demonstrations", least=least, most=most),
            ),
        )

    def _part(self, name: str, read: Callable[[str], float]) -> float | None:
        if name in self.unasked:
            return None
        typed = str(getattr(self, name))
        if not typed.strip():
            raise StoreError(f"The cut-off for {name} is missing; give a number, or tick “not asked”.")
        return read(typed)


# --- screening ------------------------------------------------------------------------------------------------------


@routes.get("/screening")
def screening(page: LeadPage) -> Response:
    return _screening(page)


@routes.post("/screening/cut-offs")
def set_cut_offs(page: LeadPage, form: Annotated[CutOffsForm, Form()]) -> Response:
    if form.group not in {asked.rater_group for asked in page.services.screening.cut_offs()}:
        not_found()
    try:
        changed = page.services.screening.set_cut_offs(form.group, form.read(), actor=page.actor)
    except TastemakerError as refusal:
        return _screening(page, status=422, typed=form, cut_offs_problem=str(refusal))
    said = "hold from now on" if changed else "are as they were"
    return page.redirect("/screening", said=f"The cut-offs of the group {form.group} {said}.")


@routes.post("/screening/decide")
def decide(page: LeadPage, rater: Field = "", reason: Field = "", passed: Field = "") -> Response:
    if rater not in {result.rater for result in page.services.screening.results()}:
        not_found()
    try:
        if passed not in ("yes", "no"):
            raise StoreError("It was not said whether the rater may work; choose one of the two.")
        page.services.screening.decide(rater, passed=passed == "yes", reason=reason, actor=page.actor)
    except TastemakerError as refusal:
        return _screening(page, status=422, rater=rater, reason=reason, problem=str(refusal))
    return page.redirect("/screening", said=f"{rater} {'may work now' if passed == 'yes' else 'may not work'}.")


@routes.post("/screening/grade")
def grade(page: LeadPage, answer: Field = "", score: Field = "") -> Response:
    try:
        which = whole(answer, "answer", least=1, most=2**31 - 1)
        if not score:
            raise StoreError("No grade was chosen; choose one from 1 to 7.")
        page.services.screening.grade(which, whole(score, "grade", least=1, most=LIKERT_POINTS), actor=page.actor)
    except TastemakerError as refusal:
        return _screening(page, status=422, grade_problem=str(refusal))
    return page.redirect("/screening#grading", said="The grade is kept.")


def _screening(
    page: Page,
    *,
    status: int = 200,
    rater: str = "",
    reason: str = "",
    problem: str = "",
    typed: CutOffsForm | None = None,
    cut_offs_problem: str = "",
    grade_problem: str = "",
) -> Response:
    results: dict[str, list[tuple[Result, list[Line]]]] = {}
    for result in page.services.screening.results():
        results.setdefault(result.rater_group, []).append((result, _parts(result)))
    groups = []
    for asked in page.services.screening.cut_offs():
        again = typed if typed is not None and typed.group == asked.rater_group else None
        form, wrong = (CutOffsForm.of(asked), "") if again is None else (again, cut_offs_problem)
        groups.append((asked, _least(asked.cut_offs), form, wrong, results.get(asked.rater_group, [])))
    return page.render(
        "lead/screening.html",
        status=status,
        groups=groups,
        to_grade=page.services.screening.to_grade(),
        rater=rater,
        reason=reason,
        problem=problem,
        grade_problem=grade_problem,
    )


def _least(cut_offs: CutOffs) -> str:
    """The cut-offs as a sentence."""
    parts = []
    if cut_offs.flags is not None:
        parts.append(f"{100 * cut_offs.flags:.10g} % of flags as known")
    if cut_offs.rankings is not None:
        parts.append(f"{100 * cut_offs.rankings:.10g} % of rankings as known")
    if cut_offs.demonstrations is not None:
        parts.append(f"a mean grade of {cut_offs.demonstrations:.10g} of {LIKERT_POINTS}")
    return f"At least {', '.join(parts)}." if parts else "Nothing beyond answering the whole test."


def _parts(result: Result) -> list[Line]:
    least = result.cut_offs
    return [
        line("Flags as known", result.flags, mark=None if least.flags is None else 100 * least.flags),
        line("Rankings as known", result.rankings, mark=None if least.rankings is None else 100 * least.rankings),
        line("Mean grade of demonstrations", result.demonstrations, "grade"),
    ]


# --- adjudication ---------------------------------------------------------------------------------------------------


@routes.get("/adjudication")
def adjudication(page: AdjudicatorPage, study: Asked = "") -> Response:
    names = [one.name for one in page.services.lead.studies() if _has_disputes(one)]
    if study and study not in names:
        not_found()
    found = study or (names[0] if len(names) == 1 else "")
    disputed = page.services.adjudication.disputed(found, actor=page.actor) if found else []
    return page.render("lead/adjudication.html", studies=names, study=found, disputed=disputed)


@routes.get("/adjudication/item")
def case(page: AdjudicatorPage, study: Asked = "", item: Asked = "") -> Response:
    return _case(page, study, item, {})


@routes.post("/adjudication/item")
def adjudicate(page: AdjudicatorPage, fields: Fields) -> Response:
    study, item, reason = (plain(fields, name) for name in ("study", "item", "reason"))
    found = known_study(page, study)
    if not _has_disputes(found):
        not_found()
    try:
        number = whole(item, "item", least=1, most=2**31 - 1)
        asked = page.services.adjudication.case(found.name, number, actor=page.actor)
        answer = answer_in(asked.kind, [output.letter for output in asked.outputs], fields)
        page.services.adjudication.adjudicate(found.name, number, answer, reason=reason, actor=page.actor)
    except TastemakerError as refusal:
        return _case(page, study, item, fields, problem=str(refusal))
    return page.redirect(at("/adjudication", study=study), said=f"Item {asked.number} is settled.")


def _has_disputes(study: StudyOverview) -> bool:
    return study.kind != "demonstration" and not study.screening


def _case(page: Page, study: str, item: str, typed: FormData | Mapping[str, str], *, problem: str = "") -> Response:
    found = known_study(page, study)
    if not _has_disputes(found):
        not_found()
    try:
        number = whole(item, "item", least=1, most=2**31 - 1)
        asked = page.services.adjudication.case(found.name, number, actor=page.actor)
    except StoreError:
        not_found()
    return page.render(
        "lead/case.html",
        status=422 if problem else 200,
        case=asked,
        typed=typed,
        problem=problem,
        flags=FLAGS,
        points=LIKERT_POINTS,
        may_unblind=page.account.roles & set(LEADS),
    )
