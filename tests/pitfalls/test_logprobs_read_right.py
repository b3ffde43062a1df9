"""Pitfalls 23 to 28: log-probs of the right token, by the right weights, in enough digits, averaged over what counts.

Dimensions in names: B rollouts, T response tokens, M places, V vocabulary, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.float64 import response_logprobs
from tests.models import VOCABULARY, make_library
from tests.pitfalls.bigrams import save_bigrams, set_bigrams, set_values
from tests.stages.test_ppo import run_of
from tests.stages.test_ppo_equations import SCORES, Given, away, made_up
from torch import nn

from tastemaker.checkpoint import load_policy, new_reward_model, save_policy, save_reward_model
from tastemaker.clipping import ratio_sums
from tastemaker.generation import FinishReason, Generator, Rollout, Sampling
from tastemaker.generation.sampling import choose
from tastemaker.head import target_logprobs
from tastemaker.lora import adapters_off
from tastemaker.losses import policy_loss
from tastemaker.model import _predict_chunk
from tastemaker.stages.ppo import Experience
from tastemaker.training import StepReport

EXACT = 5e-6  # fp32 against float64
LONG: dict[str, Any] = {"max_new_tokens": 11}  # what the made up rollouts need


# --- 23: softmax in half precision ------------------------------------------------------------------------------------

LARGE = 4099  # a sum of so many bf16 numbers loses all but the largest


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_23_the_softmax_is_taken_in_bf16(temperature: float) -> None:
    """Logits come out of the last product in bf16 and stay so in the log-softmax: sums over the vocabulary lose their
    small terms, probabilities do not add up to 1, and a log-prob is off by tenths.

    Source: OpenRLHF/OpenRLHF#634, OpenRLHF/OpenRLHF#718.
    Here: `head.target_logprobs`, the trainer's, and `sampling.choose`, the sampler's, take what the product gave in
    fp32 before anything else.
    """
    generator = torch.Generator().manual_seed(1)
    hidden_MD = 4 * torch.randn(1, 13, generator=generator).bfloat16()
    weight_VD = torch.randn(LARGE, 13, generator=generator).bfloat16()
    exact_V = ((hidden_MD @ weight_VD.T)[0].double() / temperature).log_softmax(0)
    assert exact_V.max() - exact_V.min() > 50
    everything = hidden_MD.expand(LARGE, -1), weight_VD, torch.arange(LARGE)
    logit_MV = (hidden_MD @ weight_VD.T).expand(LARGE, -1)
    of_other_heads = _predict_chunk(nn.Identity(), logit_MV, torch.arange(LARGE), LARGE, temperature, False)
    for found_V in (target_logprobs(*everything, temperature=temperature)[0], of_other_heads[0]):
        torch.testing.assert_close(found_V.double(), exact_V, rtol=0, atol=1e-5)
        assert float(found_V.double().exp().sum()) == pytest.approx(1, abs=1e-5)

    law = Sampling(max_new_tokens=1, stop_token_ids=(), temperature=temperature)
    logit_BV = (hidden_MD @ weight_VD.T).expand(17, -1)
    token_B, logprob_B = choose(logit_BV.clone(), torch.linspace(0.01, 0.99, 17), law)
    assert len(set(token_B.tolist())) > 2
    torch.testing.assert_close(logprob_B.double(), exact_V[token_B], rtol=0, atol=1e-5)


# --- 24: off by one ---------------------------------------------------------------------------------------------------

ASKED, FIRST, SECOND, END, OTHER = 5, 14, 24, 2, 40  # a prompt ends in the template's w1, which has the id 5


def test_24_logits_mask_and_values_are_shifted_against_each_other(tmp_path: Path) -> None:
    """A log-prob is read where its own token stands, or a value behind the token that it should judge, by a slice that
    is off by one. Everything still runs and trains, on the neighbours' numbers.

    Source: CarperAI/trlx#509; allenai/open-instruct#1549 (shifted twice); volcengine/verl#3287.
    Here: `Packed.predicted` alone says where a response's tokens are predicted, for policy, reference and values.
    """
    # The policy says 3/4, 1/8 and 3/4 of three tokens, the reference 1/2, 1/4 and 3/4. With beta 1/2 the penalties are
    # -ln(3/2) / 2, ln(2) / 2 and 0, and the last token has the score 2. Values are 1/2 after the prompt, -1 and 3/2
    # after the tokens before the last, and 9 after the end, where none is read. With lambda 1/2:
    # A_3 = 2 - 3/2; A_2 = ln(2) / 2 + 3/2 + 1 + A_3 / 2; A_1 = -ln(3/2) / 2 - 1 - 1/2 + A_2 / 2.
    reference = {
        ASKED: {FIRST: 1 / 2, OTHER: 1 / 2},
        FIRST: {SECOND: 1 / 4, OTHER: 3 / 4},
        SECOND: {END: 3 / 4, OTHER: 1 / 4},
        END: {END: 1.0},
    }
    policy = reference | {ASKED: {FIRST: 3 / 4, OTHER: 1 / 4}, FIRST: {SECOND: 1 / 8, OTHER: 7 / 8}}
    base = save_bigrams(tmp_path / "base", reference)
    judge = new_reward_model(base, seed=0)
    set_values(judge.library, {ASKED: 0.5, FIRST: -1.0, SECOND: 1.5, END: 9.0})
    save_reward_model(tmp_path / "reward", judge)
    settings: dict[str, Any] = {"kl_coef": 0.5, "lam": 0.5, "truncated": "score", "whiten_advantages": False}
    run = run_of(base, str(tmp_path / "reward"), **settings)
    set_bigrams(run.policy.library, policy)
    run.scorer = Given([2.0, -1.0])
    assert [ids[-1] for ids in run.prompt_ids[:2]] == [ASKED, ASKED]
    rollouts = [
        Rollout(tuple(run.prompt_ids[0]), [FIRST, SECOND, END], [0.0] * 3, FinishReason.STOP, 0),
        Rollout(tuple(run.prompt_ids[1]), [OTHER], [0.0], FinishReason.LENGTH, 0),
    ]
    experience, metrics = run.observe([0, 1], rollouts, 1)
    assert experience.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    found = [experience.old_logprob_BT[0], experience.value_BT[0], experience.advantage_BT[0]]
    third = 0.5
    second = math.log(2) / 2 + 2.5 + third / 2
    first = -math.log(3 / 2) / 2 - 1.5 + second / 2
    by_hand = [[math.log(3 / 4), math.log(1 / 8), math.log(3 / 4)], [0.5, -1.0, 1.5], [first, second, third]]
    for ours, theirs in zip(found, by_hand, strict=True):
        assert ours.tolist() == pytest.approx(theirs, abs=1e-5)
    assert experience.return_BT[1, 0].item() == pytest.approx(-1 + math.log(2) / 2, abs=1e-5)
    assert metrics["kl"] == pytest.approx((math.log(3 / 2) - math.log(2) + math.log(1 / 2)) / 2, abs=1e-5)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_24_another_token_changes_its_own_log_prob_and_what_comes_later(base: str, place: int) -> None:
    """Its state's value was there before it was drawn."""
    run = run_of(base, decoding=LONG, truncated="score")
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    changed = list(rollouts[2].response_ids)
    changed[place] = 60 if changed[place] != 60 else 61
    others = [*rollouts[:2], replace(rollouts[2], response_ids=changed), *rollouts[3:]]
    before, after = (run.observe(chosen, each, 1)[0] for each in (rollouts, others))
    moved_BT = (before.old_logprob_BT - after.old_logprob_BT).abs() > 1e-5
    value_moved_BT = (before.value_BT - after.value_BT).abs() > 1e-5
    assert len(changed) == 7
    assert moved_BT[2].tolist() == [t >= place for t in range(7)] + [False] * 4
    assert value_moved_BT[2].tolist() == [t > place for t in range(7)] + [False] * 4
    for row in (0, 1, 3, 4):
        assert not moved_BT[row].any()
        assert not value_moved_BT[row].any()


