"""What is asked of the engine: planned completely and within the budget, or refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models import make_library

from tastemaker.errors import ConfigError, DataError
from tastemaker.generation import Sampling
from tastemaker.generation.batches import Request, Row, plan_batches


def request_for(prompts: list[list[int]], n: int = 1, prefix: tuple[int, ...] = ()) -> Request:
    return Request(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        n=n,
        sampling=Sampling(max_new_tokens=3, stop_token_ids=(2,)),
        seeds=tuple(range(len(prompts))),
        prefix=prefix,
    )


@given(
    lengths=st.lists(st.integers(1, 13), max_size=11),
    n=st.integers(1, 5),
    budget=st.integers(1, 97),
    mixed=st.booleans(),
)
def test_every_response_is_planned_once_and_batches_keep_to_the_budget(
    lengths: list[int], n: int, budget: int, mixed: bool
) -> None:
    request = request_for([[7] * length for length in lengths], n, prefix=(1, 2))
    batches = list(plan_batches(request, budget, mixed_lengths=mixed))
    planned = [row for batch in batches for row in batch]
    assert len(planned) == len(lengths) * n
    assert set(planned) == {Row(prompt, response) for prompt in range(len(lengths)) for response in range(n)}
    for batch in batches:
        widths = [lengths[row.prompt] + 2 + 3 for row in batch]
        assert len(batch) * max(widths) <= budget or len(batch) == 1
        assert mixed or len(set(widths)) == 1


def test_batches_are_as_large_as_the_budget_allows_and_similar_lengths_stand_together() -> None:
    request = request_for([[7], [7] * 6, [7] * 2, [7] * 5], n=2)
    # with 3 new tokens: 9 tokens a row allow 2 rows, 8 allow 2, 5 allow 4
    found = [[(row.prompt, row.response) for row in batch] for batch in plan_batches(request, 20, mixed_lengths=True)]
    assert found == [[(1, 0), (1, 1)], [(3, 0), (3, 1)], [(2, 0), (2, 1), (0, 0), (0, 1)]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": ((5,), ())}, DataError, "Prompt 1 is empty"),
        ({"prompts": ((5,), (6, 97))}, DataError, "Prompt 1 has ids from 6 to 97; the model knows 0 to 96"),
        ({"prompts": ((5,), (-1, 6))}, DataError, "Prompt 1 has ids from -1 to 6"),
        ({"prefix": (99,)}, DataError, "The prefix has ids from 99"),
        ({"seeds": (1,)}, ConfigError, "2 prompts and 1 seeds"),
        ({"n": 0}, ConfigError, "0 responses"),
        ({"sampling": Sampling(max_new_tokens=3, stop_token_ids=(2, 90))}, ConfigError, r"\[90\] are never sampled"),
        ({"prompts": ((5,), (6,) * 126)}, DataError, "Prompt 1 is too long: its 126 tokens and max_new_tokens = 3"),
        ({"prefix": (1,) * 125}, DataError, "the prefix of 125"),
    ],
)
def test_what_cannot_be_decoded_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make_library("gpt_neox")  # a context of 128
    request_for([[5], [6]]).check(model, vocabulary=90)
    with pytest.raises(error, match=message):
        replace(request_for([[5], [6]]), **changes).check(model, vocabulary=90)


def test_a_sequence_may_fill_the_context_to_the_last_token() -> None:
    request_for([[5] * 124], prefix=(1,)).check(make_library("gpt_neox"), vocabulary=90)
