"""How the work of something grows with its size, as a ratio of this process's own CPU time: no limit in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable


def growth(work: Callable[[int], object], small: int, large: int) -> float:
    """How many times as long `work(large)` takes as `work(small)`, each by the least of three times."""
    seconds: dict[int, list[float]] = {small: [], large: []}
    for _ in range(3):
        for size, taken in seconds.items():
            start = time.process_time()
            work(size)
            taken.append(time.process_time() - start)
    return min(seconds[large]) / min(seconds[small])
