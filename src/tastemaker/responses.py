"""Text in, text out: a policy's responses to prompts, for labelling, evaluation and scoring.

The seed of a response is a function of the run's seed, the prompt's key and a purpose, so it does not depend on which
other prompts are sampled beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError
from tastemaker.generation import FinishReason, Generator, Rollout, Sampling
from tastemaker.model import LanguageModel
from tastemaker.records import Prompt, Response


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingConfig:
    """How responses are decoded: drawn at `temperature`, or the likeliest token each time (`greedy`)."""

    max_new_tokens: int = 256
    """Where a response is cut off."""
    temperature: float = 1.0
    """Logits are divided by it."""
    greedy: bool = False
    """Take the likeliest token each time."""
    batch_tokens: int = 16384
    """Tokens of prompt and response that are decoded together."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}, batch_tokens {self.batch_tokens}; both must be at least 1."
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0. For the likeliest token set greedy = true."
            )

    @property
    def name(self) -> str:
        return "greedy" if self.greedy else f"T={self.temperature:g}"


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
    """The same as token ids with their log-probs."""
    ids = [policy.tokenizer.prompt_ids(prompt.messages) for prompt in prompts]
    prefix_ids: list[int] = []
    if prefix:
        bos = policy.tokenizer.library.bos_token_id
        if any(row[0] == bos for row in ids) and not all(row[0] == bos for row in ids):
            raise ConfigError("some prompts begin with the beginning-of-text token and some do not")
        opens = bool(ids) and ids[0][0] == bos
        ids = [row[1:] for row in ids] if opens else ids
        prefix_ids = ([bos] if opens else []) + policy.tokenizer.response_ids(prefix, finished=False)
    generator = Generator(
        policy.library, vocabulary=policy.tokenizer.vocabulary, max_batch_tokens=decoding.batch_tokens
    )
    return generator.generate(
        ids,
        n,
        sampling_for(policy, decoding),
        [seed_for(seed, purpose, prompt.key) for prompt in prompts],
        prefix=prefix_ids,
        progress=progress,
    )


def as_response(policy: LanguageModel, rollout: Rollout) -> Response:
    """A rollout's text, without the stop token."""
    text = policy.tokenizer.response_text(rollout.response_ids)
    return Response(text=text, finished=rollout.finish is FinishReason.STOP)


def fitting_prompts(
    prompts: Sequence[Prompt], policy: LanguageModel, max_new_tokens: int
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts that leave room for a whole response in the context, and their ids. The rest is dropped loudly."""
    ids = [policy.tokenizer.prompt_ids(prompt.messages) for prompt in prompts]
    fits = [index for index, row in enumerate(ids) if len(row) + max_new_tokens <= policy.context]
    if not fits:
        raise DataError(
            f"none of the {len(prompts)} prompts leaves room for {max_new_tokens} new tokens in the model's context of "
            f"{policy.context}; give shorter prompts or lower max_new_tokens."
        )
    if len(fits) < len(prompts):
        say(f"{len(prompts) - len(fits)} of {len(prompts)} prompts are too long for the context and left out")
    return [prompts[index] for index in fits], [ids[index] for index in fits]
