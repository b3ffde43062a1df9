"""`tastemaker doctor`: what it reads, what it says, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.doctor.planted import run_ppo, with_old_experience

from tastemaker.artefacts import MANIFEST, STARTED, read_json
from tastemaker.cli import main
from tastemaker.doctor import examine
from tastemaker.errors import ModelError
from tastemaker.metrics import METRICS
from tastemaker.stages.ppo import PpoRun

HEALTHY = Path(__file__).parent / "healthy"


def stage(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def losses(*values: float) -> list[dict[str, Any]]:
    return [{"step": step, "loss": value} for step, value in enumerate(values)]


@pytest.mark.parametrize("run", sorted(path for path in HEALTHY.iterdir() if path.is_dir()), ids=lambda path: path.name)
def test_runs_that_were_healthy_raise_no_alarm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("nothing looks wrong") == len(list(run.rglob("metrics.jsonl"))) + 1
    assert said.endswith(" looked at; nothing looks wrong.\n")


def test_the_demo_has_all_its_stages() -> None:
    found = examine(HEALTHY / "demo-seed-0")
    assert [diagnosis.measured.stage for diagnosis in found] == ["sft", "sft", "reward", "ppo"]
    ppo = found[-1].measured
    assert len(ppo.rows) == 60
    assert ppo.setting("batch_size") == 128
    assert not ppo.in_bfloat16


def test_what_is_wrong_is_said_in_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage(tmp_path / "run" / "round-1" / "3-sft" / "baseline", losses(*[1.0] * 8, *[2.0] * 8))
    stage(tmp_path / "run" / "round-1" / "3-sft" / "ppo-init", losses(*[2.0] * 8, *[1.0] * 8))
    assert main(["doctor", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().out
    assert said == (
        "round-1/3-sft/baseline  SFT, 16 steps, not finished\n"
        "  warning  The loss rises (loss-rising)\n"
        "    Seen: Mean loss 1 over steps 0-3, 2 over 12-15.\n"
        "    Likely cause: a learning rate that is too high\n"
        "      or: a warm-up that is too short\n"
        "    Try: `optimizer.learning_rate` lower by a factor of 3\n"
        "      or: `optimizer.warmup_steps`\n"
        "\n"
        "round-1/3-sft/ppo-init  SFT, 16 steps, not finished\n"
        "  nothing looks wrong\n"
        "\n"
        "2 stages looked at; 1 thing looks wrong in 1 of them. What stands first may explain what follows.\n"
    )
    assert main(["doctor", str(tmp_path / "run" / "round-1" / "3-sft" / "ppo-init")]) == 0


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage(tmp_path / "sft", losses(*[1.0] * 8, *[2.0] * 8))
    assert main(["doctor", str(tmp_path / "sft"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["healthy"]
    (one,) = said["stages"]
    (finding,) = one.pop("findings")
    assert one == {
        "folder": str(tmp_path / "sft"),
        "stage": "sft",
        "steps": 16,
        "finished": False,
        "too_short_to_judge": False,
        "healthy": False,
    }
    assert finding["name"] == "loss-rising"
    assert finding["severity"] == "warning"
    assert finding["seen"] == "Mean loss 1 over steps 0-3, 2 over 12-15."
    assert len(finding["causes"]) == len(finding["try"]) == 2


def test_a_note_is_no_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = losses(*[2.0] * 8, *[1.0] * 8)
    rows[7]["validation_loss"], rows[15]["validation_loss"] = 1.0, 1.2
    assert main(["doctor", str(stage(tmp_path / "sft", rows))]) == 0
    assert "note  The loss on held-out demonstrations rises" in capsys.readouterr().out


def test_a_short_run_is_said_to_be_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(stage(tmp_path / "sft", losses(1.0, 2.0)))]) == 0
    assert "too short for its course to be judged" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["missing", "file", "empty", "no-step"])
def test_what_cannot_be_read_is_an_error(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    stage(tmp_path / "empty", [])
    stage(tmp_path / "no-step", [{"loss": 1.0}])
    assert main(["doctor", str(tmp_path / given)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / given}")
    assert said.count("\n") == 1


def test_what_belongs_to_no_finished_stage_is_left_alone(tmp_path: Path) -> None:
    """Folds of a reward model's cross-validation, and a result that waits to be replaced."""
    run = stage(tmp_path / "run", losses(*[2.0] * 8, *[1.0] * 8))
    stage(run / "checkpoint" / "fold-1", losses(*[1.0] * 8, *[2.0] * 8))
    stage(run / ".ppo.before", losses(*[1.0] * 8, *[2.0] * 8))
    assert [diagnosis.measured.folder for diagnosis in examine(run)] == [run]


