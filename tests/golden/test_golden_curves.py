"""Every figure of short training runs is what it was: a change that moves one says so.

The curves are in float64 and their rollouts in a file, so all processors agree on them far within 1e-6.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden.compare import first_move, first_moves
from tests.golden.curves import (
    BASE,
    CURVES,
    RUNS,
    SHOWN,
    STAGES,
    Curve,
    Curves,
    in_float64_throughout,
    load_exact_policy,
    rankings,
    read_rollouts,
    run,
)
from tests.work import Work, counting

from tastemaker.checkpoint import load_policy
from tastemaker.packing import pack

ROOT = Path(__file__).parents[2]
RECORDED: Mapping[str, Curves] = json.loads(CURVES.read_text(encoding="utf-8"))
HOW = (
    "If that is meant, renew the curves by `python -m tests.golden.renew` and say so in CHANGELOG.md: a line that "
    'begins with "Moves numbers:", with a figure before and after, and why the new one is right.'
)


@pytest.mark.parametrize("name", RUNS)
def test_no_curve_has_moved(name: str, tmp_path: Path) -> None:
    moves = first_moves(name, run(name, tmp_path), RECORDED[name])
    if moves:
        pytest.fail("\n".join([*moves, HOW]), pytrace=False)


def test_curves_are_not_renewed_without_a_word() -> None:
    """The changelog has to be opened for it; what it then says is for a reader to judge."""
    digest = hashlib.sha256(CURVES.read_bytes()).hexdigest()[:12]
    if digest not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        pytest.fail(f"the curves are {digest} now, and CHANGELOG.md does not name them so. {HOW}", pytrace=False)


def test_every_stage_has_its_curves_and_they_go_somewhere() -> None:
    """A curve that stands still would be held to nothing."""
    assert set(RECORDED) == set(RUNS) == set(SHOWN) == set(STAGES)
    for name, curves in RECORDED.items():
        assert tuple(curves) == SHOWN[name]
        assert max(map(len, curves.values())) <= 20
        for metric, curve in curves.items():
            numbers = [value for value in curve if value is not None]
            assert len(set(numbers)) > 1, f"{name}: {metric} stands still"
            assert all(map(math.isfinite, numbers))
    losses = {name: RECORDED[name]["loss"] for name in ("sft", "reward", "dpo")}
    assert all(loss[-1] < loss[0] for loss in losses.values() if loss[-1] is not None and loss[0] is not None)
    assert losses["dpo"][0] == pytest.approx(math.log(2), abs=1e-9)
    assert RECORDED["ppo"]["kl"][0] == 0.0


def test_the_data_has_what_the_stages_tell_apart() -> None:
    """Ties and several K; responses that ended and such that were cut off."""
    given = rankings()
    assert {len(one.responses) for one in given} == {2, 3, 4}
    assert any(len(one.order) < len(one.responses) for one in given)
    assert {row["finish"] for row in read_rollouts()} == {"stop", "length"}


# --- in float64 -----------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The first step has been taken."""


def first_step(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """What the first step of a stage does."""
    found: list[Work] = []

    def one_step(folder: Path, *, step: Callable[[int], Any], **options: Any) -> None:
        with counting() as work:
            step(0)
        found.append(work)
        raise Enough

    monkeypatch.setattr(STAGES[name], "run_steps", one_step)
    with in_float64_throughout(), pytest.raises(Enough):
        RUNS[name](folder)
    return found[0]


@pytest.mark.parametrize("name", RUNS)
def test_no_operator_rounds_to_less(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fp32 or less are the optimizer's counts of steps alone, and flags that are averaged."""
    work = first_step(name, tmp_path, monkeypatch)
    narrow = {
        (operator, shape)
        for operator, dtype, shape in work.tensors
        if dtype in (torch.float32, torch.bfloat16, torch.float16) and math.prod(shape) > 1
    }
    flags = {"_to_copy", "where"}  # of a batch's episodes or pairs
    assert {one for one in narrow if one[0] not in flags or math.prod(one[1]) > 64} == set()
    wide = [dtype for _, dtype, shape in work.tensors if dtype == torch.float64 and math.prod(shape) > 1000]
    assert len(wide) > 50


@torch.no_grad()
def test_in_float64_a_model_is_the_same_model() -> None:
    ids = [[461, 17, 5, 300, 41, 77, 2, 9], [461, 8, 128]]
    packed = pack(ids)
    places = packed.predicted([1, 1])
    found = load_exact_policy(BASE).predict(packed, *places).logprob_M
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), load_policy(BASE).predict(packed, *places).logprob_M, rtol=0, atol=2e-5)


# --- what is said of a move -----------------------------------------------------------------------------------------


def test_the_first_step_that_moved_is_named() -> None:
    then: Curve = [1.0, 2.0, 3.0, 4.0]
    now: Curve = [1.0, 2.0 + 9e-7, 3.0 + 2e-6, 4.5]
    assert first_move(then, then) is None
    told = "moved at step 3 of 4: 3.000002000 where 3.000000000 was recorded, +2.0e-06; by 5.0e-01 at most"
    assert first_move(now, then) == (3, told)
    assert first_move([1.0, 2.0, math.nan, 4.0], then) is not None


@pytest.mark.parametrize(
    ("now", "then", "told"),
    [
        ([1.0, 2.0], None, (0, "is new")),
        (None, [1.0], (0, "is not measured any more")),
        ([1.0, None], [1.0, 2.0], (2, "at step 2: None where 2.0 was recorded")),
        ([1.0], [1.0, None], (2, "has 1 steps where 2 were recorded")),
    ],
)
def test_a_curve_that_is_another(now: Curve | None, then: Curve | None, told: tuple[int, str]) -> None:
    assert first_move(now, then) == told


def test_the_curve_that_moved_first_stands_first() -> None:
    lines = first_moves("x", {"a": [1.0, 9.0], "b": [9.0, 2.0], "c": [0.0, 0.0]}, {"a": [1.0, 2.0], "b": [1.0, 2.0]})
    assert [line.split(" at ")[0].split(" is ")[0] for line in lines] == ["x: c", "x: b moved", "x: a moved"]
