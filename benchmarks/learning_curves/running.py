"""The PPO stage of a finished run again, in another mode and with another seed, watched at its first minibatches.

It is `stages.ppo.train_ppo` in a stage's folder, as `Round.policy` runs it, on the files of the finished run: so a run
that is there already is not run again, and one that was interrupted goes on. The seed is that of the policy stage
alone; prompts, text, SFT model and reward model stay those of the finished run, and scores are computed as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from benchmarks.learning_curves.results import Mode, Run

from tastemaker import parallel
from tastemaker.artefacts import claimed, read_json, read_manifest, run_stage, source_hash
from tastemaker.config import from_mapping
from tastemaker.errors import ConfigError
from tastemaker.inputs import Inputs
from tastemaker.metrics import MetricsWriter, read_metrics
from tastemaker.recipe import Recipe
from tastemaker.settings import PpoConfig
from tastemaker.stages import ppo
from tastemaker.training import StepReport

FIRST = "first-minibatch.jsonl"
CURVES = ("score", "kl", "entropy", "sampler_mismatch", "ratio_mean", "ratio_max", "clip_fraction", "approx_kl")
FIRST_CURVES = ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all runs share: a finished run, one of its policies, and where the new runs are kept."""

    recipe: Recipe
    folder: Path
    """Of the finished round."""
    variant: str
    config: PpoConfig
    device: torch.device
    out: Path


def read_setup(run: Path, *, variant: str, iterations: int | None, threads: int | None, out: Path) -> Setup:
    """The setup that a finished run's recipe gives; with `iterations` shorter or longer than there."""
    if not (run / "results.json").exists():
        raise ConfigError(f"{run} is not the folder of a finished run; `make demo` makes one, out/demo.")
    recipe = from_mapping(Recipe, read_json(run / "recipe.json"), where=str(run / "recipe.json"))
    config = recipe.policy.get(variant)
    if not isinstance(config, PpoConfig):
        known = [name for name, policy in recipe.policy.items() if isinstance(policy, PpoConfig)]
        raise ConfigError(f"the recipe has no PPO policy {variant!r}; it has {', '.join(known) or 'none'}.")
    count = config.iterations if iterations is None else iterations
    return Setup(
        recipe=recipe,
        folder=run / "round-1",
        variant=variant,
        # Checkpoints change no numbers; a recipe of minutes has none, and these runs are to go on after a kill.
        config=replace(config, iterations=count, keep_every=None, checkpoint_every=10),
        device=parallel.prepare(threads or recipe.threads),
        out=out,
    )


def perform(setup: Setup, mode: Mode, seed: int) -> Run:
    """Train in that mode with that seed, unless it has been done."""
    config, inputs = mode.settings(setup.config), Inputs(setup.recipe, setup.folder, setup.device)
    init, asked, held_out = inputs.start(config.init, selected=True), inputs.prompts("train"), inputs.held_out_texts()
    reward = inputs.model(f"reward/{config.reward}") if config.reward in setup.recipe.reward else None
    text = inputs.texts() if config.ptx_coef else None
    scorer = inputs.scorer(config.reward, budget=config.microbatch_tokens)
    for name, value in (
        ("policy seed", seed),
        ("device", setup.device.type),
        ("threads", torch.get_num_threads()),
        ("code", source_hash()),  # curves of different code are not compared
    ):
        inputs.setting(name, value)

    def work(folder: Path) -> None:
        with _watched(folder / FIRST):
            ppo.train_ppo(
                folder,
                config=config,
                init=init.load(),
                reward=None if reward is None else reward.load(),
                scorer=scorer.load(),
                prompts=asked.load(),
                pretraining=() if text is None else text.load(),
                heldout_text=held_out.load(),
                device=setup.device,
                seed=seed,
            )

    folder = setup.out / f"{mode.name}-{seed}"
    with claimed(folder):
        run_stage(folder, stage=f"learning-curves/{mode.name}", config=config, inputs=inputs.known, work=work)
    return read_run(folder, mode, seed)


def read_run(folder: Path, mode: Mode, seed: int) -> Run:
    """What a finished run left."""
    manifest, rows, first = read_manifest(folder), read_metrics(folder / "metrics.jsonl"), read_metrics(folder / FIRST)
    assert manifest is not None
    assert len(rows) == len(first)
    # The stage itself compares the sampler's own with nothing.
    rows_of = {"sampler_mismatch": first if mode.old_logprobs == "sampler" else rows}
    curves = {name: [float(row[name]) for row in rows_of.get(name, rows)] for name in CURVES}
    return Run(
        mode=mode.name,
        seed=seed,
        seconds=float(manifest["seconds"]),
        seconds_per_iteration=median(float(row["seconds"]) for row in rows),
        curves=curves,
        first_minibatch={name: [float(row[name]) for row in first] for name in FIRST_CURVES},
    )


@contextmanager
def _watched(path: Path) -> Iterator[None]:
    """Write what an iteration's first minibatch had, where the stage checks that every ratio is 1.

    The stage's own metrics are of all minibatches together. Its check still decides.
    """
    plain, writer = ppo.PpoRun._check_ratio, list[MetricsWriter]()

    def check_ratio(self: ppo.PpoRun, report: StepReport, iteration: int) -> None:
        sums, tokens = report.sums, max(report.sums["tokens"], 1.0)
        found = {
            "ratio_mean": sums["ratio"] / tokens,
            "ratio_max": float(self.ratio_max),
            "clip_fraction": sums["clipped"] / tokens,
            "approx_kl": 0.5 * sums["square_log_ratio"] / tokens,
        }
        if self.config.old_logprobs == "sampler":  # old from the sampler, new from the trainer, by the same weights
            found["sampler_mismatch"] = sums["abs_log_ratio"] / tokens
        if not writer:
            writer.append(MetricsWriter(path, resume_at=iteration))
        writer[0].write(iteration, found)
        plain(self, report, iteration)

    with patch.object(ppo.PpoRun, "_check_ratio", check_ratio):
        yield
