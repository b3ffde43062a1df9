"""Llama's forward pass over our cache, for decoding on a processor without a GPU.

A decoding step works on tensors so small that calling an operator takes about as long as what it does, and the modules'
own Python comes on top of that; here that is left out. Weights are used where they lie, in the model, or, for an engine
with weights in a type of its own, from a copy: there the matrices that have the same input are one, and laid out as
oneDNN's kernels read them, where otherwise every product of a few rows would begin by arranging its weights anew.

Rounding is as in training under autocast: what enters a matrix product is rounded, the residual stream is fp32. A
copy's embeddings are rounded too, where training looks them up in fp32: that takes half the memory.

Dimensions: B rows, T new tokens, D width, E heads, H query heads, G key/value heads, K head size, F numbers inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tastemaker import llama
from tastemaker.errors import ModelError
from tastemaker.generation.cache import PreallocatedCache, cached_attention

Product = Callable[[Tensor], Tensor]

ARRANGE = "_reorder_linear_weight"  # PyTorch's own compiler uses it; there is no public name for it


class LayerWeights:
    """A layer's products; several matrices of one input may be one product."""

    __slots__ = ("down", "gate_up", "layer", "norm_1", "norm_2", "output", "query_key_value")

    def __init__(
        self,
        layer: llama.Layer,
        norms: tuple[Tensor, Tensor],
        query_key_value: Sequence[Product],
        output: Product,
        gate_up: Sequence[Product],
        down: Product,
    ) -> None:
        self.layer, (self.norm_1, self.norm_2) = layer, norms
        self.query_key_value, self.output, self.gate_up, self.down = query_key_value, output, gate_up, down


class LiveWeights:
    """A model's own weights, as they are when they are used."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.dtype = model, model.dtype

    def ready(self) -> bool:
        """Look at the model again; False if adapters, hooks or layers of another kind have been put in."""
        layers = llama.layers_of(self._model)
        if layers is None:
            return False
        self.layers = [
            LayerWeights(
                layer,
                (layer.norm_1.weight, layer.norm_2.weight),
                [_plain(each) for each in (layer.query, layer.key, layer.value)],
                _plain(layer.output),
                [_plain(each) for each in (layer.gate, layer.up)],
                _plain(layer.down),
            )
            for layer in layers
        ]
        self.logits = _plain(self._model.get_output_embeddings())
        self.norm_D = self._model.base_model.norm.weight
        return True

    def embed(self, id_BT: Tensor) -> Tensor:
        return nn.functional.embedding(id_BT, self._model.get_input_embeddings().weight)


class CopiedWeights:
    """Weights of the engine's own in another type, arranged for products of a few rows; renewed by `load`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._shapes = _shapes(model)
        self.load(model)

    @torch.no_grad()
    def load(self, model: PreTrainedModel) -> None:
        """Copy a model's weights.

        Raises:
            ModelError: it is of another architecture.
        """
        layers = llama.layers_of(model)
        if layers is None or _shapes(model) != self._shapes:
            raise ModelError("The weights do not fit the model that generates. Give a model of the same architecture.")
        self.layers = list[LayerWeights]()  # the old ones are given up first
        self._embedding = model.get_input_embeddings().weight.to(self.dtype)
        self.logits = _arranged(self.dtype, model.get_output_embeddings())
        for layer in layers:
            self.layers.append(
                LayerWeights(
                    layer,
                    (layer.norm_1.weight.clone(), layer.norm_2.weight.clone()),
                    (_arranged(self.dtype, layer.query, layer.key, layer.value),),
                    _arranged(self.dtype, layer.output),
                    (_arranged(self.dtype, layer.gate, layer.up),),
                    _arranged(self.dtype, layer.down),
                )
            )
        self.norm_D = model.base_model.norm.weight.clone()

    def embed(self, id_BT: Tensor) -> Tensor:
        return nn.functional.embedding(id_BT, self._embedding)

    def ready(self) -> bool:
        """They are as they were loaded."""
        return True


