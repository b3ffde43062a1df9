"""What docs/labelling.md says is there, and what is there is in docs/labelling.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from tastemaker import raters
from tastemaker.store import LabelService
from tastemaker.store.schema import metadata
from tastemaker.store.tasks import FLAGS, Answer, StudyKind

TEXT = (Path(__file__).parents[2] / "docs" / "labelling.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
PROFILES = (
    raters.careful,
    raters.average,
    raters.lenient,
    raters.position_biased,
    raters.length_lover,
    raters.random_clicker,
    raters.straight_liner,
    raters.drifting,
    raters.minority,
    raters.adversary,
)


@pytest.mark.parametrize(
    "name",
    [*FLAGS, *get_args(StudyKind), *metadata.tables, *(each.__name__ for each in (*get_args(Answer), *PROFILES))],
)
def test_every_name_is_documented(name: str) -> None:
    assert re.search(rf"`{name}\b", TEXT)


def test_the_code_names_what_exists() -> None:
    called = set(re.findall(r"\bservice\.(\w+)\(", "\n".join(CODE)))
    assert len(called) > 6
    assert [name for name in called if not hasattr(LabelService, name)] == []
    imported = [
        name
        for line in re.findall(r"^from tastemaker\S* import (.*)$", "\n".join(CODE), flags=re.M)
        for name in line.split(", ")
    ]
    for line in re.findall(r"^from tastemaker\S* import .*$", "\n".join(CODE), flags=re.M):
        exec(line, {})
    assert "SimulatedRater" in imported
