"""Llama's decoder layers as one operation each, for training on a processor without a GPU.

The library's modules compute a layer operator by operator, and automatic differentiation its gradient. Where matrix
products are fast (bf16), half of a training step goes into the others: casts, norms, rotations, activations. Here a
layer is one autograd function whose gradient is written out, so each tensor is read and rounded as seldom as possible,
and less is kept for the backward pass: what is cheap to compute again is.

The weights stay in the library's modules, and rounding is theirs under autocast: matrix products in its type, norms,
rotations, softmax and the residual stream in fp32 (at least). Only layers of Llama's structure are taken (Llama,
Mistral, Qwen 2: RMSNorm, rotary positions, grouped heads, gated SiLU), which is looked at in every call; `model` also
tries values when a model is loaded. All others, and LoRA's, run through the library's modules.

Dimensions in names: N packed tokens, D width, H query heads, G key/value heads, E either of these, K head size,
A = H * K attended numbers, F numbers inside the feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tastemaker.attention import LONGEST_BY_PRODUCTS, attend_by_products, attend_by_products_backward
from tastemaker.packing import Packed

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2"})

# Where a layer's parameters stand: norms, matrices, and behind each matrix, so many places on, its bias.
NORM_1, NORM_2, QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(9)
BIAS = 7


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's modules, as the library has them."""

    norm_1: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    norm_2: Any
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_size: int
    scaling: float
    window: int | None
    recomputed: bool

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down


def layers_of(library: Any) -> list[Layer] | None:
    """The layers of a model of the library, if every one of them is Llama's as it stands; otherwise None."""
    config, trunk = library.config, library.base_model
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in library.modules()):
        return None  # whoever has put them there wants the modules to run
    if any(block._compiled_call_impl is not None for block in trunk.layers):
        return None
    layers = [_layer(each, config) for each in trunk.layers]
    return layers if all(type(linear) is nn.Linear for layer in layers for linear in layer.linears) else None


def _layer(block: Any, config: Any) -> Layer:
    attention, inner = block.self_attn, block.mlp
    windows = config.model_type == "mistral"
    return Layer(
        norm_1=block.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        norm_2=block.post_attention_layernorm,
        gate=inner.gate_proj,
        up=inner.up_proj,
        down=inner.down_proj,
        head_size=attention.head_dim,
        scaling=attention.scaling,
        window=config.sliding_window if windows else getattr(attention, "sliding_window", None),
        recomputed=block.gradient_checkpointing and block.training,
    )


def fits(packed: Packed) -> bool:
    """Whether a batch is one that these layers are made for."""
    return packed.id_N.device.type == "cpu" and packed.padded_ST.shape[1] <= LONGEST_BY_PRODUCTS


