"""A round's stages: what each reads, what a changed setting asks anew, and that what was sampled stays as it was."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tastemaker.artefacts import hash_path, read_manifest
from tastemaker.config import from_mapping
from tastemaker.errors import AnswersMissing, ConfigError, DataError
from tastemaker.files import read_demonstrations, read_rankings, write_records
from tastemaker.recipe import Recipe
from tastemaker.records import Message, Prompt
from tastemaker.round import Round
from tastemaker.store.desk import Desk
from tastemaker.store.tasks import Answer, ComparisonAnswer, DemonstrationAnswer, RankingAnswer, Task
from tastemaker.tinyworld import study

pytestmark = pytest.mark.slow

STUDY = "tastemaker.tinyworld.study"
SHORT, SHOT = {"max_new_tokens": 5}, "{prompt}\n{response}\n\n"
LONG_TEXT = "the farmer eats corn . " * 60  # 300 words; the base reads 256


def with_changes(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested tables with other values at dotted names."""
    copy: dict[str, Any] = json.loads(json.dumps(whole))
    for name, value in changes.items():
        *tables, last = name.split(".")
        place = copy
        for table in tables:
            place = place[table]
        place[last] = value
    return copy


def settings(base: Path, data: Path) -> dict[str, Any]:
    """Every stage, each as small as it can be."""
    rate = {"learning_rate": 1e-3, "schedule": "constant"}
    return {
        "name": "smallest",
        "raters": "simulated",
        "threads": 1,
        "base": {"model": str(base)},
        "simulation": {
            "raters": f"{STUDY}:raters",
            "features": f"{STUDY}:features",
            "write": f"{STUDY}:write",
            "flags": f"{STUDY}:flags",
            "training_raters": 2,
            "held_out_raters": 2,
            "agreement": 0.55,
        },
        "text": {"source": str(data / "texts.jsonl"), "held_out": str(data / "held-out.jsonl")},
        "prompts": {"source": str(data / "prompts.jsonl")},
        "demonstrations": {"train": 6, "validation": 2},
        "sft": {"first": {"epochs": 1, "batch_size": 6, "optimizer": rate, "pretraining_mix": 0.1}},
        "comparisons": {
            "responses_per_prompt": 3,
            "sources": ["sft/first"],
            "train": 6,
            "validation": 2,
            "validation_overlap": 1,
            "decoding": SHORT,
        },
        "reward": {"main": {"init": "first", "batch_size": 6, "optimizer": rate}},
        "selection": {"first": "main"},
        "policy": {
            "ppo": {
                "kind": "ppo",
                "init": "first",
                "reward": "main",
                "iterations": 1,
                "batch_size": 4,
                "minibatches": 1,
                "decoding": SHORT,
                "policy": rate,
                "value": rate,
                "ptx_coef": 1.0,
            },
            "dpo": {"kind": "dpo", "init": "first", "batch_size": 16, "optimizer": rate},
        },
        "evaluation": {
            "contestants": {
                "ppo": {"model": "policy/ppo", "reference": "sft/first"},
                "first": {"model": "sft/first"},
                "shown": {"model": "base", "few_shot": {"template": SHOT, "shots": 1, "candidates": 2, "prompts": 2}},
            },
            "pairs": [["ppo", "first"]],
            "rated": ["ppo"],
            "prompts": 4,
            "decodings": [SHORT | {"greedy": True}, SHORT],
        },
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "prompts.jsonl", study.prompts(0, train=8, validation=4, test=6))
    write_records(folder / "texts.jsonl", study.texts(0, documents=8))
    write_records(folder / "held-out.jsonl", study.held_out_texts(0, documents=3))
    return folder


def run(recipe: dict[str, Any], out: Path, *stages: str) -> dict[str, bool]:
    """Run some stages of a recipe; whether each was up to date. A stage of variants is named like sft:first."""
    with Round(from_mapping(Recipe, recipe, where="test"), out) as round_:
        for stage in stages:
            name, _, variant = stage.partition(":")
            getattr(round_, name)(*([variant] if variant else []))
        return {name: outcome.skipped for name, outcome in round_.outcomes.items()}


EVERY: tuple[str, ...] = ("prompts", "demonstrations", "sft:first", "comparisons", "reward:main", "select:first")
EVERY += ("policy:ppo", "policy:dpo", "evaluation")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a stage reads what it declares ---------------------------------------------------------------------------------


