"""The paper's equations against values worked out by hand, restatements in float64 and exact enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from tastemaker import losses
from tastemaker.losses import (
    adaptive_kl_coef,
    dpo_loss,
    gae,
    kl_estimate,
    policy_loss,
    ptx_loss,
    ranking_loss,
    sft_loss,
    shaped_rewards,
    value_loss,
    whiten,
)

Array = npt.NDArray[np.float64]

# A rollout of two responses of four tokens, worked through by hand with the released code's formulas
# (Ziegler et al. 2019): beta 0.15, gamma 1, lambda 0.95, both clips 0.2.
LOGPROB = [[-1, -0.5, -2, -0.1], [-0.7, -1.2, -0.3, -0.9]]
REFERENCE = [[-1.1, -0.7, -1.5, -0.2], [-0.6, -1, -0.8, -0.9]]
VALUE = [[0.1, 0.2, 0, -0.1], [0.3, 0.1, -0.2, 0.4]]
SCORE = [1.5, -0.5]
NEW_LOGPROB = [[-0.9, -0.8, -1.7, -0.1], [-0.9, -1, -0.35, -0.8]]
NEW_VALUE = [[0.5, 0.1, 0.1, 0], [0.2, 0.2, -0.5, 0.5]]
REWARD = [[-0.015, -0.03, 0.075, 1.485], [0.015, 0.03, -0.075, -0.5]]
ADVANTAGE = [[1.202877, 1.176713, 1.48075, 1.585], [-0.739325, -0.5835, -0.33, -0.9]]


def t(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_true(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def close(found: Tensor | float, expected: object, within: float = 1e-6) -> None:
    expected = t(expected) if not isinstance(expected, Tensor) else expected
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), expected.double(), rtol=0, atol=within)


class TestRolloutByHand:
    """Everything between log-probs and losses, on one rollout, to the digits of the hand calculation."""

    mask = all_true(2, 4)

    def rewards(self) -> Tensor:
        return shaped_rewards(t(SCORE), t(LOGPROB), t(REFERENCE), self.mask, kl_coef=0.15)

    def losses(self, reward_BT: Tensor) -> tuple[float, float]:
        advantage_BT = gae(reward_BT, t(VALUE), self.mask, gamma=1.0, lam=0.95)
        return_BT = advantage_BT + t(VALUE)
        whitened_BT = whiten(advantage_BT, self.mask)
        policy = policy_loss(t(NEW_LOGPROB), t(LOGPROB), whitened_BT, self.mask, clip=0.2, num_tokens=8)
        value = value_loss(t(NEW_VALUE), t(VALUE), return_BT, self.mask, clip=0.2, num_tokens=8)
        return float(policy), float(value)

    def test_rewards(self) -> None:
        close(self.rewards(), REWARD)
        # KL summed over a response is .1 + .2 - .5 + .1 = -.1 and -.1 - .2 + .5 + 0 = .2; their mean is .05
        close(kl_estimate(t(LOGPROB), t(REFERENCE), self.mask, estimator="k1").sum(1).mean(), 0.05)

    def test_advantages(self) -> None:
        advantage_BT = gae(t(REWARD), t(VALUE), self.mask, gamma=1.0, lam=0.95)
        close(advantage_BT, ADVANTAGE, within=5e-7)
        whitened = [[0.82614, 0.800447, 1.099001, 1.201371], [-1.081035, -0.92802, -0.679092, -1.238812]]
        close(whiten(advantage_BT, self.mask), whitened)

    def test_losses(self) -> None:
        policy, value = self.losses(self.rewards())
        assert policy == pytest.approx(0.000931, abs=5e-7)
        assert value == pytest.approx(0.540016, abs=5e-7)
        assert policy + 0.1 * value == pytest.approx(0.054933, abs=1e-6)

    def test_losses_with_whitened_rewards(self) -> None:
        reward_BT = whiten(self.rewards(), self.mask, shift_mean=False)
        advantage_BT = gae(reward_BT, t(VALUE), self.mask, gamma=1.0, lam=0.95)
        close(advantage_BT[0], [1.914089, 2.04837, 2.534657, 2.737235])
        policy, value = self.losses(reward_BT)
        assert policy == pytest.approx(0.000620, abs=5e-7)
        assert value == pytest.approx(1.708985, abs=5e-7)
        assert policy + 0.1 * value == pytest.approx(0.171519, abs=1e-6)


class TestWhiten:
    def test_printed_example(self) -> None:
        given_BT = t([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
        kept = whiten(given_BT, all_true(3, 3), shift_mean=False)
        close(kept.flatten(), [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492], within=5e-5)

    def test_population_variance_of_what_counts(self) -> None:
        # of 2 and 3: mean 2.5, population variance 0.25, so (2 - 2.5) / 0.5 = -1
        mask_BT = torch.tensor([[False, True, True, False]])
        close(whiten(t([[1, 2, 3, 4]]), mask_BT), [[0, -1, 1, 0]], within=1e-7)
        close(whiten(t([[1, 2, 3, 4]]), mask_BT, shift_mean=False), [[0, 1.5, 3.5, 0]], within=1e-7)

    @given(data=st.data(), shift_mean=st.booleans())
    def test_equals_numpy_on_what_counts(self, data: st.DataObject, shift_mean: bool) -> None:
        shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
        x, mask = data.draw(arrays(np.float64, shape, elements=st.floats(-9, 9))), data.draw(arrays(np.bool_, shape))
        expected, counted = np.zeros(shape), x[mask]
        if mask.any():
            shift = 0.0 if shift_mean else counted.mean()
            expected[mask] = (counted - counted.mean()) / np.sqrt(counted.var() + 1e-8) + shift
        close(whiten(t(x), torch.tensor(mask), shift_mean=shift_mean), expected, within=1e-9)

    def test_advantages_of_three_steps(self) -> None:
        close(whiten(t([[0.43675, 0.565, 0.7]]), all_true(1, 3)), [[-1.214144, -0.020934, 1.235077]])

    def test_nothing_counts(self) -> None:
        close(whiten(t([[5, 7]]), torch.zeros(1, 2, dtype=torch.bool)), [[0, 0]])

    def test_equal_values_become_their_mean(self) -> None:
        close(whiten(t([[3, 3, 3]]), all_true(1, 3)), [[0, 0, 0]])


class TestAdvantages:
    def test_three_steps_by_hand(self) -> None:
        # backwards: .7; (.3 - .4) + .95 * .7 = .565; (.4 - .5) + .95 * .565 = .43675
        value_BT = t([[0.5, 0.4, 0.3]])
        advantage_BT = gae(t([[0, 0, 1]]), value_BT, all_true(1, 3), gamma=1.0, lam=0.95)
        close(advantage_BT, [[0.43675, 0.565, 0.7]])
        close(advantage_BT + value_BT, [[0.93675, 0.965, 1.0]])

    @given(data=st.data(), gamma=st.floats(0, 1), lam=st.floats(0, 1))
    def test_equals_the_definition_on_what_counts(self, data: st.DataObject, gamma: float, lam: float) -> None:
        """Each row, written without its masked places, has A_t = sum_l (gamma lam)^l delta_(t+l)."""
        shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 7)))
        reward, value = (data.draw(arrays(np.float64, shape, elements=st.floats(-5, 5))) for _ in range(2))
        mask = data.draw(arrays(np.bool_, shape))
        junk = np.where(mask, 0.0, np.nan)
        found = gae(t(reward + junk), t(value + junk), torch.tensor(mask), gamma=gamma, lam=lam)
        expected = np.zeros(shape)
        for row in range(shape[0]):
            places = np.flatnonzero(mask[row])
            for i in range(len(places)):
                for j in range(i, len(places)):
                    following = value[row, places[j + 1]] if j + 1 < len(places) else 0.0
                    delta = reward[row, places[j]] + gamma * following - value[row, places[j]]
                    expected[row, places[i]] += (gamma * lam) ** (j - i) * delta
        close(found, expected, within=1e-9)

    def test_no_tokens(self) -> None:
        assert gae(t([[], []]), t([[], []]), all_true(2, 0), gamma=1.0, lam=0.95).shape == (2, 0)


class TestShapedRewards:
    def test_score_is_added_once_at_the_last_token_that_counts(self) -> None:
        mask_BT = torch.tensor([[True, False, True, False], [False, False, False, False], [False, True, True, True]])
        reward_BT = shaped_rewards(t([2, 3, -5]), t([[0.0] * 4] * 3), t([[0.0] * 4] * 3), mask_BT, kl_coef=0.1)
        close(reward_BT, [[0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, -5]])

    @pytest.mark.parametrize(("logprob", "expected"), [(-1.0, -0.1), (-3.0, 0.1)])
    def test_kl_is_a_penalty_where_the_policy_likes_a_token_more(self, logprob: float, expected: float) -> None:
        reward_BT = shaped_rewards(t([0]), t([[logprob]]), t([[-2]]), all_true(1, 1), kl_coef=0.1)
        close(reward_BT, [[expected]])

    def test_the_sum_is_score_minus_kl(self) -> None:
        reward_BT = shaped_rewards(t(SCORE), t(LOGPROB), t(REFERENCE), all_true(2, 4), kl_coef=0.15)
        close(reward_BT.sum(1), [1.5 + 0.15 * 0.1, -0.5 - 0.15 * 0.2])


class TestPolicyLoss:
    @pytest.mark.parametrize(
        ("advantage", "ratio", "loss", "slope"),
        [  # loss = -min(A r, A clip(r)); its slope in log r is -A r where unclipped
            (2.0, 1.1, -2.2, -2.2),
            (2.0, 1.5, -2.4, 0.0),  # already likely enough: nothing more to gain
            (2.0, 0.5, -1.0, -1.0),  # a good token became unlikely: pulled back without limit
            (-3.0, 1.1, 3.3, 3.3),
            (-3.0, 1.5, 4.5, 4.5),  # a bad token became likely: pushed down without limit
            (-3.0, 0.5, 2.4, 0.0),
        ],
    )
    def test_both_signs_and_all_sides_of_the_clip(
        self, advantage: float, ratio: float, loss: float, slope: float
    ) -> None:
        logprob_BT = t([[math.log(ratio) - 0.7]]).requires_grad_()
        found = policy_loss(logprob_BT, t([[-0.7]]), t([[advantage]]), all_true(1, 1), clip=0.2, num_tokens=1)
        found.backward()  # type: ignore[no-untyped-call]
        close(found.detach(), loss)
        assert logprob_BT.grad is not None
        close(logprob_BT.grad, [[slope]])

    def test_gradient_at_ratio_one_is_that_of_the_policy_gradient(self) -> None:
        logprob_BT = t([[-0.3, -2.0, -1.0]]).requires_grad_()
        advantage_BT = t([[1.5, -0.5, 0.0]])
        policy_loss(logprob_BT, logprob_BT.detach(), advantage_BT, all_true(1, 3), clip=0.2, num_tokens=3).backward()  # type: ignore[no-untyped-call]
        assert logprob_BT.grad is not None
        close(logprob_BT.grad, -advantage_BT / 3)


class TestValueLoss:
    @pytest.mark.parametrize(
        ("value", "target", "loss", "slope"),
        [  # old value 0, clip 0.2: half the larger of (v - R)^2 and (clip(v) - R)^2
            (0.1, 1.0, 0.405, -0.9),
            (0.5, 1.0, 0.32, 0.0),  # clipped to .2, whose error .8 is larger than .5
            (0.5, -1.0, 1.125, 1.5),
            (-0.5, 1.0, 1.125, -1.5),
            (-0.5, -1.0, 0.32, 0.0),
        ],
    )
    def test_all_sides_of_the_clip(self, value: float, target: float, loss: float, slope: float) -> None:
        value_BT = t([[value]]).requires_grad_()
        found = value_loss(value_BT, t([[0.0]]), t([[target]]), all_true(1, 1), clip=0.2, num_tokens=1)
        found.backward()  # type: ignore[no-untyped-call]
        close(found.detach(), loss)
        assert value_BT.grad is not None
        close(value_BT.grad, [[slope]])

    def test_clips_around_the_old_value(self) -> None:
        # v 1.5 is clipped to 1.2; errors to R = 2 are .5 and .8
        close(value_loss(t([[1.5]]), t([[1.0]]), t([[2.0]]), all_true(1, 1), clip=0.2, num_tokens=1), 0.32)


class TestRanking:
    scores: Tensor = t([1.2, 0.3, -0.4, 0.9])
    ranks: Tensor = torch.tensor([0, 1, 2, 0])  # responses 0 and 3 tie for first

    def test_four_responses_with_a_tie(self) -> None:
        # five of six pairs are kept; their sum is 1.606737
        close(ranking_loss(self.scores, self.ranks), 0.321347)
        close(ranking_loss(self.scores, self.ranks, normalize="all"), 0.267790)

    def test_a_pair(self) -> None:
        close(ranking_loss(t([1.2, 0.7])), 0.474077)  # log(1 + exp(-.5))
        close(ranking_loss(t([0.7, 1.2])), 0.974077)  # the same plus .5

    def test_best_first_without_ranks(self) -> None:
        close(ranking_loss(self.scores), ranking_loss(self.scores, torch.arange(4)))

    def test_only_the_order_of_ranks_matters(self) -> None:
        close(ranking_loss(self.scores, torch.tensor([1, 7, 9, 1])), ranking_loss(self.scores, self.ranks))

    def test_adding_a_constant_to_all_scores_changes_nothing(self) -> None:
        close(ranking_loss(self.scores + 11, self.ranks), ranking_loss(self.scores, self.ranks), within=1e-12)

    def test_scores_far_apart_stay_finite(self) -> None:
        close(ranking_loss(t([1e6, -1e6])), 0.0)
        close(ranking_loss(t([-1e6, 1e6])), 2e6)

    @given(data=st.data(), normalize=st.sampled_from(["pairs", "all"]))
    def test_value_and_gradient_are_the_enumerated_sum_over_pairs(
        self, data: st.DataObject, normalize: Literal["pairs", "all"]
    ) -> None:
        raters, count = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 7))
        scores = data.draw(arrays(np.float64, count, elements=st.floats(-4, 4)))
        ranks = data.draw(arrays(np.int64, (raters, count), elements=st.integers(0, count - 1)))
        total, slope, kept = 0.0, np.zeros(count), 0
        for rank in ranks:
            for a, b in combinations(range(count), 2):
                if rank[a] == rank[b]:
                    continue
                better, worse = (a, b) if rank[a] < rank[b] else (b, a)
                gap = scores[better] - scores[worse]
                total, kept = total + math.log1p(math.exp(-gap)), kept + 1
                slope[better] -= 1 / (1 + math.exp(gap))
                slope[worse] += 1 / (1 + math.exp(gap))
        divisor = max(kept, 1) if normalize == "pairs" else raters * count * (count - 1) / 2
        score_K = t(scores).requires_grad_()
        loss = ranking_loss(score_K, torch.tensor(ranks), normalize=normalize)
        loss.backward()  # type: ignore[no-untyped-call]
        close(loss.detach(), total / divisor, within=1e-9)
        assert score_K.grad is not None
        close(score_K.grad, slope / divisor, within=1e-9)

    @pytest.mark.parametrize("normalize", ["pairs", "all"])
    def test_all_tied_trains_nothing(self, normalize: Literal["pairs", "all"]) -> None:
        score_K = t([0.5, -2.0, 1.0]).requires_grad_()
        loss = ranking_loss(score_K, torch.tensor([0, 0, 0]), normalize=normalize)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(loss.detach()) == 0.0
        assert score_K.grad is not None
        assert score_K.grad.tolist() == [0.0, 0.0, 0.0]


class TestDpo:
    def test_values_of_the_formulas(self) -> None:
        close(dpo_loss(t([2.5]), t([0]), beta=0.1), 0.575939)
        close(dpo_loss(t([2.5]), t([0]), beta=0.1, label_smoothing=0.1), 0.600939)
        close(dpo_loss(t([2.5]), t([0]), beta=0.1, variant="ipo"), 6.25)  # (2.5 - 5)^2
        # log-probs .1 and .2 against -.1 and .5: h = -.1 + .6
        close(dpo_loss(t([0.1 - 0.2]), t([-0.1 - 0.5]), beta=0.1), 0.668460)

    def test_extremes_stay_finite(self) -> None:
        # h = (410 - 810.5) - (-610 - 110.6) = 320.1, and log(1 + exp(-32.01)) = 1.25e-14
        loss = float(dpo_loss(t([410 - 810.5]), t([-610 - 110.6]), beta=0.1))
        assert loss == pytest.approx(1.2538e-14, rel=1e-4)
        assert float(dpo_loss(t([-1e5]), t([1e5]), beta=0.1)) == pytest.approx(2e4)

    def test_log_two_before_the_first_step(self) -> None:
        close(dpo_loss(t([-3.7, 8.0]), t([-3.7, 8.0]), beta=0.1), math.log(2))

    def test_ipo_aims_at_a_margin(self) -> None:
        # the loss is least, 0, at h = 1 / (2 beta) = 2.5, and grows on either side
        close(dpo_loss(t([2.5]), t([0]), beta=0.2, variant="ipo"), 0.0)
        close(dpo_loss(t([3.5]), t([0]), beta=0.2, variant="ipo"), 1.0)
        close(dpo_loss(t([1.5]), t([0]), beta=0.2, variant="ipo"), 1.0)

    @pytest.mark.parametrize("variant", ["sigmoid", "ipo"])
    def test_halves_add_up_to_the_whole(self, variant: Literal["sigmoid", "ipo"]) -> None:
        policy_B, ref_B = t([0.3, -1.0, 2.0, 5.0, -4.0]), t([1.0, 0.0, -1.0, 2.0, 0.5])
        whole = dpo_loss(policy_B, ref_B, beta=0.3, variant=variant)
        parts = [
            dpo_loss(policy_B[part], ref_B[part], beta=0.3, variant=variant, num_pairs=5)
            for part in (slice(0, 2), slice(2, 5))
        ]
        close(parts[0] + parts[1], whole)


class TestKlEstimators:
    LOGPROB = ((0.5, 0.2, 0.1), (0.6, 0.2, 0.1))
    REFERENCE = ((0.4, 0.3, 0.0), (0.7, 0.1, 0.3))

    @pytest.mark.parametrize(
        ("estimator", "expected"),
        [
            ("k1", [[0.1, -0.1, 0.1], [-0.1, 0.1, -0.2]]),
            ("k2", [[0.005, 0.005, 0.005], [0.005, 0.005, 0.02]]),
            ("k3", [[0.004837, 0.005171, 0.004837], [0.005171, 0.004837, 0.021403]]),
        ],
    )
    def test_values(self, estimator: Literal["k1", "k2", "k3"], expected: list[list[float]]) -> None:
        close(kl_estimate(t(self.LOGPROB), t(self.REFERENCE), all_true(2, 3), estimator=estimator), expected)

    # A softmax over five tokens and a reference: every expectation is a sum over the vocabulary.
    LOGITS = (0.3, -1.1, 0.7, 0.0, 1.9)
    REFERENCE_LOGITS = (1.2, 0.4, -0.6, 0.1, 0.2)

    def expected(self, of: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
        """E[of(log pi, log ref)] over tokens drawn from pi, and the gradient that differentiating samples gives."""
        logits_V = t(self.LOGITS).requires_grad_()
        logprob_V, ref_V = logits_V.log_softmax(0), t(self.REFERENCE_LOGITS).log_softmax(0)
        mean = (logprob_V.detach().exp() * of(logprob_V[None], ref_V[None])[0]).sum()
        (gradient_V,) = torch.autograd.grad(mean, logits_V)
        return float(mean.detach()), gradient_V

    def truth(self) -> tuple[float, Tensor]:
        logits_V = t(self.LOGITS).requires_grad_()
        logprob_V, ref_V = logits_V.log_softmax(0), t(self.REFERENCE_LOGITS).log_softmax(0)
        divergence = (logprob_V.exp() * (logprob_V - ref_V)).sum()
        (gradient_V,) = torch.autograd.grad(divergence, logits_V)
        return float(divergence.detach()), gradient_V

    def estimated(self, estimator: Literal["k1", "k2", "k3"]) -> tuple[float, Tensor]:
        return self.expected(lambda a, b: kl_estimate(a, b, all_true(1, 5), estimator=estimator))

    def test_k1_and_k3_are_unbiased_values_and_k2_is_not(self) -> None:
        divergence, _ = self.truth()
        assert self.estimated("k1")[0] == pytest.approx(divergence, abs=1e-12)
        assert self.estimated("k3")[0] == pytest.approx(divergence, abs=1e-12)
        assert abs(self.estimated("k2")[0] - divergence) > 0.01

    def test_as_a_loss_only_k2_has_the_true_gradient(self) -> None:
        _, gradient_V = self.truth()
        close(self.estimated("k1")[1], torch.zeros(5), within=1e-12)
        close(self.estimated("k2")[1], gradient_V, within=1e-12)
        biased_V = self.estimated("k3")[1]
        assert float((biased_V - gradient_V).norm() / gradient_V.norm()) > 0.1
        # what k3's gradient is instead: that of the reverse divergence KL(ref || pi), which is pi - ref
        close(biased_V, t(self.LOGITS).softmax(0) - t(self.REFERENCE_LOGITS).softmax(0), within=1e-12)

    def test_k1_in_the_reward_has_the_true_gradient(self) -> None:
        """The policy gradient of the shaped reward with a score of 0 and kl_coef 1 is minus that of the divergence."""

        def surrogate(logprob_BV: Tensor, ref_BV: Tensor) -> Tensor:
            column_V1 = logprob_BV.detach().T  # every token as a response of its own
            reward_V1 = shaped_rewards(torch.zeros(5).double(), column_V1, ref_BV.T, all_true(5, 1), kl_coef=1.0)
            return reward_V1.T * logprob_BV

        close(self.expected(surrogate)[1], -self.truth()[1], within=1e-12)


class TestAdaptiveKl:
    @pytest.mark.parametrize(
        ("kl", "expected"),
        [(0, 0.148464), (3, 0.148464), (4.8, 0.148464), (6, 0.15), (6.6, 0.150768), (12, 0.151536), (30, 0.151536)],
    )
    def test_one_step(self, kl: float, expected: float) -> None:
        # .15 (1 + e 512 / 10000) with e = kl / 6 - 1 within +-.2
        found = adaptive_kl_coef(0.15, kl, target=6, horizon=10_000, num_episodes=512)
        assert found == pytest.approx(expected, abs=5e-7)

    def test_six_steps_in_a_row(self) -> None:
        coefficient, found = 0.15, []
        for kl in (0, 3, 6, 6.6, 12, 30):
            coefficient = adaptive_kl_coef(coefficient, kl, target=6, horizon=10_000, num_episodes=512)
            found.append(coefficient)
        assert found == pytest.approx([0.148464, 0.146944, 0.146944, 0.147696, 0.149208, 0.150736], abs=5e-7)


class TestLikelihood:
    def test_sft(self) -> None:
        mask_BT = torch.tensor([[True, False, True], [True, True, False]])
        # counted: -1, -4, -.5, -.25
        close(sft_loss(t([[-1, -2, -4], [-0.5, -0.25, -8]]), mask_BT, num_tokens=4), 5.75 / 4)

    def test_ptx_is_gamma_times_sft(self) -> None:
        close(ptx_loss(t([-1, -3]), all_true(2), gamma=27.8, num_tokens=2), 55.6)


def restated(name: str, x: Array, old: Array, target: Array, mask: Array) -> float:
    """The policy's and the value function's loss summed token by token, from the formulas of the papers."""
    total = 0.0
    for a, b, c, counts in zip(x.flat, old.flat, target.flat, mask.flat, strict=True):
        if counts and name == "policy":  # c is the advantage
            ratio = math.exp(a - b)
            total += max(-c * ratio, -c * min(max(ratio, 0.8), 1.2))
        elif counts:  # c is the return
            clipped = min(max(a, b - 0.2), b + 0.2)
            total += 0.5 * max((a - c) ** 2, (clipped - c) ** 2)
    return total


@given(data=st.data(), name=st.sampled_from(["policy", "value"]))
def test_clipped_losses_equal_a_sum_token_by_token(data: st.DataObject, name: str) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
    x, old, target = (data.draw(arrays(np.float64, shape, elements=st.floats(-2, 2))) for _ in range(3))
    mask = data.draw(arrays(np.bool_, shape))
    loss = TOKEN_LOSSES[name][1]([t(x), t(old), t(target)], torch.tensor(mask), 7.0)
    close(loss, restated(name, x, old, target, mask) / 7, within=1e-9)


# --- properties of all of them ---------------------------------------------------------------------------------------

TokenLoss = Callable[[list[Tensor], Tensor, float], Tensor]
TOKEN_LOSSES: dict[str, tuple[int, TokenLoss]] = {
    "sft": (1, lambda x, mask, n: sft_loss(x[0], mask, num_tokens=n)),
    "ptx": (1, lambda x, mask, n: ptx_loss(x[0], mask, gamma=3.0, num_tokens=n)),
    "policy": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, clip=0.2, num_tokens=n)),
    "value": (3, lambda x, mask, n: value_loss(x[0], x[1], x[2], mask, clip=0.2, num_tokens=n)),
    "k2": (2, lambda x, mask, n: kl_estimate(x[0], x[1], mask, estimator="k2").sum() / n),
    "k3": (2, lambda x, mask, n: kl_estimate(x[0], x[1], mask, estimator="k3").sum() / n),
    "rewards": (
        2,
        lambda x, mask, n: (
            shaped_rewards(x[0].new_full((len(mask),), 2.0), x[0], x[1], mask, kl_coef=0.3).square().sum() / n
        ),
    ),
    "gae": (2, lambda x, mask, n: gae(x[0], x[1], mask, gamma=0.9, lam=0.8).square().sum() / n),
    "whiten": (1, lambda x, mask, n: (whiten(x[0], mask) ** 3).sum() / n),
    "whiten, mean kept": (1, lambda x, mask, n: (whiten(x[0], mask, shift_mean=False) ** 2).sum() / n),
}
SUMS = sorted(TOKEN_LOSSES.keys() - {"whiten", "whiten, mean kept"})  # whitening looks at the whole batch, by design
every_token_loss = pytest.mark.parametrize("name", sorted(TOKEN_LOSSES))


def inputs(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


MASK = torch.tensor(
    [[True, True, False, True, False], [False, True, True, True, True], [True, False, False, False, False]]
)


def value_and_gradients(name: str, given: list[Tensor], mask: Tensor, num_tokens: float) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    loss = TOKEN_LOSSES[name][1](leaves, mask, num_tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]


@every_token_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_masked_has_no_influence(name: str, junk: float) -> None:
    clean = inputs(TOKEN_LOSSES[name][0], 3, 5)
    dirty = [torch.where(MASK, tensor, junk) for tensor in clean]
    value, gradients = value_and_gradients(name, clean, MASK, 7)
    dirty_value, dirty_gradients = value_and_gradients(name, dirty, MASK, 7)
    assert torch.equal(value, dirty_value)
    for gradient, dirty_gradient in zip(gradients, dirty_gradients, strict=True):
        assert torch.equal(gradient, dirty_gradient)
        assert torch.equal(gradient[~MASK], torch.zeros_like(gradient[~MASK]))


@every_token_loss
def test_nothing_counts_gives_zero_and_zero_gradients(name: str) -> None:
    value, gradients = value_and_gradients(
        name, inputs(TOKEN_LOSSES[name][0], 3, 5), torch.zeros(3, 5, dtype=torch.bool), 1
    )
    assert float(value) == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@every_token_loss
def test_gradients_against_finite_differences(name: str) -> None:
    count, loss = TOKEN_LOSSES[name]
    given = [tensor.requires_grad_() for tensor in inputs(count, 3, 5, seed=3)]
    assert torch.autograd.gradcheck(lambda *x: loss(list(x), MASK, 7.0), given)


@pytest.mark.parametrize("name", SUMS)
@settings(max_examples=25)
@given(data=st.data())
def test_microbatches_add_up_to_the_batch(name: str, data: st.DataObject) -> None:
    """Rows in any order and any grouping give the same sum, as the denominator is the whole batch's."""
    rows = data.draw(st.integers(1, 6))
    given_BT = inputs(TOKEN_LOSSES[name][0], rows, 5, seed=data.draw(st.integers(0, 99)))
    mask_BT = torch.tensor(data.draw(arrays(np.bool_, (rows, 5))))
    order = data.draw(st.permutations(range(rows)))
    cut = data.draw(st.integers(0, rows))
    num_tokens = float(mask_BT.sum().clamp(min=1))
    whole = TOKEN_LOSSES[name][1](given_BT, mask_BT, num_tokens)
    total = t(0.0)
    for part in (order[:cut], order[cut:]):
        if part:
            total += TOKEN_LOSSES[name][1]([tensor[part] for tensor in given_BT], mask_BT[part], num_tokens)
    close(total, whole, within=1e-12)


