"""Supervised fine-tuning on demonstrations (section 3.5 and C.1; the initialisation of PPO, C.3).

The loss is on the response's tokens, its end token included; the prompt is masked (the paper does not say; a prompt is
not something to imitate). Every epoch's model is kept unless `keep_epochs` is "last", because the paper chooses among
them by score once a reward model exists: see `select_epoch`. With `pretraining_mix` a share of every batch's
sequences is pretraining text, which makes the model that PPO starts from and is held to (C.3: 2 epochs, 10 %).

Departure: residual dropout (0.2 in the paper) is applied where the architecture has it; Llama-like ones have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tastemaker import parallel, processes
from tastemaker.checkpoint import load_policy, save_policy
from tastemaker.console import through
from tastemaker.corpus import FIRST_PREDICTED, encode_pieces, permutation, shuffled_forever
from tastemaker.errors import DataError
from tastemaker.files import write_json
from tastemaker.losses import sft_loss
from tastemaker.model import LanguageModel, check_fits
from tastemaker.packing import microbatches, pack
from tastemaker.records import Demonstration, Text
from tastemaker.settings import SftConfig as SftConfig
from tastemaker.tokenizer import Tokenizer
from tastemaker.training import Loss, Trainer
from tastemaker.training.loop import ModuleState, run_steps


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence and where its loss begins: everything from `start` on is predicted."""

    ids: tuple[int, ...]
    start: int

    @property
    def num_predicted(self) -> int:
        return len(self.ids) - self.start


def train_sft(
    folder: Path,
    *,
    config: SftConfig,
    base: str,
    demonstrations: Sequence[Demonstration],
    validation: Sequence[Demonstration] = (),
    pretraining: Sequence[Text] = (),
    device: torch.device,
    seed: int,
) -> Path:
    """Fine-tune `base`; writes `model` (the last epoch) and, to keep all, `epochs/01` ... Returns the path of `model`.

    Raises:
        DataError: there are no demonstrations, or pretraining text is asked for and missing.
        ModelError: the base cannot be loaded, or a demonstration is longer than its context.
    """
    if not demonstrations:
        raise DataError("there are no demonstrations to fine-tune on; give at least one.")
    if config.pretraining_mix and not pretraining:
        raise DataError(f"pretraining_mix is {config.pretraining_mix}, but no pretraining text was given.")
    policy = load_policy(base, residual_dropout=config.residual_dropout)
    policy.to(device)
    examples = encode_demonstrations(demonstrations, policy.tokenizer, context=policy.context)
    held_out = encode_demonstrations(validation, policy.tokenizer, context=policy.context)
    texts = []
    if config.pretraining_mix:
        pieces = encode_pieces(pretraining, policy, max_tokens=config.max_text_tokens)
        texts = [Example(tuple(piece), FIRST_PREDICTED) for piece in pieces]
    run = _Run(folder, config, policy, examples, held_out, texts, seed)
    run_steps(
        folder,
        description=f"sft {folder.name}",
        total=run.total_steps,
        states={"policy": ModuleState(policy), "trainer": run.trainer},
        step=run.step,
        checkpoint_every=config.checkpoint_every,
    )
    save_policy(folder / "model", policy)
    return folder / "model"


