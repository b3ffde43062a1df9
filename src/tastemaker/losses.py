"""The equations of the paper, as pure functions of tensors. This module imports nothing of ours.

Dimensions in names: B rollouts (or pairs), T response tokens, K responses of one prompt, R raters. A `mask` is True
where a token counts. Every sum over tokens is divided by a denominator that the caller passes in, counted over the
whole optimizer step, so that micro-batches and devices do not change a gradient. What stands at a masked place, even a
NaN, has no influence on a value or a gradient. Shapes that would broadcast are refused.

Sources: Ouyang et al. 2022, arXiv 2203.02155 (Eq. 1 and 2); Schulman et al. 2017, arXiv 1707.06347 (PPO) and 2016,
arXiv 1506.02438 (GAE); Ziegler et al. 2019, arXiv 1909.08593, and its code (whitening, value clipping, adaptive KL);
Rafailov et al. 2023, arXiv 2305.18290 (DPO); Azar et al. 2023, arXiv 2310.12036 (IPO); Schulman's note on estimators
of the KL divergence, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

WHITENING_EPSILON = 1e-8  # as in the code of Ziegler et al.


def sft_loss(logprob_BT: Tensor, mask_BT: Tensor, *, num_tokens: float) -> Tensor:
    """Negative log-likelihood of the demonstrations' response tokens (section 3.5), a mean over `num_tokens`."""
    _check_alike(mask_BT, logprob_BT=logprob_BT)
    return -_masked(logprob_BT, mask_BT).sum() / num_tokens


def ptx_loss(logprob_BT: Tensor, mask_BT: Tensor, *, gamma: float, num_tokens: float) -> Tensor:
    """The second term of Eq. 2 as a loss: `gamma` times the mean negative log-likelihood of pretraining tokens.

    The paper's gamma of 27.8 goes with a normalisation that it does not state; ours is per pretraining token, beside
    a policy loss that is per response token.
    """
    return gamma * sft_loss(logprob_BT, mask_BT, num_tokens=num_tokens)


def ranking_loss(
    score_K: Tensor,
    rank_K: Tensor | None = None,
    distinct_KK: Tensor | None = None,
    *,
    normalize: Literal["pairs", "all"] = "pairs",
) -> Tensor:
    """Eq. 1 for one prompt: the mean of -log sigmoid(better score - worse score) over its pairs of responses.

    `rank_K` gives each response's rank, 0 the best; equal ranks are ties, whose pairs are dropped; None says that the
    responses come best first. Several raters' rankings of the same responses are rows of `rank_RK`, and their pairs
    count together. The divisor is the number of pairs kept ("pairs") or of all pairs, C(K,2) for each rater ("all");
    the paper does not say which. Without a single untied pair the loss is 0, with zero gradients. `distinct_KK` is
    False where two responses are of one text: such a pair, which says nothing, is in neither sum nor divisor.
    """
    if score_K.ndim != 1:
        raise ValueError(f"score_K has shape {tuple(score_K.shape)}; expected the K scores of one prompt.")
    num_responses = score_K.shape[0]
    if rank_K is None:
        rank_K = torch.arange(num_responses, device=score_K.device)
    if rank_K.ndim not in (1, 2) or rank_K.shape[-1] != num_responses:
        raise ValueError(
            f"rank_K has shape {tuple(rank_K.shape)}; expected [K] or [R, K] with the K = {num_responses} of score_K."
        )
    rank_RK = rank_K.reshape(-1, num_responses)
    if distinct_KK is None:
        distinct_KK = ~torch.eye(num_responses, dtype=torch.bool, device=score_K.device)
    better_RKK = (rank_RK[:, :, None] < rank_RK[:, None, :]) & distinct_KK
    loss_KK = -logsigmoid(score_K[:, None] - score_K[None, :])
    if normalize == "pairs":
        num_pairs = int(better_RKK.sum())
    elif normalize == "all":
        num_pairs = rank_RK.shape[0] * int(distinct_KK.sum()) // 2
    else:
        raise ValueError(f"normalize is {normalize!r}; it must be 'pairs' or 'all'.")
    return (loss_KK * better_RKK.sum(0)).sum() / max(num_pairs, 1)


def shaped_rewards(
    score_B: Tensor, logprob_BT: Tensor, ref_logprob_BT: Tensor, mask_BT: Tensor, *, kl_coef: float
) -> Tensor:
    """The first term of Eq. 2 as a reward per token: -kl_coef (log pi - log pi_ref), plus the score at the last token.

    The KL term is the estimator k1; inside the reward its gradient is the true one. The score is added once, at the
    last True of each row's mask; a row without any has no reward.
    """
    _check_alike(mask_BT, logprob_BT=logprob_BT, ref_logprob_BT=ref_logprob_BT)
    if score_B.shape != mask_BT.shape[:1]:
        raise ValueError(
            f"score_B has shape {tuple(score_B.shape)}; expected one score for each of {mask_BT.shape[0]} rows."
        )
    reward_BT = -kl_coef * _masked(logprob_BT - ref_logprob_BT, mask_BT)
    is_last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    return reward_BT + _masked(score_B[:, None].expand_as(reward_BT), is_last_BT)


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates; returns are advantage + value. Both are 0 where the mask is False.

    The value after a row's last token is 0: an episode ends there, cut off or not (what a cut-off response deserves is
    said in its score). Masked places inside a row are skipped, as though the row had been written without them.
    """
    _check_alike(mask_BT, reward_BT=reward_BT, value_BT=value_BT)
    next_value_B = reward_BT.new_zeros(reward_BT.shape[0])
    next_advantage_B = torch.zeros_like(next_value_B)
    advantage_BT = torch.zeros_like(reward_BT)
    for t in reversed(range(reward_BT.shape[1])):
        counts_B = mask_BT[:, t]
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantage_BT[:, t] = torch.where(counts_B, advantage_B, 0.0)
        next_advantage_B = torch.where(counts_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(counts_B, value_BT[:, t], next_value_B)
    return advantage_BT


def whiten(x_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`x_BT` with variance 1 over the places that count, and mean 0 (the old mean where `shift_mean` is False).

    Population variance, as in the code of Ziegler et al. Called once per rollout on the whole batch, before minibatches
    are drawn: a minibatch's own mean would make the gradient depend on the minibatch's size.
    """
    _check_alike(mask_BT, x_BT=x_BT)
    count = mask_BT.sum().clamp(min=1)
    mean = _masked(x_BT, mask_BT).sum() / count
    centred_BT = _masked(x_BT - mean, mask_BT)
    variance = (centred_BT**2).sum() / count
    whitened_BT = centred_BT * torch.rsqrt(variance + WHITENING_EPSILON)
    return _masked(whitened_BT if shift_mean else whitened_BT + mean, mask_BT)


