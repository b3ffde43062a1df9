"""Attention over packed sequences against its definition, one query and one sequence at a time."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.models import make_library, random_sequences
from tests.work import counting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tastemaker import attention
from tastemaker.attention import PACKED, packed_attention, packed_attention_on
from tastemaker.packing import pack

HEADS, GROUPS, SIZE = 6, 3, 5
LENGTHS = [4, 1, 7, 2]


def queries_keys_values() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    query, key, value = (
        torch.randn(1, heads, total, SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    return query, key, value


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    out, start = torch.zeros(1, sum(LENGTHS), HEADS, SIZE, dtype=torch.float64), 0
    for length in LENGTHS:
        for place in range(length):
            first = 0 if window is None else max(0, place - window + 1)
            seen = slice(start + first, start + place + 1)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                weight = (key[0, group, seen] @ query[0, head, start + place] * scale).softmax(0)
                out[0, start + place, head] = weight @ value[0, group, seen]
        start += length
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 6, 7, 50])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_each_token_attends_within_its_own_sequence(window: int | None, scaling: float | None) -> None:
    query, key, value = queries_keys_values()
    found, _ = packed_attention(
        nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=scaling,
        sliding_window=window,
        packed=pack(random_sequences(LENGTHS)),
    )
    expected = by_definition(query, key, value, scaling or 1 / math.sqrt(SIZE), window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed": None}, "without packed"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(6)}, "s_aux"),
        ({"is_causal": False}, "no causality"),
        ({"attention_mask": torch.tensor(4)}, "local to 4 tokens"),
        ({"attention_mask": torch.tensor(4), "sliding_window": 5}, "local to 4 tokens"),
    ],
)
def test_what_it_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    query, key, value = queries_keys_values()
    given = {"attention_mask": None, "packed": pack(random_sequences(LENGTHS))} | options
    with pytest.raises(ValueError, match=message):
        packed_attention(nn.Identity(), query, key, value, **given)


def test_what_changes_nothing_is_let_through() -> None:
    query, key, value = queries_keys_values()
    packed = pack(random_sequences(LENGTHS))
    plain, _ = packed_attention(nn.Identity(), query, key, value, None, packed=packed)
    options: dict[str, Any] = {"use_cache": False, "position_ids": torch.zeros(1), "softcap": None, "is_causal": True}
    found, _ = packed_attention(nn.Identity(), query, key, value, None, packed=packed, **options)
    assert torch.equal(found, plain)


def test_the_usual_attention_is_back_after_the_block_and_after_an_error() -> None:
    library = make_library("llama")
    usual = library.config._attn_implementation

    def run() -> None:
        with packed_attention_on(library.config):
            assert library.config._attn_implementation == PACKED
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        run()
    assert library.config._attn_implementation == usual


BATCHES = {
    "ragged": pack([list(range(n)) for n in LENGTHS]),
    "equal": pack([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]),
    "shared": pack([[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 3, 9, 8, 7, 6], [4, 4]], groups=[3, 1]),
}


def tensors_of(tokens: int, size: int, *, token_major: bool) -> list[Tensor]:
    """Queries, keys, values and a direction `[N, H, D]`; the library's modules lay the heads of a token together."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, heads, size) for heads in (HEADS, GROUPS, GROUPS)]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(0, 1) for shape in shapes]
    direction = torch.randn(tokens, HEADS, size, generator=generator, dtype=torch.float64)
    return [*(found if token_major else [each.contiguous() for each in found]), direction]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("token_major", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_plain_products_are_the_library_s_attention_and_gradient(
    batch: str, token_major: bool, window: int | None, scaling: float | None
) -> None:
    packed = BATCHES[batch]
    *tensors, direction = tensors_of(len(packed.id_N), SIZE, token_major=token_major)
    found = []
    for attend in (attention._attend_by_products, attention._attend_by_library):
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        attended = attend(inputs[0], inputs[1], inputs[2], packed, window, scaling)
        found.append((attended.detach(), *torch.autograd.grad((attended * direction).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_sequences_on_a_cpu_attend_by_plain_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def spied(name: str) -> Any:
        real = getattr(attention, name)

        def attend(*given: Any) -> Any:
            ran.append(name)
            return real(*given)

        return attend

    for name in ("_attend_by_products", "_attend_by_library"):
        monkeypatch.setattr(attention, name, spied(name))
    query, key, value = (tensor.to(dtype) for tensor in queries_keys_values())
    packed = pack(random_sequences(LENGTHS))
    for longest in (7, 6):  # the longest here has 7
        monkeypatch.setattr(attention, "LONGEST_BY_PRODUCTS", longest)
        packed_attention(nn.Identity(), query, key, value, None, packed=packed)
    assert ran == ["_attend_by_products", "_attend_by_library"]


def test_in_bfloat16_products_are_as_exact_as_the_librarys_kernel() -> None:
    """Which of the two a sequence gets depends on its neighbours in the micro-batch, so both must round alike. Sharp
    attention (queries times 4) tells scores of bf16 from those of fp32."""
    packed = pack([list(range(61)), list(range(61))])
    *wide, direction = tensors_of(2 * 61, 16, token_major=True)
    tensors = [tensor.bfloat16() for tensor in wide]
    tensors[0] = tensors[0] * 4

    def outcome(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        attended = attend(inputs[0], inputs[1], inputs[2], packed, None, None)
        return [attended.detach(), *torch.autograd.grad((attended * direction.to(dtype)).sum(), inputs)]

    exact = outcome(attention._attend_by_library, torch.float64)

    def errors(attend: Any) -> list[float]:
        pairs = zip(outcome(attend, torch.bfloat16), exact, strict=True)
        return [float((found.double() - true).norm() / true.norm()) for found, true in pairs]

    ours, theirs = errors(attention._attend_by_products), errors(attention._attend_by_library)
    assert all(one < 1.5 * other for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("inside", [True, False])
def test_plain_products_take_the_type_of_autocast(inside: bool) -> None:
    """Queries and keys come in fp32 and values in bf16, as from a model that rotates in fp32."""
    query, key, value = queries_keys_values()
    inputs = [query.float().requires_grad_(), key.float().requires_grad_(), value.bfloat16().requires_grad_()]
    packed, gradients = pack(random_sequences(LENGTHS)), tuple[Tensor, ...]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended, _ = packed_attention(nn.Identity(), inputs[0], inputs[1], inputs[2], None, packed=packed)
        if inside:
            gradients = torch.autograd.grad(attended.float().square().sum(), inputs)
    if not inside:
        gradients = torch.autograd.grad(attended.float().square().sum(), inputs)
    assert attended.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32, torch.bfloat16]


HALF: dict[str, Any] = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "longest": 7,
    "head_size": 64,
    "value_size": 64,
    "shares": False,
    "varlen": True,
}


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "varlen"),
        ({"dtype": torch.float16}, "varlen"),
        ({"longest": 2000, "head_size": 256, "value_size": 256}, "varlen"),
        ({"dtype": torch.float32}, "padded"),
        ({"dtype": torch.float64}, "padded"),
        ({"shares": True}, "padded"),
        ({"head_size": 60, "value_size": 60}, "padded"),
        ({"head_size": 264, "value_size": 264}, "padded"),
        ({"head_size": 192, "value_size": 128}, "padded"),
        ({"varlen": False}, "padded"),
        ({"device": "mps"}, "padded"),
        ({"device": "cpu"}, "products"),
        ({"device": "cpu", "shares": True, "dtype": torch.float32}, "products"),
        ({"device": "cpu", "longest": 512}, "products"),
        ({"device": "cpu", "longest": 513}, "padded"),
    ],
)
def test_how_attention_is_computed_follows_from_where_and_what(changes: dict[str, Any], way: str) -> None:
    assert attention.choose_way(**HALF | changes) == way


def test_gradients_of_shared_tokens_are_not_added_up_in_bf16() -> None:
    """Three responses share two tokens; each adds its part to the gradient of their keys and values."""
    packed = pack([[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]], groups=[3])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, len(packed.id_N), 8, generator=generator).bfloat16() for _ in range(3))
    inputs = key.requires_grad_(), value.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = attention._attend_by_library(query, *inputs, packed, None, 0.3)
    with counting() as work:
        attended.float().sum().backward()  # type: ignore[no-untyped-call]
    by_token = tuple(value.shape)
    added = {kind for operator, kind, shape in work.tensors if "index_add" in operator and shape == by_token}
    assert attended.dtype == torch.bfloat16
    assert added == {torch.float32}


