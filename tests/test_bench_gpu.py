"""The benchmark for GPUs where there is none: all but the two kernels runs, and it says that it measured nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import Shape, measure, problems

TINY = Shape(
    layers=1,
    width=12,
    heads=6,
    groups=3,
    inner=20,
    vocabulary=97,
    rollouts=((4, 3, 5),),
    sequences=3,
    longest=11,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert "There is no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_everything_is_measured() -> None:
    found = measure(TINY, torch.device("cpu"), rounds=1)
    assert found["checks"]["rollouts"] == {
        "responses": 4,
        "equal_responses": 4,
        "largest_logprob_difference": 0.0,
        "graphs": False,
        "failure": None,
    }
    assert len(found["problems"]) == 3  # no kernel, with and without a window, and no graphs
    assert [(record["dtype"], record["rows"]) for record in found["rollouts"]] == [("float32", 4), ("bfloat16", 4)]
    for record in found["rollouts"]:
        assert record["eager"]["tokens_per_second"] > 0
        assert len(record["graphs"]["seconds"]) == 1
    assert found["training"]["uniform"]["tokens"] == 33
    assert found["training"]["spread"]["tokens"] < 33
    assert found["training"]["spread"]["padded"]["seconds"][0] > 0
    assert "varlen" not in found["training"]["spread"], "what a kernel that is not there would take"


@pytest.mark.parametrize(
    ("varlen", "graphs", "failure", "difference", "says"),
    [
        (0.0021, True, None, 2e-6, []),
        (0.0031, True, None, 2e-6, ["attention: 3.1e-03 off"]),
        (float("nan"), True, None, 2e-6, ["attention: nan off"]),
        (0.0021, False, None, 2e-6, ["no graphs"]),
        (0.0021, True, "out of memory", 2e-6, ["no graphs (out of memory)"]),
        (0.0021, True, None, 0.02, ["log-probs differ by 2.0e-02"]),
    ],
)
def test_what_does_not_agree_is_named(
    varlen: float, graphs: bool, failure: str | None, difference: float, says: list[str]
) -> None:
    found = problems(
        {
            "attention": {"varlen": varlen, "padded": 0.002},
            "attention_window": {"varlen": 0.002, "padded": 0.002},
            "rollouts": {"graphs": graphs, "failure": failure, "largest_logprob_difference": difference},
        }
    )
    assert len(found) == len(says)
    assert all(words in problem for words, problem in zip(says, found, strict=True))