# --- 25: means over padding -------------------------------------------------------------------------------------------


def test_25_entropy_and_ratio_are_averaged_over_padding(base: str) -> None:
    """A mean over the padded rectangle takes zeros, or a sentinel, for tokens: entropy reads too low, the ratio is
    drawn to 1, and both follow the lengths of the responses.

    Source: huggingface/trl#2022, huggingface/trl#2496.
    Here: `PpoRun.observe` picks the tokens that count before it sums, `clipping.ratio_sums` puts 0 in place of the
    others, and both are divided by the number that count, so a batch of ragged rows says what its rows say one by one,
    where nothing is padded.
    """
    run = away(run_of(base, decoding=LONG, truncated="score", whiten_advantages=False))
    chosen, rollouts = made_up(run)
    rollouts = [replace(one, logprobs=[-0.5 - place] * len(one.logprobs)) for place, one in enumerate(rollouts)]
    together, metrics = run.observe(chosen, rollouts, 1)
    alone = [run.observe([index], [rollout], 1) for index, rollout in zip(chosen, rollouts, strict=True)]
    assert [one.mask_BT.shape[1] for one, _ in alone] == [5, 2, 7, 3, 11]
    lengths = [one.response_lengths[0] for one, _ in alone]
    for name in ("entropy", "sampler_mismatch", "sampler_ratio"):
        rows = [said[name] for _, said in alone]
        assert max(rows) - min(rows) > 0.1
        assert metrics[name] == pytest.approx(np.average(rows, weights=lengths), rel=1e-5)
    for name in ("kl", "reward", "score", "response_tokens"):
        assert metrics[name] == pytest.approx(np.mean([said[name] for _, said in alone]), abs=1e-5)
    assert metrics["sampler_mismatch_max"] == max(said["sampler_mismatch_max"] for _, said in alone)
    value_M, return_M = (part_BT[together.mask_BT].double() for part_BT in (together.value_BT, together.return_BT))
    explained = 1 - float((return_M - value_M).var() / return_M.var())
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-5)

    away(run, 0.01)  # the policy moves on, so that ratios are not 1
    sums = run._policy_loss(together, range(5), 28.0).sums
    parts = [run._policy_loss(one, [0], 28.0).sums for one, _ in alone]
    for name in ("ratio", "abs_log_ratio", "square_log_ratio", "clipped", "policy_loss"):
        assert float(sums[name]) == pytest.approx(sum(float(part[name]) for part in parts), abs=1e-4)
    assert abs(sums["ratio"] / 28 - 1) > 1e-3


