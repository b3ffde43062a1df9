"""Log-probs from half precision: whatever the logits come in, the softmax is as exact as fp32.

Dimensions in names: N packed tokens, M selected places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from tests.models import VOCABULARY, make_policy, random_sequences
from torch import Tensor

from tastemaker.corpus import next_token_places, text_loss
from tastemaker.generation import Sampling
from tastemaker.generation.sampling import choose
from tastemaker.model import LanguageModel, freeze
from tastemaker.packing import Packed, pack

Half = Literal["weights", "autocast"]
SEQUENCE = random_sequences([31])[0]
EXACT = 1e-5  # fp32, of logits up to 40; in bf16 a log-prob is off by 0.1

# A head that is the output embedding alone, and one whose logits only the library computes (a soft cap).
BOTH_HEADS = pytest.mark.parametrize(("architecture", "linear"), [("llama", True), ("gemma2", False)])
BOTH_HALVES = pytest.mark.parametrize("half", ["weights", "autocast"])


@contextmanager
def in_half(policy: LanguageModel, half: Half) -> Iterator[None]:
    """A policy of bf16 weights, or of fp32 weights whose products are computed in bf16."""
    if half == "weights":
        policy.library.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
        yield


def loud_policy(architecture: str) -> LanguageModel:
    """Its logits are tens, where bf16 is off by tenths; 6 ids have no token, and so no probability."""
    policy = make_policy(architecture, vocabulary=VOCABULARY + 6)
    with torch.no_grad():
        policy.library.get_output_embeddings().weight.mul_(20)
    return policy


def exact(policy: LanguageModel, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in float64 of the same bf16 logits."""
    source_M, target_M = next_token_places(packed)
    if policy.linear_head:
        logits_MV = policy.library.get_output_embeddings()(policy.hidden(packed).index_select(0, source_M))
    else:
        logits_MV = policy.library(input_ids=packed.id_N[None], use_cache=False).logits[0].index_select(0, source_M)
    assert logits_MV.dtype == torch.bfloat16
    assert logits_MV.max() > 20
    assert logits_MV.min() < -20
    logprob_MV = (logits_MV[:, :VOCABULARY].double() / temperature).log_softmax(-1)
    return logprob_MV.gather(1, target_M[:, None])[:, 0], -(logprob_MV.exp() * logprob_MV).sum(1)


@BOTH_HEADS
@BOTH_HALVES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_half_precision_logits_are_exact(
    architecture: str, linear: bool, half: Half, temperature: float
) -> None:
    policy, packed = loud_policy(architecture), pack([SEQUENCE])
    assert policy.linear_head is linear
    with in_half(policy, half):
        found = policy.predict(packed, *next_token_places(packed), temperature=temperature, entropy=True)
        logprob_M, entropy_M = exact(policy, packed, temperature)
    assert found.logprob_M.dtype == torch.float32
    assert found.entropy_M is not None
    torch.testing.assert_close(found.logprob_M.double(), logprob_M, rtol=0, atol=EXACT)
    torch.testing.assert_close(found.entropy_M.double(), entropy_M, rtol=0, atol=EXACT)


def test_a_held_out_loss_of_half_precision_logits_is_exact() -> None:
    policy, packed = loud_policy("llama"), pack([SEQUENCE])
    with in_half(policy, "weights"):
        found = text_loss(policy, [SEQUENCE], budget=99)
        logprob_M, _ = exact(policy, packed, 1.0)
    assert found == pytest.approx(-float(logprob_M.mean()), abs=EXACT)


@pytest.mark.parametrize(("greedy", "temperature"), [(False, 1.0), (False, 0.7), (True, 0.7)])
def test_sampled_log_probs_of_half_precision_logits_are_exact(greedy: bool, temperature: float) -> None:
    """The likeliest token's is under the untempered softmax."""
    generator = torch.Generator().manual_seed(0)
    logit_BV = (3 * torch.randn(13, VOCABULARY, generator=generator) - 20).bfloat16()
    law = Sampling(max_new_tokens=1, temperature=temperature, greedy=greedy, stop_token_ids=(2,))
    token_B, logprob_B = choose(logit_BV.clone(), torch.linspace(0.05, 0.95, 13), law)
    exact_BV = (logit_BV.double() / (1.0 if greedy else temperature)).log_softmax(-1)
    assert logprob_B.dtype == torch.float32
    assert len(set(token_B.tolist())) > 5
    torch.testing.assert_close(logprob_B.double(), exact_BV.gather(1, token_B[:, None])[:, 0], rtol=0, atol=EXACT)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gpt2", "opt"])
@torch.no_grad()
def test_what_is_frozen_gives_the_same_bits_in_less_memory(architecture: str) -> None:
    packed = pack(random_sequences([5, 3, 7]))
    policy, frozen = make_policy(architecture), freeze(make_policy(architecture), "bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        places = next_token_places(packed)
        before, after = policy.predict(packed, *places).logprob_M, frozen.predict(packed, *places).logprob_M
    assert torch.equal(before, after)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    held = [sum(p.numel() * p.element_size() for p in one.parameters()) for one in (policy, frozen)]
    assert held[1] < held[0] or architecture == "gpt2"  # its products are not the library's linear layers


@torch.no_grad()
def test_what_is_frozen_in_fp32_stays_in_fp32() -> None:
    frozen = freeze(make_policy("llama"), "float32")
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.float32}
