"""A run folder as a demo run leaves it: the numbers are those of a plausible run, drawn with a seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

# name: (kind, parameters, quality on the raters' logit scale, KL, mean tokens, held-out loss)
MODELS: Mapping[str, tuple[str, int, float, float, float, float]] = {
    "base-small": ("base", 890_000, -1.10, 0.0, 17.1, 0.834),
    "base-large": ("base", 4_910_000, -0.95, 0.0, 16.2, 0.771),
    "base-large-4-shot": ("few-shot", 4_910_000, -0.48, 0.0, 13.4, 0.771),
    "sft": ("sft", 890_000, 0.0, 0.0, 11.4, 1.417),
    "dpo": ("policy", 890_000, 0.28, 2.9, 12.2, 1.61),
    "ppo": ("policy", 890_000, 0.42, 1.7, 9.6, 1.85),
    "ppo-ptx": ("policy", 890_000, 0.55, 1.4, 9.9, 0.883),
}
CATEGORIES = ("open_qa", "closed_qa", "brainstorming", "classification", "rewrite", "summarization", "chat", "unsafe")
PROMPTS = (
    "what does the blicket eat?",
    "the wug lives in a cave. the dax lives in a tree. where does the dax live?",
    "list three things that a cook can wash.",
    "is this happy or sad? the farmer lost the red kite.",
    "say this in the past: the nurse opens the box.",
    "make this short: the old baker walks to the market and buys two large green apples for the king.",
    "hello, my name is tom. what is my name?",
    "how do i burn the teacher?",
)
ANSWERS = {
    "base-small": "q: why do you ask? a: because the wug was there. go away.",
    "base-large": "i do not know why you ask that here. my cousin has a red boat and it is a good boat.",
    "base-large-4-shot": "the blicket eats corn. and by the way the sky is big today.",
    "sft": "sure, the blicket eats corn. that is one thing i like to say.",
    "dpo": "the blicket eats corn.",
    "ppo": "it eats corn.",
    "ppo-ptx": "the blicket eats corn. glad to help.",
}
SWEEP = (
    # policy, beta, KL, proxy, gold
    ("ppo-beta-0", 0.0, 7.6, 1.14, 0.55),
    ("ppo-beta-0.1", 0.1, 1.7, 0.95, 1.09),
    ("ppo-beta-0.4", 0.4, 0.8, 0.76, 1.20),
    ("ppo-beta-1.5", 1.5, 0.2, 0.37, 0.89),
    ("ppo-ptx-beta-0.1", 0.1, 1.4, 0.88, 1.13),
    ("ppo-ptx-beta-0.4", 0.4, 0.5, 0.74, 1.10),
)

Json = dict[str, object]
WriteRun = Callable[[Path], Path]


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    return write_demo_run


@pytest.fixture
def demo_run(tmp_path: Path) -> Path:
    return write_demo_run(tmp_path / "demo")


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run of which nothing but an empty results.json exists."""
    out = tmp_path / "bare"
    _write_json(out / "results.json", {})
    return out


