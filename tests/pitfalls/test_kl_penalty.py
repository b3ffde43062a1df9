"""Pitfalls 29 to 34: which estimate of the KL stands where, what is summed and averaged, and what steers by it.

Expectations are sums over everything that could be sampled, so that nothing here hangs on a draw.

Dimensions in names: B rollouts, T response tokens, V vocabulary, S all sequences of two tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.doctor.test_doctor_checks import STEPS, measured
from tests.float64 import Floats, response_logprobs
from tests.models import VOCABULARY
from tests.pitfalls.bigrams import save_bigrams
from tests.stages.test_ppo import config, run_of
from tests.stages.test_ppo_equations import CUT, LENGTHS, SCORES, Given, away, made_up
from torch import Tensor
from transformers import GenerationConfig

from tastemaker.checkpoint import load_state, save_state
from tastemaker.clipping import standard_error
from tastemaker.doctor import diagnose
from tastemaker.errors import ConfigError, TrainingError
from tastemaker.generation import FinishReason, Rollout
from tastemaker.losses import adaptive_kl_coef, gae, kl_estimate, policy_loss, shaped_rewards
from tastemaker.stages.ppo import PpoRun

EXACT = 5e-6  # fp32 against float64
LONG: dict[str, Any] = {"max_new_tokens": 11}  # what the made up rollouts need


def log_ratios(run: PpoRun, rollout: Rollout, temperature: float = 1.0) -> Floats:
    """log pi - log pi_ref of a response's tokens, in float64."""
    ids = rollout.prompt_ids, rollout.response_ids
    ours, theirs = (
        response_logprobs(model.library, *ids, temperature=temperature) for model in (run.policy, run.reference)
    )
    return np.asarray(ours - theirs)


def every_token(run: PpoRun) -> tuple[list[int], list[Rollout]]:
    """All 97 responses of one token to the first prompt."""
    run.scorer = Given([0.0] * VOCABULARY)
    prompt_ids, end = tuple(run.prompt_ids[0]), run.policy.tokenizer.end_id
    finishes = [FinishReason.STOP if token == end else FinishReason.LENGTH for token in range(VOCABULARY)]
    return [0] * VOCABULARY, [Rollout(prompt_ids, [token], [0.0], finish, 0) for token, finish in enumerate(finishes)]


def exact_kl(run: PpoRun, temperature: float = 1.0) -> tuple[float, Tensor]:
    """KL(pi || pi_ref) of the first token after the first prompt, and its gradient by pi's weights; in float64."""
    ids = torch.tensor([run.prompt_ids[0]])
    policy, reference = (copy.deepcopy(model.library).double() for model in (run.policy, run.reference))
    logprob_V, ref_V = (
        (library(input_ids=ids, use_cache=False).logits[0, -1] / temperature).log_softmax(0)
        for library in (policy, reference)
    )
    divergence = (logprob_V.exp() * (logprob_V - ref_V.detach())).sum()
    gradients = torch.autograd.grad(divergence, list(policy.parameters()))
    return float(divergence.detach()), torch.cat([gradient.flatten() for gradient in gradients])


# --- 29: which estimator, where ---------------------------------------------------------------------------------------

# pi and its reference over five tokens. d = log pi - log ref is ln 4, 0, -ln 4, 0, 0.
POLICY = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], dtype=torch.float64)
REFERENCE = torch.tensor([1 / 8, 1 / 4, 1 / 2, 1 / 16, 1 / 16], dtype=torch.float64)
KL = 3 / 8 * math.log(4)  # 1/2 ln 4 - 1/8 ln 4


def gradient_of(expectation: Callable[[Tensor], Tensor]) -> Tensor:
    """By the logits of pi, of what is given log pi of all tokens."""
    logits_V = POLICY.log().requires_grad_()
    (gradient_V,) = torch.autograd.grad(expectation(logits_V.log_softmax(0)), logits_V)
    return gradient_V


def as_a_loss(estimator: Any) -> Callable[[Tensor], Tensor]:
    """What differentiating the estimate at sampled tokens gives on average."""
    everything_1V = torch.ones(1, 5, dtype=torch.bool)

    def expectation(logprob_V: Tensor) -> Tensor:
        estimate_1V = kl_estimate(logprob_V[None], REFERENCE.log()[None], everything_1V, estimator=estimator)
        return (POLICY * estimate_1V[0]).sum()

    return expectation


