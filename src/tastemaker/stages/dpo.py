"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), the reward-model-free alternative to PPO.

Every untied pair of a ranking is a pair of responses, chosen and rejected. The reference is the model that training
starts from; its log-probs are computed once, by the same forward pass as the policy's, so the loss is log 2 at step 0.
Log-probs are sums over response tokens, the end token included, never means. IPO (arXiv 2310.12036) and label
smoothing (conservative DPO) are variants of the loss.

The share of pairs whose implicit reward, beta (log pi - log pi_ref), is higher for the chosen response is reported on
held-out rankings: DPO's answer to the reward model's accuracy, and as there over pairs of different texts. Where the
two are equal, as all are at step 0, a pair counts half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tastemaker import parallel, processes
from tastemaker.checkpoint import Reader, load_policy, save_policy
from tastemaker.console import say, through
from tastemaker.corpus import permutation
from tastemaker.errors import DataError
from tastemaker.files import write_json
from tastemaker.halves import in_part
from tastemaker.losses import dpo_loss
from tastemaker.model import LanguageModel, check_fits
from tastemaker.packing import microbatches, pack, sent_to
from tastemaker.records import Messages, Ranking
from tastemaker.settings import DpoConfig as DpoConfig
from tastemaker.statistics import accuracy
from tastemaker.training import Loss, Trainer
from tastemaker.training.loop import ModuleState, run_steps

# By how much two forward passes over the same tokens differ in summed log-prob, relative to its size: packed with
# other sequences, the sums of float32 come out up to 5e-7 apart.
ROUNDING = 2e-6


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with its chosen and its rejected response, each closed as it was sampled."""

    prompt: Messages
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def sequences(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What goes through the model: the prompt with the chosen response, and with the rejected one."""
        return (*self.prompt_ids, *self.chosen_ids), (*self.prompt_ids, *self.rejected_ids)

    @property
    def cost(self) -> int:
        return 2 * (len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids)))


