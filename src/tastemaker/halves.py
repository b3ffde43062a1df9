"""Two halves of the prompts that share no conversation: one to learn from, one for an independent judge of the result.

No part of the paper, whose judges are people. Where a reward model stands in for them, it must not have seen what the
policy and its own reward model learned from. Conversations that begin alike go to the same half: they are often the
same one, some turns later.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

from tastemaker.records import Prompt, messages_hash

Part = Literal["all", "first half", "second half"]


def first_turn(prompt: Prompt) -> Prompt:
    """The prompt up to its first user turn; a prompt that was longer loses its id, since it is another prompt now."""
    count = next(place for place, message in enumerate(prompt.messages, 1) if message.role == "user")
    if count == len(prompt.messages):
        return prompt
    return replace(prompt, messages=prompt.messages[:count], about=replace(prompt.about, id=None))


def openings(prompt: Prompt) -> list[Prompt]:
    """The prompts that a conversation went through: it up to each of its user turns, the whole of it last.

    Whoever learns from the conversation learns what was replied to each of the earlier ones.
    """
    ends = [place for place, message in enumerate(prompt.messages, 1) if message.role == "user"]
    about = replace(prompt.about, id=None)
    earlier = [replace(prompt, messages=prompt.messages[:end], about=about) for end in ends]
    return [*(one for one in earlier if len(one.messages) < len(prompt.messages)), prompt]


def in_part(prompt: Prompt, part: Part) -> bool:
    """Whether a prompt belongs to a part; its half is drawn by a hash of its first turn."""
    digest = hashlib.blake2b(messages_hash(first_turn(prompt).messages).encode(), digest_size=1).digest()
    return part == "all" or (digest[0] < 128) == (part == "first half")
