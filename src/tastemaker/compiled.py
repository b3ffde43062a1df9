"""torch.compile for training: each decoder layer as compiled code, attention as it is.

Layers are compiled one by one and alike, so the compiler works once and not once a layer, with sizes left open, because
the number of packed tokens differs from batch to batch. Attention over packed sequences has kernels of its own and
reads lists, so the compiler goes around it: a layer is compiled in pieces, before attention and behind it.

On a processor without a GPU this needs a C++ compiler; Llama's layers have a faster path there (`llama`), which a
compiled layer does without.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

from tastemaker.attention import PACKED, packed_attention
from tastemaker.errors import ModelError
from tastemaker.recompute import layers_in


def compile_layers(module: nn.Module) -> None:
    """Let the layers of the models in `module` run compiled from now on. What they compute stays the same.

    Raises:
        ModelError: the architecture has no layers that the library tells apart.
    """
    layers = layers_in(module)
    if not layers:
        raise ModelError("compile does not know this architecture's layers; set it to false.")
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
    for layer in layers:
        layer.compile(dynamic=True)
