"""Many raters at many desks, in any order of acts: no slot twice, no item twice, no answer lost; all of it blind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.test_blindness import leaves

from tastemaker.store import LabelService, Store
from tastemaker.store.desk import Desk
from tastemaker.store.schema import answers, assignments, gold, items, leases, raters, remarks, studies
from tastemaker.store.tasks import ComparisonAnswer, DemonstrationAnswer, NewItem
from tastemaker.store.views import DraftConflict, TaskView

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

RATERS = ("ann", "bob", "cat")
STUDY = count()
HALF_LEASE = 16 * 60.0

# Mostly what hands out and what gives back; short plays would meet nothing.
WHATS = ("next", "next", "next", "draft", "skip", "skip", "submit", "submit", "heartbeat", "wait", "wait", "claim")
ACTS = st.lists(st.tuples(st.sampled_from(WHATS), st.sampled_from(RATERS), st.integers(0, 5)), min_size=25, max_size=40)


class Play:
    """A study being worked on, and what its raters were told: held against the store after every act."""

    def __init__(self, store: Store, service: LabelService, clock: Clock, make: Make, overlap: int) -> None:
        self.store, self.service, self.clock, self.overlap = store, service, clock, overlap
        self.desk = Desk(store, clock=clock)
        self.study = f"study {next(STUDY)}"
        clock.now += 1e6  # what was begun in an earlier example has ended
        service.queue(make.study("demonstration", name=self.study, overlap=overlap), make.items(5, outputs=0))
        make.raters(service, *RATERS)
        with store.write() as connection:
            of_study = sa.select(studies.c.id).where(studies.c.name == self.study).scalar_subquery()
            last = sa.select(items.c.id).where(items.c.study_id == of_study, items.c.key == "key-4")
            self.gold = connection.execute(last).scalar_one()
            connection.execute(sa.insert(gold).values(item_id=self.gold, expected="x", created_at=0.0))
            connection.execute(
                sa.update(studies).where(studies.c.name == self.study).values(gold_share=0.3, secret="known")
            )
        self.running: dict[str, str] = {}
        self.given: dict[str, list[str]] = {rater: [] for rater in RATERS}
        self.drafts: dict[tuple[str, str], str] = {}
        self.acknowledged: dict[tuple[str, str], str] = {}
        self.finished: dict[str, set[str]] = {rater: set() for rater in RATERS}

    def act(self, what: str, rater: str, number: int) -> None:
        self.running = self.leases_that_run()
        if what == "next":
            self.next(rater)
        elif what == "wait":
            self.clock.now += HALF_LEASE * (number + 1)
        elif what == "claim":  # by the other door
            for task in self.service.claim(self.study, rater):
                self.met(rater, task.id, task.messages[1].content)
        elif self.given[rater]:
            task_id = self.given[rater][number % len(self.given[rater])]
            getattr(self, what)(rater, task_id, f"{rater} {number}")

    def next(self, rater: str) -> None:
        left = self.desk.studies(rater)
        view = self.desk.next_task(rater, self.study)
        assert (view is None) == (next(study.left for study in left if study.name == self.study) == 0)
        if view is None:
            return
        assert view.state == "yours"
        self.met(rater, view.task.id, view.task.messages[1].content)
        question = view.task.messages[1].content
        assert (None if view.draft is None else view.draft.body["text"]) == self.drafts.get((rater, question))

    def leases_that_run(self) -> dict[str, str]:
        """Whose each slot is, by the slot's id."""
        runs = sa.and_(assignments.c.state == "leased", assignments.c.leased_until >= self.clock.now)
        owner = sa.select(assignments.c.id, raters.c.name).join(raters, raters.c.id == assignments.c.rater_id)
        with self.store.read() as connection:
            return {row.id: row.name for row in connection.execute(owner.where(runs))}

    def met(self, rater: str, task_id: str, question: str) -> None:
        assert self.running.get(task_id, rater) == rater, "a slot was handed out twice"
        assert question not in self.finished[rater], "an item came to a rater again"
        if task_id not in self.given[rater]:
            self.given[rater].append(task_id)

    def view(self, rater: str, task_id: str) -> tuple[TaskView, str]:
        view = self.desk.task(rater, task_id)
        return view, view.task.messages[1].content

    def draft(self, rater: str, task_id: str, text: str) -> None:
        view, question = self.view(rater, task_id)
        try:
            self.desk.save_draft(rater, task_id, {"text": text}, view.draft_version)
        except DraftConflict:
            raise AssertionError("nobody else writes this draft") from None
        self.drafts[rater, question] = text

    def skip(self, rater: str, task_id: str, _text: str) -> None:
        view, question = self.view(rater, task_id)
        if view.state != "answered":
            self.desk.skip(rater, task_id)
            self.finished[rater].add(question)

    def submit(self, rater: str, task_id: str, text: str) -> None:
        _, question = self.view(rater, task_id)
        self.desk.submit(rater, task_id, DemonstrationAnswer(text))
        self.acknowledged[rater, task_id] = text
        self.finished[rater].add(question)
        self.drafts.pop((rater, question), None)

    def heartbeat(self, rater: str, task_id: str, _text: str) -> None:
        state = self.desk.task(rater, task_id).state
        assert (self.desk.heartbeat(rater, task_id) is not None) == (state == "yours")

    def check(self) -> None:
        with self.store.read() as connection:
            slots = connection.execute(
                sa.select(assignments.c.id, assignments.c.item_id, assignments.c.state, raters.c.name)
                .join(studies, studies.c.id == assignments.c.study_id)
                .outerjoin(raters, raters.c.id == assignments.c.rater_id)
                .where(studies.c.name == self.study)
            ).all()
        held = [(slot.item_id, slot.name) for slot in slots if slot.name is not None]
        assert len(held) == len(set(held)), "a rater has two slots of one item"
        work = Counter(slot.item_id for slot in slots if slot.item_id != self.gold)
        assert set(work.values()) == {self.overlap}, "work has as many slots as it was queued with"
        owners = {slot.id: slot.name for slot in slots}
        for rater in RATERS:
            for task_id in self.given[rater]:
                view = self.desk.task(rater, task_id)
                assert (view.state == "yours") <= (owners[task_id] == rater)
                text = self.acknowledged.get((rater, task_id))
                assert (None if view.given is None else view.given.answer) == (
                    None if text is None else DemonstrationAnswer(text)
                ), "an acknowledged answer is lost"
        counted = [each for each in self.service.demonstrations(self.study)]
        assert {each.response for each in counted} <= set(self.acknowledged.values())
        assert len(counted) == self.service.progress(self.study).answered
        assert "key-4" not in {each.prompt.about.id for each in counted}
        assert self.kept_waiting() == [], "an answer is extra though nobody has its slot"
        with self.store.write() as connection:  # so that desks have no more to look through with every example
            connection.execute(sa.update(studies).where(studies.c.name == self.study).values(closed_at=0.0))

    def kept_waiting(self) -> list[str]:
        """Open slots that were answered by a rater who has none of the item."""
        theirs = assignments.alias()
        has_one = sa.exists().where(theirs.c.item_id == assignments.c.item_id, theirs.c.rater_id == leases.c.rater_id)
        answered = (
            sa.select(assignments.c.id)
            .join(leases, leases.c.assignment_id == assignments.c.id)
            .join(answers, answers.c.lease_id == leases.c.id)
            .where(assignments.c.state == "open", ~has_one)
        )
        with self.store.read() as connection:
            return list(connection.execute(answered).scalars())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS, overlap=st.integers(1, 2))
