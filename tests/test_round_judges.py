"""A reward model that judges in a run whose rankings people gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.test_round import People, data, people, rows  # noqa: F401  # fixtures

from tastemaker.checkpoint import new_reward_model, save_reward_model
from tastemaker.store import LabelService, Store

pytestmark = pytest.mark.slow


def test_a_reward_model_judges_where_people_ranked(people: People, random_base: Path) -> None:  # noqa: F811
    """People are in the group "held-out", which ranks validation prompts, and may join it after the evaluation."""
    people.recipe["reward"] = {"judge": {"init": "first"}}
    people.recipe["evaluation"] |= {"judge_reward": "judge", "rated": []}
    while people.waits("comparisons"):
        people.tasks(submit=True)
    folder = people.out / "round-1" / "5-reward" / "judge"
    save_reward_model(folder / "model", new_reward_model(str(random_base), seed=0))
    (folder / "results.json").write_text(json.dumps({"accuracy": 0.5, "n": 2, "ci95": [0.1, 0.9]}))
    (folder / "pairs.jsonl").write_text("")
    assert people.waits("evaluation") == 0
    judged = rows(people.out / "round-1/7-evaluation/comparisons.jsonl")
    assert {row["judge"] for row in judged} == {"held-out"}
    assert "reward model judge" in {row["rater"] for row in judged}
    store = Store.open(people.out / "labels.db")
    LabelService(store).add_rater("somebody else", group="held-out", origin="human")
    store.close()
