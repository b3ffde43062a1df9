"""Handing out slots: order, leases, late answers, and many hands at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from tastemaker.errors import StoreError
from tastemaker.store import LabelService, Store
from tastemaker.store.claiming import find_rater
from tastemaker.store.desk import Desk
from tastemaker.store.schema import answers, assignments, studies
from tastemaker.store.tasks import DemonstrationAnswer, Submission, Task, Turn

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

MINUTE = 60.0


def write(text: str) -> DemonstrationAnswer:
    return DemonstrationAnswer(text)


def question(task: Task) -> str:
    return task.messages[1].content


def written(service: LabelService) -> list[tuple[str | None, str]]:
    return [(each.author.rater, each.response) for each in service.demonstrations("study")]


@pytest.fixture
def two_slots(service: LabelService, make: Make) -> LabelService:
    """A study of one item for two of three raters, with leases of half an hour."""
    service.queue(make.study("demonstration", overlap=2), make.items(1, outputs=0))
    make.raters(service, "ann", "bob", "cat")
    return service


def taken_over(service: LabelService, clock: Clock) -> tuple[Task, Task]:
    """Ann's task and bob's, of one slot: her lease ended, and cat has the item's other slot for two days."""
    (ann,) = service.claim("study", "ann")
    service.claim("study", "cat", lease=timedelta(days=2))
    clock.now += 31 * MINUTE
    (bob,) = service.claim("study", "bob")
    assert bob.id == ann.id
    return ann, bob


def test_items_come_in_order_and_never_twice(service: LabelService, make: Make) -> None:
    service.queue(make.study("demonstration", overlap=2), make.items(5, outputs=0))
    make.raters(service, "ann", "bob", "cat")
    first = service.claim("study", "ann", limit=3)
    second = service.claim("study", "ann", limit=3)
    assert [question(task) for task in first + second] == [f"Question key-{index}?" for index in range(5)]
    assert service.claim("study", "ann") == []
    assert len(service.claim("study", "bob", limit=100)) == 5
    assert service.claim("study", "cat") == []


def test_a_claim_of_many_takes_one_slot_of_an_item(two_slots: LabelService) -> None:
    assert len(two_slots.claim("study", "ann", limit=5)) == 1
    assert len(two_slots.claim("study", "bob", limit=5)) == 1
    assert two_slots.claim("study", "cat", limit=5) == []


def test_only_the_studys_group_may_work(service: LabelService, make: Make) -> None:
    service.queue(make.study("demonstration"), make.items(1, outputs=0))
    service.add_rater("eve", group="others", origin="human")
    with pytest.raises(StoreError, match="Rater 'eve' is in group 'others'; study 'study' is for group 'team'"):
        service.claim("study", "eve")
    with pytest.raises(StoreError, match="no rater 'zoe'"):
        service.claim("study", "zoe")
    with pytest.raises(StoreError, match="no study 'other'; the store has study"):
        service.claim("other", "eve")


def test_progress_counts_every_slot_once(two_slots: LabelService, clock: Clock) -> None:
    (task,) = two_slots.claim("study", "ann")
    progress = two_slots.progress("study")
    assert (progress.slots, progress.answered, progress.leased, progress.open, progress.missing) == (2, 0, 1, 1, 2)
    two_slots.submit(task.id, task.token, write("mine"))
    two_slots.claim("study", "bob")
    progress = two_slots.progress("study")
    assert (progress.slots, progress.answered, progress.leased, progress.open, progress.missing) == (2, 1, 1, 0, 1)
    clock.now += 31 * MINUTE
    progress = two_slots.progress("study")
    assert (progress.answered, progress.leased, progress.open, progress.extra) == (1, 0, 1, 0)


def test_a_lease_ends_after_its_time_and_not_before(two_slots: LabelService, clock: Clock) -> None:
    (ann,) = two_slots.claim("study", "ann")
    two_slots.claim("study", "bob")
    clock.now += 29 * MINUTE
    assert two_slots.claim("study", "cat") == []
    clock.now += 2 * MINUTE
    (cat,) = two_slots.claim("study", "cat")
    assert cat.id == ann.id
    assert cat.token != ann.token


