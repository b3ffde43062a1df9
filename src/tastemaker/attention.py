"""Causal attention over packed sequences, plugged into the `transformers` library's own modules.

Every matrix product of a model runs on `[1, N]` tokens without padding; only here are queries, keys and values spread
to `[S, T]` (right-padded, so that causality alone keeps the padding inert), and gathered again. On a GPU, in half
precision, not even here: PyTorch's own kernel for sequences of different lengths reads them as they lie. The library
calls the function under the name `PACKED`; the batch's `Packed` travels as a keyword of the model's forward call.

Dimensions in names: N packed tokens, S sequences, T longest sequence, H query heads, G key/value heads, E either of
these, D head size, Z = S + 1 bounds of sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Literal

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

# The largest head of the kernel for different lengths, and what all its heads must be a multiple of.
LARGEST_VARLEN_HEAD, VARLEN_HEAD_STEP = 256, 8

Way = Literal["products", "padded", "varlen"]
# `torch.nn.attention.varlen.varlen_attn`: (query_NHD, key_NGD, value_NGD, bound_Z, bound_Z, longest, longest), options
VarlenKernel = Callable[..., Tensor | tuple[Tensor, Tensor]]

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
    longest = packed.padded_ST.shape[1]
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    kernel = varlen_kernel(query.device) if query.device.type == "cuda" else None
    way = choose_way(
        query.device.type,
        _dtype_of_products(query),
        longest=longest,
        head_size=query.shape[3],
        value_size=value.shape[3],
        shares=packed.shares,
        varlen=kernel is not None,
    )
    given = (query[0], key[0], value[0], packed, window, scaling)
    if way == "varlen":
        assert kernel is not None
        return _attend_by_varlen(*given, kernel)[None], None
    return (_attend_by_products if way == "products" else _attend_by_library)(*given)[None], None


def choose_way(
    device: str, dtype: torch.dtype, *, longest: int, head_size: int, value_size: int, shares: bool, varlen: bool
) -> Way:
    """How to attend on a kind of device in a type. `varlen`: whether there is a kernel for different lengths.

    That kernel reads each sequence from one piece, so sequences that share a beginning are padded, and its heads have
    values of the same size as queries.
    """
    if device == "cpu":
        return "products" if longest <= LONGEST_BY_PRODUCTS else "padded"
    fits = head_size == value_size and head_size <= LARGEST_VARLEN_HEAD and head_size % VARLEN_HEAD_STEP == 0
    half = dtype in (torch.float16, torch.bfloat16)
    return "varlen" if device == "cuda" and varlen and half and fits and not shares else "padded"


@cache
def varlen_kernel(device: torch.device) -> VarlenKernel | None:
    """PyTorch's kernel for sequences of different lengths, where this version and this GPU have it."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    return varlen_attn if "enable_gqa" in known else repeating(varlen_attn)


def repeating(kernel: VarlenKernel) -> VarlenKernel:
    """PyTorch 2.11's kernel, which has no word for grouped heads: keys and values are repeated for it."""

    def attend(
        query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, *bounds: Any, enable_gqa: bool, **options: Any
    ) -> Any:
        if enable_gqa:
            times = query_NHD.shape[1] // key_NGD.shape[1]
            key_NGD, value_NGD = (x_NGD.repeat_interleave(times, dim=1) for x_NGD in (key_NGD, value_NGD))
        return kernel(query_NHD, key_NGD, value_NGD, *bounds, **options)

    return attend


def _attend_by_varlen(
    query_HND: Tensor,
    key_GND: Tensor,
    value_GND: Tensor,
    packed: Packed,
    window: int | None,
    scaling: float | None,
    kernel: VarlenKernel,
) -> Tensor:
    """`attended_NHD`, by a kernel that knows where each sequence begins."""
    dtype, longest = _dtype_of_products(query_HND), packed.padded_ST.shape[1]  # autocast does not know the kernel
    attended_NHD = kernel(
        *(x_END.transpose(0, 1).to(dtype) for x_END in (query_HND, key_GND, value_GND)),
        packed.bound_Z,
        packed.bound_Z,
        longest,
        longest,
        scale=scaling,
        # To the left, the token itself not counted, and to the right; -1 has no limit.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=len(query_HND) != len(key_GND),
    )
    assert isinstance(attended_NHD, Tensor)
    return attended_NHD


