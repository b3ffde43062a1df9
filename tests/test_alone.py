"""One stage alone in a folder: what it refuses to write over, and that it says what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tastemaker.artefacts import claimed
from tastemaker.commands.alone import stage
from tastemaker.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    rate: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    epochs: int = 20
    optimizer: Optimizer = field(default_factory=Optimizer)


def work(folder: Path) -> None:
    (folder / "model.txt").write_text("20 epochs")


def interrupted(folder: Path) -> None:
    (folder / "part.txt").write_text("half")
    raise KeyboardInterrupt


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished result of a stage `sft` on `data.txt`."""
    (tmp_path / "data.txt").write_text("old")
    stage(tmp_path / "out", "sft", Config(), {"data": tmp_path / "data.txt", "seed": "0"}, work, replace=False)
    return tmp_path / "out"


def given(out: Path, *, seed: str = "0") -> dict[str, Path | str]:
    return {"data": out.parent / "data.txt", "seed": seed}


def test_the_result_of_another_stage_is_never_replaced(out: Path) -> None:
    for replace in (False, True):
        with pytest.raises(ConfigError, match="holds the result of 'sft', not of 'dpo'; give a new folder for --out"):
            stage(out, "dpo", Config(), given(out), work, replace=replace)
    assert (out / "model.txt").read_text() == "20 epochs"


def test_what_another_stage_began_is_not_replaced_and_its_own_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", "sft", Config(), {}, interrupted, replace=False)
    with pytest.raises(ConfigError, match="holds the beginning of 'sft', not of 'dpo'"):
        stage(tmp_path / "out", "dpo", Config(), {}, work, replace=False)
    stage(tmp_path / "out", "sft", Config(), {}, work, replace=False)
    assert (tmp_path / "out/part.txt").read_text() == "half"


def test_other_settings_are_named_and_replace_only_when_told(out: Path) -> None:
    other = Config(epochs=1, optimizer=Optimizer(rate=0.5))
    with pytest.raises(ConfigError) as refused:
        stage(out, "sft", other, given(out, seed="7"), lambda folder: None, replace=False)
    assert str(refused.value) == (
        f"{out} holds the result of other settings: epochs 20 -> 1, optimizer.rate 0.1 -> 0.5, seed 0 -> 7. "
        "Give a new folder for --out, or --replace to write over it."
    )
    assert (out / "model.txt").exists()
    stage(out, "sft", other, given(out, seed="7"), lambda folder: None, replace=True)
    assert not (out / "model.txt").exists()


def test_other_content_of_an_input_is_another_setting(out: Path) -> None:
    stage(out, "sft", Config(), given(out), work, replace=False)
    (out.parent / "data.txt").write_text("new")
    with pytest.raises(ConfigError, match=r"other settings: another --data\. Give"):
        stage(out, "sft", Config(), given(out), work, replace=False)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("out", "--init .*out is --out itself"),
        ("out/model", "--init .*out/model lies inside --out .*out; give another --out"),
        (".", "--out .*out lies inside --init"),
    ],
)
def test_what_is_read_lies_apart_from_what_is_written(tmp_path: Path, place: str, message: str) -> None:
    stage(tmp_path / "out", "sft", Config(), {}, lambda folder: (folder / "model").mkdir())
    with pytest.raises(ConfigError, match=message):
        stage(tmp_path / "out", "sft", Config(), {"init": tmp_path / place}, work)
    assert (tmp_path / "out/model").is_dir()


def test_a_neighbour_of_a_like_name_is_apart(tmp_path: Path) -> None:
    (tmp_path / "out-of-data").mkdir()
    stage(tmp_path / "out", "sft", Config(), {"policy/a": tmp_path / "out-of-data"}, work, replace=False)
    assert (tmp_path / "out/model.txt").exists()


def test_the_last_line_is_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # told again when the result is up to date
        stage(tmp_path / "out", "sft", Config(), {}, work, result=lambda out: (out / "model.txt").read_text())
        assert capsys.readouterr().err.splitlines()[-1] == "20 epochs"


def test_a_beginning_with_a_checkpoint_is_not_dropped_for_another_option(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / "checkpoint").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stage(out, "sft", Config(), {"seed": "0"}, killed, replace=False)
    says = "holds the beginning, with a checkpoint, of other settings: epochs 20 -> 2, seed 0 -> 1. Give a new folder"
    with pytest.raises(ConfigError, match=says):
        stage(out, "sft", Config(epochs=2), {"seed": "1"}, work, replace=False)
    assert (out / "checkpoint").exists()
    with pytest.raises(KeyboardInterrupt):
        stage(out, "sft", Config(), {"seed": "0"}, killed, replace=False)
    stage(out, "sft", Config(epochs=2), {"seed": "1"}, work, replace=True)
    assert (out / "model.txt").exists()


def test_a_folder_in_which_another_process_works_is_left_alone(out: Path) -> None:
    with claimed(out), pytest.raises(ConfigError, match="another process works in"):
        stage(out, "sft", Config(epochs=1), given(out), work)
    assert (out / "model.txt").read_text() == "20 epochs"
    stage(out, "sft", Config(epochs=1), given(out), lambda folder: None)
    assert not (out / "model.txt").exists()
