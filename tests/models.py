"""Tiny random models of several architectures, and a word-level tokenizer, for tests."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tastemaker.model import LanguageModel
from tastemaker.tokenizer import wrap_tokenizer

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 80}
GROUPED = SMALL | {"num_key_value_heads": 3}

# Unequal dimensions throughout: 2 layers, 6 heads, 3 key/value heads, head size 8, width 48, 80 inside.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "mistral": GROUPED | {"sliding_window": None},
    "gemma3_text": GROUPED | {"head_dim": 8},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128},
    "gpt_neox": SMALL | {"max_position_embeddings": 128},
    "opt": {
        "hidden_size": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "word_embed_proj_dim": 48,
        "max_position_embeddings": 128,
    },
}
# Architectures that packed attention refuses: soft-capped attention scores; attention outside the library's interface.
UNPACKED: dict[str, dict[str, Any]] = {
    "gemma2": GROUPED | {"head_dim": 8},
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 6},
}
VOCABULARY = 97
WORDS = [f"w{index}" for index in range(VOCABULARY - 4)]


def make_tokenizer(*, pad_is_eos: bool = False) -> Any:
    """A word-level fast tokenizer of 97 words with <bos>, <eos>, <unk> and (unless it is <eos>) <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
        chat_template=(
            "<bos>{% for m in messages %}{% if m.role == 'assistant' %} w1 {{ m.content }} <eos>"
            "{% else %} w0 {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} w1{% endif %}"
        ),
    )


def make_library(architecture: str = "llama", *, seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    """A random causal language model of the `transformers` library in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, **settings | (ARCHITECTURES | UNPACKED)[architecture] | changes)
    library = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # the library's init is so small that every token is about equally likely
        for parameter in library.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return library


def save_model(
    folder: Path, architecture: str = "llama", *, seed: int = 0, pad_is_eos: bool = False, **changes: Any
) -> Path:
    """A model folder as a user would have it."""
    if pad_is_eos:
        changes = {"pad_token_id": 2} | changes
    make_library(architecture, seed=seed, **changes).save_pretrained(str(folder))
    make_tokenizer(pad_is_eos=pad_is_eos).save_pretrained(str(folder))
    return folder


def make_policy(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random policy with its tokenizer."""
    return LanguageModel(make_library(architecture, seed=seed, **changes), wrap_tokenizer(make_tokenizer()))


def copy_policy(policy: LanguageModel) -> LanguageModel:
    """An independent policy with the same weights."""
    return LanguageModel(copy.deepcopy(policy.library), policy.tokenizer)


def random_sequences(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """Sequences of ordinary words, of these lengths."""
    generator = random.Random(seed)
    return [[generator.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]
