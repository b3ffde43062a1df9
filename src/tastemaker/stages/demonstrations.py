"""Demonstrations: people write what the model should have answered (sections 3.2 to 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tastemaker.panel import Panel, collect
from tastemaker.ranges import check_range
from tastemaker.records import Demonstration, Prompt
from tastemaker.store import LabelService
from tastemaker.store.tasks import Guideline, NewItem, StudyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationsConfig:
    """How many prompts get a demonstration (None: all), and the file of demonstrations that exist already."""

    source: str | None = None
    """A file, dataset or Python function of ready demonstrations; none are collected then."""
    train: int | None = None
    """Training prompts that get one (none: all); with `source`, how many of the rows left over train."""
    validation: int | None = None
    """Validation prompts that get one (none: all); with `source`, how many of its first rows only measure (none: 0)."""

    def __post_init__(self) -> None:
        check_range(self, "train", least=1)
        check_range(self, "validation", least=0)


def collect_demonstrations(
    service: LabelService, prompts: Sequence[Prompt], panel: Panel, *, study: str, guideline: Guideline
) -> list[Demonstration]:
    """One demonstration for each prompt, from the raters of `panel`."""
    config = StudyConfig(
        name=study, kind="demonstration", purpose="training", rater_group=panel.group, guideline=guideline
    )
    items = [NewItem(key=prompt.key, prompt=prompt) for prompt in prompts]
    return collect(
        service,
        config,
        items,
        panel,
        read=service.demonstrations,
        slot=lambda answer: (answer.prompt.key, answer.author.rater),
    )