def test_any_interleaving(
    store: Store, service: LabelService, clock: Clock, make: Make, acts: list[tuple[str, str, int]], overlap: int
) -> None:
    play = Play(store, service, clock, make, overlap)
    for act in acts:
        play.act(*act)
    play.check()


def test_many_desks_at_once(store: Store, service: LabelService, make: Make) -> None:
    """Every thread has a desk of its own, as every server process has."""
    names = [f"rater {index}" for index in range(5)]
    service.queue(make.study("demonstration", overlap=2), make.items(11, outputs=0))
    make.raters(service, *names)
    errors: list[BaseException] = []

    def work(rater: str) -> None:
        desk = Desk(store)
        try:
            while (view := desk.next_task(rater, "study")) is not None:
                desk.save_draft(rater, view.task.id, {"text": "Once"}, view.draft_version)
                if view.task.messages[1].content == "Question key-3?" and rater == names[0]:
                    desk.skip(rater, view.task.id)
                else:
                    assert desk.submit(rater, view.task.id, DemonstrationAnswer(rater)) == "counted"
        except BaseException as error:  # a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    given = Counter((each.prompt.about.id, each.author.rater) for each in service.demonstrations("study"))
    assert (sum(given.values()), set(given.values())) == (22, {1})
    with store.read() as connection:
        lease_count = connection.execute(sa.select(sa.func.count()).select_from(leases)).scalar_one()
        skip_count = connection.execute(sa.select(sa.func.count()).select_from(remarks)).scalar_one()
        answer_count = connection.execute(sa.select(sa.func.count()).select_from(answers)).scalar_one()
    assert (answer_count, lease_count) == (22, 22 + skip_count)