class _Run:
    """One training run: what a numbered step does."""

    def __init__(
        self,
        folder: Path,
        config: SftConfig,
        policy: LanguageModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        texts: Sequence[Example],
        seed: int,
    ) -> None:
        self.folder, self.config, self.policy, self.seed = folder, config, policy, seed
        self.examples, self.held_out, self.texts = examples, held_out, texts
        self.steps_per_epoch = -(-len(examples) // config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.trainer = Trainer(policy, config.optimizer, total_steps=self.total_steps)
        self.draw_text = shuffled_forever(len(texts), seed=seed) if texts else None

    def step(self, number: int) -> dict[str, float]:
        config = self.config
        epoch, place = divmod(number, self.steps_per_epoch)
        order = permutation(len(self.examples), seed=self.seed, epoch=epoch)
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        batch = [self.examples[index] for index in chosen]
        if self.draw_text is not None:
            start, end = texts_before(number, config), texts_before(number + 1, config)
            batch += [self.texts[index] for index in self.draw_text(start, end - start)]
        torch.manual_seed(processes.own_seed(self.seed * 1_000_003 + number))  # dropout's noise follows from the step
        self.policy.train(config.residual_dropout > 0)
        costs = [len(example.ids) for example in batch]
        groups = microbatches(costs, budget=config.microbatch_tokens, shares=processes.count())
        report = self.trainer.step(
            ([batch[index] for index in group] for group in groups),
            partial(_example_loss, self.policy),
            float(sum(example.num_predicted for example in batch)),
        )
        self.policy.eval()
        metrics = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "epoch": (number + 1) / self.steps_per_epoch,
        }
        if place == self.steps_per_epoch - 1:
            metrics |= self._close_epoch(epoch)
        return metrics

    def _close_epoch(self, epoch: int) -> dict[str, float]:
        if self.config.keep_epochs == "all":
            save_policy(self.folder / "epochs" / f"{epoch + 1:02d}", self.policy)
        if not self.held_out:
            return {}
        with self.trainer.autocast():
            loss = demonstration_loss(self.policy, self.held_out, self.config.microbatch_tokens)
        return {"validation_loss": loss}


def texts_before(step: int, config: SftConfig) -> int:
    """How many pieces of pretraining text are mixed in before a numbered step.

    Every batch has the whole number nearest to its share; a share that rounds to none is carried over the steps.
    """
    share = config.batch_size * config.pretraining_mix / (1 - config.pretraining_mix)
    return math.ceil(step * (round(share) or share))


def encode_demonstrations(
    demonstrations: Sequence[Demonstration], tokenizer: Tokenizer, *, context: int
) -> list[Example]:
    """Prompt and response as ids; the loss begins at the response."""
    examples = []
    for demonstration in demonstrations:
        prompt_ids = tokenizer.prompt_ids(demonstration.prompt.messages)
        response_ids = tokenizer.response_ids(demonstration.response, finished=True)
        examples.append(Example((*prompt_ids, *response_ids), len(prompt_ids)))
    check_fits([len(example.ids) for example in examples], context, what="demonstrations")
    return examples


@torch.no_grad()
def demonstration_loss(policy: LanguageModel, examples: Sequence[Example], budget: int) -> float:
    """Mean negative log-likelihood of the examples' predicted tokens."""
    num_tokens = float(sum(example.num_predicted for example in examples))
    groups = microbatches([len(example.ids) for example in examples], budget=budget, shares=processes.count())
    total = 0.0
    for turn in through(parallel.turns(groups), "validation, micro-batch"):
        loss = _example_loss(policy, [examples[index] for index in turn.item], num_tokens)
        total += float(loss.value) if turn.counts else 0.0
    return parallel.summed_amounts([total])[0]


def _example_loss(policy: LanguageModel, batch: Sequence[Example], num_tokens: float) -> Loss:
    packed = pack([example.ids for example in batch]).to(policy.device)
    logprob_M = policy.predict(packed, *packed.predicted([example.start for example in batch])).logprob_M
    return Loss(sft_loss(logprob_M, torch.ones_like(logprob_M, dtype=torch.bool), num_tokens=num_tokens))


def select_epoch(folder: Path, *, scores: dict[str, float], epochs: Path) -> Path:
    """Choose the epoch whose responses to validation prompts score highest (section 3.5), and say so in `choice.json`.

    `scores` maps the name of each kept epoch to its mean score; ties go to the earlier epoch.
    """
    best = max(sorted(scores), key=lambda name: scores[name])
    choice: dict[str, Any] = {"chosen": best, "by": "mean score on validation prompts", "scores": scores}
    policy = load_policy(str(epochs / best))
    save_policy(folder / "model", policy)
    write_json(folder / "choice.json", choice)
    return folder / "model"
