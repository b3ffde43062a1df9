"""The command line: help at once, exit codes, each stage alone on the user's own files, one after another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tests.models import save_model

from tastemaker import __version__
from tastemaker.artefacts import read_manifest
from tastemaker.cli import COMMANDS, main, usage
from tastemaker.commands.sampling import without_controls
from tastemaker.metrics import read_metrics
from tastemaker.records import Message, Prompt
from tastemaker.responses import TextPiece
from tastemaker.store import LabelService, Store
from tastemaker.store.audit import Actor
from tastemaker.store.lead import LeadService
from tastemaker.store.tasks import Guideline, StudyConfig

HELP = """\
usage: tastemaker COMMAND [options]

Teach a language model by human preference: demonstrations, rankings, a reward model,
PPO or DPO, and blind evaluation.

commands:
"""


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said == usage() + "\n"
    assert said.startswith(HELP)
    for name, (text, _) in COMMANDS.items():
        assert f"  {name}" in said
        assert text in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tastemaker {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: tastemaker {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "without", "has"),
    [
        ("reward", "--init", "--model"),
        ("ppo", "--kind", "--init"),
        ("dpo", "--kind", "--init"),
        ("report", "PATH", "OUT"),
    ],
)
def test_help_shows_what_a_command_needs_and_no_more(
    command: str, without: str, has: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert has in said
    assert without not in said


def test_the_program_is_installed_and_exits_with_the_code() -> None:
    done = subprocess.run([sys.executable, "-m", "tastemaker.cli", "stf"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command 'stf'. Did you mean 'sft'?\n"


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import tastemaker.commands.whole

    def interrupted(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tastemaker.commands.whole, "report", interrupted)
    assert main(["report", "out"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_memory_that_runs_out_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tastemaker.commands.whole

    def too_much(arguments: Sequence[str]) -> None:
        if arguments == ["python"]:
            bytearray(1 << 62)
        if arguments == ["gpu"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if arguments == ["processor"]:
            torch.empty(1 << 60, dtype=torch.uint8)
        raise RuntimeError("something else")

    monkeypatch.setattr(tastemaker.commands.whole, "report", too_much)
    for place, said in (
        ("python", "memory"),
        ("gpu", "allocate 20.00 GiB"),
        ("processor", "1152921504606846976 bytes"),
    ):
        assert main(["report", place]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: memory ran out: ")
        assert said in error
        assert "--max-memory" in error
    with pytest.raises(RuntimeError, match="something else"):
        main(["report", "otherwise"])


def test_the_stages_alone_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From prompts to a judged policy on files in a folder of the user's own, with a judge of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_judge.py").write_text(
        "def likes_w7(prompts, responses, records):\n    return [r.split().count('w7') + 0.0 for r in responses]\n"
    )
    model = str(save_model(tmp_path / "base", max_position_embeddings=64))
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"w{n} w{n + 1}", "user": f"u{n}"} for n in range(3, 33)])
    shown = write(tmp_path / "d.jsonl", [{"prompt": f"w{n}", "completion": f"w7 w{n}"} for n in range(10, 20)])
    ranked = write(
        tmp_path / "r.jsonl", [{"prompt": f"w{n}", "chosen": "w7 w7", "rejected": f"w{n}"} for n in range(20, 40)]
    )
    text = write(tmp_path / "t.jsonl", [{"text": f"w{n} w{n + 2} w{n + 4}"} for n in range(9)])
    short = ["--decoding.max-new-tokens", "5"]
    fast = ["--batch-size", "4", "--threads", "1"]
    episodes = ["--minibatches", "2", "--iterations", "2", "--warmup-iterations", "0", *short]
    mix = ["--text", text, "--ptx-coef", "0.5", "--out", "ppo"]
    policies = ["ppo", "ppo/model", "sft", "sft/model", "dpo", "dpo/model"]
    short_ones = ["--out", "ev", "--max-new-tokens", "5"]
    for command in (
        ["prompts", "--data", prompts, "--out", "prompts"],
        ["sft", "--model", model, "--data", shown, "--out", "sft", "--epochs", "2", *fast],
        ["reward", "--model", "sft/model", "--data", ranked, "--demonstrations", shown, "--out", "rm", *fast],
        ["ppo", "--init", "sft/model", "--reward", "rm/model", "--data", "prompts/train.jsonl", *mix, *fast, *episodes],
        ["dpo", "--init", "sft/model", "--data", ranked, "--validation", ranked, "--out", "dpo", *fast],
        ["evaluate", "--policies", *policies, "--data", prompts, "--judge", "user_judge:likes_w7", *short_ones],
    ):
        assert main(command) == 0, capsys.readouterr().err
        out = command[command.index("--out") + 1]
        assert read_manifest(tmp_path / out) is not None
        assert main(command) == 0
        said = capsys.readouterr().err
        assert f"{out} is up to date" in said
        assert command[0] in ("prompts", "evaluate") or said.endswith(f"; {out}/model\n")
    assert len(read_metrics(tmp_path / "sft" / "metrics.jsonl")) == 2 * 3
    assert results(tmp_path / "rm")["demonstrations_centred"] == 10
    assert "ptx_loss" in read_metrics(tmp_path / "ppo" / "metrics.jsonl")[-1]
    assert results(tmp_path / "dpo")["n"] == 20
    compared = results(tmp_path / "ev")["comparisons"]
    assert [(row["a"], row["b"], row["n"]) for row in compared] == [("ppo", "sft", 30), ("ppo", "dpo", 30)]
    rows = [json.loads(line) for line in (tmp_path / "ev" / "responses.jsonl").read_text().splitlines()]
    assert rows[0]["scores"].keys() == {"ppo", "sft", "dpo"}
    for row in rows:
        assert row["scores"]["sft"] == row["responses"]["sft"].split().count("w7")
    assert results(tmp_path / "ev")["judge"] == {"name": "user_judge:likes_w7", "kind": "function"}
    assert main(["report", "ev"]) == 0
    page = (tmp_path / "ev" / "report.html").read_text(encoding="utf-8")
    assert "<h1>The function user_judge:likes_w7 " in page
    assert page.count('<details class="example"') == 12
    assert main(command) == 0
    assert "ev is up to date" in capsys.readouterr().err, "a report of it is no change to an evaluation"


def test_what_is_sampled_is_what_the_labelling_application_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        save_model(tmp_path / f"m{seed}", seed=seed)
    prompts = write(
        tmp_path / "p.jsonl", [{"prompt": f"w{n}", "user": f"u{n}", "source": "ours"} for n in range(3, 10)]
    )
    command = ["sample", "--policies", "one", "m0", "two", "m1", "--data", prompts, "--out", "candidates"]
    command += ["--responses-per-prompt", "2", "--max-new-tokens", "4", "--threads", "1"]
    assert main(command) == 0
    assert capsys.readouterr().err.endswith("responses: candidates/responses.jsonl\n")
    rows = [json.loads(line) for line in (tmp_path / "candidates/responses.jsonl").read_text().splitlines()]
    assert [row["sources"] for row in rows] == [["one", "one", "two", "two"]] * 7
    assert all(len(row["responses"]) == len(row["finished"]) == 4 for row in rows)
    assert main(command) == 0
    assert "candidates is up to date" in capsys.readouterr().err
    assert main([*command[:-2], "--seed", "1"]) == 2
    assert "holds the result of other settings: seed 0 -> 1" in capsys.readouterr().err

    with Store.open(tmp_path / "labels.db") as store:
        lead, ann = LeadService(store), Actor(name="ann", role="lead")
        guideline = Guideline(version="1", text="Rank the better one first.")
        study = StudyConfig(name="s", kind="ranking", purpose="training", rater_group="training", guideline=guideline)
        lead.create_study(study, actor=ann)
        imported = lead.import_file("s", tmp_path / "candidates/responses.jsonl", actor=ann)
        assert imported.added == 7


def test_a_prompt_is_answered_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_model(tmp_path / "m"))
    rest = ["--policies", "mine", model, "--max-new-tokens", "3", "--threads", "1"]
    assert main(["sample", "--prompt", "w5 w6", "--responses-per-prompt", "2", *rest]) == 0
    said = capsys.readouterr().out
    assert said.count("mine (cut off)") + said.count("mine\n") == 2
    first = said
    assert main(["sample", "--prompt", "w5 w6", "--responses-per-prompt", "2", *rest]) == 0
    assert capsys.readouterr().out == first
    for wrong, says in (
        ([], "give one of these: --data FILE with --out FOLDER, one --prompt TEXT, or --chat"),
        (["--prompt", "w5", "--data", "x"], "give one of these: --data FILE"),
        (["--prompt", "w5", "--chat"], "give one of these: --data FILE"),
        (["--chat", "--responses-per-prompt", "2"], "--chat is with one policy, and one response a turn"),
        (["--prompt", "w5", "--out", "x"], "--data and --out go together"),
        (["--prompt", "w5", "--greedy", "--responses-per-prompt", "2"], "greedy decoding gives the same response"),
        (["--prompt", "w5 " * 3000], "does not fit into the context of"),
    ):
        assert main(["sample", *wrong, *rest]) == 2
        assert says in capsys.readouterr().err


def test_a_response_is_printed_as_it_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_model(tmp_path / "m"))
    rest = ["--policies", "mine", model, "--max-new-tokens", "9", "--threads", "1", "--prompt", "w5 w6"]
    assert main(["sample", *rest]) == 0
    title, *words = capsys.readouterr().out.replace("\n", " ").split()
    assert title == "mine"
    assert main(["sample", "--stream", *rest]) == 0
    streamed = capsys.readouterr().out.replace("\n", " ").split()
    cut_off = words[:2] == ["(cut", "off)"]
    assert streamed == ([title, *words[2:], "(cut", "off)"] if cut_off else [title, *words])
    assert main(["sample", "--stop", words[-1], *rest]) == 0
    said = capsys.readouterr().out
    assert words[-1] not in said
    assert "(cut off)" not in said
    assert main(["sample", "--stream", "--responses-per-prompt", "2", *rest]) == 2
    assert "--stream prints one response as it comes" in capsys.readouterr().err


def enter(lines: Sequence[str], end: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type these lines, and then what raises `end`."""
    keyboard = Mock(side_effect=[*lines, end])
    monkeypatch.setattr("builtins.input", keyboard)


