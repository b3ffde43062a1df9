"""Stage folders: skipped when up to date, resumed when interrupted, begun anew when changed, never left half."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from tastemaker import artefacts
from tastemaker.artefacts import (
    CHECKPOINT,
    MANIFEST,
    STARTED,
    StageOutcome,
    claimed,
    hash_path,
    hash_tree,
    read_json,
    read_manifest,
    run_stage,
)
from tastemaker.errors import AnswersMissing, ConfigError, DataError, TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    rate: float = 0.5


def writes(text: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        (folder / "result.txt").write_text(text)

    return work


def fails(error: BaseException, *, after: str | None = None) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        if after is not None:
            (folder / "partial.txt").write_text(after)
        raise error

    return work


def stage(
    folder: Path,
    work: Callable[[Path], None],
    *,
    config: Settings | None = None,
    inputs: dict[str, Path | str] | None = None,
    keep: str | None = None,
) -> StageOutcome:
    with claimed(folder, keep=keep):
        return run_stage(folder, stage="s", config=config or Settings(), inputs=inputs or {}, work=work, keep=keep)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_finished_stage_is_skipped(out: Path) -> None:
    assert not stage(out, writes("one")).skipped
    assert stage(out, writes("two")).skipped
    assert (out / "result.txt").read_text() == "one"


@pytest.mark.parametrize("change", ["config", "input", "output"])
def test_whatever_changes_makes_it_run_again(out: Path, tmp_path: Path, change: str) -> None:
    data = tmp_path / "data.txt"
    data.write_text("a")
    stage(out, writes("one"), inputs={"data": data})
    config = Settings(rate=0.25) if change == "config" else Settings()
    if change == "input":
        data.write_text("b")
    if change == "output":
        (out / "result.txt").write_text("somebody wrote here")
    assert not stage(out, writes("two"), config=config, inputs={"data": data}).skipped
    assert (out / "result.txt").read_text() == "two"


def test_a_file_that_is_only_touched_or_moved_changes_nothing(out: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("a")
    second.write_text("a")
    stage(out, writes("one"), inputs={"data": first})
    assert stage(out, writes("two"), inputs={"data": second}).skipped


def test_the_manifest_tells_where_results_come_from(out: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "a.txt").write_text("a")
    stage(out, writes("one"), inputs={"z": "named", "data": data})
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["config"] == {"rate": 0.5}
    assert manifest["inputs"] == {"data": hash_path(data), "z": "named"}
    assert list(manifest["inputs"]) == ["data", "z"]
    assert manifest["outputs"] == {"result.txt": hash_path(out / "result.txt")}
    for name in ("stage", "code", "libraries", "python", "finished", "seconds", "peak_memory_mb"):
        assert manifest.get(name) is not None, name
    assert not (out / STARTED).exists()


def test_an_interrupted_stage_finds_its_checkpoint_and_its_time(out: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / CHECKPOINT).mkdir()
        (folder / CHECKPOINT / "state").write_text("half")
        (folder / ".model.123.partial").write_text("torn")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(out, killed)
    started = read_json(out / STARTED)
    assert started["seconds"] > 0
    assert read_manifest(out) is None

    def resumed(folder: Path) -> None:
        assert (folder / CHECKPOINT / "state").read_text() == "half"
        assert not (folder / ".model.123.partial").exists()
        writes("whole")(folder)

    outcome = stage(out, resumed)
    assert outcome.seconds > started["seconds"]
    assert set(contents(out)) == {"result.txt", MANIFEST}


def test_an_interrupted_stage_with_other_settings_begins_anew(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(out, fails(KeyboardInterrupt(), after="half"))
    stage(out, writes("new"), config=Settings(rate=0.1))
    assert set(contents(out)) == {"result.txt", MANIFEST}


def test_a_kill_while_a_folder_is_emptied_leaves_no_checkpoint(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old command would go on from it behind results that are gone, and end without them."""

    def interrupted(folder: Path) -> None:
        (folder / "epochs").mkdir()
        (folder / CHECKPOINT).mkdir()
        (folder / CHECKPOINT / "state.pt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(out, interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(out, writes("new"), config=Settings(rate=0.1))

    def begins(folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} <= {"epochs", STARTED}
        writes("old")(folder)

    stage(out, begins)
    assert (out / "result.txt").read_text() == "old"


def test_progress_is_not_dropped_without_a_word(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def killed(folder: Path) -> None:
        (folder / CHECKPOINT).mkdir(exist_ok=True)
        raise KeyboardInterrupt

    given: dict[str, Path | str] = {"reward": "taste:score 1f", "data": "d"}
    for config, reward, said in (
        (Settings(), "taste:score 1f", ""),
        (Settings(), "taste:score 2e", "s begins anew: it was begun with other reward"),
        (Settings(rate=0.1), "taste:score 3d", "s begins anew: it was begun with other settings, reward"),
    ):
        with pytest.raises(KeyboardInterrupt):
            stage(out, killed, config=config, inputs=given | {"reward": reward})
        assert capsys.readouterr().err.strip() == said


def test_a_started_file_that_a_kill_tore_begins_anew(out: Path) -> None:
    out.mkdir()
    (out / STARTED).write_text('{"stage": ')
    (out / "junk").write_text("x")
    stage(out, writes("new"))
    assert set(contents(out)) == {"result.txt", MANIFEST}


@pytest.mark.parametrize(
    "error", [DataError("bad"), AnswersMissing(missing=3, task="ranking", group="training", address="here")]
)
def test_an_error_before_anything_was_written_leaves_no_folder(out: Path, error: DataError | AnswersMissing) -> None:
    with pytest.raises(type(error)):
        stage(out, fails(error))
    assert list(out.parent.iterdir()) == []


def test_an_error_before_anything_was_written_leaves_the_old_result(out: Path) -> None:
    stage(out, writes("one"))
    before = contents(out)
    with pytest.raises(DataError):
        stage(out, fails(DataError("bad")), config=Settings(rate=0.1))
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert stage(out, writes("two")).skipped


def test_an_error_in_the_midst_keeps_what_was_done(out: Path) -> None:
    with pytest.raises(TrainingError):
        stage(out, fails(TrainingError("nan"), after="half"))
    assert set(contents(out)) == {"partial.txt", STARTED}


def test_training_that_stops_at_once_leaves_why(out: Path) -> None:
    with pytest.raises(TrainingError):
        stage(out, fails(TrainingError("nan", finding="not-finite")))
    assert read_json(out / STARTED)["stopped"] == {"message": "nan", "finding": "not-finite"}


def test_a_kill_between_training_and_the_manifest_loses_no_checkpoint(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(folder: Path) -> None:
        (folder / CHECKPOINT).mkdir(exist_ok=True)
        (folder / CHECKPOINT / "state.pt").write_text("all of it")

    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "hash_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(out, work)
    assert (out / CHECKPOINT / "state.pt").read_text() == "all of it"


def test_what_a_kill_behind_the_manifest_left_is_tidied_up_the_next_time(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(out, writes("one"))
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "_tidy", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(out, writes("two"), config=Settings(rate=0.1))
    assert (out / STARTED).exists()
    assert len(list(out.parent.iterdir())) == 2
    assert stage(out, writes("three"), config=Settings(rate=0.1)).skipped
    assert (out / "result.txt").read_text() == "two"
    assert not (out / STARTED).exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def killed(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_the_old_result_goes_when_the_new_one_stands(out: Path) -> None:
    stage(out, writes("one"))
    with pytest.raises(TrainingError):
        stage(out, fails(TrainingError("nan"), after="half"), config=Settings(rate=0.1))
    stage(out, writes("two"), config=Settings(rate=0.2))
    assert (out / "result.txt").read_text() == "two"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_file_to_keep_outlives_a_changed_setting(out: Path, interrupted: bool) -> None:
    """What people were asked belongs to their answers, whether the stage had ended or still waits for them."""

    def asks(folder: Path) -> None:
        (folder / "asked").write_text("first")
        (folder / "other").write_text("x")
        if interrupted:
            raise AnswersMissing(missing=1, task="ranking", group="training", address="here")

    if interrupted:
        with pytest.raises(AnswersMissing):
            stage(out, asks, keep="asked")
    else:
        stage(out, asks, keep="asked")

    def finds(folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {"asked", STARTED}
        assert (folder / "asked").read_text() == "first"

    stage(out, finds, config=Settings(rate=0.1), keep="asked")
    assert set(contents(out)) == {"asked", MANIFEST}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_kept_file_alone_does_not_keep_the_old_result_from_its_place(out: Path) -> None:
    def asks(folder: Path) -> None:
        (folder / "asked").write_text("first")
        (folder / "result.txt").write_text("one")

    stage(out, asks, keep="asked")
    before = contents(out)
    with pytest.raises(DataError):
        stage(out, fails(DataError("bad")), config=Settings(rate=0.1), keep="asked")
    assert contents(out) == before
    with pytest.raises(DataError):  # what it asked is new: it stays
        stage(out, fails(DataError("bad"), after="x"), config=Settings(rate=0.1), keep="asked")
    assert set(contents(out)) == {"asked", "partial.txt", STARTED}


def test_hashes_leave_out_timings_and_checkpoints(tmp_path: Path) -> None:
    for name in (
        "model.bin",
        "metrics.jsonl",
        MANIFEST,
        STARTED,
        "checkpoint/state.pt",
        ".hidden",
        "deep/checkpoint/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(hash_tree(tmp_path)) == ["model.bin"]


def test_a_renamed_file_changes_a_folders_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    before = hash_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert hash_path(tmp_path) != before


def test_a_missing_input_is_said(out: Path) -> None:
    with pytest.raises(DataError, match="does not exist, but a stage needs it"):
        stage(out, writes("x"), inputs={"data": out / "none"})
    assert not out.exists()


def test_a_torn_manifest_is_said(out: Path) -> None:
    stage(out, writes("one"))
    (out / MANIFEST).write_text('{"stage"')
    with pytest.raises(DataError, match="is not a manifest; delete the stage's folder"):
        stage(out, writes("two"))


def test_what_json_cannot_hold_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "y.json")


PEAK = """
import sys
from pathlib import Path
from tastemaker.artefacts import run_stage
block = b"x" * (300 * 2**20)
del block
run_stage(Path(sys.argv[1]), stage="s", config={}, inputs={}, work=lambda folder: {"told": 3})
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux lets the peak begin again")
def test_a_manifest_tells_the_peak_of_its_own_stage_and_what_the_work_returned(tmp_path: Path) -> None:
    """300 MiB were taken and given back before the stage, which takes nothing."""
    subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "s")], check=True)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert 5 < manifest["peak_memory_mb"] < 250
    assert manifest["told"] == 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Settings):
    microbatch_tokens: int = 8192
    decoding: dict[str, int] = field(default_factory=lambda: {"batch_tokens": 10, "max_new_tokens": 5})


def test_settings_of_memory_alone_are_the_same_task(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever lowers them because memory ran out goes on from the checkpoint."""

    def killed(folder: Path) -> None:
        (folder / CHECKPOINT).mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(out, killed, config=Memory())
    less = Memory(microbatch_tokens=512, decoding={"batch_tokens": 7, "max_new_tokens": 5})

    def resumed(folder: Path) -> None:
        assert (folder / CHECKPOINT).exists()
        writes("whole")(folder)

    assert not stage(out, resumed, config=less).skipped
    assert read_json(out / MANIFEST)["config"]["microbatch_tokens"] == 512
    assert stage(out, writes("other"), config=Memory()).skipped
    assert capsys.readouterr().err == ""
    other = Memory(decoding={"batch_tokens": 10, "max_new_tokens": 6})
    assert not stage(out, writes("other"), config=other).skipped


def test_another_version_that_goes_on_is_told_and_remembered(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("one", "two", "two", "one"):
        monkeypatch.setattr(artefacts, "source_hash", lambda version=version: version)
        with pytest.raises(KeyboardInterrupt):
            stage(out, fails(KeyboardInterrupt(), after="half"))
    assert capsys.readouterr().err.count("goes on by another version of Tastemaker than it was begun by") == 2
    stage(out, writes("new"))
    code = read_json(out / MANIFEST)["code"]
    assert (code["source"], code["earlier"]) == ("one", ["one", "two"])
    stage(out, writes("again"), config=Settings(rate=0.1))
    assert "earlier" not in read_json(out / MANIFEST)["code"]


def test_a_kill_while_the_mark_is_written_leaves_what_was_set_aside(out: Path) -> None:
    """A new folder that holds nothing but a torn mark is no result: the one before still waits beside it."""
    stage(out, writes("old"))
    aside = out.with_name(f".{out.name}.before")
    out.rename(aside)
    out.mkdir()
    (out / f".{STARTED}.123.partial").write_text("{")
    with pytest.raises(DataError):
        stage(out, fails(DataError("bad")), config=Settings(rate=0.1))
    assert (out / "result.txt").read_text() == "old"


def test_what_a_kill_left_set_aside_is_put_back_before_anything_is_looked_at(out: Path) -> None:
    """Whether the new folder was there already or not; once there is something new in it, the old one stays aside."""
    stage(out, writes("old"))
    before = contents(out)
    begun: dict[str, str] | None
    for begun in (None, {STARTED: "{}"}, {f".{STARTED}.123.partial": "{"}):
        out.rename(out.with_name(f".{out.name}.before"))
        if begun is not None:
            out.mkdir()
            for name, text in begun.items():
                (out / name).write_text(text)
        with claimed(out):
            assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    out.rename(out.with_name(f".{out.name}.before"))
    out.mkdir()
    (out / "new").write_text("x")
    with claimed(out):
        assert contents(out) == {"new": "x"}


HOLDING = """
import sys, time
from pathlib import Path
from tastemaker.artefacts import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("spelt", ["out", "link/out", "there/../out"])
def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path, spelt: str) -> None:
    """Until the other has ended, by a kill too."""
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "claimed\n"
            with pytest.raises(ConfigError, match=r"another process works in .*out; wait for its end, or give another"):
                stage(tmp_path / spelt, writes("mine"))
            assert not out.exists()
            stage(tmp_path / "neighbour", writes("mine"))
        finally:
            other.kill()
    stage(tmp_path / spelt, writes("mine"))
    assert (out / "result.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_a_claim_that_was_given_up_in_between_is_made_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held the file deletes it when it ends: a lock on what has no name any more keeps nobody out."""
    flock, lock = fcntl.flock, out.with_name(f".{out.name}.lock")

    def late(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(out):
        assert lock.exists()
    assert list(out.parent.iterdir()) == []


def test_a_file_system_without_locks_is_worked_on_all_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    stage(out, writes("one"))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
