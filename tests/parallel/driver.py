"""A program for several processes: `driver.py FOLDER JOB ...`, started by `launching.drive`.

Each job works in `FOLDER/several/JOB`; models lie in `FOLDER/models`. What a job finds out beyond what its training
writes is left by the first process as `found.json`.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.parallel import jobs

from tastemaker import parallel, processes
from tastemaker.checkpoint import load_policy, load_state, save_policy, save_state
from tastemaker.corpus import next_token_places
from tastemaker.errors import TrainingError
from tastemaker.files import write_json
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel
from tastemaker.packing import pack
from tastemaker.stages import sft
from tastemaker.stages.ppo import PpoRun
from tastemaker.training import Loss, OptimizerConfig, Trainer

SEQUENCES = [[9, 10, 11, 12], [20, 21], [30, 31, 32], [40, 41, 42, 43, 44], [50, 51]]


def failing_in_the_second(places: Sequence[int]) -> Sequence[int]:
    """Goes wrong in the second process, in a way that the doctor has a name for."""
    if processes.number() == 1:
        raise TrainingError("diverged in process 1", finding="not-finite")
    return places


def gathering(folder: Path, _models: Path) -> None:
    """What is shared out comes back in order; what is summed is summed."""
    here, count = processes.number(), processes.count()
    told = list[str | None]()
    try:
        parallel.in_shares(3, failing_in_the_second)
    except TrainingError as error:
        told = [str(error), error.finding]
    turns = {size: [(turn.item, turn.counts, turn.last) for turn in parallel.turns(range(size))] for size in range(5)}
    found = {
        "shares": parallel.in_shares(5, lambda places: [(place, here) for place in places]),
        "fewer": parallel.in_shares(1, lambda places: [(place, here) for place in places]),
        "turns": parallel.in_shares(count, lambda _: [turns]),
        "told": parallel.in_shares(count, lambda _: [told]),
        "sum": parallel.summed_amounts([1.5 + here, -2.0]),
        "tensor": parallel.summed(torch.tensor([here, 1.0 - here])).tolist(),
        "largest": parallel.largest(-3.0 - here),
        "first": parallel.from_first(f"said by {here}"),
    }
    write_json(folder / "found.json", found)


def lm_loss(policy: LanguageModel, seen: list[bool], trainer: Trainer, place: int, num_tokens: float) -> Loss:
    """The language model's loss of a sequence; notes whether gradients were synced before."""
    seen.append(any(parameter.grad is not None for parameter in trainer.parameters))
    packed = pack([SEQUENCES[place]])
    logprob_M = policy.predict(packed, *next_token_places(packed)).logprob_M
    return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))


def syncing(folder: Path, models: Path) -> None:
    """One step over five micro-batches in two parts: when gradients are added up over processes, and what they are."""
    policy = load_policy(str(models / "tied"))
    tied = policy.library.get_input_embeddings().weight is policy.library.get_output_embeddings().weight
    trainer = Trainer(policy, OptimizerConfig(learning_rate=1e-3), total_steps=1)
    seen: list[bool] = []
    loss_fn = partial(lm_loss, policy, seen, trainer)
    first, _ = trainer.accumulate([0, 1, 2], loss_fn, 7.0, last=False)
    second, _ = trainer.accumulate([3, 4], loss_fn, 5.0)
    gradients = [parameter.grad for parameter in trainer.parameters]
    pieces = [None if gradient is None else parallel.part_of(gradient).numel() for gradient in gradients]
    whole = [None if gradient is None else parallel.whole(gradient).double().sum().item() for gradient in gradients]
    report = trainer.apply(first + second, {})
    still = policy.library.get_input_embeddings().weight is policy.library.get_output_embeddings().weight
    found = {
        "synced_before": parallel.in_shares(processes.count(), lambda _: [seen]),
        "pieces": parallel.in_shares(processes.count(), lambda _: [pieces]),
        "gradients": whole,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "tied": [tied, still],
    }
    write_json(folder / "found.json", found)


def clipping(folder: Path, models: Path) -> None:
    """A step along a clipped gradient, to which Adam's is proportional where its epsilon is so large."""
    policy = load_policy(str(models / "base"))
    settings = OptimizerConfig(learning_rate=1e6, epsilon=1e6, schedule="constant", max_grad_norm=0.1)
    trainer = Trainer(policy, settings, total_steps=1)
    report = trainer.step([0, 1, 2], partial(lm_loss, policy, [], trainer), 7.0)
    assert report.grad_norm > 1
    save_policy(folder / "model", policy)


