"""What PPO reports about its clipped losses: sums over the tokens that count, so that micro-batches add up.

The clip fractions are those of Ziegler et al.'s code: the tokens whose clipped loss is the larger one, and so is
what was trained. A ratio beyond the clip on the side where the unclipped loss is larger (a good advantage, a ratio too
low) does not count, because its gradient still flows.

These sums are tensors without dimensions, in which a token that does not count is a 0: picking out the others, or
reading a number, would wait for a GPU in the middle of an update.

Dimensions in names: B rollouts, T response tokens, M the tokens that count end to end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ratio_sums(
    logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> dict[str, Tensor]:
    """Of the policy's loss: tokens where the clip took hold, sums of the ratio and its logarithm, the largest ratio."""
    log_ratio_BT = torch.where(mask_BT, logprob_BT - old_logprob_BT, 0)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = -advantage_BT * ratio_BT.clamp(1 - clip, 1 + clip) > -advantage_BT * ratio_BT
    counted_BT = torch.where(mask_BT, ratio_BT, 0)
    return {
        "clipped": (clipped_BT & mask_BT).sum(),
        "square_log_ratio": (log_ratio_BT**2).sum(),
        "abs_log_ratio": log_ratio_BT.abs().sum(),
        "ratio": counted_BT.sum(),
        "largest": counted_BT.max(),
    }


def value_sums(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, *, clip: float
) -> dict[str, Tensor]:
    """Of the value function's loss: tokens where the clipped value's error is the larger one."""
    clipped_BT = old_value_BT + (value_BT - old_value_BT).clamp(-clip, clip)
    # Within the range the clipped value is the value but for rounding, which is no clipping.
    acts_BT = (value_BT - old_value_BT).abs() > clip
    is_larger_BT = acts_BT & ((clipped_BT - return_BT) ** 2 > (value_BT - return_BT) ** 2)
    return {"value_clipped": (is_larger_BT & mask_BT).sum()}


def explained_variance(value_M: Tensor, return_M: Tensor) -> float:
    """1 - Var(return - value) / Var(return); 0 where the returns do not vary."""
    spread = float(return_M.var(unbiased=False))
    return 0.0 if spread == 0 else 1 - float((return_M - value_M).var(unbiased=False)) / spread


def correlation(one_B: Tensor, other_B: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    if bool((one_B == one_B[0]).all()) or bool((other_B == other_B[0]).all()):
        return 0.0
    one_B, other_B = one_B.double() - one_B.double().mean(), other_B.double() - other_B.double().mean()
    return float(one_B @ other_B) / float(one_B.norm() * other_B.norm())


def standard_error(x_B: Tensor) -> float:
    """Of the mean of `x_B`; 0 for a single one, which does not say."""
    return float(x_B.std() / len(x_B) ** 0.5) if len(x_B) > 1 else 0.0
