"""Two processes of which one fails, or both: what is said, and what is left in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.forked import run_command
from tests.models import save_model
from tests.parallel import jobs
from tests.parallel.failing import fail
from tests.parallel.launching import ROOT, launch, together

from tastemaker.artefacts import read_json
from tastemaker.cli import main
from tastemaker.files import write_records

FAILING = ROOT / "tests/parallel/failing.py"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Fine-tuning in four steps, into `out`."""
    write_records(tmp_path / "data.jsonl", jobs.DEMONSTRATIONS)
    given = ["sft", "--model", str(save_model(tmp_path / "base", max_position_embeddings=64))]
    given += ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    return [*given, "--threads", "1", "--epochs", "1", "--batch-size", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_error_of_one_process_ends_the_job(command: list[str], tmp_path: Path) -> None:
    """The second process fails in the middle of a step, which the first waits for."""
    code, said = launch(tmp_path / "said.log", FAILING, "1", "2", *command)
    assert code != 0
    assert "error in process 1: made to fail" in said
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0]  # what torchrun adds is another matter
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_error_of_another_process_leaves_the_earlier_result(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the first process still sees to it or is ended before, the next command finds it."""
    assert main(command) == 0
    before = contents(tmp_path / "out")
    codes, said = together(tmp_path / "said.log", fail, "1", 1, [*command, "--batch-size", "3", "--replace"])
    assert codes[1] == 2
    assert "error in process 1: made to fail" in said
    assert main(command) == 0
    assert "out is up to date" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))


def test_what_stops_all_reaches_the_doctor_though_the_first_process_is_late(command: list[str], tmp_path: Path) -> None:
    _, said = together(tmp_path / "said.log", fail, "01", 2, command)
    for number in (0, 1):
        assert f"error in process {number}: made to fail" in said
    stopped = read_json(tmp_path / "out" / "started.json")["stopped"]
    assert stopped == {"message": "made to fail", "finding": "not-finite"}


def test_processes_that_have_read_other_records_do_not_train(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    before = contents(tmp_path / "out")
    read = [*command, "--data", "tests.parallel.jobs:in_any_order", "--replace"]
    codes, said = together(tmp_path / "said.log", run_command, read)
    assert codes[0] == 2
    says = "error in process 0: tests.parallel.jobs:in_any_order: process 1 has read other records of --data than the"
    assert says in said
    assert contents(tmp_path / "out") == before
