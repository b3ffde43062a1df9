"""The whole pipeline on the smoke recipe: its files, what is skipped, what runs again, people in place of raters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.runs import measured, skipped, smoke_command, weights

from tastemaker.artefacts import read_manifest
from tastemaker.cli import main
from tastemaker.metrics import METRICS, read_metrics
from tastemaker.store import LabelService, Store
from tastemaker.store.tasks import Answer, ComparisonAnswer, DemonstrationAnswer, RankingAnswer, Task

pytestmark = pytest.mark.slow

STAGES = (
    "1-prompts",
    "2-demonstrations",
    "3-sft/baseline",
    "3-sft/ppo-init",
    "4-comparisons",
    "5-reward/main",
    "3-sft/baseline-selected",
    "6-policy/ppo-ptx",
    "6-policy/dpo",
    "7-evaluation",
)


@pytest.fixture(scope="module")
def smoke(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("smoke") / "out"
    assert main(smoke_command(random_base, out)) == 0
    return out


def test_every_stage_leaves_a_folder_with_its_manifest(smoke: Path) -> None:
    assert tuple(skipped(smoke)) == STAGES
    for stage in STAGES:
        manifest = read_manifest(smoke / "round-1" / stage)
        assert manifest is not None, stage
        assert manifest["stage"] == stage
        assert manifest["outputs"]
        assert not (smoke / "round-1" / stage / "started.json").exists()
        assert not (smoke / "round-1" / stage / "checkpoint").exists()
    for trained in ("3-sft/baseline", "3-sft/ppo-init", "5-reward/main", "6-policy/ppo-ptx", "6-policy/dpo"):
        rows = read_metrics(smoke / "round-1" / trained / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert rows
        assert {name for row in rows for name in row} <= {"step", *METRICS}


def test_what_each_stage_saw_can_be_looked_at(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a stage is enough: the run knows its models and its records."""
    for stage, says in (
        ("3-sft/ppo-init", "piece of text 2"),
        ("5-reward/main", ", score"),
        ("6-policy/dpo", "  rejected: "),
        ("6-policy/ppo-ptx", "  as the reward model reads it: "),
    ):
        more = ["--sample"] if "ptx" in stage else ["--text"]
        assert main(["inspect", str(smoke / "round-1" / stage), "--first", "2", *more]) == 0
        assert says in capsys.readouterr().out
    assert main(["inspect", str(smoke / "round-1/3-sft/baseline-selected")]) == 2
    assert "which trains nothing" in capsys.readouterr().err


def test_results_have_the_shape_that_others_rely_on(smoke: Path) -> None:
    results = json.loads((smoke / "results.json").read_text())
    assert (smoke / "report.html").stat().st_size > 10_000
    for row in results["comparisons"]:
        assert {"a", "b", "judge", "decoding", "n", "win_rate", "ci95", "length_controlled"} <= set(row)
        low, high = row["ci95"]
        assert 0 <= low <= row["win_rate"] <= high <= 1
        assert set(row["length_controlled"]) == {"win_rate", "ci95"}
        assert row["n"] == 40
    asked = {(row["a"], row["b"], row["decoding"]) for row in results["comparisons"]}
    assert ("ppo-ptx", "base", "greedy") in asked
    assert ("best-of-4", "sft", "T=1") in asked
    assert ("best-of-4", "sft", "greedy") not in asked, "the best of equal responses is that response"
    for name, model in results["models"].items():
        assert {"parameters", "kl", "mean_tokens", "eos_rate"} <= set(model), name
        assert model["parameters"] == results["models"]["base"]["parameters"]
    assert results["models"]["ppo-ptx"]["heldout_text_loss"] > 0
    assert results["models"]["ppo-ptx"]["kl"] is not None
    for claim in results["claims"]:
        assert {"id", "statement", "measured", "holds", "checks"} <= set(claim)
        assert claim["holds"] is all(check["holds"] for check in claim["checks"])
    assert results["agreement"]["training"]["ties_excluded"]
    reward = json.loads((smoke / "round-1/5-reward/main/results.json").read_text())
    for row in (reward, reward["held_out_raters"]):
        assert {"accuracy", "n", "ci95"} <= set(row)
    recipe = json.loads((smoke / "recipe.json").read_text())
    assert recipe["policy"]["ppo-ptx"]["lam"] == 0.95, "every field is written out, defaults too"


