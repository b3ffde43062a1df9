"""What models say, restated in float64: the library alone, one sequence at a time, without packing, chunks or cache.

Dimensions in names: T tokens of one sequence, V vocabulary, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tastemaker.model import RewardModel

Floats = NDArray[np.float64]


@torch.no_grad()
def response_logprobs(
    library: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], *, temperature: float = 1.0
) -> Floats:
    """The log-prob of every response token after what stands before it."""
    logits_TV = copy.deepcopy(library).double()(input_ids=_row(prompt_ids, response_ids), use_cache=False).logits[0]
    logprob_TV = (logits_TV / temperature).log_softmax(-1).numpy()
    first = len(prompt_ids) - 1
    return np.array([logprob_TV[first + place, token] for place, token in enumerate(response_ids)])


@torch.no_grad()
def response_values(model: RewardModel, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Floats:
    """The value of every state in which a response token was chosen: the first is that of the prompt alone."""
    library = copy.deepcopy(model.library).double()
    hidden_TD = library.base_model(input_ids=_row(prompt_ids, response_ids), use_cache=False).last_hidden_state[0]
    value_T = (hidden_TD @ library.score.weight[0]).numpy() - float(model.offset)
    return np.array(value_T[len(prompt_ids) - 1 : -1])


def score(model: RewardModel, ids: Sequence[int]) -> float:
    """The score of a whole sequence, read at its last token."""
    return float(response_values(model, ids, [0])[0])


def _row(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([[*prompt_ids, *response_ids]])
