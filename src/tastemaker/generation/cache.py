"""The fast path of decoding, for any `transformers` causal LM: a preallocated key/value cache and attention over it.

The library's own modules run unchanged; only what happens between the query, key and value projections and the output
projection is ours. `decoding_attention` puts our attention function in place through the library's attention interface
and takes it out again.

On a CPU the cache is fp32 even where the weights are bf16, and one decoding step is two batched matrix products with
the query heads grouped over their key/value head: fused attention is 1.3 to 1.6 times slower there in fp32 and 8 times
slower in bf16. On a GPU the cache has the model's dtype and fused attention does all the work; there the same buffers
can be read by steps whose shapes never change (`FixedLayer`), as CUDA graphs need them.

Dimensions: B rows, H query heads, K key/value heads, G query heads of one key/value head, T new tokens, S cached
tokens, D head size; of a fixed step R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from tastemaker.attention import attend_padded

ATTENTION_NAME = "tastemaker_decoding"

# What library modules pass to an attention function that changes nothing here: dropout is off in evaluation mode, and
# a sliding window is wider than the sequence wherever this path is taken.
_WITHOUT_EFFECT = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "sliding_window", "is_causal"})


class UnsupportedAttention(Exception):
    """A model asks its attention function for something that ours does not do."""


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[misc]  # the library is untyped here
    """Keys and values of one layer in buffers that are written in place and never grow."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._key_buffer, self._value_buffer = self._buffer(key_states), self._buffer(value_states)
        self.keys, self.values = self._key_buffer, self._value_buffer  # of the rows that are left
        self.is_initialized = True

    def _buffer(self, like_BKTD: Tensor) -> Tensor:
        rows, heads, _, size = like_BKTD.shape
        dtype = torch.float32 if like_BKTD.device.type == "cpu" else like_BKTD.dtype
        # Zeros, because a row that joins later leaves columns unwritten, and a masked NaN would still be a NaN.
        return torch.zeros(rows, heads, self.capacity, size, dtype=dtype, device=like_BKTD.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def branch(self, rows_B: Tensor, capacity: int) -> PreallocatedLayer:
        """A new layer that begins with the contents of these rows and has room for `capacity` tokens."""
        layer = PreallocatedLayer(capacity)
        if self.is_initialized:
            layer.update(self.keys[rows_B, :, : self.length], self.values[rows_B, :, : self.length])
        return layer

    def keep(self, rows_B: Tensor, shared: int, gap: int) -> None:
        """Drop every row but these, and `gap` columns after the `shared` ones, which are the same in every row.

        What is left moves to the front of the same buffers.
        """
        if self.is_initialized:
            self.keys = _moved_to_front(self.keys, rows_B, shared, gap, self.length)
            self.values = _moved_to_front(self.values, rows_B, shared, gap, self.length)
        self.length -= gap

    def join(self, other: PreallocatedLayer, rows_B: Tensor, shared: int) -> None:
        """Put rows of another layer (repeats allowed) below these, so that all end at the same column."""
        assert other.length <= self.length
        if self.is_initialized:
            held, start = len(self.keys), self.length - other.length + shared
            self.keys, self.values = (buffer[: held + len(rows_B)] for buffer in (self._key_buffer, self._value_buffer))
            self.keys[held:, :, start : self.length] = other.keys[rows_B, :, shared : other.length]
            self.values[held:, :, start : self.length] = other.values[rows_B, :, shared : other.length]

    def fixed(self, rows: int, columns: int, column_1: Tensor) -> FixedLayer:
        """The first rows and columns of these buffers, whether in use or not."""
        assert self.is_initialized
        assert rows <= len(self._key_buffer)
        assert columns <= self.capacity
        return FixedLayer(self._key_buffer[:rows, :, :columns], self._value_buffer[:rows, :, :columns], column_1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A part of a layer's buffers that one token a row is written to, at the column that a tensor names.

    All columns are read, whatever lies in them, so the mask has to hide those that are not in use.
    """

    is_sliding = False

    def __init__(self, key_RKCD: Tensor, value_RKCD: Tensor, column_1: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column_1 = key_RKCD, value_RKCD, column_1
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._column_1, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._column_1, value_states.to(self.values.dtype))
        return self.keys, self.values

    # The library asks for lengths to make masks and positions from; ours are given to it.

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


def _moved_to_front(buffer: Tensor, rows_B: Tensor, shared: int, gap: int, length: int) -> Tensor:
    front = buffer[: len(rows_B)]
    front[:, :, shared : length - gap] = buffer[rows_B, :, shared + gap : length]
    return front


class PreallocatedCache(Cache):  # type: ignore[misc]
    """One `PreallocatedLayer` a layer, made when the layer first writes to it."""

    def __init__(self, capacity: int, layers: list[PreallocatedLayer] | None = None) -> None:
        if layers:
            super().__init__(layers=layers)
        else:
            super().__init__(layer_class_to_replicate=partial(PreallocatedLayer, capacity))

    def branch(self, rows_B: Tensor, capacity: int) -> PreallocatedCache:
        """A new cache that begins with the contents of these rows (repeats allowed); this one stays as it is."""
        return PreallocatedCache(capacity, [layer.branch(rows_B, capacity) for layer in self.layers])

    def keep(self, rows_B: Tensor, shared: int, gap: int) -> None:
        """Drop every row but these, and `gap` columns after the `shared` ones."""
        for layer in self.layers:
            layer.keep(rows_B, shared, gap)

    def join(self, other: PreallocatedCache, rows_B: Tensor, shared: int) -> None:
        """Put rows of another cache, with the same shared columns, below these, in places that were given up."""
        for layer, others in zip(self.layers, other.layers, strict=True):
            layer.join(others, rows_B, shared)

    def fixed(self, rows: int, columns: int, column_1: Tensor) -> Cache:
        """The first rows and columns of all buffers, to be written at the column that is named."""
        return Cache(layers=[layer.fixed(rows, columns, column_1) for layer in self.layers])

    def count_column(self) -> None:
        """Take in the column that was written by way of `fixed`."""
        for layer in self.layers:
            layer.length += 1


def cached_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention of the new tokens over the cache; `attention_mask` `[B or 1, 1, T, S]` is added to the scores."""
    for name, value in options.items():
        if name not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise UnsupportedAttention(f"the attention option {name!r}")
    if attention_mask is None:
        raise UnsupportedAttention("a model that drops the attention mask")
    query = query_BHTD.to(key_BKSD.dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] > 1:
        output = attend_padded(query, key_BKSD, value_BKSD, mask=attention_mask, scaling=scaling).transpose(1, 2)
    else:
        attend = _grouped_head_attention if query.device.type == "cpu" else _grouped_head_attention_by_kernel
        output = attend(query, key_BKSD, value_BKSD, attention_mask, scaling)
    return output.to(query_BHTD.dtype), None


def _grouped_head_attention(
    query_BH1D: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, mask_B11S: Tensor, scaling: float
) -> Tensor:
    rows, heads, _, size = query_BH1D.shape
    kv_heads, length = key_BKSD.shape[1], key_BKSD.shape[2]
    query = query_BH1D.reshape(rows * kv_heads, heads // kv_heads, size)
    with _small_products():
        score = torch.bmm(query, key_BKSD.flatten(0, 1).transpose(1, 2)).mul_(scaling)
        score.view(rows, kv_heads, -1, length).add_(mask_B11S)
        output = torch.bmm(score.softmax(dim=-1), value_BKSD.flatten(0, 1))
    return output.view(rows, 1, heads, -1)


def _grouped_head_attention_by_kernel(
    query_BH1D: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, mask_B11S: Tensor, scaling: float
) -> Tensor:
    """The same by fused attention, to which the query heads of a key/value head are so many new tokens.

    All of them see the same columns, so no kernel has to know of groups and no keys have to be repeated.
    """
    rows, heads, _, size = query_BH1D.shape
    query_BKGD = query_BH1D.reshape(rows, key_BKSD.shape[1], -1, size)
    output_BKGD = nn.functional.scaled_dot_product_attention(
        query_BKGD, key_BKSD, value_BKSD, attn_mask=mask_B11S, scale=scaling
    )
    return output_BKGD.reshape(rows, 1, heads, size)


@contextmanager
def _small_products() -> Iterator[None]:
    """Many small fp32 products by MKL, in case others go to oneDNN (`parallel`).

    oneDNN is faster at large ones, but at these (32 rows, 3 heads of 64, 100 columns in use of 128) it took 350
    microseconds on one core where MKL took 210, and several times as long on two busy ones.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


AttentionInterface.register(ATTENTION_NAME, cached_attention)


@contextmanager
def decoding_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend by `cached_attention` inside the block, and as before after it, whatever happened inside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