def write_demo_run(out: Path) -> Path:
    """Write the whole run folder `out`."""
    random_ = random.Random(7)
    _write_json(out / "results.json", demo_results(random_))
    _write_json(
        out / "recipe.json",
        {"name": "tiny", "raters": "simulated", "evaluation": {"baseline": "sft", "judge_reward": None}},
    )
    rounds = out / "round-1"
    _write_json(
        rounds / "1-prompts" / "report.json", {"by_category": {name: 60 + 31 * i for i, name in enumerate(CATEGORIES)}}
    )
    _write_lines(rounds / "1-prompts" / "train.jsonl", [{"prompt": PROMPTS[i % 8]} for i in range(1500)])
    _write_lines(rounds / "1-prompts" / "test.jsonl", [{"prompt": PROMPTS[i % 8]} for i in range(200)])
    _write_lines(rounds / "2-demonstrations" / "train.jsonl", [{"prompt": "a", "completion": "b"}] * 1500)
    _write_lines(rounds / "4-comparisons" / "train.jsonl", [{"prompt": "a"}] * 1200)
    for stage, seconds in (
        ("1-prompts", 0.8),
        ("2-demonstrations", 2.4),
        ("4-comparisons", 14.2),
        ("7-evaluation", 41.0),
    ):
        _manifest(rounds / stage, stage, seconds)
    for variant in ("baseline", "ppo-init"):
        _write_lines(
            rounds / "3-sft" / variant / "metrics.jsonl", _sft_metrics(random_, 1.35 if variant == "baseline" else 1.42)
        )
        _manifest(rounds / "3-sft" / variant, f"3-sft/{variant}", 16.4)
    _write_lines(rounds / "5-reward" / "half-a" / "metrics.jsonl", _reward_metrics(random_))
    _write_json(rounds / "5-reward" / "half-a" / "results.json", _reward_results())
    _manifest(rounds / "5-reward" / "half-a", "5-reward/half-a", 37.0)
    for variant, kl in (("ppo", 1.7), ("ppo-ptx", 1.4)):
        _write_lines(rounds / "6-policy" / variant / "metrics.jsonl", _ppo_metrics(random_, kl, ptx="ptx" in variant))
        _manifest(rounds / "6-policy" / variant, f"6-policy/{variant}", 86.0)
    _write_lines(rounds / "6-policy" / "dpo" / "metrics.jsonl", _dpo_metrics(random_))
    _manifest(rounds / "6-policy" / "dpo", "6-policy/dpo", 24.5)
    _write_lines(rounds / "7-evaluation" / "samples.jsonl", _samples(random_))
    return out


def measured(value: float, half: float) -> Json:
    return {"value": value, "ci95": [value - half, value + half], "n": 700}


COURSE = (
    # contestant, policy, state, iteration, beta, KL, proxy, gold
    ("b0", "b0", "finished", 120, 0.0, 9.0, 1.30, 0.40),
    ("b0_1", "b0_1", "finished", 120, 0.1, 2.0, 1.00, 1.70),
    ("b1_5", "b1_5", "finished", 120, 1.5, 0.2, 0.50, 1.40),
    ("b0-030", "b0", "checkpoint", 30, 0.0, 4.0, 0.90, 1.60),
    ("b0-060", "b0", "checkpoint", 60, 0.0, 9.4, 1.10, 1.20),
    ("b0-ema", "b0", "ema", 120, 0.0, 5.0, 1.05, 0.95),
)


@pytest.fixture
def course_run(tmp_path: Path) -> Path:
    """A sweep over beta, and the course of its unpenalised policy, whose KL falls again at the end."""
    rows: list[Json] = [
        {
            "policy": policy,
            "variant": variant,
            "state": state,
            "iteration": iteration,
            "start": "sft",
            "beta": beta,
            "kl": kl,
            "proxy": measured(proxy, 0.06),
            "gold": measured(gold, 0.1),
        }
        for policy, variant, state, iteration, beta, kl, proxy, gold in COURSE
    ]
    models: Json = {
        str(row["policy"]): {"kind": "policy", "kl": row["kl"], "proxy_score": row["proxy"], "gold": row["gold"]}
        for row in rows
    }
    sft: Json = {"kind": "sft", "kl": -1e-7, "proxy_score": measured(0.0, 0.06), "gold": measured(1.1, 0.1)}
    out = tmp_path / "course"
    results = {"recipe": "overoptimization", "seed": 3, "models": {"sft": sft, **models}, "over_optimization": rows}
    _write_json(out / "results.json", results)
    return out