def test_an_answer_after_the_lease_counts_while_nobody_else_has_the_slot(two_slots: LabelService, clock: Clock) -> None:
    (task,) = two_slots.claim("study", "ann")
    clock.now += 31 * MINUTE
    (bob,) = two_slots.claim("study", "bob")  # ends ann's lease
    assert two_slots.submit(task.id, task.token, write("late")) == "counted"
    assert two_slots.submit(bob.id, bob.token, write("his")) == "counted"
    assert written(two_slots) == [("ann", "late"), ("bob", "his")]
    assert two_slots.progress("study").missing == 0


def test_a_slot_waits_for_its_rater_as_long_as_another_will_do(two_slots: LabelService, clock: Clock) -> None:
    (bob,) = two_slots.claim("study", "bob")
    (ann,) = two_slots.claim("study", "ann")
    clock.now += 31 * MINUTE
    (again,) = two_slots.claim("study", "ann")
    assert again.id == ann.id  # her own before the first
    (cat,) = two_slots.claim("study", "cat")
    assert cat.id == bob.id  # no other is left
    clock.now += 31 * MINUTE
    assert [task.id for task in two_slots.claim("study", "bob")] == [bob.id]  # his own, though cat has had it too


def test_ones_own_slot_comes_before_one_that_waits_for_nobody(
    two_slots: LabelService, store: Store, clock: Clock
) -> None:
    (bob,) = two_slots.claim("study", "bob")
    (ann,) = two_slots.claim("study", "ann")
    Desk(store, clock=clock).skip("bob", bob.id)
    clock.now += 31 * MINUTE
    assert [task.id for task in two_slots.claim("study", "ann")] == [ann.id]
    assert [task.id for task in two_slots.claim("study", "cat")] == [bob.id]


@pytest.mark.parametrize("end", ["release", "skip", "time"])
def test_an_extra_answer_takes_its_slot_when_that_opens_again(
    service: LabelService, make: Make, store: Store, clock: Clock, end: str
) -> None:
    service.queue(make.study("demonstration"), make.items(1, outputs=0))
    make.raters(service, "ann", "bob", "cat", "dan")
    tasks = {}
    for name in ("ann", "bob", "cat"):
        (tasks[name],) = service.claim("study", name)
        clock.now += 31 * MINUTE
    service.claim("study", "dan")
    for name in ("bob", "ann"):
        assert service.submit(tasks[name].id, tasks[name].token, write(name)) == "extra"
    if end == "release":
        assert service.release("study", "dan") == 0  # none is open then
    elif end == "skip":
        Desk(store, clock=clock).skip("dan", tasks["ann"].id)
    else:
        clock.now += 31 * MINUTE
        assert service.claim("study", "cat") == []
    assert written(service) == [("ann", "ann")]  # the earliest lease's answer
    progress = service.progress("study")
    assert (progress.answered, progress.open, progress.extra) == (1, 0, 1)
    service.revise(tasks["ann"].id, "ann", write("better"))
    assert written(service) == [("ann", "better")]


def test_two_extra_answers_of_one_rater_take_one_slot(two_slots: LabelService, clock: Clock) -> None:
    (old, _) = taken_over(two_slots, clock)
    two_slots.release("study", "cat")
    (new,) = two_slots.claim("study", "ann")
    clock.now += 31 * MINUTE
    for name in ("bob", "cat"):  # each the slot that they had
        two_slots.claim("study", name)
    assert two_slots.submit(new.id, new.token, write("new")) == "extra"
    assert two_slots.submit(old.id, old.token, write("old")) == "extra"
    clock.now += 31 * MINUTE
    (bob,) = two_slots.claim("study", "bob")
    assert bob.id == new.id
    assert written(two_slots) == [("ann", "old")]


