"""What the engine hands back: one response with everything a trainer needs to use it unchanged.

A trainer consumes exactly these token ids; nothing is decoded to text and encoded again on the way, and lengths are
carried rather than guessed from padding ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a response ended: the model sampled a stop token or wrote a stop text, or `max_new_tokens` cut it off."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    `response_ids` ends in the stop token, or in the token that completed a stop text, exactly when `finish` is STOP: no
    token is in it that was not sampled.
    `logprobs[t]` is the fp32 log-probability of `response_ids[t]` under the law it was drawn from (temperature, top-k
    and top-p applied, ids beyond the vocabulary excluded); for greedy decoding, under the untempered softmax.
    `prompt_ids` leaves out the shared prefix, if one was given. `stop_text` is the text that ended the response, if one
    did; it stands in the text of `response_ids` but is no part of the response.
    """

    prompt_ids: tuple[int, ...]
    response_ids: list[int]
    logprobs: list[float]
    finish: FinishReason
    weights_version: int
    stop_text: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """The next token of a response that is being sampled: of which prompt's, and which of its responses.

    `finish` says why the response ends with this token, if it does.
    """

    prompt: int
    response: int
    token: int
    logprob: float
    finish: FinishReason | None
