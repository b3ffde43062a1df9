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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tastemaker.packing import Packed

PACKED = "tastemaker_packed"

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

    attended_SHTD = scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        attn_mask=None if window is None else _banded(longest, window, query.device),
        is_causal=window is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    flat_MHD = attended_SHTD.transpose(1, 2).flatten(0, 1)
    return flat_MHD.index_select(0, packed.flat_N)[None], None


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