def test_models_load_with_the_library(smoke: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = AutoModelForCausalLM.from_pretrained(str(smoke / "round-1/6-policy/ppo-ptx/model"))
    reward = AutoModelForSequenceClassification.from_pretrained(str(smoke / "round-1/5-reward/main/model"))
    assert policy.config.vocab_size > 100
    assert reward.config.num_labels == 1


def test_no_test_prompt_trained_anything(smoke: Path) -> None:
    def texts(name: str) -> set[str]:
        rows = [json.loads(line) for line in (smoke / "round-1" / name).read_text().splitlines()]
        return {(row["messages"] if "messages" in row else row["prompt"])[0]["content"] for row in rows}

    test = texts("1-prompts/test.jsonl")
    assert test
    for name in ("2-demonstrations/train.jsonl", "4-comparisons/train.jsonl", "4-comparisons/held-out.jsonl"):
        assert not test & texts(name)


def test_held_out_raters_trained_nothing(smoke: Path) -> None:
    def raters(name: str) -> set[str]:
        return {json.loads(line)["rater"] for line in (smoke / "round-1" / name).read_text().splitlines()}

    training = raters("4-comparisons/train.jsonl") | raters("2-demonstrations/train.jsonl")
    judges = raters("7-evaluation/comparisons.jsonl") - {"same text"}
    assert judges
    assert not training & judges
    assert not training & raters("4-comparisons/held-out.jsonl")


def test_a_second_run_has_nothing_to_do(smoke: Path, random_base: Path) -> None:
    before, found = weights(smoke), measured(smoke)
    assert main(smoke_command(random_base, smoke)) == 0
    assert skipped(smoke) == dict.fromkeys(STAGES, True)
    assert weights(smoke) == before
    assert measured(smoke) == found
    # What it cost is what the stages took when they ran, and not the moment that finding them up to date took.
    results = json.loads((smoke / "results.json").read_text())
    manifests = [manifest for stage in STAGES if (manifest := read_manifest(smoke / "round-1" / stage)) is not None]
    assert results["seconds"] == pytest.approx(sum(one["seconds"] for one in manifests), abs=0.051)
    assert results["peak_memory_mb"] == max(one["peak_memory_mb"] for one in manifests)


def test_a_changed_field_runs_again_what_depends_on_it(smoke: Path, random_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(smoke, out)
    assert main(smoke_command(random_base, out, "--policy.ppo-ptx.kl-coef", "0.2")) == 0
    again = {name for name, up_to_date in skipped(out).items() if not up_to_date}
    assert again == {"6-policy/ppo-ptx", "7-evaluation"}
    changed = {name for name, digest in weights(out).items() if weights(smoke)[name] != digest}
    assert changed == {
        "round-1/6-policy/ppo-ptx/model/model.safetensors",
        "round-1/6-policy/ppo-ptx/model-ema/model.safetensors",
    }


def test_two_runs_of_one_seed_are_the_same_bytes(smoke: Path, random_base: Path, tmp_path: Path) -> None:
    assert main(smoke_command(random_base, tmp_path / "out")) == 0
    assert weights(tmp_path / "out") == weights(smoke)
    assert measured(tmp_path / "out") == measured(smoke)
    assert len(weights(smoke)) >= 9


def test_control_the_base_in_place_of_the_policy(smoke: Path, random_base: Path, tmp_path: Path) -> None:
    """What the policy's win, its alignment tax and its true worth are measured by shows nothing where nothing is."""
    out = tmp_path / "out"
    shutil.copytree(smoke, out)
    swap = ["--evaluation.contestants.ppo-ptx.model", "base", "--evaluation.contestants.ppo-ptx.stop-texts", "q:"]
    assert main(smoke_command(random_base, out, *swap)) == 0
    assert {name for name, up_to_date in skipped(out).items() if not up_to_date} == {"7-evaluation"}
    results = measured(out)
    (claim,) = results["claims"]
    assert not claim["holds"]
    found = {check["description"].partition(",")[0]: check for check in claim["checks"]}
    assert found["text loss difference"]["value"] == 0
    assert not any(found[name]["holds"] for name in ("win rate", "text loss difference", "gold difference"))
    (greedy,) = (
        row for row in results["comparisons"] if (row["a"], row["b"], row["decoding"]) == ("ppo-ptx", "base", "greedy")
    )
    assert greedy["win_rate"] == 0.5, "they say the same"


# --- people ---------------------------------------------------------------------------------------------------------

PEOPLE = """
name = "people"
raters = "people"
address = "http://labels.example"
threads = 1
base.model = "BASE"
prompts.source = "tastemaker.tinyworld.study:prompts?train=20&validation=5&test=6"
demonstrations = { train = 6, validation = 2 }
[sft.first]
epochs = 1
batch_size = 4
optimizer.learning_rate = 1e-3
[comparisons]
responses_per_prompt = 3
sources = ["sft/first"]
train = 5
validation = 2
validation_overlap = 1
decoding = { max_new_tokens = 6 }
[policy.dpo]
kind = "dpo"
init = "first"
optimizer = { learning_rate = 1e-4 }
[evaluation]
decodings = [{ max_new_tokens = 6 }]
pairs = [["dpo", "first"]]
contestants = { dpo = { model = "policy/dpo" }, first = { model = "sft/first" } }
"""


def answer(task: Task) -> Answer:
    """What these people say: a short demonstration, the longest output first, ties where lengths are equal."""
    if task.kind == "demonstration":
        return DemonstrationAnswer("the farmer eats corn .")
    length = {output.letter: len(output.text.split()) for output in task.outputs}
    if task.kind == "comparison":
        first, second = length["A"], length["B"]
        return ComparisonAnswer("tie" if first == second else "A" if first > second else "B")
    best_first = sorted(set(length.values()), reverse=True)
    return RankingAnswer(tuple(tuple(sorted(k for k in length if length[k] == words)) for words in best_first))


def people_answer(out: Path) -> int:
    """One person of each study's group answers everything that waits."""
    store = Store.open(out / "labels.db")
    service, count = LabelService(store), 0
    for study in service.studies():
        name = f"person of {study.rater_group}"
        service.add_rater(name, group=study.rater_group, origin="human")
        for task in service.claim(study.name, name, limit=1000):
            service.submit(task.id, task.token, answer(task))
            count += 1
    store.close()
    return count


def test_people_are_waited_for_and_the_same_command_goes_on(
    random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "people.toml", tmp_path / "out"
    recipe.write_text(PEOPLE.replace("BASE", str(random_base)))
    command = ["run", str(recipe), "--out", str(out)]
    waits = []
    for _ in range(9):
        code = main(command)
        said = capsys.readouterr().err.splitlines()[-1]
        if code == 0:
            break
        assert code == 3
        assert said.startswith("waiting: ")
        assert "http://labels.example" in said
        assert (out / "recipe.json").exists(), "what is finished of it can be inspected"
        missing, kind = int(said.split()[1]), said.split()[2]
        assert main(command) == 3, "nothing changes until people have answered"
        assert capsys.readouterr().err.splitlines()[-1] == said
        assert people_answer(out) == missing
        waits.append((missing, kind))
    assert waits[:4] == [(6, "demonstration"), (2, "demonstration"), (5, "ranking"), (2, "ranking")]
    assert [kind for _, kind in waits[4:]] == ["ranking", "comparison"]
    rows = [json.loads(line) for line in (out / "round-1/4-comparisons/train.jsonl").read_text().splitlines()]
    assert {row["origin"] for row in rows} == {"human"}
    assert main(command) == 0
    assert all(skipped(out).values())
    assert main(["label", "status", "--database", str(out / "labels.db")]) == 0
    assert "6/6 answered" in capsys.readouterr().out
