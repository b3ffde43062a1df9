"""Low-rank adapters: nothing changes at first, the base is always there, and what is saved is an ordinary model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import copy_policy, make_policy, random_sequences
from torch import Tensor
from transformers import AutoModelForCausalLM

from tastemaker.checkpoint import save_policy
from tastemaker.corpus import next_token_places
from tastemaker.errors import ModelError
from tastemaker.lora import LoraConfig, adapter_layers, adapters_off, add_adapters, merged_state
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel
from tastemaker.packing import pack
from tastemaker.training import Loss, OptimizerConfig, Trainer, WeightAverage

SEQUENCES = random_sequences([5, 3, 8])
CONFIG = LoraConfig(rank=3, alpha=7, targets=("q_proj", "down_proj"))
GPT2 = LoraConfig(rank=3, alpha=7, targets=("c_attn", "c_proj"))  # transposed layers, and one output for q, k and v
BOTH = pytest.mark.parametrize(("architecture", "config"), [("llama", CONFIG), ("gpt2", GPT2)])


def logprobs(policy: LanguageModel) -> Tensor:
    packed = pack(SEQUENCES)
    return policy.predict(packed, *next_token_places(packed)).logprob_M


def loss_of(policy: LanguageModel) -> Any:
    def loss(_: int, num_tokens: float) -> Loss:
        logprob_M = logprobs(policy)
        return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))

    return loss


def trained(policy: LanguageModel, steps: int = 3) -> LanguageModel:
    trainer = Trainer(policy, OptimizerConfig(learning_rate=0.02, schedule="constant"), total_steps=steps)
    for _ in range(steps):
        trainer.step([0], loss_of(policy), 13.0)
    return policy


@BOTH
def test_adapters_change_nothing_until_they_are_trained(architecture: str, config: LoraConfig) -> None:
    policy = make_policy(architecture)
    with torch.no_grad():
        before = logprobs(policy)
        add_adapters(policy.library, config, seed=0)
        # Llama's layers without adapters are our own, which round in another order.
        torch.testing.assert_close(logprobs(policy), before, rtol=0, atol=5e-6)
    assert adapter_layers(policy.library)


@BOTH
def test_only_adapters_train_and_the_base_is_there_with_them_off(architecture: str, config: LoraConfig) -> None:
    policy = make_policy(architecture)
    base = copy_policy(policy)
    add_adapters(policy.library, config, seed=0)
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" not in n}
    adapters = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" in n}
    trained(policy)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        assert torch.equal(parameter, frozen[name]) if name in frozen else not torch.equal(parameter, adapters[name])
    with torch.no_grad():
        assert float((logprobs(policy) - logprobs(base)).abs().max()) > 0.01
        with adapters_off(policy.library):
            torch.testing.assert_close(logprobs(policy), logprobs(base), rtol=0, atol=5e-6)
        assert float((logprobs(policy) - logprobs(base)).abs().max()) > 0.01
    assert all(p.requires_grad is ("lora_" in n) for n, p in policy.named_parameters()), "switching froze an adapter"


def test_adapters_come_back_after_an_error() -> None:
    policy = make_policy()
    add_adapters(policy.library, CONFIG, seed=0)
    trained(policy)
    with torch.no_grad():
        before = logprobs(policy)

        def fail() -> None:
            with adapters_off(policy.library):
                raise RuntimeError("within")

        with pytest.raises(RuntimeError, match="within"):
            fail()
        assert torch.equal(logprobs(policy), before)


@BOTH
def test_a_saved_model_has_them_merged(architecture: str, config: LoraConfig, tmp_path: Path) -> None:
    policy = make_policy(architecture)
    plain = {name: weight.shape for name, weight in policy.library.named_parameters()}  # tied weights once
    add_adapters(policy.library, config, seed=0)
    trained(policy)
    assert {name: tensor.shape for name, tensor in merged_state(policy.library, {}).items()} == plain
    save_policy(tmp_path / "model", policy)
    library = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"))
    with torch.no_grad():
        found = logprobs(LanguageModel(library, policy.tokenizer))
        torch.testing.assert_close(found, logprobs(policy), rtol=0, atol=1e-5)


def test_adapters_of_a_tied_embedding_leave_the_head_as_it_is(tmp_path: Path) -> None:
    policy = make_policy(tie_word_embeddings=True)
    add_adapters(policy.library, replace(CONFIG, targets=("embed_tokens",)), seed=0)
    trained(policy)
    save_policy(tmp_path / "model", policy)
    library = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"))
    with torch.no_grad():
        found = logprobs(LanguageModel(library, policy.tokenizer))
        torch.testing.assert_close(found, logprobs(policy), rtol=0, atol=1e-5)


def test_an_average_of_adapters_is_merged_and_the_policy_left_alone() -> None:
    policy = make_policy()
    add_adapters(policy.library, CONFIG, seed=0)
    average = WeightAverage(policy.library)
    assert all("lora_" in name for name in average.weights)
    trained(policy)
    now = {name: tensor.clone() for name, tensor in policy.library.state_dict().items()}
    start = merged_state(policy.library, average.weights)  # the average still stands where training began
    base = make_policy().library.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in start.items())
    assert all(torch.equal(tensor, now[name]) for name, tensor in policy.library.state_dict().items())


def test_adapters_are_drawn_from_the_seed() -> None:
    def drawn(seed: int) -> Tensor:
        policy = make_policy()
        torch.manual_seed(seed + 100)
        add_adapters(policy.library, CONFIG, seed=3)
        return torch.cat([p.detach().flatten() for n, p in policy.named_parameters() if "lora_" in n])

    assert torch.equal(drawn(1), drawn(2))


def test_without_targets_the_usual_layers_are_adapted() -> None:
    policy = make_policy()
    add_adapters(policy.library, LoraConfig(), seed=0)
    assert {name.rpartition(".")[2] for name in adapter_layers(policy.library)} == {"q_proj", "v_proj"}


def test_an_unknown_target_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelError, match=r"cannot be added to llama: .* Set lora.targets to some of down_proj, gate_"):
        add_adapters(make_policy().library, LoraConfig(targets=("nothing",)), seed=0)
