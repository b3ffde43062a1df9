"""The benchmark's figures: lengths, medians, ratios and shares of the peak by hand, and the committed page."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.bench import measuring, table
from benchmarks.bench.__main__ import commit_of, read_options
from benchmarks.bench.cases import CASES, MODELS, ROWS, fill_of, spread_lengths
from benchmarks.bench.driver import WorkerError, check_same_work, tokens
from benchmarks.bench.measuring import OTHER, Phases
from benchmarks.bench.picture import PICTURE, folded, picture
from benchmarks.bench.results import Results, load, needed_flops, share_of_peak, summary
from benchmarks.pages import between
from hypothesis import given
from hypothesis import strategies as st

GIB = 2**30
SIZES = {"body": 7_000, "head": 300}


def record(name: str, turns: list[list[float]], *, foreign: float = 0.0, **more: Any) -> dict[str, Any]:
    counts = {"prompt": 50, "response": 20, "sequences": 3, "steps of optimizer 1": 1}
    return {
        "name": name,
        "side": "ours" if name.startswith("ours") else "peer",
        "precision": "bfloat16",
        "peak_rss": 3 * GIB,
        "turns": [
            {
                "round": place,
                "foreign": foreign,
                "steps": [{"seconds": one, "phases": {"backward": one / 2}, "counts": counts} for one in steps],
            }
            for place, steps in enumerate(turns)
        ],
    } | more


def results(case: str, *records: dict[str, Any], model: str = "M", task: str = "sft") -> Results:
    engines = {one["name"]: one for one in records}
    about = {"gemm": {"bf16": 2.0, "fp32-onednn": 1.0}}
    content = {"case": case, "model": model, "task": task, "engines": engines, "sizes": SIZES, "about": about}
    return Results(cases={(model, case): content})


# --- what is worked out ---------------------------------------------------------------------------------------------


def test_a_figure_is_the_median_of_the_turns_medians() -> None:
    # the turns' medians are 3, 5 and 4, and theirs is 4; the median of all nine steps is 5
    found = summary(record("ours", [[1.0, 50.0, 3.0], [5.0, 5.0, 5.0], [4.0, 90.0, 4.0]]))
    assert (found.seconds, found.low, found.high) == (4.0, 3.0, 5.0)
    assert found.memory == 3.0
    assert found.phases == {"backward": 2.5}  # over all steps


def test_disturbed_turns_are_counted() -> None:
    assert summary(record("ours", [[1.0], [1.0]], foreign=0.07)).disturbed == 2
    assert summary(record("ours", [[1.0], [1.0]], foreign=0.06)).disturbed == 0


def test_ratio_is_how_many_times_faster_ours_is() -> None:
    ours, peer = summary(record("ours", [[2.0]])), summary(record("peer", [[9.0]]))
    assert table.ratio(ours, peer) == 4.5
    assert table.ratio(ours, None) is None


def test_tokens_are_prompts_and_responses_or_what_was_counted_together() -> None:
    assert tokens({"prompt": 50, "response": 20}) == 70
    assert tokens({"tokens": 33}) == 33


@pytest.mark.parametrize(
    ("task", "name", "precision", "expected"),
    [
        # forward = 2 (7000 * 70 + 300 * 20) = 992,000; the trunk alone 980,000
        ("sft", "ours", "bfloat16", 3 * 992_000),
        ("reward", "ours", "bfloat16", 3 * 980_000),
        ("dpo", "ours", "bfloat16", 4 * 992_000),
        ("rollout", "ours-bf16", "bfloat16", 992_000),
        # rollout, old log-probs, reference; values and scores; both networks' forward and backward in two epochs of two
        # minibatches each
        ("ppo", "ours", "bfloat16", 3 * 992_000 + 2 * 980_000 + 2 * 3 * (992_000 + 980_000)),
        ("ppo", "ours-fp32", "float32", 3 * 992_000 + 2 * 980_000 + 2 * 3 * (992_000 + 980_000)),
        ("ppo", "ours-shared", "bfloat16", 3 * 992_000 + 980_000 + 2 * 3 * 992_000),
    ],
)
def test_needed_operations(task: str, name: str, precision: str, expected: float) -> None:
    measured = summary(record(name, [[1.0]], precision=precision))
    measured = replace(measured, counts={**measured.counts, "steps of optimizer 1": 4})
    assert needed_flops(task, measured, SIZES, "M") == expected


def test_share_of_the_peak_is_of_the_precision_it_computes_in() -> None:
    # 2,976,000 operations in 0.5 s at a peak of 2 GFLOP/s
    found = results("sft-uniform", record("ours", [[0.5]]))
    measured = found.engine("M", "sft-uniform", "ours")
    assert measured is not None
    assert share_of_peak(found, "M", "sft-uniform", measured) == pytest.approx(2_976_000 / 0.5 / 2e9, rel=1e-9)
    found = results("sft-uniform", record("ours", [[0.5]], precision="float32"))
    measured = found.engine("M", "sft-uniform", "ours")
    assert measured is not None
    assert share_of_peak(found, "M", "sft-uniform", measured) == pytest.approx(2_976_000 / 0.5 / 1e9, rel=1e-9)


# --- what was compared ----------------------------------------------------------------------------------------------


def test_engines_that_did_other_work_are_an_error() -> None:
    sft, reward = CASES["sft-uniform"], CASES["reward"]
    ours, peer = record("ours", [[1.0]]), record("peer", [[1.0]])
    check_same_work(sft, {"ours": ours, "peer": peer})
    other = record("peer", [[1.0]])
    for name, amount in (("prompt", 51), ("sequences", 4), ("steps of optimizer 1", 2)):
        step = other["turns"][-1]["steps"][-1]
        step["counts"] = {**record("peer", [[1.0]])["turns"][0]["steps"][0]["counts"], name: amount}
        with pytest.raises(WorkerError, match="sft-uniform: the engines did not do the same work"):
            check_same_work(sft, {"ours": ours, "peer": other})
    step["counts"] = {"prompt": 120, "response": 60, "sequences": 9, "steps of optimizer 1": 1}
    check_same_work(reward, {"ours": ours, "peer": other})  # the peer reads the pairs of a ranking


def test_every_run_says_when_and_where_it_was_measured() -> None:
    about = {"date": "2026-01-02", "commit": "abc", "processor": "P", "cores": 2, "memory_gib": 3, "threads": 2}
    versions: dict[str, Any] = {"versions": {"torch": "2"}}
    cases = {}
    for case, commit, peaks in (("dpo", "abc", 1.0), ("reward", "abc", 3.0), ("rollout", "def", 2.0)):
        engines = {"ours": record("ours", [[1.0]], **versions), "peer": record("peer", [[1.0]], **versions)}
        here = {**about, "commit": commit, "gemm": {"bf16": peaks}}
        cases["M", case] = {"engines": engines, "task": "dpo", "about": here}
    first, second = table._machine(Results(cases=cases)).split("\n\n")
    assert first.startswith(
        "Measured on 2026-01-02, commit abc: P, 2 cores, 3 GiB, 2 threads; ours: torch 2; TRL: torch 2."
    )
    assert first.endswith("2048 x 2048: 1 to 3 GFLOP/s in bf16.")
    assert second.startswith("Rollout on M: measured on 2026-01-02, commit def: ")


def test_turns_that_were_thrown_away_are_counted() -> None:
    again = record("ours", [[1.0], [1.0]])
    again["turns"][1]["tries"] = 3
    assert summary(again).thrown_away == 2
    assert table._quiet(results("sft-uniform", again)).endswith("2 had been thrown away because of it.")


# --- the table ------------------------------------------------------------------------------------------------------


def row_of(rendered: str, title: str) -> list[str]:
    line = next(line for line in rendered.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_both_engines_the_ratios_and_the_aim() -> None:
    found = results("sft-uniform", record("ours", [[2.0]]), record("peer", [[5.0]]), record("peer-switched", [[3.0]]))
    cells = row_of(table._speeds(found, "M"), "SFT step")
    assert cells == ["SFT step", "2.00", "35", "0%", "5.00", "14", "2.5x", "3.00", "1.5x", "2.7x, missed"]


def test_an_aim_that_is_met_is_only_named() -> None:
    found = results("sft-uniform", record("ours", [[2.0]]), record("peer", [[5.4]]))
    assert row_of(table._speeds(found, "M"), "SFT step")[-1] == "2.7x, met"


@pytest.mark.parametrize(
    ("ours", "peer", "shown", "aim"),
    [
        ([1.0, 1.0, 1.0], [2.5, 2.8, 2.9], "2.8x (2.5 to 2.9)", "2.7x, met by the median"),
        ([1.0, 1.0, 1.0], [2.5, 2.6, 2.9], "2.6x (2.5 to 2.9)", "2.7x, missed by the median"),
        ([1.0, 1.0, 1.0], [2.5, 2.6, 2.65], "2.6x (2.5 to 2.6)", "2.7x, missed"),
        # the rounds' ratios are 3, 3 and 3, whatever the machine did meanwhile; so is that of the medians
        ([1.0, 2.0, 3.0], [3.0, 6.0, 9.0], "3.0x", "2.7x, met"),
    ],
)
def test_where_the_rounds_do_not_agree_it_is_said(ours: list[float], peer: list[float], shown: str, aim: str) -> None:
    records = record("ours", [[one] for one in ours]), record("peer", [[one] for one in peer])
    cells = row_of(table._speeds(results("sft-uniform", *records), "M"), "SFT step")
    assert (cells[6], cells[-1]) == (shown, aim)


def test_a_spread_of_turns_is_shown() -> None:
    found = results("sft-uniform", record("ours", [[2.0], [2.5], [2.25]]))
    assert row_of(table._speeds(found, "M"), "SFT step")[1] == "2.25 (2.00 to 2.50)"


def test_memory_beside_the_peers() -> None:
    records = record("ours", [[1.0]]), record("peer", [[1.0]], peak_rss=4 * GIB)
    found = results("ppo-uniform", *records, task="ppo")
    cells = row_of(table._memory(found, "M"), "PPO iteration, bf16 (TRL in fp32)")
    assert cells[1:] == ["3.0", "4.0", "", "0.75x", "at most 0.6x, missed"]
    records = record("ours-bf16", [[1.0]]), record("peer-bf16", [[1.0]], peak_rss=2 * GIB)
    found = results("rollout", *records, task="rollout")
    assert row_of(table._memory(found, "M"), "Rollout, bf16")[1:] == ["3.0", "2.0", "", "1.50x", ""]


def test_ratios_of_engines_that_took_no_turns_with_one_another_are_marked() -> None:
    names = ("ours", "peer", "ours-fp32", "peer-switched")
    found = results("ppo-uniform", *(record(name, [[1.0]]) for name in names), task="ppo")
    rendered = table._speeds(found, "M")
    assert row_of(rendered, "PPO iteration, bf16 (TRL in fp32)")[6:9:2] == ["1.0x", "1.0x†"]
    assert row_of(rendered, "PPO iteration, fp32")[6:9:2] == ["1.0x†", "1.0x"]
    assert "minutes apart" in rendered
    assert "minutes apart" not in table._speeds(results("dpo", record("ours", [[1.0]])), "M")


def test_every_row_names_engines_of_its_case() -> None:
    for row in ROWS:
        names = {engine.name for engine in CASES[row.case].engines}
        assert {row.ours, row.peer, row.switched or row.peer} <= names


def test_not_to_be_behind_vllm_is_an_aim() -> None:
    aim = "not to be behind is the aim"
    for ours, said in ((1.0, f"2.00x; {aim}."), (4.0, f"0.50x; {aim}: missed.")):
        records = record("ours-bf16", [[ours]]), record("vllm", [[2.0]])
        assert said in table._vllm(results("rollout-vllm", *records, task="rollout"), "M")


def test_the_commit_is_named_and_marked_where_code_differs(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    for place in ("src", "benchmarks/results"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "file").write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    named = git("rev-parse", "--short", "HEAD")
    (tmp_path / "benchmarks/results/file").write_text("two")
    assert commit_of(tmp_path) == named
    (tmp_path / "src/file").write_text("two")
    assert commit_of(tmp_path) == f"{named}+"


def test_a_page_keeps_what_stands_around_the_figures(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n", encoding="utf-8")
    table.write(results("sft-uniform", record("ours", [[2.0]])), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{table.BEGIN}\n")
    assert text.endswith(f"{table.END}\nbelow\n")
    assert "old" not in text
    page.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the marks"):
        table.write(results("sft-uniform", record("ours", [[2.0]])), page)


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    made = between(table.PAGE, table.BEGIN, table.END)
    assert made == table.render(load(table.RESULTS)).strip(), "run python -m benchmarks.bench.table"


def test_the_committed_picture_is_what_the_committed_results_give() -> None:
    made = picture(table.RESULTS, load(table.RESULTS))
    assert PICTURE.read_text(encoding="utf-8") == made, "run python -m benchmarks.bench.table"


# --- lengths, phases and the picture --------------------------------------------------------------------------------


@given(count=st.integers(2, 64), longest=st.integers(16, 300))
def test_spread_lengths_have_their_longest_and_their_fill(count: int, longest: int) -> None:
    lengths = spread_lengths(count, longest)
    assert len(lengths) == count
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == longest
    assert min(lengths) >= 4
    if count >= 8:
        assert fill_of(lengths) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_minibatches_divide_the_episodes(model: Any) -> None:
    assert model.sizes.ppo % model.sizes.minibatches == 0


def test_of_nested_phases_the_inner_one_gets_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 8.0, 19.0, 36.0, 39.0])
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    phases = Phases()
    with phases("outer"):
        assert phases.inside("outer")
        with phases("inner"):
            pass
    assert not phases.inside("outer")
    assert phases.take() == {OTHER: 1.0 + 17.0, "outer": 2.0 + 11.0, "inner": 5.0}
    assert phases.take() == {OTHER: 3.0}, "what was taken begins anew"


def test_a_method_is_timed_from_outside_unless_its_phase_is_none() -> None:
    class Owner:
        def twice(self, number: int) -> int:
            return 2 * number

    phases = Phases()
    phases.of(Owner, "twice", lambda _, number: "even" if number % 2 == 0 else None)
    assert [Owner().twice(3), Owner().twice(4)] == [6, 8]
    assert set(phases.take()) == {"other", "even"}
    phases.of(Owner, "thrice", "missing")  # is passed over


def test_small_parts_of_a_bar_are_one() -> None:
    assert folded({"b": 30.0, "tiny": 0.5, "a": 69.0, "small": 0.5}) == [("a", 69.0), ("b", 30.0), ("rest", 1.0)]


def test_what_needs_another_environment_is_measured_when_it_is_named() -> None:
    assert read_options([]).cases == [name for name in CASES if name not in ("rollout-vllm", "ppo-autocast")]
    assert read_options(["--cases", "rollout-vllm,rollout"]).cases == ["rollout-vllm", "rollout"]
    with pytest.raises(SystemExit):
        read_options(["--cases", "cooking"])


def test_only_whole_cases_are_written_into_the_docs() -> None:
    assert read_options(["--cases", "dpo"]).documented
    for some in (["--quick"], ["--engines", "ours"], ["--results", "out/elsewhere"]):
        options = read_options(some)
        assert not options.documented
        assert options.results != table.RESULTS
