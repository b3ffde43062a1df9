"""What PPO computes between a rollout and a step, against its equations restated in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.float64 import Floats, response_logprobs, response_values
from tests.models import make_library
from tests.stages.conftest import prompt
from tests.stages.test_ppo import CPU, config, run_of
from torch import Tensor

from tastemaker.checkpoint import load_policy
from tastemaker.generation import FinishReason, Rollout
from tastemaker.model import RewardModel
from tastemaker.records import Prompt, Response
from tastemaker.stages.ppo import Experience, PpoRun
from tastemaker.training import StepReport

EXACT = 5e-6  # fp32 against float64
GAMMA, LAM, KL_COEF, PENALTY, TEMPERATURE = 0.9, 0.7, 0.3, 1.5, 0.7
LENGTHS = (5, 2, 7, 3, 11)
SCORES = (2.25, -0.75, 4.5, -1.5, 2.5)
CUT = (False, True, False, False, True)
LAW = {"max_new_tokens": 11, "temperature": TEMPERATURE}


class Given:
    """Scores that are given, and the texts that they were given for."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores, self.texts = list(scores), list[str]()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        self.texts = [response.text for response in responses]
        return self.scores


def away(run: PpoRun, size: float = 0.03) -> PpoRun:
    """The run with a policy that has left its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return run


def made_up(run: PpoRun) -> tuple[list[int], list[Rollout]]:
    """Five ragged rollouts, with log-probs that no model gives."""
    chosen, rollouts = [4, 0, 6, 2, 1], list[Rollout]()
    for row, (length, cut) in enumerate(zip(LENGTHS, CUT, strict=True)):
        ids = [(17 * place + 5 * row) % 89 + 4 for place in range(length)]
        if not cut:
            ids[-1] = run.policy.tokenizer.end_id
        finish = FinishReason.LENGTH if cut else FinishReason.STOP
        rollouts.append(Rollout(tuple(run.prompt_ids[chosen[row]]), ids, [-0.5] * length, finish, 0))
    return chosen, rollouts


# --- from rollouts to advantages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rollout by the equations."""

    logprob: Floats
    ref_logprob: Floats
    reward: Floats
    value: Floats
    advantage: Floats


def by_definition(run: PpoRun, rollout: Rollout, score: float) -> Row:
    """Eq. 2's penalty at every token, the score at the last; A_t = sum over s >= t of (gamma lambda)^(s-t) delta_s."""
    ids = rollout.prompt_ids, rollout.response_ids
    logprob = response_logprobs(run.policy.library, *ids, temperature=TEMPERATURE)
    ref_logprob = response_logprobs(run.reference.library, *ids, temperature=TEMPERATURE)
    assert isinstance(run.value, RewardModel)
    value = response_values(run.value, *ids)
    reward = -KL_COEF * (logprob - ref_logprob)
    reward[-1] += score
    delta = reward + GAMMA * np.append(value[1:], 0.0) - value
    count = len(delta)
    advantage = [sum((GAMMA * LAM) ** (s - t) * delta[s] for s in range(t, count)) for t in range(count)]
    return Row(
        logprob=logprob, ref_logprob=ref_logprob, reward=reward, value=value, advantage=np.array(advantage, dtype=float)
    )


