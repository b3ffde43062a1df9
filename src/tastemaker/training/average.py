"""The exponential moving average of the policy's weights (section C.4 of the paper: decay 0.992 per iteration).

The decay is stated for the paper's 512 episodes an iteration; with another batch it is raised to the matching power, so
that the average looks back over as many episodes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tastemaker import parallel

PAPER_EPISODES = 512


def decay_for(decay: float, num_episodes: int, *, per_episodes: int = PAPER_EPISODES) -> float:
    """The decay of one update after `num_episodes`, where `decay` is meant for `per_episodes`."""
    return float(decay ** (num_episodes / per_episodes))


class WeightAverage:
    """The average of a module's trainable parameters, in fp32, started at their values now."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """average = decay * average + (1 - decay) * now"""
        for name, parameter in module.named_parameters():
            if name in self.weights:
                parallel.part_of(self.weights[name]).lerp_(parallel.part_of(parameter.detach()), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        return dict(self.weights)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(parallel.laid_as(tensor, state[name]))
