"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by the `peft` library, injected into the model's own modules.

The reference policy is the same model with the adapters off, so it costs no second copy. Saved models have the adapters
merged in and load like any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tastemaker.errors import ModelError
from tastemaker.settings import LoraConfig as LoraConfig

ADAPTER = "default"


def add_adapters(library: Any, config: LoraConfig, *, seed: int) -> None:
    """Inject trainable adapters into `library` and freeze everything else. The model's outputs do not change yet."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModelError("LoRA needs the peft package: pip install 'tastemaker[lora]'.") from error
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=None if config.targets is None else list(config.targets),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Merged weights are saved apart, so a head that was tied to the embedding keeps what its adapter learned.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds GPT-2's transposed layers by itself
        try:
            peft.inject_adapter_in_model(settings, library, adapter_name=ADAPTER)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, part in library.named_modules() if _is_linear(part)})
            raise ModelError(
                f"adapters cannot be added to {library.config.model_type}: {error} Set lora.targets to some of "
                f"{', '.join(names)}."
            ) from error


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's transposed linear layer


@contextmanager
def adapters_off(library: Any) -> Iterator[None]:
    """The model as it was before `add_adapters`, within the block."""
    layers = adapter_layers(library)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def adapter_layers(library: Any) -> dict[str, Any]:
    """The injected layers by name; empty for a model without adapters."""
    return {name: module for name, module in library.named_modules() if hasattr(module, "lora_A")}


def merged_state(library: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain architecture: adapters merged, `weights` in place of the parameters they name."""
    kept = {name: parameter.detach().clone() for name, parameter in library.named_parameters() if name in weights}
    tied = _further_names(library)
    _assign(library, weights)
    try:
        layers = adapter_layers(library)
        if not layers:
            return {name: one.detach().clone() for name, one in library.state_dict().items() if name not in tied}
        state = {}
        for name, tensor in library.state_dict().items():
            owner, _, rest = name.rpartition(".base_layer.")
            if ".lora_" in name or (name in tied and not owner):
                continue
            merged = tensor.detach().clone()
            if owner and rest == "weight":
                merged += layers[owner].get_delta_weight(ADAPTER).to(merged.dtype)
            state[f"{owner}.{rest}" if owner else name] = merged
        return state
    finally:
        _assign(library, kept)


def _further_names(library: Any) -> set[str]:
    """The names of tied weights but the first of each: the library ties them again when it loads the model.

    Not where the first has adapters: what it is merged with is its own, and the others are to stay as they are.
    """
    first = {id(weight): name for name, weight in library.named_parameters()}
    every = library.named_parameters(remove_duplicate=False)
    return {name for name, weight in every if name != first[id(weight)] and ".base_layer." not in first[id(weight)]}


def _assign(library: Any, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(library.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