SECRETS = ("secret-model", "secret-key", "secret-id", "secret-user", "secret-category", "secret-truth", "evaluation")


def secret_item(make: Make, index: int) -> NewItem:
    item = make.item(f"secret-key-{index}", 2)
    about = replace(
        item.prompt.about,
        id=f"secret-id-{index}",
        user="secret-user",
        category="secret-category",
        extra={"t": "secret-truth"},
    )
    outputs = tuple(
        replace(each, source=f"secret-model-{place}", response=replace(each.response, text=f"Text {place}"))
        for place, each in enumerate(item.outputs)
    )
    return replace(item, prompt=replace(item.prompt, messages=item.prompt.messages[:1], about=about), outputs=outputs)


def test_everything_at_the_desk_is_blind(store: Store, service: LabelService, make: Make, clock: Clock) -> None:
    service.queue(make.study("comparison", purpose="evaluation"), [secret_item(make, index) for index in range(5)])
    make.raters(service, "ann", "bob-secret-rater")
    with store.write() as connection:
        ids = connection.execute(sa.select(items.c.id).order_by(items.c.id)).scalars().all()
        connection.execute(sa.insert(gold), [{"item_id": each, "expected": "A", "created_at": 0.0} for each in ids[:2]])
        connection.execute(sa.update(studies).values(gold_share=0.9, secret="secret-study"))
    desk = Desk(store, clock=clock)
    told: list[object] = []
    tell: Callable[[object], None] = told.append
    shapes = set()
    for _ in range(5):
        other = desk.next_task("bob-secret-rater", "study")
        view = desk.next_task("ann", "study")
        if other is not None:
            desk.submit("bob-secret-rater", other.task.id, ComparisonAnswer("B"))
        if view is None:
            break
        shapes.add((view.state, view.leased_until, view.draft, view.draft_version, view.given))
        told += [view, desk.studies("ann"), desk.heartbeat("ann", view.task.id)]
        desk.save_draft("ann", view.task.id, {"choice": "A"}, view.draft_version)
        tell(desk.task("ann", view.task.id))
        tell(desk.submit("ann", view.task.id, ComparisonAnswer("A")))
        desk.revise("ann", view.task.id, ComparisonAnswer("tie"))
        tell(desk.undo("ann", view.task.id, revision=2))
        tell(desk.task("ann", view.task.id))
    told += [desk.history("ann"), desk.progress("ann"), desk.profile("ann"), desk.guideline("ann", "v1")]
    words = list(leaves(told))
    assert {"study", "Prefer the helpful.", "Be brief.", "counted"} <= set(words)  # the walk does reach things
    assert [each for each in words for secret in (*SECRETS, "secret-rater") if secret in each] == []
    assert not any(word in each for each in words for word in ("gold", "source", "purpose", "overlap", "position"))
    assert len(shapes) == 1  # gold or not, every task looks alike
