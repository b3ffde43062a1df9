"""Two processes train what one trains: parameters, metrics and files, resuming on another number, and errors.

One job of two processes does most of it, since starting one takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parallel import jobs
from tests.parallel.launching import ROOT, launch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tastemaker.artefacts import read_manifest
from tastemaker.checkpoint import load_state
from tastemaker.cli import main
from tastemaker.metrics import read_metrics

TOLERANCE = 1e-5
FOLDERS = ("one", "several")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings by one process, and by two."""
    place = tmp_path_factory.mktemp("jobs")
    jobs.make_models(place / "models")
    for name, train in jobs.TRAININGS.items():
        train(place / "one" / name, place / "models")
        jobs.half(name, place / "one" / f"half-{name}", place / "models")
        shutil.copytree(place / "one" / f"half-{name}", place / "several" / f"resumed-{name}")
    halves = [f"{part}-{name}" for part in ("half", "resumed") for name in jobs.TRAININGS]
    names = [*jobs.TRAININGS, *halves, "gathering", "diverging", "filling", "command"]
    code, said = launch(place / "said.log", ROOT / "tests/parallel/driver.py", place, *names)
    assert code == 0, said
    return place


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def found(folder: Path, job: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "several" / job / "found.json").read_text())
    return read


def check_alike(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-4, rel=1e-4)


def check_same_results(found: Path, expected: Path) -> None:
    """Accuracies are of the same pairs; of a reward model also on other raters, and on folds of raters."""
    one, other = (json.loads((place / "results.json").read_text()) for place in (expected, found))
    assert one.keys() == other.keys()
    for name in ("accuracy", "n", "ci95"):
        assert other[name] == pytest.approx(one[name], abs=TOLERANCE)
    if expected.name == "reward":
        assert other["offset"] == pytest.approx(one["offset"], abs=TOLERANCE)
        assert one["held_out_raters"]["n"] == 10
        assert other["held_out_raters"]["accuracy"] == one["held_out_raters"]["accuracy"]
        assert len(one["cross_validation"]["folds"]) == 2
        assert other["cross_validation"] == one["cross_validation"]


# --- as one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("sft", "base"), ("dpo", "tied"), ("ppo", "ending/model")])
def test_parameters_are_those_of_one_process(folder: Path, name: str, start: str) -> None:
    one, several = (jobs.weights(folder / kind / name / "model") for kind in FOLDERS)
    assert jobs.largest_difference(one, several) < TOLERANCE
    assert jobs.moved(one, jobs.weights(folder / "models" / start)) > 100 * TOLERANCE


def test_a_reward_models_parameters_are_those_of_one_process(folder: Path) -> None:
    """With gradient checkpointing; its head and its offset too."""
    one, several = (jobs.weights(folder / kind / "reward" / "model") for kind in FOLDERS)
    assert jobs.largest_difference(one, several) < TOLERANCE
    assert jobs.moved(one, jobs.weights(folder / "models" / "base")) > 100 * TOLERANCE
    offsets = [json.loads((folder / kind / "reward" / "results.json").read_text())["offset"] for kind in FOLDERS]
    assert offsets[1] == pytest.approx(offsets[0], abs=TOLERANCE)


def test_the_weight_average_is_that_of_one_process(folder: Path) -> None:
    one, several = (jobs.weights(folder / kind / "ppo" / "model-ema") for kind in FOLDERS)
    assert jobs.largest_difference(one, several) < TOLERANCE
    assert jobs.largest_difference(one, jobs.weights(folder / "one" / "ppo" / "model")) > 10 * TOLERANCE


@pytest.mark.parametrize("name", jobs.TRAININGS)
def test_metrics_are_those_of_one_process(folder: Path, name: str) -> None:
    """Written once a step, and summed over both: losses, accuracies, KL, whitened advantages' losses, ratios."""
    check_alike(metrics(folder / "several" / name), metrics(folder / "one" / name))


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_results_are_those_of_one_process(folder: Path, name: str) -> None:
    check_same_results(folder / "several" / name, folder / "one" / name)


@pytest.mark.parametrize("name", jobs.TRAININGS)
def test_files_are_those_of_one_process(folder: Path, name: str) -> None:
    def listed(kind: str) -> list[str]:
        base = folder / kind / name
        files = sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file())
        return [path for path in files if not path.startswith("checkpoint/")]

    assert listed("several") == listed("one")


def test_the_library_loads_what_two_processes_have_saved(folder: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(folder / "several" / "dpo" / "model")
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert tied.config.architectures == ["LlamaForCausalLM"]
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "several" / "reward" / "model")
    assert judge.config.architectures == ["LlamaForSequenceClassification"]


# --- sharing work ---------------------------------------------------------------------------------------------------