def test_a_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A turn is answered as the same conversation in a file is; what no longer fits ends it."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m", max_position_embeddings=40)
    rest = ["--policies", "mine", "m", "--max-new-tokens", "5", "--threads", "1"]

    def chat(*lines: str) -> int:
        enter(lines, EOFError(), monkeypatch)
        return main(["sample", "--chat", *rest])

    assert chat("\x1b[Aw5 w6\x07", "w7") == 0
    said = capsys.readouterr().out
    first, second = (line.removesuffix(" (cut off)") for line in said.replace("> ", "").splitlines() if line)
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": first}]
    rows = [{"prompt": turns[:1]}, {"prompt": [*turns, {"role": "user", "content": "w7"}]}]
    assert main(["sample", "--data", write(tmp_path / "p.jsonl", rows), "--out", "out", *rest]) == 0
    sampled = [json.loads(line)["responses"] for line in (tmp_path / "out/responses.jsonl").read_text().splitlines()]
    assert sampled == [[first], [second]]
    assert chat("w5 " * 20, "w6 " * 20) == 2
    assert "Begin another one, or lower --max-new-tokens" in " ".join(capsys.readouterr().err.split())
    assert main(["sample", "--chat", *rest, "--max-new-tokens", "40"]) == 2
    assert "does not fit into the context of 40" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_stops_an_answer_and_then_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = list[Sequence[Message]]()

    def stream(policy: Any, prompt: Prompt, **_: Any) -> Iterator[TextPiece]:
        seen.append(prompt.messages)
        yield TextPiece("w7", None)
        raise KeyboardInterrupt

    enter(["w5", "w6"], KeyboardInterrupt(), monkeypatch)
    monkeypatch.setattr("tastemaker.responses.stream_response", stream)
    assert main(["sample", "--chat", "--policies", "mine", str(save_model(tmp_path / "m"))]) == 0
    assert capsys.readouterr().out.count("w7 (stopped)") == 2
    assert [(turn.role, turn.content) for turn in seen[1]] == [("user", "w5"), ("assistant", "w7"), ("user", "w6")]


