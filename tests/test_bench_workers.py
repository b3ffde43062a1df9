"""The benchmark's engines do what is planned: as long, counted, and all of a turn of PPO timed by phase."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.bench import peer
from benchmarks.bench.driver import Settings, Worker
from benchmarks.bench.measuring import WARM_UP_TOKENS
from benchmarks.bench.ours import UPDATE
from tests.stages.conftest import base, reward_model  # noqa: F401  # fixtures
from transformers import AutoModelForCausalLM, GenerationConfig

from tastemaker.checkpoint import load_reader
from tastemaker.records import Message

PROMPTS = (["w3", "w5", "w7"], ["w11"], ["w13", "w17"], ["w19", "w23"])
LENGTHS = (11, 3, 2, 5)
SPEC = {"precision": "float32", "shared": False, "autocast": False, "warmup": 1}


def steps_of(spec: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The step that warmed up, and that of a turn."""
    settings = Settings(out=folder, rounds=1, tries=1, threads=1)
    command = [sys.executable, "-m", "benchmarks.bench.ours", json.dumps(spec)]
    worker = Worker(command, folder / "worker.log", settings)
    try:
        (first,), (step,) = worker.ready["steps"], worker.turn(1)["steps"]
    finally:
        worker.stop()
    return first, step


def test_what_a_turn_of_dpo_packs_is_counted_and_not_what_its_reference_reads(base: str, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = load_reader(base).tokenizer
    rows, tokens, processed = list[dict[str, Any]](), 0, 0
    for prompt, responses in (("w3 w5 w7", ["w2 w4", "w6"]), ("w11", ["w8", "w9 w10 w12"])):
        prompt_ids = tokenizer.prompt_ids((Message("user", prompt),))
        response_ids = [tokenizer.response_ids(response, finished=True) for response in responses]
        told = {"prompt": prompt, "prompt_ids": prompt_ids, "responses": responses, "response_ids": response_ids}
        rows.append(told)
        tokens += 2 * len(prompt_ids) + sum(map(len, response_ids))
        processed += len(prompt_ids) + sum(map(len, response_ids))
    (tmp_path / "data.json").write_text(json.dumps({"rows": rows}))
    spec = SPEC | {"task": "dpo", "model": base, "data": str(tmp_path / "data.json"), "folder": str(tmp_path / "out")}
    for counts in (step["counts"] for step in steps_of(spec, tmp_path)):
        assert counts["sequences"] == 4
        assert counts["tokens"] == tokens == counts["prompt"] + counts["response"]
        assert counts["processed"] == processed == counts["prompt once"] + counts["response"]
        assert counts["steps of optimizer 1"] == 1


def test_a_turn_of_ppo(base: str, reward_model: str, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = load_reader(base).tokenizer
    rows = [{"prompt": " ".join(words), "prompt_ids": words, "response_ids": [], "responses": []} for words in PROMPTS]
    data = {"rows": rows, "response_lengths": LENGTHS, "end_id": min(tokenizer.stop_ids)}
    (tmp_path / "data.json").write_text(json.dumps(data))
    spec = SPEC | {
        "task": "ppo",
        "model": base,
        "reward": reward_model,
        "data": str(tmp_path / "data.json"),
        "folder": str(tmp_path / "out"),
        "minibatches": 2,
        "inner_epochs": 3,
        "prompt_tokens": 7,
        "response_tokens": 11,
    }
    first, step = steps_of(spec, tmp_path)
    assert first["counts"]["generated"] == WARM_UP_TOKENS + 3 + 2 + 5
    assert step["counts"]["generated"] == sum(LENGTHS)
    assert step["counts"]["sequences"] == len(PROMPTS)
    assert [step["counts"][f"steps of optimizer {number}"] for number in (1, 2)] == [6, 6]
    expected = {"rollout", "old log-probs", "reference", "values", "scores", UPDATE, "backward", "optimizer", "other"}
    assert set(step["phases"]) == expected
    assert all(seconds > 0 for seconds in step["phases"].values())


def test_the_peer_generates_as_is_planned_and_less_when_it_warms_up(base: str) -> None:  # noqa: F811
    pace, model = SimpleNamespace(counts=Counter[str]()), AutoModelForCausalLM.from_pretrained(base).eval()
    prompt_BT, pad_id, end_id = torch.tensor([[5, 7, 11]] * len(LENGTHS)), 3, 4
    peer.hold_lengths(model, peer.PlannedLengths(list(LENGTHS), 3, end_id, pad_id), pace)  # type: ignore[arg-type]
    config = GenerationConfig(max_new_tokens=11, do_sample=True, eos_token_id=end_id, pad_token_id=pad_id)
    generated = []
    for _ in range(3):
        model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=config)
        generated.append(pace.counts["generated"])
    assert generated == [WARM_UP_TOKENS + 3 + 2 + 5, sum(LENGTHS), sum(LENGTHS)]
    assert config.max_new_tokens == 11  # the caller's own is as it was
