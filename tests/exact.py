"""The product's own models in float64 through and through, for figures that every processor has to agree on.

Weights in float64 are not enough: the library computes norms and rotary angles in fp32 whatever its weights are in, and
the last bit of those differs between processors. So both are replaced here; all else stays the product's.

Dimensions in names: B rows, T tokens, K head size, D width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tastemaker.model import LanguageModel, RewardModel

Model = TypeVar("Model", LanguageModel, RewardModel)


class Norm(nn.Module):
    """Llama's norm in the precision of what it is given."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = library.weight, library.variance_epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        scale_BT1 = torch.rsqrt(x_BTD.square().mean(-1, keepdim=True) + self.variance_epsilon)
        normed_BTD: Tensor = x_BTD * scale_BT1 * self.weight
        return normed_BTD


class Angles(nn.Module):
    """Rotary positions: the cosine and sine of place / theta^(2 i / K), the K / 2 angles twice over."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        assert config.rope_parameters["rope_type"] == "default"
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.theta, self.size = float(config.rope_parameters["rope_theta"]), int(size)

    def forward(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        exponent_K = torch.arange(0, self.size, 2, dtype=torch.float64) / self.size
        angle_BTK = position_ids.double()[..., None] * self.theta**-exponent_K
        twice_BTK = torch.cat([angle_BTK, angle_BTK], -1)
        return twice_BTK.cos().to(like.dtype), twice_BTK.sin().to(like.dtype)


def in_float64(model: Model) -> Model:
    """The same model, changed in place; it has to be one of Llama's."""
    library = model.double().library
    assert library.config.model_type == "llama"
    for parent in list(library.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, Norm(child))
    library.base_model.rotary_emb = Angles(library.config)
    return model


@torch.no_grad()
def set_head(model: RewardModel, *, seed: int) -> RewardModel:
    """Weights of the scalar head with variance 1 / (D + 1), by arithmetic that is the same everywhere."""
    weight_1D, draw = model.library.score.weight, random.Random(f"head {seed}")
    width = weight_1D.shape[1]
    numbers = [draw.uniform(-1, 1) * (3 / (width + 1)) ** 0.5 for _ in range(width)]
    weight_1D.copy_(torch.tensor([numbers], dtype=weight_1D.dtype))
    return model


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Tensors that are made of plain numbers are in float64 within the block."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
