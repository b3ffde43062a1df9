"""The rater's desk: what is handed out, kept and refused, one rater at a time."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tastemaker.errors import StoreError
from tastemaker.store import LabelService, Store
from tastemaker.store.desk import Desk
from tastemaker.store.schema import (
    answers,
    assignments,
    audit,
    drafts,
    gold,
    items,
    raters,
    remarks,
    screening_decisions,
    studies,
    study_raters,
)
from tastemaker.store.tasks import ComparisonAnswer, DemonstrationAnswer, RankingAnswer, StudyKind
from tastemaker.store.views import DraftConflict, NotYours, RevisionConflict, StudyLocked, TaskView

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

MINUTE = 60.0


def write(text: str) -> DemonstrationAnswer:
    return DemonstrationAnswer(text)


def key(view: TaskView | None) -> str:
    """The key of a task's item, which its question tells in these tests."""
    assert view is not None
    return view.task.messages[1].content.removeprefix("Question ").removesuffix("?")


def id_of(view: TaskView | None) -> str:
    assert view is not None
    return view.task.id


def fill(
    service: LabelService, make: Make, *, count: int = 3, overlap: int = 1, kind: StudyKind = "demonstration"
) -> None:
    """A study and three raters of its group."""
    outputs = {"demonstration": 0, "comparison": 2}.get(kind, 3)
    service.queue(make.study(kind, overlap=overlap), make.items(count, outputs))
    make.raters(service, "ann", "bob", "cat")


def set_study(store: Store, name: str = "study", **values: object) -> None:
    with store.write() as connection:
        connection.execute(sa.update(studies).where(studies.c.name == name).values(values))


def make_gold(
    store: Store,
    *keys: str,
    share: float = 1.0,
    expected: object = (("A",), ("B",), ("C",)),
    secret: str = "known",
) -> None:
    """Turn items into gold ones without slots."""
    with store.write() as connection:
        ids = connection.execute(sa.select(items.c.id).where(items.c.key.in_(keys))).scalars().all()
        connection.execute(sa.delete(assignments).where(assignments.c.item_id.in_(ids)))
        connection.execute(
            sa.insert(gold), [{"item_id": each, "expected": expected, "created_at": 0.0} for each in ids]
        )
    set_study(store, gold_share=share, secret=secret)


def decide(store: Store, rater: str, passed: bool) -> None:
    with store.write() as connection:
        rater_id = connection.execute(sa.select(raters.c.id).where(raters.c.name == rater)).scalar_one()
        row = {"rater_id": rater_id, "passed": passed, "reason": "seen", "created_at": 0.0}
        connection.execute(sa.insert(screening_decisions).values(row))


# --- handing out --------------------------------------------------------------------------------------------------


def test_what_is_held_is_resumed_and_then_the_next_comes(desk: Desk, service: LabelService, make: Make) -> None:
    fill(service, make, count=2)
    first = desk.next_task("ann", "study")
    assert desk.next_task("ann", "study") == first
    assert first is not None
    assert (key(first), first.state, first.draft, first.given) == ("key-0", "yours", None, None)
    assert key(desk.next_task("bob", "study")) == "key-1"
    assert desk.next_task("cat", "study") is None
    desk.submit("ann", id_of(first), write("mine"))
    assert desk.next_task("ann", "study") is None
    assert [each.response for each in service.demonstrations("study")] == ["mine"]


def test_resuming_extends_the_lease_even_past_its_end(
    desk: Desk, service: LabelService, make: Make, clock: Clock
) -> None:
    fill(service, make, count=1)
    task = desk.next_task("ann", "study")
    clock.now += 40 * MINUTE
    assert [study.left for study in desk.studies("ann")] == [1]
    again = desk.next_task("ann", "study")
    assert again is not None
    assert (id_of(again), again.leased_until) == (id_of(task), clock.now + 30 * MINUTE)
    clock.now += 29 * MINUTE
    assert desk.next_task("bob", "study") is None


