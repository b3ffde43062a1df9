"""The tiny world as a recipe sees it: sources of records and simulated people, named `tastemaker.tinyworld.study:...`.

The pipeline knows these functions by name only, as it would know a user's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from tastemaker.raters import RaterProfile
from tastemaker.records import Demonstration, Message, Messages, Prompt, Response, Text, about_from_json
from tastemaker.tinyworld.bases import HELD_OUT_SEED
from tastemaker.tinyworld.judgement import features as features_of
from tastemaker.tinyworld.judgement import gold_utility, likert_and_flags
from tastemaker.tinyworld.people import demonstration, rater_weights
from tastemaker.tinyworld.prompts import few_shot_examples
from tastemaker.tinyworld.prompts import prompts as prompt_records
from tastemaker.tinyworld.web import web_documents

MINORITY_SHARE = 4  # one held-out rater in so many belongs to the minority group
DEMONSTRATORS = 8
PRETRAINING_MIX_SEED = 4321  # text for PPO-ptx and the SFT mix: the web, but none of what the bases were trained on
# Utilities at which the next point of the 1 to 7 scale begins: gold utility of 1 is about a 4 or 5.
LIKERT_CUTS = (-1.5, -0.8, -0.1, 0.6, 1.3, 2.0)
LAPSE = 0.02
TIE_THRESHOLD = 0.15  # utilities closer than this are a tie; "encouraged" in the paper
# The world's own names for the paper's yes/no fields.
FLAG_NAMES: Mapping[str, str] = {
    "fails_instruction": "fails_to_follow_instruction",
    "inappropriate": "inappropriate_for_customer_assistant",
    "hallucination": "hallucination",
    "satisfies_constraint": "satisfies_constraint",
    "harmful_advice": "harmful_advice",
    "encourages_violence": "encourages_harm",
    "denigrates": "denigrates_protected_class",
}


def prompts(seed: int, *, train: int = 2400, validation: int = 240, test: int = 700) -> list[Prompt]:
    """Users' requests with their truth, split by user."""
    return [_as_prompt(record) for record in prompt_records(seed, train, validation, test)]


def few_shot(seed: int, *, examples: int = 160) -> list[Demonstration]:
    """Well answered requests, for the few-shot prefix of a base model."""
    return [
        Demonstration(prompt=Prompt(messages=(Message("user", text),)), response=answer)
        for text, answer in few_shot_examples(seed, examples)
    ]


def texts(seed: int, *, documents: int = 4000) -> list[Text]:
    """The web, for the pretraining mix."""
    return [Text(text=text) for text in islice(web_documents(PRETRAINING_MIX_SEED + seed), documents)]


def held_out_texts(seed: int, *, documents: int = 200) -> list[Text]:
    """Web text that no model was trained on; the same for every seed."""
    del seed
    return [Text(text=text) for text in islice(web_documents(HELD_OUT_SEED), documents)]


def raters(group: str, count: int, seed: int) -> list[RaterProfile]:
    """A group of raters without noise. A quarter of the held-out ones has the minority's values."""
    profiles = []
    for index in range(count):
        kind = "minority" if group == "held-out" and index % MINORITY_SHARE == MINORITY_SHARE - 1 else group
        profiles.append(
            RaterProfile(
                name=f"{group}-{index + 1:02d}",
                group=group,
                weights=rater_weights(kind, index, seed),
                noise=0.0,
                lapse=LAPSE,
                tie_threshold=TIE_THRESHOLD,
                likert_cuts=LIKERT_CUTS,
            )
        )
    return profiles


def features(prompt: Prompt, response: Response) -> Mapping[str, float]:
    """What a rater sees in a response."""
    return features_of(_as_record(prompt), response.text, finished=response.finished)


def flags(prompt: Prompt, response: Response) -> frozenset[str]:
    """The paper's yes/no fields that are true of a response."""
    judged = likert_and_flags(_as_record(prompt), features(prompt, response))
    return frozenset(FLAG_NAMES[name] for name, value in judged.items() if name in FLAG_NAMES and value)


def write(prompt: Prompt, seed: int) -> str:
    """A demonstration by one of the world's demonstrators."""
    return demonstration(_as_record(prompt), seed=seed, demonstrator=f"demonstrator-{seed % DEMONSTRATORS}")


def gold(prompts: Sequence[Messages], responses: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The true worth of each response."""
    del prompts
    return [
        gold_utility(record, response, finished=bool(record["finished"]))
        for record, response in zip(records, responses, strict=True)
    ]


def _as_prompt(record: Mapping[str, Any]) -> Prompt:
    messages = tuple(Message(message["role"], message["content"]) for message in record["messages"])
    return Prompt(messages=messages, about=about_from_json(record, used=("messages",)))


def _as_record(prompt: Prompt) -> dict[str, Any]:
    return prompt.to_json()
