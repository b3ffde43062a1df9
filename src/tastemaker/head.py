"""Log-probs of given tokens from hidden states, without ever holding all logits in fp32.

With a vocabulary of 49,152 the logits of 2,048 places are 400 MB in fp32, and automatic differentiation keeps several
copies. Here logits exist for a chunk of places at a time. The gradient of a log-prob is known in closed form (1 at the
token's own place, minus the softmax), so nothing is kept for it but the logits as the matrix product gave them, in bf16
where training is, and beyond `KEPT_BYTES` not even those: the product is then done again.

Softmax and log-probs are fp32 at least; only what enters a matrix product is rounded to bf16. The gradient of the
weight is summed over chunks in fp32.

Dimensions in names: M places, C places of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 2**25  # 128 MiB of fp32 logits at a time
KEPT_BYTES = 2**28  # of logits that wait for the backward pass


def target_logprobs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`logprob_M` of the targets under `softmax((hidden @ weight.T + bias) / temperature)`, in fp32.

    And, if asked for, the softmax's entropy at each place, without a gradient.
    """
    device = hidden_MD.device.type
    if torch.is_autocast_enabled(device):
        hidden_MD = hidden_MD.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        arguments = (hidden_MD, weight_VD, bias_V, target_M, temperature, entropy)
        logprob_M, entropy_M = _TargetLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
    return logprob_M, entropy_M if entropy else None


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        size, vocabulary = len(hidden_MD), len(weight_VD)
        product_VD = weight_VD.to(hidden_MD.dtype)
        kept = list[Tensor]()
        keeps = any(ctx.needs_input_grad) and size * vocabulary * hidden_MD.element_size() <= KEPT_BYTES
        exact = torch.promote_types(hidden_MD.dtype, torch.float32)
        logprob_M, normalizer_M = hidden_MD.new_empty(size, dtype=exact), hidden_MD.new_empty(size, dtype=exact)
        entropy_M = hidden_MD.new_zeros(size if entropy else 0, dtype=exact)
        for chunk in _chunks(size, vocabulary):
            raw_CV = hidden_MD[chunk] @ product_VD.T
            if keeps:
                kept.append(raw_CV)
            logit_CV = _scaled(raw_CV, bias_V, temperature, exact)
            target_C = logit_CV.gather(1, target_M[chunk, None])[:, 0]
            largest_C1 = logit_CV.amax(1, keepdim=True)
            below_CV = logit_CV.sub_(largest_C1)  # in place: another tensor of this size would be the peak
            weight_CV = below_CV.exp() if entropy else below_CV.exp_()
            total_C = weight_CV.sum(1)
            normalizer_M[chunk] = total_C.log() + largest_C1[:, 0]
            logprob_M[chunk] = target_C - normalizer_M[chunk]
            if entropy:  # the mean of -log p = log(total) - below
                entropy_M[chunk] = total_C.log() - weight_CV.mul_(below_CV).sum(1) / total_C
        ctx.save_for_backward(hidden_MD, product_VD, bias_V, target_M, normalizer_M, *kept)
        ctx.temperature, ctx.weight_type = temperature, weight_VD.dtype
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_M: Tensor, _of_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_MD, product_VD, bias_V, target_M, normalizer_M, *kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        exact, of_weight_VD = normalizer_M.dtype, None
        of_hidden_MD = torch.empty_like(hidden_MD) if wants_hidden else None
        of_bias_V = torch.zeros_like(bias_V) if wants_bias else None
        for number, chunk in enumerate(_chunks(len(hidden_MD), len(product_VD))):
            raw_CV = kept[number] if kept else hidden_MD[chunk] @ product_VD.T
            softmax_CV = _scaled(raw_CV, bias_V, ctx.temperature, exact).sub_(normalizer_M[chunk, None]).exp_()
            scale_C1 = gradient_M[chunk, None] / ctx.temperature
            of_logit_CV = softmax_CV.mul_(-scale_C1)
            of_logit_CV.scatter_add_(1, target_M[chunk, None], scale_C1)
            if of_bias_V is not None:
                of_bias_V += of_logit_CV.sum(0)
            of_raw_CV = of_logit_CV.to(hidden_MD.dtype)
            if of_hidden_MD is not None:
                of_hidden_MD[chunk] = of_raw_CV @ product_VD
            if wants_weight:  # one chunk is the usual case, and the weight is large: no zeros to add to
                of_chunk_VD = (of_raw_CV.T @ hidden_MD[chunk]).to(ctx.weight_type)
                of_weight_VD = of_chunk_VD if of_weight_VD is None else of_weight_VD.add_(of_chunk_VD)
        if wants_weight and of_weight_VD is None:
            of_weight_VD = torch.zeros_like(product_VD, dtype=ctx.weight_type)
        return of_hidden_MD, of_weight_VD, of_bias_V, None, None, None


def _chunks(size: int, vocabulary: int) -> list[slice]:
    rows = max(1, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, start + rows) for start in range(0, size, rows)]


def _scaled(raw_CV: Tensor, bias_V: Tensor | None, temperature: float, exact: torch.dtype) -> Tensor:
    """The logits as the softmax takes them; a new tensor, that may be overwritten."""
    logit_CV = raw_CV.to(exact, copy=True)
    if bias_V is not None:
        logit_CV += bias_V
    return logit_CV if temperature == 1.0 else logit_CV.div_(temperature)
