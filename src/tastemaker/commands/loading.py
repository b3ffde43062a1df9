"""Importing what is heavy: torch and transformers bring half a million objects that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Within the block the garbage collector rests, and later it leaves alone what is there by then.

    While modules are imported there is next to no garbage, but it would be looked for again and again: a quarter of the
    time that torch and transformers take.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
