"""Who takes part in an evaluation, and their responses.

A contestant is a model, a model with a few-shot prefix, or best-of-n sampling against the reward model (the baseline
policy of Stiennon et al.). The few-shot prefix of a base model is the best of many by score on validation
prompts, as the paper's was (section 3.5), so that the comparison is with a base at its best.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tastemaker.console import progress, say, through
from tastemaker.errors import ConfigError, DataError
from tastemaker.generation import Rollout
from tastemaker.metrics import KL_ROUNDING, KL_SURPRISE
from tastemaker.model import LanguageModel
from tastemaker.packing import microbatches, pack
from tastemaker.ranges import check_range
from tastemaker.records import Demonstration, Prompt, Response
from tastemaker.responses import DecodingConfig, as_response, leaving_room, sample_responses, sample_rollouts
from tastemaker.scoring import Scorer
from tastemaker.statistics import best_of_n_kl
from tastemaker.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShot:
    """A prefix of worked examples: the best of `candidates` random sets of `shots`, by the reward model's score."""

    source: str | None = None
    """A file, dataset or Python function of demonstrations to draw from; None: the training demonstrations. Those of
    several turns are left out."""
    template: str
    """One worked example, as it stands in the prefix. The prompt that follows is written by the model's chat template,
    so a base is met at its best in the same form."""
    shots: int = 6
    """Worked examples in a prefix."""
    candidates: int = 20
    """Prefixes that are tried."""
    prompts: int = 64
    """Validation prompts on which the candidates are compared."""

    def __post_init__(self) -> None:
        check_range(self, "shots", "candidates", "prompts", least=1)
        try:
            self.template.format(prompt="", response="")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"template {self.template!r} cannot be filled in: write {{prompt}} and {{response}} where they go, and "
                "other braces twice."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One policy in the evaluation."""

    model: str
    """A variant of this run ("sft/baseline", "policy/ppo-ptx", "policy/ppo-ptx:ema"), a model folder or a hub name."""
    stop_texts: tuple[str, ...] = ()
    """Further tokens that end a response, such as a base model's mark of the next question."""
    few_shot: FewShot | None = None
    """Worked examples before every prompt."""
    best_of: int | None = None
    """Sample this many responses and keep the one that scores highest."""
    reference: str | None = None
    """The model that the KL divergence is measured from, named as `model` is; it must read the same tokens."""

    def __post_init__(self) -> None:
        check_range(self, "best_of", least=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A contestant ready to respond: its loaded model, its prefix, and the reference for its KL."""

    contestant: Contestant
    policy: LanguageModel
    prefix: str = ""
    reference: LanguageModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A contestant's responses to all prompts under one decoding, with what the model itself knows about them."""

    responses: tuple[Response, ...]
    num_tokens: tuple[int, ...]
    logprob: tuple[float, ...] | None
    """log pi summed over each response; None where the responses are no plain samples."""
    kl: tuple[float, ...] | None
    """log pi - log pi_ref summed over each response; None without a reference."""
    reference_logprob: tuple[float, ...] | None = None
    """log pi_ref summed over each response; None without a reference."""

    @property
    def entropy(self) -> float | None:
        """Nats a token, estimated by -log p of the sampled tokens."""
        return None if self.logprob is None else -sum(self.logprob) / sum(self.num_tokens)

    def rows(self) -> list[dict[str, Any]]:
        """Response by response, as they are kept."""
        return [
            {
                "text": response.text,
                "finished": response.finished,
                "tokens": self.num_tokens[place],
                "logprob": None if self.logprob is None else self.logprob[place],
                "kl": None if self.kl is None else self.kl[place],
                "reference_logprob": None if self.reference_logprob is None else self.reference_logprob[place],
            }
            for place, response in enumerate(self.responses)
        ]

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Sampled:
        """The inverse of `rows`."""

        def column(name: str) -> tuple[float, ...] | None:
            return None if rows[0][name] is None else tuple(row[name] for row in rows)

        return cls(
            responses=tuple(Response(text=row["text"], finished=row["finished"]) for row in rows),
            num_tokens=tuple(row["tokens"] for row in rows),
            logprob=column("logprob"),
            kl=column("kl"),
            reference_logprob=column("reference_logprob"),
        )


Responses = Mapping[tuple[str, str], Sampled]
"""By contestant and name of the decoding."""


def respond(
    name: str, field: Field, prompts: Sequence[Prompt], decoding: DecodingConfig, scorer: Scorer | None, *, seed: int
) -> Sampled:
    """The contestant's response to each prompt."""
    n = field.contestant.best_of or 1
    with progress(f"{name}, {decoding.name}", n * len(prompts)) as ticker:
        groups = sample_rollouts(
            field.policy,
            prompts,
            n=n,
            decoding=decoding,
            seed=seed,
            purpose=f"evaluation/{name}/{decoding.name}",
            prefix=field.prefix,
            progress=ticker.advance,
        )
    rollouts = _best(field, prompts, groups, scorer) if n > 1 else [group[0] for group in groups]
    reference = None if field.reference is None else response_logprobs(field.reference, rollouts, decoding)
    kl = None
    if reference is not None and not decoding.greedy:
        kl = _kl(field, rollouts, reference, decoding)
        _warn_of_negative(kl or (), name)
    return Sampled(
        responses=tuple(as_response(field.policy, rollout) for rollout in rollouts),
        num_tokens=tuple(len(rollout.response_ids) for rollout in rollouts),
        logprob=None if decoding.greedy or n > 1 else tuple(sum(rollout.logprobs) for rollout in rollouts),
        kl=kl,
        reference_logprob=reference,
    )


def drawn_prefixes(
    config: FewShot, demonstrations: Sequence[Demonstration], prompts: Sequence[Prompt], *, seed: int
) -> tuple[list[Prompt], list[str]]:
    """The prompts of the contest, and the prefixes that meet in it."""
    alone = [one for one in demonstrations if len(one.prompt.messages) == 1]  # the template has room for one turn
    if len(alone) < config.shots:
        raise DataError(
            f"a prefix has {config.shots} worked examples, but there are {len(alone)} of a single turn to draw from."
        )
    rng = random.Random(f"{seed}/few-shot")
    chosen = rng.sample(list(prompts), min(config.prompts, len(prompts)))
    draws = (rng.sample(alone, config.shots) for _ in range(config.candidates))
    return chosen, ["".join(_worked_example(config.template, example) for example in draw) for draw in draws]


def longest_prefix(tokenizer: Tokenizer, prefixes: Sequence[str]) -> int:
    """The tokens of the longest."""
    return max((len(tokenizer.response_ids(prefix, finished=False)) for prefix in prefixes), default=0)


def best_prefix(
    policy: LanguageModel,
    config: FewShot,
    demonstrations: Sequence[Demonstration],
    prompts: Sequence[Prompt],
    scorer: Scorer,
    decoding: DecodingConfig,
    *,
    seed: int,
) -> tuple[str, list[dict[str, Any]]]:
    """The best of `config.candidates` prefixes by mean score, and every candidate with its score."""
    chosen, prefixes = drawn_prefixes(config, demonstrations, prompts, seed=seed)
    longest = longest_prefix(policy.tokenizer, prefixes)
    chosen = leaving_room(
        chosen, policy, new_tokens=decoding.max_new_tokens, prefix_tokens=longest, what="few-shot prompts"
    )
    contest: list[dict[str, Any]] = []
    with progress("few-shot contest", config.candidates) as ticker:
        for number, prefix in enumerate(prefixes):
            groups = sample_responses(
                policy, chosen, n=1, decoding=decoding, seed=seed, purpose=f"few-shot/{number}", prefix=prefix
            )
            scores = scorer(chosen, [group[0] for group in groups])
            contest.append({"prefix": prefix, "score": float(np.mean(scores))})
            ticker.advance()
    return winner(contest), contest


def winner(contest: Sequence[Mapping[str, Any]]) -> str:
    """The prefix that scored highest."""
    return str(max(contest, key=lambda row: float(row["score"]))["prefix"])


def _worked_example(template: str, example: Demonstration) -> str:
    return template.format(prompt=example.prompt.messages[-1].content, response=example.response)


def _best(
    field: Field, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], scorer: Scorer | None
) -> list[Rollout]:
    if scorer is None:
        raise ConfigError("best_of needs a reward model to choose by; train one, or leave best_of out.")
    flat_prompts = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    scores = iter(scorer(flat_prompts, [as_response(field.policy, rollout) for group in groups for rollout in group]))
    chosen = []
    for group in groups:
        score_of = [next(scores) for _ in group]
        chosen.append(group[max(range(len(group)), key=lambda place: score_of[place])])
    return chosen