@pytest.mark.parametrize(("truncated", "whiten"), [("penalty", True), ("penalty", False), ("mask", True)])
def test_rollouts_become_what_the_equations_say(base: str, reward_model: str, truncated: str, whiten: bool) -> None:
    settings: dict[str, Any] = {
        "gamma": GAMMA,
        "lam": LAM,
        "kl_coef": KL_COEF,
        "truncated": truncated,
        "truncation_penalty": PENALTY,
        "whiten_advantages": whiten,
        "decoding": LAW,
    }
    run = away(run_of(base, reward_model, **settings))
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    experience, metrics = run.observe(chosen, rollouts, 1)

    lost = [PENALTY if cut and truncated == "penalty" else 0.0 for cut in CUT]
    judged = [score - loss for score, loss in zip(SCORES, lost, strict=True)]
    rows = [by_definition(run, rollout, score) for rollout, score in zip(rollouts, judged, strict=True)]
    trains = [not (cut and truncated == "mask") for cut in CUT]
    trained = np.concatenate([row.advantage for row, counts in zip(rows, trains, strict=True) if counts])
    mean, deviation = (trained.mean(), trained.std()) if whiten else (0.0, 1.0)
    assert abs(trained.mean()) > 0.1
    assert abs(trained.std() - 1) > 0.1

    for place, (row, length, counts) in enumerate(zip(rows, LENGTHS, trains, strict=True)):
        assert experience.mask_BT[place].tolist() == [counts and t < length for t in range(max(LENGTHS))]
        expected = {
            "old_logprob_BT": row.logprob,
            "value_BT": row.value,
            "return_BT": row.advantage + row.value,
            "advantage_BT": counts * (row.advantage - mean) / deviation,
        }
        for name, exact in expected.items():
            found = getattr(experience, name)[place, :length].tolist()
            assert found == pytest.approx(exact.tolist(), abs=EXACT), f"{name} of row {place}"
    penalties = [float((row.logprob - row.ref_logprob).sum()) for row in rows]
    assert min(penalties) < -0.01 < 0.01 < max(penalties)
    assert metrics["kl"] == pytest.approx(np.mean(penalties), abs=EXACT)
    assert metrics["reward"] == pytest.approx(np.mean([row.reward.sum() for row in rows]), abs=EXACT)
    assert metrics["score"] == pytest.approx(1.4, abs=EXACT), "what the reward model said, before any penalty"


def test_with_adapters_the_kl_is_from_the_model_without_them(base: str) -> None:
    pytest.importorskip("peft")
    run = run_of(
        base,
        lora={"rank": 3, "alpha": 7, "targets": ["q_proj", "down_proj"]},
        policy={"learning_rate": 0.02, "schedule": "constant"},
        kl_coef=KL_COEF,
        truncated="score",
        decoding=LAW,
    )
    run.step(0)
    chosen = run.draw_prompt(6, 6)
    rollouts = run.roll_out(chosen, 1)
    _, metrics = run.observe(chosen, rollouts, 1)
    original = load_policy(base).library
    kl = 0.0
    for rollout in rollouts:
        ids = rollout.prompt_ids, rollout.response_ids
        ours = response_logprobs(run.policy.library, *ids, temperature=TEMPERATURE)
        kl += float((ours - response_logprobs(original, *ids, temperature=TEMPERATURE)).sum()) / 6
    assert abs(kl) > 0.01
    assert metrics["kl"] == pytest.approx(kl, abs=EXACT)
    assert metrics["reward"] == pytest.approx(metrics["score"] - KL_COEF * kl, abs=EXACT)


# --- the clips ------------------------------------------------------------------------------------------------------

CLIP, VALUE_CLIP, VALUE_COEF = 0.3, 0.15, 0.7
# By how much policy and value have moved since the rollout, on both sides of either clip. The cycles' lengths are
# prime, so every movement meets every sign of the advantage and of the error.
LOG_RATIOS = (0.5, -0.6, 0.1, -0.05, 0.9)
ADVANTAGES = (1.5, -0.5, 0.75)
VALUE_MOVES = (0.4, -0.35, 0.05, -0.1, 0.3, -0.6, 0.2)
ERRORS = (0.25, -0.5, 1.0)


def spread(pattern: Sequence[float], mask_BT: Tensor) -> Tensor:
    """The pattern over and over, at the places that count."""
    value_BT = torch.zeros(mask_BT.shape)
    value_BT[mask_BT] = torch.tensor(list(islice(cycle(pattern), int(mask_BT.sum()))))
    return value_BT


