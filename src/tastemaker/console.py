"""What a person sees while a stage runs: progress bars on a terminal, plain lines elsewhere. All of it on stderr.

Of several processes that work together only the first speaks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tastemaker import processes

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15.0

_console = Console(stderr=True, highlight=False, quiet=not processes.is_first())
_displayed: list[Progress] = []  # a terminal has room for one, of several lines


def say(message: str) -> None:
    """One line for the person who runs the command."""
    _console.print(message, markup=False, soft_wrap=True)


class Ticker:
    """Advances a progress display; `note` is shown beside it (`loss 1.23`)."""

    def __init__(self, description: str, total: int, bar: Progress | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._bar = bar
        self._task = None if bar is None else bar.add_task(description, total=total, note="")
        self._spoken = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount)
            if note:
                self._bar.update(self._task, note=note)
        elif time.monotonic() - self._spoken > SECONDS_BETWEEN_LINES:
            self._spoken = time.monotonic()
            say(f"  {self.description} {self.done}/{self.total} {note}".rstrip())

    def leave(self) -> None:
        """Take the bar away."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)


@contextmanager
def progress(description: str, total: int, *, done: int = 0) -> Iterator[Ticker]:
    """A progress bar over `total` units, `done` of which were done before an interruption. Bars may be nested."""
    if not sys.stderr.isatty():
        ticker = Ticker(description, total, None)
        ticker.done = done
        yield ticker
        return
    with _display() as display:
        ticker = Ticker(description, total, display)
        if done:
            ticker.advance(done)
        try:
            yield ticker
        finally:
            ticker.leave()


def through(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Go through items, all of which are made first, with a progress bar."""
    every = list(items)
    with progress(description, len(every)) as ticker:
        for item in every:
            yield item
            ticker.advance()


@contextmanager
def _display() -> Iterator[Progress]:
    """What is displayed already, else a new one."""
    if _displayed:
        yield _displayed[-1]
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console, transient=True) as display:
        _displayed.append(display)
        try:
            yield display
        finally:
            _displayed.pop()
