"""Which of several processes this is: `torchrun` starts them and tells each one by its environment.

PyTorch calls a process's number its rank; here a rank is what a rater gives, so it is a number. All processes of a job
run the same program; only the first writes files and speaks. One process alone is the rule, and is the first.
"""

from __future__ import annotations

import hashlib
import os


def count() -> int:
    """How many processes work on this together."""
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK"} <= os.environ.keys() else 1


def number() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if several() else 0


def several() -> bool:
    return count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return number() == 0


def own_seed(seed: int) -> int:
    """A seed that no other process has, for noise that belongs to no sample; the first process has `seed` itself."""
    if is_first():
        return seed
    digest = hashlib.blake2b(f"{seed}/process/{number()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
