"""The text that every Python installation carries, as pretraining text."""

from __future__ import annotations

import pytest

from tastemaker import library_text


def test_no_held_out_text_is_trained_on_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`else` has the text of `if`: where the one is held out and the other is not, that text is trained on."""
    trained = {one.text for one in library_text.training(0)}
    held_out = library_text.held_out(0)
    assert len(held_out) >= 5
    assert not trained & {one.text for one in held_out}
    topics = {f"t{place:02d}": f"text {place % 19}" for place in range(21)}  # t19 is as t00, t20 as t01
    monkeypatch.setattr(library_text, "topics", topics)
    assert [one.about.id for one in library_text.held_out(0)] == ["python-t10"]
    assert len(library_text.training(0)) == 18