def test_a_task_of_another_does_not_exist(desk: Desk, service: LabelService, make: Make) -> None:
    fill(service, make)
    task_id = id_of(desk.next_task("ann", "study"))
    service.add_rater("eve", group="others", origin="human")
    for rater in ("bob", "eve"):
        for unknown in (task_id, "0" * 32, "", "\x00", "\ud800", "' OR 1=1"):
            for act in (
                lambda who, which: desk.task(who, which),
                lambda who, which: desk.heartbeat(who, which),
                lambda who, which: desk.save_draft(who, which, {}, 0),
                lambda who, which: desk.submit(who, which, write("mine")),
                lambda who, which: desk.revise(who, which, write("mine")),
                lambda who, which: desk.undo(who, which, revision=1),
                lambda who, which: desk.skip(who, which),
                lambda who, which: desk.flag(who, which, "other"),
                lambda who, which: desk.history(who, before=which or "none"),
            ):
                with pytest.raises(NotYours, match=r"no task .* for you"):
                    act(rater, unknown)
    for unknown in ("study", "none", "\x00", "\ud800"):
        with pytest.raises(NotYours, match=r"no study .* for you"):
            desk.next_task("eve", unknown)
        with pytest.raises(NotYours, match=r"no guideline .* for you"):
            desk.guideline("eve", "v1" if unknown == "study" else unknown)
    assert desk.studies("eve") == []


def test_a_rater_has_at_most_three_tasks_open(desk: Desk, service: LabelService, make: Make, clock: Clock) -> None:
    make.raters(service, "ann")
    for name in "abcd":
        service.queue(make.study("demonstration", name=name), make.items(2, outputs=0))
    tasks = {name: id_of(desk.next_task("ann", name)) for name in "abc"}
    with pytest.raises(StudyLocked, match=r"begun 3 tasks elsewhere \(a, b, c\): finish or skip"):
        desk.next_task("ann", "d")
    locked = {study.name: study.locked_because for study in desk.studies("ann")}
    assert [name for name, why in locked.items() if why] == ["d"]
    assert id_of(desk.next_task("ann", "b")) == tasks["b"]
    desk.submit("ann", tasks["a"], write("done"))
    assert desk.next_task("ann", "d") is not None
    with pytest.raises(StudyLocked):
        desk.next_task("ann", "a")
    clock.now += 31 * MINUTE  # leases that have ended keep nothing from anybody
    assert desk.next_task("ann", "a") is not None


def test_a_closed_study_gives_nothing_new(desk: Desk, service: LabelService, make: Make, store: Store) -> None:
    fill(service, make)
    held = desk.next_task("ann", "study")
    set_study(store, closed_at=5.0)
    assert id_of(desk.next_task("ann", "study")) == id_of(held)
    assert [(study.name, study.left) for study in desk.studies("ann")] == [("study", 1)]
    assert desk.submit("ann", id_of(held), write("mine")) == "counted"
    assert desk.next_task("ann", "study") is None
    assert desk.studies("ann") == []
    assert desk.next_task("bob", "study") is None
    assert service.claim("study", "bob") == []


def test_a_study_may_name_its_raters(desk: Desk, service: LabelService, make: Make, store: Store) -> None:
    fill(service, make)
    with store.write() as connection:
        bob = connection.execute(sa.select(raters.c.id).where(raters.c.name == "bob")).scalar_one()
        study = connection.execute(sa.select(studies.c.id)).scalar_one()
        connection.execute(sa.insert(study_raters).values(study_id=study, rater_id=bob))
    assert desk.next_task("bob", "study") is not None
    assert desk.studies("ann") == []
    with pytest.raises(NotYours):
        desk.next_task("ann", "study")
    with pytest.raises(StoreError, match="'ann' is not one of them"):
        service.claim("study", "ann")


def test_counts_for_the_raters_own_eyes(desk: Desk, service: LabelService, make: Make, clock: Clock) -> None:
    fill(service, make, count=5, overlap=2)
    for _ in range(2):
        clock.now += 100.0
        task = desk.next_task("ann", "study")
        clock.now += 50.0
        desk.submit("ann", id_of(task), write("text"), seconds=20.0)
    desk.revise("ann", id_of(task), write("other"), seconds=5.0)
    desk.next_task("ann", "study")
    (study,) = desk.studies("ann")
    assert (study.answered, study.left, study.begun, study.kind) == (2, 3, True, "demonstration")
    progress = desk.progress("ann")
    assert (progress.today, progress.total, progress.seconds_today) == (2, 2, 40.0)
    clock.now += 86_400.0
    assert (desk.progress("ann").today, desk.progress("ann").total) == (0, 2)
    assert desk.progress("bob").total == 0


# --- leases -------------------------------------------------------------------------------------------------------


