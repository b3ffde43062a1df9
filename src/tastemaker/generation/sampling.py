"""How the next token is drawn: the sampling settings, the random numbers and the draw itself.

The paper samples its rollouts from the policy's own softmax at temperature 1 (appendix C.4), and that is the default.
Two things differ from the usual `torch.multinomial`:

- Random numbers are counter-based (Philox 4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
  the number for step t of response j is a pure function of (seed, j, t). A response therefore does not depend on which
  other responses share its batch, nor on their order.
- A token is found by inverting the cumulative distribution on two levels, blocks first and then inside one block. That
  is some thirty times faster than `multinomial` at a vocabulary of 50,000, and the log-probability falls out of it.

Dimensions: B rows (responses being decoded), V vocabulary, N blocks, C tokens of one block, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tastemaker.errors import ConfigError

# Between 32 and 256 the cost of a draw is flat (measured for vocabularies of 512 to 152,000), and 64 divides most
# vocabulary sizes, which saves the copy that pads the last block.
BLOCK = 64

# The constants of Philox 4x32.
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The law that responses are drawn from, and when a response ends."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    greedy: bool = False  # take the likeliest token; temperature, top_k and top_p then play no part
    top_k: int | None = None  # keep only this many of the likeliest tokens; None keeps all
    top_p: float = 1.0  # keep only the likeliest tokens that together reach this probability; 1 keeps all
    stop_texts: tuple[str, ...] = ()  # a response whose text has come to hold one of these has ended too

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0. For the likeliest token set greedy = true."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be 1 or more, or left out to keep every token.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 keeps every token).")
        if "" in self.stop_texts:
            raise ConfigError("a stop text is empty, so every response would end at once; leave it out.")

    @property
    def is_policy_law(self) -> bool:
        """Whether tokens are drawn from the policy's whole (tempered) softmax, as policy gradients require.

        Greedy, top-k and top-p decoding draw from another law, so the ratio in the PPO loss would be wrong.
        """
        return not self.greedy and self.top_k is None and self.top_p == 1.0


def draw_uniforms(seeds: Sequence[int], responses: Sequence[int], steps: int) -> npt.NDArray[np.float32]:
    """Uniform numbers between 0 and 1, `[steps, rows]`: row r holds those of response `responses[r]` under `seeds[r]`.

    A seed may be any integer; it is taken modulo 2**64.
    """
    blocks = -(-steps // 4)  # one call of Philox gives four numbers
    seed = np.array([value % 2**64 for value in seeds], dtype=np.uint64)
    rows = len(seed)
    counter = np.zeros((4, blocks, rows), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)[:, None]
    counter[1] = np.asarray(responses, dtype=np.uint64)[None, :]
    words = philox(counter, np.stack([seed & _LOW, seed >> _SHIFT]))
    bits = np.moveaxis(words, 0, 1).reshape(blocks * 4, rows)[:steps]
    return to_uniform(bits)


def to_uniform(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Random 32-bit words as numbers strictly between 0 and 1: the middles of 2**23 equal parts, exact in fp32.

    0 itself would draw the first token of the vocabulary that has any probability at all, one of e^-90 included.
    """
    return ((words >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


def philox(counter: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Philox 4x32-10: four random 32-bit words for each counter (`[4, ...]`) under a key (`[2, ...]`).

    The words are held in 64-bit integers, so that a product of two of them keeps its high half.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return np.stack([c0, c1, c2, c3])


def choose(logit_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row and its fp32 log-probability. Overwrites `logit_BV` where it is fp32 already."""
    logit_BV = logit_BV.float()
    if sampling.greedy:
        largest_B, token_B = logit_BV.max(dim=1)
        return token_B, largest_B - logit_BV.logsumexp(dim=1)
    if sampling.temperature != 1.0:
        logit_BV = logit_BV.div_(sampling.temperature)
    if sampling.top_k is not None:
        logit_BV = keep_top_k(logit_BV, sampling.top_k)
    if sampling.top_p < 1.0:
        logit_BV = keep_top_p(logit_BV, sampling.top_p)
    return invert_cdf(logit_BV, uniform_B)


def invert_cdf(logit_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logit) by the numbers in `uniform_B`. Overwrites `logit_BV` (fp32).

    No token of probability zero is ever drawn: both searches look for the first cumulative sum that is *greater* than
    a target below the last sum, so the sum rises there. A GPU adds up a single row piece by piece, and its sums may
    rise by rounding where nothing was added: for what would be drawn there, the likeliest token is. Rows that are not
    finite yield a NaN log-probability and some valid token.
    """
    rows, vocabulary = logit_BV.shape
    weight_BV = logit_BV.sub_(logit_BV.amax(dim=1, keepdim=True)).exp_()
    if vocabulary % BLOCK:
        weight_BV = torch.nn.functional.pad(weight_BV, (0, -vocabulary % BLOCK))
    weight_BNC = weight_BV.view(rows, -1, BLOCK)

    sum_BN = weight_BNC.sum(dim=2).cumsum(dim=1)
    total_B1 = sum_BN[:, -1:]
    target_B1 = uniform_B[:, None] * total_B1  # below the total even after rounding, as no number is above 1 - 2**-24
    block_B1 = torch.searchsorted(sum_BN, target_B1, right=True).clamp_(max=sum_BN.shape[1] - 1)
    before_B1 = sum_BN.gather(1, (block_B1 - 1).clamp_(min=0)).mul_(block_B1 > 0)

    weight_BC = weight_BNC[torch.arange(rows, device=logit_BV.device), block_B1[:, 0]]
    inner_BC = weight_BC.cumsum(dim=1)
    end_B1 = inner_BC[:, -1:]  # rounding may put the target at or beyond it
    inner_target_B1 = torch.minimum(target_B1 - before_B1, torch.nextafter(end_B1, torch.zeros_like(end_B1)))
    inside_B1 = torch.searchsorted(inner_BC, inner_target_B1, right=True)
    token_B1 = (block_B1 * BLOCK).add_(inside_B1).clamp_(max=vocabulary - 1)
    if logit_BV.is_cuda:
        token_B1 = or_likeliest(token_B1, weight_BV)
    return token_B1[:, 0], (weight_BV.gather(1, token_B1) / total_B1).log_()[:, 0]


def or_likeliest(token_B1: Tensor, weight_BV: Tensor) -> Tensor:
    """The tokens, and the likeliest of a row in place of one of weight zero; NaN is left alone."""
    return torch.where(weight_BV.gather(1, token_B1) == 0, weight_BV.argmax(dim=1, keepdim=True), token_B1)


def keep_top_k(logit_BV: Tensor, k: int) -> Tensor:
    """Exclude all but the k likeliest tokens. Tokens tied with the k-th are kept."""
    if k >= logit_BV.shape[1]:
        return logit_BV
    kth_B1 = logit_BV.topk(k, dim=1).values[:, -1:]
    return logit_BV.masked_fill(logit_BV < kth_B1, float("-inf"))


def keep_top_p(logit_BV: Tensor, p: float) -> Tensor:
    """Exclude all but the smallest set of likeliest tokens whose probabilities add up to at least p."""
    sorted_BV, order_BV = logit_BV.softmax(dim=1).sort(dim=1, descending=True)
    enough_BV = sorted_BV.cumsum(dim=1) - sorted_BV >= p  # the tokens before this one already reach p
    enough_BV[:, 0] = False
    excluded_BV = torch.empty_like(enough_BV).scatter_(1, order_BV, enough_BV)
    return logit_BV.masked_fill(excluded_BV, float("-inf"))