def policy_loss(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    num_tokens: float,
) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, Eq. 7) as a loss: the mean of -min(A r, A clip(r, 1 - c, 1 + c))."""
    _check_alike(mask_BT, logprob_BT=logprob_BT, old_logprob_BT=old_logprob_BT, advantage_BT=advantage_BT)
    ratio_BT = torch.exp(_masked(logprob_BT - old_logprob_BT, mask_BT))
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    surrogate_BT = torch.minimum(advantage_BT * ratio_BT, advantage_BT * clipped_BT)
    return -_masked(surrogate_BT, mask_BT).sum() / num_tokens


def value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, *, clip: float, num_tokens: float
) -> Tensor:
    """Half the squared error to the return, the larger of the error of V and of V clipped to within `clip` of old V."""
    _check_alike(mask_BT, value_BT=value_BT, old_value_BT=old_value_BT, return_BT=return_BT)
    clipped_BT = old_value_BT + (value_BT - old_value_BT).clamp(-clip, clip)
    error_BT = _masked(value_BT - return_BT, mask_BT)
    clipped_error_BT = _masked(clipped_BT - return_BT, mask_BT)
    return 0.5 * torch.maximum(error_BT**2, clipped_error_BT**2).sum() / num_tokens


def dpo_loss(
    policy_margin_B: Tensor,
    ref_margin_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    variant: Literal["sigmoid", "ipo"] = "sigmoid",
    num_pairs: float | None = None,
) -> Tensor:
    """DPO (arXiv 2305.18290, Eq. 7) or IPO (arXiv 2310.12036, Eq. 17), a mean over `num_pairs` (None: over B).

    A margin is log p(chosen) - log p(rejected), each a sum over response tokens. With h = policy margin - reference
    margin, "sigmoid" is -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) for label smoothing e (conservative DPO),
    and "ipo" is (h - 1 / (2 beta))^2.
    """
    if policy_margin_B.shape != ref_margin_B.shape:
        raise ValueError(
            f"policy_margin_B has shape {tuple(policy_margin_B.shape)}, ref_margin_B {tuple(ref_margin_B.shape)}; "
            "give one of each for a pair."
        )
    h_B = policy_margin_B - ref_margin_B
    if variant == "sigmoid":
        loss_B = -(1 - label_smoothing) * logsigmoid(beta * h_B) - label_smoothing * logsigmoid(-beta * h_B)
    elif variant == "ipo":
        if label_smoothing:
            raise ValueError(f"label_smoothing is {label_smoothing}, but variant 'ipo' has none; leave it at 0.")
        loss_B = (h_B - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"variant is {variant!r}; it must be 'sigmoid' or 'ipo'.")
    return loss_B.sum() / (loss_B.numel() if num_pairs is None else num_pairs)


def kl_estimate(
    logprob_BT: Tensor, ref_logprob_BT: Tensor, mask_BT: Tensor, *, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Per-token estimates of KL(pi || pi_ref) from tokens sampled from pi; 0 where the mask is False.

    With d = log pi - log pi_ref: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d. k1 and k3 are unbiased values. As a loss
    to differentiate, only k2 has the true gradient: k1's is 0 in expectation and k3's is biased, which is why the
    penalty belongs in the reward.
    """
    _check_alike(mask_BT, logprob_BT=logprob_BT, ref_logprob_BT=ref_logprob_BT)
    d_BT = _masked(logprob_BT - ref_logprob_BT, mask_BT)
    if estimator == "k1":
        return d_BT
    if estimator == "k2":
        return 0.5 * d_BT**2
    if estimator == "k3":
        return torch.expm1(-d_BT) + d_BT
    raise ValueError(f"estimator is {estimator!r}; it must be 'k1', 'k2' or 'k3'.")


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_episodes: int) -> float:
    """The next KL coefficient (Ziegler et al. section 2.2): proportional control, the error clipped to 20 %.

    `kl` is the mean over responses of the KL summed over tokens; `num_episodes` is the batch that it was measured on.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is True and 0 elsewhere; unlike a product, it lets no NaN through."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _check_alike(mask: Tensor, **named: Tensor) -> None:
    """Refuse a mask that is not boolean and tensors of other shapes than the mask's: broadcasting would hide a slip."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {mask.dtype}; give booleans, True where a token counts.")
    for name, tensor in named.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the mask {tuple(mask.shape)}; make them equal.")