def since_the_rollout(
    run: PpoRun,
    monkeypatch: pytest.MonkeyPatch,
    *,
    log_ratios: Sequence[float],
    advantages: Sequence[float],
    value_moves: Sequence[float],
    errors: Sequence[float],
) -> Experience:
    """An experience from which policy and value have moved so far; an error is the value now less the return."""
    chosen, rollouts = made_up(run)
    run.scorer = Given(SCORES)
    now, _ = run.observe(chosen, rollouts, 1)
    monkeypatch.setattr(run, "_check_ratio", lambda *given: None)  # it rightly refuses ratios that begin away from 1
    mask_BT = now.mask_BT
    return replace(
        now,
        old_logprob_BT=now.old_logprob_BT - spread(log_ratios, mask_BT),
        value_BT=now.value_BT - spread(value_moves, mask_BT),
        advantage_BT=spread(advantages, mask_BT),
        return_BT=now.value_BT - spread(errors, mask_BT),
    )


@pytest.mark.parametrize("value_function", ["separate", "shared"])
def test_a_step_is_clipped_as_far_as_the_config_says(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, value_function: str
) -> None:
    settings: dict[str, Any] = {
        "clip": CLIP,
        "value_clip": VALUE_CLIP,
        "value_coef": VALUE_COEF,
        "value_function": value_function,
    }
    run = run_of(base, reward_model, batch_size=5, minibatches=1, truncated="score", decoding=LAW, **settings)
    experience = since_the_rollout(
        run,
        monkeypatch,
        log_ratios=LOG_RATIOS,
        advantages=ADVANTAGES,
        value_moves=VALUE_MOVES,
        errors=ERRORS,
    )
    trained, apply = list[float](), run.policy_trainer.apply

    def spy(loss: float, sums: Mapping[str, float]) -> StepReport:
        trained.append(loss)
        return apply(loss, sums)

    monkeypatch.setattr(run.policy_trainer, "apply", spy)
    metrics = run.update(experience, 0)

    surrogate, square, stopped, value_stopped, count = 0.0, 0.0, 0, 0, sum(LENGTHS)
    patterns = (cycle(pattern) for pattern in (LOG_RATIOS, ADVANTAGES, VALUE_MOVES, ERRORS))
    for log_ratio, advantage, move, error in islice(zip(*patterns, strict=True), count):
        ratio = float(np.exp(log_ratio))
        whole, clipped = advantage * ratio, advantage * min(max(ratio, 1 - CLIP), 1 + CLIP)
        surrogate += min(whole, clipped)
        stopped += clipped < whole
        clipped_error = error - move + min(max(move, -VALUE_CLIP), VALUE_CLIP)
        square += max(error**2, clipped_error**2)
        value_stopped += clipped_error**2 > error**2
    value_loss = 0.5 * square / count
    assert metrics["value_loss"] == pytest.approx(value_loss, abs=EXACT)
    shared = VALUE_COEF * value_loss if value_function == "shared" else 0.0
    assert metrics["policy_loss"] == pytest.approx(-surrogate / count, abs=EXACT)
    assert trained == pytest.approx([shared - surrogate / count], abs=EXACT)
    assert 0 < stopped < count
    assert 0 < value_stopped < count
    assert metrics["clip_fraction"] == pytest.approx(stopped / count, abs=1e-9)
    assert metrics["value_clip_fraction"] == pytest.approx(value_stopped / count, abs=1e-9)


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.5, 1.5), (-0.6, -0.5)])
def test_no_gradient_flows_beyond_a_clip(
    base: str, reward_model: str, monkeypatch: pytest.MonkeyPatch, log_ratio: float, advantage: float
) -> None:
    """A value that came 0.4 nearer to its return, by more than the clip of 0.15, is stopped; so is a ratio beyond 1.3
    or below 0.7 that the advantage asked for. The other way round both are pulled back."""
    norms = []
    for sign in (1, -1):
        run = run_of(base, reward_model, batch_size=5, minibatches=1, truncated="score", decoding=LAW)
        run.config = replace(run.config, clip=CLIP, value_clip=VALUE_CLIP)
        moved = since_the_rollout(
            run,
            monkeypatch,
            log_ratios=[log_ratio],
            advantages=[sign * advantage],
            value_moves=[sign * 0.4],
            errors=[-0.25],
        )
        metrics = run.update(moved, 0)
        norms.append((metrics["grad_norm"], metrics["value_grad_norm"]))
    assert norms[0] == (0.0, 0.0)
    assert min(norms[1]) > 0.01