def _dtype_of_products(query: Tensor) -> torch.dtype:
    """The type that attention computes its products in, where queries and keys may have come in a wider one."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def attend_padded(
    query_SHTD: Tensor,
    key_SGTD: Tensor,
    value_SGTD: Tensor,
    *,
    mask: Tensor | None,
    scaling: float | None,
    repeat: bool | None = None,
) -> Tensor:
    """`attended_SHTD`, by the library's kernel: under `mask`, or causal where there is none.

    `repeat` says whether keys and values are repeated for the query heads that share them, or left to the kernel.
    """
    heads, groups = query_SHTD.shape[1], key_SGTD.shape[1]
    if repeat is None:
        repeat = repeats_heads(query_SHTD.device.type, _dtype_of_products(query_SHTD), masked=mask is not None)
    if repeat and heads != groups:
        key_SGTD, value_SGTD = (x.repeat_interleave(heads // groups, dim=1) for x in (key_SGTD, value_SGTD))
    return scaled_dot_product_attention(
        query_SHTD,
        key_SGTD,
        value_SGTD,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=heads != groups and not repeat,
    )


def repeats_heads(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether grouped heads have to be repeated to get a fused kernel.

    On a GPU the flash kernel groups heads, but takes neither fp32 nor a mask; the one that takes both does not group
    them. Given groups, PyTorch would fall back on plain products that hold all scores.
    """
    return device == "cuda" and (masked or dtype not in (torch.float16, torch.bfloat16))


def _attend_by_library(
    query_HND: Tensor, key_GND: Tensor, value_GND: Tensor, packed: Packed, window: int | None, scaling: float | None
) -> Tensor:
    """`attended_NHD`, by the library's kernel on `[S, H, T, D]`."""
    sequences, longest = packed.padded_ST.shape

    def spread(x_END: Tensor) -> Tensor:
        spread_EMD = x_END.index_select(1, packed.padded_ST.reshape(-1))
        return spread_EMD.view(len(x_END), sequences, longest, -1).transpose(0, 1)

    if packed.shares and torch.is_autocast_enabled(value_GND.device.type):
        key_GND, value_GND = key_GND.float(), value_GND.float()  # sharers' gradients are added up: not in bf16
    attended_SHTD = attend_padded(
        spread(query_HND),
        spread(key_GND),
        spread(value_GND),
        mask=None if window is None else _banded(longest, window, query_HND.device),
        scaling=scaling,
    )
    return attended_SHTD.transpose(1, 2).flatten(0, 1).index_select(0, packed.flat_N)


def _attend_by_products(
    query_HND: Tensor, key_GND: Tensor, value_GND: Tensor, packed: Packed, window: int | None, scaling: float | None
) -> Tensor:
    """`attended_NHD`, by `_Products`."""
    dtype = _dtype_of_products(query_HND)  # autocast would pick one for each product, and forget it for the gradient
    scaling = query_HND.shape[2] ** -0.5 if scaling is None else scaling
    with torch.autocast(query_HND.device.type, enabled=False):
        attended = _Products.apply(query_HND, key_GND, value_GND, packed, window, scaling, dtype)  # type: ignore[no-untyped-call]
    assert isinstance(attended, Tensor)
    return attended