class Watch:
    """What files Python opens. A hook cannot be taken away again, so it is told when to look."""

    def __init__(self) -> None:
        self.opened: list[tuple[Path, bool]] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.opened is not None and isinstance(arguments[0], str | Path):
            writes = isinstance(arguments[1], str) and "r" not in arguments[1]
            self.opened.append((Path(arguments[0]), writes))


WATCH = Watch()


@pytest.fixture(scope="module")
def finished(random_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole run, and (in WATCH) every file that was opened in it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    WATCH.opened = []
    run(settings(random_base, data), out, *EVERY)
    yield out
    WATCH.opened = None


def read_by_stage(opened: list[tuple[Path, bool]]) -> dict[Path, set[Path]]:
    """The files that each stage read while it worked: from when it wrote started.json to when it wrote its manifest."""
    stage, found = None, dict[Path, set[Path]]()
    for path, writes in opened:
        if writes and path.name.startswith(".started.json"):
            stage = path.parent
        elif writes and path.name.startswith(".manifest.json"):
            stage = None
        elif stage is not None and not writes and not path.is_relative_to(stage):
            found.setdefault(stage, set()).add(path)
    return found


def test_no_stage_reads_what_its_manifest_does_not_name(finished: Path, data: Path) -> None:
    assert WATCH.opened is not None
    read = read_by_stage(list(WATCH.opened))
    ours = {
        stage: {path for path in paths if finished in path.parents or data in path.parents}
        for stage, paths in read.items()
    }
    assert {str(stage.relative_to(finished / "round-1")) for stage in ours} >= {
        "1-prompts", "2-demonstrations", "3-sft/first", "4-comparisons", "5-reward/main", "3-sft/first-selected",
        "6-policy/ppo", "6-policy/dpo", "7-evaluation",
    }  # fmt: skip
    for stage, paths in ours.items():
        manifest = read_manifest(stage)
        assert manifest is not None
        named = set(manifest["inputs"].values())
        for path in paths:
            if path.name.startswith("labels.db"):
                continue
            places = [path, *(parent for parent in path.parents if finished in parent.parents)]
            assert any(hash_path(place) in named for place in places), f"{stage.name} reads {path}, and does not say so"


def test_nobody_is_asked_about_test_prompts_before_the_evaluation(finished: Path) -> None:
    """What people write and rank: all of it trains or chooses a model."""
    first = finished / "round-1"

    def keys(path: Path) -> set[str]:
        found = [row.get("messages") or row["prompt"] for row in rows(path)]
        return {json.dumps([turn for turn in one if turn["role"] != "assistant"]) for one in found}

    asked = {split: keys(first / f"1-prompts/{split}.jsonl") for split in ("train", "validation", "test")}
    assert min(map(len, asked.values())) > 0
    seen: set[str] = set()
    for folder in ("2-demonstrations", "4-comparisons"):
        for path in sorted((first / folder).glob("*.jsonl")):
            if path.name != "candidates.jsonl":
                seen |= keys(path)
    assert seen & asked["train"]
    assert seen & asked["validation"]
    assert seen <= asked["train"] | asked["validation"]


def test_policies_start_from_the_selected_epoch(finished: Path) -> None:
    """Which contestants and references of that name are. The reward model selects, so it cannot start from there."""
    for stage, start in (("6-policy/ppo", "-selected"), ("6-policy/dpo", "-selected"), ("5-reward/main", "")):
        manifest = read_manifest(finished / "round-1" / stage)
        assert manifest is not None
        models = {name for name in manifest["inputs"] if name.startswith("3-sft/")}
        assert models == {f"3-sft/first{start}/model"}


def test_a_finished_run_is_up_to_date(finished: Path, random_base: Path, data: Path) -> None:
    assert set(run(settings(random_base, data), finished, *EVERY).values()) == {True}


def test_other_text_runs_again_what_reads_it(finished: Path, random_base: Path, data: Path, tmp_path: Path) -> None:
    """Text is a section of its own, in no stage's config."""
    shutil.copytree(finished, tmp_path / "out")
    write_records(tmp_path / "texts.jsonl", study.texts(5, documents=8))
    write_records(tmp_path / "held-out.jsonl", study.held_out_texts(0, documents=4)[1:])
    whole = settings(random_base, data)
    other = with_changes(whole, {"text.source": str(tmp_path / "texts.jsonl")})
    assert run(other, tmp_path / "out", "prompts", "demonstrations", "sft:first") == {
        "1-prompts": True,
        "2-demonstrations": True,
        "3-sft/first": False,
    }
    shutil.rmtree(tmp_path / "out")
    for change in ({"text.held_out": str(tmp_path / "held-out.jsonl")}, {"text.held_out_documents": 2}):
        shutil.copytree(finished, tmp_path / "out")
        found = run(
            with_changes(whole, change), tmp_path / "out", "sft:first", "policy:ppo", "policy:dpo", "evaluation"
        )
        assert found == {"3-sft/first": True, "6-policy/ppo": False, "6-policy/dpo": True, "7-evaluation": False}
        shutil.rmtree(tmp_path / "out")


def test_another_decoding_selects_again(finished: Path, random_base: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    other = with_changes(settings(random_base, data), {"comparisons.decoding": {"max_new_tokens": 3}})
    assert run(other, tmp_path / "out", "select:first") == {"3-sft/first-selected": False}


# --- a changed setting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stage", "expected"),
    [
        ({"demonstrations.train": 3}, "demonstrations", {"demonstrations": 3}),
        ({"comparisons.train": 2}, "comparisons", {"ranked": 2, "rankings": 2}),
        ({"comparisons.overlap": 2}, "comparisons", {"ranked": 6, "rankings": 12}),
        ({"comparisons.responses_per_prompt": 4}, "comparisons", {"ranked": 6, "rankings": 6, "responses": 4}),
        ({"comparisons.decoding": {"max_new_tokens": 2}}, "comparisons", {"ranked": 6, "rankings": 6, "words": 2}),
        ({"evaluation.prompts": 2}, "evaluation", {"judged": 4, "responses judged": 12}),
        ({"evaluation.decodings": [SHORT]}, "evaluation", {"judged": 4, "responses judged": 12}),
        (
            {"evaluation.decodings": [SHORT | {"greedy": True}, {"max_new_tokens": 2}]},
            "evaluation",
            {"judged": 8, "responses judged": 24},
        ),
        ({"evaluation.rated": ["ppo", "first"]}, "evaluation", {"judged": 8, "responses judged": 24}),
    ],
    ids=str,
)
def test_a_changed_setting_is_obeyed(
    finished: Path,
    random_base: Path,
    data: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    stage: str,
    expected: dict[str, int],
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    assert list(run(with_changes(settings(random_base, data), changes), tmp_path / "out", stage).values()) == [False]
    folder = tmp_path / "out" / "round-1"
    rankings = read_rankings(folder / "4-comparisons/train.jsonl")
    words = [len(one.text.split()) for row in rankings for one in row.responses]
    found = {
        "demonstrations": len(read_demonstrations(folder / "2-demonstrations/train.jsonl")),
        "rankings": len(rankings),
        "ranked": len({row.prompt.key for row in rankings}),
        "responses": max(len(row.responses) for row in rankings),
        "words": max(words),
        "judged": len(rows(folder / "7-evaluation/comparisons.jsonl")),
        "responses judged": len(rows(folder / "7-evaluation/responses.jsonl")),
    }
    assert {name: found[name] for name in expected} == expected


# --- people ---------------------------------------------------------------------------------------------------------


def answer(task: Task) -> Answer:
    if task.kind == "demonstration":
        return DemonstrationAnswer("the farmer eats corn .")
    if task.kind == "comparison":
        return ComparisonAnswer("A")
    return RankingAnswer(tuple((output.letter,) for output in task.outputs))


class People:
    """A run that waits for people, one of each group."""

    def __init__(self, recipe: dict[str, Any], out: Path) -> None:
        self.recipe, self.out = recipe, out

    def waits(self, stage: str, **changes: Any) -> int:
        """How many answers a stage waits for; 0 where it is through."""
        recipe = with_changes(self.recipe, {name.replace("__", "."): value for name, value in changes.items()})
        waiting = None
        try:
            run(recipe, self.out, stage)
        except AnswersMissing as error:
            waiting = error
        if waiting is None:
            return 0
        database = "URL" if recipe.get("database") else self.out / "labels.db"
        assert f"tastemaker label serve --database {database}`" in str(waiting)
        assert "other.db" not in str(waiting), "a database's URL may hold a password"
        return waiting.missing

    def tasks(self, *, submit: bool, database: str | None = None) -> list[Task]:
        found = []
        recipe = with_changes(self.recipe, {"database": database})
        with Round(from_mapping(Recipe, recipe, where="test"), self.out) as round_:
            for study_ in round_.service.studies():
                name = f"person of {study_.rater_group}"
                round_.service.add_rater(name, group=study_.rater_group, origin="human")
                tasks = round_.service.claim(study_.name, name, limit=1000)
                found += tasks
                for task in tasks if submit else ():
                    round_.service.submit(task.id, task.token, answer(task))
                round_.service.release(study_.name, name)
        return found


@pytest.fixture
def people(random_base: Path, data: Path, tmp_path: Path) -> People:
    """The base stands for the trained models, so that nothing has to be trained."""
    recipe = with_changes(
        settings(random_base, data),
        {
            "raters": "people",
            "simulation": None,
            "selection": {},
            "demonstrations": {"train": 2, "validation": 0},
            "comparisons.train": 2,
            "evaluation.contestants": {"first": {"model": "sft/first"}, "other": {"model": str(random_base)}},
            "evaluation.pairs": [["first", "other"]],
            "evaluation.rated": [],
            "evaluation.decodings": [SHORT],
            "policy": {},
            "reward": {},
            "text": None,
            "sft.first.pretraining_mix": 0.0,
        },
    )
    out = tmp_path / "out"
    shutil.copytree(random_base, out / "round-1" / "3-sft" / "first" / "model")
    run(recipe, out, "prompts")
    return People(recipe, out)


def test_answers_survive_a_changed_count(people: People) -> None:
    assert people.waits("demonstrations") == 2
    assert len(people.tasks(submit=True)) == 2
    assert people.waits("demonstrations") == 0
    assert people.waits("demonstrations", demonstrations__train=3) == 1, "two were answered"
    assert people.waits("demonstrations", demonstrations__train=1) == 0, "the one that waits is not wanted now"
    folder = people.out / "round-1" / "2-demonstrations"
    (one,) = read_demonstrations(folder / "train.jsonl")
    assert one.author.origin == "human"

    assert people.waits("comparisons") == 2
    assert people.waits("comparisons", comparisons__train=4) == 4
    assert people.waits("comparisons", comparisons__decoding={"max_new_tokens": 3}) == 2
    assert people.waits("comparisons", comparisons__overlap=2) == 4


def test_a_run_that_waits_says_who_is_let_in_and_how(people: People) -> None:
    def said(**changes: Any) -> str:
        with pytest.raises(AnswersMissing) as waiting:
            run(with_changes(people.recipe, changes), people.out, "comparisons")
        return str(waiting.value)

    invite = f"`tastemaker label invite --database {people.out / 'labels.db'} --roles rater --group training"
    once = said(**{"comparisons.train": 1})
    assert once.startswith("1 ranking answer by training raters is still missing.")
    assert f"{invite}`" in once
    assert "different raters" not in once
    twice = said(**{"comparisons.overlap": 2, "address": "https://labels.example.org/desk"})
    assert twice.startswith("4 ranking answers by training raters are still missing.")
    assert "They answer at https://labels.example.org/desk; run" in twice
    assert "Each task is for 2 different raters. What one of them skips, another has to answer." in twice
    assert f"{invite} --origin https://labels.example.org`" in twice
    assert "--origin" not in said(address="the room on the left")


def test_raters_read_the_guideline_of_the_user(people: People, tmp_path: Path) -> None:
    """Beside every task of its purpose; another text asks anew, since answers belong to what was read."""
    ours = tmp_path / "our rules.md"
    ours.write_text("Be *kind*.\n")
    given = {"guidelines": {"training": str(ours)}}
    assert people.waits("demonstrations", **given) == 2
    demonstrations = people.tasks(submit=True)
    assert {task.guideline_version.rpartition("-")[0] for task in demonstrations} == {"our rules"}
    with Round(from_mapping(Recipe, people.recipe, where="test"), people.out) as round_:
        (version,) = {task.guideline_version for task in demonstrations}
        assert Desk(round_.store).guideline("person of training", version).text == "Be *kind*."
    assert people.waits("demonstrations", **given) == 0
    assert people.waits("comparisons", **given) == 2
    rankings = people.tasks(submit=False)
    assert {task.guideline_version for task in rankings} == {version}
    ours.write_text("Be *very* kind.\n")
    assert people.waits("demonstrations", **given) == 2
    assert people.waits("demonstrations", guidelines={"evaluation": str(ours)}) == 2, (
        "nobody answered under the paper's"
    )


def edit(path: Path, change: Any) -> None:
    kept = rows(path)
    for row in kept:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_what_was_sampled_for_people_is_not_sampled_again(people: People) -> None:
    """Training prompts are asked first. Until they are answered, the kept candidates of the others change by a hand's
    edit, as they would by another sampler's token; the queue must have the words that were kept."""
    assert people.waits("comparisons") == 2

    def tamper(row: dict[str, Any]) -> None:
        row["value"][0]["text"] = "as it was kept"

    edit(people.out / "round-1/4-comparisons/candidates.jsonl", tamper)
    people.recipe["comparisons"]["train"] = 1  # the kept file outlives a changed setting
    people.recipe["database"] = f"sqlite:///{people.out / 'other.db'}"
    assert people.waits("comparisons") == 1
    (task,) = people.tasks(submit=True, database=people.recipe["database"])
    assert "as it was kept" in [output.text for output in task.outputs]
    assert people.waits("comparisons") == 2
    tasks = people.tasks(submit=True, database=people.recipe["database"])
    assert ["as it was kept" in [output.text for output in task.outputs] for task in tasks] == [True, True]


def test_what_was_sampled_for_judges_is_not_sampled_again(people: People) -> None:
    missing = people.waits("evaluation")
    assert missing > 0

    def tamper(row: dict[str, Any]) -> None:
        if row["key"][0] == "response":
            row["value"]["text"] = f"{row['key'][2]} as it was kept"

    edit(people.out / "round-1/7-evaluation/sampled.jsonl", tamper)
    people.recipe["database"] = f"sqlite:///{people.out / 'other.db'}"
    assert people.waits("evaluation") == 4
    for task in people.tasks(submit=True, database=people.recipe["database"]):
        assert {output.text for output in task.outputs} == {"first as it was kept", "other as it was kept"}
    assert people.waits("evaluation") == 0
    judged = rows(people.out / "round-1/7-evaluation/responses.jsonl")
    assert {row["response"] for row in judged} == {"first as it was kept", "other as it was kept"}


# --- prompts and rankings that do not fit ---------------------------------------------------------------------------


def test_prompts_longer_than_the_context_are_left_out_at_the_intake(
    random_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [Prompt(messages=(Message("user", LONG_TEXT),)), *study.prompts(0, train=8, validation=4, test=6)]
    write_records(tmp_path / "prompts.jsonl", prompts)
    recipe = with_changes(settings(random_base, data), {"prompts.source": str(tmp_path / "prompts.jsonl")})
    run(recipe, tmp_path / "out", "prompts")
    said = capsys.readouterr().err
    assert f"1 of {len(prompts)} prompts are left out: with 5 new tokens they do not fit" in " ".join(said.split())
    written = (tmp_path / "out/round-1/1-prompts").glob("*.jsonl")
    assert not any("farmer eats corn . the farmer" in path.read_text() for path in written)


def test_prompts_that_do_not_fit_behind_a_few_shot_prefix_are_left_out(
    finished: Path, random_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prefix's template fills the context of 256 so far that some test prompts do not fit behind it."""
    shutil.copytree(finished, tmp_path / "out")
    long = {"shots": 1, "candidates": 1, "prompts": 4, "template": "corn " * 212 + "{prompt} {response} "}
    recipe = with_changes(settings(random_base, data), {"evaluation.contestants.shown.few_shot": long})
    recipe["evaluation"]["prompts"] = None
    run(recipe, tmp_path / "out", "evaluation")
    assert "test prompts (contestant 'shown') are left out" in " ".join(capsys.readouterr().err.split())
    judged = rows(tmp_path / "out/round-1/7-evaluation/responses.jsonl")
    assert len({row["prompt"] for row in judged}) == 5, "one of the six has 15 words, the others have up to 10"


def test_rankings_of_unknown_prompts_are_counted_or_refused(
    random_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ranking(text: str) -> dict[str, Any]:
        return {"prompt": text, "responses": ["one", "two"], "ranking": [[0], [1]]}

    known = study.prompts(0, train=8, validation=4, test=6)[0].messages[0].content
    source = tmp_path / "rankings.jsonl"
    recipe = with_changes(settings(random_base, data), {"comparisons": {"source": str(source)}, "selection": {}})
    source.write_text("".join(json.dumps(ranking(text)) + "\n" for text in (known, "nobody asked", "nor this")))
    run(recipe, tmp_path / "out", "prompts", "comparisons")
    assert "2 of 3 rankings are left out" in " ".join(capsys.readouterr().err.split())
    source.write_text(json.dumps(ranking("nobody asked")) + "\n")
    with pytest.raises(DataError, match="none of its 1 rankings begins with a prompt of the intake"):
        run(recipe, tmp_path / "out", "comparisons")


@pytest.mark.parametrize("keeps", [True, False])
def test_ready_training_records_with_personal_data_are_left_out(
    random_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keeps: bool
) -> None:
    asked = [prompt.messages[0].content for prompt in study.prompts(0, train=8, validation=4, test=6)]
    demonstrations, rankings = tmp_path / "demonstrations.jsonl", tmp_path / "rankings.jsonl"
    letters = ["write to ann.smith@example.com", "write a letter"]
    demonstrations.write_text(
        "".join(json.dumps({"prompt": f"new {n}", "completion": text}) + "\n" for n, text in enumerate(letters))
    )
    rankings.write_text(
        "".join(json.dumps({"prompt": text, "responses": letters, "ranking": [[0], [1]]}) + "\n" for text in asked)
    )
    changes = {
        "demonstrations": {"source": str(demonstrations)},
        "comparisons": {"source": str(rankings)},
        "prompts.filter_personal_data": not keeps,
        "selection": {},
    }
    run(
        with_changes(settings(random_base, data), changes), tmp_path / "out", "prompts", "demonstrations", "comparisons"
    )
    stages = tmp_path / "out/round-1"
    assert len(rows(stages / "2-demonstrations/train.jsonl")) == (2 if keeps else 1)
    assert len(
        rows(
            stages / "4-comparisons/train.jsonl",
        )
    ) == (8 if keeps else 0)
    assert len(rows(stages / "4-comparisons/test.jsonl")) == 6, "what is only measured on stays"
    assert ("hold personal data" in capsys.readouterr().err) != keeps


def test_what_chooses_by_validation_prompts_needs_some(random_base: Path, data: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "prompts.jsonl", study.prompts(0, train=8, validation=0, test=6))
    needy = with_changes(settings(random_base, data), {"prompts.source": str(tmp_path / "prompts.jsonl")})
    recipe = with_changes(needy, {"selection": {}, "evaluation.contestants.shown": {"model": "base"}})
    for given in (tmp_path / "new", tmp_path / "out"):  # the intake of the second is done by then
        with pytest.raises(DataError, match=r"no validation prompts, and selection: first, evaluation.contestants.sho"):
            run(needy, given, "prompts")
        run(recipe, tmp_path / "out", "prompts")


def test_demonstrations_of_validation_prompts_are_not_trained_on(
    random_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor are those of a prompt whose other demonstration only measures, or of a conversation that goes on from it."""
    held_out = study.prompts(0, train=0, validation=1, test=0)[0].messages
    later = [*(one.to_json() for one in held_out), {"role": "assistant", "content": "so"}, held_out[0].to_json()]
    asked = ["first", " FIRST", [one.to_json() for one in held_out], later, "second"]
    source = tmp_path / "demonstrations.jsonl"
    source.write_text("".join(json.dumps({"prompt": one, "completion": "corn"}) + "\n" for one in asked))
    changes = {"demonstrations": {"source": str(source), "validation": 1}}
    run(with_changes(settings(random_base, data), changes), tmp_path / "out", "prompts", "demonstrations")
    (kept,) = read_demonstrations(tmp_path / "out/round-1/2-demonstrations/train.jsonl")
    assert kept.prompt.messages[0].content == "second"
    assert "3 of 4 training records have a validation prompt and are left out" in capsys.readouterr().err


def test_claims_about_prompts_that_are_not_there_are_told_before_anybody_responds(
    finished: Path, random_base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    check = {"measure": "win_rate", "a": "ppo", "b": "first", "above": 0.5, "where": {"category": "nothing"}}
    claims = [{"id": "1", "statement": "s", "checks": [check]}]
    recipe = with_changes(settings(random_base, data), {"evaluation.claims": claims})
    with pytest.raises(ConfigError, match=r"claim 1: win_rate of 'ppo' needs two test prompts with .*nothing.* are 0"):
        run(recipe, tmp_path / "out", "evaluation")


def test_fewer_prompts_than_asked_for_are_said(
    random_base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_changes(settings(random_base, data), {"demonstrations.train": 9})
    run(recipe, tmp_path / "out", "prompts", "demonstrations")
    assert "9 train prompts were asked for, and 8 are there" in capsys.readouterr().err
