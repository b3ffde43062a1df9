"""The people of the tiny world: those who write demonstrations, and the tastes of those who rate.

Demonstrators mean well and are imperfect: on average they are wrong in 18 % of their answers (more often where care is
needed), ramble on in four of ten and open politely in three of ten. Raters weigh what they see in a response
(`judgement.features`) each in their own way. The training raters scatter around the gold weights. The held-out raters
are other people, not only other noise: their group cares more for brevity, politeness and honesty; a minority among
them dislikes politeness, wants things very short and minds harm less.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tastemaker.tinyworld import tasks
from tastemaker.tinyworld.judgement import APOLOGY, GOLD_WEIGHTS
from tastemaker.tinyworld.web import CLOSINGS, OPENERS, RAMBLE, remark

RATER_SPREAD = 0.3  # standard deviation of the logarithm of a rater's weight
_AVERAGE = MappingProxyType(dict.fromkeys(GOLD_WEIGHTS, 1.0))
# What a group multiplies the gold weights by, before its raters scatter.
GROUPS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "training": _AVERAGE,
        "held-out": MappingProxyType(
            {**_AVERAGE, "correct": 0.9, "over_length": 1.6, "polite": 1.8, "hallucinated": 1.6, "rude": 0.7}
        ),
        "minority": MappingProxyType(
            {
                **_AVERAGE,
                "follows_constraint": 0.5,
                "harmful": 0.4,
                "over_length": 3.0,
                "polite": -0.75,
                "disfluent": 1.5,
            }
        ),
    }
)
# How much more often than elsewhere a demonstrator gives the flawed answer.
_TEMPTATION: Mapping[str, float] = MappingProxyType({"unsafe": 1.7, "premise_false": 1.7})


def rater_weights(group: str, index: int, seed: int) -> dict[str, float]:
    """How the rater of that number in the group weighs each feature."""
    if group not in GROUPS:
        raise ValueError(f"unknown rater group {group!r}; the groups are {', '.join(GROUPS)}")
    rng = random.Random(f"rater {seed} {group} {index}")
    tilt = GROUPS[group]
    return {name: weight * tilt[name] * rng.lognormvariate(0.0, RATER_SPREAD) for name, weight in GOLD_WEIGHTS.items()}


def demonstration(record: Mapping[str, Any], *, seed: int, demonstrator: str) -> str:
    """What this demonstrator writes for the prompt: the same text whenever it is asked for."""
    person = random.Random(f"demonstrator {seed} {demonstrator}")
    wrong, rambling, polite = person.uniform(0.1, 0.26), person.uniform(0.25, 0.55), person.uniform(0.15, 0.45)
    rng = random.Random(f"demonstration {seed} {demonstrator} {record['id']}")
    truth = record["truth"]
    is_wrong = rng.random() < wrong * _TEMPTATION.get(truth["kind"], 1.0)
    answer: str = truth["flawed"] if is_wrong else truth["ideal"]
    if answer == tasks.REFUSAL:
        answer = f"{APOLOGY} {answer}" if rng.random() < 0.4 else answer
    elif rng.random() < polite:
        answer = f"{rng.choice(OPENERS)} {answer}"
    if rng.random() < rambling:
        return f"{answer} {rng.choice((rng.choice(RAMBLE), remark(rng)))}"
    return f"{answer} {rng.choice(CLOSINGS)}" if rng.random() < 0.15 else answer
