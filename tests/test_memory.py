"""The estimate of memory: the shapes that it starts from, what autograd really keeps, and the sum by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import ARCHITECTURES, make_library, make_tokenizer, save_model
from torch import Tensor

from tastemaker.checkpoint import load_policy, load_shape, new_reward_model
from tastemaker.memory import (
    Estimate,
    Item,
    Pass,
    Shape,
    in_words,
    kept_for_backward,
    largest,
    logits,
    pass_phase,
    rollouts,
    shape_of,
)
from tastemaker.model import LanguageModel, count_parameters
from tastemaker.packing import pack
from tastemaker.tokenizer import wrap_tokenizer

SHAPE = Shape(parameters=1000, matrices=900, layers=3, width=8, queries=12, keys=4, heads=3, inner=20, vocabulary=50)


def alike(lengths: Sequence[int], predicted: int = 0) -> list[Item]:
    return [Item(lengths=(length,), tokens=length, predicted=predicted) for length in lengths]


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_the_shape_of_a_llama_by_hand() -> None:
    """Width 48, 6 heads of 8, 3 of them for keys, 80 inside, 97 tokens.

    A layer's matrices: 48*48 + 2*48*24 + 48*48 in attention, 3*48*80 behind it: 18,432. Norms: 2 layers of 2, and one.
    """
    shape = shape_of(make_library("llama", tie_word_embeddings=True))
    assert shape == Shape(
        parameters=97 * 48 + 2 * 18_432 + 5 * 48,
        matrices=97 * 48 + 2 * 18_432,
        layers=2,
        width=48,
        queries=48,
        keys=24,
        heads=6,
        inner=80,
        vocabulary=97,
        own_layers=True,
    )
    untied = shape_of(make_library("llama", tie_word_embeddings=False))
    assert untied.parameters == shape.parameters + 97 * 48
    assert untied.matrices == shape.matrices  # the embedding only looks up


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_shape_needs_no_weights(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, architecture)
    policy = load_policy(str(folder))
    assert load_shape(str(folder)) == shape_of(policy.library)
    assert load_shape(str(folder)).parameters == count_parameters(policy.library)
    scores = load_shape(str(folder), scores=True)
    assert scores.vocabulary == 0
    reward = new_reward_model(str(folder), seed=0)
    assert abs(scores.parameters - count_parameters(reward)) <= 2 * scores.width  # the head, a row for the pad id


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept_by_autograd(policy: LanguageModel, sequences: Sequence[Sequence[int]], *, bfloat16: bool) -> int:
    """Bytes of what waits for the backward pass of the trunk, but for weights and their copies."""
    kept = dict[int, Tensor]()
    shapes = {tuple(sorted(parameter.shape)) for parameter in policy.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) not in shapes and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        policy.hidden(pack(sequences))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bfloat16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [[61] * 5, [67, 31, 11], [127]], ids=["even", "ragged", "one"])
def test_what_autograd_keeps_of_a_llama(bfloat16: bool, lengths: list[int]) -> None:
    """Within 3 % of the formula, the layer at work aside; what stands before and behind the layers is one norm more."""
    library = make_library("llama", num_hidden_layers=7, max_position_embeddings=256)
    policy = LanguageModel(library, wrap_tokenizer(make_tokenizer(), source="test"))
    sequences = [[(7 * place) % 90 + 4 for place in range(length)] for length in lengths]
    shape, how = shape_of(library), Pass(bfloat16=bfloat16)
    items = alike(lengths)
    one, two = (kept_for_backward(_with_layers(shape, count), items, how) for count in (1, 2))
    expected = (two - one) * 7 + 8 * sum(lengths) * shape.width
    assert kept_by_autograd(policy, sequences, bfloat16=bfloat16) == pytest.approx(expected, rel=0.03)


def _with_layers(shape: Shape, layers: int) -> Shape:
    return replace(shape, layers=layers)


def test_kept_by_hand() -> None:
    """2 sequences of 5 and 3 tokens: 8 tokens, 10 places in attention, fp32.

    A layer: 8 * (16*8 + 4*(2*8 + 12 + 4*20)) + 10*4*(12 + 2*4) + 4 * 2*3*5*5 = 4480 + 800 + 600 = 5880. Three of them,
    one at work (3*4*10*3*5 = 1800 for attention's weights against 2*4*8*20 = 1280), and the ends 3*4*8*8 = 768.
    """
    items = alike([5, 3])
    assert kept_for_backward(SHAPE, items, Pass()) == 3 * 5880 + 1800 + 768
    assert kept_for_backward(SHAPE, items, Pass(recompute=True)) == 3 * 4 * 8 * 8 + 5880 + 1800 + 768
    ours = replace(SHAPE, own_layers=True)
    assert kept_for_backward(ours, items, Pass()) < kept_for_backward(SHAPE, items, Pass())
    assert kept_for_backward(ours, items, Pass(compiled=True)) == kept_for_backward(SHAPE, items, Pass())


def test_logits_by_hand() -> None:
    """7 places of 50 tokens: kept in fp32 1400, three chunks of as much, twice the head's 50*8 weights."""
    items = alike([5, 4], predicted=3) + alike([2], predicted=1)
    assert logits(SHAPE, items, Pass()) == 1400 + 3 * 1400 + 2 * 4 * 400
    assert logits(SHAPE, items, Pass(bfloat16=True)) == 700 + 3 * 1400 + 2 * 4 * 400
    assert logits(SHAPE, alike([5]), Pass()) == 0


def test_a_shared_beginning_counts_once() -> None:
    apart = [Item(lengths=(9,), tokens=9), Item(lengths=(9,), tokens=9)]
    together = [Item(lengths=(9, 9), tokens=13)]
    assert kept_for_backward(SHAPE, together, Pass()) < kept_for_backward(SHAPE, apart, Pass())


def test_gradients_grow_as_activations_fall_only_in_a_single_microbatch() -> None:
    held, items = {"weights": 4000}, alike([5, 3])
    alone = pass_phase(SHAPE, [items], Pass(), trained=1000, held=held)
    split = pass_phase(SHAPE, [items, items], Pass(), trained=1000, held=held)
    assert alone["gradients"] == 0
    assert split["gradients"] == 4000
    assert split["activations"] > alone["activations"] > 0  # the allocator loses more


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    more=st.integers(1, 90),
    bfloat16=st.booleans(),
    recompute=st.booleans(),
)
def test_more_tokens_take_more(lengths: list[int], more: int, bfloat16: bool, recompute: bool) -> None:
    how = Pass(bfloat16=bfloat16, recompute=recompute)
    before = kept_for_backward(SHAPE, alike(lengths), how)
    assert kept_for_backward(SHAPE, alike([*lengths, min(more, max(lengths))]), how) > before
    assert kept_for_backward(SHAPE, alike(lengths), Pass(bfloat16=bfloat16)) >= before


def test_a_cache_holds_keys_and_values_in_fp32() -> None:
    """2 rows, 5 tokens read and 3 new: 8*3*4 = 96 bytes a token; and what is at work: 4*4*2*50 logits."""
    assert rollouts(SHAPE, rows=2, prompt_tokens=5, new_tokens=3) == 2 * 8 * 96 + 2 * 5 * 96 + max(
        2 * 5 * 4 * (40 + 32), 1600
    )


def test_the_largest_phase_counts() -> None:
    estimate = largest([{"weights": 3_000_000, "cache": 5_000_000}, {"weights": 3_000_000, "logits": 6_500_000_000}])
    assert estimate.total == 6_503_000_000
    assert str(estimate) == "6.50 GB (logits 6.50 GB)"
    assert [in_words(size) for size in (12_345_000_000, 999_600_000, 42_400_000)] == ["12.3 GB", "1.00 GB", "42 MB"]


def test_parts_are_named_from_the_largest() -> None:
    estimate = Estimate(parts={"a": 1_000_000_000, "b": 2_000_000_000})
    assert str(estimate) == "3.00 GB (b 2.00 GB, a 1.00 GB)"
