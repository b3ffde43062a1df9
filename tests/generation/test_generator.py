"""The engine as a whole: right log-probs, greedy as in the library, and responses that hang on their seed alone."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests.models import ARCHITECTURES, VOCABULARY, make_library, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tastemaker.errors import ConfigError, DataError, ModelError
from tastemaker.generation import FinishReason, Generator, Rollout, Sampling
from tastemaker.lora import add_adapters
from tastemaker.settings import LoraConfig
from tastemaker.tokenizer import wrap_tokenizer

STOP = 2
PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21], [31, 32, 33], [41, 42], [51, 52, 53, 54, 55]]
SEEDS = [101, 7, -3, 2**65, 9]
SAMPLING = Sampling(max_new_tokens=11, stop_token_ids=(STOP, 3, 5, 8, 13))


def make_generator(architecture: str = "llama", *, vocabulary: int = VOCABULARY, **changes: Any) -> Generator:
    return Generator(make_library(architecture), vocabulary=vocabulary, **changes)


def flat(groups: list[list[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


@torch.no_grad()
def teacher_forced(
    model: Any, rollout: Rollout, *, temperature: float = 1.0, vocabulary: int = VOCABULARY
) -> list[float]:
    """Log-probs of the response by one plain forward pass over the whole sequence."""
    ids = [*rollout.prompt_ids, *rollout.response_ids]
    logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :, :vocabulary].double() / temperature
    logprob_TV = logits_TV.log_softmax(dim=-1)
    first = len(rollout.prompt_ids)
    return [logprob_TV[place - 1, ids[place]].item() for place in range(first, len(ids))]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_log_probs_are_the_teacher_forced_ones(architecture: str) -> None:
    model = make_library(architecture)
    rollouts = flat(Generator(model, vocabulary=89, max_batch_tokens=130).generate(PROMPTS, 3, SAMPLING, SEEDS))
    assert len({len(rollout.response_ids) for rollout in rollouts}) > 2  # ragged
    for rollout in rollouts:
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout, vocabulary=89), abs=5e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_greedy_decoding_is_the_library_s(architecture: str) -> None:
    model = make_library(architecture)
    greedy = Sampling(max_new_tokens=11, stop_token_ids=(STOP,), greedy=True)
    for prompt, (rollout,) in zip(
        PROMPTS, Generator(model, vocabulary=97).generate(PROMPTS, 1, greedy, SEEDS), strict=True
    ):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 11, "eos_token_id": STOP, "pad_token_id": STOP}
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        assert rollout.response_ids == expected.tolist()
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)


def test_tempered_log_probs_are_those_of_the_tempered_law() -> None:
    model = make_library()
    rollouts = Generator(model, vocabulary=97).generate(PROMPTS, 2, replace(SAMPLING, temperature=0.7), SEEDS)
    for rollout in flat(rollouts):
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout, temperature=0.7), abs=5e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_response_does_not_hang_on_its_batch(architecture: str) -> None:
    model = make_library(architecture)
    generator = Generator(model, vocabulary=VOCABULARY)
    alone = [generator.generate([prompt], 3, SAMPLING, [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        order=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=9),
        n=st.integers(1, 3),
        budget=st.sampled_from([1, 40, 97, 10_000]),
        drop_share=st.sampled_from([1e-9, 0.25, 1.0]),
    )
    def check(order: list[int], n: int, budget: int, drop_share: float) -> None:
        other = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=budget, drop_share=drop_share)
        found = other.generate([PROMPTS[i] for i in order], n, SAMPLING, [SEEDS[i] for i in order])
        for i, responses in zip(order, found, strict=True):
            for response, expected in zip(responses, alone[i], strict=False):
                assert (response.response_ids, response.finish) == (expected.response_ids, expected.finish)
                assert response.logprobs == pytest.approx(expected.logprobs, abs=1e-5)

    check()


def test_tokens_follow_the_model_s_law_and_stay_in_the_vocabulary() -> None:
    model = make_library()
    generator = Generator(model, vocabulary=41)  # the model has logits for 97
    one = Sampling(max_new_tokens=1, stop_token_ids=())
    counts = Counter(rollout.response_ids[0] for rollout in generator.generate([PROMPTS[0]], 20_000, one, [5])[0])
    with torch.no_grad():
        law_V = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, :41].double().softmax(dim=0)
    assert max(counts) < 41
    assert chisquare([counts[token] for token in range(41)], (law_V * 20_000).tolist()).pvalue > 1e-3


def test_a_response_ends_with_the_stop_token_that_was_sampled_or_at_the_limit() -> None:
    rollouts = flat(make_generator().generate(PROMPTS, 7, SAMPLING, SEEDS))
    for rollout in rollouts:
        stops = [place for place, token in enumerate(rollout.response_ids) if token in SAMPLING.stop_token_ids]
        if rollout.finish is FinishReason.STOP:
            assert stops == [len(rollout.response_ids) - 1]
        else:
            assert not stops
            assert len(rollout.response_ids) == 11
        assert len(rollout.logprobs) == len(rollout.response_ids)
    assert {rollout.finish for rollout in rollouts} == {FinishReason.STOP, FinishReason.LENGTH}


def test_a_stop_token_at_the_very_limit_counts_as_a_stop() -> None:
    generator = make_generator()
    (free,) = generator.generate([[21]], 1, Sampling(max_new_tokens=5, stop_token_ids=()), [7])[0]
    last = free.response_ids[-1]
    assert last not in free.response_ids[:-1]
    (stopped,) = generator.generate([[21]], 1, Sampling(max_new_tokens=5, stop_token_ids=(last,)), [7])[0]
    assert (stopped.response_ids, stopped.finish) == (free.response_ids, FinishReason.STOP)
    assert free.finish is FinishReason.LENGTH


def test_a_pad_token_that_is_also_the_stop_token_changes_nothing() -> None:
    model, twin = make_library(), make_library(pad_token_id=STOP)
    twin.load_state_dict(model.state_dict())
    ordinary, same = (Generator(each, vocabulary=VOCABULARY) for each in (model, twin))
    prompts = [*PROMPTS, [STOP, 61, STOP]]  # a conversation holds stop tokens of earlier turns
    first, second = (flat(g.generate(prompts, 2, SAMPLING, [*SEEDS, 4])) for g in (ordinary, same))
    assert [rollout.response_ids for rollout in first] == [rollout.response_ids for rollout in second]
    for rollout in second:
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)


def test_a_prefix_is_the_same_as_writing_it_before_every_prompt() -> None:
    generator, prefix = make_generator(), [71, 72, 73, 74, 75]
    shared = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS, prefix=prefix))
    written = flat(generator.generate([prefix + prompt for prompt in PROMPTS], 2, SAMPLING, SEEDS))
    assert [rollout.response_ids for rollout in shared] == [rollout.response_ids for rollout in written]
    assert [rollout.prompt_ids for rollout in shared[::2]] == [tuple(prompt) for prompt in PROMPTS]


def test_responses_differ_from_each_other_and_are_the_same_again() -> None:
    generator = make_generator()
    first = generator.generate(PROMPTS, 5, SAMPLING, SEEDS)
    assert first == generator.generate(PROMPTS, 5, SAMPLING, SEEDS)
    for group in first:
        assert len({tuple(rollout.response_ids) for rollout in group}) == 5
    assert first != generator.generate(PROMPTS, 5, SAMPLING, [seed + 1 for seed in SEEDS])


def test_new_weights_change_the_responses_and_are_stamped() -> None:
    generator = make_generator(weights_version=3)
    before = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    other = make_library(seed=1)
    generator.load_weights(other, 4)
    after = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    assert [rollout.response_ids for rollout in before] != [rollout.response_ids for rollout in after]
    assert ({rollout.weights_version for rollout in before}, {rollout.weights_version for rollout in after}) == (
        {3},
        {4},
    )
    for rollout in after:
        assert rollout.logprobs == pytest.approx(teacher_forced(other, rollout), abs=5e-5)


def test_training_in_place_needs_no_copy() -> None:
    model = make_library()
    generator = Generator(model, vocabulary=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    generator.load_weights(model, 1)
    (rollout,) = generator.generate([PROMPTS[0]], 1, SAMPLING, [5])[0]
    assert rollout.weights_version == 1
    assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)


def test_weights_of_another_shape_are_refused() -> None:
    generator = make_generator()
    with pytest.raises(ModelError, match="same architecture"):
        generator.load_weights(make_library(vocabulary=101), 1)
    assert generator.weights_version == 0


def test_the_model_comes_back_as_it_was_even_after_an_exception() -> None:
    model = make_library(attention_dropout=0.5).train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    generator = Generator(model, vocabulary=VOCABULARY)

    def fail(_finished: int) -> None:
        raise InterruptedError

    for progress in (None, fail):
        try:
            rollouts = generator.generate(PROMPTS, 1, SAMPLING, SEEDS, progress=progress)
        except InterruptedError:
            assert progress is fail
        assert [module.training for module in model.modules()] == modes
        assert model.config._attn_implementation == attention
    for rollout in flat(rollouts):  # dropout was off all the same
        assert rollout.logprobs == pytest.approx(teacher_forced(make_library(), rollout), abs=5e-5)


@pytest.mark.parametrize("drop_share", [1e-9, 0.25, 1.0])
def test_progress_adds_up(drop_share: float) -> None:
    told: list[int] = []
    generator = make_generator(drop_share=drop_share, max_batch_tokens=100)
    generator.generate(PROMPTS, 7, SAMPLING, SEEDS, progress=told.append)
    assert sum(told) == 35
    assert min(told) > 0


def test_rows_that_have_finished_are_dropped() -> None:
    model = make_library()
    rows: list[int] = []
    model.model.register_forward_pre_hook(lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    often = Sampling(max_new_tokens=11, stop_token_ids=tuple(range(0, 97, 3)))
    generator = Generator(model, vocabulary=VOCABULARY)
    rows.clear()
    lengths = sorted(len(r.response_ids) for r in flat(generator.generate(PROMPTS, 7, often, SEEDS)))
    assert rows[:2] == [5, sum(length > 1 for length in lengths)]
    assert sum(rows) < 5 + 35 * lengths[-1] / 2


def test_beyond_a_sliding_window_the_library_decodes(caplog: pytest.LogCaptureFixture) -> None:
    model = make_library("mistral", sliding_window=7)
    generator = Generator(model, vocabulary=VOCABULARY)
    with caplog.at_level(logging.WARNING):
        inside = flat(generator.generate([[21], [31, 32]], 3, replace(SAMPLING, max_new_tokens=5), [1, 2]))
        assert not caplog.text
        beyond = flat(generator.generate(PROMPTS, 3, SAMPLING, SEEDS, prefix=[71, 72, 73]))
        assert "may reach 21 tokens and some layers see only 7" in caplog.text
    for rollout in inside:
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)
    for rollout in beyond:
        whole = replace(rollout, prompt_ids=(71, 72, 73, *rollout.prompt_ids))
        assert rollout.logprobs == pytest.approx(teacher_forced(model, whole), abs=5e-5)


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it() -> None:
    decode = wrap_tokenizer(make_tokenizer()).decode
    generator = make_generator(decode=decode)
    free = flat(generator.generate(PROMPTS, 4, SAMPLING, SEEDS))
    long = next(rollout for rollout in free if len(rollout.response_ids) == 11)
    one, two = decode(long.response_ids[4:5]), decode(long.response_ids[6:9])
    stop = one[1:]  # a text that begins inside a token
    stopping = replace(SAMPLING, stop_texts=(two, stop))
    ended = 0
    for rollout, whole in zip(flat(generator.generate(PROMPTS, 4, stopping, SEEDS)), free, strict=True):
        length = len(rollout.response_ids)
        assert rollout.response_ids == whole.response_ids[:length]
        assert rollout.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
        assert not any(text in decode(rollout.response_ids[:-1]) for text in stopping.stop_texts)
        if rollout.stop_text is None:
            assert (length, rollout.finish) == (len(whole.response_ids), whole.finish)
        else:
            ended += 1
            assert rollout.stop_text in decode(rollout.response_ids)
            assert rollout.finish is FinishReason.STOP
    assert ended >= 1


def test_stop_texts_need_something_that_decodes() -> None:
    with pytest.raises(ConfigError, match="'Q:'"):
        make_generator().generate(PROMPTS, 1, replace(SAMPLING, stop_texts=("Q:",)), SEEDS)
    with pytest.raises(ConfigError, match="empty"):
        replace(SAMPLING, stop_texts=("",))


def test_a_stream_is_what_generate_gives_token_by_token() -> None:
    generator = make_generator(max_batch_tokens=4 * (7 + 11))
    whole = generator.generate(PROMPTS, 3, SAMPLING, SEEDS)
    pieces = list(generator.stream(PROMPTS, 3, SAMPLING, SEEDS))
    for prompt, group in enumerate(whole):
        for response, rollout in enumerate(group):
            own = [piece for piece in pieces if (piece.prompt, piece.response) == (prompt, response)]
            assert [piece.token for piece in own] == rollout.response_ids
            assert [piece.logprob for piece in own] == rollout.logprobs
            assert [piece.finish for piece in own] == [None] * (len(own) - 1) + [rollout.finish]


def test_between_two_pieces_the_model_is_as_it_was() -> None:
    model = make_library(attention_dropout=0.5).train()
    attention = model.config._attn_implementation
    for _ in Generator(model, vocabulary=VOCABULARY).stream(PROMPTS[:2], 1, SAMPLING, SEEDS[:2]):
        assert torch.is_grad_enabled()
        assert model.training
        assert model.config._attn_implementation == attention


def test_a_stream_is_checked_before_it_is_read() -> None:
    with pytest.raises(DataError, match="Prompt 0 is empty"):
        make_generator().stream([[]], 1, SAMPLING, [1])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_bf16_engine_samples_nearly_the_policy_s_law(architecture: str) -> None:
    model = make_library(architecture, tie_word_embeddings=True)
    generator = Generator(model, vocabulary=VOCABULARY, dtype=torch.bfloat16, max_batch_tokens=6 * (7 + 11))
    assert model.dtype == torch.float32
    differences = []
    for rollout in flat(generator.generate(PROMPTS, 3, SAMPLING, SEEDS)):
        exact = teacher_forced(model, rollout)
        differences += [ours - theirs for ours, theirs in zip(rollout.logprobs, exact, strict=True)]
    assert 1e-4 < sum(map(abs, differences)) / len(differences) < 0.03  # bf16 keeps three digits, fp32 seven
    assert max(map(abs, differences)) < 0.2
    assert abs(sum(differences) / len(differences)) < 0.01  # none way more than the other


def test_weights_are_pushed_into_a_bf16_engine() -> None:
    model = make_library()
    generator = Generator(model, vocabulary=VOCABULARY, dtype=torch.bfloat16)
    before = generator.generate(PROMPTS, 2, SAMPLING, SEEDS)
    other = make_library(seed=1)
    model.load_state_dict(other.state_dict())  # as a step of training would
    assert generator.generate(PROMPTS, 2, SAMPLING, SEEDS) == before  # not before they are pushed
    generator.load_weights(model, 5)
    after = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    fresh = Generator(other, vocabulary=VOCABULARY, dtype=torch.bfloat16, weights_version=5)
    assert after == flat(fresh.generate(PROMPTS, 2, SAMPLING, SEEDS))


def test_a_model_that_is_in_the_dtype_already_is_used_in_place() -> None:
    model = make_library()
    generator = Generator(model, vocabulary=VOCABULARY, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    (rollout,) = generator.generate([PROMPTS[0]], 1, SAMPLING, [5])[0]
    assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn", "c_proj"))]
)
def test_adapters_are_pushed_as_adapters(architecture: str, targets: tuple[str, ...]) -> None:
    """Not added to the weights, where bf16 would round small updates away."""
    model, plain = make_library(architecture), make_library(architecture)
    add_adapters(model, LoraConfig(rank=3, alpha=7, targets=targets), seed=0)
    generator = Generator(model, vocabulary=VOCABULARY, dtype=torch.bfloat16)
    first = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    assert mean_difference(first, plain) < 0.03
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    generator.load_weights(model, 1)
    adapted = flat(generator.generate(PROMPTS, 2, SAMPLING, SEEDS))
    assert mean_difference(adapted, model) < 0.03
    assert mean_difference(adapted, plain) > 0.1


def mean_difference(rollouts: list[Rollout], model: Any) -> float:
    """Between the engine's log-probs of what it sampled and those of a model."""
    return mean(
        abs(ours - theirs)
        for rollout in rollouts
        for ours, theirs in zip(rollout.logprobs, teacher_forced(model, rollout), strict=True)
    )