def test_a_late_answer_is_kept_as_extra(two_slots: LabelService, clock: Clock, store: Store) -> None:
    ann, bob = taken_over(two_slots, clock)
    assert two_slots.submit(ann.id, ann.token, write("late")) == "extra"
    assert two_slots.submit(ann.id, ann.token, write("late")) == "extra"  # a second click
    assert two_slots.submit(bob.id, bob.token, write("in time")) == "counted"
    two_slots.revise(ann.id, "ann", write("later still"))
    assert written(two_slots) == [("bob", "in time")]
    progress = two_slots.progress("study")
    assert (progress.answered, progress.extra) == (1, 1)
    with store.read() as connection:
        bodies = connection.execute(sa.select(answers.c.body).order_by(answers.c.id)).scalars().all()
    assert bodies == ["late", "in time", "later still"]
    # She has answered this item: she is not asked again, though a slot is open.
    assert two_slots.release("study", "cat") == 1
    assert two_slots.claim("study", "ann") == []
    assert len(two_slots.claim("study", "cat")) == 1


def test_a_lease_that_ended_unanswered_does_not_bar_its_rater(two_slots: LabelService, clock: Clock) -> None:
    """Or else a study for exactly as many raters as there are could never be finished."""
    two_slots.claim("study", "ann")
    clock.now += 31 * MINUTE
    (bob,) = two_slots.claim("study", "bob")
    (again,) = two_slots.claim("study", "ann")
    assert again.id != bob.id


def test_anothers_answer_does_not_stand_for_ones_own(two_slots: LabelService, clock: Clock) -> None:
    ann, bob = taken_over(two_slots, clock)
    two_slots.submit(bob.id, bob.token, write("his"))
    two_slots.release("study", "cat")
    (again,) = two_slots.claim("study", "ann")  # she has answered nothing
    assert again.id != ann.id


def test_ones_own_late_answer_bars_though_the_slot_is_anothers(two_slots: LabelService, clock: Clock) -> None:
    ann, _ = taken_over(two_slots, clock)
    assert two_slots.submit(ann.id, ann.token, write("late")) == "extra"
    two_slots.release("study", "cat")
    assert two_slots.claim("study", "ann") == []  # and hers is the only answer that there is


def test_a_late_answer_of_one_who_has_the_item_anew_is_extra(two_slots: LabelService, clock: Clock) -> None:
    old, _ = taken_over(two_slots, clock)
    two_slots.release("study", "cat")
    (new,) = two_slots.claim("study", "ann")
    two_slots.release("study", "bob")
    assert two_slots.submit(old.id, old.token, write("late")) == "extra"
    assert two_slots.submit(new.id, new.token, write("new")) == "counted"
    assert written(two_slots) == [("ann", "new")]
    assert len(two_slots.claim("study", "bob")) == two_slots.release("study", "bob") == 1  # nor does it take that slot


def test_an_answer_under_an_old_lease_of_the_same_rater_counts(
    two_slots: LabelService, clock: Clock, store: Store
) -> None:
    (old,) = two_slots.claim("study", "ann")
    clock.now += 31 * MINUTE
    (new,) = two_slots.claim("study", "ann")
    assert (new.id, new.token != old.token) == (old.id, True)
    assert two_slots.submit(old.id, old.token, write("old page")) == "counted"
    assert two_slots.submit(new.id, new.token, write("new page")) == "extra"
    assert written(two_slots) == [("ann", "old page")]
    with store.read() as connection:
        ends = connection.execute(sa.select(assignments.c.leased_until).where(assignments.c.id == old.id)).scalar_one()
    assert ends is None, "what is answered is nobody's lease"


def test_released_tasks_are_open_to_anyone_again(two_slots: LabelService) -> None:
    two_slots.claim("study", "ann")
    (bob,) = two_slots.claim("study", "bob")
    two_slots.submit(bob.id, bob.token, write("done"))
    assert two_slots.release("study", "ann") == 1
    assert two_slots.release("study", "bob") == 0  # what is answered stays
    assert two_slots.progress("study").open == 1
    assert len(two_slots.claim("study", "cat")) == 1


def test_nothing_of_its_lease_stays_with_a_released_slot(two_slots: LabelService, store: Store) -> None:
    two_slots.claim("study", "ann")
    two_slots.release("study", "ann")
    with store.read() as connection:
        columns = (assignments.c.state, assignments.c.rater_id, assignments.c.claim_token, assignments.c.leased_until)
        rows = connection.execute(sa.select(*columns)).all()
    assert [tuple(row) for row in rows] == [("open", None, None, None)] * 2


