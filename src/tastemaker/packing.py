"""Ragged token sequences as one row without padding, and micro-batches of about equal cost.

Dimensions in names: N packed tokens, S sequences, T the longest sequence's tokens, M selected tokens. Lengths are
carried, never guessed from pad ids. Tokens of S sequences lie one after another in `[N]`; only attention needs them as
`[S, T]`, and `Packed` holds the two index tensors that go there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """S sequences laid end to end.

    `id_N` token ids; `position_N` each token's place in its own sequence; `lengths` of the sequences; `padded_ST` for
    each place of the padded layout the packed index to read (0 where there is no token); `flat_N` for each packed token
    its index in the flattened padded layout.
    """

    id_N: Tensor
    position_N: Tensor
    lengths: tuple[int, ...]
    padded_ST: Tensor
    flat_N: Tensor

    def to(self, device: torch.device) -> Packed:
        return Packed(
            id_N=self.id_N.to(device),
            position_N=self.position_N.to(device),
            lengths=self.lengths,
            padded_ST=self.padded_ST.to(device),
            flat_N=self.flat_N.to(device),
        )

    @property
    def last_S(self) -> Tensor:
        """The packed index of each sequence's last token."""
        return torch.tensor(self.lengths, device=self.id_N.device).cumsum(0) - 1


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Lay `sequences` end to end. Empty sequences are refused: they have no last token."""
    if not sequences or not all(len(ids) for ids in sequences):
        raise ValueError("cannot pack an empty sequence; give each sequence at least one token")
    length_S = torch.tensor([len(ids) for ids in sequences])
    id_N = torch.tensor([token for ids in sequences for token in ids])
    start_S = length_S.cumsum(0) - length_S
    sequence_N = torch.repeat_interleave(torch.arange(len(sequences)), length_S)
    position_N = torch.arange(len(id_N)) - start_S[sequence_N]
    longest = int(length_S.max())
    place_T = torch.arange(longest)
    padded_ST = torch.where(place_T < length_S[:, None], start_S[:, None] + place_T, 0)
    return Packed(
        id_N=id_N,
        position_N=position_N,
        lengths=tuple(length_S.tolist()),
        padded_ST=padded_ST,
        flat_N=sequence_N * longest + position_N,
    )


def response_sources(prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> Tensor:
    """For sequences of prompt + response laid end to end: the packed index of the token before each response token.

    That is where a response token's log-prob is read, and the value of the state in which it was chosen.
    """
    prompt_S, response_S = torch.tensor(list(prompt_lengths)), torch.tensor(list(response_lengths))
    if int(prompt_S.min()) < 1:
        raise ValueError("a prompt has no tokens, so nothing precedes its first response token")
    end_S = (prompt_S + response_S).cumsum(0)
    first_S = end_S - response_S - 1
    before_S = response_S.cumsum(0) - response_S
    return torch.repeat_interleave(first_S - before_S, response_S) + torch.arange(int(response_S.sum()))


def pad_rows(value_M: Tensor, counts: Sequence[int], *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Spread values that lie end to end (`counts[b]` of row b) over rows: `(value_BT, mask_BT)`, zeros to the right."""
    count_B = torch.tensor(list(counts), device=value_M.device)
    longest = max(counts)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a row of {longest} values does not fit into the width {width}; give at least {longest}.")
    mask_BT = torch.arange(width, device=value_M.device) < count_B[:, None]
    value_BT = value_M.new_zeros(mask_BT.shape)
    value_BT[mask_BT] = value_M
    return value_BT, mask_BT


def microbatches(costs: Sequence[int], *, budget: int) -> list[list[int]]:
    """Group indices into micro-batches, longest first, so that `largest cost * number of items` stays within `budget`.

    Sorting by length keeps the padding inside attention small. An item above the budget goes alone. Every index occurs
    exactly once.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups and costs[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
