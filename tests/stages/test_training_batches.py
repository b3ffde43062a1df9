"""The last batch of an epoch, which is smaller than the others, and the order in which an epoch takes the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.float64 import score
from tests.stages import test_dpo, test_reward

from tastemaker.checkpoint import new_reward_model
from tastemaker.metrics import read_metrics
from tastemaker.stages.reward import as_elements, as_pairs
from tastemaker.training import Loss, StepReport, Trainer

STILL = {"learning_rate": 1e-12, "schedule": "constant"}  # moves no weight that a float32 tells from another


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Hashable]]:
    """What every optimizer step is taken on."""
    seen, step = list[list[Hashable]](), Trainer.step

    def spy(self: Trainer, groups: Iterable[Any], loss_fn: Callable[[Any, float], Loss], number: float) -> StepReport:
        parts = list(groups)
        seen.append([row for part in parts for row in part])
        return step(self, parts, loss_fn, number)

    monkeypatch.setattr(Trainer, "step", spy)
    return seen


# --- the last batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["pairs", "all"])
def test_a_small_last_batch_of_rankings_is_a_mean_over_itself(base: str, tmp_path: Path, normalize: str) -> None:
    """31 rankings in batches of 5 end in one of 1. By weights that stand still, the batches' losses times their sizes
    sum up to the losses of all rankings: each one above two tied ones, 2 untied pairs of 3."""
    rankings, sizes = test_reward.RANKINGS, [5] * 6 + [1]
    test_reward.train(tmp_path, base, test_reward.config(optimizer=STILL, normalize=normalize), rankings)
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    model = new_reward_model(base, seed=4)
    exact = []
    for element in as_elements(rankings, model):
        best, *others = (score(model, ids) for ids in element.sequences)
        exact.append(sum(math.log1p(math.exp(other - best)) for other in others) / (2 if normalize == "pairs" else 3))
    assert len(losses) == len(sizes)
    assert min(abs(losses[-1] - loss) for loss in exact) < 5e-6, "the last batch's loss is that of its one ranking"
    total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
    assert total / 31 == pytest.approx(sum(exact) / 31, abs=5e-6)


def test_a_small_last_batch_of_pairs_is_a_mean_over_itself(base: str, tmp_path: Path) -> None:
    """22 pairs in batches of 5 end in one of 2; by weights that stand still every loss is log 2, and with IPO's
    square (0 - 1 / (2 * 0.25))^2 = 4."""
    for variant, expected in (("sigmoid", math.log(2)), ("ipo", 4.0)):
        settings = test_dpo.config(optimizer=STILL, epochs=1, beta=0.25, variant=variant)
        rows = test_dpo.train(tmp_path / variant, base, settings)
        assert [row["loss"] for row in rows] == pytest.approx([expected] * 5, abs=5e-6)
        assert [row["accuracy"] for row in rows] == [0.5] * 5


# --- the order ------------------------------------------------------------------------------------------------------


def check_shuffled(steps: list[list[Hashable]], *, given: list[Hashable], batch_size: int) -> None:
    """Two epochs, each over every row once, neither in the given order, nor both in the same."""
    count = -(-len(given) // batch_size)
    assert len(steps) == 2 * count
    first, second = steps[:count], steps[count:]
    for epoch in (first, second):
        assert Counter(row for step in epoch for row in step) == Counter(given)
    in_order = [given[start : start + batch_size] for start in range(0, len(given), batch_size)]
    batches = [{frozenset(step) for step in part if len(step) == batch_size} for part in (first, second, in_order)]
    assert not batches[0] & batches[1]
    assert not batches[0] & batches[2]
    assert not batches[1] & batches[2]


@pytest.mark.parametrize("grouping", ["prompt", "pairs"])
def test_rankings_come_in_another_order_each_epoch(
    base: str, tmp_path: Path, steps: list[list[Hashable]], grouping: str
) -> None:
    """31 prompts in batches of 5, or their 62 pairs in as many batches of 10."""
    settings = test_reward.config(epochs=2, optimizer=STILL, grouping=grouping)
    test_reward.train(tmp_path, base, settings)
    model = new_reward_model(base, seed=4)
    elements = as_elements(test_reward.RANKINGS, model)
    if grouping == "prompt":
        check_shuffled(steps, given=list(elements), batch_size=5)
    else:
        check_shuffled(steps, given=list(as_pairs(elements, seed=4)), batch_size=10)


def test_pairs_come_in_another_order_each_epoch(base: str, tmp_path: Path, steps: list[list[Hashable]]) -> None:
    test_dpo.train(tmp_path, base, test_dpo.config(epochs=2, optimizer=STILL))
    check_shuffled(steps, given=list(range(22)), batch_size=5)
