"""Ragged sequences laid end to end, and back: index tensors by hand, and as properties."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tastemaker.generation.graphs import no_waiting
from tastemaker.packing import common_beginning, microbatches, pack, pad_rows, sent_to

sequences_of_ids = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=7), min_size=1, max_size=5)


def test_three_sequences_by_hand() -> None:
    packed = pack([[11, 12, 13], [21], [31, 32]])
    assert packed.id_N.tolist() == [11, 12, 13, 21, 31, 32]
    assert packed.position_N.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.lengths == (3, 1, 2)
    assert packed.last_S.tolist() == [2, 3, 5]
    assert packed.padded_ST.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert packed.flat_N.tolist() == [0, 1, 2, 3, 6, 7]
    assert packed.bound_Z.tolist() == [0, 3, 4, 6]
    assert packed.bound_Z.dtype == torch.int32
    assert not packed.shares


@pytest.mark.parametrize("groups", [None, [2, 1]])
def test_places_are_whole_numbers_that_can_index(groups: list[int] | None) -> None:
    packed = pack([[7, 8, 1, 2], [7, 8], [9, 3, 4]], groups=groups)
    assert packed.shares is (groups is not None)
    for name in ("id_N", "position_N", "padded_ST", "flat_N", "repeat_R"):
        assert getattr(packed, name).dtype == torch.int64, name


@given(sequences_of_ids)
def test_spreading_and_gathering_is_the_identity(sequences: list[list[int]]) -> None:
    packed = pack(sequences)
    spread_ST = packed.id_N[packed.padded_ST]
    assert torch.equal(spread_ST.flatten()[packed.flat_N], packed.id_N)
    assert [row[:n].tolist() for row, n in zip(spread_ST, packed.lengths, strict=True)] == sequences
    assert [int(packed.id_N[last]) for last in packed.last_S] == [ids[-1] for ids in sequences]


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_sequences_without_tokens_are_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(sequences)


def test_sequences_that_begin_alike_share_it_by_hand() -> None:
    # 7 8 is there once for three sequences, one of which is nothing else; 7 8 9 of another group is there by itself
    packed = pack([[7, 8, 1, 2], [7, 8], [7, 8, 1], [7, 8, 9]], groups=[3, 1])
    assert packed.id_N.tolist() == [7, 8, 1, 2, 1, 7, 8, 9]
    assert packed.position_N.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert packed.lengths == (4, 2, 3, 3)
    assert packed.padded_ST.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 4, 0], [5, 6, 7, 0]]
    assert packed.flat_N.tolist() == [0, 1, 2, 3, 10, 12, 13, 14]
    assert packed.repeat_R.tolist() == [4, 5, 8, 9]
    assert packed.shares
    assert packed.last_S.tolist() == [3, 1, 4, 7]
    # prompts of 2, 1, 2 and 3 tokens: behind a shared prompt both first tokens are read at its last place
    source_M, target_M = packed.predicted([2, 1, 2, 3])
    assert source_M.tolist() == [1, 2, 0, 1]
    assert target_M.tolist() == [1, 2, 8, 1]


@given(st.lists(sequences_of_ids, min_size=1, max_size=3))
def test_sharing_loses_no_token_and_keeps_none_twice(groups: list[list[list[int]]]) -> None:
    sequences = [ids for group in groups for ids in group]
    packed = pack(sequences, groups=[len(group) for group in groups])
    spread_ST = packed.id_N[packed.padded_ST]
    assert [row[:n].tolist() for row, n in zip(spread_ST, packed.lengths, strict=True)] == sequences
    assert torch.equal(spread_ST.flatten()[packed.flat_N], packed.id_N)
    place_ST = torch.arange(packed.padded_ST.shape[1]).expand_as(packed.padded_ST)
    assert torch.equal(place_ST.flatten()[packed.flat_N], packed.position_N)
    saved = sum(common_beginning(group) * (len(group) - 1) for group in groups)
    assert len(packed.repeat_R) == saved
    assert len(packed.id_N) == sum(packed.lengths) - saved
    assert sorted([*packed.flat_N.tolist(), *packed.repeat_R.tolist()]) == [
        row * packed.padded_ST.shape[1] + place for row, n in enumerate(packed.lengths) for place in range(n)
    ]


def test_one_token_in_common_is_shared_too() -> None:
    packed = pack([[5, 6], [5, 7, 8]], groups=[2])
    assert packed.shares
    assert packed.id_N.tolist() == [5, 6, 7, 8]
    assert packed.repeat_R.tolist() == [3]  # the place of the second sequence's 5, in rows of 3
    assert not pack([[5, 6], [5, 7, 8]]).shares


def test_groups_that_are_not_the_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="the groups have 3 sequences, but 2 were given"):
        pack([[1], [2]], groups=[2, 1])


def test_the_token_before_each_response_token() -> None:
    # prompts of 2, 1 and 3 tokens with responses of 3, 0 and 2: the rows begin at 0, 5 and 6
    packed = pack([[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 11]])
    source_M, target_M = packed.predicted([2, 1, 3])
    assert source_M.tolist() == [1, 2, 3, 8, 9]
    assert target_M.tolist() == [3, 4, 5, 10, 11]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=6))
def test_targets_are_exactly_the_responses(lengths: list[tuple[int, int]]) -> None:
    rows = [[100 * row + place for place in range(prompt + response)] for row, (prompt, response) in enumerate(lengths)]
    packed = pack(rows)
    source_M, target_M = packed.predicted([prompt for prompt, _ in lengths])
    assert target_M.tolist() == [
        token for row, (prompt, _) in zip(rows, lengths, strict=True) for token in row[prompt:]
    ]
    assert (packed.id_N[source_M] + 1).tolist() == target_M.tolist()


def test_a_response_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing precedes"):
        pack([[1, 2], [3]]).predicted([1, 0])


def test_rows_are_padded_to_the_right() -> None:
    value_BT, mask_BT = pad_rows(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), [2, 0, 3])
    assert value_BT.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert mask_BT.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    wide_BT, wide_mask_BT = pad_rows(torch.tensor([7.0]), [1], width=3)
    assert wide_BT.tolist() == [[7, 0, 0]]
    assert wide_mask_BT.tolist() == [[True, False, False]]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_padding_loses_nothing_and_passes_gradients(counts: list[int]) -> None:
    value_M = torch.arange(float(sum(counts)), requires_grad=True)
    value_BT, mask_BT = pad_rows(value_M, counts)
    assert torch.equal(value_BT[mask_BT], value_M)
    assert mask_BT.sum(1).tolist() == counts
    (value_BT * 3).sum().backward()  # type: ignore[no-untyped-call]
    assert value_M.grad is not None
    assert torch.equal(value_M.grad, torch.full((sum(counts),), 3.0))


def test_a_row_longer_than_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 2"):
        pad_rows(torch.arange(4.0), [1, 3], width=2)


def test_microbatches_by_hand() -> None:
    # longest first: 7 goes alone (7 * 2 > 10); 5 + 4 fill 2 * 5; 3, 2, 1 fill 3 * 3
    assert microbatches([3, 7, 1, 5, 4, 2], budget=10) == [[1], [3, 4], [0, 5, 2]]


def test_what_a_group_costs_goes_by_its_longest() -> None:
    # 5 * 2 fits, 5 * 3 does not, although 2 * 3 would
    assert microbatches([5, 2, 2], budget=10) == [[0, 1], [2]]


def test_microbatches_of_two_shares_by_hand() -> None:
    # 7, 4, 2 and 5, 3, 1 in turns; the first share has 7 alone and 4 + 2, the second 5 + 3 and 1, as 5 * 3 > 10
    assert microbatches([3, 7, 1, 5, 4, 2], budget=10, shares=2) == [[1], [3, 0], [4, 5], [2]]
    assert microbatches([3, 7], budget=100, shares=3) == [[1], [0]]
    assert microbatches([], budget=100, shares=2) == []


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 60), st.integers(1, 4))
def test_every_index_once_and_within_budget(costs: list[int], budget: int, shares: int) -> None:
    groups = microbatches(costs, budget=budget, shares=shares)
    assert len(groups) >= min(shares, len(costs))
    assert sorted(index for group in groups for index in group) == list(range(len(costs)))
    for group in groups:
        assert len(group) == 1 or max(costs[index] for index in group) * len(group) <= budget


def test_a_packed_batch_is_sent_whole() -> None:
    packed = pack([[7, 8, 1, 2], [7, 8], [9, 3, 4]], groups=[2, 1])
    sent = packed.to(torch.device("meta"))
    for name in ("id_N", "position_N", "padded_ST", "flat_N", "repeat_R", "bound_Z"):
        there, here = getattr(sent, name), getattr(packed, name)
        assert (there.device.type, there.shape, there.dtype) == ("meta", here.shape, here.dtype)
    assert sent.lengths == packed.lengths


class WatchedTensor:
    """As much of a tensor as `sent_to` asks for: a real one is not pinned or on a GPU where there is none."""

    def __init__(self, device: str, size: int) -> None:
        self.device, self.size, self.done = torch.device(device), size, list[object]()

    def numel(self) -> int:
        return self.size

    def pin_memory(self) -> WatchedTensor:
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> WatchedTensor:
        self.done.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("to", "at", "size", "done"),
    [
        ("cuda", "cpu", 5, ["pinned", ("cuda", True)]),
        ("cuda", "cpu", 0, [("cuda", False)]),  # there is nothing to pin
        ("cuda", "cuda", 5, [("cuda", False)]),
        ("cpu", "cpu", 5, [("cpu", False)]),
        ("cpu", "cuda", 5, [("cpu", False)]),  # or else it could be read before it is there
    ],
)
def test_what_goes_to_a_gpu_is_pinned_and_nobody_waits(to: str, at: str, size: int, done: list[object]) -> None:
    watched = WatchedTensor(at, size)
    assert sent_to(torch.device(to), cast(Tensor, watched)) is cast(Tensor, watched)
    assert watched.done == done


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_places_are_found_without_waiting_for_a_gpu() -> None:
    packed = pack([[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 11]])
    expected = (*packed.predicted([2, 1, 3]), packed.last_S, *pad_rows(torch.arange(5.0), [2, 0, 3]))
    value_M = torch.arange(5.0).to("cuda")
    with no_waiting():
        sent = packed.to(torch.device("cuda"))
        found = (*sent.predicted([2, 1, 3]), sent.last_S, *pad_rows(value_M, [2, 0, 3]))
    for there, here in zip(found, expected, strict=True):
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), here)
