"""Pretraining text: pieces, the order in which they are drawn, and the loss on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import make_policy, make_tokenizer, random_sequences

from tastemaker.corpus import encode_texts, next_token_places, permutation, shuffled_forever, text_batches, text_loss
from tastemaker.errors import DataError
from tastemaker.packing import pack
from tastemaker.records import Text
from tastemaker.tokenizer import wrap_tokenizer


def texts(*words: str) -> list[Text]:
    return [Text(text=text) for text in words]


def test_documents_are_cut_and_closed() -> None:
    # w0 is 4 and <eos> 2; pieces of one token predict nothing and are left out
    tokenizer = wrap_tokenizer(make_tokenizer())
    pieces = encode_texts(texts("w0 w1 w2 w3", "w4", "w5 w6"), tokenizer, max_tokens=3)
    assert pieces == [[4, 5, 6], [7, 2], [8, 2], [9, 10, 2]]
    assert encode_texts(texts("w0 w1 w2"), tokenizer, max_tokens=3) == [[4, 5, 6]]


def test_text_without_two_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no document of at least two tokens"):
        encode_texts(texts("", ""), wrap_tokenizer(make_tokenizer()), max_tokens=8)


@given(st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 7), max_size=6))
def test_drawing_in_pieces_is_drawing_at_once(count: int, seed: int, amounts: list[int]) -> None:
    draw = shuffled_forever(count, seed=seed)
    drawn, start = list[int](), 0
    for amount in amounts:
        drawn += draw(start, amount)
        start += amount
    assert drawn == shuffled_forever(count, seed=seed)(0, sum(amounts))
    for begin in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[begin : begin + count]) == list(range(count)), "an item came twice in one pass"


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(20, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert permutation(20, seed=1, epoch=2) == permutation(20, seed=1, epoch=2)


def test_every_token_but_a_sequences_first_is_predicted() -> None:
    source_M, target_M = next_token_places(pack([[11, 12, 13], [21], [31, 32]]))
    assert source_M.tolist() == [0, 1, 4]
    assert target_M.tolist() == [12, 13, 32]


@pytest.mark.parametrize("budget", [1, 10, 1000])
def test_the_loss_is_a_mean_over_tokens_however_they_are_batched(budget: int) -> None:
    policy, sequences = make_policy(), random_sequences([7, 2, 5, 11])
    total = 0.0
    with torch.no_grad():
        for ids in sequences:
            logprob_TV = policy.library(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
            total -= sum(float(logprob_TV[place, token]) for place, token in enumerate(ids[1:]))
    assert text_loss(policy, sequences, budget=budget) == pytest.approx(total / 21, abs=1e-5)
    packed = list(text_batches(sequences, budget=budget, device=torch.device("cpu")))
    assert len(packed) == {1: 4, 10: 3, 1000: 1}[budget]  # at 10: [11], [7], [5, 2]