def test_release_simulated_leaves_people_alone(service: LabelService, make: Make) -> None:
    service.add_rater("bot", group="bots", origin="simulated")
    make.raters(service, "ann")
    for name, group in (("people", "team"), ("bots", "bots")):
        study = replace(make.study("demonstration", name=name), rater_group=group)
        service.queue(study, make.items(2, outputs=0))
    service.claim("people", "ann")
    service.claim("bots", "bot", limit=2)
    assert service.release_simulated("people") == 0
    assert service.release_simulated("bots") == 2


def test_held_tasks_can_be_resumed(two_slots: LabelService) -> None:
    (task,) = two_slots.claim("study", "ann")
    assert two_slots.held("study", "ann") == [task]
    assert two_slots.held("study", "bob") == []
    two_slots.submit(task.id, task.token, write("done"))
    assert two_slots.held("study", "ann") == []


def test_what_is_left_is_what_is_open_or_was_left_lying(
    service: LabelService, make: Make, store: Store, clock: Clock
) -> None:
    for name, count in (("study", 5), ("other", 2)):
        service.queue(make.study("demonstration", name=name), make.items(count, outputs=0))
    make.raters(service, "ann", "bob", "cat")
    desk = Desk(store, clock=clock)

    def left() -> dict[str, int]:
        return {study.name: study.left for study in desk.studies("bob")}

    desk.next_task("cat", "study")
    clock.now += 10 * MINUTE
    desk.next_task("ann", "study")
    (task,) = service.claim("study", "bob")
    service.submit(task.id, task.token, write("his"))
    clock.now += 20 * MINUTE  # to the very end of cat's lease, which counts as hers
    assert left() == {"study": 2, "other": 2}
    skipped = desk.next_task("bob", "study")
    assert skipped is not None
    assert question(skipped.task) == "Question key-3?"
    desk.skip("bob", skipped.task.id)
    clock.now += 1.0
    assert left() == {"study": 2, "other": 2}  # key-4, and key-0 that was cat's


def test_a_longer_lease_on_request(two_slots: LabelService, clock: Clock) -> None:
    two_slots.claim("study", "ann", lease=timedelta(days=2))
    clock.now += 47 * 60 * MINUTE
    assert two_slots.progress("study").leased == 1


def test_tokens_are_checked(two_slots: LabelService) -> None:
    (ann,) = two_slots.claim("study", "ann")
    (bob,) = two_slots.claim("study", "bob")
    assert [len(bytes.fromhex(task.token)) for task in (ann, bob)] == [16, 16]  # 128 bits are not guessed
    for task_id, token in ((ann.id, bob.token), (ann.id, ""), ("unknown", ann.token)):
        with pytest.raises(StoreError, match="never given out under this token"):
            two_slots.submit(task_id, token, write("mine"))
    assert written(two_slots) == []


@pytest.mark.parametrize(("overlap", "raters"), [(1, 1), (2, 3), (3, 3), (3, 7), (2, 4)])
def test_turns_share_out_every_slot(service: LabelService, make: Make, overlap: int, raters: int) -> None:
    items = 13
    service.queue(make.study("demonstration", overlap=overlap), make.items(items, outputs=0))
    names = [f"rater-{index}" for index in range(raters)]
    make.raters(service, *names)
    meetings: Counter[str] = Counter()
    loads = []
    for index, name in enumerate(names):
        tasks = service.claim("study", name, limit=1000, turn=Turn(index=index, of=raters))
        assert len({question(task) for task in tasks}) == len(tasks)
        meetings.update(question(task) for task in tasks)
        loads.append(len(tasks))
    assert set(meetings.values()) == {overlap}
    assert len(meetings) == items
    assert max(loads) - min(loads) <= overlap


