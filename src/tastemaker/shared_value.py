"""A value function on the policy's own trunk, as in Ziegler et al. 2019: cheaper than the paper's separate network.

Policy and value then train the same weights, so it is another algorithm, not another way to compute the paper's.

Dimensions in names: N packed tokens, M selected places, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tastemaker.errors import ModelError
from tastemaker.model import LanguageModel
from tastemaker.packing import Packed


class SharedValue(nn.Module):
    """A value head on the policy's own trunk, started at zero as in Ziegler et al."""

    def __init__(self, policy: LanguageModel) -> None:
        super().__init__()
        if not policy.linear_head:
            raise ModelError("value_function = 'shared' does not know this architecture; use 'separate'.")
        self.policy_trunk = policy.trunk
        width = policy.library.get_output_embeddings().weight.shape[1]
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def at(self, packed: Packed, source_M: Tensor) -> Tensor:
        return self.read(self.policy_trunk.hidden(packed), source_M)

    def read(self, hidden_ND: Tensor, source_M: Tensor) -> Tensor:
        """The head's output at the packed places `source_M`, in its own precision whatever the trunk runs in."""
        hidden_MD = hidden_ND.index_select(0, source_M)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            value_M1: Tensor = self.head(hidden_MD.to(self.head.weight.dtype))
        return value_M1[:, 0]
