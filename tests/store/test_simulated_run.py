"""Simulated raters working through the service: the same answers whatever the database, the batch, or the weather."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tastemaker import raters
from tastemaker.errors import ConfigError, StoreError
from tastemaker.raters import SimulatedRater, answer_all
from tastemaker.records import Prompt, Response
from tastemaker.store import LabelService, Store
from tastemaker.store.tasks import StudyConfig, StudyKind

if TYPE_CHECKING:
    from tests.store.conftest import Make

ITEMS = 23
OUTPUTS: dict[StudyKind, int] = {"demonstration": 0, "ranking": 3, "comparison": 2, "rating": 2}


def features(prompt: Prompt, response: Response) -> Mapping[str, float]:
    """Uses the prompt's private record, as the features of a world with a known truth do."""
    truth = str(prompt.about.extra["truth"]["answer"])
    return {"late": float(response.text.split()[1]), "finished": float(response.finished), "key": float(len(truth) % 3)}


def write(prompt: Prompt, seed: int) -> str:
    return f"{prompt.key} {seed}"


def flags(prompt: Prompt, response: Response) -> frozenset[str]:
    return frozenset({"hallucination"} if response.finished else {"expresses_opinion"})


def team(count: int, seed: int = 3) -> list[SimulatedRater]:
    profiles = raters.population(
        {"late": 0.5, "finished": 1.0, "key": 0.1}, group="bots", count=count, noise=0.7, seed=seed
    )
    return [SimulatedRater(profile, seed, features, write, flags) for profile in profiles]


def study(make: Make, kind: StudyKind, overlap: int = 2) -> StudyConfig:
    return dataclasses.replace(make.study(kind, name=f"{kind} study", overlap=overlap), rater_group="bots")


def queue_all(service: LabelService, make: Make) -> None:
    for kind, outputs in OUTPUTS.items():
        service.queue(study(make, kind), make.items(ITEMS, outputs))


def everything(service: LabelService) -> str:
    """All that stages read, as one text."""
    read: list[list[object]] = [
        [each.to_json() for each in service.demonstrations("demonstration study")],
        [each.to_json() for each in service.rankings("ranking study")],
        [dataclasses.asdict(each) for each in service.comparisons("comparison study")],
        [dataclasses.asdict(each) for each in service.ratings("rating study")],
    ]
    return json.dumps(read)


def run(url: str, make: Make) -> str:
    with Store.open(url) as store:
        service = LabelService(store)
        queue_all(service, make)
        for kind in OUTPUTS:
            assert answer_all(service, f"{kind} study", team(5)) == 2 * ITEMS
        return everything(service)


def test_both_databases_give_the_same_bytes(sqlite: str, postgresql: str, make: Make) -> None:
    first, second = run(sqlite, make), run(postgresql, make)
    assert first == second
    assert len(json.loads(first)[3]) == ITEMS * 2 * 2


class Unplugged(Exception):
    """What interrupts the run below."""


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    sqlite_template: Path, url: str, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raters, "BATCH", 4)
    whole = run(f"sqlite:///{shutil.copyfile(sqlite_template, tmp_path / 'whole.db')}", make)
    monkeypatch.setattr(raters, "BATCH", 3)
    with Store.open(url) as store:
        service = LabelService(store)
        queue_all(service, make)
        for kind in OUTPUTS:
            name = f"{kind} study"
            with pytest.raises(Unplugged):
                answer_all(service, name, team(5), progress=unplug_after(11))
            progress = service.progress(name)
            assert (progress.answered, progress.leased) == (12, 0)
            service.claim(name, "bots-3", limit=5)  # what a killed run would have left
            assert answer_all(service, name, team(5)) == 2 * ITEMS - 12
        assert everything(service) == whole


def unplug_after(answers: int) -> Callable[[int], None]:
    seen = 0

    def progress(count: int) -> None:
        nonlocal seen
        seen += count
        if seen >= answers:
            raise Unplugged

    return progress


def test_raters_who_fail_give_back_what_they_held(service: LabelService, make: Make) -> None:
    def fail(prompt: Prompt, response: Response) -> Mapping[str, float]:
        raise Unplugged

    service.queue(study(make, "ranking"), make.items(ITEMS))
    failing = [dataclasses.replace(rater, features=fail) for rater in team(3)]
    with pytest.raises(Unplugged):
        answer_all(service, "ranking study", failing)
    progress = service.progress("ranking study")
    assert (progress.answered, progress.leased) == (0, 0)


def test_raters_share_the_work_and_progress_is_told(service: LabelService, make: Make) -> None:
    service.queue(study(make, "ranking"), make.items(ITEMS))
    told: list[int] = []
    assert answer_all(service, "ranking study", team(4), progress=told.append) == sum(told) == 2 * ITEMS
    rankings = service.rankings("ranking study")
    load = Counter(each.author.rater for each in rankings)
    assert max(load.values()) - min(load.values()) <= 2
    assert {each.author.origin for each in rankings} == {"simulated"}
    for first, second in zip(rankings[::2], rankings[1::2], strict=True):
        assert first.prompt == second.prompt
        assert first.author.rater != second.author.rater
    # Turns move on: the same two do not meet on every item.
    pairs = {frozenset((a.author.rater, b.author.rater)) for a, b in zip(rankings[::2], rankings[1::2], strict=True)}
    assert len(pairs) == 4
    assert answer_all(service, "ranking study", team(4)) == 0


def test_seconds_are_the_raters_not_the_clocks(service: LabelService, make: Make) -> None:
    service.queue(study(make, "comparison"), make.items(ITEMS, outputs=2))
    answer_all(service, "comparison study", team(2))
    seconds = [each.seconds for each in service.comparisons("comparison study")]
    assert len(set(seconds)) == 2 * ITEMS
    # "Be brief.", "Question key-0?", "Text 0 of key-0" and "Text 1 of key-0": 12 words at a quarter second each.
    assert 1 < min(seconds) < 3 < max(seconds) < 9


def test_more_items_later(service: LabelService, make: Make) -> None:
    service.queue(study(make, "ranking"), make.items(7))
    answer_all(service, "ranking study", team(3))
    service.queue(study(make, "ranking"), make.items(ITEMS))
    assert answer_all(service, "ranking study", team(3)) == 2 * (ITEMS - 7)


def test_other_raters_cannot_finish_what_these_began(service: LabelService, make: Make) -> None:
    service.queue(study(make, "ranking"), make.items(1))
    answer_all(service, "ranking study", team(2))
    service.queue(study(make, "ranking"), make.items(ITEMS))
    for task in service.claim("ranking study", "bots-1", limit=ITEMS):
        answer = team(1)[0].answer(task, service.private_prompts([task.id])[task.id], study="ranking study")
        service.submit(task.id, task.token, answer)
    with pytest.raises(
        StoreError, match="slots of study 'ranking study' are left that none of the 3 raters may answer"
    ):
        answer_all(service, "ranking study", team(3))


def test_raters_are_checked(service: LabelService, make: Make) -> None:
    service.queue(study(make, "ranking"), make.items(2))
    with pytest.raises(StoreError, match="at least 2 raters"):
        answer_all(service, "ranking study", team(1))
    with pytest.raises(ConfigError, match="each with a name of its own"):
        answer_all(service, "ranking study", team(1) * 2)
    with pytest.raises(ConfigError, match="at least one"):
        answer_all(service, "ranking study", [])
    assert service.progress("ranking study").leased == 0
