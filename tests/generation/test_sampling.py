"""The draw of a token: its random numbers against published vectors, its law against the softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from tastemaker.errors import ConfigError
from tastemaker.generation import Sampling, sampling
from tastemaker.generation.sampling import choose, draw_uniforms, invert_cdf, keep_top_k, keep_top_p, philox, to_uniform

DRAWS = 40_000
SMALLEST, LARGEST = 2**-24, 1 - 2**-24  # of the uniform numbers that there are


def settings_for(**changes: object) -> Sampling:
    return Sampling(**{"max_new_tokens": 5, "stop_token_ids": (), **changes})  # type: ignore[arg-type]


def law(logit_V: Tensor, **changes: object) -> list[float]:
    """The share of each token in 40,000 draws."""
    uniform_B = torch.from_numpy(draw_uniforms([3] * DRAWS, range(DRAWS), 1)[0])
    token_B, _ = choose(logit_V.expand(DRAWS, -1).clone(), uniform_B, settings_for(**changes))
    return [count / DRAWS for count in token_B.bincount(minlength=len(logit_V)).tolist()]


def assert_law(found: Sequence[float], expected: Sequence[float]) -> None:
    """Chi-square over the tokens that can occur; the others must not occur at all."""
    share, probability = np.array(found), np.array(expected, dtype=np.float64)
    possible = probability > 0
    assert share[~possible].sum() == 0
    probability = probability[possible] / probability[possible].sum()
    assert chisquare(share[possible] * DRAWS, probability * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that the authors publish with their Random123 library
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox(np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64)).tolist() == words


def test_uniforms_hang_on_seed_response_and_step_alone() -> None:
    seeds, responses = [7, -7, 2**70 + 5, 7], [0, 0, 3, 11]
    together = draw_uniforms(seeds, responses, 13)
    for row, (seed, response) in enumerate(zip(seeds, responses, strict=True)):
        assert (draw_uniforms([seed], [response], 6)[:, 0] == together[:6, row]).all()
    assert len(np.unique(together)) == together.size == 52


def test_each_uniform_is_one_word_of_philox_under_its_seed_response_and_step() -> None:
    seeds, responses = [5, 2**63 + 2**40 + 9, -3], [0, 2, 7]
    found = draw_uniforms(seeds, responses, 6)
    assert found.shape == (6, 3)
    for row, (seed, response) in enumerate(zip([5, 2**63 + 2**40 + 9, 2**64 - 3], responses, strict=True)):
        for step in range(6):  # step 5 is word 1 of block 1
            counter = np.array([[step // 4], [response], [0], [0]], dtype=np.uint64)
            key = np.array([[seed % 2**32], [seed // 2**32]], dtype=np.uint64)
            assert found[step, row] == to_uniform(philox(counter, key)[step % 4])[0]


def test_as_many_numbers_are_made_as_whole_blocks_of_four_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = list[tuple[int, ...]]()

    def watched(counter: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        shapes.append(counter.shape)
        return philox(counter, key)

    monkeypatch.setattr(sampling, "philox", watched)
    for steps in (1, 4, 5, 13):
        assert draw_uniforms([7, 8, 9], [0, 1, 2], steps).shape == (steps, 3)
    assert shapes == [(4, 1, 3), (4, 1, 3), (4, 2, 3), (4, 4, 3)]


def test_a_response_below_0_has_no_numbers() -> None:
    with pytest.raises(OverflowError):
        draw_uniforms([7, 7], [0, -1], 3)


def test_uniforms_are_uniform() -> None:
    uniforms = draw_uniforms(range(211), [2] * 211, 97)
    assert uniforms.dtype == np.float32
    assert chisquare(np.histogram(uniforms, bins=32, range=(0, 1))[0]).pvalue > 1e-3


def test_uniforms_are_above_0_and_below_1() -> None:
    # 0 would draw the first token of any probability at all, 1 none
    words = np.array([0, 0x1FF, 0x200, 0xFFFFFFFF], dtype=np.uint64)
    assert to_uniform(words).tolist() == [SMALLEST, SMALLEST, 3 * SMALLEST, LARGEST]


def test_a_draw_by_hand() -> None:
    # probabilities 1/8, 1/2, 1/8, 1/4, so the cumulative ones are 0.125, 0.625, 0.75, 1
    logits = torch.tensor([1.0, 4.0, 1.0, 2.0]).log()
    uniform_B = torch.tensor([SMALLEST, 0.1, 0.13, 0.62, 0.63, 0.74, 0.76, LARGEST])
    token_B, logprob_B = invert_cdf(logits.expand(8, -1).clone(), uniform_B)
    assert token_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = [math.log(p) for p in (1 / 8, 1 / 8, 1 / 2, 1 / 2, 1 / 8, 1 / 8, 1 / 4, 1 / 4)]
    assert logprob_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_usual_vocabularies_are_whole_blocks() -> None:
    """Or else their logits would be copied at every step: those of Llama 2 and 3, Pythia and Qwen 2.5."""
    assert [vocabulary % sampling.BLOCK for vocabulary in (32_000, 128_256, 50_304, 151_936)] == [0] * 4


def test_a_number_between_two_tokens_draws_the_later_one() -> None:
    # 128 equally likely tokens in blocks of 64, with a block of impossible ones between them
    logit_BV = torch.cat([torch.zeros(64), torch.full((64,), -math.inf), torch.zeros(64)])[None]
    token_B, _ = invert_cdf(logit_BV.expand(3, -1).clone(), torch.tensor([0.5 - 2**-20, 0.5, 0.25]))
    assert token_B.tolist() == [63, 128, 32]


def test_a_draw_in_the_third_block_by_hand() -> None:
    # weights 1, 2 and 1 of tokens 5, 70 and 128, and 4 of token 130: the cumulative ones are 1/8, 3/8, 1/2, 1
    logit_BV = torch.full((6, 133), -math.inf)
    logit_BV[:, [5, 70, 128, 130]] = torch.tensor([1.0, 2.0, 1.0, 4.0]).log()
    token_B, logprob_B = invert_cdf(logit_BV, torch.tensor([0.1, 0.13, 0.37, 0.38, 0.49, 0.51]))
    assert token_B.tolist() == [5, 70, 70, 128, 128, 130]
    expected = [math.log(p) for p in (1 / 8, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 2)]
    assert logprob_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_row_by_itself_draws_from_every_block() -> None:
    token_B, logprob_B = invert_cdf(torch.zeros(1, 3 * sampling.BLOCK), torch.tensor([0.9]))
    assert token_B.tolist() == [int(0.9 * 3 * sampling.BLOCK)]
    assert logprob_B.tolist() == pytest.approx([-math.log(3 * sampling.BLOCK)], abs=1e-5)


def test_rows_of_other_sizes_do_not_matter_to_a_row() -> None:
    """Logits are taken relative to their own row's largest; beside another row's they would all be impossible."""
    logit_BV = torch.tensor([[0.0, math.log(3)], [500.0, 500.0 + math.log(3)]])
    for temperature in (1.0, 0.5):
        law = settings_for(temperature=temperature)
        token_B, logprob_B = choose(logit_BV.clone(), torch.tensor([0.05, 0.5]), law)
        assert token_B.tolist() == [0, 1]
        likelier = 3.0 ** (1 / temperature)
        expected = [math.log(1 / (1 + likelier)), math.log(likelier / (1 + likelier))]
        assert logprob_B.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("uniform", [SMALLEST, LARGEST])
def test_rounding_never_draws_an_impossible_token(uniform: float) -> None:
    # the sum of a block and its last cumulative sum round differently, in either direction
    logit_BV = torch.full((2000, 64 * 3), -math.inf)
    logit_BV[:, 64:128] = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    token_B, logprob_B = invert_cdf(logit_BV, torch.full((2000,), uniform))
    assert token_B.min() >= 64
    assert token_B.max() < 128
    assert logprob_B.isfinite().all()


def test_the_likeliest_token_stands_in_for_one_of_weight_zero() -> None:
    """On a GPU, where the sums of a single row may rise by rounding at a token of weight zero."""
    weight_BV = torch.tensor([[0.0, 0.25, 1.0, 0.0], [0.5, 0.0, 0.25, 1.0], [torch.nan] * 4, [0.5, 1.0, 0.0, 0.25]])
    token_B1 = torch.tensor([[3], [1], [1], [0]])
    assert sampling.or_likeliest(token_B1, weight_BV)[:, 0].tolist() == [2, 3, 1, 0]


def test_rounding_never_draws_an_impossible_token_behind_unlikely_ones() -> None:
    # as above, where the block's weights add up to e^-0.05 and the likeliest token, of weight 1, is in the one before
    logit_BV = torch.full((2000, 64 * 3), -math.inf)
    logit_BV[:, 64:128] = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    logit_BV[:, 17] = logit_BV.logsumexp(dim=1) + 0.05
    token_B, logprob_B = invert_cdf(logit_BV, torch.full((2000,), LARGEST))
    assert token_B.min() >= 64
    assert token_B.max() < 128
    assert logprob_B.isfinite().all()


@settings(deadline=None)
@given(
    logits=st.lists(st.sampled_from([-math.inf, -200.0, -90.0, -3.0, 0.0, 1.5, 4.0]), min_size=1, max_size=200),
    uniform=st.floats(SMALLEST, LARGEST, width=32),
)
def test_a_draw_has_the_log_probability_of_the_softmax_and_is_possible(logits: list[float], uniform: float) -> None:
    logit_V = torch.tensor([*logits, 0.5])
    expected_V = logit_V.double().log_softmax(dim=0)
    token_B, logprob_B = invert_cdf(logit_V[None].clone(), torch.tensor([uniform]))
    assert logprob_B.item() == pytest.approx(expected_V[int(token_B)].item(), rel=1e-6, abs=1e-5)
    # the number falls into the token's part of the cumulative distribution, up to the rounding of fp32 sums
    upper_V = expected_V.exp().cumsum(dim=0)
    token = int(token_B)
    assert (upper_V[token - 1].item() if token else 0.0) - 1e-5 <= uniform <= upper_V[token].item() + 1e-5


@pytest.mark.parametrize("vocabulary", [3, 64, 97, 128, 130])  # below, at and beside the block size of the search
def test_the_law_is_the_softmax(vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    assert_law(law(logits), logits.double().softmax(dim=0).tolist())


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([0.0, -1.0, 2.0, 0.5, 1.0])
    assert_law(law(logits, temperature=0.7), (logits.double() / 0.7).softmax(dim=0).tolist())
    token_B, logprob_B = choose(logits[None].clone(), torch.tensor([0.5]), settings_for(temperature=0.7))
    assert logprob_B.item() == pytest.approx((logits / 0.7).log_softmax(dim=0)[int(token_B)].item(), abs=1e-6)


def test_top_k_keeps_the_likeliest_and_their_proportions() -> None:
    logits = torch.tensor([1.0, 8.0, 2.0, 4.0, 3.0]).log()  # the three likeliest: 8, 4 and 3 of 15
    assert_law(law(logits, top_k=3), [0, 8 / 15, 0, 4 / 15, 3 / 15])


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]  # sorted 0.4, 0.3, 0.15, ...: 0.7 falls short of 0.75, 0.85 does not
    kept = [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]
    assert_law(law(torch.tensor(probabilities).log(), top_p=0.75), kept)


def test_top_p_always_keeps_the_likeliest_token() -> None:
    assert law(torch.tensor([0.3, 0.7]).log(), top_p=0.01) == [0.0, 1.0]


def test_the_likeliest_token_is_kept_even_where_fp32_rounds_top_p_to_0() -> None:
    assert keep_top_p(torch.tensor([[0.0, 3.0, 1.0]]), 1e-60).tolist() == [[-math.inf, 3.0, -math.inf]]


def test_top_p_that_is_reached_exactly_wants_no_further_token() -> None:
    kept_BV = keep_top_p(torch.full((3, 4), 0.7), 0.5)  # each has 1/4, exactly
    assert kept_BV.isfinite().sum(1).tolist() == [2, 2, 2]


def test_fewer_tokens_than_rows_are_kept_too() -> None:
    kept_BV = keep_top_k(torch.tensor([[0.5, -1.0, 2.0], [4.0, 3.0, 1.0]]), 2)
    assert kept_BV.tolist() == [[0.5, -math.inf, 2.0], [4.0, 3.0, -math.inf]]


def test_drawing_from_everything_makes_no_copy() -> None:
    logit_BV = torch.tensor([[0.5, -1.0, 2.0]])
    assert keep_top_k(logit_BV, 3) is logit_BV
    choose(logit_BV, torch.tensor([0.5]), settings_for())
    assert logit_BV.tolist() == [pytest.approx([math.exp(-1.5), math.exp(-3.0), 1.0], abs=1e-6)]


def test_top_k_comes_before_top_p() -> None:
    # top-k leaves 0.4 and 0.3, renormalised to 4/7 and 3/7; 0.5 is then reached by the first alone
    assert law(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log(), top_k=2, top_p=0.5) == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_a_top_k_of_everything_changes_nothing() -> None:
    logit_BV = torch.tensor([[0.5, -1.0, 2.0]])
    assert keep_top_k(logit_BV, 7).tolist() == logit_BV.tolist()
    assert keep_top_p(logit_BV, 1.0).tolist() == logit_BV.tolist()


def test_greedy_takes_the_likeliest_and_reports_the_untempered_softmax() -> None:
    logit_BV = torch.tensor([[1.0, 4.0, 3.0], [8.0, 2.0, 6.0]]).log()
    token_B, logprob_B = choose(logit_BV, torch.tensor([0.99, 0.99]), settings_for(greedy=True, temperature=0.1))
    assert token_B.tolist() == [1, 0]
    assert logprob_B.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 2)], abs=1e-6)


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    logit_BV = torch.randn(1, 97, generator=torch.Generator().manual_seed(0)).bfloat16()
    token_B, logprob_B = choose(logit_BV, torch.tensor([0.3]), settings_for())
    assert logprob_B.dtype == torch.float32
    expected = logit_BV.float().log_softmax(dim=-1)[0, int(token_B)].item()
    assert logprob_B.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_nan_and_a_valid_token(bad: float) -> None:
    token_B, logprob_B = invert_cdf(torch.tensor([[0.0, bad, 1.0] * 30]), torch.tensor([0.5]))
    assert 0 <= token_B.item() < 90
    assert logprob_B.isnan().all()


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"greedy": True}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
    ],
)
def test_only_the_whole_softmax_is_a_policy_law(changes: dict[str, object], whole: bool) -> None:
    assert settings_for(**changes).is_policy_law is whole


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, object]) -> None:
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=name):
        settings_for(**changes)


@pytest.mark.parametrize("changes", [{"max_new_tokens": 1}, {"top_k": 1}, {"top_p": 1.0}, {"top_p": 1e-9}])
def test_the_ends_of_what_is_possible_are_accepted(changes: dict[str, object]) -> None:
    name, value = next(iter(changes.items()))
    assert getattr(settings_for(**changes), name) == value


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stop text is empty"):
        settings_for(stop_texts=("q:", ""))
    assert settings_for(stop_texts=("q:",)).stop_texts == ("q:",)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0])
def test_a_draw_at_a_temperature_is_one_from_divided_logits(temperature: float) -> None:
    logit_BV = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.5]]).expand(7, -1)
    uniform_B = torch.linspace(0.05, 0.95, 7)
    token_B, logprob_B = choose(logit_BV.clone(), uniform_B, settings_for(temperature=temperature))
    expected_B, expected_logprob_B = invert_cdf(logit_BV / temperature, uniform_B)
    assert token_B.tolist() == expected_B.tolist()
    assert torch.equal(logprob_B, expected_logprob_B)
