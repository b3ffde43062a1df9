"""A model whose every probability is known: the next token hangs on the last one alone, by a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tests.models import make_library, make_tokenizer

Table = Mapping[int, Mapping[int, float]]
"""After which token, which token has what probability."""

WIDTH = 48
IMPOSSIBLE = -30.0  # the logit of every token that a row does not name: 97 of them have a probability of 1e-11


def save_bigrams(folder: Path, table: Table) -> str:
    """A model folder. Attention and what is between give nothing, so a token's hidden state is its own direction."""
    library = make_library(max_position_embeddings=64, rms_norm_eps=1e-12)
    with torch.no_grad():
        for layer in library.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        library.model.embed_tokens.weight.zero_()
        library.lm_head.weight.zero_()
        for direction, token in enumerate(table):
            library.model.embed_tokens.weight[token, direction] = 1
    set_bigrams(library, table)
    library.save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return str(folder)


@torch.no_grad()
def set_bigrams(library: Any, table: Table) -> None:
    """Other probabilities after the same tokens, in the same order.

    The last norm brings a direction of length 1 to the length sqrt(48), which is divided out here.
    """
    for direction, following in enumerate(table.values()):
        column_V = library.lm_head.weight[:, direction].fill_(IMPOSSIBLE)
        for token, probability in following.items():
            column_V[token] = math.log(probability)
        column_V /= math.sqrt(WIDTH)


@torch.no_grad()
def set_values(library: Any, value_of: Mapping[int, float]) -> None:
    """The same of a scalar head: what the model says after each token, in the order of the table."""
    library.score.weight.zero_()
    for direction, value in enumerate(value_of.values()):
        library.score.weight[0, direction] = value / math.sqrt(WIDTH)
