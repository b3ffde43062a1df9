"""What is asked of the engine, whether it can be done, and which responses are decoded with one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from tastemaker.errors import ConfigError, DataError
from tastemaker.generation.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Row:
    """One response to be decoded: which prompt it answers, and which of that prompt's responses it is."""

    prompt: int
    response: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of the engine."""

    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: Sampling
    seeds: tuple[int, ...]
    prefix: tuple[int, ...]

    @property
    def tokens_beside(self) -> int:
        """The tokens that every sequence may have besides its prompt."""
        return len(self.prefix) + self.sampling.max_new_tokens

    @property
    def longest(self) -> int:
        """The most tokens that a sequence can come to."""
        return max((len(prompt) for prompt in self.prompts), default=0) + self.tokens_beside

    def check(self, model: PreTrainedModel, vocabulary: int) -> None:
        """Refuse what cannot be decoded, before anything is."""
        if self.n < 1:
            raise ConfigError(f"{self.n} responses to each prompt were asked for; ask for 1 or more.")
        if len(self.seeds) != len(self.prompts):
            raise ConfigError(f"There are {len(self.prompts)} prompts and {len(self.seeds)} seeds; give one for each.")
        unknown = sorted(token for token in self.sampling.stop_token_ids if not 0 <= token < vocabulary)
        if unknown:
            raise ConfigError(
                f"Stop tokens {unknown} are never sampled: the vocabulary has the ids 0 to {vocabulary - 1}."
            )
        embeddings = model.config.get_text_config().vocab_size
        for name, ids in (("The prefix", self.prefix), *((f"Prompt {i}", ids) for i, ids in enumerate(self.prompts))):
            if ids and not 0 <= min(ids) <= max(ids) < embeddings:
                raise DataError(f"{name} has ids from {min(ids)} to {max(ids)}; the model knows 0 to {embeddings - 1}.")
        empty = [i for i, prompt in enumerate(self.prompts) if not prompt]
        if empty:
            raise DataError(
                f"Prompt {empty[0]} is empty, so there is nothing to continue. "
                "A prompt has at least one token; a start token will do."
            )
        self._check_length(model)

    def _check_length(self, model: PreTrainedModel) -> None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not self.prompts or not isinstance(context, int) or self.longest <= context:
            return
        length, place = max((len(prompt), -i) for i, prompt in enumerate(self.prompts))
        parts = f"its {length} tokens" + (f", the prefix of {len(self.prefix)}" if self.prefix else "")
        raise DataError(
            f"Prompt {-place} is too long: {parts} and max_new_tokens = {self.sampling.max_new_tokens} come to "
            f"{self.longest}, and the model's context holds {context}. Shorten the prompt or lower max_new_tokens."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Responses that are decoded with one another, at most `room` of them at a time."""

    rows: tuple[Row, ...]
    room: int


# Shorter prompts leave the budget room for more rows. So much more makes a pool of their own worth the sparse end of
# the pool before it.
WIDER = 1.25


def plan_pools(request: Request, max_batch_tokens: int, *, mixed_lengths: bool, refilled: bool) -> Iterator[Pool]:
    """Every response once, longest prompts first, with room for `max_batch_tokens` (but for one row at least).

    Where places are `refilled`, a pool goes on until prompts are much shorter than those that it began with; elsewhere
    it has no more rows than room. Similar lengths stand together, which keeps padding short; without `mixed_lengths`
    only equal ones do.
    """
    lengths = [len(prompt) for prompt in request.prompts]
    pool: list[Row] = []
    room = 0
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        own_room = max(1, max_batch_tokens // (lengths[prompt] + request.tokens_beside))
        for response in range(request.n):
            full = len(pool) >= room and (not refilled or own_room > WIDER * room)
            new_length = pool and lengths[prompt] != lengths[pool[0].prompt] and not mixed_lengths
            if full or new_length:
                if pool:
                    yield Pool(rows=tuple(pool), room=room)
                pool, room = [], own_room
            pool.append(Row(prompt, response))
    if pool:
        yield Pool(rows=tuple(pool), room=room)
