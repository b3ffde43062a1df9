"""Learning curves of a recipe's PPO in fp32 and bf16, with the trainer's and the sampler's log-probs as old ones.

    python -m benchmarks.learning_curves out/demo

RUN is the folder of a finished run of recipes/tiny.toml, as `make demo` makes it. Its policy stage is run again in each
mode with each seed, on the same SFT model, reward model and prompts; what has been run already, under --out, is not run
again, and a run that was stopped goes on. Four modes and three seeds of the demo take a quarter of an hour on two idle
cores. Where nothing was left out, results go to benchmarks/results, and docs/precision.md and its picture are written.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarks.bench.driver import ROOT, machine
from benchmarks.learning_curves import page
from benchmarks.learning_curves.results import LAST, MODES, Results, Run, load, save
from benchmarks.learning_curves.running import Setup, perform, read_setup

from tastemaker.artefacts import library_versions, source_hash
from tastemaker.console import say
from tastemaker.errors import TastemakerError

OUT = ROOT / "out/learning-curves"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the results."""
    options = read_options(arguments)
    setup = read_setup(
        options.run, variant=options.policy, iterations=options.iterations, threads=options.threads, out=options.out
    )
    save(options.results, Results(about=about(setup), runs=measure(setup, options.modes, options.seeds)))
    say(f"wrote {options.results}")
    results = load(options.results)
    if options.results.absolute() == page.RESULTS:
        page.write(results)
        say(f"wrote {page.PAGE} and {page.PICTURE}")
    sys.stdout.write(page.render(results))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the folder of a finished run, such as out/demo")
    modes = "which to run: all, or some of %(choices)s; bf16-sampler is refused by the product, and an experiment here"
    add("--modes", nargs="+", metavar="MODE", choices=list(MODES), default=list(MODES), help=modes)
    add("--seeds", nargs="+", metavar="SEED", type=int, default=[0, 1, 2], help="of the policy stage (0 1 2)")
    add("--policy", default="ppo-ptx", help="the recipe's policy (ppo-ptx)")
    add("--iterations", type=int, help="in place of the recipe's, to try it out")
    add("--threads", type=int, help="processor threads (the recipe's, or all)")
    add("--out", type=Path, default=OUT, help="where runs are kept (out/learning-curves)")
    results = "the file to write (of all modes, three seeds and all iterations benchmarks/results/learning-curves.json)"
    add("--results", type=Path, help=results)
    options = parser.parse_args(arguments)
    if options.results is None:
        whole = options.modes == list(MODES) and len(options.seeds) > 2 and options.iterations is None
        options.results = page.RESULTS if whole else options.out / page.RESULTS.name
    return options


def measure(setup: Setup, modes: Sequence[str], seeds: Sequence[int]) -> tuple[Run, ...]:
    """Every mode with a seed before the next seed, so that a stop leaves whole comparisons."""
    wanted = [(MODES[mode], seed) for seed in dict.fromkeys(seeds) for mode in dict.fromkeys(modes)]
    runs, spent = list[Run](), list[float]()
    for place, (mode, seed) in enumerate(wanted, start=1):
        left = f", about {sum(spent) / len(spent) * (len(wanted) - place + 1) / 60:.0f} min left" if spent else ""
        say(f"run {place} of {len(wanted)}: {mode.title}, seed {seed}{left}")
        began = time.monotonic()
        runs.append(perform(setup, mode, seed))
        took = time.monotonic() - began
        if took > 0.5 * runs[-1].seconds:  # it was not there already
            spent.append(took)
        done = runs[-1]
        say(f"  score {done.end('score'):.3f} and KL {done.end('kl'):.3f} at the end; {done.seconds:.0f} s")
    return tuple(runs)


def about(setup: Setup) -> dict[str, Any]:
    """What it was measured on, without naming the machine."""
    config, gpu = setup.config, setup.device.type == "cuda"
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        **machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "code": source_hash(),
        "recipe": setup.recipe.name,
        "recipe_seed": setup.recipe.seed,
        "policy": setup.variant,
        "iterations": config.iterations,
        "batch_size": config.batch_size,
        "steps_per_iteration": config.steps_per_iteration,
        "last": LAST,
    }


if __name__ == "__main__":
    try:
        main()
    except TastemakerError as error:
        sys.exit(f"error: {error}")
