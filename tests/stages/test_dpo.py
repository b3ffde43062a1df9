"""DPO: the loss at step 0, sums of log-probs, which pairs, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.conftest import prompt, ranking
from transformers import AutoModelForCausalLM

from tastemaker.checkpoint import load_policy
from tastemaker.config import from_mapping
from tastemaker.errors import ModelError
from tastemaker.halves import in_part
from tastemaker.metrics import read_metrics
from tastemaker.records import Ranking, Response, with_about
from tastemaker.stages.dpo import DpoConfig, as_pairs, correct_pairs, pair_logprobs, train_dpo
from tastemaker.training import Trainer

CPU = torch.device("cpu")
RANKINGS = [ranking(f"w{n} w3", ["w7 w8", "w9", f"w{n} w{n} w{n}"], ((0,), (1, 2))) for n in range(20, 31)]


def config(**changes: Any) -> DpoConfig:
    small: dict[str, Any] = {
        "init": "",
        "batch_size": 5,
        "epochs": 2,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
    }
    return from_mapping(DpoConfig, small | changes, where="test")


def train(folder: Path, base: str, settings: DpoConfig, **more: Any) -> list[dict[str, Any]]:
    train_dpo(folder, config=settings, init=base, rankings=RANKINGS, device=CPU, seed=1, **more)
    return read_metrics(folder / "metrics.jsonl")


def test_the_loss_is_log_2_at_step_0_and_falls(base: str, tmp_path: Path) -> None:
    rows = train(tmp_path, base, config(), validation=RANKINGS[:3])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["loss"] < math.log(2) - 0.02
    assert len(rows) == 2 * math.ceil(22 / 5), "11 rankings of one above two tied ones: 22 pairs"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"] > 0.9
    assert results["n"] == 6


def test_an_untrained_policy_is_right_half_the_time(base: str, tmp_path: Path) -> None:
    """Policy and reference are equal, so no implicit reward favours anybody; a step of 1e-12 changes no weight."""
    still = {"learning_rate": 1e-12, "schedule": "constant"}
    one_at_a_time = config(optimizer=still, epochs=1, microbatch_tokens=1)  # not packed as the reference was
    for folder, settings in (("together", config(optimizer=still, epochs=1)), ("alone", one_at_a_time)):
        rows = train(tmp_path / folder, base, settings, validation=RANKINGS[:3])
        assert [row["accuracy"] for row in rows] == [0.5] * len(rows)
        results = json.loads((tmp_path / folder / "results.json").read_text())
        assert results["accuracy"] == 0.5


def test_a_margin_of_rounding_counts_half() -> None:
    """Reference (-3, -6), so that 2e-6 (1 + 9) = 2e-5 nats are rounding."""
    reference_P2 = torch.tensor([[-3.0, -6.0]]).expand(5, 2)
    gains = [0.0, 1e-5, -1e-5, 1e-4, -1e-4]
    policy_P2 = reference_P2.double() + torch.tensor([[gain, 0.0] for gain in gains]).double()
    assert correct_pairs(policy_P2, reference_P2.double()).tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]
    # What the rejected response gains counts against the pair.
    assert correct_pairs(policy_P2.flip(1), reference_P2.double().flip(1)).tolist() == [0.5, 0.5, 0.5, 0.0, 1.0]


def test_a_half_is_all_that_is_learned_from(base: str, tmp_path: Path) -> None:
    inside = sum(in_part(ranking.prompt, "first half") for ranking in RANKINGS)
    assert 0 < inside < len(RANKINGS)
    assert len(train(tmp_path, base, config(part="first half", epochs=1))) == math.ceil(2 * inside / 5)


def test_ipo_starts_at_the_square_of_half_the_inverse_of_beta(base: str, tmp_path: Path) -> None:
    """(0 - 1 / (2 * 0.25))^2 = 4."""
    gentle = {"learning_rate": 1e-4, "schedule": "constant"}
    rows = train(tmp_path, base, config(variant="ipo", beta=0.25, optimizer=gentle))
    assert rows[0]["loss"] == pytest.approx(4.0, abs=1e-4)
    assert rows[-1]["loss"] < 4.0


def test_smoothed_labels_start_at_log_2_too(base: str, tmp_path: Path) -> None:
    assert train(tmp_path, base, config(label_smoothing=0.2, epochs=1))[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_log_probs_are_sums_over_the_response_and_its_end(base: str) -> None:
    policy = load_policy(base)
    library = AutoModelForCausalLM.from_pretrained(base)
    pairs = as_pairs([ranking("w5 w3", ["w7 w8 w9", "w6"], ((1,), (0,)))], policy)
    trainer = Trainer(policy, config().optimizer, total_steps=1)
    read, hidden = list[int](), policy.hidden
    policy.hidden = lambda packed: (read.append(len(packed.id_N)), hidden(packed))[1]  # type: ignore[method-assign, func-returns-value]
    (sums,) = pair_logprobs(policy, pairs, config(), trainer).tolist()
    once = sum(len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    assert read == [once], "the prompt is read once for both"
    opening = [1, 4, 9, 7, 5]
    for found, response in zip(sums, ([10, 2], [11, 12, 13, 2]), strict=True):
        ids = torch.tensor([[*opening, *response]])
        logprob_TV = library(input_ids=ids).logits[0].detach().log_softmax(-1)
        by_hand = sum(float(logprob_TV[len(opening) - 1 + place, token]) for place, token in enumerate(response))
        assert found == pytest.approx(by_hand, abs=1e-4)


def test_pairs_are_the_untied_ones_each_closed_as_it_was_sampled(base: str) -> None:
    policy = load_policy(base)
    cut = Ranking(
        prompt=prompt("w5"),
        responses=(Response(text="w6"), Response(text="w7", finished=False), Response(text="w8"), Response(text="")),
        order=((1,), (0, 2), (3,)),
    )
    pairs = as_pairs([cut], policy)
    assert [(pair.chosen_ids, pair.rejected_ids) for pair in pairs] == [
        ((10, 2), (2,)),
        ((11,), (10, 2)),
        ((11,), (12, 2)),
        ((11,), (2,)),
        ((12, 2), (2,)),
    ]
    assert as_pairs([ranking("w5", ["w6", "w7"], ((0, 1),))], policy) == []


def test_pairs_of_one_text_are_left_out(base: str) -> None:
    """`w6` stands twice, with `w7` in between: of three untied pairs two are of different texts."""
    pairs = as_pairs([ranking("w5", ["w6", "w7", "w6"], ((0,), (1,), (2,)))], load_policy(base))
    assert [(pair.chosen_ids, pair.rejected_ids) for pair in pairs] == [((10, 2), (11, 2)), ((11, 2), (10, 2))]


def test_pairs_are_grouped_by_their_conversation_and_not_by_their_row(base: str) -> None:
    rows = [ranking(text, ["w6", "w7"], ((0,), (1,)), rater=rater) for text in ("w5", "w8") for rater in "ab"]
    named = [replace(row, prompt=with_about(row.prompt, id=str(number))) for number, row in enumerate(rows)]
    first, second, third, fourth = (pair.prompt for pair in as_pairs(named, load_policy(base)))
    assert first == second != third == fourth


def test_of_a_longer_prompt_the_end_is_learned_from(base: str) -> None:
    policy = load_policy(base)
    rows = [ranking("w5 w3", ["w7", "w6"], ((1,), (0,)))]
    for limit, expected in ((None, (1, 4, 9, 7, 5)), (5, (1, 4, 9, 7, 5)), (3, (1, 7, 5)), (1, (5,))):
        (pair,) = as_pairs(rows, policy, limit)
        assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (expected, (10, 2), (11, 2))


def test_a_pair_longer_than_the_context_is_refused(base: str) -> None:
    with pytest.raises(ModelError, match="pairs are longer than the model's context of 64"):
        as_pairs([ranking("w5", ["w6", "w7 " * 70], ((0,), (1,)))], load_policy(base))


def test_the_size_of_micro_batches_changes_nothing(base: str, tmp_path: Path) -> None:
    steady = {"learning_rate": 0.05, "schedule": "constant", "epsilon": 1.0}
    found = []
    for budget in (20, 10_000):
        folder = tmp_path / str(budget)
        train(folder, base, config(epochs=1, microbatch_tokens=budget, optimizer=steady))
        found.append(load_policy(str(folder / "model")).library.state_dict())
    assert all((found[0][name] - found[1][name]).abs().max() < 1e-5 for name in found[0])
    start = load_policy(base).library.state_dict()
    assert any((found[0][name] - start[name]).abs().max() > 1e-4 for name in start)


def test_what_is_cut_and_what_is_left_out_is_said(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ranking("w5 w6 w7", ["w8", "w9"], ((0,), (1,))), ranking("w5", ["w8", "w9", "w10"], ((0,), (1, 2)))]
    rows.append(replace(rows[1], responses=(Response(text="", finished=False), *rows[1].responses[1:])))
    policy = load_policy(base)
    whole = len(as_pairs(rows[:1], policy)[0].prompt_ids)
    assert capsys.readouterr().err == ""
    pairs = as_pairs(rows, policy, whole - 1)
    assert [len(pair.prompt_ids) < whole for pair in pairs] == [True] * 3
    assert capsys.readouterr().err.splitlines() == [
        "  1 of 3 prompts are longer than max_prompt_tokens; of those the end is read",
        "  2 of 5 pairs have an empty response and are left out",
    ]
