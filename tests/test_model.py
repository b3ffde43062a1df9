"""Policies and reward models on packed tokens against the library's own models run on each sequence alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import (
    ARCHITECTURES,
    UNPACKED,
    VOCABULARY,
    make_library,
    make_policy,
    make_tokenizer,
    random_sequences,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, masking_utils

from tastemaker import head as head_module
from tastemaker.corpus import next_token_places
from tastemaker.errors import ModelError
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel, RewardModel, check_fits, context_length, count_parameters
from tastemaker.packing import Packed, microbatches, pack
from tastemaker.tokenizer import wrap_tokenizer

LENGTHS = [5, 1, 11, 3]
SEQUENCES = random_sequences(LENGTHS)
every_architecture = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))


def library_logits(library: Any, sequences: list[list[int]]) -> Tensor:
    """The library's logits for each sequence alone, end to end."""
    return torch.cat([library(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences])


def library_logprobs(library: Any, sequences: list[list[int]]) -> Tensor:
    """The log-prob of every token but the first of each sequence, by the library on each alone."""
    parts = []
    for ids in sequences:
        logprob_TV = library(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(1)
        parts += [logprob_TV[place, following] for place, following in enumerate(ids[1:])]
    return torch.stack(parts).float()


def our_logprobs(policy: LanguageModel, packed: Packed, **options: Any) -> Tensor:
    source_M, target_M = next_token_places(packed)
    return policy.predict(packed, source_M, target_M, **options).logprob_M


def close(found: Tensor, expected: Tensor, within: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


# --- the packed path gives the library's numbers ---------------------------------------------------------------------


@torch.no_grad()
def test_the_library_does_not_look_through_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given no mask it asks whether they are packed, and waits for a GPU to answer."""
    model = make_policy("qwen2")
    looked = list[Tensor]()
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked.append)
    packed = pack(SEQUENCES)
    trunk = replace(model.trunk, fused=False)
    assert not trunk.padded
    trunk.hidden(packed)
    model._library_logits(packed, torch.tensor([0, 3]))
    assert looked == []
    model.library(input_ids=torch.tensor([SEQUENCES[0]]), position_ids=torch.arange(LENGTHS[0])[None], use_cache=False)
    assert len(looked) == 1  # as the library does where it is asked without a mask


@every_architecture
@torch.no_grad()
def test_logits_are_those_of_each_sequence_alone(architecture: str) -> None:
    policy = make_policy(architecture)
    assert not policy.trunk.padded
    assert policy.linear_head
    packed = pack(SEQUENCES)
    expected = library_logits(policy.library, SEQUENCES)
    found = policy.library.get_output_embeddings()(policy.hidden(packed))
    close(found, expected, 5e-6 * float(expected.abs().max().clamp(min=1)))
    close(our_logprobs(policy, packed), library_logprobs(policy.library, SEQUENCES), 2e-5)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text", "qwen2"])
@torch.no_grad()
def test_a_sliding_window_shorter_than_the_sequences(architecture: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 4}
    if architecture == "qwen2":
        changes |= {"use_sliding_window": True, "max_window_layers": 1}  # the first layer sees everything
    windowed = make_policy(architecture, **changes)
    assert not windowed.trunk.padded
    found = our_logprobs(windowed, pack(SEQUENCES))
    close(found, library_logprobs(windowed.library, SEQUENCES), 2e-5)
    everything = make_policy(architecture, sliding_window=50)
    assert float((found - our_logprobs(everything, pack(SEQUENCES))).abs().max()) > 0.01


@settings(max_examples=20)
@given(data=st.data())
@torch.no_grad()
def test_order_packing_and_grouping_are_inert(data: st.DataObject) -> None:
    policy = POLICY
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=6))
    sequences = random_sequences(lengths, seed=data.draw(st.integers(0, 9)))
    budget = data.draw(st.integers(1, 40))
    found: dict[int, Tensor] = {}
    for group in microbatches(lengths, budget=budget):
        together = our_logprobs(policy, pack([sequences[index] for index in group]))
        parts: tuple[Tensor, ...] = torch.split(together, [lengths[index] - 1 for index in group])
        found.update(zip(group, parts, strict=True))
    close(torch.cat([found[index] for index in range(len(lengths))]), library_logprobs(policy.library, sequences), 2e-5)


POLICY = make_policy("llama")


@every_architecture
def test_a_token_changes_only_what_follows_it(architecture: str) -> None:
    policy = make_policy(architecture)
    changed = [list(ids) for ids in SEQUENCES]
    changed[2][4] = (changed[2][4] + 1 - 4) % (VOCABULARY - 4) + 4
    with torch.no_grad():
        before, after = our_logprobs(policy, pack(SEQUENCES)), our_logprobs(policy, pack(changed))
    moved = (before - after).abs() > 1e-6
    start = (5 - 1) + (1 - 1)  # predictions of the two sequences before
    assert not moved[: start + 3].any()
    assert moved[start + 3 : start + 10].all()  # the token itself, and all that follow in its sequence
    assert not moved[start + 10 :].any()


# --- what else a prediction is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@torch.no_grad()
def test_temperature_divides_the_logits(temperature: float) -> None:
    packed = pack(SEQUENCES)
    source_M, target_M = next_token_places(packed)
    logits_MV = library_logits(POLICY.library, SEQUENCES)[source_M].double() / temperature
    expected = logits_MV.log_softmax(1).gather(1, target_M[:, None])[:, 0].float()
    close(POLICY.predict(packed, source_M, target_M, temperature=temperature).logprob_M, expected, 2e-5)


@torch.no_grad()
def test_entropy_is_minus_sum_p_log_p() -> None:
    packed = pack(SEQUENCES)
    source_M, target_M = next_token_places(packed)
    logprob_MV = (library_logits(POLICY.library, SEQUENCES)[source_M].double() / 0.7).log_softmax(1)
    found = POLICY.predict(packed, source_M, target_M, temperature=0.7, entropy=True).entropy_M
    assert found is not None
    close(found, -(logprob_MV.exp() * logprob_MV).sum(1).float(), 1e-5)
    assert POLICY.predict(packed, source_M, target_M).entropy_M is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@torch.no_grad()
def test_ids_beyond_the_vocabulary_have_no_probability(architecture: str) -> None:
    policy = make_policy(architecture, vocabulary=VOCABULARY + 6)
    assert policy.tokenizer.vocabulary == VOCABULARY
    packed = pack([[5, 6, 7]])
    everywhere = torch.full((VOCABULARY,), 2)
    logprob_V = policy.predict(packed, everywhere, torch.arange(VOCABULARY)).logprob_M
    assert float(logprob_V.exp().sum()) == pytest.approx(1, abs=1e-5)
    with pytest.raises((IndexError, RuntimeError)):
        policy.predict(packed, torch.tensor([2]), torch.tensor([VOCABULARY]))


@torch.no_grad()
def test_no_places_give_no_predictions() -> None:
    nothing = torch.tensor([], dtype=torch.long)
    assert POLICY.predict(pack([[5]]), nothing, nothing).logprob_M.shape == (0,)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunks_change_neither_values_nor_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        source_M, target_M = next_token_places(pack(SEQUENCES))
        found = policy.predict(pack(SEQUENCES), source_M, target_M, temperature=0.7, entropy=True)
        policy.zero_grad()
        (found.logprob_M * torch.arange(16.0)).sum().backward()  # type: ignore[no-untyped-call]
        assert found.entropy_M is not None
        return found.logprob_M.detach(), found.entropy_M, [_gradient(p).clone() for p in policy.parameters()]

    policy = make_policy("gemma3_text")  # its embedding is its head, so the head's gradient joins the embedding's
    whole = run()
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", rows * VOCABULARY)
    chunked = run()
    close(chunked[0], whole[0], 2e-6)
    close(chunked[1], whole[1], 2e-6)
    for found, expected in zip(chunked[2], whole[2], strict=True):
        close(found, expected, 1e-5 * float(expected.abs().max()))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def check_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Each within 1e-5 of its own norm, and of what rounding in the largest leaves in the smallest."""
    rounding = 1e-7 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + rounding, name


@every_architecture
def test_gradients_are_those_of_a_padded_library_batch(architecture: str) -> None:
    policy = make_policy(architecture)
    packed = pack(SEQUENCES)
    logprob_M = our_logprobs(policy, packed)
    sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=16).backward()  # type: ignore[no-untyped-call]
    ours = {name: _gradient(p).clone() for name, p in policy.library.named_parameters() if p.grad is not None}

    policy.zero_grad()
    longest = max(LENGTHS)
    id_ST = torch.tensor([ids + [0] * (longest - len(ids)) for ids in SEQUENCES])
    mask_ST = torch.tensor([[1] * n + [0] * (longest - n) for n in LENGTHS])
    labels_ST = torch.where(mask_ST.bool(), id_ST, -100)
    output = policy.library(input_ids=id_ST, attention_mask=mask_ST, labels=labels_ST, use_cache=False)
    output.loss.backward()
    theirs = {name: _gradient(p) for name, p in policy.library.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    check_gradients(ours, theirs)


SHARED = [[3, 5, 7, 11, 2], [3, 5, 7, 6, 9, 4, 8], [3, 5, 7], [3, 5, 7, 6, 1], [8, 2, 4]]  # four begin alike
PROMPTS = [3, 3, 1, 4, 2]


@every_architecture
def test_a_shared_beginning_changes_neither_values_nor_gradients(architecture: str) -> None:
    """fp32, relative error 1e-5: only the order of sums changes."""
    policy = make_policy(architecture)

    def run(groups: list[int] | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        packed = pack(SHARED, groups=groups)
        found = policy.predict(packed, *packed.predicted(PROMPTS)).logprob_M
        policy.zero_grad()
        (found * torch.linspace(-1, 2, len(found))).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: _gradient(p).clone() for name, p in policy.named_parameters() if p.grad is not None}
        return packed.id_N, found.detach(), gradients

    (alone_N, alone, expected), (shared_N, shared, found) = run(None), run([4, 1])
    assert len(shared_N) == len(alone_N) - 9
    close(shared, alone, 5e-6)
    check_gradients(found, expected)


# --- models that need another path -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "reason"), [("bloom", "hidden states differ"), ("gemma2", "softcap")])
def test_other_architectures_use_the_librarys_attention(
    architecture: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tastemaker.model"):
        policy = make_policy(architecture)
    assert policy.trunk.padded
    assert f"{architecture} does not run packed" in caplog.text
    assert reason in caplog.text
    with torch.no_grad():
        found = our_logprobs(policy, pack(SEQUENCES))
        close(found, library_logprobs(policy.library, SEQUENCES), 2e-5)
    loss = our_logprobs(policy, pack(SEQUENCES)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in policy.library.parameters())


@torch.no_grad()
def test_a_soft_cap_on_the_logits_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tastemaker.model"):
        policy = make_policy("gemma3_text", final_logit_softcapping=2.0)
    assert not policy.trunk.padded
    assert not policy.linear_head
    assert "changes its logits after the output embedding" in caplog.text
    found = our_logprobs(policy, pack(SEQUENCES))
    close(found, library_logprobs(policy.library, SEQUENCES), 2e-5)
    assert float((found - our_logprobs(make_policy("gemma3_text"), pack(SEQUENCES))).abs().max()) > 0.01


def test_a_soft_cap_that_small_logits_do_not_show_is_kept() -> None:
    library = make_library("gemma3_text", final_logit_softcapping=30.0, tie_word_embeddings=False)
    with torch.no_grad():
        library.get_output_embeddings().weight.mul_(0.01)  # as at random initialisation
        policy = LanguageModel(library, wrap_tokenizer(make_tokenizer()))
        library.get_output_embeddings().weight.mul_(2000)  # as after training
        assert not policy.linear_head
        found = our_logprobs(policy, pack(SEQUENCES))
        close(found, library_logprobs(policy.library, SEQUENCES), 1e-4)


@every_architecture
@torch.no_grad()
def test_both_ways_to_the_logits_agree(architecture: str) -> None:
    policy = make_policy(architecture)
    by_head = our_logprobs(policy, pack(SEQUENCES))
    policy.linear_head = False
    close(our_logprobs(policy, pack(SEQUENCES)), by_head, 2e-5)


def test_a_scale_on_the_logits_is_found_by_the_probe() -> None:
    settings: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = AutoConfig.for_model(
        "granite", vocab_size=97, intermediate_size=80, num_key_value_heads=3, logits_scaling=8.0, **settings
    )
    policy = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), wrap_tokenizer(make_tokenizer()))
    assert not policy.linear_head
    with torch.no_grad():
        close(our_logprobs(policy, pack(SEQUENCES)), library_logprobs(policy.library, SEQUENCES), 2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_probing_leaves_the_mode_as_it_was(training: bool) -> None:
    library = make_library("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    library.train(training)
    policy = LanguageModel(library, wrap_tokenizer(make_tokenizer()))
    assert library.training is training
    assert policy.linear_head  # dropout does not disturb the probe


# --- reward models ---------------------------------------------------------------------------------------------------


def make_reward_model(architecture: str = "llama", *, offset: float = 0.0, pad_id: int = 0) -> RewardModel:
    names = ARCHITECTURES | UNPACKED
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        architecture, **{"vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": pad_id} | names[architecture]
    )
    library = AutoModelForSequenceClassification.from_config(config).eval()
    library.config.reward_offset = offset
    with torch.no_grad():
        library.score.weight.normal_()
    return RewardModel(library, wrap_tokenizer(make_tokenizer()))


def padded_batch(sequences: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    longest = max(map(len, sequences))
    rows = [ids + [pad_id] * (longest - len(ids)) for ids in sequences]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("architecture", [*sorted(ARCHITECTURES), "bloom"])
@torch.no_grad()
def test_scores_are_the_librarys_logits_minus_the_offset(architecture: str) -> None:
    reward = make_reward_model(architecture, offset=0.75)
    assert reward.trunk.padded is (architecture == "bloom")
    theirs_S = reward.library(**padded_batch(SEQUENCES, 0), use_cache=False).logits[:, 0]
    close(reward.scores(pack(SEQUENCES)), theirs_S - 0.75, 2e-5)


@torch.no_grad()
def test_a_score_does_not_depend_on_the_batch() -> None:
    reward = make_reward_model()
    alone = torch.cat([reward.scores(pack([ids])) for ids in SEQUENCES])
    close(reward.scores(pack(SEQUENCES)), alone, 5e-6)
    close(reward.scores(pack(SEQUENCES[::-1])), alone.flip(0), 5e-6)


@torch.no_grad()
def test_values_are_read_at_the_places_asked_for() -> None:
    reward = make_reward_model(offset=-0.5)
    packed = pack(SEQUENCES)
    prefixes = [SEQUENCES[0][:3], SEQUENCES[2][:7], SEQUENCES[2]]  # a causal model's value of a place sees no more
    close(reward.at(packed, torch.tensor([2, 12, 16])), reward.scores(pack(prefixes)), 5e-6)


@torch.no_grad()
def test_the_head_is_fp32_under_autocast() -> None:
    reward = make_reward_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score_S = reward.scores(pack(SEQUENCES))
    assert score_S.dtype == torch.float32
    assert not torch.equal(score_S, score_S.bfloat16().float())


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_shared_parameters_count_once() -> None:
    tied, untied = (make_library("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert count_parameters(untied) - count_parameters(tied) == VOCABULARY * 48


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [("llama", {"max_position_embeddings": 77}, 77), ("gpt2", {}, 128), ("bloom", {}, 2**20)],
)
def test_context_length(architecture: str, changes: dict[str, Any], expected: int) -> None:
    assert context_length(make_library(architecture, **changes).config) == expected


def test_positions_that_turn_otherwise_in_long_batches_limit_the_context() -> None:
    """longrope: one long sequence would change the log-probs of all that are packed with it."""
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 31}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    changes: dict[str, Any] = {"rope_parameters": rope | factors, "max_position_embeddings": 128}
    assert context_length(make_library("llama", **changes).config) == 31


def test_what_does_not_fit_is_refused_with_counts() -> None:
    check_fits([3, 8], 8, what="demonstrations")
    with pytest.raises(ModelError, match=r"2 of 3 demonstrations .* context of 8 tokens \(the longest has 11\)"):
        check_fits([9, 8, 11], 8, what="demonstrations")


def test_log_prob_of_a_uniform_model_is_that_of_the_vocabulary() -> None:
    library = make_library("llama", vocabulary=VOCABULARY + 6)
    with torch.no_grad():
        library.get_output_embeddings().weight.zero_()
    policy = LanguageModel(library, wrap_tokenizer(make_tokenizer()))
    assert policy.linear_head
    assert our_logprobs(policy, pack([[5, 6]])).item() == pytest.approx(-math.log(VOCABULARY), abs=1e-6)