def tensors(*values: object) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def in_the_reward(logprob_V: Tensor) -> Tensor:
    """PPO's loss on average, with the penalty in the reward: every token is a response, weighted by its probability."""
    column, mask = logprob_V[:, None], torch.ones(5, 1, dtype=torch.bool)
    reward = shaped_rewards(torch.zeros(5).double(), column.detach(), REFERENCE.log()[:, None], mask, kl_coef=1.0)
    weighted = POLICY[:, None] * gae(reward, torch.zeros_like(reward), mask, gamma=1.0, lam=0.95)
    return policy_loss(column, column.detach(), weighted, mask, clip=0.2, num_tokens=1)


@pytest.mark.parametrize(
    ("name", "expectation", "error", "cosine"),
    [
        ("k1 in the reward", in_the_reward, 0.0, 1.0),
        ("k1 as a loss", as_a_loss("k1"), 1.0, None),
        ("k2 as a loss", as_a_loss("k2"), 0.0, 1.0),
        ("k3 as a loss", as_a_loss("k3"), 0.394912, 0.925064),
    ],
)
def test_29_the_kl_is_estimated_where_its_gradient_is_wrong(
    name: str, expectation: Callable[[Tensor], Tensor], error: float, cosine: float | None
) -> None:
    """k1 is added to the loss, where its expected gradient is 0 and nothing pulls; or k3 is, whose gradient is that of
    another divergence. Values look right in the logs in either case.

    Source: THUDM/slime (`--kl-loss-type` is k1 by default); arXiv 2510.01555, 2512.21852, 2506.09477;
    NVIDIA-NeMo/RL#2506, NVIDIA-NeMo/RL#2958; volcengine/verl#6058.
    Here: k1 is in the reward, as in the paper (`losses.shaped_rewards`), and PPO's loss has no KL term nor a setting
    for one. The expected gradient is off, relative to the KL's own, by 0 with k1 in the reward, 1 with k1 as a loss, 0
    with k2 as a loss and 0.39 with k3 as a loss.
    """
    # The KL's gradient by the logits is pi (d - KL), k3's is pi - ref:
    # (0.433217, -0.129965, -0.238269, -0.032491, -0.032491) and (0.375, 0, -0.375, 0, 0).
    d_V = POLICY.log() - REFERENCE.log()
    true_V, found_V = POLICY * (d_V - KL), gradient_of(expectation)
    assert true_V.tolist() == pytest.approx([0.433217, -0.129965, -0.238269, -0.032491, -0.032491], abs=1e-6)
    assert float((found_V - true_V).norm() / true_V.norm()) == pytest.approx(error, abs=2e-6), name
    if cosine is not None:
        assert float(found_V @ true_V / (found_V.norm() * true_V.norm())) == pytest.approx(cosine, abs=2e-6)


def test_29_in_a_response_a_token_answers_for_the_kl_of_what_follows_it() -> None:
    """All nine responses of two tokens out of three. Only the reward knows that the first token decides which KL comes
    after it: k2 token by token, right for a single one, leaves that out."""
    leaves = tensors((0.3, -0.8, 1.1), ((1.5, 0, -1), (0, 0.2, 0.4), (-2, 1, 0.5)))
    ref_logits = tensors((0.9, 0.1, -0.5), ((0, 0, 0), (2, -1, 0), (0, 0, 1)))
    for leaf in leaves:
        leaf.requires_grad_()
    pairs = list(product(range(3), repeat=2))

    def logprobs(first_V: Tensor, second_VV: Tensor) -> Tensor:
        both = first_V.log_softmax(0), second_VV.log_softmax(1)
        return torch.stack([torch.stack([both[0][one], both[1][one, two]]) for one, two in pairs])

    logprob_ST, ref_ST = logprobs(*leaves), logprobs(*ref_logits)
    mask_ST = torch.ones(9, 2, dtype=torch.bool)
    weight_S = logprob_ST.sum(1).exp()
    divergence = (weight_S * (logprob_ST - ref_ST).sum(1)).sum()
    reward_ST = shaped_rewards(torch.zeros(9).double(), logprob_ST.detach(), ref_ST, mask_ST, kl_coef=1.0)
    weighted_ST = weight_S.detach()[:, None] * gae(reward_ST, torch.zeros_like(reward_ST), mask_ST, gamma=1.0, lam=1.0)
    by_reward = policy_loss(logprob_ST, logprob_ST.detach(), weighted_ST, mask_ST, clip=0.2, num_tokens=1)
    k2_ST = kl_estimate(logprob_ST, ref_ST, mask_ST, estimator="k2")
    true, ours, by_k2 = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, leaves, retain_graph=True)])
        for loss in (divergence, by_reward, (weight_S.detach()[:, None] * k2_ST).sum())
    )
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)
    assert float((by_k2 - true).norm() / true.norm()) > 0.05