def reference_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What PyTorch's documentation says of `varlen_attn`, one sequence at a time."""
    bounds = cu_seq_q.tolist()
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(end - start for start, end in pairwise(bounds))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    parts = []
    for start, end in pairwise(bounds):
        place = torch.arange(end - start)
        ahead = place[None, :] - place[:, None]  # of the key, as the query sees it
        seen = (ahead <= right) & ((ahead >= -left) if left >= 0 else True)
        of_heads = [x[start:end].transpose(0, 1) for x in (query, key, value)]
        of_heads[1:] = [x.repeat_interleave(query.shape[1] // key.shape[1], 0) for x in of_heads[1:]]
        score = of_heads[0] @ of_heads[1].transpose(1, 2) * (query.shape[2] ** -0.5 if scale is None else scale)
        parts.append((score.masked_fill(~seen, -torch.inf).softmax(-1) @ of_heads[2]).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("batch", ["ragged", "equal"])
@pytest.mark.parametrize("token_major", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_kernel_for_different_lengths_is_told_the_same_attention(
    batch: str, token_major: bool, window: int | None, scaling: float | None
) -> None:
    packed = BATCHES[batch]
    *tensors, direction = tensors_of(len(packed.id_N), SIZE, token_major=token_major)
    found = []
    for attend, kernel in ((attention._attend_by_varlen, (reference_kernel,)), (attention._attend_by_library, ())):
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        attended = attend(inputs[0], inputs[1], inputs[2], packed, window, scaling, *kernel)
        found.append((attended.detach(), *torch.autograd.grad((attended * direction).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def without_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *bounds: Any,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """PyTorch 2.11's kernel: it has no word for groups of heads, and is given none."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return reference_kernel(query, key, value, *bounds, scale=scale, window_size=window_size, enable_gqa=False)


@pytest.mark.parametrize("heads", [HEADS, GROUPS])
def test_a_kernel_without_grouped_heads_is_given_repeated_ones(heads: int) -> None:
    packed = BATCHES["ragged"]
    query, key, value, _ = tensors_of(len(packed.id_N), SIZE, token_major=True)
    grouped, repeated = (
        attention._attend_by_varlen(query[:heads], key, value, packed, 3, None, kernel)
        for kernel in (reference_kernel, attention.repeating(without_groups))
    )
    torch.testing.assert_close(repeated, grouped, rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 3])
def test_pytorchs_kernel_takes_what_it_is_given(window: int | None) -> None:
    """Shapes, types and options only: the tensors are fake, so nothing is computed."""
    packed = BATCHES["ragged"]
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    groups_heads = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    kernel = varlen.varlen_attn if groups_heads else attention.repeating(varlen.varlen_attn)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = [torch.empty(14, heads, 8, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
        query, key, value = (each.transpose(0, 1) for each in inputs)
        attended = attention._attend_by_varlen(query, key, value, packed, window, 0.3, kernel)
        attended.float().sum().backward()  # type: ignore[no-untyped-call]
    assert (attended.shape, attended.dtype) == ((14, HEADS, 8), torch.bfloat16)
    assert [each.grad is not None and each.grad.shape == each.shape for each in inputs] == [True] * 3


@pytest.mark.parametrize("masked", [True, False])
def test_repeated_heads_attend_like_grouped_ones(masked: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, heads, 7, SIZE, generator=generator, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS)
    )
    mask = attention._banded(7, 3, query.device) if masked else None
    grouped, repeated = (
        attention.attend_padded(query, key, value, mask=mask, scaling=0.3, repeat=repeat) for repeat in (False, True)
    )
    torch.testing.assert_close(repeated, grouped, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "repeats"),
    [
        ("cuda", torch.bfloat16, False, False),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float32, False, True),
        ("cpu", torch.float32, True, False),
        ("cpu", torch.bfloat16, False, False),
    ],
)
def test_heads_are_repeated_only_for_kernels_of_a_gpu_that_do_not_group(
    device: str, dtype: torch.dtype, masked: bool, repeats: bool
) -> None:
    assert attention.repeats_heads(device, dtype, masked=masked) == repeats


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_different_lengths_attend_like_padded_ones(window: int | None) -> None:
    device = torch.device("cuda")
    kernel = attention.varlen_kernel(device)
    if kernel is None:
        pytest.skip("this GPU or this version of PyTorch has no kernel for different lengths")
    packed = BATCHES["ragged"].to(device)
    *tensors, direction = (tensor.to(device, torch.bfloat16) for tensor in tensors_of(14, 16, token_major=True))
    found = []
    for attend, given in ((attention._attend_by_varlen, (kernel,)), (attention._attend_by_library, ())):
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        attended = attend(inputs[0], inputs[1], inputs[2], packed, window, None, *given)
        found.append((attended.detach(), *torch.autograd.grad((attended * direction).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)  # both round to 8 bits
