"""The peer's environments: one folder a version of TRL under out/bench, made once. Standard library only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.bench.cases import PEER, PEER_PPO, Case

TORCH, TRANSFORMERS = "torch==2.13.0", "transformers==5.23.0"  # those of constraints.txt
CONSTRAINTS = Path(__file__).parents[1] / "peer-constraints.txt"
QUIET = ("install", "--quiet", "--disable-pip-version-check", "--no-input")


def trl_of(case: Case) -> str:
    """The version of TRL that a case is measured against."""
    return PEER_PPO if case.task == "ppo" else PEER


def peer_python(out: Path, trl: str) -> Path:
    """The Python of the environment with that version of TRL, which is made if it is not there."""
    folder = out / f"trl-{trl}"
    python, stamp = folder / "bin/python", folder / "ready"
    wanted = f"{trl}\n{CONSTRAINTS.read_text(encoding='utf-8')}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"setting up TRL {trl} in {folder} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    # torch first and alone, from wherever pip is set up to look, as scripts/set-up has it
    subprocess.run([str(python), "-m", "pip", *QUIET, "--no-deps", TORCH], check=True)
    packages = [f"trl=={trl}", TRANSFORMERS]
    subprocess.run([str(python), "-m", "pip", *QUIET, "-c", str(CONSTRAINTS), *packages], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python
