"""Gradient checkpointing: keep only each layer's input, and compute what is inside again when gradients go back.

The library's layers know how; its own switch does it in training mode only, and recomputes under whatever attention the
model has by then. Here policies train in evaluation mode (dropout breaks "ratio 1 at the first minibatch"), and packed
attention is on during the forward pass alone. So the switch is on the layers themselves, within a block, and each layer
is computed again under the attention that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tastemaker.errors import ModelError


@contextmanager
def layers_recomputed(module: nn.Module) -> Iterator[None]:
    """Within the block, layers of the models in `module` keep their inputs alone for the backward pass.

    Forward and backward pass both belong into the block, and no decoding does.

    Raises:
        ModelError: the architecture has no layers that the library can compute again.
    """
    layers = _layers(module)
    if not layers:
        raise ModelError("gradient_checkpointing does not know this architecture; set it to false.")
    modes = [(layer, layer.training) for layer, _ in layers]
    for layer, config in layers:
        layer._gradient_checkpointing_func = partial(_recomputed, layer, config, layer.training)
        layer.gradient_checkpointing, layer.training = True, True
    try:
        yield
    finally:
        for layer, training in modes:
            layer.gradient_checkpointing, layer.training = False, training


def layers_in(module: nn.Module) -> list[nn.Module]:
    """The layers of the models in `module`, as far as the architecture is one that tells them."""
    return [layer for layer, _ in _layers(module)]


def _layers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Every layer that can be computed again, with the config that says how its model attends."""
    config_of: dict[int, tuple[Any, Any]] = {}
    for model in module.modules():
        if isinstance(model, PreTrainedModel):
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    config_of.setdefault(id(layer), (layer, model.config))
    return list(config_of.values())


def _recomputed(layer: Any, config: Any, training: bool, forward: Callable[..., Any], *inputs: Any) -> Any:
    """What the layer gives; it is called so only because it thinks that it is training."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the layer the first time, and when it is computed again: it runs alike."""
        implementation = config._attn_implementation
        return _as(layer, config, training, implementation), _as(layer, config, training, implementation)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _as(layer: Any, config: Any, training: bool, implementation: str) -> Iterator[None]:
    now, layer.training = (layer.training, config._attn_implementation), training
    config._attn_implementation = implementation
    try:
        yield
    finally:
        layer.training, config._attn_implementation = now
