"""What was sampled stays as it was written first, and is on the disk at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tastemaker.errors import DataError
from tastemaker.kept import Kept, digest


def test_entries_are_found_again_and_never_changed(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept = Kept(path)
    assert ("a", "1") not in kept
    kept.add({("a", "1"): [0.1, None, "\u00fc\u2028"]})
    kept.add({("a", "1"): "another sample", ("b",): -1.5e-300})
    for one in (kept, Kept(path)):
        assert one["a", "1"] == [0.1, None, "\u00fc\u2028"]
        assert one[("b",)] == -1.5e-300
        assert ("a", "2") not in one
    assert [one.name for one in tmp_path.iterdir()] == ["kept.jsonl"]


def test_a_line_that_is_no_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    Kept(path).add({("a",): 1})
    path.write_text(path.read_text() + '{"value": 2}\n')
    with pytest.raises(DataError, match=r"kept\.jsonl, line 2: is no entry"):
        Kept(path)


def test_a_digest_is_of_the_value_and_not_of_its_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