@pytest.mark.parametrize("sentinel", [0.0, 1.0, -9999.0, math.nan])
def test_25_what_stands_at_padding_is_not_looked_at(sentinel: float) -> None:
    """Two tokens whose ratios are e^0.5 and e^-0.25, and three places of padding with the sentinel for a log-prob."""
    mask_BT = torch.tensor([[True, True, False, False, False]])
    logprob_BT = torch.tensor([[-0.5, -1.25, sentinel, sentinel, sentinel]], dtype=torch.float64)
    old_BT, advantage_BT = torch.tensor([[-1.0, -1, 0, 0, 0]]).double(), torch.tensor([[1.5, -1, 7, 7, 7]]).double()
    sums = ratio_sums(logprob_BT, old_BT, advantage_BT, mask_BT, clip=0.2)
    assert sums["ratio"] == pytest.approx(math.exp(0.5) + math.exp(-0.25), abs=1e-12)
    assert sums["abs_log_ratio"] == pytest.approx(0.75, abs=1e-12)
    assert sums["clipped"] == 2
    assert sums["largest"] == pytest.approx(math.exp(0.5), abs=1e-12)
    lower = ratio_sums(logprob_BT - 1, old_BT, advantage_BT, mask_BT, clip=0.2)
    assert lower["largest"] == pytest.approx(math.exp(-0.5), abs=1e-12), "a padding's ratio of 1 would be larger"
    loss = policy_loss(logprob_BT, old_BT, advantage_BT, mask_BT, clip=0.2, num_tokens=2)
    assert float(loss) == pytest.approx(-(1.5 * 1.2 - 0.8) / 2, abs=1e-12)


# --- 26: stale weights ------------------------------------------------------------------------------------------------


def distances(library: Any, rollouts: Sequence[Rollout]) -> list[float]:
    """Between what the engine says of its tokens and what a model says of them."""
    return [
        abs(ours - theirs)
        for rollout in rollouts
        for ours, theirs in zip(
            rollout.logprobs, response_logprobs(library, rollout.prompt_ids, rollout.response_ids), strict=True
        )
    ]


@pytest.mark.parametrize(("decoding", "tolerance"), [({}, EXACT), ({"precision": "bfloat16"}, 0.05)])
def test_26_rollouts_come_from_weights_of_before_the_update(
    base: str, decoding: dict[str, Any], tolerance: float
) -> None:
    """The engine has a copy of the weights, or a cache that they filled, and the update does not reach it: every
    rollout is a step or more behind the policy that is told to have sampled it.

    Source: PrimeIntellect-ai/prime-rl#1650; NVIDIA-NeMo/RL#4018; volcengine/verl#7904; huggingface/trl#7198.
    Here: `PpoRun.roll_out` begins with `Generator.load_weights`, which copies where the engine has weights of its own,
    and stamps the version; caches live for one call.
    """
    run = run_of(base, decoding={"max_new_tokens": 5} | decoding)
    chosen = run.draw_prompt(0, 6)
    before, old = run.roll_out(chosen, 0), copy.deepcopy(run.policy.library)
    away(run, 0.1)  # as many updates would
    after = run.roll_out(chosen, 1)
    assert {rollout.weights_version for rollout in before} == {0}
    assert {rollout.weights_version for rollout in after} == {1}
    assert np.mean(distances(old, before)) < tolerance
    assert np.mean(distances(run.policy.library, after)) < tolerance
    assert np.mean(distances(old, after)) > 0.3
    assert run.observe(chosen, after, 1)[1]["sampler_mismatch"] < tolerance


