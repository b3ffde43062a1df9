"""Text in, text out: seeds, prefixes, and what a rollout says as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_library, make_policy
from tests.test_tokenizer import train_bpe

from tastemaker.files import read_rankings, write_records
from tastemaker.generation import FinishReason, Rollout
from tastemaker.model import LanguageModel
from tastemaker.records import About, Prompt, Ranking, Response
from tastemaker.responses import (
    DecodingConfig,
    as_response,
    engine_for,
    sample_responses,
    sample_rollouts,
    sampling_for,
    seed_for,
    stream_response,
)
from tastemaker.settings import Precision
from tastemaker.tokenizer import as_messages, wrap_tokenizer

DECODING = DecodingConfig(max_new_tokens=7)
PROMPTS = [Prompt(messages=as_messages(text), about=About(id=text)) for text in ("w3 w5", "w9", "w3 w8 w8 w1")]


def sample(policy: LanguageModel, prompts: list[Prompt], **changes: Any) -> list[list[Rollout]]:
    options: dict[str, Any] = {"n": 2, "decoding": DECODING, "seed": 0, "purpose": "test"}
    return sample_rollouts(policy, prompts, **options | changes)


def ids(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[list(rollout.response_ids) for rollout in group] for group in groups]


def test_seeds_are_63_bits_and_told_apart() -> None:
    seeds = {seed_for(0, "ppo", 1, 23), seed_for(0, "ppo", 12, 3), seed_for(1, "ppo", 1, 23), seed_for(0, "sft", 1, 23)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, "ppo", 1, 23) == seed_for(0, "ppo", 1, 23)


def test_a_response_does_not_depend_on_the_prompts_beside_it() -> None:
    policy = make_policy()
    together = ids(sample(policy, PROMPTS))
    assert together == [ids(sample(policy, [prompt]))[0] for prompt in PROMPTS]
    assert together == ids(sample(policy, PROMPTS[::-1]))[::-1]


def test_seed_purpose_and_place_give_other_responses() -> None:
    policy = make_policy()
    usual = ids(sample(policy, PROMPTS))
    assert usual[0][0] != usual[0][1]
    assert ids(sample(policy, PROMPTS, seed=1)) != usual
    assert ids(sample(policy, PROMPTS, purpose="other")) != usual


def test_greedy_is_the_likeliest_token_each_time() -> None:
    policy = make_policy()
    [[rollout]] = sample(policy, PROMPTS[:1], n=1, decoding=DecodingConfig(max_new_tokens=4, greedy=True))
    sequence = list(rollout.prompt_ids)
    with torch.no_grad():
        for token in rollout.response_ids:
            assert int(policy.library(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()) == token
            sequence.append(token)


@pytest.mark.parametrize("in_template", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prefix_stands_between_the_beginning_of_text_and_the_prompt(in_template: bool, adds_bos: bool) -> None:
    """Whole, whoever adds the beginning of text; and nothing is said twice."""
    template = ("{{ bos_token }}" if in_template else "") + "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = wrap_tokenizer(train_bpe(adds_bos=adds_bos, bos="<|begin|>", template=template))
    policy = LanguageModel(make_library("llama", vocabulary=tokenizer.vocabulary), tokenizer)
    prompt = Prompt(messages=as_messages("the cat"))
    greedy = DecodingConfig(max_new_tokens=3, greedy=True)
    [[rollout]] = sample(policy, [prompt], n=1, prefix="the dog ate. ", decoding=greedy)
    begin = ["<|begin|>"] if in_template or adds_bos else []
    whole = tokenizer.library.convert_tokens_to_ids(begin)
    whole += tokenizer.response_ids("the dog ate. ", finished=False) + tokenizer.response_ids(
        "the cat ", finished=False
    )
    assert tokenizer.decode(rollout.prompt_ids) == "".join(begin) + "the cat ", "as the prompt is without the prefix"
    with torch.no_grad():
        for token, logprob in zip(rollout.response_ids, rollout.logprobs, strict=True):
            logprob_V = policy.library(input_ids=torch.tensor([whole])).logits[0, -1].log_softmax(0)
            assert logprob == pytest.approx(float(logprob_V[token]), abs=2e-5)
            whole.append(token)


def test_a_rollout_as_text() -> None:
    policy = make_policy()  # w0 is 4, <eos> 2
    stopped = Rollout((1, 4), [4, 5, 2], [0.0] * 3, FinishReason.STOP, 0)
    cut = Rollout((1, 4), [4, 5, 6], [0.0] * 3, FinishReason.LENGTH, 0)
    assert as_response(policy, stopped).text == "w0 w1"
    assert as_response(policy, stopped).finished
    assert as_response(policy, cut).text == "w0 w1 w2"
    assert not as_response(policy, cut).finished


def test_responses_are_the_rollouts_as_text() -> None:
    policy = make_policy()
    groups = sample_responses(policy, PROMPTS, n=2, decoding=DECODING, seed=0, purpose="test")
    assert groups == [[as_response(policy, rollout) for rollout in group] for group in sample(policy, PROMPTS)]


def test_a_stop_text_is_no_part_of_the_response() -> None:
    tokenizer = wrap_tokenizer(train_bpe())  # of bytes and a few words: a stop text may begin inside a token
    policy = LanguageModel(make_library("llama", vocabulary=tokenizer.vocabulary), tokenizer)
    prompts = [Prompt(messages=as_messages(text), about=About(id=text)) for text in ("the cat", "the dog")]
    options: dict[str, Any] = {"n": 5, "seed": 0, "purpose": "test"}
    free = sample_responses(policy, prompts, decoding=DecodingConfig(max_new_tokens=23), **options)
    stop = free[0][0].text[5:7]
    stopping = DecodingConfig(max_new_tokens=23, stop_texts=(stop,))
    for responses, wholes in zip(sample_responses(policy, prompts, decoding=stopping, **options), free, strict=True):
        for response, whole in zip(responses, wholes, strict=True):
            before, found, _ = whole.text.partition(stop)
            assert response.text == before
            assert response.finished == (bool(found) or whole.finished)


@pytest.mark.parametrize("stop_texts", [(), ("w1",)])
def test_a_stream_is_the_first_response_in_pieces(stop_texts: tuple[str, ...]) -> None:
    policy = make_policy()
    decoding = DecodingConfig(max_new_tokens=23, stop_texts=stop_texts)
    for prompt in PROMPTS:
        [[response]] = sample_responses(policy, [prompt], n=1, decoding=decoding, seed=0, purpose="test")
        pieces = list(stream_response(policy, prompt, decoding=decoding, seed=0, purpose="test"))
        assert "".join(piece.text for piece in pieces) == response.text
        assert [piece.finished for piece in pieces] == [None] * (len(pieces) - 1) + [response.finished]
        assert len(pieces) > 3 or response.text.count(" ") < 3


def test_a_sampled_nul_is_no_text_that_our_own_files_refuse(tmp_path: Path) -> None:
    """A model of bytes may draw it: here it always does. What is streamed is the same."""
    tokenizer = wrap_tokenizer(train_bpe())
    policy = LanguageModel(make_library("llama", vocabulary=tokenizer.vocabulary), tokenizer)
    (nul,) = tokenizer.response_ids("\x00", finished=False)
    with torch.no_grad():
        policy.library.get_output_embeddings().weight.zero_()
        hidden = torch.nn.Linear(48, tokenizer.vocabulary)
        hidden.weight.zero_()
        hidden.bias.copy_(torch.nn.functional.one_hot(torch.tensor(nul), tokenizer.vocabulary) * 99.0)
        policy.library.set_output_embeddings(hidden)
    prompt, decoding = Prompt(messages=as_messages("the cat")), DecodingConfig(max_new_tokens=3)
    [[response]] = sample_responses(policy, [prompt], n=1, decoding=decoding, seed=0, purpose="test")
    assert response == Response(text="\ufffd" * 3, finished=False)
    pieces = stream_response(policy, prompt, decoding=decoding, seed=0, purpose="test")
    assert "".join(piece.text for piece in pieces) == response.text
    write_records(tmp_path / "a.jsonl", [Ranking(prompt=prompt, responses=(response, response), order=((0, 1),))])
    assert read_rankings(tmp_path / "a.jsonl")[0].responses == (response, response)


def test_what_a_policy_is_decoded_in() -> None:
    """As the config says; where it says nothing, as the stage does; fp32 where the stage says nothing either."""
    policy, plain = make_policy(), DecodingConfig(max_new_tokens=7)
    sampling, ids = sampling_for(policy, plain), [[4, 5, 6]]

    def drawn(precision: Precision | None, stage: Precision) -> list[float]:
        engine = engine_for(policy, replace(plain, precision=precision), precision=stage)
        return engine.generate(ids, 1, sampling, [3])[0][0].logprobs

    exact, rough = drawn("float32", "float32"), drawn("bfloat16", "float32")
    assert exact != rough
    assert (drawn(None, "float32"), drawn(None, "bfloat16")) == (exact, rough)
    assert (drawn("float32", "bfloat16"), drawn("bfloat16", "bfloat16")) == (exact, rough)
    assert sample_rollouts(policy, PROMPTS, n=1, decoding=plain, seed=0, purpose="") == sample_rollouts(
        policy, PROMPTS, n=1, decoding=replace(plain, precision="float32"), seed=0, purpose=""
    )


def test_the_law_of_a_decoding_names_what_is_not_as_ever() -> None:
    """Answers are kept under a hash of it, so settings that came later must not change the hash of what was before."""
    law = {"max_new_tokens": 7, "temperature": 1.0, "greedy": False}
    assert DECODING.law == replace(DECODING, precision="float32", batch_tokens=3).law == law
    assert replace(DECODING, precision="bfloat16").law == law | {"precision": "bfloat16"}
    assert replace(DECODING, stop_texts=("Q:",)).law == law | {"stop_texts": ["Q:"]}


def test_settings_reach_the_engine() -> None:
    sampling = sampling_for(make_policy(), DecodingConfig(max_new_tokens=5, temperature=0.7))
    assert (sampling.max_new_tokens, sampling.temperature, sampling.greedy) == (5, 0.7, False)
    assert sampling.stop_token_ids == (2,)
    assert DecodingConfig(temperature=0.7).name == "T=0.7"
    assert DecodingConfig(greedy=True).name == "greedy"
