"""Both ways of decoding against the library's plain forward pass, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.models import ARCHITECTURES, make_library
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tastemaker.errors import ModelError
from tastemaker.generation import decoding
from tastemaker.generation.cache import PreallocatedCache, UnsupportedAttention, cached_attention
from tastemaker.generation.decoding import FastDecoding, Path, choose_path, longest_fast_sequence
from tastemaker.generation.graphs import Graphs

FAST = Path(fast=True, padding=True)
# As on a GPU, with steps run again where a GPU would launch what was recorded.
RECORDED = Path(fast=True, padding=True, graphs=Graphs(record=lambda step, memory: (step, memory), watch=nullcontext))
LIBRARY = Path(fast=False, padding=True)
PREFIX = [5, 17, 88, 40, 3]
PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21], [31, 32, 33]]
TAILS = [[41, 42, 43], [51, 52, 53], [61, 62, 63]]


def small_model(architecture: str, **changes: object) -> Any:
    """A model of an architecture that is not among the shared ones."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **changes)).eval()


def gemma2() -> Any:
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}
    return small_model("gemma2", vocab_size=97, head_dim=8, intermediate_size=80, **small)


def bloom() -> Any:
    return small_model("bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=6)


def mamba() -> Any:
    return small_model("mamba", vocab_size=97, hidden_size=48, num_hidden_layers=2, state_size=5)


def plain(model: Any, ids: list[int]) -> Tensor:
    """The logits after the last token of one sequence, by the library alone."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits


@pytest.mark.parametrize("path", [FAST, RECORDED, LIBRARY], ids=str)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["", "prefix"])
@torch.no_grad()
def test_logits_are_those_of_the_plain_forward_pass(architecture: str, path: Path, prefix: list[int]) -> None:
    model = make_library(architecture)
    with path.attention(model):
        batch = path.starter(model, new_tokens=3, prefix=prefix)(0)
        found = [batch.prefill(PROMPTS)]
        batch.branch(torch.tensor([2, 0, 1, 0]))  # rows 1 and 3 answer the first prompt
        found.append(batch.step(torch.tensor([61, 41, 51, 41])))
        batch.keep(torch.tensor([0, 2, 3]))
        found.append(batch.step(torch.tensor([62, 52, 42])))
        batch.keep(torch.tensor([2, 1]))
        found.append(batch.step(torch.tensor([43, 53])))
    held = [[0, 1, 2], [2, 0, 1, 0], [2, 1, 0], [0, 1]]  # the prompt that each row continues, step by step
    for step, (rows, logits) in enumerate(zip(held, found, strict=True)):
        expected = torch.stack([plain(model, prefix + PROMPTS[row] + TAILS[row][:step]) for row in rows])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("path", [FAST, RECORDED], ids=str)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["", "prefix"])
@torch.no_grad()
def test_rows_that_join_see_their_own_tokens_alone(architecture: str, path: Path, prefix: list[int]) -> None:
    """Three prompts of 7, 1 and 3 tokens are read; later one of 1 and one of 2 join, twice over, shorter each time."""
    model = make_library(architecture)
    later, latest = [[71, 72], [73]], [[81]]
    with path.attention(model):
        start = path.starter(model, new_tokens=3, prefix=prefix)
        batch = start(2)
        batch.prefill(PROMPTS)
        batch.branch(torch.tensor([2, 0, 1, 0]))
        batch.step(torch.tensor([61, 41, 51, 42]))
        batch.keep(torch.tensor([0, 2]))  # the longest goes, and its columns with it
        others = start(0)
        found = [others.prefill(later)]
        batch.join(others, torch.tensor([1, 0]))
        found.append(batch.step(torch.tensor([62, 52, 91, 92])))
        batch.keep(torch.tensor([3, 1]))
        others = start(0)
        found.append(others.prefill(latest))
        batch.join(others, torch.tensor([0, 0]))
        found.append(batch.step(torch.tensor([93, 53, 94, 95])))
    sequences = [
        later,
        [[31, 32, 33, 61, 62], [21, 51, 52], [73, 91], [71, 72, 92]],
        latest,
        [[71, 72, 92, 93], [21, 51, 52, 53], [81, 94], [81, 95]],
    ]
    for held, logits in zip(sequences, found, strict=True):
        expected = torch.stack([plain(model, prefix + ids) for ids in held])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_one_prefix_serves_several_batches() -> None:
    model = make_library("llama")
    with FAST.attention(model):
        start = FAST.starter(model, new_tokens=1, prefix=PREFIX)
        first, second = start(0), start(0)
        first.prefill(PROMPTS)
        first.branch(torch.tensor([0, 1, 2]))
        first.step(torch.tensor([41, 51, 61]))
        found = second.prefill(PROMPTS[:1])
    torch.testing.assert_close(found[0], plain(model, PREFIX + PROMPTS[0]), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_usual_architectures_are_decoded_fast(architecture: str) -> None:
    assert choose_path(make_library(architecture)) == FAST


@torch.no_grad()
def test_bf16_weights_are_decoded_fast() -> None:
    assert choose_path(make_library("llama").bfloat16()) == FAST


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "reason"), [(gemma2, "softcap"), (bloom, "fast path fails with"), (mamba, "fast path fails with")]
)
def test_other_architectures_are_decoded_by_the_library(
    make: Callable[[], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    before = model.config._attn_implementation
    assert choose_path(model) == LIBRARY
    assert model.config._attn_implementation == before
    assert reason in caplog.text


@torch.no_grad()
def test_a_model_that_padding_disturbs_is_decoded_in_equal_lengths(caplog: pytest.LogCaptureFixture) -> None:
    model = make_library("llama")
    forward = model.forward

    def without_mask(input_ids: Tensor, past_key_values: object = None, use_cache: bool = True) -> Any:
        return forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model.forward = without_mask
    with caplog.at_level(logging.WARNING, logger=decoding.__name__):
        assert choose_path(model) == Path(fast=False, padding=False)
    assert "standard deviations" in caplog.text


@torch.no_grad()
def test_a_model_without_finite_logits_is_refused() -> None:
    model = make_library("llama")
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="finite"):
        choose_path(model)


@pytest.mark.parametrize(
    ("changes", "limit"), [({}, None), ({"sliding_window": 23}, 23), ({"sliding_window": 23, "window_size": 7}, 7)]
)
def test_a_sliding_window_limits_the_fast_path(changes: dict[str, int], limit: int | None) -> None:
    assert longest_fast_sequence(make_library("mistral", **changes)) == limit


def test_an_attention_option_that_is_not_known_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 2)
    bias = torch.zeros(1, 1, 1, 1)
    cached_attention(torch.nn.Identity(), x, x, x, bias, softcap=None, dropout=0.0, output_attentions=False)
    with pytest.raises(UnsupportedAttention, match="s_aux"):
        cached_attention(torch.nn.Identity(), x, x, x, bias, s_aux=torch.ones(1))
    with pytest.raises(UnsupportedAttention, match="mask"):
        cached_attention(torch.nn.Identity(), x, x, x, None)


def test_the_cache_is_fp32_on_a_cpu_and_never_grows() -> None:
    cache = PreallocatedCache(capacity=7)
    state = torch.ones(2, 3, 5, 4, dtype=torch.bfloat16)
    keys, values = cache.update(state, 2 * state, 0)
    assert keys.dtype == torch.float32
    place = cache.layers[0].keys.data_ptr()
    keys, values = cache.update(state[:, :, :2], 3 * state[:, :, :2], 0)
    assert (keys.shape, values[0, 0, :, 0].tolist()) == ((2, 3, 7, 4), [2.0] * 5 + [3.0] * 2)
    assert cache.layers[0].keys.data_ptr() == place


@pytest.mark.parametrize("path", [FAST, RECORDED], ids=str)
def test_a_batch_is_full_when_its_columns_are_used_up(path: Path) -> None:
    model = make_library("llama")
    with torch.no_grad(), path.attention(model):
        batch = path.starter(model, new_tokens=1)(1)
        batch.prefill([[11, 12, 13], [21]])
        batch.branch(torch.tensor([0, 1]))
        batch.step(torch.tensor([14, 22]))
        assert not batch.full
        batch.step(torch.tensor([15, 23]))
        assert batch.full
        batch.keep(torch.tensor([1]))  # [21, 22, 23] begins two columns later
        found = batch.step(torch.tensor([24]))
        assert not batch.full
    with torch.no_grad():
        torch.testing.assert_close(found[0], plain(model, [21, 22, 23, 24]), rtol=0, atol=2e-5)


def test_a_prefix_is_read_once() -> None:
    model = make_library("llama")
    seen: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    with torch.no_grad(), FAST.attention(model):
        start = FAST.starter(model, new_tokens=1, prefix=PREFIX)
        for _ in range(2):
            start(0).prefill(PROMPTS)
    assert seen == [(1, 5), (3, 7), (3, 7)]
    assert isinstance(start(0), FastDecoding)
