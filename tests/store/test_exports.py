"""Exports: what they hold, what they hide, and that training reads them; on both databases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.store.people import LEAD, actions, know_secrets, open_accounts, work

from tastemaker.errors import ConfigError, DataError, StoreError
from tastemaker.files import read_demonstrations, read_rankings
from tastemaker.records import Ranking, with_about
from tastemaker.store import LabelService, Store
from tastemaker.store.adjudication import AdjudicationService
from tastemaker.store.desk import Desk
from tastemaker.store.exports import ExportConfig, Exports, split_of
from tastemaker.store.importing import GoldItem
from tastemaker.store.lead import LeadService
from tastemaker.store.tasks import DemonstrationAnswer, NewItem, OutputRating, RankingAnswer

if TYPE_CHECKING:
    from tests.store.conftest import Clock, Make

NO_SPLIT = ExportConfig(validation=0.0)


@pytest.fixture
def exports(store: Store, clock: Clock) -> Exports:
    open_accounts(store)
    return Exports(store, clock=clock)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def without_split(item: NewItem, **about: object) -> NewItem:
    return dataclasses.replace(item, prompt=with_about(item.prompt, split=None, **about))


def ranked(store: Store, service: LabelService, make: Make, clock: Clock) -> None:
    """Two raters rank three items; a gold item is among them."""
    make.raters(service, "ann", "bob")
    lead = LeadService(store, clock=clock)
    lead.create_study(make.study("ranking", overlap=2), actor=LEAD, gold_share=0.5)
    know_secrets(store)
    lead.import_items("study", make.items(3), actor=LEAD)
    gold = GoldItem(item=make.item("gold"), expected=RankingAnswer((("A",), ("B", "C"))))
    lead.add_gold("study", [gold], actor=LEAD)
    desk = Desk(store, clock=clock)
    answers = {"key-0": [[2], [0, 1]], "key-1": [[1], [2], [0]], "key-2": [[0, 1, 2]], "gold": [[0], [1], [2]]}
    work(desk, "ann", "study", answers)
    work(desk, "bob", "study", answers | {"key-0": [[0], [1], [2]]})


def texts(ranking: Ranking) -> list[list[str]]:
    """The ranked texts, whatever order they are kept in."""
    return [sorted(ranking.responses[index].text for index in group) for group in ranking.order]


def test_a_blinded_export_does_not_tell_sources_by_the_order(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    """One policy of an evaluation is always queued first, and the chosen of an imported pair."""
    make.raters(service, "ann")
    service.queue(make.study("comparison"), make.items(40, 2))
    work(Desk(store, clock=clock), "ann", "study", {f"key-{index}": 0 for index in range(40)})
    for name, reason in (("blind", None), ("again", None), ("open", "win rates")):
        exports.export(["study"], tmp_path / name, actor=LEAD, config=NO_SPLIT, unblind_reason=reason)
    blind, unblinded = (rows(tmp_path / name / "train.jsonl") for name in ("blind", "open"))
    assert blind == rows(tmp_path / "again" / "train.jsonl")
    first = [row["responses"][0].split()[1] for row in blind]
    assert 5 <= first.count("0") <= 35  # of 40 fair throws, fewer or more in one run of a million
    for one, other in zip(blind, unblinded, strict=True):
        assert other["responses"] == sorted(one["responses"])
        for row in (one, other):
            assert row["responses"][row["ranking"][0][0]].startswith("Text 0")
            assert row["finished"] == ["Text 1" not in text for text in row["responses"]]
        # The same output was shown first, whatever its number in the row.
        assert one["responses"][one["order_shown"][0]] == other["responses"][other["order_shown"][0]]
    (study,) = service.studies()
    for path in (tmp_path / "open").rglob("*.json*"):
        assert study.secret not in path.read_text(encoding="utf-8")


def test_rankings_are_what_training_reads(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    ranked(store, service, make, clock)
    config = dataclasses.replace(NO_SPLIT, pairs=True)
    report = exports.export(["study"], tmp_path / "out", actor=LEAD, config=config)
    # Pairs: key-0 has 2 (C over A, B) and 3; key-1 twice 3; key-2 none, of 3 tied ones each. Tied: 1 + 3 + 3.
    assert report.answers == {"train.jsonl": 6, "pairs/train.jsonl": 11}
    read = read_rankings(tmp_path / "out" / "train.jsonl")
    assert [texts(one) for one in read] == [texts(one) for one in service.rankings("study")]
    assert texts(read[0]) == [["Text 2 of key-0"], ["Text 0 of key-0", "Text 1 of key-0"]]
    assert [set(one.responses) for one in read] == [set(one.responses) for one in service.rankings("study")]
    assert dict(read[0].prompt.about.extra)["truth"] == {"answer": "truth key-0"}
    assert len({one.author.rater for one in read}) == 2
    pairs = read_rankings(tmp_path / "out" / "pairs" / "train.jsonl")
    assert [response.text for response in pairs[0].responses] in (
        ["Text 2 of key-0", "Text 0 of key-0"],
        ["Text 2 of key-0", "Text 1 of key-0"],
    )
    text = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*.json*"))
    assert not any(name in text for name in ("ann", "bob", "model-", "gold"))
    assert manifest(tmp_path / "out")["tied_pairs_left_out"] == 7
    assert actions(store)[-1] == "export"


def test_pseudonyms_are_the_same_in_every_export(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    ranked(store, service, make, clock)
    for name in ("one", "two"):
        exports.export(["study"], tmp_path / name, actor=LEAD, config=NO_SPLIT)
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "two" / "train.jsonl").read_bytes()
    found = manifest(tmp_path / "one")
    assert [(one["rater_group"], one["answers"]) for one in found["raters"]] == [("team", 3), ("team", 3)]
    assert (found["origin"], found["kind"], found["guidelines"]) == ("human", "ranking", {"v1": "Prefer the helpful."})
    assert found["files"] == manifest(tmp_path / "two")["files"]


def test_no_pseudonym_is_found_by_trying_names(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    """The same people, asked the same at the same time, have other pseudonyms in another store."""
    found: list[set[str]] = []
    with Store.open(tmp_path / "other.db") as other:
        open_accounts(other)
        for number, (each, labels) in enumerate(((store, service), (other, LabelService(other, clock=clock)))):
            ranked(each, labels, make, clock)
            Exports(each, clock=clock).export(["study"], tmp_path / str(number), actor=LEAD, config=NO_SPLIT)
            found.append({one["rater"] for one in manifest(tmp_path / str(number))["raters"]})
    assert [len(each) for each in found] == [2, 2]
    assert found[0].isdisjoint(found[1])


def test_unblinding_in_an_export_needs_a_reason(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    ranked(store, service, make, clock)
    with pytest.raises(StoreError, match="reason"):
        exports.export(["study"], tmp_path / "no", actor=LEAD, unblind_reason=" ")
    exports.export(["study"], tmp_path / "out", actor=LEAD, config=NO_SPLIT, unblind_reason="win rates")
    assert rows(tmp_path / "out" / "train.jsonl")[0]["sources"] == ["model-0", "model-1", "model-2"]
    assert actions(store)[-2:] == ["export", "study.unblind"]


def test_an_adjudicated_answer_stands_in_place_of_the_others_and_is_marked(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    ranked(store, service, make, clock)
    adjudication = AdjudicationService(store, clock=clock)
    (dispute,) = adjudication.disputed("study", actor=LEAD)
    case = adjudication.case("study", dispute.item, actor=LEAD)
    shown = {output.text: output.letter for output in case.outputs}
    answer = RankingAnswer(tuple((shown[f"Text {index} of key-0"],) for index in (1, 2, 0)))
    adjudication.adjudicate("study", dispute.item, answer, reason="B alone is true", actor=LEAD)
    exports.export(["study"], tmp_path / "out", actor=LEAD, config=NO_SPLIT)
    read = read_rankings(tmp_path / "out" / "train.jsonl")
    assert len(read) == 5
    assert texts(read[0]) == [["Text 1 of key-0"], ["Text 2 of key-0"], ["Text 0 of key-0"]]
    assert read[0].author.rater is None
    assert [bool(one.prompt.about.extra.get("adjudicated")) for one in read] == [True, False, False, False, False]
    assert manifest(tmp_path / "out")["adjudicated"] == 1
    plain = dataclasses.replace(NO_SPLIT, adjudicated=False)
    exports.export(["study"], tmp_path / "plain", actor=LEAD, config=plain)
    assert len(read_rankings(tmp_path / "plain" / "train.jsonl")) == 6


def test_splits_keep_an_author_together_and_a_group_apart(
    store: Store, service: LabelService, exports: Exports, make: Make, tmp_path: Path
) -> None:
    service.add_rater("ann", group="team", origin="human")
    service.add_rater("hal", group="judges", origin="human")
    items = [without_split(make.item(f"key-{index}", 0), user=f"user-{index % 12}") for index in range(36)]
    for name, group, rater in (("train", "team", "ann"), ("judge", "judges", "hal")):
        study = dataclasses.replace(make.study("demonstration", name=name), rater_group=group)
        service.queue(study, items)
        for task in service.claim(name, rater, limit=36):
            service.submit(task.id, task.token, DemonstrationAnswer(f"to {task.messages[-1].content}"))
    config = ExportConfig(validation=0.3, test=0.3, held_out_groups=("judges",), seed=5)
    report = exports.export(["train", "judge"], tmp_path / "out", actor=LEAD, config=config)
    assert report.answers["held-out.jsonl"] == 36
    assert sum(report.answers.values()) == 72
    authors = {
        split: {one.prompt.about.user for one in read_demonstrations(tmp_path / "out" / f"{split}.jsonl")}
        for split in ("train", "validation", "test")
    }
    assert set.union(*authors.values()) == {f"user-{index}" for index in range(12)}
    assert sum(map(len, authors.values())) == 12  # no author in two
    given = make.prompt("x")
    assert split_of(given, config) == "train"  # a split that the prompt has stays


def test_every_row_says_whose_prompt_it_answers(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    """Or what is trained on it could no longer be split by user, nor held against other files of the same prompts."""
    ranked(store, service, make, clock)
    service.queue(make.study("rating", name="rating"), make.items(2, 2))
    rated = {0: OutputRating(2), 1: OutputRating(6)}
    work(Desk(store, clock=clock), "ann", "rating", {f"key-{index}": rated for index in range(2)})
    for format in ("jsonl", "parquet"):
        config = dataclasses.replace(NO_SPLIT, format=format, pairs=True)
        exports.export(["study"], tmp_path / format, actor=LEAD, config=config)
        for name in ("train", "pairs/train"):
            read = read_rankings(tmp_path / format / f"{name}.{format}")
            assert {(one.prompt.about.id, one.prompt.about.user) for one in read} == {
                (f"key-{index}", f"user-of-key-{index}") for index in range(3 if name == "train" else 2)
            }
    exports.export(["rating"], tmp_path / "rating", actor=LEAD, config=NO_SPLIT)
    assert [row["user"] for row in rows(tmp_path / "rating" / "train.jsonl")] == [
        f"user-of-key-{index}" for index in (0, 0, 1, 1)
    ]


def test_parquet_reads_back(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    ranked(store, service, make, clock)
    config = dataclasses.replace(NO_SPLIT, format="parquet")
    exports.export(["study"], tmp_path / "out", actor=LEAD, config=config)
    read = read_rankings(tmp_path / "out" / "train.parquet")
    assert [texts(one) for one in read] == [texts(one) for one in service.rankings("study")]
    assert read[0].prompt.about == dataclasses.replace(
        service.rankings("study")[0].prompt.about, extra=read[0].prompt.about.extra
    )


def test_comparisons_and_ratings(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    make.raters(service, "ann")
    for kind in ("comparison", "rating"):
        service.queue(make.study(kind, name=kind), make.items(3, 2))
    desk = Desk(store, clock=clock)
    work(desk, "ann", "comparison", {"key-0": 1, "key-1": 0, "key-2": None})
    rated = {0: OutputRating(2, ("violent_content",)), 1: OutputRating(6)}
    work(desk, "ann", "rating", {f"key-{index}": rated for index in range(3)})
    exports.export(["comparison"], tmp_path / "c", actor=LEAD, config=NO_SPLIT)
    assert [texts(one) for one in read_rankings(tmp_path / "c" / "train.jsonl")] == [
        [["Text 1 of key-0"], ["Text 0 of key-0"]],
        [["Text 0 of key-1"], ["Text 1 of key-1"]],
        [["Text 0 of key-2", "Text 1 of key-2"]],
    ]
    exports.export(["rating"], tmp_path / "r", actor=LEAD, config=NO_SPLIT)
    first, second = sorted(rows(tmp_path / "r" / "train.jsonl")[:2], key=lambda row: str(row["response"]))
    assert (first["response"], first["likert"], first["flags"]) == ("Text 0 of key-0", 2, ["violent_content"])
    assert (second["likert"], second["flags"], second["finished"]) == (6, [], False)
    with pytest.raises(StoreError, match="one kind"):
        exports.export(["rating", "comparison"], tmp_path / "x", actor=LEAD)


def test_simulated_and_human_never_share_an_export(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    service.add_rater("ann", group="team", origin="human")
    service.add_rater("bot-1", group="bots", origin="simulated")
    service.add_rater("bot-2", group="bots", origin="simulated")
    service.queue(make.study("ranking", name="people"), make.items(1))
    service.queue(dataclasses.replace(make.study(name="machines", overlap=2), rater_group="bots"), make.items(1))
    desk = Desk(store, clock=clock)
    work(desk, "ann", "people", {"key-0": [[0], [1], [2]]})
    for bot, groups in (("bot-1", [[0], [1], [2]]), ("bot-2", [[2], [1], [0]])):
        (task,) = service.claim("machines", bot)
        shown = {output.text.split()[1]: output.letter for output in task.outputs}
        order = tuple(tuple(shown[str(index)] for index in group) for group in groups)
        service.submit(task.id, task.token, RankingAnswer(order))
    with pytest.raises(StoreError, match="one by one"):
        exports.export(["people", "machines"], tmp_path / "both", actor=LEAD)
    exports.export(["machines"], tmp_path / "machines", actor=LEAD)
    assert manifest(tmp_path / "machines")["origin"] == "simulated"
    adjudication = AdjudicationService(store, clock=clock)
    (dispute,) = adjudication.disputed("machines", actor=LEAD)
    adjudication.adjudicate("machines", dispute.item, RankingAnswer((("A", "B", "C"),)), reason="x", actor=LEAD)
    with pytest.raises(StoreError, match="one origin"):
        exports.export(["machines"], tmp_path / "again", actor=LEAD)


def test_a_refused_export_leaves_no_folder(
    store: Store, service: LabelService, exports: Exports, make: Make, clock: Clock, tmp_path: Path
) -> None:
    service.queue(make.study("ranking"), make.items(1))
    with pytest.raises(StoreError, match="no answers"):
        exports.export(["study"], tmp_path / "out", actor=LEAD)
    make.raters(service, "ann")
    odd = dataclasses.replace(make.item("odd"), prompt=with_about(make.prompt("odd"), extra={"empty": {}}))
    service.queue(make.study("ranking"), [odd])
    work(Desk(store, clock=clock), "ann", "study", {"key-0": [[0], [1], [2]], "odd": [[0], [1], [2]]})
    with pytest.raises(DataError, match="export as jsonl"):
        exports.export(["study"], tmp_path / "out", actor=LEAD, config=ExportConfig(format="parquet"))
    assert list(tmp_path.iterdir()) == []
    assert "export" not in actions(store)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        exports.export(["study"], tmp_path / "out", actor=LEAD)
    with pytest.raises(ConfigError, match="leave some"):
        ExportConfig(validation=0.6, test=0.4)
