"""How far two processes are from one: every stage trained by both, and the largest difference of any parameter.

    python -m benchmarks.several_processes [--count 2]

The trainings are those of `tests/parallel/jobs.py`: models of 46,000 parameters, sequences of several lengths, last
batches that do not come out even. Writes benchmarks/results/several-processes.json and the table in
docs/many-processes.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.pages import put
from tests.parallel import jobs
from tests.parallel.launching import ROOT, drive

from tastemaker.artefacts import library_versions
from tastemaker.files import write_json
from tastemaker.metrics import read_metrics

RESULTS, PAGE = ROOT / "benchmarks/results/several-processes.json", ROOT / "docs/many-processes.md"
BEGIN, END = "<!-- made by benchmarks/several_processes.py -->", "<!-- end -->"
STARTS = {"sft": "base", "reward": "base", "dpo": "tied", "ppo": "ending/model"}
NAMES = {"sft": "SFT", "reward": "reward model", "dpo": "DPO", "ppo": "PPO-ptx"}


def measure(folder: Path, count: int) -> list[dict[str, Any]]:
    """Train everything in one process and in `count`."""
    jobs.make_models(folder / "models")
    for name, train in jobs.TRAININGS.items():
        train(folder / "one" / name, folder / "models")
    drive(folder, *jobs.TRAININGS, count=count)
    return [_compared(folder, name) for name in jobs.TRAININGS]


def _compared(folder: Path, name: str) -> dict[str, Any]:
    one, several = (jobs.weights(folder / kind / name / "model") for kind in ("one", "several"))
    start = jobs.weights(folder / "models" / STARTS[name])
    rows = read_metrics(folder / "one" / name / "metrics.jsonl")
    each = jobs.ppo_config().steps_per_iteration if name == "ppo" else 1
    return {
        "stage": name,
        "parameters": sum(tensor.numel() for tensor in one.values()),
        "steps": each * len(rows),
        "moved": jobs.moved(one, start),
        "difference": jobs.largest_difference(one, several),
    }


def render(count: int, versions: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, as Markdown."""
    lines = [
        f"| stage | parameters | optimizer steps | weights moved by | {count} processes differ from one by |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [NAMES[row["stage"]], f"{row['parameters']:,}", str(row["steps"])]
        lines.append(f"| {' | '.join(cells)} | {row['moved']:.1e} | {row['difference']:.1e} |")
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return "\n".join([*lines, "", f"On a processor, by gloo; {libraries}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2, help="how many processes beside one")
    count = parser.parse_args().count
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), count)
    found = {"processes": count, "versions": library_versions(), "stages": rows}
    write_json(RESULTS, found)
    print(json.dumps(rows, indent=2))
    put(PAGE, BEGIN, END, render(count, found["versions"], rows))


if __name__ == "__main__":
    main()