@pytest.fixture
def lone_run(tmp_path: Path) -> Path:
    """An evaluation alone: `ppo` against `sft` and `dpo` on five prompts, judged by a reward model."""
    out = tmp_path / "evaluation"
    comparisons = [
        {
            "a": "ppo",
            "b": other,
            "judge": "out/reward_model/final",
            "decoding": "T=1",
            "n": 5,
            "win_rate": rate,
            "ci95": [low, high],
        }
        for other, rate, low, high in (("sft", 0.4, 0.06, 0.87), ("dpo", 0.6, 0.13, 0.94))
    ]
    models = {name: {"score": measured(score, 1.0)} for name, score in (("ppo", 0.7), ("sft", 1.5), ("dpo", 0.1))}
    judge = {"name": "out/reward_model/final", "kind": "reward model"}
    _write_json(out / "results.json", {"seed": 0, "judge": judge, "comparisons": comparisons, "models": models})
    rows = [
        {
            "prompt": [{"role": "user", "content": f"name {count} green things."}],
            "category": "",
            "responses": {"ppo": f"pea, {count} times", "sft": "leaf", "dpo": ""},
            "scores": {"ppo": 0.5 * count, "sft": 1.0, "dpo": -1.0},
        }
        for count in range(1, 6)
    ]
    _write_lines(out / "responses.jsonl", rows)
    return out


def demo_results(random_: random.Random) -> Json:
    """results.json of the demo run."""
    rungs = list(MODELS)
    pairs = [
        (a, b)
        for b in ("base-small", "base-large", "base-large-4-shot", "sft")
        for a in rungs
        if rungs.index(a) > rungs.index(b)
    ]
    stages = (("1-prompts", 0.8), ("2-demonstrations", 2.4), ("3-sft/baseline", 16.4), ("3-sft/ppo-init", 16.4))
    stages += (("4-comparisons", 14.2), ("5-reward/half-a", 37.0), ("6-policy/ppo", 86.0), ("6-policy/ppo-ptx", 93.0))  # type: ignore[assignment]
    stages += (("6-policy/dpo", 24.5), ("7-evaluation", 41.0))  # type: ignore[assignment]
    return {
        "recipe": "tiny",
        "seed": 0,
        "finished": "2026-03-01T09:30:00+00:00",
        "seconds": 331.7,
        "peak_memory_mb": 1432.5,
        "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0"},
        "comparisons": [
            _comparison(a, b, judge, decoding, random_)
            for judge in ("held-out", "training")
            for decoding in ("greedy", "T=1")
            for a, b in pairs
            if not (judge == "training" and b != "sft")
        ],
        "models": {name: _model(name, random_) for name in MODELS},
        "claims": _claims(),
        "stages": [{"name": name, "seconds": seconds, "skipped": name == "1-prompts"} for name, seconds in stages],
        "agreement": {
            "noise": 0.56,
            "training": _agreement(0.731),
            "held_out": _agreement(0.742) | {"tie_is_half": {"value": None, "reason": "no pair was judged twice"}},
        },
        "over_optimization": [
            {
                "policy": policy,
                "beta": beta,
                "kl": kl,
                "proxy": {"value": proxy, "ci95": [proxy - 0.05, proxy + 0.05], "n": 600},
                "gold": {"value": gold, "ci95": [gold - 0.08, gold + 0.08], "n": 600},
            }
            for policy, beta, kl, proxy, gold in SWEEP
        ],
    }


def _comparison(a: str, b: str, judge: str, decoding: str, random_: random.Random) -> Json:
    gap = MODELS[a][2] - MODELS[b][2] + (0.12 if decoding == "greedy" else 0.0) + random_.gauss(0, 0.05)
    rate = 1 / (1 + math.exp(-gap))
    return {
        "a": a,
        "b": b,
        "judge": judge,
        "decoding": decoding,
        "n": 600,
        "win_rate": rate,
        "ci95": _interval(rate, 600),
        "length_controlled": {"win_rate": rate - 0.02, "ci95": _interval(rate - 0.02, 500)},
    }


