"""Log-probs of targets: values by hand, and gradients that are those of the plain computation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tastemaker import head
from tastemaker.head import target_logprobs

M, D, V = 7, 5, 11


def plain(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logit_MV = hidden_MD @ weight_VD.T
    logprob_MV = ((logit_MV if bias_V is None else logit_MV + bias_V) / temperature).log_softmax(1)
    return logprob_MV.gather(1, target_M[:, None])[:, 0], -(logprob_MV.exp() * logprob_MV).sum(1)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_MD, weight_VD = torch.randn(M, D, generator=generator), torch.randn(V, D, generator=generator)
    bias_V, target_M = torch.randn(V, generator=generator), torch.randint(V, (M,), generator=generator)
    return hidden_MD.to(dtype), weight_VD.to(dtype), bias_V.to(dtype), target_M


def test_two_tokens_by_hand() -> None:
    # logits 0 and ln 3: probabilities 1/4 and 3/4. The gradient of log p(0) is (1 - 1/4, -3/4) by the logits.
    hidden_MD = torch.tensor([[1.0]], requires_grad=True)
    weight_VD = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logprob_M, entropy_M = target_logprobs(hidden_MD, weight_VD, torch.tensor([0]), entropy=True)
    assert logprob_M.item() == pytest.approx(math.log(1 / 4), abs=1e-6)
    assert entropy_M is not None
    assert entropy_M.item() == pytest.approx(-(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4, abs=1e-6)
    logprob_M.backward()  # type: ignore[no-untyped-call]
    assert weight_VD.grad is not None
    assert hidden_MD.grad is not None
    torch.testing.assert_close(weight_VD.grad, torch.tensor([[0.75], [-0.75]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden_MD.grad, torch.tensor([[-0.75 * math.log(3)]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("kept", [0, 2**28])
def test_equals_the_plain_computation(
    temperature: float, biased: bool, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", rows * V)
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    *parameters, target_M = inputs(torch.float64)
    hidden_MD, weight_VD, bias_V = (each.requires_grad_() for each in parameters)
    bias = bias_V if biased else None
    expected, expected_entropy = plain(hidden_MD, weight_VD, bias, target_M, temperature)
    found, entropy = target_logprobs(hidden_MD, weight_VD, target_M, bias_V=bias, temperature=temperature, entropy=True)
    assert entropy is not None
    assert not entropy.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=1e-12)
    wanted = [hidden_MD, weight_VD, *([bias_V] if biased else [])]
    gradient_M = torch.arange(-3.0, 4.0, dtype=torch.float64)  # of both signs
    ours = torch.autograd.grad(found, wanted, gradient_M)
    theirs = torch.autograd.grad(expected, wanted, gradient_M)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-12)


def test_a_frozen_weight_has_no_gradient() -> None:
    hidden_MD, weight_VD, _, target_M = inputs(torch.float32)
    hidden_MD.requires_grad_()
    target_logprobs(hidden_MD, weight_VD, target_M)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert hidden_MD.grad is not None
    assert weight_VD.grad is None


def test_half_precision_rounds_what_enters_products_alone() -> None:
    hidden_MD, weight_VD, _, target_M = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, entropy = target_logprobs(hidden_MD, weight_VD, target_M)
    assert found.dtype == torch.float32
    assert entropy is None
    rounded_MV = (hidden_MD.bfloat16() @ weight_VD.bfloat16().T).float()
    expected = rounded_MV.log_softmax(1).gather(1, target_M[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_weights_gradient_is_summed_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 300 places that add 2**-9 each to one number: a sum in bf16 would stop at 2**-9 * 256 = 0.5
    size = 300
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 2)
    weight_VD = torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = target_logprobs(torch.full((size, 1), 2.0**-8), weight_VD, torch.zeros(size, dtype=torch.long))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert weight_VD.grad is not None
    assert weight_VD.grad[0].item() == pytest.approx(size * 2.0**-9, abs=1e-6)


def test_no_places() -> None:
    hidden_MD, weight_VD, _, target_M = inputs(torch.float32)
    found, entropy = target_logprobs(hidden_MD[:0], weight_VD, target_M[:0], entropy=True)
    assert found.shape == (0,)
    assert entropy is not None
    assert entropy.shape == (0,)
