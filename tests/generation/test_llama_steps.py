"""Decoding by layers of our own: the library's logits, from the model's weights or from a copy of the engine's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.generation.test_generator import PROMPTS, SAMPLING, SEEDS, flat, mean_difference, teacher_forced
from tests.models import VOCABULARY, make_library
from torch import nn

from tastemaker.errors import ModelError
from tastemaker.generation import Generator, llama
from tastemaker.generation.decoding import choose_path
from tastemaker.generation.llama import CopiedWeights, LiveWeights, LlamaForward

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
}


def make(kind: str) -> Any:
    library = make_library(kind.partition("-")[0], **KINDS[kind])
    with torch.no_grad():
        for parameter in library.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.3)
    return library


@pytest.mark.parametrize("kind", KINDS)
def test_live_weights_give_the_librarys_logits(kind: str) -> None:
    model = make(kind)
    generator = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=90)
    assert generator._path.forward is not None
    for rollout in flat(generator.generate(PROMPTS, 3, SAMPLING, SEEDS, prefix=[71, 72, 73])):
        whole = type(rollout)((71, 72, 73, *rollout.prompt_ids), rollout.response_ids, [], rollout.finish, 0)
        assert rollout.logprobs == pytest.approx(teacher_forced(model, whole), abs=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_gives_the_logits_of_its_weights(kind: str) -> None:
    """One product for several matrices, in oneDNN's layout or not; here in fp32, where the two must agree."""
    model = make(kind)
    copied = LlamaForward(model, CopiedWeights(model, torch.float32))
    live = LlamaForward(model, LiveWeights(model))
    assert live.weights.ready()
    assert [len(layer.gate_up) for layer in (copied.weights.layers[0], live.weights.layers[0])] == [1, 2]
    found = []
    with torch.no_grad():
        for forward in (copied, live):
            path = choose_path(model)
            object.__setattr__(path, "forward", forward)
            batch = path.starter(model, new_tokens=2)(0)
            batch.prefill(PROMPTS)
            batch.branch(torch.tensor([0, 2, 2, 4]))
            found.append(batch.step(torch.tensor([3, 5, 7, 11])))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_without_onednn_the_product_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [nn.Linear(5, 3), nn.Linear(5, 7)]
    x_BD = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    expected_BE = torch.cat([linear(x_BD) for linear in linears], 1)
    for there in (True, False):
        if not there:
            monkeypatch.setattr(llama, "ARRANGE", "nothing_of_this_name")
        torch.testing.assert_close(llama._arranged(torch.float32, *linears)(x_BD), expected_BE, rtol=0, atol=1e-6)


def test_one_bias_of_two_is_refused() -> None:
    with pytest.raises(ModelError, match="Some of a layer's projections have a bias"):
        llama._arranged(torch.float32, nn.Linear(5, 3), nn.Linear(5, 3, bias=False))


def test_a_copy_is_of_the_weights_as_they_were_loaded() -> None:
    model = make("llama")
    generator = Generator(model, vocabulary=VOCABULARY, dtype=torch.bfloat16)
    assert generator._copy is not None
    before = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and embeddings too
            parameter.mul_(1.5).add_(0.05)
    assert flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS)) == before
    generator.load_weights(model, 3)
    after = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    assert {rollout.weights_version for rollout in after} == {3}
    assert mean_difference(after, model) < 0.03
    with pytest.raises(ModelError, match="do not fit"):
        generator.load_weights(make_library("llama", intermediate_size=40), 4)


def test_hooks_and_adapters_that_come_later_are_run() -> None:
    model = make("llama")
    generator = Generator(model, vocabulary=VOCABULARY)
    seen = list[int]()
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(1))
    generator.generate(PROMPTS, 1, SAMPLING, SEEDS)
    assert seen
    hook.remove()
    seen.clear()
    generator.generate(PROMPTS, 1, SAMPLING, SEEDS)
    assert not seen


def test_layers_that_give_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_library()
    plain = llama._normed
    monkeypatch.setattr(llama, "_normed", lambda *given: 1.01 * plain(*given))
    assert choose_path(model).forward is None
    assert "is decoded by the library's layers" in caplog.text
