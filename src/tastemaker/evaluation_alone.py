"""Evaluation of a few policies on a user's own prompts, judged by a reward model or a Python function.

The recipe's evaluation does far more; this is what `tastemaker evaluate` needs for a quick answer: everybody responds
to every prompt, the judge scores, and the first policy's win rate over each other one is given with its interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tastemaker import parallel
from tastemaker.checkpoint import load_policy, load_reader, load_reward_model
from tastemaker.errors import DataError
from tastemaker.files import atomic_write, write_json
from tastemaker.functions import is_function_path, load_function
from tastemaker.intervals import mean_ci
from tastemaker.records import Prompt
from tastemaker.responses import DecodingConfig, check_room
from tastemaker.scoring import FunctionScorer, ModelScorer, Scorer
from tastemaker.stages.evaluation import Contestant, Field, Sampled
from tastemaker.stages.evaluation.contestants import finished_rate, respond
from tastemaker.statistics import length_controlled_win_rate, win_rate


def evaluate_alone(
    folder: Path,
    policies: Mapping[str, str],
    prompts: Sequence[Prompt],
    judge: str,
    decoding: DecodingConfig,
    *,
    seed: int,
    threads: int | None,
) -> None:
    """Write `results.json` and `responses.jsonl`, and print the table."""
    device = parallel.prepare(threads)
    if len({prompt.key for prompt in prompts}) < 2:
        raise DataError("an interval needs two prompts at least; give more in --data.")
    for name, path in policies.items():
        check_room(prompts, load_reader(path), decoding.max_new_tokens, name)
    scorer: Scorer
    is_function = is_function_path(judge)
    if is_function:
        scorer = FunctionScorer(load_function(judge), name=judge)
    else:
        scorer = ModelScorer(load_reward_model(judge).to(device), budget=decoding.batch_tokens)
    keys = [prompt.key for prompt in prompts]
    sampled: dict[str, Sampled] = {}
    scores: dict[str, list[float]] = {}
    for name, path in policies.items():
        field = Field(contestant=Contestant(model=path), policy=load_policy(path).to(device))
        sampled[name] = respond(name, field, prompts, decoding, None, seed=seed)
        scores[name] = scorer(prompts, sampled[name].responses)
    models = {
        name: {
            "score": mean_ci(scores[name], keys).to_json(),
            "mean_tokens": float(np.mean(one.num_tokens)),
            "eos_rate": finished_rate(one),
        }
        for name, one in sampled.items()
    }
    first, *others = policies
    comparisons = [_compare(first, other, sampled, scores, keys, judge, decoding) for other in others]
    named = {"name": judge, "kind": "function" if is_function else "reward model"}
    results = {"seed": seed, "judge": named, "comparisons": comparisons, "models": models}
    write_json(folder / "results.json", results)
    with atomic_write(folder / "responses.jsonl") as file:
        for place, prompt in enumerate(prompts):
            texts = {name: one.responses[place].text for name, one in sampled.items()}
            marks = {name: scores[name][place] for name in policies}
            row = {
                "prompt": [message.to_json() for message in prompt.messages],
                "category": prompt.about.category,
                "responses": texts,
                "scores": marks,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    _print(comparisons, models)


def _compare(
    a: str,
    b: str,
    sampled: Mapping[str, Sampled],
    scores: Mapping[str, Sequence[float]],
    keys: Sequence[str],
    judge: str,
    decoding: DecodingConfig,
) -> dict[str, Any]:
    answers = zip(sampled[a].responses, scores[a], sampled[b].responses, scores[b], strict=True)
    preference = [
        0.5 if one.text == other.text or ours == theirs else float(ours > theirs)
        for one, ours, other, theirs in answers
    ]
    estimate = win_rate(preference, keys)
    lengths = [[len(response.text) for response in sampled[name].responses] for name in (a, b)]
    controlled = length_controlled_win_rate(preference, lengths[0], lengths[1], keys)
    return {
        "a": a,
        "b": b,
        "judge": judge,
        "decoding": decoding.name,
        "n": estimate.n,
        "win_rate": estimate.value,
        "ci95": estimate.ci95.to_json(),
        "length_controlled": {"win_rate": controlled.value, "ci95": controlled.ci95.to_json()},
    }


def _print(comparisons: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("policy", "score", "tokens", "ended", title=None)
    for name, row in models.items():
        low, high = row["score"]["ci95"]
        score = f"{row['score']['value']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(name, score, f"{row['mean_tokens']:.1f}", f"{row['eos_rate']:.0%}")
    console = Console()
    console.print(table)
    for row in comparisons:
        (low, high), equal = row["ci95"], row["length_controlled"]
        said = f"{row['a']} preferred to {row['b']}: {row['win_rate']:.1%} [{low:.1%}, {high:.1%}]"
        low, high = equal["ci95"]
        console.print(f"{said}; at equal length {equal['win_rate']:.1%} [{low:.1%}, {high:.1%}]", soft_wrap=True)