class LlamaForward:
    """The forward pass of a model of Llama's kind, with the logits of the last position only.

    It takes what `decoding` gives a model of the library. All sequences must fit into every layer's window.
    """

    def __init__(self, model: PreTrainedModel, weights: LiveWeights | CopiedWeights) -> None:
        self._trunk, self.weights = model.base_model, weights

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: PreallocatedCache,
    ) -> dict[str, Tensor]:
        weights, dtype = self.weights, self.weights.dtype
        x_BTD = weights.embed(input_ids)
        x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        turn = llama.Rotation.of(self._trunk, x_BTD, position_ids)
        for number, layer in enumerate(weights.layers):
            attended_BTA = self._attend(layer, number, x_BTD, turn, attention_mask, past_key_values)
            x_BTD = x_BTD + layer.output(attended_BTA.to(dtype))
            normed_BTD = _normed(x_BTD, layer.norm_2, layer.layer.norm_2.variance_epsilon, dtype)
            parts = [product(normed_BTD) for product in layer.gate_up]
            gate_BTF, up_BTF = parts if len(parts) == 2 else parts[0].chunk(2, -1)
            x_BTD = x_BTD + layer.down(nn.functional.silu(gate_BTF).mul_(up_BTF))
        last_BD = _normed(x_BTD[:, -1], weights.norm_D, self._trunk.norm.variance_epsilon, dtype)
        return {"logits": weights.logits(last_BD)[:, None]}

    def _attend(
        self,
        layer: LayerWeights,
        number: int,
        x_BTD: Tensor,
        turn: llama.Rotation,
        mask: Tensor,
        cache: PreallocatedCache,
    ) -> Tensor:
        """What new tokens read from the cache, after they have been written into it."""
        normed_BTD = _normed(x_BTD, layer.norm_1, layer.layer.norm_1.variance_epsilon, self.weights.dtype)
        parts = [product(normed_BTD) for product in layer.query_key_value]
        query_BTHK, key_BTGK, value_BTGK = _heads(parts, layer.layer, turn)
        key_BGSK, value_BGSK = cache.update(key_BTGK.transpose(1, 2), value_BTGK.transpose(1, 2), number)
        attended_BTHK, _ = cached_attention(
            self._trunk, query_BTHK.transpose(1, 2), key_BGSK, value_BGSK, mask, scaling=layer.layer.scaling
        )
        return attended_BTHK.flatten(2)


def _heads(parts: Sequence[Tensor], layer: llama.Layer, turn: llama.Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions, and values; by head, from one product or three."""
    size, heads = layer.head_size, layer.query.out_features // layer.head_size
    if len(parts) > 1:
        query_BTHK, key_BTGK, value_BTGK = (part.view(*part.shape[:2], -1, size) for part in parts)
        return turn(query_BTHK), turn(key_BTGK), value_BTGK
    all_BTEK = parts[0].view(*parts[0].shape[:2], -1, size)
    turning = heads + layer.key.out_features // size
    turned_BTEK = turn(all_BTEK[:, :, :turning])
    return turned_BTEK[:, :, :heads], turned_BTEK[:, :, heads:], all_BTEK[:, :, turning:]


def _normed(x: Tensor, weight_D: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    return llama.normed(x, llama.scale_of(x, epsilon), weight_D, dtype)


def _arranged(dtype: torch.dtype, *linears: nn.Linear) -> Product:
    """One product for all of them, in the layout that oneDNN multiplies by, where it has one."""
    weight = torch.cat([linear.weight.to(dtype) for linear in linears])
    biases = [linear.bias.to(dtype) for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if biases and len(biases) != len(linears):
        raise ModelError("Some of a layer's projections have a bias and others none.")
    try:
        packed = getattr(torch.ops.mkldnn, ARRANGE)(weight, None)
        multiply: Any = torch.ops.mkldnn._linear_pointwise
        multiply(weight.new_zeros(1, weight.shape[1]), packed, bias, "none", [], "")
    except (AttributeError, RuntimeError):  # a build without oneDNN, or a type that it does not know here
        return lambda x: nn.functional.linear(x, weight, bias)
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _plain(linear: nn.Linear) -> Product:
    return partial(nn.functional.linear, weight=linear.weight, bias=linear.bias)


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