@pytest.mark.parametrize("name", sorted(TOKEN_LOSSES))
def test_padding_to_the_right_is_inert(name: str) -> None:
    given_BT = inputs(TOKEN_LOSSES[name][0], 3, 5)
    padded = [torch.cat([tensor, torch.full((3, 2), 9.0)], dim=1) for tensor in given_BT]
    mask = torch.cat([MASK, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    close(TOKEN_LOSSES[name][1](padded, mask, 7), TOKEN_LOSSES[name][1](given_BT, MASK, 7), within=1e-12)


@pytest.mark.parametrize("name", sorted(TOKEN_LOSSES))
def test_a_mask_that_would_broadcast_is_refused(name: str) -> None:
    given_BT = inputs(TOKEN_LOSSES[name][0], 3, 5)
    with pytest.raises(ValueError, match=r"has shape \(3, 5\), the mask \(3, 1\)"):
        TOKEN_LOSSES[name][1](given_BT, MASK[:, :1], 7)
    with pytest.raises(ValueError, match="the mask has dtype"):
        TOKEN_LOSSES[name][1](given_BT, MASK.double(), 7)


@every_token_loss
def test_every_tensor_that_would_broadcast_is_refused(name: str) -> None:
    given_BT = inputs(TOKEN_LOSSES[name][0], 3, 5)
    for place in range(len(given_BT)):
        narrow = [tensor[:, :1] if place == other else tensor for other, tensor in enumerate(given_BT)]
        with pytest.raises(ValueError, match=r"has shape \(3, 1\), the mask \(3, 5\)"):
            TOKEN_LOSSES[name][1](narrow, MASK, 7)


def test_what_is_made_inside_lies_where_what_is_given_lies() -> None:
    given_BT, score_K = inputs(3, 3, 5), t([1, 2])
    with torch.device("meta"):  # where new tensors go that are not told better
        for count, loss in TOKEN_LOSSES.values():
            assert loss(given_BT[:count], MASK, 7.0).device == MASK.device
        assert ranking_loss(score_K).device == score_K.device


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy_loss(t([[1, 2]]), t([[1], [2]]), t([[1, 2]]), all_true(1, 2), clip=1, num_tokens=1), "old_log"),
        (lambda: shaped_rewards(t([[1]]), t([[1]]), t([[1]]), all_true(1, 1), kl_coef=1), "one score for each"),
        (lambda: ranking_loss(t([[1, 2]])), "K scores of one prompt"),
        (lambda: ranking_loss(t([1, 2]), torch.tensor([0, 1, 0, 1])), "expected"),
        (lambda: ranking_loss(t([1, 2]), torch.tensor([[0], [1]])), "expected"),
        (lambda: ranking_loss(t([1, 2]), normalize="some"), "'pairs' or 'all'"),  # type: ignore[arg-type]
        (lambda: dpo_loss(t([1, 2]), t([[1], [2]]), beta=1), "ref_margin_B"),
        (lambda: dpo_loss(t([1]), t([1]), beta=1, variant="hinge"), "'sigmoid' or 'ipo'"),  # type: ignore[arg-type]
        (lambda: dpo_loss(t([1]), t([1]), beta=1, variant="ipo", label_smoothing=0.1), "leave it at 0"),
        (lambda: kl_estimate(t([[1]]), t([[1]]), all_true(1, 1), estimator="k4"), "'k1', 'k2' or 'k3'"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_single_precision_is_kept() -> None:
    given_BT = [tensor.float() for tensor in inputs(3, 3, 5)]
    for count, loss in TOKEN_LOSSES.values():
        found = loss(given_BT[:count], MASK, 7.0)
        assert found.dtype == torch.float32


def test_the_epsilon_is_that_of_the_released_code() -> None:
    assert losses.WHITENING_EPSILON == 1e-8