def test_turns_of_three_raters_by_hand(service: LabelService, make: Make) -> None:
    """Slots 0 to 13, two an item; slot s is of turn s mod 3 up to slot 5, then of s + 1, from slot 12 of s + 2."""
    service.queue(make.study("demonstration", overlap=2), make.items(7, outputs=0))
    make.raters(service, "ann", "bob", "cat")
    found = [
        [question(task).removeprefix("Question key-") for task in service.claim("study", name, limit=99, turn=turn)]
        for name, turn in zip(("ann", "bob", "cat"), (Turn(index=index, of=3) for index in range(3)), strict=True)
    ]
    assert found == [["0?", "1?", "4?", "5?", "6?"], ["0?", "2?", "3?", "4?"], ["1?", "2?", "3?", "5?", "6?"]]


def test_turns_do_not_depend_on_who_comes_first(service: LabelService, make: Make) -> None:
    make.raters(service, "ann", "bob", "cat")
    seen = []
    for name, order in (("one", (0, 1, 2)), ("two", (2, 0, 1))):
        service.queue(make.study("demonstration", name=name, overlap=2), make.items(7, outputs=0))
        shares = {}
        for index in order:
            rater = ("ann", "bob", "cat")[index]
            shares[rater] = [
                question(each) for each in service.claim(name, rater, limit=9, turn=Turn(index=index, of=3))
            ]
        seen.append(shares)
    assert seen[0] == seen[1]


def test_turns_need_enough_raters(two_slots: LabelService) -> None:
    with pytest.raises(StoreError, match="wants 2 answers an item, from as many raters; turns of 1"):
        two_slots.claim("study", "ann", turn=Turn(index=0, of=1))


