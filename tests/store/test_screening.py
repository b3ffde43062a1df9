"""The screening test: shares against known answers, grades, cut-offs that advise, decisions; on both databases."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from tests.store.people import LATER, LEAD, actions, open_accounts, ranking, work

from tastemaker.agreement import Undefined
from tastemaker.errors import ConfigError, StoreError
from tastemaker.intervals import Estimate
from tastemaker.store import LabelService, Store
from tastemaker.store.audit import AuditLog
from tastemaker.store.desk import Desk
from tastemaker.store.importing import GoldItem
from tastemaker.store.lead import LeadService
from tastemaker.store.schema import screening_cut_offs
from tastemaker.store.screening import CutOffs, GroupCutOffs, ScreeningService
from tastemaker.store.tasks import DemonstrationAnswer, OutputRating, RankingAnswer, RatingAnswer

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

GOLD_RANKING = RankingAnswer((("C",), ("A",), ("B",)))
GOLD_RATING = RatingAnswer({"A": OutputRating(6), "B": OutputRating(2, ("hallucination",))})


@pytest.fixture
def screening(store: Store, service: LabelService, make: Make, clock: Clock) -> ScreeningService:
    """A test of two rankings, one rating of two outputs and two demonstrations."""
    open_accounts(store)
    make.raters(service, "ann", "bob", "new")
    lead = LeadService(store, clock=clock)
    for kind in ("ranking", "rating", "demonstration"):
        lead.create_study(make.study(kind, name=kind), actor=LEAD, screening=True)
    rankings = [GoldItem(item=make.item(f"r-{index}"), expected=GOLD_RANKING) for index in range(2)]
    lead.add_gold("ranking", rankings, actor=LEAD)
    lead.add_gold("rating", [GoldItem(item=make.item("q", 2), expected=GOLD_RATING)], actor=LEAD)
    lead.import_items("demonstration", [make.item(f"d-{index}", 0) for index in range(2)], actor=LEAD)
    return ScreeningService(store, clock=clock)


def take(desk: Desk, rater: str, second: list[list[int]]) -> None:
    work(desk, rater, "ranking", {"r-0": [[2], [0], [1]], "r-1": second})
    work(desk, rater, "rating", {"q": {0: OutputRating(5), 1: OutputRating(2, ("hallucination", "sexual_content"))}})
    while (view := desk.next_task(rater, "demonstration")) is not None:
        desk.submit(rater, view.task.id, DemonstrationAnswer(f"by {rater}"))


def value(figure: Estimate | Undefined) -> float:
    assert isinstance(figure, Estimate)
    assert figure.value in figure.ci95
    return figure.value


def test_a_test_from_first_answer_to_decision(store: Store, screening: ScreeningService, clock: Clock) -> None:
    desk = Desk(store, clock=clock)
    take(desk, "ann", [[2], [0, 1]])
    take(desk, "bob", [[1], [0], [2]])
    desk.set_topics("ann", {topic: 5 for topic in desk.profile("ann").topics})
    found = screening.result("ann")
    # Of r-0 all three pairs; of r-1 the pair that ann ties is lost: 5 of 6. Flags: one of 22 is wrong.
    assert value(found.rankings) == pytest.approx(5 / 6, abs=1e-9)
    assert value(found.flags) == pytest.approx(21 / 22, abs=1e-9)
    assert (found.answered, found.asked, found.ungraded, found.advice) == (5, 5, 2, "incomplete")
    # bob's second is the reverse of the first three: 3 of 6.
    assert value(screening.result("bob").rankings) == pytest.approx(1 / 2, abs=1e-9)
    assert not screening.pass_if_met("ann", actor=LEAD)

    waiting = screening.to_grade()
    assert len(waiting) == 4
    assert "rater" not in repr(waiting[0]).replace("by ann", "")
    for one in waiting:
        screening.grade(one.answer, 3, actor=LEAD)
        screening.grade(one.answer, 7, actor=LEAD)  # the newest grade of a lead counts
        screening.grade(one.answer, 6, actor=LATER)
    assert screening.to_grade() == []
    assert value(screening.result("ann").demonstrations) == pytest.approx(6.5, abs=1e-9)
    results = {one.rater: (one.advice, one.unmet) for one in screening.results()}
    assert results == {"ann": ("pass", ()), "bob": ("fail", ("rankings",)), "new": ("incomplete", ())}

    assert screening.pass_if_met("ann", actor=LEAD)
    assert not screening.pass_if_met("bob", actor=LEAD)
    screening.decide("bob", passed=True, reason="strong otherwise", actor=LEAD)
    screening.decide("bob", passed=False, reason="on second thought", actor=LEAD)
    ann, bob = screening.result("ann").decision, screening.result("bob").decision
    assert ann is not None
    assert (ann.passed, ann.by) == (True, None)
    assert bob is not None
    assert (bob.passed, bob.by, bob.reason) == (False, "lea", "on second thought")
    assert not screening.pass_if_met("bob", actor=LEAD)  # a lead's decision stands
    assert actions(store)[-3:] == ["screening.decide"] * 3


def test_the_gate_opens_with_the_decision(
    store: Store, service: LabelService, screening: ScreeningService, make: Make, clock: Clock
) -> None:
    desk = Desk(store, clock=clock)
    service.queue(make.study("comparison", name="work"), make.items(1, 2))
    with pytest.raises(StoreError):
        desk.next_task("new", "work")
    screening.decide("new", passed=True, reason="known from before", actor=LEAD)
    assert desk.next_task("new", "work") is not None


def test_a_test_that_was_replaced_is_not_waited_for(
    store: Store, screening: ScreeningService, make: Make, clock: Clock
) -> None:
    """ann answered one item of the first test, bob none; a third test is for new alone."""
    lead, desk = LeadService(store, clock=clock), Desk(store, clock=clock)
    view = desk.next_task("ann", "ranking")
    assert view is not None
    desk.submit("ann", view.task.id, ranking(view.task, [[2], [0], [1]]))
    for name in ("ranking", "rating", "demonstration"):
        lead.close(name, actor=LEAD)
    none = screening.result("bob")
    assert (none.answered, none.asked, none.advice) == (0, 0, "incomplete")  # nobody passes a test of nothing
    for name in ("second", "third"):
        lead.create_study(make.study("ranking", name=name), actor=LEAD, screening=True)
        lead.add_gold(name, [GoldItem(item=make.item(f"{name}-0"), expected=GOLD_RANKING)], actor=LEAD)
    lead.assign_raters("third", ["new"], actor=LEAD)
    asked = {one.rater: (one.answered, one.asked) for one in screening.results()}
    assert asked == {"ann": (1, 2), "bob": (0, 1), "new": (0, 2)}
    for rater in ("ann", "bob"):
        assert not screening.pass_if_met(rater, actor=LEAD)
        work(desk, rater, "second", {"second-0": [[2], [0], [1]]})
        assert screening.pass_if_met(rater, actor=LEAD)


PAPER = CutOffs()
SOFT = CutOffs(flags=0.9, rankings=0.5, demonstrations=None)


def test_the_newest_cut_offs_of_a_group_judge_its_raters(
    store: Store, screening: ScreeningService, clock: Clock
) -> None:
    desk = Desk(store, clock=clock)
    take(desk, "ann", [[2], [0, 1]])  # rankings 5/6, flags 21/22
    take(desk, "bob", [[1], [0], [2]])  # rankings 1/2
    for one in screening.to_grade():
        screening.grade(one.answer, 5, actor=LEAD)
    assert screening.cut_offs() == [GroupCutOffs(rater_group="team", cut_offs=PAPER)]
    assert screening.result("ann").unmet == ("demonstrations",)
    assert screening.result("bob").unmet == ("rankings", "demonstrations")
    assert not screening.pass_if_met("bob", actor=LEAD)

    clock.now += 60
    assert screening.set_cut_offs("team", SOFT, actor=LEAD)
    assert screening.cut_offs() == [GroupCutOffs(rater_group="team", cut_offs=SOFT, by="lea", at=clock.now)]
    found = screening.result("bob")
    assert (found.advice, found.unmet, found.cut_offs) == ("pass", (), SOFT)  # a share that is just met is met
    assert screening.pass_if_met("bob", actor=LEAD)

    strict = CutOffs(flags=0.96, rankings=5 / 6)  # flags are 21/22, 0.9545
    assert screening.set_cut_offs("team", strict, actor=LATER)
    (now,) = screening.cut_offs()
    assert (now.cut_offs, now.by) == (strict, "otto")
    assert screening.result("ann").unmet == ("flags", "demonstrations")
    assert not screening.pass_if_met("ann", actor=LEAD)
    bob = screening.result("bob")
    assert (bob.advice, bob.decision is not None and bob.decision.passed) == ("fail", True)  # what was decided stays
    assert screening.pass_if_met("bob", actor=LEAD)


def test_a_change_of_cut_offs_is_one_row_and_one_audit_entry(store: Store, screening: ScreeningService) -> None:
    assert screening.set_cut_offs("team", PAPER, actor=LEAD)  # from now on theirs, and no default's
    assert not screening.set_cut_offs("team", PAPER, actor=LATER)
    assert screening.set_cut_offs("team", SOFT, actor=LEAD)
    assert screening.set_cut_offs("team", PAPER, actor=LEAD)
    with store.read() as connection:
        rows = connection.execute(sa.select(screening_cut_offs).order_by(screening_cut_offs.c.id)).all()
    assert [(row.flags, row.rankings, row.demonstrations) for row in rows] == [
        (0.75, 0.75, 6.0),
        (0.9, 0.5, None),
        (0.75, 0.75, 6.0),
    ]
    assert actions(store)[-3:] == ["screening.cut-offs"] * 3
    _, entry = AuditLog(store).entries(limit=2)
    assert (entry.actor, entry.role, entry.object) == ("lea", "lead", "team")
    assert entry.details == {
        "from": {"flags": 0.75, "rankings": 0.75, "demonstrations": 6.0},
        "to": {"flags": 0.9, "rankings": 0.5, "demonstrations": None},
    }


def test_each_group_has_cut_offs_of_its_own(
    store: Store, service: LabelService, screening: ScreeningService, make: Make, clock: Clock
) -> None:
    others = dataclasses.replace(make.study("ranking", name="others"), rater_group="others")
    LeadService(store, clock=clock).create_study(others, actor=LEAD, screening=True)
    screening.set_cut_offs("others", SOFT, actor=LEAD)
    assert {one.rater_group: one.cut_offs for one in screening.cut_offs()} == {"others": SOFT, "team": PAPER}
    assert {one.cut_offs.flags for one in screening.results()} == {0.75}  # all of them are in the team
    service.queue(dataclasses.replace(make.study(name="work"), rater_group="workers"), make.items(1))
    for group in ("workers", "nobody"):
        with pytest.raises(StoreError, match=rf"'{group}' has no screening study.*: others, team\.$"):
            screening.set_cut_offs(group, SOFT, actor=LEAD)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flags": 75.0}, r"flags is 75\.0; it must be a share from 0 to 1"),
        ({"rankings": -0.01}, "share from 0 to 1"),
        ({"rankings": float("nan")}, "share from 0 to 1"),
        ({"demonstrations": 7.5}, "mean grade from 1 to 7"),
        ({"demonstrations": 0.0}, "mean grade from 1 to 7"),
    ],
)
def test_cut_offs_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CutOffs(**values)


def test_what_is_refused(store: Store, service: LabelService, screening: ScreeningService, clock: Clock) -> None:
    service.add_rater("zoe", group="others", origin="human")
    take(Desk(store, clock=clock), "ann", [[2], [0], [1]])
    answer = screening.to_grade()[0].answer
    for score in (0, 8, True):
        with pytest.raises(StoreError, match="1 to 7"):
            screening.grade(answer, score, actor=LEAD)
    with pytest.raises(StoreError, match="not a demonstration"):
        screening.grade(answer + 1000, 4, actor=LEAD)
    with pytest.raises(StoreError, match="reason"):
        screening.decide("ann", passed=True, reason="", actor=LEAD)
    with pytest.raises(StoreError, match="no screening"):
        screening.result("zoe")
