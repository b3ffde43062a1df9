"""Attention over packed sequences against its definition, one query and one sequence at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.models import make_library, random_sequences
from torch import Tensor, nn

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
