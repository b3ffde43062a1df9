"""Responses being decoded, a token at a time, and those that wait for a place among them (continuous batching).

A step costs little less for one row than for thirty, so a batch that empties wastes most of its time. Once enough rows
have finished they are dropped, and waiting ones take their places: their prompts are read as a batch of their own,
which then joins the rows that go on. A response's random numbers are its own, so what stands beside it plays no part.

Dimensions: U distinct prompts, B rows being decoded (finished ones included until they are dropped), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tastemaker.errors import ModelError
from tastemaker.generation.batches import Pool, Request, Row
from tastemaker.generation.decoding import Decoding
from tastemaker.generation.rollout import FinishReason
from tastemaker.generation.sampling import Sampling, choose, draw_uniforms
from tastemaker.generation.text import Decode, GrowingText
from tastemaker.packing import sent_to

# Columns that a batch may walk on before its cache has to be moved. Moving it costs as much as a few steps' attention.
SPARE_COLUMNS = 64


class Growing:
    """A response as far as it has been sampled."""

    __slots__ = ("finish", "ids", "logprobs", "numbers", "row", "text")

    def __init__(self, row: Row, numbers: Sequence[float], text: GrowingText | None) -> None:
        self.row, self.numbers, self.text = row, iter(numbers), text
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None

    @property
    def stop_text(self) -> str | None:
        return None if self.text is None else self.text.stopped_by

    def take(self, token: int, logprob: float, sampling: Sampling) -> None:
        """Take the next token, and see whether it is the last."""
        if not math.isfinite(logprob):
            raise ModelError(
                "The model gives logits that are not finite, so nothing can be sampled from it. "
                "Training may have diverged: go back to an earlier checkpoint.",
                finding="not-finite",
            )
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in sampling.stop_token_ids or self._completes_stop_text(token):
            self.finish = FinishReason.STOP
        elif len(self.ids) == sampling.max_new_tokens:
            self.finish = FinishReason.LENGTH

    def _completes_stop_text(self, token: int) -> bool:
        if self.text is None:
            return False
        self.text.add(token)
        return self.text.stopped_by is not None


class Decoder:
    """Decodes the responses of a pool; `advance` until `done`.

    `start` starts a batch with so many spare columns. Finished rows are dropped once they are `drop_share` of all.
    `decode` is needed where there are stop texts.
    """

    def __init__(
        self,
        pool: Pool,
        request: Request,
        start: Callable[[int], Decoding],
        *,
        vocabulary: int,
        drop_share: float,
        decode: Decode | None,
    ) -> None:
        self._waiting, self._room, self._request, self._start = list(pool.rows), pool.room, request, start
        self._vocabulary, self._drop_share, self._decode = vocabulary, drop_share, decode
        self._live: list[Growing] = []  # one for each row of the batch
        self._decoding: Decoding
        self._token_B: Tensor  # what was drawn last for each

    @property
    def done(self) -> bool:
        return not self._waiting and all(one.finish is not None for one in self._live)

    def advance(self) -> list[Growing]:
        """Sample the next token of every response that is being decoded. Returns these responses."""
        grown: list[Growing] = []
        if self._live:
            grown = [one for one in self._live if one.finish is None]
            self._token_B = self._sample(self._live, self._decoding.step(self._token_B))
        while not self.done and self._should_drop():
            self._drop_finished()
            grown += self._admit()
        return grown

    def _should_drop(self) -> bool:
        finished = sum(one.finish is not None for one in self._live)
        return finished >= self._drop_share * len(self._live) or self._decoding.full

    def _drop_finished(self) -> None:
        going_on = [place for place, one in enumerate(self._live) if one.finish is None]
        self._live = [self._live[place] for place in going_on]
        if going_on:
            place_B = torch.tensor(going_on, device=self._token_B.device)
            self._decoding.keep(place_B)
            self._token_B = self._token_B[place_B]

    def _admit(self) -> list[Growing]:
        """Let waiting rows take the free places: read their prompts, each once, and sample their first tokens."""
        free = self._room - len(self._live)
        rows, self._waiting = self._waiting[:free], self._waiting[free:]
        if not rows:
            return []
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        batch = self._start(SPARE_COLUMNS if self._waiting else 0)
        logit_UV = batch.prefill([self._request.prompts[prompt] for prompt in distinct])
        place_B = torch.tensor([distinct[row.prompt] for row in rows], device=logit_UV.device)
        admitted = self._growing(rows)
        token_B = self._sample(admitted, logit_UV[place_B])
        if self._live:
            self._decoding.join(batch, place_B)
            token_B = torch.cat([self._token_B, token_B])
        else:
            batch.branch(place_B)
            self._decoding = batch
        self._live, self._token_B = self._live + admitted, token_B
        return admitted

    def _growing(self, rows: Sequence[Row]) -> list[Growing]:
        request, sampling = self._request, self._request.sampling
        seeds, responses = [request.seeds[row.prompt] for row in rows], [row.response for row in rows]
        numbers = draw_uniforms(seeds, responses, sampling.max_new_tokens).T.tolist()
        texts = (
            GrowingText(self._decode, sampling.stop_texts) if self._decode and sampling.stop_texts else None
            for _ in rows
        )
        return [Growing(*parts) for parts in zip(rows, numbers, texts, strict=True)]

    def _sample(self, responses: Sequence[Growing], logit_BV: Tensor) -> Tensor:
        """Draw the next token of each response; one that has finished goes on to be drawn, for nobody."""
        sampling = self._request.sampling
        numbers = [next(one.numbers, 0.5) for one in responses]
        uniform_B = sent_to(logit_BV.device, torch.tensor(numbers, dtype=torch.float32))
        token_B, logprob_B = choose(logit_BV[:, : self._vocabulary], uniform_B, sampling)
        found_2B = torch.stack([token_B.double(), logprob_B.double()])  # both exactly, and waited for once
        for one, token, logprob in zip(responses, *found_2B.tolist(), strict=True):
            if one.finish is None:
                one.take(int(token), logprob, sampling)
        return token_B