def test_who_is_to_be_alone_is_locked_and_nobody_else(service: LabelService, make: Make, store: Store) -> None:
    """As PostgreSQL is told it: against its like, not against new rows that name the rater. SQLite has one writer."""
    make.raters(service, "ann")
    asked: list[str] = []

    def note(_connection: object, statement: sa.Executable, *_rest: object) -> None:
        assert isinstance(statement, sa.ClauseElement)
        asked.append(str(statement.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]

    with store.write() as connection:
        sa.event.listen(connection, "before_execute", note)
        people = [find_rater(connection, "ann"), find_rater(connection, "ann", alone=True)]
    assert people[0] == people[1]
    assert [statement.partition(" FOR ")[2] for statement in asked] == ["", "NO KEY UPDATE"]


def test_many_hands_at_once(url: str, make: Make) -> None:
    """Nine raters, two of them twice over, on 25 items for three raters each: every slot once, no item twice."""
    items, overlap = 25, 3
    names = [f"rater-{index}" for index in range(9)]
    errors: list[BaseException] = []
    claimed: list[tuple[str, Task]] = []
    with Store.open(url) as store, Store.open(url) as other:  # two, as two server processes have
        service = LabelService(store)
        desks = (service, LabelService(other))
        service.queue(make.study("demonstration", overlap=overlap), make.items(items, outputs=0))
        make.raters(service, *names)

        def work(desk: LabelService, name: str) -> None:
            try:
                while tasks := desk.claim("study", name, limit=2):
                    for task in tasks:
                        claimed.append((name, task))
                        desk.submit(task.id, task.token, write(name))
            except BaseException as error:  # a thread's error would be lost
                errors.append(error)

        hands = enumerate((*names, *names[:2]))
        threads = [threading.Thread(target=work, args=(desks[index % 2], name)) for index, name in hands]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        demonstrations = service.demonstrations("study")
        progress = service.progress("study")
    assert errors == []
    assert len(claimed) == len({task.id for _, task in claimed}) == items * overlap
    assert len({(name, question(task)) for name, task in claimed}) == items * overlap
    assert (progress.answered, progress.extra) == (items * overlap, 0)
    assert Counter(each.prompt.key for each in demonstrations) == {f"key-{index}": overlap for index in range(items)}
    assert all(each.author.rater == each.response for each in demonstrations)


def test_who_writes_to_a_study_is_alone_in_it(url: str, make: Make) -> None:
    claimed: list[Task] = []
    with Store.open(url) as store, Store.open(url) as other:  # two, as two server processes have
        service = LabelService(store)
        service.queue(make.study("demonstration"), make.items(1, outputs=0))
        make.raters(service, "ann")
        claiming = threading.Thread(target=lambda: claimed.extend(LabelService(other).claim("study", "ann")))
        with store.write() as connection:
            store.lock_studies(connection, [study.id for study in service.studies()])
            claiming.start()
            claiming.join(1.0)
            assert claimed == []
        claiming.join(60.0)
    assert [question(task) for task in claimed] == ["Question key-0?"]


@pytest.mark.parametrize("door", ["claim", "desk"])
def test_a_study_that_is_being_closed_hands_out_nothing_more(store: Store, make: Make, door: str) -> None:
    service, desk, found = LabelService(store), Desk(store), list[object]()
    service.queue(make.study("demonstration"), make.items(1, 0))
    make.raters(service, "ann")

    def ask() -> None:
        found.append(desk.next_task("ann", "study") if door == "desk" else service.claim("study", "ann") or None)

    asking = threading.Thread(target=ask)
    with store.write() as connection:
        connection.execute(sa.update(studies).values(closed_at=1.0))
        asking.start()
        asking.join(0.5)
    asking.join(60.0)
    assert found == [None]


def test_late_and_new_answers_at_once(url: str, make: Make, clock: Clock) -> None:
    """Leases end while their holders submit: whoever wins, each slot counts one answer and none is lost."""
    items = 20
    with Store.open(url) as store:
        service = LabelService(store, clock=clock)
        service.queue(make.study("demonstration"), make.items(items, outputs=0))
        make.raters(service, "slow", "quick")
        old = service.claim("study", "slow", limit=items)
        clock.now += 31 * MINUTE
        new: list[Task] = []

        def take_over() -> None:
            while tasks := service.claim("study", "quick", limit=3):
                new.extend(tasks)

        thread = threading.Thread(target=take_over)
        thread.start()
        standings = [service.submit(task.id, task.token, write("slow")) for task in old]
        thread.join()
        standings += service.submit_many(
            [Submission(task_id=task.id, token=task.token, answer=write("quick")) for task in new]
        )
        progress = service.progress("study")
    assert Counter(standings)["counted"] == progress.answered == items
    assert Counter(standings)["extra"] == progress.extra == len(new) + len(old) - items


WORKER = """
import sys
from tastemaker.store import LabelService, Store
from tastemaker.store.tasks import DemonstrationAnswer
service = LabelService(Store.open(sys.argv[1]))
while True:
    for task in service.claim("study", "ann", limit=3):
        service.submit(task.id, task.token, DemonstrationAnswer("answer to " + task.messages[1].content))
        print(task.messages[1].content, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_acknowledged_answer(url: str, make: Make) -> None:
    with Store.open(url) as store:
        service = LabelService(store)
        service.queue(make.study("demonstration"), make.items(2000, outputs=0))
        make.raters(service, "ann", "bob")
        with subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            acknowledged = [worker.stdout.readline().strip() for _ in range(50)]
            os.kill(worker.pid, signal.SIGKILL)
            acknowledged += [line.strip() for line in worker.stdout if line.endswith("\n")]
        assert worker.returncode == -signal.SIGKILL
        stored = {each.response for each in service.demonstrations("study")}
        assert {f"answer to {line}" for line in acknowledged} <= stored
        # At most the one answer whose acknowledgement the kill cut off.
        assert len(stored) <= len(acknowledged) + 1
        # The dead one's leases run on, and can be given back; others work on meanwhile.
        assert len(service.claim("study", "bob", limit=10)) == 10
        service.release("study", "ann")
        progress = service.progress("study")
        assert (progress.answered, progress.leased) == (len(stored), 10)


def test_a_rater_may_not_hold_two_slots_of_an_item_by_racing(url: str, make: Make) -> None:
    """The same rater in many windows."""
    with Store.open(url) as store:
        service = LabelService(store)
        service.queue(make.study("demonstration", overlap=6), make.items(2, outputs=0))
        make.raters(service, "ann")
        claimed: list[Task] = []
        start = threading.Barrier(6)

        def click(claim: Callable[[], list[Task]]) -> None:
            start.wait()
            claimed.extend(claim())

        threads = [threading.Thread(target=click, args=(lambda: service.claim("study", "ann"),)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(question(task) for task in claimed) == ["Question key-0?", "Question key-1?"]