class _Products(torch.autograd.Function):
    """`attend_by_products` for the library's modules."""

    @staticmethod
    def forward(
        ctx: Any,
        query_HND: Tensor,
        key_GND: Tensor,
        value_GND: Tensor,
        packed: Packed,
        window: int | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        exact = torch.promote_types(query_HND.dtype, torch.float32)
        scaled_HND = query_HND.to(exact) * scaling
        attended_NHD, kept = attend_by_products(scaled_HND, key_GND, value_GND, packed, window=window, dtype=dtype)
        ctx.save_for_backward(*kept)
        ctx.packed, ctx.scaling = packed, scaling
        ctx.dtypes = query_HND.dtype, key_GND.dtype, value_GND.dtype
        return attended_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_value = attend_by_products_backward(gradient_NHD, ctx.saved_tensors, ctx.packed)
        given = (of_query.mul_(ctx.scaling), of_key, of_value)
        found = [x_NED.to(kind).transpose(0, 1) for x_NED, kind in zip(given, ctx.dtypes, strict=True)]
        return *found, None, None, None, None


def attend_by_products(
    query_HND: Tensor, key_GND: Tensor, value_GND: Tensor, packed: Packed, *, window: int | None, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`attended_NHD` as plain matrix products, and what the backward pass needs: `S * H * T * T` weights above all.

    Queries come scaled. Scores and softmax are of fp32 at least, as in the library's kernel; only what enters another
    product is rounded to `dtype`. Tokens are brought into the padded layout, and back, by one copy each way; automatic
    differentiation would add gradients up where a place is read once, which takes longer than attention itself.

    The J = H/G query heads of a key/value head are laid one below the other (X = G * S products, Q = J * T rows each),
    so keys and values are not repeated.
    """
    heads, groups, longest = len(query_HND), len(key_GND), packed.padded_ST.shape[1]
    exact = torch.promote_types(dtype, torch.float32)
    query_XQD = _spread(query_HND.to(exact), packed, groups)
    key_XTD = _spread(key_GND.to(exact), packed, groups)
    value_XTD = _spread(value_GND.to(dtype), packed, groups)
    score_XQT = torch.bmm(query_XQD, key_XTD.transpose(1, 2))
    bias_TT = _bias(longest, window, exact, query_HND.device)
    score_XQT.view(-1, heads // groups, longest, longest).add_(bias_TT)
    weight_XQT = score_XQT.softmax(-1).to(dtype)
    attended_NHD = _gather(torch.bmm(weight_XQT, value_XTD), packed, heads)
    return attended_NHD, (query_XQD.to(dtype), key_XTD.to(dtype), value_XTD, weight_XQT, attended_NHD)


def attend_by_products_backward(
    gradient_NHD: Tensor, kept: Sequence[Tensor], packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of scaled queries, keys and values, `[N, E, D]`."""
    query_XQD, key_XTD, value_XTD, weight_XQT, attended_NHD = kept
    heads, groups = gradient_NHD.shape[1], len(value_XTD) // len(packed.padded_ST)
    gradient_XQD = _spread_gradient(gradient_NHD, packed, groups)
    of_value_XTD = torch.bmm(weight_XQT.transpose(1, 2), gradient_XQD)
    of_weight_XQT = torch.bmm(gradient_XQD, value_XTD.transpose(1, 2))
    # The mean of a row's gradients under its weights, which the softmax takes off, is also gradient times attended
    # value (Dao et al. 2022, arXiv 2205.14135, appendix B.2), which is far fewer numbers.
    exact = torch.promote_types(weight_XQT.dtype, torch.float32)
    mean_NH1 = (gradient_NHD.to(exact) * attended_NHD.to(exact)).sum(2, keepdim=True)
    # What hidden places add is weight 0 times a finite number, so the mask need not be applied again.
    of_score_XQT = of_weight_XQT.sub_(_spread_gradient(mean_NH1, packed, groups)).mul_(weight_XQT)
    of_query_XQD = torch.bmm(of_score_XQT, key_XTD)
    of_key_XTD = torch.bmm(of_score_XQT.transpose(1, 2), query_XQD)
    return (
        _gather(of_query_XQD, packed, heads),
        _gather(of_key_XTD, packed, groups, repeats=True),
        _gather(of_value_XTD, packed, groups, repeats=True),
    )


def _spread(x_END: Tensor, packed: Packed, groups: int) -> Tensor:
    """`[E, N, D]` to `[G * S, E/G * T, D]`: each row of the padded layout for each head of a group."""
    heads, tokens, size = x_END.shape
    sequences = len(packed.padded_ST)
    if x_END.transpose(0, 1).is_contiguous():  # as the library's modules have it
        rows, of_head, of_token = x_END.transpose(0, 1).reshape(-1, size), 1, heads
    else:
        rows, of_head, of_token = x_END.reshape(-1, size), tokens, 1
    head_GJ = torch.arange(heads, device=rows.device).view(groups, -1) * of_head
    index_GSJT = head_GJ[:, None, :, None] + (packed.padded_ST * of_token)[None, :, None]
    return rows.index_select(0, index_GSJT.reshape(-1)).view(groups * sequences, -1, size)


def _gather(x_XQD: Tensor, packed: Packed, heads: int, *, repeats: bool = False) -> Tensor:
    """Back to `[N, E, D]`: each token from its own place, with `repeats` the sum over all places that share it."""
    (sequences, longest), size = packed.padded_ST.shape, x_XQD.shape[2]
    groups = len(x_XQD) // sequences
    rows, each = x_XQD.reshape(-1, size), heads // groups * longest  # rows of a product
    head = torch.arange(heads, device=rows.device)
    of_head_E = head // (heads // groups) * sequences * each + head % (heads // groups) * longest

    def at(flat_M: Tensor) -> Tensor:
        index_ME = (flat_M // longest * each + flat_M % longest)[:, None] + of_head_E
        return rows.index_select(0, index_ME.reshape(-1)).view(-1, heads, size)

    found_NED = at(packed.flat_N)
    if repeats and len(packed.repeat_R):
        token_R = packed.padded_ST.reshape(-1)[packed.repeat_R]
        exact = torch.promote_types(rows.dtype, torch.float32)
        found_NED = found_NED.to(exact).index_add_(0, token_R, at(packed.repeat_R).to(exact))
    return found_NED


def _spread_gradient(gradient_NHD: Tensor, packed: Packed, groups: int) -> Tensor:
    """`_spread`, with zeros where nothing was read by `_gather`: where no token is, and where one is shared again."""
    gradient_XQD = _spread(gradient_NHD.transpose(0, 1), packed, groups)
    sequences, longest = packed.padded_ST.shape
    if len(packed.flat_N) < sequences * longest:
        read_ST = torch.zeros(sequences * longest, dtype=gradient_NHD.dtype, device=gradient_NHD.device)
        read_ST[packed.flat_N] = 1
        gradient_XQD.view(groups, sequences, -1, longest, gradient_XQD.shape[2]).mul_(
            read_ST.view(sequences, 1, longest, 1)
        )
    return gradient_XQD


@lru_cache(maxsize=8)
def _bias(longest: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores: minus infinity where a place is hidden. Adding is faster than filling by a mask."""
    seen_TT = _banded(longest, longest if window is None else window, device)
    return torch.zeros(longest, longest, dtype=dtype, device=device).masked_fill_(~seen_TT, -torch.inf)


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
