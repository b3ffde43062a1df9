"""Which of several processes this is: `torchrun` starts them and tells each one by its environment.

PyTorch calls a process's number its rank; here a rank is what a rater gives, so it is a number. All processes of a job
run the same program; only the first writes files and speaks. One process alone is the rule, and is the first.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import NoReturn


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


def end(code: int) -> NoReturn:
    """End this one of several processes at once, whatever its threads are doing.

    After an error nobody is waited for. After success neither: what FSDP2 has cached keeps threads of gloo alive, and
    one that lets go of a tensor while the interpreter is taken down aborts the process (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