def _kl(
    field: Field, rollouts: Sequence[Rollout], reference: Sequence[float], decoding: DecodingConfig
) -> tuple[float, ...] | None:
    """log pi - log ref of each response, both by one kind of pass: the sampler's own numbers only where it is exact."""
    contestant = field.contestant
    if contestant.best_of is not None:  # its law is not the sampler's; from the sampler itself its KL has a closed form
        from_itself = contestant.reference == contestant.model and contestant.few_shot is None
        return tuple(best_of_n_kl(contestant.best_of) for _ in rollouts) if from_itself else None
    exact = decoding.precision in (None, "float32")
    own = [sum(one.logprobs) for one in rollouts] if exact else response_logprobs(field.policy, rollouts, decoding)
    return tuple(ours - theirs for ours, theirs in zip(own, reference, strict=True))


def _warn_of_negative(kl: Sequence[float], name: str) -> None:
    """Of responses that are the policy's own a sum so far below 0 comes up less than once in a million evaluations."""
    if sum(kl) < -(KL_SURPRISE + KL_ROUNDING * len(kl)):
        say(
            f"warning: the KL of {name!r} from its reference is {sum(kl) / len(kl):.2f} nats a response. It cannot be "
            "negative: the responses are not drawn from the law whose log-probs are taken."
        )


@torch.no_grad()
def response_logprobs(model: LanguageModel, rollouts: Sequence[Rollout], decoding: DecodingConfig) -> tuple[float, ...]:
    """The model's log-prob of each rollout's response, summed over its tokens, at the decoding's temperature."""
    sequences = [(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]
    sums = [0.0] * len(rollouts)
    groups = microbatches([len(ids) for ids in sequences], budget=decoding.batch_tokens)
    for group in through(groups, "log-probs, micro-batch"):
        packed = pack([sequences[index] for index in group]).to(model.device)
        source_M, target_M = packed.predicted([len(rollouts[index].prompt_ids) for index in group])
        logprob_M = model.predict(packed, source_M, target_M, temperature=decoding.temperature).logprob_M
        parts: tuple[Tensor, ...] = torch.split(logprob_M, [len(rollouts[index].response_ids) for index in group])
        for index, part in zip(group, parts, strict=True):
            sums[index] = float(part.sum())
    return tuple(sums)


def finished_rate(sampled: Sampled) -> float:
    """The share of responses that ended by themselves."""
    return float(np.mean([response.finished for response in sampled.responses]))
