"""Causal attention over packed sequences, plugged into the `transformers` library's own modules.

Every matrix product of a model runs on `[1, N]` tokens without padding; only here are queries, keys and values spread
to `[S, T]` (right-padded, so that causality alone keeps the padding inert), and gathered again. The library calls the
function under the name `PACKED`; the batch's `Packed` travels as a keyword of the model's forward call.

Dimensions in names: N packed tokens, S sequences, T longest sequence, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tastemaker.packing import Packed

PACKED = "tastemaker_packed"

# Up to this many tokens plain products are faster on a CPU than the library's kernel, whose tiles are small: with fp32
# products through oneDNN (`parallel`) it takes 10 times as long at 57 tokens and 1.2 times at 511, in bf16 7 and 1.7
# times. Beyond, the weights that `_Products` keeps for the backward pass cost more memory than they save time: at 512
# tokens a third of what a model of SmolLM2-135M's shape keeps anyway.
LONGEST_BY_PRODUCTS = 512

# What the library's modules pass along that changes nothing here.
WITHOUT_EFFECT = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions"})


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed: Packed | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` `[1, H, N, D]` over `key` and `value` `[1, G, N, D]`, each token within its own sequence.

    Attention dropout is not applied: it was 0 in every model since GPT-2 that fine-tunes well, and it would make
    padding visible. What this function does not do (soft-capped scores, attention sinks, other masks) is refused, and
    the model then runs on the library's own attention.
    """
    if packed is None:
        raise ValueError("packed_attention was called without packed=...; only tastemaker.model calls the model so")
    refused = [name for name, value in others.items() if value is not None and name not in WITHOUT_EFFECT]
    if refused or is_causal is False:
        raise ValueError(f"its attention asks for {', '.join(refused) or 'no causality'}")
    if attention_mask is not None and int(attention_mask) != sliding_window:
        raise ValueError(f"its mask is local to {int(attention_mask)} tokens in a way that its attention is not told")
    place_ST = packed.padded_ST
    sequences, longest = place_ST.shape
    window = None if sliding_window is None or sliding_window >= longest else sliding_window

    def spread(x: Tensor) -> Tensor:
        spread_HMD = x[0].index_select(1, place_ST.reshape(-1))
        return spread_HMD.view(x.shape[1], sequences, longest, x.shape[3]).transpose(0, 1)

    by_products = query.device.type == "cpu" and longest <= LONGEST_BY_PRODUCTS
    attend = _attend_by_products if by_products else _attend_by_library
    attended_SHTD = attend(spread(query), spread(key), spread(value), window, scaling)
    flat_MHD = attended_SHTD.transpose(1, 2).flatten(0, 1)
    return flat_MHD.index_select(0, packed.flat_N)[None], None


def _attend_by_library(
    query_SHTD: Tensor, key_SGTD: Tensor, value_SGTD: Tensor, window: int | None, scaling: float | None
) -> Tensor:
    return scaled_dot_product_attention(
        query_SHTD,
        key_SGTD,
        value_SGTD,
        attn_mask=None if window is None else _banded(query_SHTD.shape[2], window, query_SHTD.device),
        is_causal=window is None,
        scale=scaling,
        enable_gqa=query_SHTD.shape[1] != key_SGTD.shape[1],
    )


def _attend_by_products(
    query_SHTD: Tensor, key_SGTD: Tensor, value_SGTD: Tensor, window: int | None, scaling: float | None
) -> Tensor:
    device = query_SHTD.device.type
    inputs = (query_SHTD, key_SGTD, value_SGTD)
    if torch.is_autocast_enabled(device):  # which would pick a type for each product, and forget it for the gradient
        query_SHTD, key_SGTD, value_SGTD = (each.to(torch.get_autocast_dtype(device)) for each in inputs)
    scaling = query_SHTD.shape[3] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        attended = _Products.apply(query_SHTD, key_SGTD, value_SGTD, window, scaling)  # type: ignore[no-untyped-call]
    assert isinstance(attended, Tensor)
    return attended


class _Products(torch.autograd.Function):
    """Attention as plain matrix products, whose weights are kept for the backward pass: `S * H * T * T` numbers.

    Scores and softmax are of fp32 at least, as in the library's kernel; only what enters a product is rounded to bf16.

    The H/G query heads of a key/value head are laid one below the other (X = S * G products, Q = H/G * T rows each), so
    keys and values are not repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, query_SHTD: Tensor, key_SGTD: Tensor, value_SGTD: Tensor, window: int | None, scaling: float
    ) -> Tensor:
        sequences, heads, longest, size = query_SHTD.shape
        groups = key_SGTD.shape[1]
        query_XQD = query_SHTD.reshape(sequences * groups, heads // groups * longest, size)
        key_XTD, value_XTD = key_SGTD.reshape(-1, longest, size), value_SGTD.reshape(-1, longest, size)
        hidden_TT = ~_banded(longest, longest if window is None else window, query_SHTD.device)
        exact = torch.promote_types(query_SHTD.dtype, torch.float32)
        score_XQT = torch.bmm(query_XQD.to(exact), key_XTD.to(exact).transpose(1, 2)).mul_(scaling)
        score_XQT.view(sequences, heads, longest, longest).masked_fill_(hidden_TT, -torch.inf)
        weight_XQT = score_XQT.softmax(-1).to(query_SHTD.dtype)
        ctx.save_for_backward(query_XQD, key_XTD, value_XTD, weight_XQT)
        ctx.scaling, ctx.query_shape, ctx.key_shape = scaling, query_SHTD.shape, key_SGTD.shape
        return torch.bmm(weight_XQT, value_XTD).view(query_SHTD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_XQD, key_XTD, value_XTD, weight_XQT = ctx.saved_tensors
        gradient_XQD = gradient_SHTD.reshape(query_XQD.shape)
        of_value_XTD = torch.bmm(weight_XQT.transpose(1, 2), gradient_XQD)
        of_weight_XQT = torch.bmm(gradient_XQD, value_XTD.transpose(1, 2))
        # What hidden places add is weight 0 times a finite number, so the mask need not be applied again.
        exact = torch.promote_types(weight_XQT.dtype, torch.float32)
        of_score_XQT = torch._softmax_backward_data(of_weight_XQT.to(exact), weight_XQT.to(exact), -1, exact)
        of_score_XQT = of_score_XQT.mul_(ctx.scaling).to(weight_XQT.dtype)
        of_query_XQD = torch.bmm(of_score_XQT, key_XTD)
        of_key_XTD = torch.bmm(of_score_XQT.transpose(1, 2), query_XQD)
        of_key_SGTD, of_value_SGTD = of_key_XTD.view(ctx.key_shape), of_value_XTD.view(ctx.key_shape)
        return of_query_XQD.view(ctx.query_shape), of_key_SGTD, of_value_SGTD, None, None


def _banded(longest: int, window: int, device: torch.device) -> Tensor:
    place_T = torch.arange(longest, device=device)
    distance_TT = place_T[:, None] - place_T[None, :]
    return (distance_TT >= 0) & (distance_TT < window)


def _local_size(*arguments: Any, local_size: int | None = None, **options: Any) -> Tensor | None:
    """In place of the library's mask, which is not needed: the window, for `packed_attention` to check its own."""
    return None if local_size is None else torch.tensor(local_size)


@contextmanager
def packed_attention_on(config: Any) -> Iterator[None]:
    """Within the block, a model with this config attends over packed sequences; afterwards as it did before."""
    usual = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = usual


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _local_size)
