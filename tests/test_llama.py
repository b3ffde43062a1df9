"""Layers of our own against the library's: the same hidden states, the same gradients, and less to keep."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.models import make_library, random_sequences
from torch import Tensor, nn

from tastemaker import llama
from tastemaker.attention import LONGEST_BY_PRODUCTS
from tastemaker.lora import add_adapters
from tastemaker.model import Trunk
from tastemaker.packing import Packed, pack
from tastemaker.recompute import layers_recomputed
from tastemaker.settings import LoraConfig

# Grouped heads, biases everywhere, a window shorter than most sequences, one key/value head for all.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with scaled rotations": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"num_key_value_heads": 1}),
    "mistral with a window": ("mistral", {"sliding_window": 3}),
    "qwen2 with a window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


def ragged() -> Packed:
    return pack(random_sequences([11, 2, 7, 1, 5]))


def sharing() -> Packed:
    first, *others = random_sequences([7, 3, 5, 2])
    return pack([first + other for other in others] + [first[:4]], groups=[3, 1])


BATCHES = {"ragged": ragged, "sharing": sharing}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose biases and norm weights are not the zeros and ones that they begin with."""
    architecture, changes = MODELS[name]
    library = make_library(architecture, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in library.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return library.to(dtype)


def states_and_gradients(library: Any, packed: Packed, *, fused: bool) -> list[Tensor]:
    """Hidden states, and the gradients of a random direction in them."""
    direction_ND = torch.randn(len(packed.id_N), 48, generator=torch.Generator().manual_seed(1))
    hidden_ND = Trunk(library, fused=fused).hidden(packed)
    parameters = list(library.base_model.parameters())
    loss = (hidden_ND * direction_ND.to(hidden_ND.dtype)).sum()
    return [hidden_ND.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_those_of_the_librarys_layers(name: str, batch: str) -> None:
    library, packed = make(name), BATCHES[batch]()
    assert llama.layers_of(library) is not None
    ours, theirs = (states_and_gradients(library, packed, fused=fused) for fused in (True, False))
    assert len(ours) > 2 * 9
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 1e-3
        # the library takes angles and norms in fp32 whatever the weights are
        torch.testing.assert_close(our, their, rtol=2e-5, atol=2e-5 * float(their.abs().max()))


def test_the_gradient_is_that_of_finite_differences() -> None:
    """All in float64, norms and angles too: one layer of two heads of size 2 on five tokens of two sequences."""
    library = make_library(
        "llama", hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=3
    ).double()
    (layer,) = llama.layers_of(library) or []
    packed = pack([[1, 2, 3], [4, 5]])
    angle_N11 = torch.rand(5, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = llama.Rotation(angle_N11.cos().repeat(1, 1, 2), torch.cat([-angle_N11.sin(), angle_N11.sin()], 2))
    batch = llama._Batch(layer, packed, turn, torch.float64)
    weights = [layer.norm_1.weight, layer.norm_2.weight, *(linear.weight for linear in layer.linears)]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in weights]
    biases = [torch.randn(len(weight), generator=generator, dtype=torch.float64) for weight in inputs[2:]]
    x_ND = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    given = [tensor.requires_grad_() for tensor in (x_ND, *inputs, *biases)]
    apply: Any = llama._DecoderLayer.apply
    assert torch.autograd.gradcheck(partial(apply, batch), given)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_in_bf16_gradients_are_as_exact_as_the_librarys(name: str) -> None:
    library, packed = make(name, torch.float32), ragged()
    exact = states_and_gradients(library, packed, fused=False)
    found = {}
    for fused in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[fused] = states_and_gradients(library, packed, fused=fused)
        assert found[fused][0].dtype == torch.float32
    errors = {
        fused: [float((one - right).norm() / right.norm()) for one, right in zip(parts, exact, strict=True)]
        for fused, parts in found.items()
    }
    assert sum(errors[True]) < 1.2 * sum(errors[False])
    assert max(errors[True]) < 1.5 * max(errors[False])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_layers_that_are_computed_again_keep_less_and_give_the_same(precision: torch.dtype) -> None:
    library, packed = make("llama with biases", torch.float32), ragged()
    with torch.autocast("cpu", dtype=precision, enabled=precision == torch.bfloat16):
        plain, kept = kept_bytes(library, packed, fused=True)
        with layers_recomputed(library):
            again, kept_then = kept_bytes(library, packed, fused=True)
        _, by_library = kept_bytes(library, packed, fused=False)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
    assert kept_then < 0.7 * kept < 0.7 * by_library


def kept_bytes(library: Any, packed: Packed, *, fused: bool) -> tuple[list[Tensor], int]:
    """States and gradients; and the memory that waits for the backward pass, parameters left out."""
    parameters, kept = {each.data_ptr() for each in library.parameters()}, dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = states_and_gradients(library, packed, fused=fused)
    return found, sum(kept.values())


def test_frozen_parameters_have_no_gradient_and_the_others_do() -> None:
    library, packed = make("llama"), ragged()
    whole = states_and_gradients(library, packed, fused=True)
    names = [name for name, _ in library.base_model.named_parameters()]
    wanted = "layers.0.mlp.up_proj.weight"
    for name, parameter in library.base_model.named_parameters():
        parameter.requires_grad_(name == wanted)
    direction_ND = torch.randn(len(packed.id_N), 48, generator=torch.Generator().manual_seed(1)).double()
    (Trunk(library, fused=True).hidden(packed) * direction_ND).sum().backward()  # type: ignore[no-untyped-call]
    with_gradient = [name for name, each in library.base_model.named_parameters() if each.grad is not None]
    assert with_gradient == [wanted]
    found = library.base_model.get_parameter(wanted).grad
    torch.testing.assert_close(found, whole[1 + names.index(wanted)], rtol=1e-12, atol=1e-12)


def with_adapters() -> Any:
    library = make_library()
    add_adapters(library, LoraConfig(rank=3, alpha=7), seed=0)
    return library


def with_a_hook() -> Any:
    library = make_library()
    library.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return library


def with_another_layer() -> Any:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    library = make_library()
    library.model.layers[0].mlp.up_proj = Scaled(48, 80, bias=False)
    return library


@pytest.mark.parametrize(
    "library",
    [
        make_library("qwen3"),
        make_library("gemma3_text"),
        make_library("gpt2"),
        make_library("llama", hidden_act="gelu"),
        with_adapters(),
        with_a_hook(),
        with_another_layer(),
    ],
    ids=["qwen3", "gemma3", "gpt2", "gelu", "adapters", "hook", "layer"],
)
def test_what_is_not_llamas_is_left_to_the_library(library: Any) -> None:
    assert llama.layers_of(library) is None
    packed = ragged()
    states = [Trunk(library, fused=fused).hidden(packed) for fused in (True, False)]
    assert torch.equal(*states)


def test_longer_sequences_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library, trunk = make_library(), Trunk(make_library(), fused=True)
    trunk = replace(trunk, library=library)
    calls = list[int]()

    def hidden_states(_library: Any, _layers: Any, packed: Packed) -> Tensor:
        calls.append(len(packed.id_N))
        return torch.zeros(1)

    monkeypatch.setattr(llama, "hidden_states", hidden_states)
    trunk.hidden(pack([[5] * LONGEST_BY_PRODUCTS]))
    assert len(trunk.hidden(pack([[5] * (LONGEST_BY_PRODUCTS + 1)]))) == LONGEST_BY_PRODUCTS + 1
    assert calls == [LONGEST_BY_PRODUCTS]


def test_layers_that_give_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.models import make_policy

    assert make_policy().trunk.fused
    plain = llama.scale_of
    monkeypatch.setattr(llama, "scale_of", lambda x, epsilon: 1.01 * plain(x, epsilon))
    assert not make_policy().trunk.fused
    assert "runs by the library's layers; ours differ" in caplog.text