# --- token ids ------------------------------------------------------------------------------------------------------

PIECES = ["<pad>", "<bos>", "<eos>", "a", "b", "c", "ab", "bc", "abc", "ca", "cab"]
MERGES = [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a"), ("c", "ab")]


def save_byte_pairs(folder: Path) -> str:
    """A random model of 11 byte pairs, in which "abc" can be written in four ways."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({piece: place for place, piece in enumerate(PIECES)}, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="<bos>{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    make_library(vocabulary=len(PIECES), max_position_embeddings=64).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def ids_of(*pieces: str) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def byte_pair_run(folder: Path, **changes: Mapping[str, Any]) -> PpoRun:
    prompts = [prompt("abc"), prompt("ca"), prompt("bcab")]
    scorer = Given(SCORES[:3])
    settings = config(batch_size=3, minibatches=1, truncated="score", **changes)
    return PpoRun(settings, save_byte_pairs(folder / "base"), None, scorer, prompts, (), (), CPU, 3)


def test_what_was_sampled_is_what_is_trained_on_however_it_would_be_written_again(tmp_path: Path) -> None:
    run = byte_pair_run(tmp_path)
    responses = [ids_of("a", "b", "c", "<eos>"), ids_of("ab", "c", "a"), ids_of("c", "a", "b", "bc", "<eos>")]
    finishes = [FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP]
    rollouts = [
        Rollout(tuple(run.prompt_ids[row]), ids, [-1.0] * len(ids), finish, 0)
        for row, (ids, finish) in enumerate(zip(responses, finishes, strict=True))
    ]
    texts = ["abc", "abca", "cabbc"]
    tokenizer = run.policy.tokenizer
    again = [
        tokenizer.response_ids(text, finished=finish is FinishReason.STOP)
        for text, finish in zip(texts, finishes, strict=True)
    ]
    assert again == [ids_of("abc", "<eos>"), ids_of("abc", "a"), ids_of("cab", "bc", "<eos>")]

    experience, _ = run.observe([0, 1, 2], rollouts, 1)
    assert isinstance(run.scorer, Given)
    assert run.scorer.texts == texts
    assert experience.sequences == [(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]
    assert experience.response_lengths == [4, 3, 5]
    for row, rollout in enumerate(rollouts):
        exact = response_logprobs(run.policy.library, rollout.prompt_ids, rollout.response_ids)
        found = experience.old_logprob_BT[row, : len(exact)].tolist()
        assert found == pytest.approx(exact.tolist(), abs=EXACT)


def test_rollouts_are_handed_on_as_they_were_sampled(tmp_path: Path) -> None:
    run = byte_pair_run(tmp_path, decoding={"max_new_tokens": 7})
    rollouts = run.roll_out([0, 1, 2], 0)
    tokenizer = run.policy.tokenizer
    again = [
        tokenizer.response_ids(
            tokenizer.response_text(rollout.response_ids), finished=rollout.finish is FinishReason.STOP
        )
        for rollout in rollouts
    ]
    assert any(ids != rollout.response_ids for ids, rollout in zip(again, rollouts, strict=True))
    for rollout in rollouts:
        exact = response_logprobs(run.policy.library, rollout.prompt_ids, rollout.response_ids)
        assert rollout.logprobs == pytest.approx(exact.tolist(), abs=EXACT)
    experience, metrics = run.observe([0, 1, 2], rollouts, 0)
    assert experience.sequences == [(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]
    assert metrics["sampler_mismatch"] < EXACT
