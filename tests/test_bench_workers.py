"""The benchmark's own engine does a turn of PPO: as long as is planned, counted, and all of it timed by phase."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.bench.driver import Settings, Worker
from benchmarks.bench.ours import UPDATE
from tests.stages.conftest import base, reward_model  # noqa: F401  # fixtures

from tastemaker.checkpoint import load_reader

PROMPTS = (["w3", "w5", "w7"], ["w11"], ["w13", "w17"], ["w19", "w23"])
LENGTHS = (5, 3, 2, 5)


def test_a_turn_of_ppo(base: str, reward_model: str, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = load_reader(base).tokenizer
    rows = [{"prompt": " ".join(words), "prompt_ids": words, "response_ids": [], "responses": []} for words in PROMPTS]
    data = {"rows": rows, "response_lengths": LENGTHS, "end_id": min(tokenizer.stop_ids)}
    (tmp_path / "data.json").write_text(json.dumps(data))
    spec = {
        "task": "ppo",
        "model": base,
        "reward": reward_model,
        "data": str(tmp_path / "data.json"),
        "folder": str(tmp_path / "out"),
        "precision": "float32",
        "shared": False,
        "minibatches": 2,
        "inner_epochs": 3,
        "prompt_tokens": 7,
        "response_tokens": 5,
        "warmup": 1,
    }
    settings = Settings(out=tmp_path, rounds=1, tries=1, threads=1)
    command = [sys.executable, "-m", "benchmarks.bench.ours", json.dumps(spec)]
    worker = Worker(command, tmp_path / "worker.log", settings)
    try:
        warmed_up, turn = worker.ready, worker.turn(1)
    finally:
        worker.stop()
    (first,), (step,) = warmed_up["steps"], turn["steps"]
    assert step["counts"]["generated"] == sum(LENGTHS)
    assert step["counts"]["sequences"] == len(PROMPTS)
    assert [first["counts"][f"steps of optimizer {number}"] for number in (1, 2)] == [2, 2]  # one inner epoch
    assert [step["counts"][f"steps of optimizer {number}"] for number in (1, 2)] == [6, 6]
    expected = {"rollout", "old log-probs", "reference", "values", "scores", UPDATE, "backward", "optimizer", "other"}
    assert set(step["phases"]) == expected
    assert all(seconds > 0 for seconds in step["phases"].values())
