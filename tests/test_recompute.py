"""Gradient checkpointing: the same gradients from less that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from tests.models import ARCHITECTURES, make_library, make_tokenizer, random_sequences
from torch import Tensor, nn

from tastemaker.errors import ModelError
from tastemaker.lora import add_adapters
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel, RewardModel
from tastemaker.packing import pack
from tastemaker.recompute import layers_recomputed
from tastemaker.settings import LoraConfig, OptimizerConfig
from tastemaker.tokenizer import wrap_tokenizer
from tastemaker.training import Loss, Trainer

SEQUENCES = random_sequences([11, 5, 17])
every_architecture = pytest.mark.parametrize("architecture", [*sorted(ARCHITECTURES), "gemma2"])  # the last one padded


def policy_of(architecture: str, **changes: Any) -> LanguageModel:
    return LanguageModel(make_library(architecture, **changes), wrap_tokenizer(make_tokenizer(), source="test"))


def policy_loss(policy: LanguageModel, batch: Sequence[Sequence[int]], num_tokens: float) -> Loss:
    packed = pack(batch)
    logprob_M = policy.predict(packed, *packed.predicted([1] * len(batch))).logprob_M
    return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))


def gradients(module: nn.Module, loss_fn: Any, *, checkpointing: bool, precision: Any = "float32") -> dict[str, Tensor]:
    """The gradients of two micro-batches, and under "kept" how many bytes waited for them at most."""
    config = OptimizerConfig(learning_rate=1e-3, gradient_checkpointing=checkpointing, precision=precision)
    trainer, kept = Trainer(module, config, total_steps=1), dict[int, int]()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.accumulate([SEQUENCES[:2], SEQUENCES[2:]], loss_fn, 30.0)
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found | {"kept": torch.tensor(sum(kept.values()))}


def check_equal(plain: dict[str, Tensor], recomputed: dict[str, Tensor]) -> None:
    assert plain.keys() == recomputed.keys()
    for name in plain.keys() - {"kept"}:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-6, atol=1e-6)


@every_architecture
def test_gradients_are_the_same_and_less_is_kept(architecture: str) -> None:
    """In evaluation mode, as policies train, and under the attention of the forward pass."""
    policy = policy_of(architecture)
    assert not policy.training
    plain = gradients(policy, partial(policy_loss, policy), checkpointing=False)
    recomputed = gradients(policy, partial(policy_loss, policy), checkpointing=True)
    check_equal(plain, recomputed)
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3


def test_what_is_kept_falls_with_the_number_of_layers() -> None:
    """Of 6 layers the inputs stay, and one layer's inside at a time: less than half."""
    policy = policy_of("llama", num_hidden_layers=6)
    peaks = {}
    for checkpointing in (False, True):
        alive, largest = 0, 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal alive, largest
            alive += tensor.numel()
            largest = max(largest, alive)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, layers_recomputed(policy) if checkpointing else nullcontext():
            policy_loss(policy, SEQUENCES, 30.0)
        peaks[checkpointing] = largest
    assert peaks[True] < 0.5 * peaks[False]


def test_a_reward_model_and_half_precision() -> None:
    library = make_library("llama")
    from transformers import AutoModelForSequenceClassification

    library.config.num_labels = 1
    model = RewardModel(
        AutoModelForSequenceClassification.from_config(library.config).eval(),
        wrap_tokenizer(make_tokenizer(), source="test"),
    )

    def loss(batch: Sequence[Sequence[int]], denominator: float) -> Loss:
        return Loss(model.scores(pack(batch)).square().sum() / denominator)

    check_equal(gradients(model, loss, checkpointing=False), gradients(model, loss, checkpointing=True))
    half = [gradients(model, loss, checkpointing=each, precision="bfloat16") for each in (False, True)]
    check_equal(*half)


def test_dropout_is_drawn_once() -> None:
    """What is computed again drops what was dropped the first time."""
    policy = policy_of("gpt2", resid_pdrop=0.3)
    policy.train()
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(7)
        found.append(gradients(policy, partial(policy_loss, policy), checkpointing=checkpointing))
    check_equal(*found)


def test_adapters_are_recomputed_too() -> None:
    policy = policy_of("llama")
    add_adapters(policy.library, LoraConfig(rank=2), seed=1)
    plain = gradients(policy, partial(policy_loss, policy), checkpointing=False)
    recomputed = gradients(policy, partial(policy_loss, policy), checkpointing=True)
    check_equal(plain, recomputed)
    assert all("lora" in name for name in plain.keys() - {"kept"})


def test_modes_are_as_they_were_before() -> None:
    """Decoding follows, which keeps a cache: recomputing layers would throw it away."""
    policy = policy_of("llama")
    layer = policy.library.model.layers[0]
    with layers_recomputed(policy):
        assert layer.training
        assert layer.gradient_checkpointing
        assert not layer.mlp.training
    assert not layer.training
    assert not layer.gradient_checkpointing


def test_what_has_no_layers_is_refused() -> None:
    knows_not = pytest.raises(ModelError, match="gradient_checkpointing does not know this architecture")
    with knows_not, layers_recomputed(nn.Linear(2, 3)):
        pass
