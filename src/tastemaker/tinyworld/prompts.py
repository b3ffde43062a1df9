"""The prompts that users of the tiny world send, with their truth, split by user; and examples for a few-shot prefix.

A prompt's text decides by its hash which split it may occur in, whatever the seed, so no text is ever in two splits.
Questions about facts and deeds are split by what they ask about instead: test prompts ask only about held-out pairs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from tastemaker.tinyworld import tasks
from tastemaker.tinyworld.world import Side

_USERS = {"train": (0, 40), "validation": (40, 48), "test": (48, 68)}
_BUCKETS = 20
_BUCKETS_OF = {"few_shot": range(0, 1), "validation": range(1, 3), "test": range(3, 10), "train": range(10, 20)}
_MOST_TRIES = 400


def _digest(messages: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def _belongs(task: tasks.Task, split: str, digest: str) -> bool:
    """Whether a prompt may occur in the split; of those about held-out pairs all may be test prompts."""
    if task.held_out_side:
        return split == "test"
    bucket = int(digest[:8], 16) % _BUCKETS
    if task.held_out_side is False and bucket in _BUCKETS_OF["test"]:
        return split == "train"
    return bucket in _BUCKETS_OF[split]


def _distinct(rng: random.Random, maker: tasks.Maker, split: str, seen: set[str]) -> Iterator[tuple[str, tasks.Task]]:
    """Prompts of one kind for the split that are not in `seen`, which grows."""
    side: Side = "held_out" if split == "test" else "seen"
    tries = 0
    while tries < _MOST_TRIES:
        task = maker(rng, side)
        digest = _digest(task.messages())
        tries += 1
        if digest not in seen and _belongs(task, split, digest):
            seen.add(digest)
            tries = 0
            yield digest, task
    raise ValueError(
        f"the tiny world has not enough different prompts of the kind {maker.__name__!r} for the split {split!r}; "
        f"ask for fewer prompts"
    )


def _counts(total: int) -> dict[tasks.Maker, int]:
    """How many prompts of each kind, by largest remainder."""
    whole = sum(tasks.PROMPT_MIX.values())
    exact = {maker: total * share / whole for maker, share in tasks.PROMPT_MIX.items()}
    counts = {maker: int(number) for maker, number in exact.items()}
    for maker in sorted(exact, key=lambda maker: counts[maker] - exact[maker])[: total - sum(counts.values())]:
        counts[maker] += 1
    return counts


def _record(digest: str, task: tasks.Task, split: str, user: int) -> dict[str, Any]:
    return {
        "id": f"tw-{digest[:12]}",
        "user": f"user-{user:02d}",
        "category": task.category,
        "messages": task.messages(),
        "split": split,
        "kind": task.kind,
        "constraint": task.constraint is not None,
        "safety": task.safety,
        "truth": {
            "kind": task.kind,
            "ideal": task.ideal,
            "flawed": task.flawed,
            "check": task.check,
            "constraint": task.constraint,
        },
    }


def prompts(seed: int, n_train: int, n_validation: int, n_test: int) -> list[dict[str, Any]]:
    """Prompt records in a random order within each split; ids are hashes of the text, the same in every round."""
    records = []
    for split, total in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        rng = random.Random(f"prompts {seed} {split}")
        seen: set[str] = set()
        drawn = []
        for maker, count in _counts(total).items():
            stream = _distinct(rng, maker, split, seen)
            drawn += [next(stream) for _ in range(count)]
        rng.shuffle(drawn)
        records += [_record(digest, task, split, rng.randrange(*_USERS[split])) for digest, task in drawn]
    return records


def prompt_text(record: Mapping[str, Any]) -> str:
    """The conversation as plain text, for prefixes and for printing."""
    marks = {"user": "q:", "assistant": "a:"}
    return " ".join(f"{marks[message['role']]} {message['content']}" for message in record["messages"])


def few_shot_examples(seed: int, n: int) -> list[tuple[str, str]]:
    """Pairs of a prompt's text and its ideal answer, of as many kinds as possible, from prompts in no split."""
    rng = random.Random(f"few-shot {seed}")
    seen: set[str] = set()
    makers = [maker for maker in tasks.PROMPT_MIX if maker is not tasks.chat]
    examples: list[tuple[str, str]] = []
    while len(examples) < n:
        for maker in rng.sample(makers, min(len(makers), n - len(examples))):
            _, task = next(_distinct(rng, maker, "few_shot", seen))
            examples.append((task.prompt, task.ideal))
    return examples
