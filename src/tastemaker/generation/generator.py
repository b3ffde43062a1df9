"""The rollout engine: n responses to each prompt, in large batches, the same whatever the batches are.

It samples the rollouts of the paper's RL stage (section 3.5) and every response that people or reward models compare,
and knows nothing of either. Prompts are sorted by length and decoded together under a token budget; each prompt is
read once and its cache repeated for its n responses; rows that have finished make room for rows that wait.

Response j of prompt i depends on the weights, the prompt, the sampling law, seeds[i] and j alone. Batches change a
log-prob by rounding only (5e-7 on average), which changes a token when its random number falls into such a gap.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from tastemaker.errors import ConfigError, ModelError
from tastemaker.generation.batches import Request, Row, plan_pools
from tastemaker.generation.decoding import Path, choose_path, longest_fast_sequence
from tastemaker.generation.llama import CopiedWeights, LlamaForward
from tastemaker.generation.pool import Decoder, Growing
from tastemaker.generation.rollout import Piece, Rollout
from tastemaker.generation.sampling import Sampling
from tastemaker.generation.text import Decode

log = logging.getLogger(__name__)

Progress = Callable[[int], None]


class Generator:
    """Samples responses from a causal language model.

    The model is used in place, on its device: train it further and the next call samples from the new weights
    (`load_weights` stamps their version). With a `dtype` that is not the model's, the engine has a copy of its own with
    weights in that dtype, and `load_weights` copies new ones into it.

    `vocabulary` is the tokenizer's size: ids at or beyond it are never sampled, although the model may have logits for
    them. `decode` gives the text of ids, and is needed for stop texts. `max_batch_tokens` bounds rows times sequence
    length of what is decoded together, and with it the cache. `drop_share` is the share of rows that must have finished
    before they are dropped and waiting ones take their places (1: all).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocabulary: int,
        dtype: torch.dtype | None = None,
        decode: Decode | None = None,
        weights_version: int = 0,
        max_batch_tokens: int = 32_768,
        drop_share: float = 0.25,
    ) -> None:
        outputs = model.config.get_text_config().vocab_size
        if not 1 <= vocabulary <= outputs:
            raise ModelError(
                f"The tokenizer has {vocabulary} tokens and {type(model).__name__} has logits for {outputs}. Each "
                "token needs one: resize the model's embeddings, or use the tokenizer that it was trained with."
            )
        if max_batch_tokens < 1 or not 0 < drop_share <= 1:
            raise ConfigError(
                f"max_batch_tokens is {max_batch_tokens} and drop_share is {drop_share}; "
                "the first must be 1 or more, the second above 0 and at most 1."
            )
        self._vocabulary, self._decode, self._version = vocabulary, decode, weights_version
        self._max_batch_tokens, self._drop_share = max_batch_tokens, drop_share
        self._copy: CopiedWeights | None = None
        self._model, self._path = self._prepare(model, dtype)

    def _prepare(self, model: PreTrainedModel, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Path]:
        """The model whose modules may run, and the way that it is decoded. Weights of its own lie in either."""
        with torch.no_grad(), _evaluating(model):
            path = choose_path(model)
            if dtype in (None, model.dtype):
                return model, path
            if path.forward is not None and longest_fast_sequence(model) is None:
                self._copy = CopiedWeights(model, dtype)
                return model, replace(path, forward=LlamaForward(model, self._copy))
        own = _copy_in(dtype, model)
        with torch.no_grad(), _evaluating(own):
            return own, choose_path(own)

    @property
    def weights_version(self) -> int:
        """The version that rollouts are stamped with."""
        return self._version

    def load_weights(self, model: PreTrainedModel, version: int) -> None:
        """Sample from `model`'s weights from now on. Copies them (into this engine's dtype) unless it is this model."""
        if self._copy is not None:
            self._copy.load(model)
        elif model is not self._model:
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
        request = self._request(prompts, n, sampling, seeds, prefix)
        path = self._path_for(request)
        rollouts: dict[Row, Rollout] = {}
        with self._decoding_by(path):
            for decoder in self._decoders(request, path):
                while not decoder.done:
                    finished = [self._rollout(one, request) for one in decoder.advance() if one.finish is not None]
                    rollouts.update(finished)
                    if finished and progress is not None:
                        progress(len(finished))
        return [[rollouts[Row(prompt, response)] for response in range(n)] for prompt in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        prefix: Sequence[int] = (),
    ) -> Iterator[Piece]:
        """What `generate` samples, token by token as it is sampled. Leave the weights alone until it has ended."""
        request = self._request(
            prompts, n, sampling, seeds, prefix
        )  # checked now, not when the first token is asked for
        return self._pieces(request, self._path_for(request))

    def _pieces(self, request: Request, path: Path) -> Iterator[Piece]:
        # Between two steps the model is as its owner left it, since nobody knows when the next piece is asked for.
        with self._decoding_by(path):
            decoders = list(self._decoders(request, path))
        for decoder in decoders:
            while not decoder.done:
                with self._decoding_by(path):
                    grown = decoder.advance()
                for one in grown:
                    yield Piece(one.row.prompt, one.row.response, one.ids[-1], one.logprobs[-1], one.finish)

    def _request(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int], prefix: Sequence[int]
    ) -> Request:
        request = Request(
            prompts=tuple(tuple(prompt) for prompt in prompts),
            n=n,
            sampling=sampling,
            seeds=tuple(seeds),
            prefix=tuple(prefix),
        )
        request.check(self._model, self._vocabulary)
        if sampling.stop_texts and self._decode is None:
            raise ConfigError(
                f"The stop texts {', '.join(map(repr, sampling.stop_texts))} are looked for in text, and this engine "
                "knows ids only. Give it `decode`, or leave them out."
            )
        return request

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

    @contextmanager
    def _decoding_by(self, path: Path) -> Iterator[None]:
        with torch.no_grad(), _evaluating(self._model), path.attention(self._model):
            yield

    def _decoders(self, request: Request, path: Path) -> Iterator[Decoder]:
        """One for each pool of responses, in the order in which they are to run."""
        start = path.starter(self._model, new_tokens=request.sampling.max_new_tokens, prefix=request.prefix)
        pools = plan_pools(request, self._max_batch_tokens, mixed_lengths=path.padding, refilled=path.fast)
        for pool in pools:
            yield Decoder(
                pool,
                request,
                start,
                vocabulary=self._vocabulary,
                drop_share=self._drop_share,
                decode=self._decode,
            )

    def _rollout(self, one: Growing, request: Request) -> tuple[Row, Rollout]:
        assert one.finish is not None
        prompt = request.prompts[one.row.prompt]
        return one.row, Rollout(prompt, one.ids, one.logprobs, one.finish, self._version, one.stop_text)


def _copy_in(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its parameters in `dtype`, shared ones shared; buffers keep their precision.

    Adapters (LoRA) are copied as adapters: added to weights in bf16, small updates would be rounded away.
    """
    with torch.no_grad():
        weights = {
            id(parameter): nn.Parameter(parameter.to(dtype), requires_grad=False) for parameter in model.parameters()
        }
    return copy.deepcopy(model, weights)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode (dropout off) inside the block, and each in its own mode again after it.

    Layers that are compiled for training run as they are written: decoding has other shapes at every token.
    """
    modes = [(module, module.training) for module in model.modules()]
    compiled = [(module, call) for module, _ in modes if (call := module._compiled_call_impl) is not None]
    model.eval()
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, call in compiled:
            module._compiled_call_impl = call
