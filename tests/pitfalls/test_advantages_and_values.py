"""Pitfalls 49 to 56: advantages, whitening, batches without spread, and the value function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.float64 import response_values
from tests.stages.conftest import prompt
from tests.stages.test_ppo import config, experience_of, run_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tastemaker.checkpoint import load_policy
from tastemaker.clipping import explained_variance
from tastemaker.errors import ConfigError
from tastemaker.generation import FinishReason, Rollout
from tastemaker.losses import gae, ranking_loss, value_loss, whiten
from tastemaker.model import RewardModel
from tastemaker.responses import DecodingConfig
from tastemaker.scoring import FunctionScorer
from tastemaker.settings import RewardConfig
from tastemaker.stages.evaluation import Contestant, Field
from tastemaker.stages.evaluation.contestants import respond
from tastemaker.stages.ppo import Experience, PpoRun

JUNK = float("nan")  # what stands at places that do not count
LENGTHS = (5, 2, 7, 3)
CUT = (False, True, False, True)


def t(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def given(*scores: float) -> FunctionScorer:
    return FunctionScorer(lambda prompts, responses, records: list(scores), name="given")


def rolled_out(run: PpoRun) -> tuple[list[int], list[Rollout]]:
    """Four responses of unequal lengths; two end by themselves, two are cut off."""
    chosen, rollouts = [3, 0, 6, 1], list[Rollout]()
    for row, (length, cut) in enumerate(zip(LENGTHS, CUT, strict=True)):
        ids = [(13 * place + 7 * row) % 89 + 4 for place in range(length)]
        if not cut:
            ids[-1] = run.policy.tokenizer.end_id
        finish = FinishReason.LENGTH if cut else FinishReason.STOP
        rollouts.append(Rollout(tuple(run.prompt_ids[chosen[row]]), ids, [-0.5] * length, finish, 0))
    return chosen, rollouts


def observed(run: PpoRun, *scores: float) -> tuple[Experience, dict[str, float]]:
    """What a run makes of those responses under these scores."""
    run.scorer = given(*scores)
    return run.observe(*rolled_out(run), 1)


# --- advantages -----------------------------------------------------------------------------------------------------


def test_49_a_hole_in_the_mask_takes_the_future_away() -> None:
    """Values at places that no action chose (a tool's output inside a response) are set to 0 before GAE, so the action
    before such a hole is measured against a future that is worth nothing.

    Source: OpenRLHF experience_maker.py, where values are zeroed; verl and NeMo-RL carry the next action's value.
    Here: `losses.gae` carries value and advantage over masked places, as though the row were written without them.
    """
    # gamma .9, lambda .5; rewards 1, -2, 3 and values .5, -1, 2 at the actions. Backwards:
    # 3 - 2 = 1; (-2 + .9 * 2 + 1) + .45 * 1 = 1.25; (1 - .9 * 1 - .5) + .45 * 1.25 = .1625
    mask_BT = torch.tensor([[True, False, True, False, False, True]])
    reward_BT, value_BT = t([[1, 100, -2, 50, -60, 3]]), t([[0.5, -7, -1, 4, 9, 2]])
    advantage_BT = gae(reward_BT, value_BT, mask_BT, gamma=0.9, lam=0.5)
    assert advantage_BT[0].tolist() == pytest.approx([0.1625, 0, 1.25, 0, 0, 1], abs=1e-12)


@pytest.mark.parametrize("hole", range(6))
def test_49_a_hole_may_be_anywhere(hole: int) -> None:
    reward_BT, value_BT = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    whole_BT = gae(reward_BT, value_BT, torch.ones(2, 5, dtype=torch.bool), gamma=0.8, lam=0.9)

    def with_hole(row_BT: Tensor, filling: float) -> Tensor:
        return torch.cat([row_BT[:, :hole], torch.full((2, 3), filling).to(row_BT), row_BT[:, hole:]], dim=1)

    mask_BT = with_hole(torch.ones(2, 5, dtype=torch.bool), False)
    found_BT = gae(with_hole(reward_BT, 5.0), with_hole(value_BT, -11.0), mask_BT, gamma=0.8, lam=0.9)
    torch.testing.assert_close(found_BT, with_hole(whole_BT, 0.0), rtol=0, atol=1e-12)


def test_50_an_episode_that_has_ended_has_a_future() -> None:
    """The value after the last token is read from whatever stands there (padding, the row's last place), so a response
    that has ended is credited with what would come after it.

    Source: arXiv 2403.17031 and "The 37 Implementation Details of PPO" on GAE; no system is named.
    Here: `losses.gae` ends every row at its own last token with value 0, cut off or not; what a cut-off response
    deserves is said in its score (`truncated` in `PpoConfig`).
    """
    gamma, lam, width = 0.9, 0.7, max(LENGTHS)
    reward, value = (np.random.default_rng(seed).normal(size=(4, width)) for seed in (1, 2))
    mask = np.arange(width) < np.array(LENGTHS)[:, None]
    expected = np.zeros((4, width))
    for row, length in enumerate(LENGTHS):
        for start in range(length):
            for place in range(start, length):
                following = value[row, place + 1] if place + 1 < length else 0.0
                delta = reward[row, place] + gamma * following - value[row, place]
                expected[row, start] += (gamma * lam) ** (place - start) * delta
    found_BT = gae(
        t(np.where(mask, reward, 7.0)), t(np.where(mask, value, -5.0)), torch.tensor(mask), gamma=gamma, lam=lam
    )
    torch.testing.assert_close(found_BT, t(expected), rtol=0, atol=1e-12)


def test_50_a_finished_and_a_cut_off_response_end_alike(base: str) -> None:
    """Without a KL penalty the return of the last token is the score and nothing else."""
    run = run_of(base, truncated="score", kl_coef=0.0, gamma=0.9, lam=0.7, whiten_advantages=False)
    scores = (2.0, -3.0, 0.5, 4.0)
    experience, _ = observed(run, *scores)
    last = [float(experience.return_BT[row, length - 1]) for row, length in enumerate(LENGTHS)]
    assert last == pytest.approx(scores, abs=1e-5)
    assert float(experience.value_BT[2, 6].abs()) > 1e-3, "the last state's own value is not 0"


def test_51_values_are_read_one_place_off(base: str, reward_model: str) -> None:
    """Log-probs, values and the score belong to three different places, so one mask serves them all only by a slip: the
    value of a state is read where the chosen token is already known, or the score's place has no value.

    Source: arXiv 2403.17031 (`padding_mask_p1` in vwxyzjn/summarize_from_feedback_details).
    Here: `Packed.predicted` gives the place before each response token, where log-prob and value are both read; the
    score lies on the last sampled token, so rewards, values and log-probs share one mask.
    """
    run = run_of(base, reward_model)
    chosen, rollouts = rolled_out(run)
    run.scorer = given(0, 0, 0, 0)
    experience, _ = run.observe(chosen, rollouts, 1)
    assert isinstance(run.value, RewardModel)
    assert experience.value_BT.shape == experience.old_logprob_BT.shape == experience.mask_BT.shape == (4, 7)
    assert experience.mask_BT.sum(1).tolist() == list(LENGTHS)
    for row, rollout in enumerate(rollouts):
        exact = response_values(run.value, rollout.prompt_ids, rollout.response_ids)
        assert experience.value_BT[row, : LENGTHS[row]].tolist() == pytest.approx(exact.tolist(), abs=1e-5)


def test_51_no_value_knows_the_token_that_its_state_chose(base: str, reward_model: str) -> None:
    run = run_of(base, reward_model)
    chosen, rollouts = rolled_out(run)
    run.scorer = given(0, 0, 0, 0)
    others = [replace(rollout, response_ids=[*rollout.response_ids[:-1], 60]) for rollout in rollouts]
    before, after = (run.observe(chosen, those, 1)[0] for those in (rollouts, others))
    torch.testing.assert_close(after.value_BT, before.value_BT, rtol=0, atol=1e-6)
    changed_BT = (after.old_logprob_BT - before.old_logprob_BT).abs() > 1e-4
    assert changed_BT.nonzero().tolist() == [[row, length - 1] for row, length in enumerate(LENGTHS)]


# --- whitening ------------------------------------------------------------------------------------------------------


def test_52_padding_takes_part_in_whitening(base: str) -> None:
    """Advantages are whitened with their padding, or by each process or minibatch for itself, so what counts has
    neither mean 0 nor variance 1 and the gradient depends on how the batch was cut.

    Source: trlX whitens unmasked, TRL per process; THUDM/slime#2235, OpenRLHF/OpenRLHF#1250.
    Here: `PpoRun.observe` calls `losses.whiten` once, on the whole rollout before minibatches are drawn, over the
    places that count, with the population's variance.
    """
    raw, white = (observed(run_of(base, whiten_advantages=on), 3, -1, 0.5, 2)[0] for on in (False, True))
    mask_BT = white.mask_BT
    plain_M = raw.advantage_BT[mask_BT].double().numpy()
    assert abs(plain_M.mean()) > 0.1
    expected = (plain_M - plain_M.mean()) / plain_M.std()
    assert white.advantage_BT[mask_BT].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert white.advantage_BT[~mask_BT].abs().max() == 0
    torch.testing.assert_close(white.return_BT, raw.return_BT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_52_more_padding_changes_nothing(shift_mean: bool) -> None:
    x_BT, mask_BT = torch.randn(3, 5, dtype=torch.float64) + 2, torch.rand(3, 5) < 0.6
    wide_BT = torch.cat([torch.full((3, 2), JUNK).to(x_BT), x_BT, torch.full((3, 11), JUNK).to(x_BT)], dim=1)
    counts_BT = torch.cat([torch.zeros(3, 2), mask_BT, torch.zeros(3, 11)], dim=1).bool()
    found_BT = whiten(wide_BT, counts_BT, shift_mean=shift_mean)[:, 2:7]
    torch.testing.assert_close(found_BT, whiten(x_BT, mask_BT, shift_mean=shift_mean), rtol=0, atol=1e-12)


def test_52_a_minibatch_keeps_its_own_mean(base: str) -> None:
    """At ratio 1 the loss is minus the mean of the advantages, which whitening anew would make 0."""
    run = run_of(base, microbatch_tokens=20)
    experience = experience_of(run)
    chosen = [4, 1]
    report, _ = run._policy_step(experience, chosen, 0)
    mean = float(experience.advantage_BT[chosen][experience.mask_BT[chosen]].mean())
    assert abs(mean) > 0.05
    assert report.sums["policy_loss"] == pytest.approx(-mean, abs=1e-5)


def test_53_whitened_rewards_forget_what_is_good(base: str) -> None:
    """Rewards are whitened with their mean taken away, so a batch of good responses and one of bad ones look alike to
    the value function.

    Source: openai/lm-human-preferences whitens rewards with shift_mean=False.
    Here: PPO leaves rewards as they are and whitens advantages alone. `losses.whiten(shift_mean=False)`, for who wants
    whitened rewards, keeps the mean; no stage uses it.
    """
    # 1, -2 and 4 have mean 1 and population variance 6: 1 + (0, -3, 3) / sqrt(6)
    mask_BT = torch.tensor([[True, False, True, True, False]])
    kept = whiten(t([[1, JUNK, -2, 4, JUNK]]), mask_BT, shift_mean=False)[0].tolist()
    assert kept == pytest.approx([1, 0, -0.2247449, 2.2247449, 0], abs=1e-6)
    low, high = (
        observed(run_of(base, kl_coef=0.0, lam=1.0, truncated="score"), *scores)[0]
        for scores in ((1, -2, 0, 3), (8, 5, 7, 10))
    )
    rise_M = (high.return_BT - low.return_BT)[low.mask_BT]
    assert rise_M.tolist() == pytest.approx([7.0] * sum(LENGTHS), abs=1e-5)


# --- batches without spread, scores of 0 ----------------------------------------------------------------------------


def test_54_a_batch_without_spread_is_divided_by_0(base: str) -> None:
    """One sample, or several of equal worth, are divided by their standard deviation of 0, and the loss is NaN or
    arbitrary; or a score of 0.0 is taken for a missing one; or samples are filtered by a reward that penalties and the
    KL have already shaped.

    Source: OpenRLHF/OpenRLHF#1250 (group baselines), #1219 (`if score`); NVIDIA-NeMo/RL#2478 (shaped rewards).
    Here: nothing is divided by a group's spread; `losses.whiten` has an epsilon under the root, and
    `clipping.explained_variance` and `clipping.correlation` are 0 where nothing varies. No score is asked whether it is
    true. PPO filters no response by what it is worth; where one of several is chosen (the best of n, an epoch), it is
    by raw scores, and so is the metric `score`.
    """
    equal = whiten(t([[-2.5] * 7, [-2.5] * 7]), torch.ones(2, 7, dtype=torch.bool))
    assert equal.abs().max() == 0
    assert whiten(t([[3.25, JUNK]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]
    assert explained_variance(t([0.5]), t([3.0])) == 0
    assert float(ranking_loss(t([1.5, 1.5]), torch.tensor([0, 0]))) == 0
    run = run_of(base, batch_size=1, minibatches=1, decoding={"max_new_tokens": 1})
    run.scorer = given(2.0)
    metrics = run.step(0)  # one response of one token; a metric that is not finite is refused when it is written
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["grad_norm"] == 0
    assert metrics["explained_variance"] == metrics["length_correlation"] == 0


def test_54_nothing_to_train_on_trains_nothing(base: str) -> None:
    """Every response is cut off and none of them is to be learned from."""
    run = run_of(base, truncated="mask")
    chosen, rollouts = rolled_out(run)
    run.scorer = given(1, 2, 3, 4)
    cut = [replace(rollout, finish=FinishReason.LENGTH) for rollout in rollouts]
    experience, _ = run.observe(chosen, cut, 1)
    report, _ = run._policy_step(experience, [0, 1, 2, 3], 0)
    assert (report.loss, report.grad_norm) == (0, 0)


def test_54_a_single_fold_has_no_spread() -> None:
    with pytest.raises(ConfigError, match="cross_validation_folds is 1; give 0 for none, or at least 2"):
        RewardConfig(cross_validation_folds=1)


def test_54_a_score_of_0_is_a_score(base: str) -> None:
    """`if score` takes 0.0 for a score that is missing (OpenRLHF/OpenRLHF#1219). Here it is the better of two."""
    run = run_of(base, kl_coef=0.0, lam=1.0, truncation_penalty=1.5)
    experience, metrics = observed(run, 0.0, 0.0, -2.0, 5.0)
    first = [float(returned) for returned in experience.return_BT[:, 0]]
    assert first == pytest.approx([0.0, -1.5, -2.0, 3.5], abs=1e-5)
    assert metrics["score"] == pytest.approx(0.75)

    seen = list[int]()

    def zero_for_the_shortest(prompts: Any, responses: Sequence[str], records: Any) -> list[float]:
        seen.extend(map(len, responses))
        return [0.0 if len(response) == min(seen) else -1.0 for response in responses]

    field = Field(contestant=Contestant(model="m", best_of=5), policy=load_policy(base))
    scorer, decoding = FunctionScorer(zero_for_the_shortest, name="zero"), DecodingConfig(max_new_tokens=3)
    best = respond("m", field, [prompt("w3")], decoding, scorer, seed=1)
    assert len(set(seen)) > 1
    assert len(best.responses[0].text) == min(seen)


# --- the value function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [  # the old value is -1 and the clip .2: half the larger of (v - R)^2 and (clipped v - R)^2
        (-1.1, 0.0, 0.605, -1.1),  # within the clip
        (-1.5, -2.0, 0.32, 0.0),  # clipped to -1.2: it has come near enough to -2 for now
        (-1.5, 1.0, 3.125, -2.5),  # it went the wrong way, and is pulled back without limit
        (-0.5, 0.0, 0.32, 0.0),
        (-0.5, -3.0, 3.125, 2.5),
    ],
)
def test_55_a_clipped_value_escapes_its_error(value: float, target: float, loss: float, slope: float) -> None:
    """The clipped value's loss is taken alone, or the smaller of the two, or clipped around the values of now, so a
    value that went the wrong way is not pulled back; or the range is none for these scores.

    Source: openai/lm-human-preferences; ranges differ: OpenRLHF 0.5, PKU safe-rlhf 5.0, TRL 0.2.
    Here: `losses.value_loss` is half the larger of both squared errors, around the rollout's values; `value_clip` and,
    for a shared trunk, `value_coef` are settings (0.2 and 0.1), and `value_clip_fraction` says where the clip holds.
    """
    value_BT = t([[value]]).requires_grad_()
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    found = value_loss(value_BT, t([[-1.0]]), t([[target]]), mask_BT, clip=0.2, num_tokens=1)
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == pytest.approx(loss, abs=1e-12)
    assert value_BT.grad is not None
    assert float(value_BT.grad) == pytest.approx(slope, abs=1e-12)


def test_55_values_are_clipped_around_those_of_the_rollout(base: str, reward_model: str) -> None:
    """In the second pass over the same responses too, when the value function has moved beyond the clip."""
    run = run_of(base, reward_model, value_clip=0.05, value={"learning_rate": 0.05, "schedule": "constant"})
    experience, _ = observed(run, 9, -8, 7, -9)
    _, rollouts = rolled_out(run)
    assert isinstance(run.value, RewardModel)
    assert run.value_trainer is not None
    run._value_step(run.value_trainer, experience, [0, 1, 2, 3])
    total, stopped = 0.0, 0
    for row, (length, rollout) in enumerate(zip(LENGTHS, rollouts, strict=True)):
        old, target = (one[row, :length].double().numpy() for one in (experience.value_BT, experience.return_BT))
        now = response_values(run.value, rollout.prompt_ids, rollout.response_ids)
        clipped = old + np.clip(now - old, -0.05, 0.05)
        total += 0.5 * float(np.maximum((now - target) ** 2, (clipped - target) ** 2).sum())
        stopped += int(((clipped - target) ** 2 > (now - target) ** 2).sum())
    assert 0 < stopped < sum(LENGTHS)
    report = run._value_step(run.value_trainer, experience, [0, 1, 2, 3])
    assert report.loss == pytest.approx(total / sum(LENGTHS), rel=1e-5)
    assert report.sums["value_clipped"] == stopped


def test_55_on_a_shared_trunk_half_the_error_weighs_a_tenth(base: str) -> None:
    """The shared head starts at 0, so at first its error is the return itself."""
    assert (config().value_clip, config().value_coef) == (0.2, 0.1)
    run = run_of(base, value_function="shared")
    experience, _ = observed(run, 2, -3, 1, 4)
    error = 0.5 * float((experience.return_BT[experience.mask_BT].double() ** 2).mean())
    report, _ = run._policy_step(experience, [0, 1, 2, 3], 0)
    assert report.sums["value_loss"] == pytest.approx(error, abs=1e-5)
    assert report.loss == pytest.approx(report.sums["policy_loss"] + 0.1 * error, abs=1e-5)


@torch.no_grad()
def test_56_the_value_function_starts_from_nothing(base: str, reward_model: str) -> None:
    """The value function starts at random or from the policy, or loses the reward model's offset on the way, so the
    first advantages are noise that unteaches the policy.

    Source: the paper, section 3.5; arXiv 2503.01491 (VC-PPO); NeMo-Aligner and NeMo-RL warm the critic up.
    Here: `PpoRun` loads it from the reward model's folder, head and offset included, where both read the same tokens;
    otherwise, and where a function gives the reward, it says that it does not. There is no critic warm-up, as in the
    paper: values that start from the reward model know the scores before the first step.
    """
    run = run_of(base, reward_model)
    experience, _ = observed(run, 0, 0, 0, 0)
    library = AutoModelForSequenceClassification.from_pretrained(reward_model)
    offset = library.config.reward_offset
    assert offset == pytest.approx(0.375)
    for row, rollout in enumerate(rolled_out(run)[1]):
        states = [[*rollout.prompt_ids, *rollout.response_ids[:count]] for count in range(LENGTHS[row])]
        scores = [float(library(input_ids=torch.tensor([ids])).logits) - offset for ids in states]
        assert experience.value_BT[row, : LENGTHS[row]].tolist() == pytest.approx(scores, abs=1e-5)
    assert float(experience.value_BT[experience.mask_BT].std()) > 0.1


def test_56_a_value_function_with_a_random_head_is_said(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(base, None)
    assert "there is no reward model; the value function starts from the policy's trunk" in capsys.readouterr().err