def test_work_is_shared_by_place_and_comes_back_in_order(folder: Path) -> None:
    said = found(folder, "gathering")
    assert said["shares"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert said["fewer"] == [[0, 0]]
    assert said["told"] == [["diverged in process 1", "not-finite"]] * 2, "the first process leaves it for the doctor"
    assert said["sum"] == [1.5 + 2.5, -4.0]
    assert said["tensor"] == [1.0, 1.0]
    assert said["largest"] == -3.0
    assert said["first"] == "said by 0"


def test_all_processes_have_as_many_turns(folder: Path) -> None:
    """Items as (item, counts, last): of three the second process has one, and repeats the last without weight."""
    first, second = found(folder, "gathering")["turns"]
    assert first["3"] == [[0, True, False], [2, True, True]]
    assert second["3"] == [[1, True, False], [2, False, True]]
    assert first["1"] == [[0, True, True]]
    assert second["1"] == [[0, False, True]]
    assert first["4"] == [[0, True, False], [2, True, True]]
    assert second["4"] == [[1, True, False], [3, True, True]]
    assert first["0"] == second["0"] == []


# --- resuming -------------------------------------------------------------------------------------------------------


def check_same_training(resumed: Path, whole: Path) -> None:
    for model in ("model", "model-ema") if whole.name == "ppo" else ("model",):
        assert jobs.largest_difference(jobs.weights(whole / model), jobs.weights(resumed / model)) < TOLERANCE
    check_alike(metrics(resumed), metrics(whole))
    if whole.name in ("reward", "dpo"):
        check_same_results(resumed, whole)


@pytest.mark.parametrize("name", jobs.TRAININGS)
def test_what_two_processes_began_one_finishes(folder: Path, tmp_path: Path, name: str) -> None:
    begun = folder / "several" / f"half-{name}"
    (parts,) = (begun / "checkpoint").iterdir()
    assert sorted(path.name for path in parts.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert len(metrics(begun)) == 2
    shutil.copytree(begun, tmp_path / name)
    jobs.TRAININGS[name](tmp_path / name, folder / "models")
    check_same_training(tmp_path / name, folder / "one" / name)


@pytest.mark.parametrize("name", jobs.TRAININGS)
def test_what_one_process_began_two_finish(folder: Path, name: str) -> None:
    state = load_state(folder / "one" / f"half-{name}" / "checkpoint" / "state.pt")
    assert state is not None
    assert state["step"] == 2
    check_same_training(folder / "several" / f"resumed-{name}", folder / "one" / name)


def test_a_state_in_parts_is_put_together(folder: Path, tmp_path: Path) -> None:
    """It holds what a state of one process holds; the later of two states counts, and a broken one does not."""
    place = tmp_path / "checkpoint"
    shutil.copytree(folder / "several" / "half-ppo" / "checkpoint", place)
    state, other = load_state(place / "state.pt"), load_state(folder / "one" / "half-ppo" / "checkpoint" / "state.pt")
    assert state is not None
    assert other is not None
    assert state["step"] == other["step"] == 2
    assert state["controller"]["kl_coef"] == pytest.approx(other["controller"]["kl_coef"], rel=1e-4)
    for name in ("policy", "value", "average"):
        assert jobs.largest_difference(state[name], other[name]) < TOLERANCE
    for name in ("policy_trainer", "value_trainer"):
        moments, others = (which[name]["optimizer"]["state"] for which in (state, other))
        assert {int(number) for number in moments} == set(others)
        for number, held in others.items():
            torch.testing.assert_close(moments[str(number)], held, rtol=1e-3, atol=1e-6)
    torch.save({"step": 1}, place / "state.pt")
    later = load_state(place / "state.pt")
    assert later is not None
    assert later["step"] == 2
    (place / "state-00000002" / ".metadata").unlink()
    earlier = load_state(place / "state.pt")
    assert earlier == {"step": 1}


# --- commands and errors --------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_in_one_process_stops_all(folder: Path) -> None:
    """The first one too, which writes down why."""
    found_ = found(folder, "diverging")
    assert len(found_["said"]) == 2
    assert all(said.startswith("not-finite: the loss is nan at optimizer step 0") for said in found_["said"])
    assert found_["unchanged"]


def test_a_full_disk_is_said_by_all_and_the_state_before_stands(folder: Path) -> None:
    """What the full disk left of the new one is deleted when training goes on."""
    found_ = found(folder, "filling")
    begins = f"{folder / 'several/filling/checkpoint/state-00000003'} cannot be written, for want of space perhaps: "
    assert len(found_["said"]) == 2
    assert all(said.startswith(begins) for said in found_["said"])
    assert found_["state"] == {"step": 2}
    assert found_["left"] == ["state-00000002", "state-00000002.whole"]


def test_a_command_is_done_once_by_both(folder: Path, tmp_path: Path) -> None:
    out = folder / "several" / "command" / "out"
    assert main(["sft", *jobs.command("sft", folder / "models", tmp_path / "out")]) == 0
    one, several = (jobs.weights(place / "model") for place in (tmp_path / "out", out))
    assert jobs.largest_difference(one, several) < 1e-3, "Adam's usual epsilon makes steps of a gradient's rounding"
    manifests: list[Mapping[str, Any] | None] = [read_manifest(place) for place in (tmp_path / "out", out)]
    assert all(manifests)
    mine, theirs = (manifest for manifest in manifests if manifest is not None)
    assert theirs["processes"] == 2
    assert "processes" not in mine
    for name in ("stage", "config", "inputs"):
        assert theirs[name] == mine[name]
    assert theirs["outputs"].keys() == mine["outputs"].keys()
    assert not (out / "started.json").exists()


@pytest.mark.parametrize("name", ["reward", "dpo", "ppo"])
def test_the_other_commands_finish_too(folder: Path, name: str) -> None:
    out = folder / "several" / "command" / name
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest["stage"], manifest["processes"]) == (name, 2)
    start = jobs.weights(folder / "models" / "base")
    assert jobs.moved(jobs.weights(out / "model"), start) > 0
    assert metrics(out)