def test_a_template_that_takes_no_second_turn_is_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "m")
    refusal = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    template = refusal + "{% for message in messages %}{{ message.content }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody was to be asked"))
    assert main(["sample", "--chat", "--policies", "mine", str(model)]) == 2
    assert "one turn only" in " ".join(capsys.readouterr().err.split())


def test_a_models_escape_sequences_do_not_reach_the_terminal() -> None:
    assert without_controls("a\x1b]52;c\x07\tb\nc\x9bd é") == "a\ufffd]52;c\ufffd\tb\nc\ufffdd é"


def test_the_intake_alone_has_what_a_recipe_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": f"w{n}"} for n, role in enumerate(roles)]
    ours = write(tmp_path / "ours.jsonl", [{"messages": turns, "user": "a"}, {"prompt": "w9", "user": "b"}])
    theirs = write(tmp_path / "theirs.jsonl", [{"prompt": "w7", "user": "c"}])
    command = ["prompts", "--data", ours, "--out", "out", "--first-turn-only", "--test-source", theirs]
    command += ["--validation-share", "0", "--test-share", "0"]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [["w0"], ["w9"]]
    (tested,) = (json.loads(line) for line in (tmp_path / "out/test.jsonl").read_text().splitlines())
    assert (tested["messages"][0]["content"], tested["category"]) == ("w7", "theirs")
    write(tmp_path / "theirs.jsonl", [{"prompt": "w8", "user": "c"}])
    capsys.readouterr()
    assert main(command) == 2
    assert "holds the result of other settings" in capsys.readouterr().err
    assert main([*command, "--replace"]) == 0
    assert "w8" in (tmp_path / "out/test.jsonl").read_text()