def test_heartbeat_extends_a_lease_while_it_is_still_theirs(
    desk: Desk, service: LabelService, make: Make, clock: Clock
) -> None:
    fill(service, make, count=1)
    task_id = id_of(desk.next_task("ann", "study"))
    clock.now += 20 * MINUTE
    assert desk.heartbeat("ann", task_id) == clock.now + 30 * MINUTE
    clock.now += 29 * MINUTE
    desk.save_draft("ann", task_id, {"text": "Once"}, 0)  # a sign of life too
    clock.now += 29 * MINUTE
    assert desk.next_task("bob", "study") is None
    clock.now += 2 * MINUTE
    assert id_of(desk.next_task("bob", "study")) == task_id
    assert desk.heartbeat("ann", task_id) is None
    assert desk.task("ann", task_id).state == "lost"
    clock.now += 29 * MINUTE
    assert desk.task("bob", task_id).leased_until == clock.now + MINUTE  # her beat did not touch his lease


def test_a_lease_is_three_times_the_median_time_of_the_studys_answers(
    desk: Desk, service: LabelService, make: Make, clock: Clock
) -> None:
    fill(service, make, count=4)
    for minutes in (1, 20, 25):
        clock.now += 2 * MINUTE  # the median is looked up once a minute
        task = desk.next_task("ann", "study")
        assert task is not None
        # Medians so far: none, 1, 10.5 minutes; three times that is 3 or 31.5, against the study's 30.
        until = clock.now + (31.5 if minutes == 25 else 30) * MINUTE
        assert task.leased_until == pytest.approx(until, abs=1e-6)
        clock.now += minutes * MINUTE
        desk.submit("ann", id_of(task), write("text"))
    clock.now += 2 * MINUTE
    task = desk.next_task("bob", "study")
    assert task is not None
    assert task.leased_until == pytest.approx(clock.now + 60 * MINUTE, abs=1e-6)  # 3 times 20


def test_a_late_answer_is_kept(desk: Desk, service: LabelService, make: Make, clock: Clock) -> None:
    fill(service, make, count=1)
    task_id = id_of(desk.next_task("ann", "study"))
    clock.now += 31 * MINUTE
    assert id_of(desk.next_task("bob", "study")) == task_id
    assert desk.submit("ann", task_id, write("late")) == "extra"
    assert desk.submit("ann", task_id, write("late")) == "extra"
    assert desk.submit("bob", task_id, write("in time")) == "counted"
    given = desk.task("ann", task_id).given
    assert given is not None
    assert (given.answer, given.standing, given.revision) == (write("late"), "extra", 1)
    assert [entry.standing for entry in desk.history("ann")] == ["extra"]
    assert [each.response for each in service.demonstrations("study")] == ["in time"]
    assert service.progress("study").extra == 1


def test_an_answer_on_an_old_page_ends_the_newer_lease(
    desk: Desk, service: LabelService, make: Make, clock: Clock
) -> None:
    """Or else the rater would be asked again what they have answered."""
    fill(service, make, count=2, overlap=2)
    old = id_of(desk.next_task("ann", "study"))
    service.claim("study", "cat", lease=timedelta(days=2))
    clock.now += 31 * MINUTE
    assert id_of(desk.next_task("bob", "study")) == old
    service.release("study", "cat")
    new = desk.next_task("ann", "study")
    assert (key(new), id_of(new) != old) == ("key-0", True)
    assert desk.submit("ann", old, write("late")) == "extra"
    assert desk.task("ann", id_of(new)).state == "lost"
    assert key(desk.next_task("ann", "study")) == "key-1"


def test_time_on_task_is_bounded_by_the_lease(
    desk: Desk, service: LabelService, make: Make, clock: Clock, store: Store
) -> None:
    fill(service, make)
    task_id = id_of(desk.next_task("ann", "study"))
    clock.now += 100.0
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(StoreError, match="must be 0 or more"):
            desk.submit("ann", task_id, write("text"), seconds=wrong)
    desk.submit("ann", task_id, write("text"), seconds=1e9)
    with store.read() as connection:
        assert connection.execute(sa.select(answers.c.seconds)).scalars().all() == [100.0]


# --- drafts -------------------------------------------------------------------------------------------------------


def test_drafts_come_back_and_older_windows_do_not_overwrite(
    desk: Desk, service: LabelService, make: Make, store: Store
) -> None:
    fill(service, make)
    task_id = id_of(desk.next_task("ann", "study"))
    first = desk.save_draft("ann", task_id, {"text": "Once"}, desk.task("ann", task_id).draft_version)
    second = desk.save_draft("ann", task_id, {"text": "Once upon \x00\ud800"}, first)
    with pytest.raises(DraftConflict, match="saved elsewhere") as caught:
        desk.save_draft("ann", task_id, {"text": "old window"}, first)
    assert caught.value.current == second
    view = Desk(store, clock=lambda: 0.0).task("ann", task_id)  # after a new sign-in, or in another process
    assert view.draft is not None
    assert (view.draft.body, view.draft_version) == ({"text": "Once upon \x00\ud800"}, second)
    for wrong in ({"text": float("nan")}, {"text": object()}):
        with pytest.raises(StoreError, match="draft cannot be stored"):
            desk.save_draft("ann", task_id, wrong, second)