def diverging(folder: Path, models: Path) -> None:
    """The second process's own micro-batch, and no other, has a loss that is no number."""
    policy = load_policy(str(models / "base"))
    before = {name: parallel.whole(tensor).clone() for name, tensor in policy.library.state_dict().items()}
    trainer = Trainer(policy, OptimizerConfig(learning_rate=1e-3), total_steps=1)

    def loss_fn(place: int, num_tokens: float) -> Loss:
        loss = lm_loss(policy, [], trainer, place, num_tokens)
        return Loss(loss.value * torch.nan) if place == 1 else loss

    said = ""
    try:
        trainer.step([0, 1, 2], loss_fn, 7.0)
    except TrainingError as error:
        said = f"{error.finding}: {error}"
    after = policy.library.state_dict()
    found = {
        "said": parallel.in_shares(processes.count(), lambda _: [said]),
        "unchanged": all(torch.equal(parallel.whole(after[name]), tensor) for name, tensor in before.items()),
    }
    write_json(folder / "found.json", found)


def filling(folder: Path, _models: Path) -> None:
    """A state in parts for which there is no room: no file may grow beyond 20 kB."""
    path, said = folder / "checkpoint" / "state.pt", ""
    save_state(path, {"step": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # what a disk would not send
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        save_state(path, {"step": 3, "weights": torch.ones(100, 1000)})
    except OSError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saids = parallel.in_shares(processes.count(), lambda _: [said])
    state = load_state(path)
    found = {"said": saids, "state": state, "left": sorted(entry.name for entry in path.parent.iterdir())}
    write_json(folder / "found.json", found)


def sampling(folder: Path, models: Path) -> None:
    """Rollouts of one iteration, and the first numbers of the noise in the first steps of fine-tuning."""
    run = PpoRun(
        jobs.ppo_config(decoding={"max_new_tokens": 6}, ptx_coef=0.0, batch_size=9),
        str(models / "base"),
        str(models / "judge"),
        jobs.scorer(models),
        [jobs.PROMPTS[0]],  # one prompt, so that only seeds make responses differ
        (),
        (),
        jobs.CPU,
        3,
    )
    rollouts = run.roll_out([0] * 9, 0)
    draws = list[float]()
    loss = sft._example_loss

    def drawing(*arguments: Any) -> Loss:
        draws.append(torch.rand(()).item())
        return loss(*arguments)

    sft._example_loss = drawing  # type: ignore[assignment]
    try:
        jobs.lone(folder, models)
    finally:
        sft._example_loss = loss
    found = {
        "responses": [list(rollout.response_ids) for rollout in rollouts],
        "noise": parallel.in_shares(processes.count(), lambda _: [draws]),
    }
    write_json(folder / "found.json", found)


def command(folder: Path, models: Path) -> None:
    """The commands that train, `tastemaker sft` twice: the second time there is nothing left to do."""
    from tastemaker.commands import training

    for _ in range(2):
        training.sft(jobs.command("sft", models, folder / "out"))
    for name in ("reward", "dpo", "ppo"):
        getattr(training, name)(jobs.command(name, models, folder / name))


JOBS: Mapping[str, Callable[[Path, Path], None]] = {
    **jobs.TRAININGS,
    "lone": jobs.lone,
    **{f"half-{name}": partial(jobs.half, name) for name in jobs.TRAININGS},
    **{f"resumed-{name}": train for name, train in jobs.TRAININGS.items()},  # what one process began, and the test laid
    "gathering": gathering,
    "clipping": clipping,
    "diverging": diverging,
    "filling": filling,
    "syncing": syncing,
    "sampling": sampling,
    "command": command,
}


def do(folder: Path, names: Sequence[str]) -> None:
    """One process's part in some jobs; it ends here."""
    parallel.prepare(1, patience=timedelta(minutes=5))
    for name in names:
        JOBS[name](folder / "several" / name, folder / "models")
    parallel.leave()
    processes.end(0)


if __name__ == "__main__":
    do(Path(sys.argv[1]), sys.argv[2:])
