"""Items that test raters: where hidden gold comes, which follows from a secret, and screening. On both databases."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.store.test_desk import MINUTE, decide, fill, id_of, key, make_gold, set_study, write

from tastemaker.store import LabelService, Store
from tastemaker.store.desk import Desk
from tastemaker.store.hidden import is_gold_place
from tastemaker.store.tasks import RankingAnswer
from tastemaker.store.views import StudyLocked

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make


def test_nobody_who_knows_names_can_tell_where_gold_comes(url: str, clock: Clock, make: Make, tmp_path: Path) -> None:
    patterns = []
    for address in (url, f"sqlite:///{tmp_path / 'other.db'}"):
        with Store.open(address) as store:
            fill(LabelService(store), make, count=60)
            (study,) = LabelService(store).studies()
            hidden = [f"key-{index}" for index in range(30, 60)]
            make_gold(store, *hidden, share=0.5, secret=study.secret)
        came: list[bool] = []
        while len(came) < 24:
            with Store.open(address) as store:  # the server is started anew now and then
                desk = Desk(store, clock=clock)
                for _ in range(8):
                    view = desk.next_task("ann", "study")
                    came.append(key(view) in hidden)
                    desk.submit("ann", id_of(view), write("text"))
        assert came == [is_gold_place(study.secret, "ann", place, 0.5) for place in range(24)]
        patterns.append(came)
    by_names = [
        number < 2**31
        for block in range(2)
        for number in struct.unpack("<16I", hashlib.blake2b(f"study\x1fann\x1f{block}".encode()).digest())
    ]
    assert patterns[0] != patterns[1]
    assert by_names[:24] not in patterns


def test_gold_is_no_work_and_every_rater_meets_it_once(
    desk: Desk, service: LabelService, make: Make, store: Store
) -> None:
    fill(service, make, count=5, kind="ranking")
    make_gold(store, "key-1", "key-3")  # every task is gold while there is any
    met: dict[str, list[str]] = {}
    for rater in ("ann", "bob"):
        met[rater] = []
        while len(met[rater]) < 3:
            view = desk.next_task(rater, "study")
            met[rater].append(key(view))
            desk.submit(rater, id_of(view), RankingAnswer((("A", "B", "C"),)))
    assert [set(keys[:2]) for keys in met.values()] == [{"key-1", "key-3"}] * 2
    assert [keys[2] for keys in met.values()] == ["key-0", "key-2"]
    progress = service.progress("study")
    assert (progress.slots, progress.answered, progress.missing) == (3, 2, 1)
    assert len(service.rankings("study")) == 2
    assert [task.messages[1].content for task in service.claim("study", "cat", limit=9)] == ["Question key-4?"]
    assert len(desk.history("ann")) == 3
    assert desk.next_task("ann", "study") is None  # no work is left, so no gold either


def test_gold_comes_at_its_share_and_the_count_never_tells(
    desk: Desk, service: LabelService, make: Make, store: Store, clock: Clock
) -> None:
    fill(service, make, count=30, overlap=2)
    hidden = [f"key-{index}" for index in range(20, 30)]
    make_gold(store, *hidden, share=0.3)
    left = desk.studies("ann")[0].left
    met = []
    while (view := desk.next_task("ann", "study")) is not None:
        assert desk.studies("ann")[0].left == left
        met.append(key(view))
        if len(met) % 3 == 0:
            desk.skip("ann", id_of(view))
        elif len(met) % 5 == 0:
            clock.now += 31 * MINUTE  # a lease that ended changes nothing either
            desk.submit("ann", id_of(view), write("late"))
        else:
            desk.submit("ann", id_of(view), write("text"))
        left -= 1
    assert left == 0
    assert desk.studies("ann")[0].left == 0
    assert len(met) == len(set(met))
    # Of places 0 to 27 or so, 30 % are gold: 20 pieces of work leave some 8 of 10.
    assert set(met) >= {f"key-{index}" for index in range(20)}
    assert 3 <= len(set(met) & set(hidden)) <= 10


def test_gold_comes_to_each_rater_at_places_and_in_an_order_of_their_own(
    desk: Desk, service: LabelService, make: Make, store: Store
) -> None:
    """Or raters could tell each other which tasks test them."""
    raters = ("ann", "bob", "cat")
    assert len({tuple(is_gold_place("secret", rater, place, 0.5) for place in range(30)) for rater in raters}) == 3
    fill(service, make, count=7)
    make_gold(store, *(f"key-{index}" for index in range(1, 7)))  # every task is gold while there is any
    orders = set()
    for rater in raters:
        met: list[str] = []
        for _ in range(6):
            view = desk.next_task(rater, "study")
            met.append(key(view))
            desk.submit(rater, id_of(view), write("text"))
        assert sorted(met) == [f"key-{index}" for index in range(1, 7)]
        orders.add(tuple(met))
    assert len(orders) == 3


def test_gold_is_never_late_and_never_anothers(
    desk: Desk, service: LabelService, make: Make, store: Store, clock: Clock
) -> None:
    fill(service, make, count=3)
    make_gold(store, "key-0", expected="a good text")
    task_id = id_of(desk.next_task("ann", "study"))
    clock.now += 31 * MINUTE
    other = desk.next_task("bob", "study")
    assert (key(other), id_of(other) != task_id) == ("key-0", True)
    assert desk.submit("ann", task_id, write("late")) == "counted"
    assert service.demonstrations("study") == []


def test_screening_comes_first_and_its_answers_are_no_data(
    desk: Desk, service: LabelService, make: Make, store: Store
) -> None:
    fill(service, make)
    service.queue(make.study("demonstration", name="test"), make.items(2, outputs=0))
    set_study(store, "test", screening=True)

    def locked(rater: str) -> dict[str, str | None]:
        return {study.name: study.locked_because for study in desk.studies(rater)}

    with pytest.raises(StudyLocked, match="when you have passed the screening test: please answer that first"):
        desk.next_task("ann", "study")
    for rater in ("ann", "bob"):  # everybody answers all of it, whatever its overlap
        for wanted in ("key-0", "key-1"):
            assert "answer that first" in (locked(rater)["study"] or "")
            view = desk.next_task(rater, "test")
            assert key(view) == wanted
            desk.submit(rater, id_of(view), write("text"))
        assert desk.next_task(rater, "test") is None
    assert "You have finished" in (locked("ann")["study"] or "")
    assert locked("ann")["test"] is None
    decide(store, "ann", True)
    decide(store, "bob", False)
    assert key(desk.next_task("ann", "study")) == "key-0"
    assert "not opened to you" in (locked("bob")["study"] or "")
    decide(store, "bob", True)
    assert locked("bob")["study"] is None
    set_study(store, "test", closed_at=5.0)
    assert "You have finished" in (locked("cat")["study"] or "")  # still guarded
    assert service.demonstrations("test") == []
    assert service.claim("test", "cat") == []
    assert service.progress("test").slots == 0
