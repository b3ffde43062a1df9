"""The estimate of memory against the peak that was measured, for every stage that trains, each in a process of its own.

    python benchmarks/memory.py [--cases SUBSTRING] [--json FILE]

Models are Llamas with random weights, data is random words; each run is a command of the product, and both figures are
those that it writes into its manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = {
    "small": {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688, "vocab_size": 4096},
    "medium": {"num_hidden_layers": 10, "hidden_size": 448, "intermediate_size": 1200, "vocab_size": 16384},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
COMMANDS = {
    "sft": "sft --model MODEL --data DATA --epochs 1 --batch-size 32",
    "reward": "reward --model MODEL --data DATA --batch-size 16",
    "dpo": "dpo --init MODEL --data DATA --batch-size 16",
    "ppo": "ppo --init MODEL --reward REWARD --data DATA --iterations 2 --batch-size 32 --minibatches 2 "
    "--decoding.max-new-tokens 64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command on a model, with prompts and responses of so many words."""

    stage: str
    size: str
    prompt: int = 64
    response: int = 64
    options: str = ""

    @property
    def name(self) -> str:
        return f"{self.stage} {self.size} {self.prompt}+{self.response} {self.options}".strip()


BF16 = "--optimizer.precision bfloat16"
RECOMPUTE = "--optimizer.gradient-checkpointing"
CASES = [
    *(Case(stage=stage, size=size) for stage in ("sft", "reward", "dpo", "ppo") for size in SIZES),
    Case(stage="sft", size="small", options=BF16),
    Case(stage="sft", size="medium", options=BF16),
    Case(stage="sft", size="medium", prompt=200, response=280),
    Case(stage="sft", size="medium", prompt=300, response=600),
    Case(stage="sft", size="medium", options="--microbatch-tokens 1024"),
    Case(stage="sft", size="medium", options=RECOMPUTE),
    Case(stage="reward", size="medium", options=BF16),
    Case(stage="dpo", size="medium", options=RECOMPUTE),
    Case(stage="ppo", size="medium", options="--policy.precision bfloat16 --value.precision bfloat16"),
]


def make_model(folder: Path, size: str) -> None:
    """A random Llama with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    settings = SIZES[size]
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{place}" for place in range(settings["vocab_size"] - 4))]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(str(folder))
    config = LlamaConfig(**settings, **HEADS, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(str(folder))


def make_data(path: Path, case: Case) -> None:
    """As many rows as two optimizer steps take, each as the stage reads it."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(4000)}" for _ in range(count))

    rows: list[dict[str, Any]] = []
    for _ in range(64 if case.stage in ("sft", "ppo") else 32):
        row: dict[str, Any] = {"prompt": words(case.prompt)}
        if case.stage == "sft":
            row["completion"] = words(case.response)
        elif case.stage == "reward":
            row |= {"responses": [words(case.response) for _ in range(4)], "ranking": [[0], [1], [2], [3]]}
        elif case.stage == "dpo":
            row |= {"chosen": words(case.response), "rejected": words(case.response)}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(case: Case, models: Path, folder: Path) -> dict[str, Any]:
    """The figures of one command's manifest."""
    folder.mkdir()
    make_data(folder / "data.jsonl", case)
    model, reward = models / case.size, models / f"{case.size}-reward"
    line = f"{COMMANDS[case.stage]} --out OUT {case.options}"
    places = {"MODEL": model, "REWARD": reward, "DATA": folder / "data.jsonl", "OUT": folder / "out"}
    arguments = [str(places.get(word, word)) for word in line.split()]
    done = subprocess.run([sys.executable, "-m", "tastemaker.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr}")
    found: dict[str, Any] = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))["memory"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    chosen, found = [case for case in CASES if options.cases in case.name], []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for size in {case.size for case in chosen}:
            make_model(place / size, size)
            if any(case.stage == "ppo" and case.size == size for case in chosen):
                from tastemaker.checkpoint import new_reward_model, save_reward_model

                save_reward_model(place / f"{size}-reward", new_reward_model(str(place / size), seed=0))
        print(f"{'case':<60} {'measured':>9} {'expected':>9} {'ratio':>6}   (MiB)")
        for number, case in enumerate(chosen):
            memory = run(case, place, place / f"run-{number}")
            ratio = memory["expected_mb"] / memory["peak_mb"]
            print(f"{case.name:<60} {memory['peak_mb']:>9.0f} {memory['expected_mb']:>9.0f} {ratio:>6.2f}", flush=True)
            parts = ", ".join(f"{name} {size:.0f}" for name, size in memory["parts_mb"].items() if size > 1)
            print(f"    {parts}", file=sys.stderr)
            found.append({"case": case.name, **memory})
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
