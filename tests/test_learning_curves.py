"""The benchmark of learning curves: its modes, runs kept and resumed, differences and how they are read, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks.learning_curves import page
from benchmarks.learning_curves.__main__ import main, read_options
from benchmarks.learning_curves.picture import draw
from benchmarks.learning_curves.results import (
    MODES,
    Comparison,
    Reading,
    Results,
    Run,
    comparisons,
    load,
    paired_difference,
    save,
    spread_of_ratios,
)
from benchmarks.learning_curves.running import FIRST, perform, read_setup
from benchmarks.pages import between
from tests.bases import save_random_base
from tests.runs import SMOKE

from tastemaker import sources
from tastemaker.artefacts import read_json
from tastemaker.checkpoint import new_reward_model, save_reward_model
from tastemaker.config import load_recipe, to_json
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import read_prompts, write_json, write_records
from tastemaker.intervals import Interval
from tastemaker.recipe import Recipe
from tastemaker.records import Prompt
from tastemaker.report.figure import standalone
from tastemaker.settings import PpoConfig
from tastemaker.stages.ppo import PpoRun

ABOUT = {
    "date": "2026-01-02",
    "device": "cpu",
    "processor": "Abacus",
    "cores": 3,
    "threads": 2,
    "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.23"},
    "recipe": "tiny",
    "policy": "ppo-ptx",
    "iterations": 12,
    "batch_size": 7,
    "steps_per_iteration": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the policy stage reads of a finished run of the smoke recipe, with random models."""
    run = tmp_path_factory.mktemp("finished")
    recipe, folder = load_recipe(SMOKE, Recipe), run / "round-1"
    write_json(run / "recipe.json", to_json(recipe))
    write_json(run / "results.json", {})
    prompts = sources.load(recipe.prompts.source, read_prompts, Prompt, seed=recipe.seed)
    write_records(folder / "1-prompts/train.jsonl", prompts[:40])
    init = save_random_base(folder / "3-sft/ppo-init/model", seed=1)
    save_reward_model(folder / "5-reward/main/model", new_reward_model(str(init), seed=2))
    return run


def run_of(mode: str, seed: int, scores: Sequence[float], **more: Any) -> Run:
    """A run with these scores; its KL is ten times as large."""
    flat = [0.0] * len(scores)
    curves = {"score": list(scores), "kl": [10 * score for score in scores], "entropy": [0.5] * len(scores)}
    first = {"ratio_mean": [1.0] * len(scores), "ratio_max": [1.0] * len(scores), "approx_kl": flat}
    return Run(
        mode=mode,
        seed=seed,
        seconds=30.0,
        seconds_per_iteration=0.5,
        curves=curves | {"sampler_mismatch": flat, "clip_fraction": flat},
        first_minibatch=first | {"clip_fraction": flat} | more,
    )


def results(*runs: Run) -> Results:
    return Results(about=ABOUT, runs=runs)


def measured() -> Results:
    """Two modes with three seeds; the second ends 1, 2 and 3 higher, and an iteration of its own does not count."""
    base = {0: 0.0, 1: 5.0, 2: -3.0}
    fp32 = [run_of("fp32-trainer", seed, [9.0, 9.0, *[at] * 10]) for seed, at in base.items()]
    bf16 = [run_of("bf16-trainer", seed, [0.0, 0.0, *[at + seed + 1] * 10]) for seed, at in base.items()]
    return results(*fp32, *bf16, run_of("bf16-trainer", 3, [99.0] * 12))


# --- runs -----------------------------------------------------------------------------------------------------------


