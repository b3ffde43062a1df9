"""What is stored of an answer, what is refused, and how it is read again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tastemaker.errors import AnswersMissing, StoreError
from tastemaker.panel import Panel, collect
from tastemaker.records import About, Author, Demonstration, Message, Prompt, Response
from tastemaker.store import LabelService, Store
from tastemaker.store.schema import answers
from tastemaker.store.tasks import (
    FLAGS,
    LETTERS,
    Answer,
    Choice,
    ComparisonAnswer,
    DemonstrationAnswer,
    NewItem,
    OutputRating,
    RankingAnswer,
    RatingAnswer,
    StudyKind,
    Submission,
    SubmissionError,
    Task,
    answer_from_json,
    answer_to_json,
    order_seed,
    order_shown,
)

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

ON_ONE_STORE = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
OUTPUTS: dict[StudyKind, int] = {"demonstration": 0, "ranking": 3, "comparison": 2, "rating": 2}
GOOD: dict[StudyKind, Answer] = {
    "demonstration": DemonstrationAnswer("Gladly."),
    "ranking": RankingAnswer((("C",), ("A", "B"))),
    "comparison": ComparisonAnswer("A"),
    "rating": RatingAnswer({"A": OutputRating(7, ("hallucination",)), "B": OutputRating(1)}),
}


def one_task(service: LabelService, make: Make, kind: StudyKind) -> Task:
    service.queue(make.study(kind), [make.item("key", OUTPUTS[kind])])
    make.raters(service, "ann")
    (task,) = service.claim("study", "ann")
    return task


def letter_of(task: Task, text: str) -> str:
    return next(output.letter for output in task.outputs if output.text == text)


def bodies(store: Store) -> list[object]:
    with store.read() as connection:
        return list(connection.execute(sa.select(answers.c.body).order_by(answers.c.id)).scalars())


BAD: list[tuple[StudyKind, Answer, str]] = [
    ("demonstration", DemonstrationAnswer("A smile: \ud83d"), "half a character"),
    ("demonstration", DemonstrationAnswer(" \n"), "empty"),
    ("demonstration", ComparisonAnswer("A"), "is a demonstration, the answer a ComparisonAnswer"),
    ("ranking", RankingAnswer((("A",), ("B",))), "exactly once; missing C"),
    ("ranking", RankingAnswer((("A", "B"), ("B", "C"))), "repeated B"),
    ("ranking", RankingAnswer((("A", "B"), ("C",), ("D",))), "unknown D"),
    ("ranking", RankingAnswer((("A", "B"), ("C",), ())), "empty group"),
    ("ranking", RankingAnswer(()), "missing A, B, C"),
    ("comparison", ComparisonAnswer("C"), "must be one of A, B, tie"),  # type: ignore[arg-type]
    ("comparison", RankingAnswer((("A",), ("B",))), "is a comparison"),
    ("rating", RatingAnswer({"A": OutputRating(4)}), "missing B"),
    ("rating", RatingAnswer({"A": OutputRating(4), "B": OutputRating(8)}), "quality of B is 8.*from 1 to 7"),
    ("rating", RatingAnswer({"A": OutputRating(True), "B": OutputRating(4)}), "quality of A is True"),
    ("rating", RatingAnswer({"A": OutputRating(0), "B": OutputRating(4)}), "quality of A is 0"),
    ("rating", RatingAnswer({"A": OutputRating(4, ("rude",)), "B": OutputRating(4)}), "flags of A hold rude; allowed"),
]


def test_a_stage_returns_with_all_answers_or_says_that_some_are_missing(service: LabelService, make: Make) -> None:
    """The last answer comes right after the answers were read."""
    late = [one_task(service, make, "demonstration")]

    def read(study: str) -> list[Demonstration]:
        found = service.demonstrations(study)
        for task in late:
            service.submit(task.id, task.token, GOOD["demonstration"])
        late.clear()
        return found

    def collected() -> list[Demonstration]:
        items = [make.item("key", OUTPUTS["demonstration"])]
        panel = Panel(group="team", address="here")
        return collect(
            service, make.study("demonstration"), items, panel, read=read, slot=lambda one: ("key", one.author.rater)
        )

    with pytest.raises(AnswersMissing):
        collected()
    assert [one.response for one in collected()] == ["Gladly."]


@pytest.mark.parametrize(("kind", "answer", "message"), BAD)
def test_bad_answers_are_refused_whole(
    service: LabelService, store: Store, make: Make, kind: StudyKind, answer: Answer, message: str
) -> None:
    task = one_task(service, make, kind)
    with pytest.raises(StoreError, match=message):
        service.submit(task.id, task.token, answer)
    assert bodies(store) == []
    assert service.held("study", "ann") == [task]


def test_one_bad_answer_refuses_the_batch(service: LabelService, store: Store, make: Make) -> None:
    service.queue(make.study("demonstration"), make.items(3, outputs=0))
    make.raters(service, "ann")
    tasks = service.claim("study", "ann", limit=3)
    texts = ("one", "", "three")
    batch = [
        Submission(task_id=task.id, token=task.token, answer=DemonstrationAnswer(text))
        for task, text in zip(tasks, texts, strict=True)
    ]
    with pytest.raises(SubmissionError, match="empty") as caught:
        service.submit_many(batch)
    assert caught.value.index == 1
    with pytest.raises(SubmissionError, match="answered twice at once") as caught:
        service.submit_many([batch[0], batch[2], batch[0]])
    assert caught.value.index == 2
    assert bodies(store) == []
    assert service.submit_many([]) == []


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_same_answer_again_changes_nothing_another_is_refused(
    service: LabelService, store: Store, make: Make, kind: StudyKind
) -> None:
    task = one_task(service, make, kind)
    other: dict[StudyKind, Answer] = {
        "demonstration": DemonstrationAnswer("No."),
        "ranking": RankingAnswer((("A", "B", "C"),)),
        "comparison": ComparisonAnswer("tie"),
        "rating": RatingAnswer({"A": OutputRating(7), "B": OutputRating(1)}),
    }
    for _ in range(2):
        assert service.submit(task.id, task.token, GOOD[kind]) == "counted"
    with pytest.raises(StoreError, match="answered otherwise already; to correct it, revise it"):
        service.submit(task.id, task.token, other[kind])
    assert bodies(store) == [answer_to_json(GOOD[kind])]


def test_a_revision_counts_and_the_first_answer_stays(
    service: LabelService, store: Store, clock: Clock, make: Make
) -> None:
    task = one_task(service, make, "comparison")
    with pytest.raises(StoreError, match="'ann' has not answered task"):
        service.revise(task.id, "ann", ComparisonAnswer("A"))
    clock.now += 7.5
    first = letter_of(task, "Text 0 of key")
    second = "B" if first == "A" else "A"
    choices: tuple[Choice, ...] = ("A", "B", "tie") if first == "A" else ("B", "A", "tie")
    service.submit(task.id, task.token, ComparisonAnswer(choices[0]))
    assert [each.preference for each in service.comparisons("study")] == [1.0]
    clock.now += 1000
    service.revise(task.id, "ann", ComparisonAnswer(choices[1]), seconds=2.0)
    service.revise(task.id, "ann", ComparisonAnswer(choices[1]))  # nothing changed, nothing stored
    (comparison,) = service.comparisons("study")
    assert (comparison.preference, comparison.seconds) == (0.0, 9.5)
    with pytest.raises(StoreError, match="must be one of"):
        service.revise(task.id, "ann", ComparisonAnswer("X"))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="'bob' has not answered"):
        service.revise(task.id, "bob", ComparisonAnswer("A"))
    assert bodies(store) == [first, second]


def test_every_answer_records_how_it_was_given(service: LabelService, store: Store, clock: Clock, make: Make) -> None:
    task = one_task(service, make, "ranking")
    started = clock.now
    clock.now += 12.5
    service.submit(task.id, task.token, GOOD["ranking"])
    with store.read() as connection:
        row = connection.execute(sa.select(answers)).one()
    shown = order_shown(order_seed("study", "key", 0), 3)
    assert [output.text for output in task.outputs] == [f"Text {index} of key" for index in shown]
    assert row.order_shown == list(shown)
    assert (row.started_at, row.submitted_at, row.seconds) == (started, started + 12.5, 12.5)
    assert (row.guideline_version, row.origin, row.revision, row.answer_schema) == ("v1", "human", 1, 1)


def test_measured_seconds_are_taken_over(service: LabelService, clock: Clock, make: Make) -> None:
    task = one_task(service, make, "comparison")
    clock.now += 1000
    service.submit(task.id, task.token, ComparisonAnswer("A"), seconds=31.0)
    assert service.comparisons("study")[0].seconds == 31.0


@ON_ONE_STORE
@given(data=st.data())
def test_weak_orders_come_back(service: LabelService, make: Make, data: st.DataObject) -> None:
    """Whatever the order shown, a ranking comes back in terms of the outputs as queued, ties and all."""
    count = data.draw(st.integers(2, 7))
    rank = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    name = f"study-{random.Random(repr((count, rank))).random()}"
    service.queue(make.study(name=name), [make.item("key", count)])
    make.raters(service, "ann")
    tasks = service.claim(name, "ann")
    order = tuple(tuple(i for i in range(count) if rank[i] == level) for level in sorted(set(rank)))
    for task in tasks:  # none if hypothesis draws the same again
        groups = tuple(tuple(letter_of(task, f"Text {index} of key") for index in group) for group in order)
        service.submit(task.id, task.token, RankingAnswer(groups))
    (ranking,) = service.rankings(name)
    assert ranking.order == order
    assert ranking.responses == tuple(output.response for output in make.item("key", count).outputs)
    assert ranking.prompt == make.prompt("key")
    assert ranking.author == Author(rater="ann", rater_group="team", origin="human", guideline_version="v1")


# PostgreSQL and SQLite alike take any text; files of prompts and demonstrations with half a surrogate pair are refused.
TEXTS = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS, lambda inner: st.lists(inner), max_leaves=4
)


@ON_ONE_STORE
@given(
    messages=st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=3
    ),
    extra=st.dictionaries(TEXTS, JSON, max_size=3),
    category=st.none() | TEXTS,
    written=st.text(min_size=1, max_size=20),
)
def test_prompts_and_demonstrations_come_back(
    service: LabelService,
    make: Make,
    messages: list[Message],
    extra: dict[str, object],
    category: str | None,
    written: str,
) -> None:
    prompt = Prompt(messages=tuple(messages), about=About(category=category, extra=extra))
    name = f"study-{random.Random(repr((prompt, written))).random()}"
    service.queue(make.study("demonstration", name=name), [NewItem(key="key", prompt=prompt)])
    make.raters(service, "ann")
    for task in service.claim(name, "ann"):
        assert task.messages == prompt.messages
        answer = DemonstrationAnswer(written)
        if not written.strip():
            with pytest.raises(StoreError, match="empty"):
                service.submit(task.id, task.token, answer)
            return
        service.submit(task.id, task.token, answer)
        (demonstration,) = service.demonstrations(name)
        assert (demonstration.prompt, demonstration.response) == (prompt, written)


@pytest.mark.parametrize(("choice", "preference"), [("first", 1.0), ("tie", 0.5), ("second", 0.0)])
def test_comparisons_in_terms_of_the_first_output(
    service: LabelService, make: Make, choice: str, preference: float
) -> None:
    """Over enough items both orders are shown; the preference speaks of the first queued in each."""
    service.queue(make.study("comparison", purpose="evaluation"), make.items(11, outputs=2))
    make.raters(service, "ann")
    shown_first: Counter[str] = Counter()
    for task in service.claim("study", "ann", limit=11):
        key = task.messages[1].content.split()[1].rstrip("?")
        first = letter_of(task, f"Text 0 of {key}")
        letter: dict[str, Choice] = {"first": "A" if first == "A" else "B", "second": "B" if first == "A" else "A"}
        service.submit(task.id, task.token, ComparisonAnswer(letter.get(choice, "tie")))
        shown_first[f"model-{0 if first == 'A' else 1}"] += 1
    comparisons = service.comparisons("study")
    assert [each.key for each in comparisons] == [f"key-{index}" for index in range(11)]
    assert {each.preference for each in comparisons} == {preference}
    assert {(each.first_source, each.second_source) for each in comparisons} == {("model-0", "model-1")}
    assert comparisons[0].second == Response(text="Text 1 of key-0", finished=False)
    assert Counter(each.shown_first for each in comparisons) == shown_first
    assert min(shown_first["model-0"], shown_first["model-1"]) > 0


def test_ratings_in_terms_of_the_outputs(service: LabelService, make: Make) -> None:
    service.queue(make.study("rating"), make.items(5, outputs=3))
    make.raters(service, "ann")
    for task in service.claim("study", "ann", limit=5):
        rating = {
            output.letter: OutputRating(int(output.text.split()[1]) + 2, ("sexual_content", "hallucination"))
            if "Text 2" in output.text
            else OutputRating(int(output.text.split()[1]) + 2)
            for output in task.outputs
        }
        service.submit(task.id, task.token, RatingAnswer(rating))
    ratings = service.ratings("study")
    assert [(each.key, each.source, each.likert) for each in ratings[:4]] == [
        ("key-0", "model-0", 2), ("key-0", "model-1", 3), ("key-0", "model-2", 4), ("key-1", "model-0", 2),
    ]  # fmt: skip
    assert [each.flags for each in ratings[:3]] == [(), (), ("hallucination", "sexual_content")]
    for index, each in enumerate(ratings):
        shown = order_shown(order_seed("study", each.key, 0), 3)
        assert shown[each.position] == index % 3


def test_exports_do_not_depend_on_who_answers_when(service: LabelService, make: Make) -> None:
    make.raters(service, "ann", "bob")
    exports = []
    for name, reverse in (("one", False), ("two", True)):
        service.queue(make.study("demonstration", name=name, overlap=2), make.items(6, outputs=0))
        # Slots in a fixed hand: ann the first of each item, bob the second.
        tasks = [("ann", task) for task in service.claim(name, "ann", limit=6)]
        tasks += [("bob", task) for task in service.claim(name, "bob", limit=6)]
        for rater, task in sorted(tasks, key=lambda pair: pair[1].messages[1].content, reverse=reverse):
            service.submit(task.id, task.token, DemonstrationAnswer(f"{rater}: {task.messages[1].content}"))
        exports.append(service.demonstrations(name))
    assert exports[0] == exports[1]
    assert [each.author.rater for each in exports[0]] == ["ann", "bob"] * 6


@pytest.mark.parametrize("kind", OUTPUTS)
def test_each_kind_is_read_as_itself(service: LabelService, make: Make, kind: StudyKind) -> None:
    task = one_task(service, make, kind)
    service.submit(task.id, task.token, GOOD[kind])
    readers: dict[str, Callable[[str], Sequence[object]]] = {
        "demonstration": service.demonstrations,
        "ranking": service.rankings,
        "comparison": service.comparisons,
        "rating": service.ratings,
    }
    for other, read in readers.items():
        if other == kind:
            assert len(read("study")) == (2 if kind == "rating" else 1)
        else:
            with pytest.raises(StoreError, match=f"'study' asks for a {kind}; it has no {other} answers"):
                read("study")


@pytest.mark.parametrize("kind", OUTPUTS)
def test_answers_as_json_and_back(kind: StudyKind) -> None:
    assert answer_from_json(kind, answer_to_json(GOOD[kind])) == GOOD[kind]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_order_is_shown_equally_often(count: int) -> None:
    slots = 6000
    orders = Counter(order_shown(order_seed("study", f"key-{index}", index % 3), count) for index in range(slots))
    places = Counter(
        (place, output) for order, n in orders.items() for place, output in enumerate(order) for _ in range(n)
    )
    expected = slots / count
    # Five standard deviations of a binomial count.
    margin = 5 * (slots * (1 / count) * (1 - 1 / count)) ** 0.5
    assert len(places) == count * count
    assert all(abs(n - expected) < margin for n in places.values())
    assert len(orders) == {2: 2, 3: 6, 5: 120}[count]


def test_orders_of_one_item_differ_between_slots() -> None:
    orders = {order_shown(order_seed("study", "key", slot), 4) for slot in range(12)}
    assert len(orders) > 6


def test_orders_are_the_same_for_ever() -> None:
    """Stored answers depend on it."""
    assert order_seed("study", "key", 0) == GOLDEN_SEED
    assert order_shown(GOLDEN_SEED, 6) == GOLDEN_ORDER


def test_flags_and_letters() -> None:
    assert len(FLAGS) == len(set(FLAGS)) == 11  # Table 3 without the overall quality
    assert len(LETTERS) == 26


GOLDEN_SEED = 2535545693095423400
GOLDEN_ORDER = (5, 3, 2, 0, 4, 1)
