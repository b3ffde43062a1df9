"""Which numbers a config takes: one way to say it and one sentence when it is not so.

Every numeric field of every config and command is held to a range; `tests/test_ranges.py` finds those that are not.
"""

from __future__ import annotations

import math
import re

from tastemaker.errors import ConfigError

SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[KMGT]i?B)", re.IGNORECASE)
MAX_SEED = 2**32 - 1  # what every generator of random numbers that we use takes, and a multiple of it too


def check_range(
    config: object,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse fields of `config` that lie outside a range; NaN and infinity always do. None is no number and passes.

    Raises:
        ConfigError: says what was given and what is allowed.
    """
    for name in names:
        given = getattr(config, name)
        for number in given if isinstance(given, tuple) else (given,):
            inside = number is None or (
                -math.inf < number < math.inf
                and (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and (below is None or number < below)
            )
            if not inside:
                raise ConfigError(f"{name} is {given}; it must be {_allowed(least, above, most, below, number)}.")


def check_seed_and_threads(config: object) -> None:
    """The two numbers that every command which trains or samples takes."""
    check_range(config, "seed", least=0, most=MAX_SEED)
    check_range(config, "threads", least=1)


def parse_size(text: str, name: str) -> int:
    """Bytes from words such as "6GB" (6e9) or "512 MiB" (512 * 2^20).

    Raises:
        ConfigError: it is no size above 0.
    """
    found = SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        unit = found["unit"].upper()
        size = int(float(found["number"]) * (1024 if "I" in unit else 1000) ** (1 + "KMGT".index(unit[0])))
    if size < 1:
        raise ConfigError(f"{name} is {text!r}; give a size above 0, such as 6GB or 512MB.")
    return size


def _allowed(least: float | None, above: float | None, most: float | None, below: float | None, number: float) -> str:
    if least is not None and most is not None:
        return f"from {least} to {most}"
    bounds = (("at least", least), ("above", above), ("at most", most), ("below", below))
    words = [f"{word} {bound}" for word, bound in bounds if bound is not None]
    if number == math.inf or not words:
        words.append("finite")
    return " and ".join(words)