def hidden_states(library: Any, layers: list[Layer], packed: Packed) -> Tensor:
    """Final hidden states `hidden_ND` of all packed tokens."""
    trunk, device = library.base_model, packed.id_N.device.type
    x_ND = trunk.embed_tokens(packed.id_N)
    turn = Rotation.of(trunk, x_ND, packed.position_N[None])
    turn = Rotation(turn.cos[0], turn.sin[0])
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    with torch.autocast(device, enabled=False):
        for layer in layers:
            batch = _Batch(layer, packed, turn, dtype)
            weights = [layer.norm_1.weight, layer.norm_2.weight, *(linear.weight for linear in layer.linears)]
            biases = [linear.bias for linear in layer.linears]
            x_ND = _DecoderLayer.apply(batch, x_ND, *weights, *biases)  # type: ignore[no-untyped-call]
        hidden_ND = trunk.norm(x_ND)
    assert isinstance(hidden_ND, Tensor)
    return hidden_ND


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary positions: how far each head is turned, `[..., 1, K]` in fp32 at least."""

    cos: Tensor
    sin: Tensor
    """Negative in the first half of a head."""

    @staticmethod
    def of(trunk: Any, like: Tensor, position: Tensor) -> Rotation:
        """The library's own angles, for tokens at these places."""
        exact = torch.promote_types(like.dtype, torch.float32)
        cos, sin = (angle.to(exact)[..., None, :] for angle in trunk.rotary_emb(like, position))
        half = sin.shape[-1] // 2
        return Rotation(cos, torch.cat([-sin[..., :half], sin[..., half:]], -1))

    def __call__(self, x: Tensor, *, scale: float = 1.0, back: bool = False) -> Tensor:
        """Heads `[..., E, K]` turned by their positions (or back), times `scale`."""
        x = x.to(self.cos.dtype)
        cos, sin = (self.cos, self.sin) if scale == 1.0 else (self.cos * scale, self.sin * scale)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=-1 if back else 1)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a layer is told beside its input and its weights."""

    layer: Layer
    packed: Packed
    turn: Rotation
    dtype: torch.dtype
    """Of matrix products."""


class _DecoderLayer(torch.autograd.Function):
    """`(batch, x_ND, two norm weights, seven matrices, seven biases or None) -> x_ND`."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, x_ND: Tensor, *parameters: Tensor | None) -> Tensor:
        weights, biases = parameters[2:9], parameters[9:]
        rounded = [weight.to(batch.dtype) for weight in weights if weight is not None]
        kept = _inside(batch, x_ND, parameters[:2], rounded, biases)
        middle_ND, gate_NF, up_NF = kept[3], kept[6], kept[7]
        inner_NF = nn.functional.silu(gate_NF).mul_(up_NF)
        y_ND = middle_ND + _project(DOWN, inner_NF, rounded, biases)
        ctx.batch = batch
        if batch.layer.recomputed:
            rounded, kept = [], ()
        ctx.save_for_backward(x_ND, *parameters, *rounded, *kept)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *others = ctx.saved_tensors
        parameters, rest = others[:16], others[16:]
        with torch.autocast(of_y_ND.device.type, enabled=False):
            if ctx.batch.layer.recomputed:
                rounded = [weight.to(ctx.batch.dtype) for weight in parameters[2:9]]
                kept = _inside(ctx.batch, x_ND, parameters[:2], rounded, parameters[9:])
            else:
                rounded, kept = rest[:7], rest[7:]
            gradients = _Gradients(ctx.needs_input_grad[2:], parameters)
            of_x_ND = _backward(ctx.batch, of_y_ND, x_ND, parameters[:2], rounded, kept, gradients)
        return None, of_x_ND, *gradients.found


def _project(place: int, input_NE: Tensor, weights: Any, biases: Any) -> Tensor:
    weight, bias = weights[place - QUERY], biases[place - QUERY]
    return nn.functional.linear(input_NE, weight, None if bias is None else bias.to(weight.dtype))


def _inside(batch: _Batch, x_ND: Tensor, norms: Any, weights: Any, biases: Any) -> tuple[Tensor, ...]:
    """All of a layer but its last product: what the backward pass needs."""
    layer, project = batch.layer, partial(_project, weights=weights, biases=biases)
    scale_1_N1 = scale_of(x_ND, layer.norm_1.variance_epsilon)
    normed_1_ND = normed(x_ND, scale_1_N1, norms[0], batch.dtype)
    query_NHK, key_NGK, value_NGK = (
        project(place, normed_1_ND).view(len(x_ND), -1, layer.head_size) for place in (QUERY, KEY, VALUE)
    )
    attended_NHK, attention = attend_by_products(
        batch.turn(query_NHK, scale=layer.scaling).transpose(0, 1),
        batch.turn(key_NGK).transpose(0, 1),
        value_NGK.transpose(0, 1),
        batch.packed,
        window=layer.window,
        dtype=batch.dtype,
    )
    attended_NA = attended_NHK.flatten(1)
    middle_ND = x_ND + project(OUTPUT, attended_NA)
    scale_2_N1 = scale_of(middle_ND, layer.norm_2.variance_epsilon)
    normed_2_ND = normed(middle_ND, scale_2_N1, norms[1], batch.dtype)
    gate_NF, up_NF = project(GATE, normed_2_ND), project(UP, normed_2_ND)
    return scale_1_N1, normed_1_ND, attended_NA, middle_ND, scale_2_N1, normed_2_ND, gate_NF, up_NF, *attention