def test_policies_are_compared_in_the_order_they_are_given_in_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "order_judge.py").write_text("def long(prompts, responses, records):\n    return map(len, responses)\n")
    for seed in range(3):
        save_model(tmp_path / f"m{seed}", seed=seed)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"w{n}"} for n in range(3, 8)])
    rest = ["--data", prompts, "--judge", "order_judge:long", "--out", "ev", "--decoding.max-new-tokens", "3"]

    def first_over_second(*policies: str) -> tuple[str, str, float]:
        assert main(["evaluate", "--policies", *policies, *rest, "--replace"]) == 0
        (row,) = results(tmp_path / "ev")["comparisons"]
        return row["a"], row["b"], row["win_rate"]

    a, b, share = first_over_second("data", "m0", "seed", "m1")
    assert (a, b) == ("data", "seed")
    for _ in range(2):
        a, b, turned = first_over_second("seed", "m1", "data", "m0")
        assert (a, b) == ("seed", "data")
        assert turned == pytest.approx(1 - share)
    assert "ev is up to date" in capsys.readouterr().err
    before = (tmp_path / "ev/responses.jsonl").read_bytes()
    first_over_second("seed", "m2", "data", "m0")
    assert (tmp_path / "ev/responses.jsonl").read_bytes() != before, "another model under the same name"


def test_records_with_personal_data_are_not_trained_on_unless_they_are_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    shown = write(
        tmp_path / "d.jsonl",
        [{"prompt": "w3", "completion": "w4"}, {"prompt": "w5", "completion": "write to ann@farm.example"}],
    )
    command = ["sft", "--model", "base", "--data", shown, "--out", "sft", "--epochs", "1", "--batch-size", "1"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"1 of the 2 records of {shown} hold personal data or secrets and are left out" in said
    assert len(read_metrics(tmp_path / "sft" / "metrics.jsonl")) == 1
    assert main([*command, "--keep-personal-data", "--replace"]) == 0
    assert "personal data" not in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "sft" / "metrics.jsonl")) == 2


def test_a_changed_model_folder_makes_the_next_stage_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = write(tmp_path / "d.jsonl", [{"prompt": "w3", "completion": "w4"}])
    save_model(tmp_path / "base")
    command = ["sft", "--model", "base", "--data", shown, "--out", "sft", "--epochs", "1"]
    assert main(command) == 0
    first = (tmp_path / "sft/model/model.safetensors").read_bytes()
    save_model(tmp_path / "base", seed=1)
    assert main(command) == 2
    assert "sft holds the result of other settings: another --model." in capsys.readouterr().err
    assert (tmp_path / "sft/model/model.safetensors").read_bytes() == first
    assert main([*command, "--replace"]) == 0
    assert (tmp_path / "sft/model/model.safetensors").read_bytes() != first