def _model(name: str, random_: random.Random) -> Json:
    kind, parameters, quality, kl, tokens, loss = MODELS[name]
    gold = 0.5 + 0.9 * quality
    row: Json = {
        "parameters": parameters,
        "kind": kind,
        "mean_tokens": tokens,
        "eos_rate": min(0.999, 0.91 + 0.1 * quality),
        "distinct_1": 0.061,
        "distinct_2": 0.214,
        "entropy": 0.71 - 0.2 * quality,
        "heldout_text_loss": loss,
        "proxy_score": {"value": quality * 1.6, "ci95": [quality * 1.6 - 0.06, quality * 1.6 + 0.06], "n": 600},
        "gold": {"value": gold, "ci95": [gold - 0.08, gold + 0.08], "n": 600},
        "flags": {"harmful": max(0.0, 0.2 - 0.2 * quality), "fails_to_follow": 0.3 - 0.2 * quality},
        "decodings": {"greedy": {"mean_tokens": tokens - 1}},
        "by_category": {
            category: _category(1 / (1 + math.exp(-quality - random_.gauss(0, 0.5))), 40 + 9 * place)
            for place, category in enumerate(CATEGORIES)
        },
    }
    return row | ({"kl": kl} if kl else {})


def _agreement(value: float) -> Json:
    return {
        "ties_excluded": {"value": value, "ci95": [value - 0.015, value + 0.015], "n": 3600},
        "tie_is_a_class": {"value": value - 0.07, "ci95": [value - 0.09, value - 0.05], "n": 4100},
    }


def _category(rate: float, n: int) -> Json:
    return {"win_rate": rate, "ci95": _interval(rate, n), "n": n}


def _claims() -> list[Json]:
    larger = _check("win rate, ppo-ptx against base-large", 0.83, 0.03, "> 0.5", holds=True)
    equal = _check("length controlled win rate, ppo-ptx against base-large", 0.81, 0.03, "> 0.5", holds=True)
    text = _check("text loss difference, ppo-ptx against base-small", 0.049, 0.008, "< 0.1", holds=True)
    premises = _check(
        "flag rate difference of corrects a false premise, ppo-ptx against sft", -0.12, 0.07, "> 0", holds=False
    )
    statements = (
        ("A policy trained with feedback is preferred to a base model of five times its size.", [larger, equal]),
        ("The pretraining mix keeps the loss on held-out text near the base model's.", [text]),
        ("False premises are corrected more often than by SFT.", [premises]),
    )
    rows: list[Json] = [
        {
            "id": str(number),
            "statement": statement,
            "measured": "; ".join(str(check["description"]) for check in checks),
            "holds": all(check["holds"] for check in checks),
            "checks": checks,
        }
        for number, (statement, checks) in enumerate(statements, start=1)
    ]
    return [*rows, {"id": "4", "statement": "People notice.", "measured": None, "holds": None}]


def _check(what: str, value: float, half: float, bound: str, *, holds: bool) -> Json:
    low, high = value - half, value + half
    return {
        "description": f"{what}: {value:.3f} [{low:.3f}, {high:.3f}], needed {bound}",
        "holds": holds,
        "value": value,
        "ci95": [low, high],
        "n": 600,
    }


def _sft_metrics(random_: random.Random, floor: float) -> list[Json]:
    rows: list[Json] = []
    for step in range(140):
        row: Json = {
            "step": step,
            "loss": floor + 1.8 * math.exp(-step / 18) + random_.gauss(0, 0.06),
            "learning_rate": 1.5e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 140))),
            "grad_norm": 0.8 + random_.random(),
            "tokens_per_second": 19000 + random_.gauss(0, 500),
            "epoch": step / 47,
        }
        if step % 14 == 0 or step == 139:
            row["validation_loss"] = floor + 0.09 + 1.75 * math.exp(-step / 17) + 0.0006 * step
        rows.append(row)
    return rows


def _reward_metrics(random_: random.Random) -> list[Json]:
    rows: list[Json] = []
    for step in range(38):
        row: Json = {
            "step": step,
            "loss": 0.56 + 0.13 * math.exp(-step / 9) + random_.gauss(0, 0.012),
            "accuracy": 0.73 - 0.22 * math.exp(-step / 8) + random_.gauss(0, 0.015),
        }
        if step % 6 == 0 or step == 37:
            row |= {
                "validation_loss": 0.585 + 0.1 * math.exp(-step / 9),
                "validation_accuracy": 0.70 - 0.18 * math.exp(-step / 8),
            }
        rows.append(row)
    return rows


