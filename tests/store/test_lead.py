"""What leads do: studies, imports with file and line, gold, guidelines, unblinding, adjudication; on both databases."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from hypothesis import given as drawn
from hypothesis import strategies as st
from tests.store.people import LEAD, actions, know_secrets, open_accounts, work

from tastemaker.agreement import Undefined
from tastemaker.errors import DataError, StoreError
from tastemaker.store import LabelService, Store
from tastemaker.store.access import AccessService
from tastemaker.store.adjudication import AdjudicationService
from tastemaker.store.audit import COMMAND_LINE, Actor
from tastemaker.store.dashboard import Dashboard
from tastemaker.store.desk import Desk
from tastemaker.store.gold import against_gold, disagreement, in_queued_letters, in_shown_letters
from tastemaker.store.importing import GoldItem
from tastemaker.store.lead import LeadService
from tastemaker.store.schema import adjudications
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    ComparisonAnswer,
    Guideline,
    OutputRating,
    RankingAnswer,
    RatingAnswer,
    StudyKind,
)

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make


@pytest.fixture
def lead(store: Store, clock: Clock) -> LeadService:
    open_accounts(store)
    return LeadService(store, clock=clock)


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def item_ids(lead: LeadService, study: str) -> list[int]:
    """In their order in the study."""
    return list(dict.fromkeys(one.item for one in lead.unblind(study, reason="for the test", actor=LEAD)))


# --- letters and gold -----------------------------------------------------------------------------------------------


def test_letters_are_turned_back_by_an_order_that_is_not_its_own_inverse() -> None:
    # Shown A, B, C are the outputs queued third, first, second.
    answer = RankingAnswer((("A",), ("B", "C")))
    assert in_queued_letters(answer, (2, 0, 1)) == RankingAnswer((("C",), ("A", "B")))
    assert in_shown_letters(answer, (2, 0, 1)) == RankingAnswer((("B",), ("A", "C")))
    ratings = RatingAnswer({"A": OutputRating(1), "B": OutputRating(2), "C": OutputRating(3)})
    assert in_queued_letters(ratings, (2, 0, 1)) == RatingAnswer(
        {"C": OutputRating(1), "A": OutputRating(2), "B": OutputRating(3)}
    )
    assert in_queued_letters(ComparisonAnswer("A"), (1, 0)) == ComparisonAnswer("B")
    assert in_queued_letters(ComparisonAnswer("tie"), (1, 0)) == ComparisonAnswer("tie")


@drawn(st.sampled_from(list(permutations(range(5)))), st.permutations(LETTERS[:5]))
def test_both_ways_are_each_others_inverse(order: tuple[int, ...], letters: list[str]) -> None:
    answer = RankingAnswer((tuple(sorted(letters[:2])), (letters[2],), tuple(sorted(letters[3:]))))
    assert in_queued_letters(in_shown_letters(answer, order), order) == answer


@pytest.mark.parametrize(
    ("answer", "expected", "agreed"),
    [
        # The gold's untied pairs are AB, AC, (BC ties). A over B agrees; A and C tied does not.
        (RankingAnswer((("A", "C"), ("B",))), RankingAnswer((("A",), ("B", "C"))), [(1, 2)]),
        (RankingAnswer((("C",), ("B",), ("A",))), RankingAnswer((("A",), ("B", "C"))), [(0, 2)]),
        (RankingAnswer((("A",), ("C",), ("B",))), RankingAnswer((("A",), ("B", "C"))), [(2, 2)]),
        (ComparisonAnswer("tie"), ComparisonAnswer("tie"), [(1, 1)]),
        (ComparisonAnswer("tie"), ComparisonAnswer("A"), [(0, 1)]),
        # One flag too many of A, one lacking of B: 20 of 22. Quality: 5 for 4 is near, 6 for 4 is not.
        (
            RatingAnswer({"A": OutputRating(5, ("hallucination",)), "B": OutputRating(6)}),
            RatingAnswer({"A": OutputRating(4), "B": OutputRating(4, ("violent_content",))}),
            [(20, 22), (1, 2)],
        ),
    ],
)
def test_agreement_with_gold(answer: Answer, expected: Answer, agreed: list[tuple[int, int]]) -> None:
    assert [(one.agreed, one.of) for one in against_gold(answer, expected)] == agreed


def test_disagreement_by_hand() -> None:
    first, second = RankingAnswer((("A",), ("B",), ("C",))), RankingAnswer((("B",), ("A", "C")))
    # AB opposite (2), AC preference against tie (1), BC alike (0): 3 of at most 6.
    assert disagreement([first, second]) == pytest.approx(0.5, abs=1e-9)
    assert disagreement([first]) is None
    # Quality 1 against 4 is 3/12, flags alike.
    assert disagreement([RatingAnswer({"A": OutputRating(1)}), RatingAnswer({"A": OutputRating(4)})]) == pytest.approx(
        0.25, abs=1e-9
    )


# --- studies --------------------------------------------------------------------------------------------------------


def test_a_study_from_creation_to_closing(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    make.raters(service, "ann", "bob")
    lead.create_study(make.study("ranking", overlap=2), actor=LEAD, gold_share=0.1)
    assert lead.import_items("study", make.items(3), actor=LEAD).added == 3
    assert lead.import_items("study", make.items(4), actor=LEAD) == dataclasses.replace(
        lead.import_items("study", [], actor=LEAD), added=1, known=3
    )
    lead.set_gold_share("study", 0.2, actor=LEAD)
    lead.assign_raters("study", ["ann"], actor=LEAD)
    assert lead.assigned_raters("study") == ["ann"]
    desk = Desk(store, clock=clock)
    assert [study.name for study in desk.studies("bob")] == []
    lead.assign_raters("study", [], actor=LEAD)
    work(desk, "bob", "study", {f"key-{index}": [[0], [1, 2]] for index in range(4)})
    lead.close("study", actor=LEAD)
    assert desk.next_task("ann", "study") is None
    (found,) = lead.studies()
    assert (found.items, found.slots, found.answered, found.closed, found.gold_share) == (4, 8, 4, True, 0.2)
    lead.reopen("study", actor=LEAD)
    assert desk.next_task("ann", "study") is not None
    assert actions(store)[:3] == ["study.create", "items.import", "items.import"]
    assert actions(store)[-2:] == ["study.close", "study.reopen"]


def test_what_is_refused_leaves_nothing(store: Store, service: LabelService, lead: LeadService, make: Make) -> None:
    service.add_rater("zoe", group="others", origin="human")
    lead.create_study(make.study("ranking"), actor=LEAD)
    with pytest.raises(StoreError, match="already"):
        lead.create_study(make.study("ranking"), actor=LEAD)
    with pytest.raises(StoreError, match="group 'others'"):
        lead.assign_raters("study", ["zoe"], actor=LEAD)
    with pytest.raises(StoreError, match="from 0 to"):
        lead.set_gold_share("study", 0.9, actor=LEAD)
    with pytest.raises(StoreError, match="ties all outputs"):
        lead.add_gold("study", [GoldItem(item=make.item("g"), expected=RankingAnswer((("A", "B", "C"),)))], actor=LEAD)
    with pytest.raises(StoreError, match="no expected answer"):
        lead.add_gold("study", [GoldItem(item=make.item("g"), expected=None)], actor=LEAD)
    assert lead.studies()[0].items == 0
    assert actions(store) == ["study.create"]


def test_a_changed_guideline_is_a_new_version_and_answers_keep_theirs(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    make.raters(service, "ann", "bob")
    lead.create_study(make.study("comparison", overlap=2), actor=LEAD)
    lead.import_items("study", make.items(1, 2), actor=LEAD)
    desk = Desk(store, clock=clock)
    work(desk, "ann", "study", {"key-0": 0})
    with pytest.raises(StoreError, match="another text"):
        lead.set_guideline("study", Guideline(version="v1", text="Prefer the true."), actor=LEAD)
    lead.set_guideline("study", Guideline(version="v2", text="Prefer the true."), actor=LEAD)
    work(desk, "bob", "study", {"key-0": 1})
    assert [one.guideline_version for one in service.comparisons("study")] == ["v1", "v2"]
    assert {one.version: one.studies for one in lead.guidelines()} == {"v1": (), "v2": ("study",)}


def test_an_answer_names_the_guideline_that_its_page_showed(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    make.raters(service, "ann")
    lead.create_study(make.study("comparison"), actor=LEAD)
    lead.import_items("study", make.items(1, 2), actor=LEAD)
    desk = Desk(store, clock=clock)
    page = desk.next_task("ann", "study")
    assert page is not None
    lead.set_guideline("study", Guideline(version="v2", text="Prefer the true."), actor=LEAD)
    with pytest.raises(StoreError, match="never had the guideline 'v3'; it has 'v2' now"):
        desk.submit("ann", page.task.id, ComparisonAnswer("A"), guideline_version="v3")
    desk.submit("ann", page.task.id, ComparisonAnswer("A"), guideline_version=page.task.guideline_version)
    assert [one.guideline_version for one in service.comparisons("study")] == ["v1"]
    desk.submit("ann", page.task.id, ComparisonAnswer("B"), guideline_version="v2")
    assert [one.guideline_version for one in service.comparisons("study")] == ["v2"]


def test_a_run_goes_on_after_a_lead_has_changed_the_guideline(
    service: LabelService, lead: LeadService, make: Make
) -> None:
    study = make.study("comparison")
    service.queue(study, make.items(1, 2))
    lead.set_guideline("study", Guideline(version="v2", text="Prefer the true."), actor=LEAD)
    service.queue(study, make.items(2, 2))  # the pipeline knows the first version only
    assert service.progress("study").slots == 2
    with pytest.raises(StoreError, match="guideline_version was 'v2', is 'v3'"):
        service.queue(replace(study, guideline=Guideline(version="v3", text="Prefer the short.")), make.items(2, 2))


def test_unblinding_needs_a_reason_and_is_audited(store: Store, lead: LeadService, make: Make) -> None:
    lead.create_study(make.study("ranking"), actor=LEAD)
    lead.import_items("study", make.items(2), actor=LEAD)
    with pytest.raises(StoreError, match="reason"):
        lead.unblind("study", reason=" ", actor=LEAD)
    found = lead.unblind("study", reason="the study is over", actor=LEAD)
    assert [(one.key, one.letter, one.source) for one in found[:3]] == [
        ("key-0", "A", "model-0"),
        ("key-0", "B", "model-1"),
        ("key-0", "C", "model-2"),
    ]
    case = AdjudicationService(store).case("study", found[0].item, actor=LEAD)
    assert {one.shown_as: one.source for one in found[:3]} == {
        output.letter: f"model-{output.text.split()[1]}" for output in case.outputs
    }
    assert len(lead.unblind("study", reason="one looks odd", actor=LEAD, item=found[3].item)) == 3
    assert actions(store)[-2:] == ["study.unblind", "study.unblind"]


# --- imports --------------------------------------------------------------------------------------------------------

GOOD: dict[str, dict[str, object]] = {
    "demonstration": {"prompt": "Name a fruit.", "id": "1", "mood": "calm"},
    "ranking": {"prompt": "Name a fruit.", "responses": ["apple", "pear", "stone"], "sources": ["x", "y", "z"]},
    "comparison": {"prompt": "Name a fruit.", "chosen": "apple", "rejected": "stone"},
    "rating": {"messages": [{"role": "user", "content": "Name a fruit."}], "responses": ["apple"], "finished": [False]},
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_file_of_each_kind(
    store: Store, service: LabelService, lead: LeadService, make: Make, tmp_path: Path, kind: StudyKind
) -> None:
    lead.create_study(make.study(kind), actor=LEAD)
    path = write(tmp_path / "rows.jsonl", [GOOD[kind]])
    assert lead.import_file("study", path, actor=LEAD).added == 1
    assert lead.import_file("study", path, actor=LEAD).known == 1
    make.raters(service, "ann")
    (task,) = service.claim("study", "ann")
    assert task.messages[-1].content == "Name a fruit."
    wanted = {"demonstration": set(), "ranking": {"apple", "pear", "stone"}, "comparison": {"apple", "stone"}}
    assert {output.text for output in task.outputs} == wanted.get(kind, {"apple"})


def test_parquet_and_extra_fields(
    store: Store, service: LabelService, lead: LeadService, make: Make, tmp_path: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [GOOD["ranking"] | {"id": "a", "user": "u", "mood": "calm"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lead.create_study(make.study("ranking"), actor=LEAD)
    assert lead.import_file("study", tmp_path / "rows.parquet", actor=LEAD).added == 1
    make.raters(service, "ann")
    (task,) = service.claim("study", "ann")
    service.submit(task.id, task.token, RankingAnswer((("A", "B", "C"),)))
    about = service.rankings("study")[0].prompt.about
    assert (about.id, about.user, dict(about.extra)) == ("a", "u", {"mood": "calm"})
    assert [one.source for one in lead.unblind("study", reason="test", actor=LEAD)] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "?"}, "no 'responses'"),
        ({"prompt": "?", "responses": []}, "'responses' is empty"),
        ({"prompt": "?", "responses": ["one"]}, "has 1 outputs"),
        ({"prompt": "?", "responses": ["one", 2]}, r"responses\[1\]"),
        ({"prompt": "?", "responses": ["one", "two"], "sources": ["x"]}, "'sources'"),
        ({"prompt": "?", "responses": ["one", "two"], "finished": [True]}, "'finished'"),
        ({"prompt": " ", "responses": ["one", "two"]}, "blank"),
        ({"prompt": "Name a fruit.", "responses": ["other", "two"]}, "another content"),
        (["no object"], "expected a JSON object"),
    ],
)
def test_one_bad_row_refuses_the_file_by_name_and_line(
    store: Store, lead: LeadService, make: Make, tmp_path: Path, bad: object, message: str
) -> None:
    lead.create_study(make.study("ranking"), actor=LEAD)
    path = write(tmp_path / "upload-17.tmp.jsonl", [GOOD["ranking"], bad])
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{message}") as caught:
        lead.import_file("study", path, actor=LEAD, shown_as="rows.jsonl")
    assert "upload-17" not in str(caught.value)
    assert lead.studies()[0].items == 0
    assert actions(store) == ["study.create"]


def test_gold_from_a_file_is_hidden_and_counts_nowhere(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock, tmp_path: Path
) -> None:
    make.raters(service, "ann")
    lead.create_study(make.study("ranking"), actor=LEAD, gold_share=0.5)
    know_secrets(store)
    lead.import_items("study", make.items(6), actor=LEAD)
    row = {"prompt": "Question g?", "responses": ["Text 0 g", "Text 1 g", "Text 2 g"], "expected": [["B"], ["A", "C"]]}
    assert lead.import_gold_file("study", write(tmp_path / "g.jsonl", [row]), actor=LEAD).added == 1
    assert (lead.studies()[0].items, lead.studies()[0].gold_items, lead.studies()[0].slots) == (7, 1, 6)
    answers = {f"key-{index}": [[0], [1], [2]] for index in range(6)} | {"g": [[1], [0, 2]]}
    assert "g" in work(Desk(store, clock=clock), "ann", "study", answers)
    assert len(service.rankings("study")) == 6
    for wrong, message in (({"expected": [["B"], ["A"]]}, "missing C"), ({"expected": None}, "no 'expected'")):
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            lead.import_gold_file("study", write(tmp_path / "w.jsonl", [row | {"id": "w"} | wrong]), actor=LEAD)
    changed = write(tmp_path / "h.jsonl", [row | {"expected": [["A"], ["B", "C"]]}])
    with pytest.raises(StoreError, match="gold with the answer"):
        lead.import_gold_file("study", changed, actor=LEAD)


# --- adjudication ---------------------------------------------------------------------------------------------------


def test_nobody_settles_what_they_answer_themselves(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    """cleo rates and adjudicates: she sees what others answered only where she can no longer be asked."""
    make.raters(service, "ann", "bob")
    access = AccessService(store, clock=clock)
    invited = access.invite({"rater", "adjudicator"}, rater_group="team", actor=COMMAND_LINE)
    access.accept(invited.token, name="cleo", password="four plain words here")
    cleo, adjudication, desk = (
        Actor("cleo", "adjudicator"),
        AdjudicationService(store, clock=clock),
        Desk(store, clock=clock),
    )
    lead.create_study(make.study("ranking", overlap=2), actor=LEAD)
    lead.import_items("study", make.items(3), actor=LEAD)
    view = desk.next_task("cleo", "study")
    assert view is not None
    desk.submit("cleo", view.task.id, RankingAnswer((("C",), ("B",), ("A",))))
    work(desk, "ann", "study", {f"key-{index}": [[0], [1], [2]] for index in range(3)})
    everyones = {one.item for one in adjudication.disputed("study", actor=LEAD)}
    items = item_ids(lead, "study")
    settled = RankingAnswer((("A",), ("B",), ("C",)))
    assert len(everyones) == 1
    assert adjudication.disputed("study", actor=cleo) == []
    for number, item in enumerate(items, 1):  # one she answered, two she may still be asked
        with pytest.raises(StoreError, match=f"Item {number} of study 'study' is not yours to settle: you rate in its"):
            adjudication.case("study", item, actor=cleo)
        with pytest.raises(StoreError, match="is not yours to settle"):
            adjudication.adjudicate("study", item, settled, reason="it is so", actor=cleo)
        assert adjudication.case("study", item, actor=LEAD).answers
    work(desk, "bob", "study", {f"key-{index}": [[2], [1], [0]] for index in range(3)})
    assert {one.item for one in adjudication.disputed("study", actor=cleo)} == set(items) - everyones
    for item in set(items) - everyones:
        adjudication.adjudicate("study", item, settled, reason="it is so", actor=cleo)
    with pytest.raises(StoreError, match="is not yours to settle"):
        adjudication.case("study", everyones.pop(), actor=cleo)
    lead.create_study(dataclasses.replace(make.study("ranking", name="theirs"), rater_group="others"), actor=LEAD)
    lead.import_items("theirs", make.items(1), actor=LEAD)
    assert adjudication.case("theirs", item_ids(lead, "theirs")[0], actor=cleo).answers == ()  # she does not rate there


def test_adjudicators_cannot_tell_sources_by_the_order_and_mean_what_they_see(
    store: Store, lead: LeadService, make: Make, clock: Clock
) -> None:
    """One policy of an evaluation is always queued first, and the chosen of an imported pair."""
    adjudication = AdjudicationService(store, clock=clock)
    lead.create_study(make.study("comparison"), actor=LEAD)
    lead.import_items("study", make.items(40, 2), actor=LEAD)
    lead.create_study(make.study("rating", name="ratings"), actor=LEAD)
    lead.import_items("ratings", make.items(3), actor=LEAD)
    first = []
    for item in item_ids(lead, "study"):
        case = adjudication.case("study", item, actor=LEAD)
        assert adjudication.case("study", item, actor=LEAD) == case
        first.append(case.outputs[0].text.split()[1])
        adjudication.adjudicate("study", item, ComparisonAnswer("A"), reason="why", actor=LEAD)
        (settled,) = adjudication.case("study", item, actor=LEAD).adjudications
        assert settled.answer == ComparisonAnswer("A")
    assert 5 <= first.count("0") <= 35  # of 40 fair throws, fewer or more in one run of a million
    for item in item_ids(lead, "ratings"):
        case = adjudication.case("ratings", item, actor=LEAD)
        answer = RatingAnswer({output.letter: OutputRating(int(output.text.split()[1]) + 1) for output in case.outputs})
        adjudication.adjudicate("ratings", item, answer, reason="why", actor=LEAD)
    with store.read() as connection:
        bodies = connection.execute(sa.select(adjudications.c.body).order_by(adjudications.c.id)).scalars().all()
    assert bodies[:40] == ["A" if index == "0" else "B" for index in first]
    assert bodies[40:] == [{letter: {"likert": n, "flags": []} for n, letter in enumerate("ABC", 1)}] * 3


def test_items_that_test_raters_are_not_there_for_adjudicators(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    make.raters(service, "ann", "bob")
    for name, screening in (("study", False), ("test", True)):
        lead.create_study(make.study("ranking", name=name), actor=LEAD, screening=screening)
        gold = GoldItem(item=make.item("gold"), expected=RankingAnswer((("A",), ("B", "C"))))
        lead.add_gold(name, [gold], actor=LEAD)
    work(Desk(store, clock=clock), "ann", "test", {"gold": [[0], [1], [2]]})
    adjudication = AdjudicationService(store, clock=clock)
    for name in ("study", "test"):
        for item in (*item_ids(lead, name), 999):
            nothing = f"^Study '{name}' has no item {item}\\.$"
            with pytest.raises(StoreError, match=nothing):
                adjudication.case(name, item, actor=LEAD)
            with pytest.raises(StoreError, match=nothing):
                adjudication.adjudicate(name, item, RankingAnswer((("A", "B", "C"),)), reason="why", actor=LEAD)


def test_adjudication_shows_an_order_of_its_own_and_no_names(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    make.raters(service, "ann", "bob")
    lead.create_study(make.study("ranking", overlap=2), actor=LEAD)
    lead.import_items("study", make.items(3), actor=LEAD)
    desk = Desk(store, clock=clock)
    alike = {f"key-{index}": [[0], [1], [2]] for index in range(3)}
    work(desk, "ann", "study", alike)
    work(desk, "bob", "study", alike | {"key-1": [[2], [1], [0]], "key-2": [[0, 1], [2]]})
    adjudication = AdjudicationService(store, clock=clock)
    disputes = adjudication.disputed("study", actor=LEAD)
    # All three pairs opposite: 1. One preference against a tie, of three pairs: 1/6.
    assert [(one.number, round(one.disagreement, 6)) for one in disputes] == [(2, 1.0), (3, round(1 / 6, 6))]
    case = adjudication.case("study", disputes[0].item, actor=LEAD)
    queued = {output.letter: int(output.text.split()[1]) for output in case.outputs}
    assert sorted(queued.values()) == [0, 1, 2]
    given = [one.answer.groups for one in case.answers if isinstance(one.answer, RankingAnswer)]
    assert sorted([queued[letter] for (letter,) in groups] for groups in given) == [[0, 1, 2], [2, 1, 0]]
    shown = repr(case)
    assert not any(hidden in shown for hidden in ("ann", "bob", "model-", "truth", "user-of"))
    for answer in (RankingAnswer((("B",), ("A", "C"))), RankingAnswer((("A",), ("B",), ("C",)))):
        adjudication.adjudicate("study", case.item, answer, reason="the guideline says so", actor=LEAD)
    assert [one.answer for one in adjudication.case("study", case.item, actor=LEAD).adjudications][-1] == RankingAnswer(
        (("A",), ("B",), ("C",))
    )
    with store.read() as connection:  # kept in the letters of the order queued
        last = sa.select(adjudications.c.body).order_by(adjudications.c.revision.desc()).limit(1)
        assert connection.execute(last).scalar() == [[LETTERS[queued[letter]]] for letter in ("A", "B", "C")]
    assert [one.adjudicated for one in adjudication.disputed("study", actor=LEAD)] == [False, True]
    with pytest.raises(StoreError, match="missing C"):
        adjudication.adjudicate("study", case.item, RankingAnswer((("A",), ("B",))), reason="no", actor=LEAD)
    assert actions(store)[-2:] == ["item.adjudicate", "item.adjudicate"]


def test_who_answered_twice_is_not_their_own_peer(
    store: Store, service: LabelService, lead: LeadService, make: Make, clock: Clock
) -> None:
    """Late under an old lease and again under a new one: the answer that counts is theirs."""
    make.raters(service, "ann", "bob", "cat")
    lead.create_study(make.study("comparison", overlap=2), actor=LEAD)
    lead.import_items("study", make.items(1, 2), actor=LEAD)
    (old,) = service.claim("study", "ann")
    service.claim("study", "cat", lease=timedelta(days=2))
    clock.now += 31 * 60.0
    (bob,) = service.claim("study", "bob")
    service.release("study", "cat")
    (new,) = service.claim("study", "ann")
    assert service.submit(old.id, old.token, ComparisonAnswer("A")) == "extra"
    assert service.submit(new.id, new.token, ComparisonAnswer("tie")) == "counted"
    adjudication, dashboard = AdjudicationService(store, clock=clock), Dashboard(store, clock=clock)
    assert adjudication.disputed("study", actor=LEAD) == []
    (report,) = dashboard.raters("study")
    assert isinstance(report.majority, Undefined)
    assert isinstance(dashboard.study("study").majority, Undefined)
    assert (report.answers, report.extra) == (2, 1)
    service.submit(bob.id, bob.token, ComparisonAnswer("tie"))
    assert adjudication.disputed("study", actor=LEAD) == []
    assert len(adjudication.case("study", item_ids(lead, "study")[0], actor=LEAD).answers) == 3  # all are shown
