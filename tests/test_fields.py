"""A recipe written out as TOML reads back as itself."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tastemaker.cli import main
from tastemaker.commands.fields import as_toml
from tastemaker.config import load_recipe
from tastemaker.recipe import Recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_printed_is_the_recipe(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(path), "--out", str(tmp_path / "out"), "--fields", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(printed)
    again = load_recipe(tmp_path / "again.toml", Recipe)
    assert again.seed == 7
    changed = as_toml(load_recipe(path, Recipe)).replace("\nseed = 0\n", "\nseed = 7\n", 1)
    assert printed == changed
    assert as_toml(again) == printed
    assert "# database =" in printed
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class Anything:
    table: dict[str, str | float | int | bool] = field(default_factory=dict)
    rows: tuple[dict[str, str], ...] = ()


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    table=st.dictionaries(TEXT, TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-1e300, 1e300)),
    rows=st.lists(st.dictionaries(TEXT, TEXT, min_size=1), max_size=3),
)
def test_whatever_it_holds_reads_back(table: dict[str, str | float | int | bool], rows: list[dict[str, str]]) -> None:
    read = tomllib.loads(as_toml(Anything(table=table, rows=tuple(rows))))
    assert json.dumps(read, sort_keys=True) == json.dumps({"table": table, "rows": rows}, sort_keys=True)