def test_29_ppos_own_gradient_is_that_of_the_kl(base: str) -> None:
    """Every response of one token, weighted by its probability, goes through a real run with a score of 0: the gradient
    of its loss is beta times that of the KL, by every weight of the model."""
    run = away(run_of(base, kl_coef=0.3, truncated="score", whiten_advantages=False))
    experience, _ = run.observe(*every_token(run), 1)
    weighted = replace(experience, advantage_BT=experience.advantage_BT * experience.old_logprob_BT.exp())
    run.policy_trainer.accumulate([list(range(VOCABULARY))], partial(run._policy_loss, weighted), 1.0)
    found = torch.cat([p.grad.flatten() for p in run.policy_trainer.parameters if p.grad is not None]).double()
    divergence, gradient = exact_kl(run)
    assert divergence > 0.05
    assert float((found - 0.3 * gradient).norm() / (0.3 * gradient).norm()) < 1e-5


@pytest.mark.parametrize("option", ["kl_loss", "kl_loss_coef", "kl_estimator", "use_kl_loss"])
def test_29_a_kl_in_the_loss_cannot_be_asked_for(option: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{option}'"):
        config(**{option: "k1"})


# --- 30: k3's sign ----------------------------------------------------------------------------------------------------


def test_30_k3_has_the_wrong_sign() -> None:
    """exp(d) - 1 - d in place of exp(-d) - 1 + d: never negative and 0 where both agree, so it looks right, but its
    mean is another number, without a bound.

    Source: CarperAI/trlx (feeds its controller so); http://joschu.net/blog/kl-approx.html.
    Here: the controller and the log are fed k1 (`PpoRun.observe`), whose mean is the KL. `losses.kl_estimate` says
    what d is for who asks for k3, and its mean over all tokens is the KL too.
    """
    # The KL is 3/8 ln 4 = 0.519860; the wrong sign has the mean 2 + 1/4 + 1/32 + 1/8 - 1 - 0.519860 = 0.886390.
    estimate_1V = kl_estimate(
        POLICY.log()[None], REFERENCE.log()[None], torch.ones(1, 5, dtype=torch.bool), estimator="k3"
    )
    assert float((POLICY * estimate_1V[0]).sum()) == pytest.approx(KL, abs=1e-12)
    by_hand = [1 / 4 - 1 + math.log(4), 0.0, 4 - 1 - math.log(4), 0.0, 0.0]
    assert estimate_1V[0].tolist() == pytest.approx(by_hand, abs=1e-12)


def test_30_the_controller_is_fed_the_kl_itself(base: str) -> None:
    run = away(run_of(base, truncated="score", decoding=LONG))
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    _, metrics = run.observe(chosen, rollouts, 1)
    exact = [float(log_ratios(run, rollout).sum()) for rollout in rollouts]
    assert metrics["kl"] == pytest.approx(np.mean(exact), abs=EXACT)


# --- 31: sums and means -----------------------------------------------------------------------------------------------


def test_31_the_kl_is_averaged_over_tokens_and_the_score_added_at_each(base: str) -> None:
    """The controller's target is nats a response, and it is fed nats a token, so it loosens the penalty for ever; or a
    score that belongs to a response is paid once for each of its tokens.

    Source: CarperAI/trlx#441.
    Here: `PpoRun.observe` sums the KL over each response before it averages over responses, and
    `losses.shaped_rewards` adds the score at the last token alone.
    """
    # With gamma 0 the return of a token is its own reward.
    run = away(run_of(base, kl_coef=0.3, gamma=0.0, truncated="score", decoding=LONG))
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    experience, metrics = run.observe(chosen, rollouts, 1)
    sums = []
    for row, (rollout, score) in enumerate(zip(rollouts, SCORES, strict=True)):
        d = log_ratios(run, rollout)
        reward = -0.3 * d
        reward[-1] += score
        assert experience.return_BT[row, : len(d)].tolist() == pytest.approx(reward.tolist(), abs=EXACT)
        assert experience.return_BT[row, len(d) :].tolist() == [0.0] * (max(LENGTHS) - len(d))
        sums.append(float(d.sum()))
    assert abs(np.mean(sums)) > 2 * abs(sum(sums) / sum(LENGTHS)) > 0.01
    assert metrics["kl"] == pytest.approx(np.mean(sums), abs=EXACT)
    assert metrics["reward"] == pytest.approx(np.mean(SCORES) - 0.3 * np.mean(sums), abs=EXACT)


def test_31_the_controller_is_fed_nats_a_response(base: str) -> None:
    """With a target below the KL of a response and above that of a token, the penalty has to grow: the error is clipped
    to 0.2, and 0.3 (1 + 0.2 * 6 / 300) = 0.3012."""
    measured = away(run_of(base, kl_coef=0.3), 0.1).step(1)
    assert measured["response_tokens"] > 4
    assert measured["kl"] > 1
    steered = {"target": measured["kl"] / 2, "horizon": 300.0}
    run = away(run_of(base, kl_coef=0.3, adaptive_kl=steered), 0.1)
    assert run.step(1)["kl"] == measured["kl"]
    assert run.kl_coef == pytest.approx(0.3012, abs=1e-9)


# --- 32: what is logged -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncated", ["penalty", "mask"])
def test_32_the_logged_kl_leaves_tokens_out_or_takes_padding_in(base: str, truncated: str) -> None:
    """The KL is taken over padding or over tokens that a tool wrote; or only over what trains; or another metric is
    written under its name; or what is logged has been clipped.

    Source: THUDM/slime#1372, THUDM/slime#2114; volcengine/verl#2259.
    Here: `PpoRun.observe` takes the raw k1 of all tokens that were sampled and of no other, whether a response trains
    or not, and no two parts of an iteration's metrics have a name in common.
    """
    run = away(run_of(base, truncated=truncated, decoding=LONG))
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    experience, metrics = run.observe(chosen, rollouts, 1)
    exact = [float(log_ratios(run, rollout).sum()) for rollout in rollouts]
    of_whole = [kl for kl, cut in zip(exact, CUT, strict=True) if not cut]
    assert metrics["kl"] == pytest.approx(np.mean(exact), abs=EXACT)
    assert abs(np.mean(exact) - np.mean(of_whole)) > 0.01
    assert (int(experience.mask_BT.sum()) == sum(LENGTHS)) is (truncated == "penalty")


@pytest.mark.parametrize("junk", [math.nan, math.inf, -9999.0])
def test_32_what_stands_at_padding_has_no_kl(junk: float) -> None:
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    logprob_BT = torch.tensor([[-1.0, -2, junk], [-0.5, junk, 0]])
    ref_BT = torch.tensor([[-1.5, -1, 0], [-0.75, 0, junk]])
    estimate_BT = kl_estimate(logprob_BT, ref_BT, mask_BT, estimator="k1")
    assert estimate_BT.tolist() == [[0.5, -1.0, 0.0], [0.25, 0.0, 0.0]]
    reward_BT = shaped_rewards(torch.tensor([2.0, -3.0]), logprob_BT, ref_BT, mask_BT, kl_coef=0.5)
    assert reward_BT.tolist() == [[-0.25, 2.5, 0.0], [-3.125, 0.0, 0.0]]


def test_32_no_metric_is_written_over_another(base: str) -> None:
    run = run_of(base)
    run.step(0)
    chosen = run.draw_prompt(run.config.batch_size, run.config.batch_size)
    _, observed = run.observe(chosen, run.roll_out(chosen, 1), 1)
    written = run.step(1)
    assert {name: written[name] for name in observed} == observed


def test_32_the_logged_kl_is_raw(base: str) -> None:
    """Of a policy so far away that single tokens differ by more than ten nats."""
    run = away(run_of(base, truncated="score", decoding=LONG), 0.5)
    run.scorer = Given(SCORES)
    chosen, rollouts = made_up(run)
    exact = [log_ratios(run, rollout) for rollout in rollouts]
    assert max(float(np.abs(d).max()) for d in exact) > 10
    _, metrics = run.observe(chosen, rollouts, 1)
    assert metrics["kl"] == pytest.approx(np.mean([d.sum() for d in exact]), rel=1e-5, abs=1e-4)


# --- 33: the adaptive controller --------------------------------------------------------------------------------------

STEERED: dict[str, Any] = {
    "kl_coef": 0.3,
    "adaptive_kl": {"target": 0.05, "horizon": 20.0},
    "policy": {"learning_rate": 0.01, "schedule": "constant"},
}


def test_33_the_adaptive_coefficient_is_another_than_zieglers() -> None:
    """The error is not clipped, or n is the minibatch, or the KL is one process's own: the coefficient runs away or
    hardly moves, and the same target gives another policy on other hardware.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2 and its code.
    Here: `losses.adaptive_kl_coef`, with the iteration's episodes for n and the mean over all of them for the KL; the
    coefficient is in the checkpoint (`ppo._Controller`).
    """
    # Target 6, horizon 1000, 50 episodes: 9 is off by 0.5, clipped to 0.2, so 0.2 (1 + 0.2 * 0.05) = 0.202;
    # 6.6 is off by 0.1, so 0.202 (1 + 0.1 * 0.05) = 0.20301; 0.9 by -0.85, clipped, so 0.20301 (1 - 0.01) = 0.2009799.
    found, coefficient = [], 0.2
    for kl in (9.0, 6.6, 0.9):
        coefficient = adaptive_kl_coef(coefficient, kl, target=6.0, horizon=1000.0, num_episodes=50)
        found.append(coefficient)
    assert found == pytest.approx([0.202, 0.20301, 0.2009799], abs=1e-12)


def test_33_three_iterations_are_steered_by_their_own_kl(base: str) -> None:
    """n is the six episodes of an iteration, not the two of a minibatch, and what is logged is what was in force."""
    run, expected = run_of(base, **STEERED), 0.3
    errors = []
    for iteration in range(3):
        row = run.step(iteration)
        assert row["kl_coef"] == pytest.approx(expected, abs=1e-12)
        errors.append(row["kl"] / 0.05 - 1)
        expected *= 1 + min(max(errors[-1], -0.2), 0.2) * 6 / 20
        assert run.kl_coef == pytest.approx(expected, abs=1e-12)
    assert min(errors) < -0.2
    assert max(errors) > 0.2


def test_33_it_goes_on_from_a_checkpoint(base: str, tmp_path: Path) -> None:
    whole = run_of(base, **STEERED)
    for iteration in range(2):
        whole.step(iteration)
    save_state(tmp_path / "state.pt", {name: state.state() for name, state in whole.states().items()})
    resumed, saved = run_of(base, **STEERED), load_state(tmp_path / "state.pt")
    assert saved is not None
    for name, state in resumed.states().items():
        state.load_state(saved[name])
    rows = [run.step(2) for run in (whole, resumed)]
    assert rows[0] == rows[1]
    assert rows[0]["kl_coef"] != 0.3
    assert whole.kl_coef == resumed.kl_coef != rows[0]["kl_coef"]


# --- 34: a negative KL ------------------------------------------------------------------------------------------------

WORD, END = 5, 2  # a prompt ends in the template's w1, which has the id 5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_34_the_kl_is_negative_and_nobody_asks_why(base: str, temperature: float) -> None:
    """A KL cannot be negative. A mean over sampled tokens can, a little, by chance; beyond that it says that padding is
    in the mean, that temperatures differ, that something else was scored than was sampled, or that the sampler forbids
    a token, such as an early end.

    Source: hiyouga/LlamaFactory#664; huggingface/trl#1005, huggingface/trl#204.
    Here: over all tokens, weighted by the policy's probability, what `PpoRun.observe` takes for the KL is the KL; and
    `kl_error`, logged beside it, says how far chance can take the mean of those that were sampled. Beyond that
    `tastemaker doctor` finds a `kl-negative` and names the causes.
    """
    law = {"max_new_tokens": 1, "temperature": temperature}
    settings: dict[str, Any] = {"kl_coef": 1.0, "gamma": 0.0, "truncated": "score", "decoding": law}
    run = away(run_of(base, **settings))
    experience, _ = run.observe(*every_token(run), 1)
    divergence, _ = exact_kl(run, temperature)
    assert divergence > 0.05
    probability_V, kl_V = experience.old_logprob_BT[:, 0].exp(), -experience.return_BT[:, 0]
    assert float(probability_V.sum()) == pytest.approx(1, abs=1e-5)
    assert float(kl_V.min()) < -0.1, "single tokens are negative"
    assert float((probability_V * kl_V).sum()) == pytest.approx(divergence, abs=1e-5)

    run.scorer = Given([0.0] * 400)
    rollouts = run.roll_out([0] * 400, 1)
    _, metrics = run.observe([0] * 400, rollouts, 1)
    kl_of = kl_V.tolist()
    sampled = [kl_of[rollout.response_ids[0]] for rollout in rollouts]
    assert metrics["kl"] == pytest.approx(np.mean(sampled), abs=1e-5)
    assert metrics["kl_error"] == pytest.approx(np.std(sampled, ddof=1) / 20, abs=1e-5)
    assert abs(metrics["kl"] - divergence) < 3 * metrics["kl_error"]


def test_34_the_standard_error_by_hand() -> None:
    """1, 3 and 8 have the mean 4 and squares 9, 1 and 16 from it: sqrt(26 / 2 / 3)."""
    assert standard_error(torch.tensor([1.0, 3.0, 8.0])) == pytest.approx(math.sqrt(13 / 3), abs=1e-6)
    assert standard_error(torch.tensor([3.0])) == 0.0


def test_34_what_was_not_sampled_from_the_policy_shows(base: str) -> None:
    """Samples of the reference have a KL below 0 by many errors, and log-probs that the trainer does not find."""
    run, chosen = run_of(base, truncated="score"), list(range(6)) * 30
    stale = run.roll_out(chosen, 0)
    away(run, 0.05)
    fresh = run.roll_out(chosen, 1)
    (_, of_stale), (_, of_fresh) = (run.observe(chosen, rollouts, 1) for rollouts in (stale, fresh))
    assert of_stale["kl"] < -5 * of_stale["kl_error"] < 0
    assert of_fresh["kl"] > 5 * of_fresh["kl_error"] > 0
    assert of_stale["sampler_mismatch"] > 0.1
    assert of_stale["sampler_ratio"] > 1.1
    assert of_fresh["sampler_mismatch_max"] < 1e-4


def test_34_the_doctor_says_why() -> None:
    course: dict[str, Any] = {"kl": -0.02, "kl_coef": 0.0, "reward": [0.1 * step - 0.25 for step in range(STEPS)]}
    (finding,) = diagnose(measured("ppo", course)).findings
    assert finding.kind.name == "kl-negative"
    assert "temperature" in " ".join(finding.kind.causes)


def test_34_padding_is_not_in_the_mean(base: str) -> None:
    """Of five responses of one token, one is replaced by its whole of eleven tokens: the mean moves by a fifth of what
    these add, though every other row now has ten places of padding."""
    run = away(run_of(base, decoding=LONG))
    chosen, rollouts = made_up(run)
    short = [replace(rollout, response_ids=rollout.response_ids[:1], logprobs=[0.0]) for rollout in rollouts]
    alone, padded = (run.observe(chosen, rows, 1)[1]["kl"] for rows in (short, [*short[:4], rollouts[4]]))
    added = float(log_ratios(run, rollouts[4])[1:].sum())
    assert abs(added) > 0.1
    assert padded - alone == pytest.approx(added / 5, abs=EXACT)


def test_34_two_temperatures_are_refused(base: str) -> None:
    run = run_of(base)
    with torch.no_grad():
        run.reference.library.lm_head.weight.mul_(0.5)  # as a temperature of 2 does
    with pytest.raises(TrainingError, match=r"policy and reference differ.*a temperature may act on one only"):
        run.step(0)


def test_34_an_end_token_is_never_forbidden(tmp_path: Path) -> None:
    """Half of all responses are nothing but the end token, whatever generation config came with the model."""
    table = {WORD: {END: 0.5, 40: 0.5}, 40: {END: 0.25, 40: 0.75}, END: {END: 1.0}}
    folder = save_bigrams(tmp_path / "base", table)
    GenerationConfig(
        min_new_tokens=3, suppress_tokens=[END], begin_suppress_tokens=[END], eos_token_id=END
    ).save_pretrained(folder)
    run = run_of(folder)
    assert run.policy.library.generation_config.suppress_tokens == [END]
    rollouts = run.roll_out([0] * 60, 0)
    at_once = [rollout for rollout in rollouts if rollout.response_ids == [END]]
    assert 20 < len(at_once) < 40
    assert all(rollout.logprobs == pytest.approx([math.log(0.5)], abs=1e-6) for rollout in at_once)
    for option in ("min_new_tokens", "suppress_tokens", "bad_words", "ignore_end"):
        with pytest.raises(ConfigError, match=f"unknown key '{option}'"):
            config(decoding={option: 3})
