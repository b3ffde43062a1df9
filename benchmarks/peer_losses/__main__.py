"""Hold our losses and gradients beside TRL's on one batch: `python -m benchmarks.peer_losses`.

    --out FOLDER        where the peer's environments are, or are made (out/bench)
    --results FILE      where the figures go (benchmarks/results/peer-losses.json, and then docs/peers.md)

Takes a minute where the environments are there. Needs no GPU and no model but the random ones that it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.driver import ROOT, environment
from benchmarks.bench.environments import peer_python
from benchmarks.peer_losses.cases import CASES, PEER, PEER_PPO
from benchmarks.peer_losses.page import RESULTS, write

VERSIONS = """
import json
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("torch", "transformers")}))
"""


def main() -> None:
    """Measure both sides, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    pythons = {version: str(peer_python(given.out.absolute(), version)) for version in (PEER, PEER_PPO)}
    with tempfile.TemporaryDirectory() as place:
        for command in (
            [sys.executable, "-m", "benchmarks.peer_losses.batch", place],
            [sys.executable, "-m", "benchmarks.peer_losses.ours", place],
            *([python, "-m", "benchmarks.peer_losses.peer", place, version] for version, python in pythons.items()),
        ):
            run(command)
        cases = compare(Path(place))
    known = json.loads(run([pythons[PEER], "-c", VERSIONS]))
    results = {"versions": {"TRL": f"{PEER} and {PEER_PPO}"} | known, "cases": cases}
    given.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if given.results == RESULTS:
        write(results)


def compare(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The figures of every case, ours beside those of the version that it is held against."""
    from benchmarks.peer_losses.results import compared, of_case
    from safetensors.torch import load_file

    ours = load_file(str(folder / "ours.safetensors"))
    peers = {version: load_file(str(folder / f"trl-{version}.safetensors")) for version in (PEER, PEER_PPO)}
    return {name: compared(of_case(name, ours), of_case(name, peers[case.peer])) for name, case in CASES.items()}


def run(command: Sequence[str]) -> str:
    """Run a program on one thread without a network, and say what it printed. What is compared is this checkout."""
    variables = environment(1) | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
