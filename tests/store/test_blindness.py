"""Nothing that a rater is given says what produced an output, which item it is, or what is known about the prompt."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tastemaker.errors import StoreError
from tastemaker.store import LabelService
from tastemaker.store.tasks import StudyKind, Task

if TYPE_CHECKING:
    from tests.store.conftest import Make

# What only the store may know: sources, and everything of the prompt's record but its messages.
SECRETS = ("secret-model", "secret-key", "secret-id", "secret-user", "secret-category", "secret-truth", "secret-study")
ITEMS = 13
KINDS: dict[StudyKind, int] = {"demonstration": 0, "ranking": 4, "comparison": 2, "rating": 2}


def leaves(value: object) -> Iterator[str]:
    """Every value and every name inside a value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from leaves(list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from leaves(each)
    else:
        yield str(value)


@pytest.fixture(params=KINDS)
def tasks(request: pytest.FixtureRequest, service: LabelService, make: Make) -> list[Task]:
    """Tasks of a study in which every private part is marked as a secret."""
    kind: StudyKind = request.param
    items = []
    for index in range(ITEMS):
        item = make.item(f"secret-key-{index}", KINDS[kind])
        about = dataclasses.replace(
            item.prompt.about,
            id=f"secret-id-{index}",
            user="secret-user",
            category="secret-category",
            extra={"secret-truth": ["secret-truth"]},
        )
        prompt = dataclasses.replace(item.prompt, messages=item.prompt.messages[:1], about=about)
        outputs = tuple(
            dataclasses.replace(
                each,
                source=f"secret-model-{place}",
                response=dataclasses.replace(each.response, text=f"Text {place}", finished=False),
            )
            for place, each in enumerate(item.outputs)
        )
        items.append(dataclasses.replace(item, prompt=prompt, outputs=outputs))
    service.queue(make.study(kind, name="secret-study", overlap=2), items)
    make.raters(service, "ann")
    return service.claim("secret-study", "ann", limit=ITEMS)


def test_tasks_are_blind(tasks: list[Task]) -> None:
    assert len(tasks) == ITEMS
    for task in tasks:
        told = list(leaves(task))
        assert {"messages", "outputs", "Be brief."} <= set(told)  # the walk does reach things
        assert [each for each in told for secret in SECRETS if secret in each] == []
        assert not any("finished" in each or "source" in each for each in told)


def test_tasks_say_no_more_than_they_must() -> None:
    """A new field is a decision: a rater will see it."""
    names = [field.name for field in dataclasses.fields(Task)]
    assert names == ["id", "token", "kind", "guideline_version", "messages", "outputs"]


def test_files_are_blind(tasks: list[Task], service: LabelService, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    service.tasks_to_file("secret-study", "ann", path)
    text = path.read_text()
    assert text.count("\n") == ITEMS
    assert [secret for secret in SECRETS if secret in text] == []


def test_ids_say_nothing(tasks: list[Task]) -> None:
    assert len({task.id for task in tasks}) == ITEMS
    assert all(re.fullmatch("[0-9a-f]{32}", task.id) and re.fullmatch("[0-9a-f]{32}", task.token) for task in tasks)
    assert [task.id for task in tasks] != sorted(task.id for task in tasks)


def test_letters_follow_the_order_shown_not_the_order_queued(tasks: list[Task]) -> None:
    if not tasks[0].outputs:
        return
    orders = {tuple(output.text for output in task.outputs) for task in tasks}
    assert len(orders) > 1
    for task in tasks:
        assert [output.letter for output in task.outputs] == list("ABCD"[: len(task.outputs)])


def test_private_prompts_are_for_simulated_raters_alone(tasks: list[Task], service: LabelService) -> None:
    with pytest.raises(StoreError, match=r"not leased to a simulated rater; .* stays private"):
        service.private_prompts([tasks[0].id])


def test_private_prompts_come_in_the_order_shown(service: LabelService, make: Make) -> None:
    service.add_rater("bot", group="team", origin="simulated")
    service.queue(make.study(), make.items(5))
    tasks = service.claim("study", "bot", limit=4)
    private = service.private_prompts([task.id for task in tasks])
    for index, task in enumerate(tasks):
        assert private[task.id].prompt == make.prompt(f"key-{index}")
        assert private[task.id].place == index
        assert [each.text for each in private[task.id].responses] == [output.text for output in task.outputs]
        assert [each.finished for each in private[task.id].responses] == [
            "Text 1" not in output.text for output in task.outputs
        ]
    service.release("study", "bot")
    with pytest.raises(StoreError, match="stays private"):
        service.private_prompts([tasks[0].id])
    assert service.private_prompts([]) == {}
