"""Filling the queue: idempotent, checked, all or nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tastemaker.errors import ConfigError, StoreError
from tastemaker.records import About, Message, Prompt, Response
from tastemaker.store import LabelService
from tastemaker.store.tasks import Guideline, NewItem, NewOutput, StudyConfig, StudyKind

if TYPE_CHECKING:
    from tests.store.conftest import Make


def keys_in_order(service: LabelService, make: Make) -> list[str]:
    """The keys of a study's items in the order in which a rater gets them."""
    make.raters(service, "reader")
    return [task.messages[1].content.split()[1].rstrip("?") for task in service.claim("study", "reader", limit=100)]


def test_queueing_again_changes_nothing(service: LabelService, make: Make) -> None:
    study, items = make.study(overlap=2), make.items(3)
    service.queue(study, items)
    service.queue(study, items)
    assert service.progress("study").slots == 6


def test_new_items_come_after_those_queued_before(service: LabelService, make: Make) -> None:
    service.queue(make.study(), [make.item("b"), make.item("a")])
    service.queue(make.study(), [make.item("d"), make.item("a"), make.item("c"), make.item("c")])
    assert keys_in_order(service, make) == ["b", "a", "d", "c"]


@pytest.mark.parametrize("what", ["text", "finished", "source", "order", "prompt", "category", "private"])
def test_a_key_with_another_content_is_refused_whole(service: LabelService, make: Make, what: str) -> None:
    item = make.item("key")
    first, *rest = item.outputs
    about = item.prompt.about
    changed = {
        "text": replace(item, outputs=(replace(first, response=replace(first.response, text="other")), *rest)),
        "finished": replace(item, outputs=(replace(first, response=replace(first.response, finished=False)), *rest)),
        "source": replace(item, outputs=(replace(first, source="other"), *rest)),
        "order": replace(item, outputs=(*rest, first)),
        "prompt": replace(item, prompt=replace(item.prompt, messages=item.prompt.messages[1:])),
        "category": replace(item, prompt=replace(item.prompt, about=replace(about, category="chat"))),
        "private": replace(item, prompt=replace(item.prompt, about=replace(about, extra={"truth": 7}))),
    }
    service.queue(make.study(), [item])
    with pytest.raises(StoreError, match=r"Item 'key' is in study 'study' already, with another content"):
        service.queue(make.study(), [make.item("new"), changed[what]])
    assert service.progress("study").slots == 1


@pytest.mark.parametrize(
    ("kind", "outputs", "allowed"),
    [
        ("demonstration", 1, "has 0"),
        ("ranking", 1, "has 2 to 26"),
        ("ranking", 27, "has 2 to 26"),
        ("comparison", 3, "has 2"),
        ("rating", 0, "has 1 to 26"),
    ],
)
def test_wrong_numbers_of_outputs(
    service: LabelService, make: Make, kind: StudyKind, outputs: int, allowed: str
) -> None:
    with pytest.raises(StoreError, match=f"has {outputs} outputs; an item of the {kind} study 'study' {allowed}"):
        service.queue(make.study(kind), [make.item("key", outputs)])
    with pytest.raises(StoreError, match="no study 'study'; the store has none yet"):
        service.progress("study")


@pytest.mark.parametrize("extra", [{"x": float("nan")}, {"x": {1, 2}}, {"x": object()}])
def test_private_data_that_is_no_json_is_refused(service: LabelService, make: Make, extra: dict[str, object]) -> None:
    prompt = Prompt(messages=(Message("user", "?"),), about=About(extra=extra))
    with pytest.raises(StoreError, match="cannot be stored"):
        service.queue(make.study("demonstration"), [NewItem(key="key", prompt=prompt)])


@pytest.mark.parametrize("key", ["", " ", "a\nb", "a\x1fb"])
def test_keys_must_be_visible(service: LabelService, make: Make, key: str) -> None:
    with pytest.raises(StoreError, match="item's key"):
        service.queue(make.study("demonstration"), [replace(make.item("x", 0), key=key)])


def test_a_study_stays_as_it_was_created(service: LabelService, make: Make) -> None:
    service.queue(make.study(), make.items(1))
    with pytest.raises(StoreError, match=r"overlap was 1, is 2; rater_group was 'team', is 'others'\. Give the new"):
        service.queue(replace(make.study(overlap=2), rater_group="others"), make.items(1))


def test_a_guideline_version_keeps_its_text(service: LabelService, make: Make) -> None:
    service.queue(make.study(), make.items(1))
    other = replace(make.study(name="other"), guideline=Guideline(version="v1", text="Prefer the short."))
    with pytest.raises(StoreError, match="Guideline 'v1' is stored with another text"):
        service.queue(other, make.items(1))
    service.queue(replace(other, guideline=Guideline(version="v2", text="Prefer the short.")), make.items(1))


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "poll"), ("purpose", "fun"), ("overlap", 0), ("lease_minutes", 0.0)]
)
def test_study_config_is_checked(make: Make, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=str(value)):
        replace(make.study(), **{field: value})  # type: ignore[arg-type]


def test_one_key_in_two_studies(service: LabelService, make: Make) -> None:
    service.queue(make.study(), make.items(2))
    service.queue(make.study("rating", name="other"), make.items(2, outputs=1))
    assert service.progress("study").slots == service.progress("other").slots == 2
    assert [(each.name, each.kind) for each in service.studies()] == [("study", "ranking"), ("other", "rating")]


def test_raters_keep_their_group_and_origin(service: LabelService) -> None:
    service.add_rater("ann", group="team", origin="human")
    service.add_rater("ann", group="team", origin="human")
    with pytest.raises(StoreError, match="already registered, as human in group 'team'"):
        service.add_rater("ann", group="others", origin="human")
    with pytest.raises(StoreError, match="people and simulated raters never share a group"):
        service.add_rater("bot", group="team", origin="simulated")
    service.add_rater("bot", group="bots", origin="simulated")


def test_an_empty_queue_creates_the_study(service: LabelService, make: Make) -> None:
    service.queue(make.study(), [])
    assert service.progress("study").slots == 0


def test_texts_of_every_kind_survive(service: LabelService, make: Make) -> None:
    texts = ("\x00 nul", "\ud800 half a pair", "ünïcödé \U0001f600 \u202e", "", '"7"', "line\r\nbreak")
    outputs = tuple(NewOutput(response=Response(text=text), source=text) for text in texts)
    study = StudyConfig(
        name="study", kind="rating", purpose="evaluation", rater_group="team",
        guideline=Guideline(version="v1", text="\x00"),
    )  # fmt: skip
    service.queue(study, [replace(make.item("key", 0), outputs=outputs)])
    make.raters(service, "ann")
    (task,) = service.claim("study", "ann")
    assert sorted(output.text for output in task.outputs) == sorted(texts)