def test_all_modes_are_run_and_kept(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(finished), "--iterations", "2", "--threads", "1", "--out", str(tmp_path), "--seeds"]
    main([*command, "4", "7"])
    found = load(tmp_path / "learning-curves.json")
    assert [(run.mode, run.seed) for run in found.runs] == [(mode, seed) for seed in (4, 7) for mode in MODES]
    assert found.about["iterations"] == 2
    for run in found.runs:
        settings = read_json(tmp_path / f"{run.mode}-{run.seed}/manifest.json")["config"]
        precision = {"fp32": "float32", "bf16": "bfloat16"}[run.mode[:4]]
        assert {settings[name]["precision"] for name in ("policy", "value", "decoding")} == {precision}
        assert settings["old_logprobs"] == run.mode[5:]
        assert {len(values) for values in (*run.curves.values(), *run.first_minibatch.values())} == {2}
    of = {mode: list(found.of(mode).values()) for mode in MODES}
    assert spread_of_ratios(of["fp32-trainer"]) < 1e-6
    assert spread_of_ratios(of["fp32-sampler"]) < 5e-5
    assert spread_of_ratios(of["bf16-sampler"]) > 10 * spread_of_ratios(of["fp32-sampler"])
    mismatch = {mode: max(max(run.curves["sampler_mismatch"]) for run in runs) for mode, runs in of.items()}
    assert mismatch["fp32-trainer"] < 5e-5
    assert 0 < mismatch["fp32-sampler"] < 5e-5
    assert mismatch["bf16-trainer"] > 10 * mismatch["fp32-trainer"]
    assert mismatch["bf16-sampler"] > 10 * mismatch["fp32-sampler"]
    assert of["fp32-trainer"][0].curves["score"] != of["fp32-trainer"][1].curves["score"]
    assert "| bf16, sampler (refused) |" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/manifest.json")}
    main([*command, "4", "8", "--modes", "fp32-sampler"])
    assert len(load(tmp_path / "learning-curves.json").runs) == 2
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/manifest.json")}
    assert {path: time for path, time in after.items() if path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {"fp32-sampler-8"}


def test_a_run_that_was_stopped_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(place: str) -> Run:
        setup = read_setup(finished, variant="ppo-ptx", iterations=5, threads=1, out=tmp_path / place)
        return perform(replace(setup, config=replace(setup.config, checkpoint_every=2)), MODES["fp32-sampler"], 3)

    whole = runs("whole")
    plain = PpoRun.observe

    def stopped(self: PpoRun, *arguments: Any) -> Any:
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PpoRun, "observe", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs("stopped")
    assert len((tmp_path / f"stopped/fp32-sampler-3/{FIRST}").read_text().splitlines()) == 3
    resumed = runs("stopped")
    assert resumed.curves == whole.curves
    assert resumed.first_minibatch == whole.first_minibatch


def test_the_product_still_refuses_what_the_experiment_runs() -> None:
    given = PpoConfig(init="base", reward="main")
    settings = MODES["bf16-sampler"].settings(given)
    assert (settings.old_logprobs, settings.policy.precision) == ("sampler", "bfloat16")
    assert given == PpoConfig(init="base", reward="main")
    with pytest.raises(ConfigError, match="needs precision = 'float32'"):
        replace(settings)
    assert [mode.name for mode in MODES.values() if mode.refused] == ["bf16-sampler"]
    for mode in MODES.values():
        if not mode.refused:
            replace(mode.settings(given))


def test_what_cannot_be_run_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a finished run"):
        read_setup(tmp_path, variant="ppo-ptx", iterations=None, threads=1, out=tmp_path)
    with pytest.raises(ConfigError, match="no PPO policy 'dpo'; it has ppo-ptx"):
        read_setup(finished, variant="dpo", iterations=None, threads=1, out=tmp_path)


def test_committed_results_are_of_everything() -> None:
    assert read_options(["run"]).results == page.RESULTS
    for less in (["--iterations", "3"], ["--modes", "fp32-trainer"], ["--seeds", "0", "1"]):
        assert read_options(["run", *less, "--out", "there"]).results == Path("there/learning-curves.json")


# --- differences ----------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed() -> None:
    # differences 1, 2, 3: mean 2, deviation 1; Student's quantile of 2 degrees of freedom is 4.3026527
    difference, interval = paired_difference([1.0, 7.0, 0.0], [0.0, 5.0, -3.0])
    assert difference == 2.0
    assert interval.low == pytest.approx(2 - 4.3026527 / math.sqrt(3), abs=1e-6)
    assert interval.high == pytest.approx(2 + 4.3026527 / math.sqrt(3), abs=1e-6)
    assert paired_difference([0.0, 5.0], [1.0, 6.0]) == (-1.0, Interval(-1.0, -1.0))
    with pytest.raises(DataError, match="at least two seeds"):
        paired_difference([1.0], [2.0])


def test_the_end_is_the_last_ten_iterations_of_the_seeds_that_both_have() -> None:
    found = {one.quantity: one for one in comparisons(measured())}
    assert {(one.mode, one.against) for one in found.values()} == {("bf16-trainer", "fp32-trainer")}
    assert found["score at the end"].difference == pytest.approx(2.0, abs=1e-9)
    assert found["KL at the end"].difference == pytest.approx(20.0, abs=1e-9)
    # the first two iterations are 9 lower: 2 * 10 / 12 - 9 * 2 / 12
    assert found["score over the whole run"].difference == pytest.approx(20 / 12 - 1.5, abs=1e-9)
    # of 0, 5, -3 the variance is 49/3, of 1, 7, 0 it is 43/3
    assert found["score at the end"].between_seeds == pytest.approx(math.sqrt(46 / 3), abs=1e-9)
    assert found["score at the end"].reading is Reading.WITHIN


@pytest.mark.parametrize(
    ("low", "high", "reading"),
    [
        (-0.4, 0.3, Reading.LESS),
        (0.1, 0.4, Reading.LESS),
        (-0.6, 0.3, Reading.WITHIN),
        (-0.3, 0.6, Reading.WITHIN),
        (0.1, 0.6, Reading.BEYOND),
        (-0.6, -0.1, Reading.BEYOND),
    ],
)
def test_a_difference_is_read_by_its_interval(low: float, high: float, reading: Reading) -> None:
    one = Comparison(
        mode="a", against="b", quantity="score", difference=0.1, ci95=Interval(low, high), between_seeds=0.5
    )
    assert one.reading is reading


def test_the_spread_of_ratios_is_that_of_their_logarithms() -> None:
    runs = [run_of("bf16-sampler", seed, [0.0] * 2, approx_kl=[0.5 * a**2, 0.5 * b**2]) for seed, a, b in
            ((0, 0.01, 0.07), (1, 0.05, 0.05))]  # fmt: skip
    assert spread_of_ratios(runs) == pytest.approx(math.sqrt((1 + 49 + 25 + 25) * 1e-4 / 4), abs=1e-9)


# --- file, page and picture -----------------------------------------------------------------------------------------


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = results(*measured().runs, run_of("fp32-trainer", 4, [1 / 3, -2e-9]))
    save(tmp_path / "results.json", found)
    again = load(tmp_path / "results.json")
    assert again.about == ABOUT
    assert again.runs[:-1] == found.runs[:-1]
    assert again.runs[-1].curves["score"] == [0.333333, -2e-9]
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert '"score": [0.333333, -2e-09]' in text
    assert '"reading": "within seed noise"' in text


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    made = tmp_path / "page.md"
    made.write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n", encoding="utf-8")
    page.write(measured(), made, tmp_path / "picture.svg")
    text = made.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old\n" not in text
    assert "seeds 0, 1, 2, 3. 7 runs, 4 minutes." in text
    assert "| bf16-trainer - fp32-trainer | score at the end | +2.000 | [-0.484, +4.484] | 3.916 | within" in text
    assert "Of 3 differences between modes 3 are within the noise of seeds: 1 by an interval that is narrower" in text
    made.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the marks"):
        page.write(measured(), made, tmp_path / "picture.svg")


def test_of_one_seed_there_is_no_comparison() -> None:
    alone = results(run_of("fp32-trainer", 0, [1.0] * 12), run_of("bf16-sampler", 0, [2.0] * 12, approx_kl=[2e-4] * 12))
    text = page.render(alone)
    assert "paired by seed" not in text
    assert "| fp32, trainer | 1.000 | 10.000 | 0.500 | 0.50 |" in text
    assert "spread by 0.0200 on this model; on a real one by more" in text
    assert standalone(draw(alone)).startswith("<svg")


def test_bands_reach_over_all_seeds() -> None:
    figure = draw(measured())
    assert ElementTree.fromstring(standalone(figure)) is not None
    (part,) = figure.parts
    assert len(part.panels) == 4
    assert part.panels[0].count('class="band"') == 2
    assert "bf16, trainer ends at 26.8" in part.panels[0]  # the mean of 1, 7, 0 and 99 is 26.75


@pytest.mark.skipif(not page.RESULTS.exists(), reason="not measured yet")
def test_the_committed_page_is_what_the_committed_results_give() -> None:
    found = load(page.RESULTS)
    made = between(page.PAGE, page.BEGIN, page.END)
    assert made == page.render(found).strip(), "run python -m benchmarks.learning_curves.page"
    assert page.PICTURE.read_text(encoding="utf-8") == standalone(draw(found))