def test_a_draft_is_its_raters_alone(desk: Desk, service: LabelService, make: Make) -> None:
    fill(service, make, count=1, overlap=2)
    desk.save_draft("ann", id_of(desk.next_task("ann", "study")), {"text": "Once"}, 0)
    view = desk.next_task("bob", "study")
    assert (key(view), view is None or view.draft) == ("key-0", None)


def test_a_draft_is_wiped_by_its_answer_and_stays_wiped(
    desk: Desk, service: LabelService, make: Make, store: Store
) -> None:
    fill(service, make)
    task_id = id_of(desk.next_task("ann", "study"))
    version = desk.save_draft("ann", task_id, {"text": "Once"}, 0)
    desk.submit("ann", task_id, write("Once."))
    assert desk.task("ann", task_id).draft is None
    for late in (0, version, version + 1):  # saves that were under way when the answer came in
        with pytest.raises(DraftConflict):
            desk.save_draft("ann", task_id, {"text": "Once"}, late)
    view = desk.task("ann", task_id)
    desk.save_draft("ann", task_id, {"text": "better"}, view.draft_version)  # of a correction
    desk.revise("ann", task_id, write("Better."))
    with store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(drafts)).scalar() == 0


def test_a_draft_outlives_its_lease_and_follows_its_rater_to_another_slot(
    desk: Desk, service: LabelService, make: Make, clock: Clock
) -> None:
    """Items until one is found whose two slots show other orders, or the letters would not be tried."""
    fill(service, make, count=7, overlap=2, kind="ranking")
    moved = 0
    for _ in range(7):
        old = desk.next_task("ann", "study")
        assert old is not None
        text = {output.letter: output.text for output in old.task.outputs}
        body = {"rank-A": "1", "rank-B": "2", "choice": "C", "note": "A"}
        version = desk.save_draft("ann", id_of(old), body, 0)
        service.claim("study", "cat", lease=timedelta(days=2))  # or else bob would get the slot that is never left
        clock.now += 31 * MINUTE
        taken = service.claim("study", "bob")[0]
        assert taken.id == id_of(old)
        service.release("study", "cat")
        version = desk.save_draft("ann", id_of(old), body, version)  # after its lease
        new = desk.next_task("ann", "study")
        assert new is not None
        assert new.draft is not None
        assert (key(new), id_of(new) != id_of(old), new.draft_version) == (key(old), True, version)
        now = {output.text: output.letter for output in new.task.outputs}
        letter = {before: now[shown] for before, shown in text.items()}
        wanted = {f"rank-{letter['A']}": "1", f"rank-{letter['B']}": "2", "choice": letter["C"], "note": "A"}
        assert new.draft.body == wanted
        moved += letter["A"] != "A"
        service.submit(taken.id, taken.token, RankingAnswer((("A",), ("B", "C"))))
        desk.submit("ann", id_of(new), RankingAnswer((("A",), ("B", "C"))))
    assert moved > 0


# --- skip, flag, undo, history ------------------------------------------------------------------------------------


def test_a_skipped_item_goes_to_others_at_once_and_never_comes_back(
    desk: Desk, service: LabelService, make: Make, store: Store
) -> None:
    fill(service, make, count=2, overlap=2)
    task_id = id_of(desk.next_task("ann", "study"))
    desk.skip("ann", task_id, "unclear", "What is asked?")
    desk.skip("ann", task_id)  # a second click
    assert desk.task("ann", task_id).state == "skipped"
    assert id_of(desk.next_task("bob", "study")) == task_id
    assert key(desk.next_task("ann", "study")) == "key-1"
    assert [study.left for study in desk.studies("ann")] == [1]
    service.release("study", "ann")
    assert [task.messages[1].content for task in service.claim("study", "ann", limit=9)] == ["Question key-1?"]
    with store.read() as connection:
        rows = connection.execute(sa.select(remarks.c.kind, remarks.c.reason, remarks.c.note)).all()
    assert [tuple(row) for row in rows] == [("skip", "unclear", "What is asked?")]


