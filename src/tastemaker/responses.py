"""Text in, text out: a policy's responses to prompts, for labelling, evaluation and scoring.

The seed of a response is a function of the run's seed, the prompt's key and a purpose, so it does not depend on which
other prompts are sampled beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tastemaker.checkpoint import Reader
from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError
from tastemaker.generation import FinishReason, Generator, GrowingText, Rollout, Sampling
from tastemaker.model import LanguageModel
from tastemaker.records import Prompt, Response
from tastemaker.settings import DecodingConfig as DecodingConfig
from tastemaker.settings import Precision


def seed_for(seed: int, *parts: str | int) -> int:
    """A 63-bit seed that is a hash of the run's seed and of what is sampled."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def sampling_for(policy: LanguageModel, decoding: DecodingConfig) -> Sampling:
    """The engine's settings for a policy."""
    return Sampling(
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        greedy=decoding.greedy,
        stop_token_ids=policy.tokenizer.stop_ids,
        stop_texts=decoding.stop_texts,
    )


def engine_for(policy: LanguageModel, decoding: DecodingConfig, *, precision: Precision = "float32") -> Generator:
    """The engine that decodes a policy so. `precision` holds where the decoding names none."""
    in_bf16 = (decoding.precision or precision) == "bfloat16"
    return Generator(
        policy.library,
        vocabulary=policy.tokenizer.vocabulary,
        dtype=torch.bfloat16 if in_bf16 else None,
        decode=policy.tokenizer.decode,
        max_batch_tokens=decoding.batch_tokens,
    )


def sample_responses(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    n: int,
    decoding: DecodingConfig,
    seed: int,
    purpose: str,
    prefix: str = "",
    progress: Callable[[int], None] | None = None,
) -> list[list[Response]]:
    """`n` responses to each prompt, in order.

    `prefix` is text that stands before every prompt, as a few-shot prompt does; it comes after the beginning-of-text
    token and is computed once.
    """
    rollouts = sample_rollouts(
        policy, prompts, n=n, decoding=decoding, seed=seed, purpose=purpose, prefix=prefix, progress=progress
    )
    return [[as_response(policy, rollout) for rollout in group] for group in rollouts]


def sample_rollouts(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    n: int,
    decoding: DecodingConfig,
    seed: int,
    purpose: str,
    prefix: str = "",
    progress: Callable[[int], None] | None = None,
) -> list[list[Rollout]]:
    """The same as token ids with their log-probs. What a rollout calls its prompt is the prompt without the prefix."""
    ids = [policy.tokenizer.prompt_ids(prompt.messages) for prompt in prompts]
    prefix_ids: list[int] = []
    bos, opens = policy.tokenizer.library.bos_token_id, False
    if prefix:
        if any(row[0] == bos for row in ids) and not all(row[0] == bos for row in ids):
            raise ConfigError("some prompts begin with the beginning-of-text token and some do not")
        opens = bool(ids) and ids[0][0] == bos
        ids = [row[1:] for row in ids] if opens else ids
        prefix_ids = ([bos] if opens else []) + policy.tokenizer.response_ids(prefix, finished=False)
    groups = engine_for(policy, decoding).generate(
        ids,
        n,
        sampling_for(policy, decoding),
        [seed_for(seed, purpose, prompt.key) for prompt in prompts],
        prefix=prefix_ids,
        progress=progress,
    )
    if not (prefix and opens):
        return groups
    return [[replace(one, prompt_ids=(bos, *one.prompt_ids)) for one in group] for group in groups]


def as_response(policy: LanguageModel | Reader, rollout: Rollout) -> Response:
    """A rollout's text, without the stop token or the stop text that ended it."""
    text = policy.tokenizer.response_text(rollout.response_ids)
    if rollout.stop_text is not None:
        text = text[: text.index(rollout.stop_text)]
    return Response(text=text, finished=rollout.finish is FinishReason.STOP)


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The next words of a response that is being sampled; `finished` is told with the last of them."""

    text: str
    finished: bool | None


def stream_response(
    policy: LanguageModel,
    prompt: Prompt,
    *,
    decoding: DecodingConfig,
    seed: int,
    purpose: str,
    engine: Generator | None = None,
) -> Iterator[TextPiece]:
    """The first response that `sample_responses` gives, piece by piece while it is sampled, by `engine` if given."""
    tokenizer = policy.tokenizer
    pieces = (engine or engine_for(policy, decoding)).stream(
        [tokenizer.prompt_ids(prompt.messages)],
        1,
        sampling_for(policy, decoding),
        [seed_for(seed, purpose, prompt.key)],
    )
    growing = GrowingText(tokenizer.decode, decoding.stop_texts)
    for piece in pieces:
        text = "" if piece.token in tokenizer.stop_ids else growing.add(piece.token)
        if piece.finish is None:
            if text:
                yield TextPiece(text, None)
        else:
            yield TextPiece(text + growing.rest(), piece.finish is FinishReason.STOP)


def fitting_prompts(
    prompts: Sequence[Prompt], policy: LanguageModel, max_new_tokens: int
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts that leave room for a whole response in the context, and their ids. The rest is dropped loudly."""
    ids = [policy.tokenizer.prompt_ids(prompt.messages) for prompt in prompts]
    fits = _fitting(ids, policy, new_tokens=max_new_tokens, prefix_tokens=0, what="prompts")
    return [prompts[index] for index in fits], [ids[index] for index in fits]


def leaving_room(
    prompts: Sequence[Prompt],
    reader: LanguageModel | Reader,
    *,
    new_tokens: int,
    prefix_tokens: int = 0,
    what: str = "prompts",
) -> list[Prompt]:
    """The prompts that leave room for so many tokens of response, and of a prefix, in a context; as loudly."""
    if not prompts:
        return []
    ids = [reader.tokenizer.prompt_ids(prompt.messages) for prompt in prompts]
    fits = _fitting(ids, reader, new_tokens=new_tokens, prefix_tokens=prefix_tokens, what=what)
    return [prompts[index] for index in fits]


def leaves_room(length: int, reader: LanguageModel | Reader, new_tokens: int) -> bool:
    """Whether a whole response fits behind so many tokens."""
    return length + new_tokens <= reader.context


def check_room(prompts: Sequence[Prompt], reader: Reader, new_tokens: int, policy: str) -> None:
    """Refuse prompts that leave no room for a whole response in a policy's context."""
    for prompt in prompts:
        length = len(reader.tokenizer.prompt_ids(prompt.messages))
        if not leaves_room(length, reader, new_tokens):
            raise DataError(
                f"prompt {prompt.key!r} has {length} tokens; with {new_tokens} new tokens that does not fit into the "
                f"context of {reader.context} of the policy {policy!r}. Leave it out, or lower --max-new-tokens."
            )


def _fitting(
    ids: Sequence[Sequence[int]], reader: LanguageModel | Reader, *, new_tokens: int, prefix_tokens: int, what: str
) -> list[int]:
    """The indices of those that fit."""
    fits = [index for index, row in enumerate(ids) if leaves_room(prefix_tokens + len(row), reader, new_tokens)]
    before = f" behind a prefix of {prefix_tokens}" if prefix_tokens else ""
    if not fits:
        raise DataError(
            f"none of the {len(ids)} {what} leaves room for {new_tokens} new tokens{before} in the model's context of "
            f"{reader.context}; give shorter prompts or lower max_new_tokens."
        )
    if len(fits) < len(ids):
        say(
            f"  {len(ids) - len(fits)} of {len(ids)} {what} are left out: with {new_tokens} new tokens{before} they do "
            f"not fit into the model's context of {reader.context}"
        )
    return fits
