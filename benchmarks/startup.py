"""Seconds from a command to its first optimizer step, on a small random Llama (4 layers of 256, 4,096 tokens).

    python benchmarks/startup.py [--repeats 3]

The first step is done when the first line of `metrics.jsonl` is there. The least of the repeats is told, by the clock
and in seconds of processor time, to which whatever else runs on the machine adds less. `--help`, a mistyped option and
a file that is not there are timed beside.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import CASES, COMMANDS, Case, make_data, make_model

from tastemaker.checkpoint import new_reward_model, save_reward_model

ANSWERS = {
    "sft --help": "sft --help",
    "a mistyped option": "sft --model MODEL --data DATA --out OUT --epoch 3",
    "a file that is not there": "sft --model MODEL --data none.jsonl --out OUT",
}


Times = tuple[float, float]


def processor_seconds() -> float:
    """What all processes that were started and waited for have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def times_to_first_step(arguments: list[str], out: Path) -> Times:
    """Start the command, wait for the first step, stop it."""
    metrics, began, before = out / "metrics.jsonl", time.monotonic(), processor_seconds()
    process = subprocess.Popen(
        [sys.executable, "-m", "tastemaker.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    found = time.monotonic() - began
    if process.poll() not in (None, 0):
        raise SystemExit(process.stderr.read().decode() if process.stderr else "failed")
    process.kill()
    process.wait()
    return found, processor_seconds() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make_model(place / "model", "small")
        save_reward_model(place / "reward", new_reward_model(str(place / "model"), seed=0))
        for case in (case for case in CASES if case.size == "small" and not case.options):
            times = [measure(case, place, number) for number in range(repeats)]
            tell(f"{case.stage}, first step", times)
        for name, line in ANSWERS.items():
            arguments = [str(place / word.lower()) if word.isupper() else word for word in line.split()]
            times = []
            for _ in range(repeats):
                began, before = time.monotonic(), processor_seconds()
                subprocess.run([sys.executable, "-m", "tastemaker.cli", *arguments], capture_output=True)
                times.append((time.monotonic() - began, processor_seconds() - before))
            tell(name, times)


def tell(name: str, times: list[Times]) -> None:
    clock, processor = (min(each) for each in zip(*times, strict=True))
    print(f"{name:<26} {clock:5.2f} s by the clock, {processor:5.2f} s of processor time", flush=True)


def measure(case: Case, place: Path, number: int) -> Times:
    data, out = place / f"{case.stage}.jsonl", place / f"{case.stage}-{number}"
    make_data(data, case)
    places = {"MODEL": place / "model", "REWARD": place / "reward", "DATA": data}
    words = COMMANDS[case.stage].split()
    return times_to_first_step([*(str(places.get(word, word)) for word in words), "--out", str(out)], out)


if __name__ == "__main__":
    main()