def test_who_skipped_may_answer_after_all_and_who_answered_not_skip(
    desk: Desk, service: LabelService, make: Make
) -> None:
    fill(service, make, count=1)
    task_id = id_of(desk.next_task("ann", "study"))
    with pytest.raises(StoreError, match="must be one of unclear, language"):
        desk.skip("ann", task_id, "boring")
    with pytest.raises(StoreError, match="4001 characters"):
        desk.skip("ann", task_id, None, "x" * 4001)
    desk.skip("ann", task_id)
    assert desk.submit("ann", task_id, write("after all")) == "counted"
    with pytest.raises(StoreError, match="has been answered"):
        desk.skip("ann", task_id)
    assert desk.task("ann", task_id).state == "answered"


def test_a_flag_goes_with_the_answer(desk: Desk, service: LabelService, make: Make, store: Store) -> None:
    fill(service, make)
    task_id = id_of(desk.next_task("ann", "study"))
    for _ in range(2):
        desk.flag("ann", task_id, "personal_data", "A name.")
    desk.flag("ann", task_id, "personal_data")
    with pytest.raises(StoreError, match="must be one of none_acceptable"):
        desk.flag("ann", task_id, "unclear")
    assert desk.task("ann", task_id).state == "yours"
    with store.read() as connection:
        rows = connection.execute(sa.select(remarks.c.kind, remarks.c.note).order_by(remarks.c.id)).all()
    assert [tuple(row) for row in rows] == [("flag", "A name."), ("flag", None)]


def test_undo_gives_the_earlier_answer_anew(desk: Desk, service: LabelService, make: Make, store: Store) -> None:
    fill(service, make, kind="comparison")
    task_id = id_of(desk.next_task("ann", "study"))
    desk.submit("ann", task_id, ComparisonAnswer("A"))
    with pytest.raises(StoreError, match="no earlier answer to go back to"):
        desk.undo("ann", task_id, revision=1)
    desk.revise("ann", task_id, ComparisonAnswer("tie"))
    assert desk.undo("ann", task_id, revision=2) == ComparisonAnswer("A")
    with pytest.raises(RevisionConflict, match="newest answer is revision 3, and not 2"):  # a second click
        desk.undo("ann", task_id, revision=2)
    assert desk.undo("ann", task_id, revision=3) == ComparisonAnswer("tie")  # the undoing undone
    desk.submit("ann", task_id, ComparisonAnswer("B"))  # the form sent again after going back
    with store.read() as connection:
        bodies = connection.execute(sa.select(answers.c.body).order_by(answers.c.revision)).scalars().all()
    assert bodies == ["A", "tie", "A", "tie", "B"]
    given = desk.task("ann", task_id).given
    assert given is not None
    assert (given.answer, given.revision) == (ComparisonAnswer("B"), 5)
    assert len(service.comparisons("study")) == 1
    with pytest.raises(StoreError, match="has not answered task"):
        desk.revise("bob", id_of(desk.next_task("bob", "study")), ComparisonAnswer("A"))


def test_history_is_ones_own_and_comes_in_pages(desk: Desk, service: LabelService, make: Make) -> None:
    fill(service, make, count=5)  # the clock stands still: all at the same time
    for rater in ("ann", "ann", "bob", "ann"):
        desk.submit(rater, id_of(desk.next_task(rater, "study")), write("text"))
    entries = desk.history("ann")
    assert [entry.opening for entry in entries] == [f"Question key-{index}?" for index in (3, 1, 0)]
    desk.revise("ann", entries[2].task_id, write("other"))
    first = desk.history("ann", limit=2)
    assert first == entries[:2]
    (last,) = desk.history("ann", limit=2, before=first[-1].task_id)
    assert last == replace(entries[2], revision=2)
    with pytest.raises(StoreError, match="ask for 1 to 200"):
        desk.history("ann", limit=0)


def test_guidelines_and_topics(desk: Desk, service: LabelService, make: Make, store: Store) -> None:
    fill(service, make)
    assert desk.guideline("ann", "v1").text == "Prefer the helpful."
    assert desk.profile("ann").topics == {}
    for levels in ({"law": 5, "mathematics": 1}, {"law": 2}):
        desk.set_topics("ann", levels)
        assert desk.profile("ann").topics == levels
    for wrong in ({"law": 0}, {"law": 6}, {"law": True}, {"\x00": 1}, {"x" * 101: 1}, {str(n): 1 for n in range(51)}):
        with pytest.raises(StoreError):
            desk.set_topics("ann", wrong)
    with store.read() as connection:
        acts = connection.execute(sa.select(audit.c.actor, audit.c.action)).all()
    assert [tuple(row) for row in acts] == [("ann", "rater.set_topics")] * 2