def test_a_last_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    run = stage(tmp_path / "run", losses(1.0, 0.9))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run / MANIFEST).write_text('{"config": ')
    (diagnosis,) = examine(run)
    assert len(diagnosis.measured.rows) == 2
    assert diagnosis.measured.config == {}


def test_a_run_that_its_own_check_stopped_leaves_behind_why(
    talker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_ppo(tmp_path / "ppo", talker, seed=0, iterations=4, run=with_old_experience(2))
    assert not (folder / MANIFEST).exists()
    assert read_json(folder / STARTED)["stopped"]["finding"] == "ratio-not-1"
    assert main(["doctor", str(folder)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "fault The ratio is off 1 at an iteration's first minibatch (ratio-not-1)" in said
    assert "The run stopped after step 1: at the first minibatch of iteration 2 new and old log-probs differ" in said
    run_ppo(folder, talker, seed=0, iterations=4)
    assert main(["doctor", str(folder)]) == 0, "it went on, rightly, and finished"


def with_a_nan(at: int) -> type[PpoRun]:
    """The policy's weights are no numbers from an iteration on, so nothing can be sampled from it."""

    class Broken(PpoRun):
        def step(self, iteration: int) -> dict[str, float]:
            if iteration >= at:
                with torch.no_grad():
                    next(self.policy.parameters()).fill_(torch.nan)
            return super().step(iteration)

    return Broken


@pytest.mark.parametrize("at", [0, 2])
def test_a_run_that_diverges_says_so_even_at_its_first_step(
    at: int, talker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(ModelError):
        run_ppo(tmp_path / "6-policy" / "ppo", talker, seed=0, iterations=4, run=with_a_nan(at))
    assert main(["doctor", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "6-policy/ppo PPO, " in said
    assert "(not-finite)" in said
    assert "logits that are not finite" in said
    run_ppo(tmp_path / "6-policy" / "ppo", talker, seed=0, iterations=4)
    assert main(["doctor", str(tmp_path)]) == 0, "it went on, rightly, and finished"


def test_a_result_that_was_there_comes_back_where_the_next_one_stops_at_once(talker: str, tmp_path: Path) -> None:
    folder = run_ppo(tmp_path / "ppo", talker, seed=0, iterations=2)
    before = read_json(folder / MANIFEST)
    with suppress(ModelError):
        run_ppo(folder, talker, seed=1, iterations=2, run=with_a_nan(0))
    assert read_json(folder / MANIFEST) == before
    assert not (folder / STARTED).exists()


def test_ppo_measures_what_the_doctor_asks_for(talker: str, tmp_path: Path) -> None:
    (diagnosis,) = examine(run_ppo(tmp_path / "ppo", talker, seed=3, iterations=2))
    row = diagnosis.measured.rows[-1]
    assert row["score_spread"] > 0.3
    assert 0 <= row["first_log_ratio"] < 1e-5
    assert set(row) - {"step"} <= set(METRICS)
    assert diagnosis.measured.setting("policy.precision") == "float32"


def test_it_starts_without_torch(tmp_path: Path) -> None:
    run = stage(tmp_path / "run", losses(*[2.0] * 8, *[1.0] * 8))
    code = (
        f"import sys\nfrom tastemaker.cli import main\nassert main(['doctor', {str(run)!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'scipy'} & {name.partition('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