def test_tasks_go_out_and_answers_come_in_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.stages.conftest import prompt

    from tastemaker.store.tasks import Guideline, NewItem, StudyConfig

    monkeypatch.chdir(tmp_path)
    store = Store.open(tmp_path / "labels.db")
    study = StudyConfig(
        name="s", kind="demonstration", purpose="training", rater_group="g", guideline=Guideline(version="1", text="t")
    )
    LabelService(store).queue(study, [NewItem(key=f"k{n}", prompt=prompt(f"question {n}")) for n in range(3)])
    store.close()
    label = ["label", "--database", "labels.db"]
    assert main([*label, "status"]) == 0
    assert capsys.readouterr().out == "s\tdemonstration\tg\t0/3 answered\n"
    assert main([*label, "tasks", "--study", "s"]) == 2
    assert "needs --rater and --file" in capsys.readouterr().err
    assert main([*label, "tasks", "--study", "x", "--rater", "ann", "--file", "tasks.jsonl"]) == 2
    assert "there is no study 'x'" in capsys.readouterr().err
    assert main([*label, "tasks", "--study", "s", "--rater", "ann", "--file", "tasks.jsonl", "--limit", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert "k0" not in (tmp_path / "tasks.jsonl").read_text()


def test_policies_are_not_sampled_for_prompts_that_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt has no interval, and one that does not fit into the second policy would be found after the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "room_judge.py").write_text("def long(prompts, responses, records):\n    return map(len, responses)\n")
    save_model(tmp_path / "m0", max_position_embeddings=64)
    save_model(tmp_path / "m1", max_position_embeddings=16)
    rest = ["--policies", "a", "m0", "b", "m1", "--judge", "room_judge:long", "--out", "ev", "--max-new-tokens", "3"]
    one = write(tmp_path / "one.jsonl", [{"prompt": "w3"}, {"prompt": "w3"}])
    assert main(["evaluate", "--data", one, *rest]) == 2
    assert "an interval needs two prompts" in capsys.readouterr().err
    two = write(tmp_path / "two.jsonl", [{"prompt": "w3"}, {"prompt": "w4 " * 30}])
    assert main(["evaluate", "--data", two, *rest]) == 2
    said = capsys.readouterr().err
    assert "context of 16 of the policy 'b'" in " ".join(said.split())
    assert "a, T=1" not in said, "nobody was sampled from"
    assert not (tmp_path / "ev").exists()


def test_a_comparison_alone_stops_at_texts_and_tells_the_share_at_equal_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stop_judge.py").write_text("def long(prompts, responses, records):\n    return map(len, responses)\n")
    for seed in range(2):
        save_model(tmp_path / f"m{seed}", seed=seed)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"w{n}"} for n in range(3, 13)])
    rest = ["--judge", "stop_judge:long", "--out", "ev", "--max-new-tokens", "9", "--precision", "bfloat16"]
    assert main(["evaluate", "--policies", "a", "m0", "b", "m1", "--data", prompts, *rest, "--stop", "w"]) == 0
    assert "; at equal length " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ev" / "responses.jsonl").read_text().splitlines()]
    assert not any("w" in text for row in rows for text in row["responses"].values())


def test_equal_responses_of_two_policies_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a judge that scores them at different times makes of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moody_judge.py").write_text(
        "calls = []\n\ndef mood(prompts, responses, records):\n"
        "    calls.append(None)\n    return [len(calls) for _ in responses]\n"
    )
    save_model(tmp_path / "m0")
    save_model(tmp_path / "same")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"w{n}"} for n in range(3, 6)])
    rest = ["--judge", "moody_judge:mood", "--out", "ev", "--max-new-tokens", "3", "--greedy"]
    assert main(["evaluate", "--policies", "a", "m0", "b", "same", "--data", prompts, *rest]) == 0
    (row,) = results(tmp_path / "ev")["comparisons"]
    assert row["win_rate"] == 0.5
