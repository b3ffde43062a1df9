"""Places of finished rows are taken by rows that wait, and nobody's response changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.generation.test_generator import PROMPTS, SAMPLING, SEEDS, flat, teacher_forced
from tests.models import ARCHITECTURES, VOCABULARY, make_library

from tastemaker.generation import Generator, Sampling, pool
from tastemaker.generation.decoding import FastDecoding

STOPPING = Sampling(max_new_tokens=29, stop_token_ids=tuple(range(2, 89, 9)))  # 10 of 97 tokens: about 10 tokens long


def batch_sizes(model: Any) -> list[tuple[int, int]]:
    """Rows and columns of every forward pass from now on."""
    sizes: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(lambda _, __, given: sizes.append(given["input_ids"].shape), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_log_probs_are_the_teacher_forced_ones(architecture: str) -> None:
    model = make_library(architecture)
    budget = 4 * (7 + 29)  # room for four of fifteen
    rollouts = flat(Generator(model, vocabulary=89, max_batch_tokens=budget).generate(PROMPTS, 3, STOPPING, SEEDS))
    for rollout in rollouts:
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout, vocabulary=89), abs=5e-5)


def test_places_are_refilled_while_others_go_on() -> None:
    model = make_library()
    generator = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=4 * (2 + 29))
    sizes = batch_sizes(model)
    rollouts = flat(generator.generate([[31, 32]] * 40, 1, STOPPING, range(40)))
    steps = [rows for rows, columns in sizes if columns == 1]
    assert max(steps) == 4
    steps_needed = sum(len(rollout.response_ids) - 1 for rollout in rollouts)
    assert sum(steps) == steps_needed  # a row that has finished is dropped at once: it is a quarter of four
    assert steps.count(4) > 0.8 * len(steps)
    assert len(steps) < 0.6 * sum(max(map(length_of, rollouts[i : i + 4])) for i in range(0, 40, 4))


def length_of(rollout: Any) -> int:
    return len(rollout.response_ids)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_a_response_does_not_hang_on_who_was_there_before(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_library(architecture)
    alone = Generator(model, vocabulary=VOCABULARY).generate(PROMPTS, 7, STOPPING, SEEDS)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        room=st.integers(1, 9),
        drop_share=st.sampled_from([1e-9, 0.3, 0.7, 1.0]),
        spare=st.sampled_from([0, 1, 64]),
        n=st.integers(1, 7),
    )
    def check(room: int, drop_share: float, spare: int, n: int) -> None:
        monkeypatch.setattr(pool, "SPARE_COLUMNS", spare)
        budget = room * (7 + 29)
        generator = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=budget, drop_share=drop_share)
        for found, expected in zip(generator.generate(PROMPTS, n, STOPPING, SEEDS), alone, strict=True):
            for response, other in zip(found, expected, strict=False):
                assert (response.response_ids, response.finish) == (other.response_ids, other.finish)
                assert response.logprobs == pytest.approx(other.logprobs, abs=1e-5)

    check()


def test_a_prefix_is_behind_those_who_join_too() -> None:
    model, prefix = make_library(), [71, 72, 73, 74, 75]
    generator = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=3 * (7 + 29 + 5))
    shared = flat(generator.generate(PROMPTS, 3, STOPPING, SEEDS, prefix=prefix))
    written = flat(generator.generate([prefix + prompt for prompt in PROMPTS], 3, STOPPING, SEEDS))
    assert [rollout.response_ids for rollout in shared] == [rollout.response_ids for rollout in written]


def test_a_batch_that_grows_no_shorter_walks_through_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows drop out only when three of four have finished, so columns are used up in between, and given back."""
    monkeypatch.setattr(pool, "SPARE_COLUMNS", 2)
    model = make_library()
    was_full: list[bool] = []
    keep = FastDecoding.keep

    def watched(batch: FastDecoding, rows_B: torch.Tensor) -> None:
        was_full.append(batch.full)
        keep(batch, rows_B)

    monkeypatch.setattr(FastDecoding, "keep", watched)
    generator = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=4 * (7 + 11), drop_share=0.75)
    for rollout in flat(generator.generate(PROMPTS[:1] * 8, 3, SAMPLING, range(8))):
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)
    assert any(was_full)
    assert not all(was_full)


@torch.no_grad()
def test_layers_that_cannot_be_joined_are_decoded_batch_by_batch() -> None:
    model = make_library("mistral", sliding_window=7)
    generator = Generator(model, vocabulary=VOCABULARY, max_batch_tokens=4 * (7 + 11))
    for rollout in flat(generator.generate(PROMPTS, 3, SAMPLING, SEEDS)):
        assert rollout.logprobs == pytest.approx(teacher_forced(model, rollout), abs=5e-5)
