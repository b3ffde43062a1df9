"""Write the golden curves anew, and say which have moved.

    python -m tests.golden.renew               the curves
    python -m tests.golden.renew --rollouts    what PPO learns from as well, sampled anew

A curve that moves is a change of numbers: CHANGELOG.md says which, with a figure before and after, and why.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tests.golden.compare import first_moves
from tests.golden.curves import CURVES, ROLLOUTS, RUNS, Curves, Rows, in_float64_throughout, run, run_ppo

from tastemaker.files import atomic_write


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    before: Mapping[str, Curves] = json.loads(CURVES.read_text(encoding="utf-8")) if CURVES.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        if "--rollouts" in arguments:
            with in_float64_throughout():
                write_rollouts(run_ppo(Path(place) / "sampled", recorded=False))
        found = {name: run(name, Path(place) / name) for name in RUNS}
    for name, curves in found.items():
        for line in first_moves(name, curves, before.get(name, {})):
            print(line)
    write_curves(found)
    print(f"CHANGELOG.md has to call them {hashlib.sha256(CURVES.read_bytes()).hexdigest()[:12]}")


def write_curves(found: Mapping[str, Curves]) -> None:
    """One curve a line."""
    stages = []
    for name, curves in found.items():
        lines = ",\n".join(f"    {json.dumps(metric)}: {json.dumps(curve)}" for metric, curve in curves.items())
        stages.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    with atomic_write(CURVES) as file:
        file.write("{\n" + ",\n".join(stages) + "\n}\n")


def write_rollouts(rows: Rows) -> None:
    """One episode a line."""
    with atomic_write(ROLLOUTS) as file:
        file.write("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main(sys.argv[1:])
