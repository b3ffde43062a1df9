"""What is asked of the engine: planned completely and within the budget, or refused with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models import make_library

from tastemaker.errors import ConfigError, DataError
from tastemaker.generation import Sampling
from tastemaker.generation.batches import Pool, Request, Row, plan_pools


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
    refilled=st.booleans(),
)
def test_every_response_is_planned_once_and_pools_keep_to_the_budget(
    lengths: list[int], n: int, budget: int, mixed: bool, refilled: bool
) -> None:
    request = request_for([[7] * length for length in lengths], n, prefix=(1, 2))
    pools = list(plan_pools(request, budget, mixed_lengths=mixed, refilled=refilled))
    planned = [row for pool in pools for row in pool.rows]
    assert len(planned) == len(lengths) * n
    assert set(planned) == {Row(prompt, response) for prompt in range(len(lengths)) for response in range(n)}
    for pool in pools:
        widths = [lengths[row.prompt] + 2 + 3 for row in pool.rows]
        assert widths == sorted(widths, reverse=True)  # so whoever joins is no longer than those who are there
        assert pool.room * widths[0] <= budget or pool.room == 1
        assert mixed or len(set(widths)) == 1
        assert refilled or len(widths) <= pool.room
        assert all(budget // width <= 1.25 * pool.room for width in widths[pool.room :])


def rows_of(pools: Iterable[Pool]) -> list[list[tuple[int, int]]]:
    return [[(row.prompt, row.response) for row in pool.rows] for pool in pools]


def test_pools_are_as_large_as_the_budget_allows_and_similar_lengths_stand_together() -> None:
    request = request_for([[7], [7] * 6, [7] * 2, [7] * 5], n=2)
    # with 3 new tokens: 9 tokens a row allow 2 rows, 8 allow 2, 5 allow 4
    found = rows_of(plan_pools(request, 20, mixed_lengths=True, refilled=False))
    assert found == [[(1, 0), (1, 1)], [(3, 0), (3, 1)], [(2, 0), (2, 1), (0, 0), (0, 1)]]
    # 5 tokens a row leave room for twice as many as 9: a pool of their own
    found = rows_of(plan_pools(request, 20, mixed_lengths=True, refilled=True))
    assert found == [[(1, 0), (1, 1), (3, 0), (3, 1)], [(2, 0), (2, 1), (0, 0), (0, 1)]]


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
