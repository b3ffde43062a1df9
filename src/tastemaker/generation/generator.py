"""The rollout engine: n responses to each prompt, in large batches, the same whatever the batches are.

It samples the rollouts of the paper's RL stage (section 3.5) and every response that people or reward models compare,
and knows nothing of either. Prompts are sorted by length and decoded in batches under a token budget; each prompt is
read once and its cache repeated for its n responses; rows that have finished are dropped along the way.

Response j of prompt i depends on the weights, the prompt, the sampling law, seeds[i] and j alone. Batches change a
logit by rounding only (about 1e-7), which changes a token when its random number falls into a gap of that width.

Dimensions: U distinct prompts, B rows (responses being decoded), T steps, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tastemaker.errors import ConfigError, ModelError
from tastemaker.generation.batches import Request, Row, plan_batches
from tastemaker.generation.decoding import Decoding, Path, choose_path, longest_fast_sequence
from tastemaker.generation.rollout import FinishReason, Rollout
from tastemaker.generation.sampling import Sampling, choose, draw_uniforms

log = logging.getLogger(__name__)

Progress = Callable[[int], None]


class Generator:
    """Samples responses from a causal language model.

    The model is used in place, on its device and in its dtype: train it further and the next call samples from the new
    weights (`load_weights` stamps their version). Give the engine a copy of its own, and `load_weights` copies.

    `vocabulary` is the tokenizer's size: ids at or beyond it are never sampled, although the model may have logits for
    them. `max_batch_tokens` bounds rows times sequence length of a batch, and with it the cache. `compact_share` is the
    share of a batch that must have finished before its finished rows are dropped (1 keeps them to the end).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocabulary: int,
        weights_version: int = 0,
        max_batch_tokens: int = 32_768,
        compact_share: float = 0.25,
    ) -> None:
        outputs = model.config.vocab_size
        if not 1 <= vocabulary <= outputs:
            raise ModelError(
                f"The tokenizer has {vocabulary} tokens and {type(model).__name__} has logits for {outputs}. Each "
                "token needs one: resize the model's embeddings, or use the tokenizer that it was trained with."
            )
        if max_batch_tokens < 1 or not 0 < compact_share <= 1:
            raise ConfigError(
                f"max_batch_tokens is {max_batch_tokens} and compact_share is {compact_share}; "
                "the first must be 1 or more, the second above 0 and at most 1."
            )
        self._model, self._vocabulary, self._version = model, vocabulary, weights_version
        self._max_batch_tokens, self._compact_share = max_batch_tokens, compact_share
        with torch.no_grad(), _evaluating(model):
            self._path = choose_path(model)

    @property
    def weights_version(self) -> int:
        """The version that rollouts are stamped with."""
        return self._version

    def load_weights(self, model: PreTrainedModel, version: int) -> None:
        """Sample from `model`'s weights from now on. Copies them (into this engine's dtype) unless it is this model."""
        if model is not self._model:
            try:
                self._model.load_state_dict(model.state_dict())
            except RuntimeError as error:
                raise ModelError(
                    f"The weights do not fit the model that generates. Give a model of the same architecture. {error}"
                ) from error
        self._version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        prefix: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Rollout]]:
        """Sample n responses to each prompt, in the order of the prompts. `seeds[i]` belongs to prompt i.

        `prefix` (a few-shot text, say) stands before every prompt and is read once. `progress` is told how many
        responses have finished since it was last told.
        """
        request = Request(
            prompts=tuple(tuple(prompt) for prompt in prompts),
            n=n,
            sampling=sampling,
            seeds=tuple(seeds),
            prefix=tuple(prefix),
        )
        request.check(self._model, self._vocabulary)
        path = self._path_for(request)
        rollouts: dict[Row, Rollout] = {}
        with torch.no_grad(), _evaluating(self._model), path.attention(self._model):
            start = path.starter(self._model, new_tokens=sampling.max_new_tokens, prefix=request.prefix)
            for rows in plan_batches(request, self._max_batch_tokens, mixed_lengths=path.padding):
                found = self._decode(start(), rows, request, progress or _untold)
                rollouts.update(zip(rows, found, strict=True))
        return [[rollouts[Row(prompt, response)] for response in range(n)] for prompt in range(len(prompts))]

    def _path_for(self, request: Request) -> Path:
        limit = longest_fast_sequence(self._model)
        if not self._path.fast or limit is None or request.longest <= limit:
            return self._path
        log.warning(
            "Sequences may reach %d tokens and some layers see only %d: they are decoded by the slower library path.",
            request.longest,
            limit,
        )
        return Path(fast=False, padding=True)

    def _decode(self, decoding: Decoding, rows: list[Row], request: Request, progress: Progress) -> Iterator[Rollout]:
        """Decode one batch: read its prompts, go on with a row for each response, sample until all have finished."""
        sampling = request.sampling
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        logit_UV = decoding.prefill([request.prompts[prompt] for prompt in distinct])
        rows_B = torch.tensor([distinct[row.prompt] for row in rows], device=logit_UV.device)
        decoding.branch(rows_B)
        uniforms = draw_uniforms(
            [request.seeds[row.prompt] for row in rows], [row.response for row in rows], sampling.max_new_tokens
        )
        ids_TB, logprob_TB = self._sample(
            decoding, logit_UV[rows_B], torch.from_numpy(uniforms).to(logit_UV.device), sampling, progress
        )
        if not logprob_TB.isfinite().all():
            raise ModelError(
                f"{type(self._model).__name__} gives logits that are not finite, so nothing can be sampled from it. "
                "Training may have diverged: go back to an earlier checkpoint."
            )
        ids, logprobs = ids_TB.T.tolist(), logprob_TB.T.tolist()
        lengths = first_stops(ids_TB, sampling.stop_token_ids).tolist()
        for place, row in enumerate(rows):
            length = lengths[place]
            yield Rollout(
                request.prompts[row.prompt],
                ids[place][:length],
                logprobs[place][:length],
                FinishReason.STOP if ids[place][length - 1] in sampling.stop_token_ids else FinishReason.LENGTH,
                self._version,
            )

    def _sample(
        self, decoding: Decoding, logit_BV: Tensor, uniform_TB: Tensor, sampling: Sampling, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Sample until every row has a stop token or the steps are used up: ids and log-probs, `[T, B]`.

        Rows go on after their stop token until the batch is compacted; what they sample there is to be cut off.
        """
        rows, device = len(logit_BV), logit_BV.device
        ids_TB, logprob_TB = torch.zeros_like(uniform_TB, dtype=torch.long), torch.zeros_like(uniform_TB)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        live_B = torch.arange(rows, device=device)  # the columns of the rows that `decoding` still holds
        stopped_B = torch.zeros_like(live_B, dtype=torch.bool)
        told = 0
        for step in range(sampling.max_new_tokens):
            token_B, logprob_B = choose(logit_BV[:, : self._vocabulary], uniform_TB[step, live_B], sampling)
            ids_TB[step, live_B], logprob_TB[step, live_B] = token_B, logprob_B
            stopped_B |= (token_B[:, None] == stop_ids).any(dim=1)
            stopped, live = int(stopped_B.sum()), len(live_B)
            last = stopped == live or step + 1 == sampling.max_new_tokens
            finished = rows if last else rows - live + stopped
            if finished > told:
                progress(finished - told)
                told = finished
            if last:
                break
            if stopped >= self._compact_share * live:
                going_on = (~stopped_B).nonzero()[:, 0]
                decoding.keep(going_on)
                live_B, token_B, stopped_B = live_B[going_on], token_B[going_on], stopped_B[going_on]
            logit_BV = decoding.step(token_B)
        return ids_TB[: step + 1], logprob_TB[: step + 1]


def first_stops(ids_TB: Tensor, stop_token_ids: tuple[int, ...]) -> Tensor:
    """The number of tokens of each row up to and with its first stop token, or of all where there is none."""
    is_stop_TB = torch.isin(ids_TB, ids_TB.new_tensor(stop_token_ids))
    before_TB = is_stop_TB.cumsum(dim=0) == 0
    return (before_TB.sum(dim=0) + 1).clamp_(max=len(ids_TB))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode (dropout off) inside the block, and each in its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _untold(_finished: int) -> None:
    """Progress that nobody asked for."""