def train_dpo(
    folder: Path,
    *,
    config: DpoConfig,
    init: str,
    rankings: Sequence[Ranking],
    validation: Sequence[Ranking] = (),
    device: torch.device,
    seed: int,
) -> Path:
    """Train a policy on preferences; writes `model` and `results.json`. Returns the path of `model`.

    Raises:
        DataError: no ranking has an untied pair.
    """
    policy = load_policy(init).to(device)
    rankings = [ranking for ranking in rankings if in_part(ranking.prompt, config.part)]
    pairs, held_out = (as_pairs(rows, policy, config.max_prompt_tokens) for rows in (rankings, validation))
    if not pairs:
        raise DataError("no ranking prefers one response to another, so there is nothing to learn; give untied ones.")
    steps_per_epoch = -(-len(pairs) // config.batch_size)
    trainer = Trainer(policy, config.optimizer, total_steps=steps_per_epoch * config.epochs)
    reference_P2 = pair_logprobs(policy, pairs, config, trainer)
    held_out_reference_P2 = pair_logprobs(policy, held_out, config, trainer)

    def step(number: int) -> dict[str, float]:
        epoch, place = divmod(number, steps_per_epoch)
        order = permutation(len(pairs), seed=seed, epoch=epoch)
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        costs = [pairs[index].cost for index in chosen]
        groups = microbatches(costs, budget=config.microbatch_tokens, shares=processes.count())
        report = trainer.step(
            ([chosen[index] for index in group] for group in groups),
            partial(_pair_loss, policy, config, pairs, reference_P2),
            float(len(chosen)),
        )
        return {
            "loss": report.loss,
            **{name: report.sums[name] / len(chosen) for name in ("accuracy", "margin")},
            "chosen_logprob": report.sums["chosen"] / len(chosen),
            "rejected_logprob": report.sums["rejected"] / len(chosen),
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "epoch": (number + 1) / steps_per_epoch,
        }

    run_steps(
        folder,
        description=f"dpo {folder.name}",
        total=steps_per_epoch * config.epochs,
        states={"policy": ModuleState(policy), "trainer": trainer},
        step=step,
        checkpoint_every=config.checkpoint_every,
    )
    if held_out:
        write_json(folder / "results.json", _measure(policy, held_out, held_out_reference_P2, config, trainer))
    save_policy(folder / "model", policy)
    return folder / "model"


def as_pairs(
    rankings: Sequence[Ranking], policy: LanguageModel | Reader, max_prompt_tokens: int | None = None
) -> list[Pair]:
    """Every untied pair of every ranking, best first; of a longer prompt `max_prompt_tokens` from its end.

    Two responses of one text are no pair: whichever was preferred, there is nothing to learn or to measure. How many
    prompts are cut and how many pairs have an empty response, and are left out, is said.
    """
    tokenizer, pairs, cut = policy.tokenizer, list[Pair](), 0
    for ranking in rankings:
        whole = tokenizer.prompt_ids(ranking.prompt.messages)
        prompt_ids = tuple(whole if max_prompt_tokens is None else tokenizer.end_of(whole, max_prompt_tokens))
        cut += len(prompt_ids) < len(whole)
        ids = [tuple(tokenizer.response_ids(r.text, finished=r.finished)) for r in ranking.responses]
        pairs += [
            Pair(ranking.prompt.messages, prompt_ids, ids[better], ids[worse])
            for better, worse in ranking.untied_pairs
            if ids[better] and ids[worse]
        ]
    check_fits([pair.cost // 2 for pair in pairs], policy.context, what="pairs")
    if cut:
        say(f"  {cut} of {len(rankings)} prompts are longer than max_prompt_tokens; of those the end is read")
    empty = sum(len(ranking.untied_pairs) for ranking in rankings) - len(pairs)
    if empty:
        say(f"  {empty} of {empty + len(pairs)} pairs have an empty response and are left out")
    return pairs


@torch.no_grad()
def pair_logprobs(policy: LanguageModel, pairs: Sequence[Pair], config: DpoConfig, trainer: Trainer) -> Tensor:
    """Summed log-probs of chosen and rejected responses, `[P, 2]`."""
    logprob_P2 = torch.zeros(len(pairs), 2)
    groups = microbatches([pair.cost for pair in pairs], budget=config.microbatch_tokens, shares=processes.count())
    for turn in through(parallel.turns(groups), "log-probs, micro-batch"):
        with trainer.autocast():
            logprob_B2 = _logprobs(policy, [pairs[index] for index in turn.item])
        if turn.counts:
            logprob_P2[turn.item] = logprob_B2.cpu()
    return parallel.summed(logprob_P2)


def _logprobs(policy: LanguageModel, batch: Sequence[Pair]) -> Tensor:
    """`[B, 2]`: chosen and rejected go through the model together, what they begin with once."""
    sequences = [ids for pair in batch for ids in pair.sequences]
    prompts = [len(pair.prompt_ids) for pair in batch for _ in range(2)]
    packed = pack(sequences, groups=[2] * len(batch)).to(policy.device)
    logprob_M = policy.predict(packed, *packed.predicted(prompts)).logprob_M
    lengths = [len(ids) - prompt for ids, prompt in zip(sequences, prompts, strict=True)]
    return torch.stack([part.sum() for part in torch.split(logprob_M, lengths)]).view(len(batch), 2)


def _pair_loss(
    policy: LanguageModel,
    config: DpoConfig,
    pairs: Sequence[Pair],
    reference_P2: Tensor,
    group: Sequence[int],
    num_pairs: float,
) -> Loss:
    logprob_B2 = _logprobs(policy, [pairs[index] for index in group])
    ref_B2 = sent_to(logprob_B2.device, reference_P2[list(group)])
    margin_B, ref_margin_B = logprob_B2[:, 0] - logprob_B2[:, 1], ref_B2[:, 0] - ref_B2[:, 1]
    loss = dpo_loss(
        margin_B,
        ref_margin_B,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        variant=config.variant,
        num_pairs=num_pairs,
    )
    gain_B = (margin_B - ref_margin_B).detach()
    sums = {
        "accuracy": correct_pairs(logprob_B2.detach(), ref_B2).sum(),
        "margin": config.beta * gain_B.sum(),
        "chosen": logprob_B2[:, 0].detach().sum(),
        "rejected": logprob_B2[:, 1].detach().sum(),
    }
    return Loss(loss, sums)


def correct_pairs(logprob_P2: Tensor, reference_P2: Tensor) -> Tensor:
    """1 where the implicit reward is higher for the chosen response, 0 where lower, 0.5 where equal up to rounding."""
    gain_P2 = logprob_P2 - reference_P2
    gain_P = gain_P2[:, 0] - gain_P2[:, 1]
    rounding_P = ROUNDING * (1 + reference_P2.abs().sum(dim=1))
    return torch.where(gain_P.abs() <= rounding_P, 0.5, (gain_P > 0).float())


def _measure(
    policy: LanguageModel, pairs: Sequence[Pair], reference_P2: Tensor, config: DpoConfig, trainer: Trainer
) -> dict[str, Any]:
    logprob_P2 = pair_logprobs(policy, pairs, config, trainer)
    correct_P = correct_pairs(logprob_P2, reference_P2)
    estimate = accuracy(correct_P.tolist(), [pair.prompt for pair in pairs])
    return {"accuracy": estimate.value, "n": estimate.n, "ci95": [estimate.ci95.low, estimate.ci95.high]}
