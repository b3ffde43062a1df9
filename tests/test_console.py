"""What is shown while a stage runs: bars on a terminal, one below the other; lines now and then elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from tastemaker import console
from tastemaker.console import progress, through


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a terminal would be sent."""
    sent = io.StringIO()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "_console", Console(file=sent, force_terminal=True, width=100))
    yield sent
    assert console._displayed == []


def test_a_bar_within_another_is_a_line_below_it(terminal: io.StringIO) -> None:
    with progress("ppo", 7, done=2) as outer:
        display = console._displayed[0]
        assert list(through([3, 5, 7], "scores")) == [3, 5, 7]
        with progress("validation", 11) as inner:
            inner.advance(4, note="loss 0.5")
            display.refresh()
            assert [(task.description, task.completed, task.total) for task in display.tasks] == [
                ("ppo", 2, 7),
                ("validation", 4, 11),
            ]
        outer.advance()
        assert [task.description for task in display.tasks] == ["ppo"], "the inner ones are gone"
        assert display.tasks[0].completed == 3
    assert "validation" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()


def test_an_error_takes_the_bars_away(terminal: io.StringIO) -> None:
    with pytest.raises(ValueError, match="stopped"), progress("outer", 2), progress("inner", 3):
        raise ValueError("stopped")
    with progress("another", 1):
        assert [task.description for task in console._displayed[0].tasks] == ["another"]


def test_elsewhere_a_line_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(console, "_console", Console(file=sent, width=100))
    monkeypatch.setattr("tastemaker.console.time.monotonic", lambda: now[0])
    for _ in through(range(40), "scores"):
        now[0] += 1.0
    assert sent.getvalue().splitlines() == ["  scores 16/40", "  scores 32/40"]
