"""Ragged token sequences as one row without padding, and micro-batches of about equal cost.

Dimensions in names: N packed tokens, S sequences, T the longest sequence's tokens, M selected tokens, Z = S + 1 bounds.
Lengths are carried, never guessed from pad ids. Tokens of S sequences lie one after another in `[N]`; only attention
needs them as `[S, T]`, and `Packed` holds the two index tensors that go there and back.

Sequences that begin alike (the K responses to a prompt, a chosen and a rejected one) can share that beginning: its
tokens are there once, and a place of the packed row then belongs to several sequences. Causality makes that exact,
since no token sees what differs behind it. A beginning is told by the tokens, so nothing has to be declared right.

Which places are selected follows from lengths alone, so it is worked out on the processor and sent to a GPU from pinned
memory: a mask that a GPU had to count would make the program wait for all that was queued before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile, zip_longest

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """S sequences laid end to end.

    `id_N` token ids; `position_N` each token's place in its own sequence; `lengths` of the sequences; `padded_ST` for
    each place of the padded layout the packed index to read (0 where there is no token); `flat_N` for each packed token
    its index in the flattened padded layout, in the first of the sequences that share it; `repeat_R` the flattened
    places of the others; `bound_Z` (int32) where each sequence begins, and the last ends, when they lie end to end and
    none shares its beginning.
    """

    id_N: Tensor
    position_N: Tensor
    lengths: tuple[int, ...]
    padded_ST: Tensor
    flat_N: Tensor
    repeat_R: Tensor
    bound_Z: Tensor

    def to(self, device: torch.device) -> Packed:
        return Packed(
            id_N=sent_to(device, self.id_N),
            position_N=sent_to(device, self.position_N),
            lengths=self.lengths,
            padded_ST=sent_to(device, self.padded_ST),
            flat_N=sent_to(device, self.flat_N),
            repeat_R=sent_to(device, self.repeat_R),
            bound_Z=sent_to(device, self.bound_Z),
        )

    @property
    def shares(self) -> bool:
        """Whether sequences share beginnings."""
        return len(self.repeat_R) > 0

    @property
    def last_S(self) -> Tensor:
        """The packed index of each sequence's last token."""
        width = self.padded_ST.shape[1]
        place_S = torch.tensor([row * width + length - 1 for row, length in enumerate(self.lengths)])
        return self._packed_index(place_S)

    def predicted(self, prompt_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`(source_M, target_M)` of all tokens behind the prompts, sequence after sequence.

        `target_M` is a token's id, `source_M` the packed index of the token before it in its sequence: where its
        log-prob is read, and the value of the state in which it was chosen.
        """
        if min(prompt_lengths) < 1:
            raise ValueError("a prompt has no tokens, so nothing precedes its first response token")
        place_T = torch.arange(self.padded_ST.shape[1])
        prompt_S, length_S = torch.tensor(list(prompt_lengths)), torch.tensor(self.lengths)
        is_target_ST = (place_T >= prompt_S[:, None]) & (place_T < length_S[:, None])
        place_M = is_target_ST.flatten().nonzero().flatten()  # never a row's first, as each has a prompt
        return self._packed_index(place_M - 1), self.id_N[self._packed_index(place_M)]

    def _packed_index(self, place_M: Tensor) -> Tensor:
        """What stands at these places of the flattened padded layout."""
        return self.padded_ST.take(sent_to(self.padded_ST.device, place_M))


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on `device`; to a GPU without waiting for what it is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(sequences: Sequence[Sequence[int]], *, groups: Sequence[int] | None = None) -> Packed:
    """Lay `sequences` end to end. Empty sequences are refused: they have no last token.

    With `groups`, so many sequences after one another share the tokens that they all begin with.
    """
    if not sequences or not all(len(ids) for ids in sequences):
        raise ValueError("cannot pack an empty sequence; give each sequence at least one token")
    sizes = [1] * len(sequences) if groups is None else list(groups)
    if sum(sizes) != len(sequences):
        raise ValueError(f"the groups have {sum(sizes)} sequences, but {len(sequences)} were given")
    ids, index_of, first = list[int](), list[Tensor](), 0
    for size in sizes:
        members = sequences[first : first + size]
        begin, shared = len(ids), common_beginning(members) if size > 1 else 0
        ids += sequences[first][:shared]
        for member in members:
            own = torch.arange(len(ids), len(ids) + len(member) - shared)
            index_of.append(torch.cat([torch.arange(begin, begin + shared), own]) if shared else own)
            ids += member[shared:]
        first += size
    lengths = tuple(map(len, sequences))
    return Packed(id_N=torch.tensor(ids), lengths=lengths, **_places(index_of, lengths, len(ids)))


def _places(index_of: Sequence[Tensor], lengths: Sequence[int], tokens: int) -> dict[str, Tensor]:
    """Where tokens stand in the padded layout, from the packed indices of each sequence."""
    longest = max(lengths)
    padded_ST = torch.zeros(len(lengths), longest, dtype=torch.long)
    position_N, flat_N = torch.empty(tokens, dtype=torch.long), torch.empty(tokens, dtype=torch.long)
    place_T = torch.arange(longest)
    for row in reversed(range(len(lengths))):  # the first sequence that has a token comes last, and stays
        index_L, place_L = index_of[row], place_T[: lengths[row]]
        padded_ST[row, : lengths[row]] = index_L
        position_N[index_L], flat_N[index_L] = place_L, row * longest + place_L
    repeat_R = torch.empty(0, dtype=torch.long)
    if tokens < sum(lengths):
        is_token_ST = place_T < torch.tensor(list(lengths))[:, None]
        place_ST = torch.arange(padded_ST.numel()).view_as(padded_ST)
        repeat_R = place_ST[is_token_ST & (flat_N[padded_ST] != place_ST)]
    bound_Z = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "position_N": position_N,
        "padded_ST": padded_ST,
        "flat_N": flat_N,
        "repeat_R": repeat_R,
        "bound_Z": bound_Z,
    }


def common_beginning(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def pad_rows(value_M: Tensor, counts: Sequence[int], *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Spread values that lie end to end (`counts[b]` of row b) over rows: `(value_BT, mask_BT)`, zeros to the right."""
    longest = max(counts)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a row of {longest} values does not fit into the width {width}; give at least {longest}.")
    mask_BT = torch.arange(width) < torch.tensor(list(counts))[:, None]
    place_M = sent_to(value_M.device, mask_BT.flatten().nonzero().flatten())
    value_BT = value_M.new_zeros(mask_BT.numel()).index_copy(0, place_M, value_M).view(mask_BT.shape)
    return value_BT, sent_to(value_M.device, mask_BT)


def microbatches(costs: Sequence[int], *, budget: int, shares: int = 1) -> list[list[int]]:
    """Group indices into micro-batches, longest first, so that `largest cost * number of items` stays within `budget`.

    Sorting by length keeps the padding inside attention small. An item above the budget goes alone. Every index occurs
    exactly once. For several `shares` the items are dealt out by length first, and the groups of the shares take turns,
    so that every `shares`-th group, from any on, makes up about as much work.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    dealt = [_grouped(order[share::shares], costs, budget) for share in range(shares)]
    return [group for turn in zip_longest(*dealt) for group in turn if group]


def _grouped(order: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for index in order:
        if groups and costs[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
