"""What a command that trains says of its data, its settings and its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.models import save_model

from tastemaker.commands.remarks import (
    Record,
    dpo_result,
    ppo_result,
    reward_result,
    sft_result,
    warn_of_dropout,
    warn_of_leaks,
    warn_of_marked,
    warn_of_unknown_tokens,
)
from tastemaker.halves import Part, in_part
from tastemaker.records import About, Demonstration, Message, Prompt, Ranking, Response, Split, Text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose tokenizer knows the words w0 to w92 and no others."""
    return str(save_model(tmp_path_factory.mktemp("model")))


def prompt(text: str) -> Prompt:
    return Prompt(messages=(Message("user", text),))


def test_unknown_tokens_are_counted_in_all_that_a_record_says(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """2 of 8, 1 of 3, 1 of 5, 1 of 2 tokens are unknown; of the last file 1 of 100, which is not more than 1 %."""
    ranked = (Response(text="w2 w3"), Response(text="pear w5"))
    given: dict[str, Sequence[Record]] = {
        "d": [Demonstration(prompt=prompt("w1 apple"), response="w2 w3")] * 2,
        "p": [prompt("w1 w2 apple")],
        "r": [Ranking(prompt=prompt("w1"), responses=ranked, order=((0,), (1,)))],
        "t": [Text(text="pear w5")],
        "few": [Text(text="w1 " * 99 + "pear")],
    }
    warn_of_unknown_tokens(model, given)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {share} % of the tokens of {name} are unknown to this tokenizer."
        for name, share in (("d", 25), ("p", 33), ("r", 20), ("t", 50))
    ]


def test_prompts_on_both_sides_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A held-out prompt may be trained on as it is, or as the beginning of a longer conversation."""
    longer = Prompt(messages=(Message("user", "w4"), Message("assistant", "w5"), Message("user", "w6")))
    rows = [Demonstration(prompt=one, response="w9") for one in (prompt("w1"), prompt("w2"), longer)]
    apart = Demonstration(prompt=prompt("w3"), response="w9")
    warn_of_leaks(rows, [apart])
    assert capsys.readouterr().err == ""
    held_out = [apart, *(Demonstration(prompt=prompt(text), response="w8") for text in ("w1", "w4"))]
    warn_of_leaks(rows, held_out)
    assert "warning: 2 of 3 held-out rows have a prompt that is trained on too." in capsys.readouterr().err
    halves: tuple[Part, ...] = ("first half", "second half")
    for half in halves:
        warn_of_leaks(rows[:1], rows[:1], half)
        assert bool(capsys.readouterr().err) is in_part(rows[0].prompt, half), "the other half does not train"


def test_training_rows_that_are_marked_as_held_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    splits: tuple[Split | None, ...] = ("train", "validation", "test", None)
    asked = [Prompt(messages=(Message("user", f"w{n}"),), about=About(split=one)) for n, one in enumerate(splits)]
    warn_of_leaks([Demonstration(prompt=one, response="w9") for one in asked], [])
    assert capsys.readouterr().err.splitlines() == [
        "warning: of 4 training rows 2 have a 'split' of validation or test, and train all the same."
    ]


def test_many_records_are_sampled_evenly(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_unknown_tokens(model, {"t": [Text(text="w1")] * 1500 + [Text(text="pear")] * 1500})
    assert "50 % of the tokens" in capsys.readouterr().err


def test_a_model_that_is_none_is_left_to_whoever_loads_it(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_unknown_tokens("./nowhere", {"t": [Text(text="pear")]})
    warn_of_dropout("./nowhere", ["--residual-dropout", "0.1"], 0.1)
    assert capsys.readouterr().err == ""


def test_dropout_without_effect_is_told_to_whoever_asks_for_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spelling in (["--residual-dropout", "0.3"], ["--residual_dropout=0.3"]):
        warn_of_dropout(model, ["--epochs", "1", *spelling], 0.3)
        said = capsys.readouterr().err
        assert said == f"warning: {model} has no residual dropout; --residual-dropout 0.3 has no effect.\n"
    warn_of_dropout(model, ["--epochs", "1"], 0.2)  # the default
    warn_of_dropout(model, ["--residual-dropout", "0"], 0.0)
    assert capsys.readouterr().err == ""
    other = str(save_model(tmp_path, "gpt2"))
    capsys.readouterr()
    warn_of_dropout(other, ["--residual-dropout", "0.3"], 0.3)
    assert capsys.readouterr().err == ""


def write(folder: Path, *rows: dict[str, float]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_results_in_a_line(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write(tmp_path, {"loss": 6.084}, {"loss": 3.0, "validation_loss": 2.5}, {"loss": 1.0}, {"validation_loss": 0.84})
    assert sft_result(tmp_path) == f"validation loss 2.50 -> 0.84; {model}"
    write(tmp_path, {"loss": 6.084}, {"loss": 3.0}, {"loss": 1.0})
    assert sft_result(tmp_path) == f"training loss 6.08 -> 1.00; {model}"
    assert dpo_result(tmp_path) == f"training loss 6.08 -> 1.00; {model}"
    write(tmp_path, {"loss": 6.084, "validation_loss": 2.5})
    assert sft_result(tmp_path) == f"validation loss 2.50; {model}"
    rows = ({"score": 0.7, "kl": 0.0, "truncated_rate": 1.0}, {"score": 1.2, "kl": 0.44, "truncated_rate": 0.8})
    write(tmp_path, *rows)
    assert ppo_result(tmp_path) == f"score 0.70 -> 1.20, KL 0.4 nats, 20 % of responses end; {model}"
    results = {"accuracy": 1.0, "ci95": [0.8235, 1.0], "n": 20}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert dpo_result(tmp_path) == f"accuracy 100 % [82, 100] on 20 held-out pairs; {model}"
    assert reward_result(tmp_path) == f"accuracy 100 % [82, 100] on 20 held-out pairs; {model}"
    (tmp_path / "results.json").write_text(json.dumps(results | {"on": "training rankings"}))
    assert reward_result(tmp_path) == f"accuracy 100 % [82, 100] on 20 training pairs; {model}"


def test_prompts_of_ppo_that_are_marked_as_held_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    splits: tuple[Split | None, ...] = ("train", "test", None, "validation")
    warn_of_marked([Prompt(messages=prompt("w1").messages, about=About(split=split)) for split in splits])
    assert "of 4 training rows 2 have a 'split' of validation or test" in capsys.readouterr().err


def test_a_conversation_that_goes_on_from_a_held_out_one_is_trained_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to any of its user turns, not the first alone."""
    turns = [Message("user", "w1"), Message("assistant", "w2"), Message("user", "w3")]
    longer = [*turns, Message("assistant", "w4"), Message("user", "w5")]
    rows = [Demonstration(prompt=Prompt(messages=tuple(messages)), response="w6") for messages in (turns, longer)]
    warn_of_leaks(rows[1:], rows[:1])
    assert "1 of 1 held-out rows have a prompt that is trained on too" in capsys.readouterr().err
    warn_of_leaks(rows[:1], rows[1:])
    assert capsys.readouterr().err == ""
