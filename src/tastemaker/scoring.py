"""Scores of responses: by a reward model, which reads text through its own tokenizer, or by any Python function.

A reward model is queried exactly as it was trained: the same function encodes prompt, response and ending for both. So
a policy and its reward model may have different tokenizers, and a response that was cut off lacks the end token in
both.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch

from tastemaker import parallel, processes
from tastemaker.checkpoint import Reader
from tastemaker.console import say, through
from tastemaker.errors import TrainingError
from tastemaker.model import RewardModel
from tastemaker.packing import microbatches, pack
from tastemaker.records import Messages, Prompt, Response

Name = TypeVar("Name")
ScoreFunction = Callable[[list[Messages], list[str], list[Mapping[str, Any]]], Sequence[float]]


class Scorer(Protocol):
    """Gives every response to a prompt a score; higher is better."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]: ...


def scores_together(
    scorer: Scorer, prompts: Sequence[Prompt], responses: Mapping[Name, Sequence[Response]]
) -> dict[Name, list[float]]:
    """The scores of several policies' responses to the same prompts.

    A reward model reads each prompt once for all its responses. A Python function is asked policy by policy: it may
    look at all that it is given.
    """
    if not isinstance(scorer, ModelScorer):
        return {name: scorer(prompts, given) for name, given in responses.items()}
    by_prompt = zip(*responses.values(), strict=True)
    repeated = [prompt for prompt in prompts for _ in responses]
    scores = scorer(repeated, [response for row in by_prompt for response in row])
    return {name: scores[place :: len(responses)] for place, name in enumerate(responses)}


def encode_for_reward(model: RewardModel | Reader, prompt: Prompt, response: Response) -> list[int]:
    """The ids whose last is where the score is read. It takes no weights: a reward model's `Reader` does."""
    opening, ending = halves_for_reward(model, prompt, response)
    return [*opening, *ending]


def encode_all_for_reward(
    model: RewardModel | Reader, prompts: Sequence[Prompt], responses: Sequence[Response]
) -> list[list[int]]:
    """The same of many; how many of them the context cuts is said."""
    openings = {prompt.messages: _opening(model, prompt) for prompt in prompts}
    endings = (model.tokenizer.response_ids(response.text, finished=response.finished) for response in responses)
    halves = [(openings[prompt.messages], ending) for prompt, ending in zip(prompts, endings, strict=True)]
    cut = sum(len(opening) + len(ending) > model.context for opening, ending in halves)
    if cut:
        say(
            f"  {cut} of {len(halves)} prompts with a response are longer than the reward model's context of "
            f"{model.context}; of those it reads the end"
        )
    return [list(chain(*_within_context(model, opening, ending))) for opening, ending in halves]


def halves_for_reward(model: RewardModel | Reader, prompt: Prompt, response: Response) -> tuple[list[int], list[int]]:
    """What is read of the prompt, and what of the response.

    A prompt beyond the model's `prompt_limit` loses its beginning, the same for all its responses, so that none is
    judged by a shorter conversation than another. Only what is too long for the context itself loses more. The
    beginning-of-text id stays.
    """
    ending = model.tokenizer.response_ids(response.text, finished=response.finished)
    return _within_context(model, _opening(model, prompt), ending)


def _opening(model: RewardModel | Reader, prompt: Prompt) -> list[int]:
    """The prompt within the model's limit."""
    return model.tokenizer.prompt_ids(prompt.messages, limit=model.prompt_limit)


def _within_context(model: RewardModel | Reader, opening: list[int], ending: list[int]) -> tuple[list[int], list[int]]:
    room = max(0, model.context - len(ending))
    return model.tokenizer.end_of(opening, room), ending[-model.context :]


class ModelScorer:
    """Scores by a reward model."""

    def __init__(self, model: RewardModel, *, budget: int, precision: str = "float32") -> None:
        self.model, self.budget = model, budget
        self.bfloat16 = precision == "bfloat16"

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        return self.read(prompts, responses)()

    def read(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Callable[[], list[float]]:
        """Encode now, and refuse what cannot be read; a call scores by the weights that the model has then.

        Equal sequences are scored once, so that equal responses to a prompt tie whatever shares their batches.
        """
        sequences = list(map(tuple, encode_all_for_reward(self.model, prompts, responses)))
        prompt_of = dict(zip(reversed(sequences), reversed(prompts), strict=True))
        distinct = list(dict.fromkeys(sequences))
        units = _alike([prompt_of[ids] for ids in distinct], distinct, self.budget)

        def scores() -> list[float]:
            score_of = dict(zip(distinct, self._scores(distinct, units), strict=True))
            return [score_of[ids] for ids in sequences]

        return scores

    @torch.no_grad()
    def _scores(self, sequences: Sequence[Sequence[int]], units: Sequence[Sequence[int]]) -> list[float]:
        model = self.model
        score_B = torch.zeros(len(sequences), dtype=torch.float64)
        costs = [len(unit) * max(len(sequences[index]) for index in unit) for unit in units]
        groups = microbatches(costs, budget=self.budget, shares=processes.count())
        for turn in through(parallel.turns(groups), "scores, micro-batch"):
            members, group = [index for unit in turn.item for index in units[unit]], turn.item
            packed = pack([sequences[index] for index in members], groups=[len(units[unit]) for unit in group])
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
                score_S = model.scores(packed.to(model.device))
            if turn.counts:
                score_B[members] = score_S.cpu().double()
        scores: list[float] = parallel.summed(score_B).tolist()
        return scores


def _alike(prompts: Sequence[Prompt], sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Responses to one prompt that follow one another, as many together as fit: the prompt is read once for them."""
    units = list[list[int]]()
    for index, prompt in enumerate(prompts):
        if units and prompts[units[-1][0]].messages == prompt.messages:
            longest = max(len(sequences[other]) for other in [*units[-1], index])
            if longest * (len(units[-1]) + 1) <= budget:
                units[-1].append(index)
                continue
        units.append([index])
    return units


class FunctionScorer:
    """Scores by a Python function `score(prompts, responses, records) -> list of float`.

    `prompts` are conversations, `responses` texts, `records` the prompts' other fields and `finished`. Of several
    processes the first calls it, with all responses, and tells the others: it may look at them all, or be random.
    """

    def __init__(self, function: ScoreFunction, *, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        return parallel.from_first(self._scores(prompts, responses) if processes.is_first() else [])

    def _scores(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        records = [
            prompt.about.to_json()
            | {"messages": [message.to_json() for message in prompt.messages]}
            | {"finished": response.finished}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        texts = [response.text for response in responses]
        try:
            scores = [float(score) for score in self.function([p.messages for p in prompts], texts, list(records))]
        except Exception as error:  # a function of the user's own may raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}, line {place.lineno}"
            raise TrainingError(f"{self.name} failed with {type(error).__name__}: {error} ({where})") from error
        if len(scores) != len(responses):
            raise TrainingError(
                f"{self.name} returned {len(scores)} scores for {len(responses)} responses; return one for each."
            )
        bad = [score for score in scores if score != score or abs(score) == float("inf")]
        if bad:
            raise TrainingError(f"{self.name} returned {bad[0]} as a score; scores must be finite numbers.")
        return scores