def test_26_a_prefix_is_read_anew_by_new_weights() -> None:
    library, prefix, prompts = make_library(), [7, 9, 11, 13, 17], [[21, 22], [31], [41, 42, 43]]
    generator = Generator(library, vocabulary=VOCABULARY)
    law = Sampling(max_new_tokens=5, stop_token_ids=(2,))
    for version in range(2):
        with torch.no_grad():
            for parameter in library.parameters():
                parameter.mul_(1 - 0.3 * version)
        generator.load_weights(library, version)
        groups = generator.generate(prompts, 1, law, [3, 5, 8], prefix=prefix)
        for prompt, (rollout,) in zip(prompts, groups, strict=True):
            exact = response_logprobs(library, [*prefix, *prompt], rollout.response_ids)
            assert rollout.logprobs == pytest.approx(exact.tolist(), abs=5e-5)
            assert rollout.weights_version == version


# --- 27: adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decoding", "tolerance"), [({}, 2e-5), ({"precision": "bfloat16"}, 0.05)])
def test_27_adapters_are_not_in_the_rollouts_or_not_out_of_the_reference(
    base: str, decoding: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    """The engine samples from the base without the adapters that are trained; or the reference is read with them on,
    and the KL is 0 for ever; or the saved model lacks them.

    Source: volcengine/verl#7495; OpenRLHF/OpenRLHF#1349.
    Here: the engine runs the policy's own modules, or in bf16 a copy with adapters of its own that
    `Generator.load_weights` renews; the reference is the policy within `lora.adapters_off`, and `lora.merged_state`
    adds adapters to the weights of what is saved. All are compared with a plain model in float64.
    """
    pytest.importorskip("peft")
    changes: dict[str, Any] = {
        "lora": {"rank": 3, "alpha": 7, "targets": ["q_proj", "v_proj", "down_proj"]},
        "policy": {"learning_rate": 0.05, "schedule": "constant"},
        "decoding": {"max_new_tokens": 5} | decoding,
    }
    run = run_of(base, **changes)
    for iteration in range(2):
        run.step(iteration)
    save_policy(tmp_path / "merged", run.policy)
    merged, original = load_policy(str(tmp_path / "merged")).library, load_policy(base).library
    assert not any("lora" in name for name in merged.state_dict())
    chosen = run.draw_prompt(0, 6)
    rollouts = run.roll_out(chosen, 2)
    assert np.mean(distances(merged, rollouts)) < tolerance
    assert np.mean(distances(original, rollouts)) > 2 * tolerance

    experience, metrics = run.observe(chosen, rollouts, 2)
    kl = 0.0
    for row, rollout in enumerate(rollouts):
        ids = rollout.prompt_ids, rollout.response_ids
        adapted, plain = (response_logprobs(library, *ids) for library in (merged, original))
        found = experience.old_logprob_BT[row, : len(adapted)].tolist()
        assert found == pytest.approx(adapted.tolist(), abs=2e-5)
        kl += float((adapted - plain).sum()) / len(rollouts)
    assert abs(kl) > 0.01
    assert metrics["kl"] == pytest.approx(kl, abs=1e-4)
    if not decoding:  # a copy's adapters stay on
        with adapters_off(run.policy.library):
            assert max(distances(original, run.roll_out(chosen, 3))) < 2e-5


# --- 28: a clip without effect ----------------------------------------------------------------------------------------


def test_28_old_log_probs_follow_the_weights(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old log-probs are computed again in each step with the weights of that step, so every ratio is 1, and the clip,
    PPO's only bound, never takes hold.

    Source: meta-pytorch/torchforge#571.
    Here: `PpoRun.observe` reads them once for each rollout, and `Experience` keeps them through all minibatches. From
    the second minibatch on ratios are those of the weights then over the weights at the rollout.
    """
    run = run_of(base, inner_epochs=2, clip=0.05, policy={"learning_rate": 2.0, "schedule": "constant", "epsilon": 1.0})
    steps: list[tuple[Experience, list[int], Any, StepReport]] = []
    step = run._policy_step

    def spy(experience: Experience, chosen: Sequence[int], place: int) -> tuple[StepReport, float]:
        library = copy.deepcopy(run.policy.library)
        report, ptx = step(experience, chosen, place)
        steps.append((experience, list(chosen), library, report))
        return report, ptx

    monkeypatch.setattr(run, "_policy_step", spy)
    at_the_rollout = copy.deepcopy(run.policy.library)
    metrics = run.step(0)
    moved = []
    for experience, chosen, library, report in steps:
        expected = 0.0
        for row in chosen:
            length = experience.prompt_lengths[row]
            ids = experience.sequences[row][:length], experience.sequences[row][length:]
            change = response_logprobs(library, *ids) - response_logprobs(at_the_rollout, *ids)
            expected += float(np.abs(change).sum())
        assert report.sums["abs_log_ratio"] == pytest.approx(expected, abs=2e-4)
        moved.append(expected / report.sums["tokens"])
    assert moved[0] == 0.0
    assert min(moved[1:]) > 0.001
    assert metrics["clip_fraction"] > 0