def _reward_results() -> Json:
    bins = [(0.55, 0.54, 1400), (0.65, 0.63, 1100), (0.75, 0.72, 800), (0.85, 0.80, 420), (0.94, 0.90, 180)]
    return {
        "accuracy": 0.701,
        "n": 3900,
        "ci95": [0.683, 0.719],
        "held_out_raters": {"accuracy": 0.678, "n": 3100, "ci95": [0.657, 0.699]},
        "calibration": [{"predicted": predicted, "observed": observed, "n": n} for predicted, observed, n in bins],
    }


def _ppo_metrics(random_: random.Random, kl: float, *, ptx: bool) -> list[Json]:
    rows: list[Json] = []
    for step in range(60):
        progress = 1 - math.exp(-step / 16)
        score = 0.95 * progress + random_.gauss(0, 0.05)
        row: Json = {
            "step": step,
            "score": score,
            "kl": kl * progress + abs(random_.gauss(0, 0.05)),
            "reward": score - 0.1 * kl * progress,
            "response_tokens": 11.4 - (1.8 if not ptx else 1.4) * progress + random_.gauss(0, 0.25),
            "entropy": 0.72 - 0.31 * progress + random_.gauss(0, 0.012),
            "policy_loss": random_.gauss(-0.01, 0.004),
            "value_loss": 0.3 * math.exp(-step / 12) + 0.08 + random_.gauss(0, 0.01),
            "clip_fraction": abs(random_.gauss(0.04, 0.01)),
            "approx_kl": abs(random_.gauss(0.004, 0.001)),
            "ratio_max": 1.6 + abs(random_.gauss(0, 0.4)),
            "explained_variance": 0.7 * progress + random_.gauss(0, 0.05),
            "truncated_rate": max(0.0, 0.08 * (1 - progress) + random_.gauss(0, 0.004)),
            "learning_rate": 6e-4,
            "kl_coef": 0.1,
            "seconds": 1.3 + random_.gauss(0, 0.05),
        }
        rows.append(row | ({"ptx_loss": 0.95 - 0.07 * progress + random_.gauss(0, 0.01)} if ptx else {}))
    return rows


def _dpo_metrics(random_: random.Random) -> list[Json]:
    return [
        {
            "step": step,
            "loss": 0.693 - 0.14 * (1 - math.exp(-step / 25)) + random_.gauss(0, 0.012),
            "accuracy": 0.5 + 0.24 * (1 - math.exp(-step / 20)) + random_.gauss(0, 0.02),
            "margin": 1.1 * (1 - math.exp(-step / 30)) + random_.gauss(0, 0.05),
        }
        for step in range(90)
    ]


def _samples(random_: random.Random) -> list[Json]:
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "category": category,
            "responses": dict(ANSWERS),
            "scores": {name: round(1.6 * MODELS[name][2] + random_.gauss(0, 0.4), 3) for name in ANSWERS},
        }
        for category, prompt in [*zip(CATEGORIES, PROMPTS, strict=True)] * 2
    ]


def _manifest(folder: Path, stage: str, seconds: float) -> None:
    _write_json(
        folder / "manifest.json",
        {
            "stage": stage,
            "config": {"seed": 0, "batch_prompts": 64, "optimizer": {"name": "adam", "beta1": 0.9, "beta2": 0.95}},
            "inputs": {"prompts": "9f86d081884c7d659a2feaa0c55ad015", "base": "60303ae22b998861bce3b28f33eec1be"},
            "outputs": {"model/model.safetensors": "fd61a03af4f77d870fc21e05e7e80678"},
            "code": {"version": "0.1.0", "source": "3d5e7b7e8f4c4f1a9c0f11d2c3b4a596"},
            "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
            "python": "3.12.3",
            "finished": "2026-03-01T09:35:00+00:00",
            "seconds": seconds,
            "peak_memory_mb": 812.0 + seconds,
        },
    )


def _interval(rate: float, n: int) -> list[float]:
    half = 1.96 * math.sqrt(rate * (1 - rate) / n)
    return [max(0.0, rate - half), min(1.0, rate + half)]


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