def _backward(
    batch: _Batch, of_y_ND: Tensor, x_ND: Tensor, norms: Any, weights: Any, kept: Any, gradients: _Gradients
) -> Tensor:
    """The gradient of the layer's input; those of parameters go into `gradients`."""
    scale_1_N1, normed_1_ND, attended_NA, middle_ND, scale_2_N1, normed_2_ND, gate_NF, up_NF, *attention = kept
    query, key, value, output, gate, up, down = weights

    of_down_ND = of_y_ND.to(batch.dtype)
    active_NF = nn.functional.silu(gate_NF)
    gradients.of_linear(DOWN, of_down_ND, active_NF * up_NF)
    of_inner_NF = of_down_ND @ down
    of_up_NF = active_NF.mul_(of_inner_NF)
    of_gate_NF = torch.ops.aten.silu_backward(of_inner_NF.mul_(up_NF), gate_NF)
    gradients.of_linear(GATE, of_gate_NF, normed_2_ND)
    gradients.of_linear(UP, of_up_NF, normed_2_ND)
    of_normed_2_ND = torch.addmm(of_gate_NF @ gate, of_up_NF, up)
    of_middle_ND = gradients.of_norm(NORM_2, of_normed_2_ND, middle_ND, scale_2_N1, norms[1], of_y_ND)

    of_output_ND = of_middle_ND.to(batch.dtype)
    gradients.of_linear(OUTPUT, of_output_ND, attended_NA)
    of_attended_NHK = (of_output_ND @ output).view(len(x_ND), -1, batch.layer.head_size)
    of_query_NHK, of_key_NGK, of_value_NGK = attend_by_products_backward(of_attended_NHK, attention, batch.packed)
    of_query_NA = batch.turn(of_query_NHK, scale=batch.layer.scaling, back=True).to(batch.dtype).flatten(1)
    of_key_NA, of_value_NA = batch.turn(of_key_NGK, back=True).to(batch.dtype).flatten(1), of_value_NGK.flatten(1)
    of_value_NA = of_value_NA.to(batch.dtype)
    gradients.of_linear(QUERY, of_query_NA, normed_1_ND)
    gradients.of_linear(KEY, of_key_NA, normed_1_ND)
    gradients.of_linear(VALUE, of_value_NA, normed_1_ND)
    of_normed_1_ND = torch.addmm(torch.addmm(of_query_NA @ query, of_key_NA, key), of_value_NA, value)
    return gradients.of_norm(NORM_1, of_normed_1_ND, x_ND, scale_1_N1, norms[0], of_middle_ND)


class _Gradients:
    """The gradients of a layer's parameters that are wanted, each in its parameter's type."""

    def __init__(self, wanted: tuple[bool, ...], parameters: list[Tensor | None]) -> None:
        self._wanted, self._parameters = wanted, parameters
        self.found: list[Tensor | None] = [None] * len(parameters)

    def of_linear(self, place: int, of_output_NE: Tensor, input_NE: Tensor) -> None:
        if self._wanted[place]:
            self._set(place, of_output_NE.T @ input_NE)
        if self._wanted[place + BIAS]:
            self._set(place + BIAS, of_output_NE.sum(0))

    def of_norm(
        self, place: int, of_normed_ND: Tensor, x_ND: Tensor, scale_N1: Tensor, weight_D: Tensor, of_x_ND: Tensor
    ) -> Tensor:
        """The gradient of a norm's input, added to what its input gets beside the norm."""
        unit_ND = x_ND * scale_N1
        gradient_ND = of_normed_ND.to(x_ND.dtype)
        product_ND = gradient_ND * unit_ND
        if self._wanted[place]:
            self._set(place, product_ND.sum(0))
        along_N1 = (product_ND @ weight_D.to(x_ND.dtype))[:, None] / len(weight_D)
        across_ND = (gradient_ND * weight_D).sub_(unit_ND.mul_(along_N1))
        return torch.addcmul(of_x_ND, across_ND, scale_N1)

    def _set(self, place: int, gradient: Tensor) -> None:
        parameter = self._parameters[place]
        assert parameter is not None
        self.found[place] = gradient.to(parameter.dtype)


def scale_of(x: Tensor, epsilon: float) -> Tensor:
    """One over the root mean square of each row of D numbers, `[..., 1]`."""
    square: Tensor = torch.linalg.vecdot(x, x)[..., None]
    return square.div_(x.shape[-1]).add_(epsilon).rsqrt_()


def normed(x: Tensor, scale: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """What a norm gives, rounded for the products that read it."""
    return (x * scale).mul_(weight_D).to(dtype)