def test_bf16_weights_give_fp32_log_probs() -> None:
    model = make_library().bfloat16()
    for rollout in flat(Generator(model, vocabulary=VOCABULARY).generate(PROMPTS, 2, SAMPLING, SEEDS)):
        # bf16 keeps three digits; the sampler's arithmetic on top of the logits is exact to fp32
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=0.3)


def test_no_prompts_give_no_responses() -> None:
    assert make_generator().generate([], 3, SAMPLING, []) == []


def test_logits_that_are_not_finite_are_reported() -> None:
    model = make_library()
    generator = Generator(model, vocabulary=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        generator.generate(PROMPTS, 1, SAMPLING, SEEDS)


def test_nothing_runs_before_the_request_is_checked() -> None:
    model = make_library("gpt2")
    generator = Generator(model, vocabulary=VOCABULARY)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(DataError, match="128"):
        generator.generate([[5], [6] * 118], 1, SAMPLING, [1, 2])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vocabulary": 98}, ModelError),
        ({"vocabulary": 0}, ModelError),
        ({"max_batch_tokens": 0}, ConfigError),
        ({"drop_share": 0.0}, ConfigError),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make_generator(**changes)


def test_a_language_model_within_a_larger_one() -> None:
    """Such as Gemma 3's, which reads images too: its sizes stand in a config within the config."""
    text = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    text |= {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "intermediate_size": 80, "sliding_window": 9}
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=images)
    torch.manual_seed(0)
    library = AutoModelForCausalLM.from_config(config).eval()
    assert not hasattr(library.config, "vocab_size")
    generator = Generator(library, vocabulary=VOCABULARY)
    groups = generator.generate(PROMPTS, 2, replace(SAMPLING, max_new_tokens=13), SEEDS)
    assert max(len(one.prompt_ids) + len(one.response_ids) for one in flat(groups)) > 9, "beyond the window"
    for rollout in flat(groups):
        assert list(rollout.logprobs) == pytest.approx(teacher_forced(library, rollout), abs=5e-5)


def test_layers_that_are_compiled_for_training_decode_as_they_are_written() -> None:
    library, called = make_library(), list[int]()

    def compiled(forward: Any, *args: Any, **more: Any) -> Any:
        called.append(1)
        return forward(*args, **more)

    for layer in library.model.layers:
        layer._compiled_call_impl = partial(compiled, layer.forward)
    library(input_ids=torch.tensor([[5, 6]]))
    assert called
    called.clear()
    for dtype in (None, torch.bfloat16):
        Generator(library, vocabulary=VOCABULARY, dtype=dtype).generate(PROMPTS, 1, SAMPLING, SEEDS)
    assert not called
    library(input_ids=torch.tensor([[5, 6]]))
    assert called, "training goes on with them"
