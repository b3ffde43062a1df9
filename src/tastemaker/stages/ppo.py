"""Reinforcement learning from the reward model: PPO with a per-token KL penalty, and PPO-ptx (sections 3.5 and C.4).

An episode is one prompt and one response; the environment is a bandit. Each iteration, in the paper's order: sample
responses from the policy; score them; take the log-probs of policy and reference and the values; shape the rewards;
estimate advantages; then, minibatch by minibatch, step the policy (PPO's gradient plus gamma times the pretraining
gradient, accumulated into one step) and the value function.

What the paper leaves open, and what is done here: lambda is 0.95 and values are clipped, as in Stiennon et al.;
advantages are whitened once per rollout over the whole batch; pretraining loss is a mean per token, so gamma is not
the paper's 27.8; a response without an end token loses `truncation_penalty` from its score; the weight average decays
per episode. Old log-probs come from the trainer's own forward pass, because a sampler's may differ.

Dimensions in names: B rollouts, T response tokens, M the response tokens of a micro-batch end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tastemaker import parallel, processes
from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_policy
from tastemaker.clipping import correlation, explained_variance, ratio_sums, standard_error, value_sums
from tastemaker.console import say
from tastemaker.corpus import check_held_out, encode_pieces, next_token_places, permutation, shuffled_forever, text_loss
from tastemaker.errors import ConfigError, DataError, ModelError, TrainingError
from tastemaker.generation import FinishReason, Generator, Rollout
from tastemaker.lora import adapters_off, add_adapters
from tastemaker.losses import (
    adaptive_kl_coef,
    gae,
    kl_estimate,
    policy_loss,
    ptx_loss,
    shaped_rewards,
    value_loss,
    whiten,
)
from tastemaker.model import LanguageModel, RewardModel, context_length, freeze
from tastemaker.packing import Packed, microbatches, pack, pad_rows, sent_to
from tastemaker.records import Prompt, Text
from tastemaker.responses import as_response, engine_for, fitting_prompts, sampling_for, seed_for
from tastemaker.scoring import Scorer
from tastemaker.settings import PpoConfig as PpoConfig
from tastemaker.shared_value import SharedValue
from tastemaker.tokenizer import Tokenizer
from tastemaker.training import Loss, StepReport, Trainer, WeightAverage, decay_for
from tastemaker.training.loop import ModuleState, run_steps

FP32_TOLERANCE = 2e-4  # nats a token between two passes that differ by rounding
READ_ALIKE = 64  # prompts that tell whether two models read them as the same ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A batch of rollouts with everything the update needs; all tensors are of the policy as it was."""

    sequences: list[tuple[int, ...]]
    prompt_lengths: list[int]
    response_lengths: list[int]
    mask_BT: Tensor
    """True where a token was chosen by the policy and may train it."""
    old_logprob_BT: Tensor
    value_BT: Tensor
    advantage_BT: Tensor
    return_BT: Tensor

    def cost(self, index: int) -> int:
        return len(self.sequences[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rollouts as sequences of ids, with which of their response tokens train; no weights are needed to tell."""

    sequences: list[tuple[int, ...]]
    prompt_lengths: list[int]
    response_lengths: list[int]
    sampled_BT: Tensor
    """The log-probs that the sampler gives."""
    mask_BT: Tensor
    """True where there is a response token."""
    trains_BT: Tensor
    """True where it may train the policy."""
    truncated_B: Tensor
    """True where the length limit cut the response off."""


def lay_out(rollouts: Sequence[Rollout], config: PpoConfig, device: torch.device) -> Layout:
    """How rollouts are trained on: exactly the ids that were sampled, behind those that they were sampled for."""
    response_lengths = [len(rollout.response_ids) for rollout in rollouts]
    sampled_M = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])
    sampled_BT, mask_BT = pad_rows(sampled_M.to(device), response_lengths)
    truncated_B = torch.tensor([rollout.finish is FinishReason.LENGTH for rollout in rollouts])
    trains_BT = mask_BT
    if config.truncated == "mask":
        trains_BT = mask_BT & ~truncated_B.to(device)[:, None]
    return Layout(
        sequences=[(*rollout.prompt_ids, *rollout.response_ids) for rollout in rollouts],
        prompt_lengths=[len(rollout.prompt_ids) for rollout in rollouts],
        response_lengths=response_lengths,
        sampled_BT=sampled_BT,
        mask_BT=mask_BT,
        trains_BT=trains_BT,
        truncated_B=truncated_B,
    )


def sample_iteration(
    generator: Generator,
    policy: LanguageModel,
    prompt_ids: Sequence[Sequence[int]],
    config: PpoConfig,
    places: Sequence[int],
    *,
    seed: int,
    iteration: int,
) -> list[Rollout]:
    """One response to each of an iteration's prompts at `places`. Its seed follows from its place in the batch."""
    sampling = sampling_for(policy, config.decoding)
    if not sampling.is_policy_law:
        raise TrainingError(
            f"rollouts would be drawn by {sampling}, and ratios taken of the policy's own distribution."
        )
    seeds = [seed_for(seed, "ppo", iteration, place) for place in places]
    groups = generator.generate([prompt_ids[place] for place in places], 1, sampling, seeds)
    return [group[0] for group in groups]


def train_ppo(
    folder: Path,
    *,
    config: PpoConfig,
    init: str,
    reward: str | None,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    pretraining: Sequence[Text] = (),
    heldout_text: Sequence[Text] = (),
    device: torch.device,
    seed: int,
) -> Path:
    """Optimise the policy `init` for `scorer`; writes `model` and `model-ema`. Returns the path of `model`.

    `reward` is the reward model's folder that the value function starts from; None, or one with another tokenizer,
    starts it from the policy's trunk with a new head.

    Raises:
        DataError: no prompts fit the context, or pretraining text is asked for and missing.
        TrainingError: the first minibatch's ratio is not 1, or a loss is not finite.
    """
    run = PpoRun(config, init, reward, scorer, prompts, pretraining, heldout_text, device, seed)

    def step(iteration: int) -> dict[str, float]:
        metrics = run.step(iteration)
        if config.keep_every is not None and (iteration + 1) % config.keep_every == 0:
            save_policy(folder / "iterations" / f"{iteration + 1:04d}", run.policy)
        return metrics

    run_steps(
        folder,
        description=f"ppo {folder.name}",
        total=config.iterations,
        states=run.states(),
        step=step,
        checkpoint_every=config.checkpoint_every,
        shown="score",
    )
    save_policy(folder / "model-ema", run.policy, weights=run.average.weights if run.average else None)
    save_policy(folder / "model", run.policy)
    return folder / "model"


class PpoRun:
    """The networks and data of one run; `step` is one iteration."""

    def __init__(
        self,
        config: PpoConfig,
        init: str,
        reward: str | None,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        pretraining: Sequence[Text],
        heldout_text: Sequence[Text],
        device: torch.device,
        seed: int,
    ) -> None:
        if config.ptx_coef and not pretraining:
            raise DataError(f"ptx_coef is {config.ptx_coef}, but no pretraining text was given.")
        if config.ptx_coef:
            check_held_out(pretraining, heldout_text)
        if processes.several():
            check_for_several(config)
        self.config, self.scorer, self.seed, self.kl_coef = config, scorer, seed, config.kl_coef
        self.ratio_max = torch.zeros((), device=device)  # of the iteration so far
        self.policy = load_policy(init).to(device)
        self.reference = self._freeze_reference(init, device)
        self.prompts, self.prompt_ids = fitting_prompts(prompts, self.policy, config.decoding.max_new_tokens)
        self.value: RewardModel | SharedValue = self._value_function(init, reward, device)
        self._check_value_context(reward)
        self.texts = self._pieces(pretraining) if config.ptx_coef else []
        self.heldout_pieces = self._pieces(heldout_text) if heldout_text else []
        total = config.iterations * config.steps_per_iteration
        warmup = config.warmup_iterations * config.steps_per_iteration
        shared = isinstance(self.value, SharedValue)
        trained: nn.Module = nn.ModuleList([self.policy, self.value]) if shared else self.policy
        self.policy_trainer = Trainer(trained, replace(config.policy, warmup_steps=warmup), total_steps=total)
        self.value_trainer = (
            None if shared else Trainer(self.value, replace(config.value, warmup_steps=warmup), total_steps=total)
        )
        # With a decay of 0 the average is the policy itself, which need not be held twice.
        self.average = WeightAverage(self.policy.library) if config.ema_decay else None
        # The engine reads whole weights; where the policy lies in parts, a copy has them.
        self.sampler = freeze(load_policy(init), "float32").to(device) if processes.several() else self.policy
        self.generator = engine_for(self.sampler, config.decoding, precision=config.policy.precision)
        self.draw_prompt = shuffled_forever(len(self.prompts), seed=seed)
        self.draw_text = shuffled_forever(max(1, len(self.texts)), seed=seed)

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration, in the paper's order. Returns its metrics."""
        config = self.config
        chosen = self.draw_prompt(iteration * config.batch_size, config.batch_size)
        rollouts = self.roll_out(chosen, iteration)
        experience, metrics = self.observe(chosen, rollouts, iteration)
        metrics |= self.update(experience, iteration)
        if self.average is not None:
            self.average.update(self.policy.library, decay_for(config.ema_decay, config.batch_size))
        metrics["kl_coef"] = self.kl_coef
        if config.adaptive_kl is not None:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                metrics["kl"],
                target=config.adaptive_kl.target,
                horizon=config.adaptive_kl.horizon,
                num_episodes=config.batch_size,
            )
        if self.heldout_pieces and (iteration == 0 or (iteration + 1) % max(1, config.iterations // 10) == 0):
            metrics["heldout_text_loss"] = text_loss(
                self.policy, self.heldout_pieces, budget=config.microbatch_tokens, autocast=self.policy_trainer.autocast
            )
        return metrics

    def roll_out(self, chosen: Sequence[int], iteration: int) -> list[Rollout]:
        """One response to each chosen prompt, drawn from the policy as it is now, by whichever process."""
        if self.sampler is not self.policy:
            parallel.fill(self.sampler.library, self.policy.library)
        self.generator.load_weights(self.sampler.library, iteration)
        asked = [self.prompt_ids[index] for index in chosen]
        draw = partial(
            sample_iteration, self.generator, self.policy, asked, self.config, seed=self.seed, iteration=iteration
        )
        return parallel.in_shares(len(chosen), draw)

    @torch.no_grad()
    def observe(
        self, chosen: Sequence[int], rollouts: Sequence[Rollout], iteration: int
    ) -> tuple[Experience, dict[str, float]]:
        """Score the rollouts, take log-probs and values, and turn them into advantages and returns."""
        config, layout = self.config, lay_out(rollouts, self.config, self.policy.device)
        mask_BT, sampled_BT = layout.mask_BT, layout.sampled_BT
        read = partial(self._read_rows, layout.sequences, layout.prompt_lengths, layout.response_lengths)
        old_logprob_BT = read(partial(self._logprobs, self.policy)) if config.old_logprobs == "trainer" else sampled_BT
        with adapters_off(self.policy.library) if config.lora is not None else nullcontext():
            ref_logprob_BT = read(partial(self._logprobs, self.reference))
        value_BT = read(self._values, self.value_trainer)

        responses = [as_response(self.policy, rollout) for rollout in rollouts]
        score_B = torch.tensor(self.scorer([self.prompts[index] for index in chosen], responses))
        truncated_B = layout.truncated_B
        judged_B = score_B - config.truncation_penalty * truncated_B if config.truncated == "penalty" else score_B
        reward_BT = shaped_rewards(
            judged_B.to(mask_BT.device), old_logprob_BT, ref_logprob_BT, mask_BT, kl_coef=self.kl_coef
        )
        advantage_BT = gae(reward_BT, value_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        return_BT = advantage_BT + value_BT * mask_BT
        if iteration == 0:
            self._check_reference(old_logprob_BT, ref_logprob_BT, mask_BT)
        experience = Experience(
            sequences=layout.sequences,
            prompt_lengths=layout.prompt_lengths,
            response_lengths=layout.response_lengths,
            mask_BT=layout.trains_BT,
            old_logprob_BT=old_logprob_BT,
            value_BT=value_BT,
            advantage_BT=whiten(advantage_BT, layout.trains_BT) if config.whiten_advantages else advantage_BT,
            return_BT=return_BT,
        )
        kl_B = kl_estimate(old_logprob_BT, ref_logprob_BT, mask_BT, estimator="k1").sum(1)
        distance_M = (old_logprob_BT - sampled_BT)[mask_BT].abs()
        to_sampler = {
            "sampler_mismatch": float(distance_M.mean()),
            "sampler_mismatch_max": float(distance_M.max()),
            "sampler_ratio": float(distance_M.exp().mean()),
        }
        return experience, {
            "score": float(score_B.mean()),
            "score_spread": float(score_B.std(correction=0)),
            "reward": float(reward_BT.sum(1).mean()),
            "kl": float(kl_B.mean()),
            "kl_error": standard_error(kl_B),
            "entropy": float(-old_logprob_BT[mask_BT].mean()),
            "response_tokens": float(mask_BT.sum(1).float().mean()),
            "length_correlation": correlation(score_B, torch.tensor(layout.response_lengths)),
            "truncated_rate": float(truncated_B.float().mean()),
            "explained_variance": explained_variance(value_BT[mask_BT], return_BT[mask_BT]),
            **(to_sampler if config.old_logprobs == "trainer" else {}),  # else 0, whatever it is
        }

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Every minibatch once per inner epoch, in an order of its own each time; both networks step on each."""
        config = self.config
        size = config.batch_size // config.minibatches
        policy_reports, value_reports = list[StepReport](), list[StepReport]()
        ptx_losses = list[float]()
        self.ratio_max = torch.zeros_like(self.ratio_max)
        for epoch in range(config.inner_epochs):
            order = permutation(config.batch_size, seed=seed_for(self.seed, "minibatch", iteration), epoch=epoch)
            for number in range(config.minibatches):
                chosen = order[number * size : (number + 1) * size]
                place = iteration * config.steps_per_iteration + epoch * config.minibatches + number
                report, ptx = self._policy_step(experience, chosen, place)
                if number == epoch == 0:
                    self._check_ratio(report, iteration)
                policy_reports.append(report)
                ptx_losses.append(ptx)
                if self.value_trainer is not None:
                    value_reports.append(self._value_step(self.value_trainer, experience, chosen))
        return self._summary(policy_reports, value_reports, ptx_losses)

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        states: dict[str, Any] = {
            "policy": ModuleState(self.policy),
            "policy_trainer": self.policy_trainer,
            "value": ModuleState(self.value),
            "controller": _Controller(self),
        }
        more = {"value_trainer": self.value_trainer, "average": self.average}
        return states | {name: state for name, state in more.items() if state is not None}

    # The networks.

    def _freeze_reference(self, init: str, device: torch.device) -> LanguageModel:
        if self.config.lora is not None:
            add_adapters(self.policy.library, self.config.lora, seed=self.seed)
            return self.policy
        return freeze(load_policy(init), self.config.policy.precision).to(device)

    def _value_function(self, init: str, reward: str | None, device: torch.device) -> RewardModel | SharedValue:
        if self.config.value_function == "shared":
            return SharedValue(self.policy).to(device)
        if reward is not None:
            value = load_reward_model(reward)
            if self._reads_alike(value.tokenizer):
                return value.to(device)
        why = "there is no reward model" if reward is None else "the reward model has another tokenizer or template"
        say(f"{why}; the value function starts from the policy's trunk, its head at random")
        return new_reward_model(init, seed=self.seed).to(device)

    def _reads_alike(self, other: Tokenizer) -> bool:
        """Whether it makes the same ids of the prompts: a sample of them tells templates apart."""
        some = list(zip(self.prompts, self.prompt_ids, strict=True))[:READ_ALIKE]
        same = other.library.get_vocab() == self.policy.tokenizer.library.get_vocab()
        return same and all(other.prompt_ids(prompt.messages) == list(ids) for prompt, ids in some)

    def _check_value_context(self, reward: str | None) -> None:
        """The value function reads whole responses behind their prompts, as the policy does."""
        if isinstance(self.value, SharedValue):
            return
        longest = max(map(len, self.prompt_ids)) + self.config.decoding.max_new_tokens
        context = context_length(self.value.library.config)
        if longest > context:
            raise ModelError(
                f"the value function starts from {reward}, whose context is {context} tokens, but a prompt with its "
                f"response may take {longest}; give a reward model with a longer context, shorter prompts or a lower "
                "decoding.max_new_tokens."
            )

    def _pieces(self, texts: Sequence[Text]) -> list[list[int]]:
        return encode_pieces(texts, self.policy, max_tokens=self.config.max_text_tokens)

    # Reading log-probs and values of whole responses.

    def _read_rows(
        self,
        sequences: Sequence[tuple[int, ...]],
        prompts: Sequence[int],
        responses: Sequence[int],
        read: Callable[[Packed, Tensor, Tensor], Tensor],
        trainer: Trainer | None = None,
    ) -> Tensor:
        """`read(packed, source_M, target_M)` over micro-batches, as `[B, T]` in the order of `sequences`.

        In the precision of `trainer`, by default the policy's.
        """
        parts = [torch.zeros(length, device=self.policy.device) for length in responses]
        for turn in parallel.turns(self._microbatches([len(ids) for ids in sequences])):
            places = self._pack(sequences, prompts, turn.item)
            with (trainer or self.policy_trainer).autocast():
                value_M = read(*places)  # in fp32 at least, as losses want them
            of_each = torch.split(value_M, [responses[index] for index in turn.item])
            for index, part in zip(turn.item, of_each, strict=True) if turn.counts else ():
                parts[index] = part
        value_BT, _ = pad_rows(parallel.summed(torch.cat(parts)), responses)
        return value_BT

    def _microbatches(self, costs: Sequence[int]) -> list[list[int]]:
        return microbatches(costs, budget=self.config.microbatch_tokens, shares=processes.count())

    def _pack(
        self,
        sequences: Sequence[tuple[int, ...]],
        prompts: Sequence[int],
        group: Sequence[int],
    ) -> tuple[Packed, Tensor, Tensor]:
        """The sequences of a group, and the response tokens in them: where each is predicted, and its id."""
        packed = pack([sequences[index] for index in group]).to(self.policy.device)
        return packed, *packed.predicted([prompts[index] for index in group])

    def _logprobs(self, model: LanguageModel, packed: Packed, source_M: Tensor, target_M: Tensor) -> Tensor:
        return model.predict(packed, source_M, target_M, temperature=self.config.decoding.temperature).logprob_M

    def _values(self, packed: Packed, source_M: Tensor, _target_M: Tensor) -> Tensor:
        return self.value.at(packed, source_M)

    # The update.

    def _policy_step(self, experience: Experience, chosen: Sequence[int], place: int) -> tuple[StepReport, float]:
        groups = self._groups(experience, chosen)
        num_tokens = max(1.0, float(experience.mask_BT[list(chosen)].sum()))
        loss_of = partial(self._policy_loss, experience)
        loss, sums = self.policy_trainer.accumulate(groups, loss_of, num_tokens, last=not self.texts)
        ptx = 0.0
        if self.texts:
            batches, num_predicted = self._text_batch(len(chosen), place)
            weighted, _ = self.policy_trainer.accumulate(batches, self._ptx_loss, num_predicted)
            ptx = weighted / self.config.ptx_coef
        sums["tokens"] = float(experience.mask_BT[list(chosen)].sum())
        return self.policy_trainer.apply(loss, sums), ptx

    def _policy_loss(self, experience: Experience, group: Sequence[int], num_tokens: float) -> Loss:
        config, rows = self.config, self._rows(group)
        packed, source_M, target_M = self._pack(experience.sequences, experience.prompt_lengths, group)
        hidden_ND = self.policy.hidden(packed) if isinstance(self.value, SharedValue) else None
        logprob_M = self.policy.predict(
            packed, source_M, target_M, temperature=config.decoding.temperature, hidden_ND=hidden_ND
        ).logprob_M
        logprob_BT, _ = self._as_rows(logprob_M, experience, group)
        mask_BT, old_BT = experience.mask_BT[rows], experience.old_logprob_BT[rows]
        advantage_BT = experience.advantage_BT[rows]
        loss = policy_loss(logprob_BT, old_BT, advantage_BT, mask_BT, clip=config.clip, num_tokens=num_tokens)
        sums = ratio_sums(logprob_BT.detach(), old_BT, advantage_BT, mask_BT, clip=config.clip)
        self.ratio_max = torch.maximum(self.ratio_max, sums.pop("largest"))
        sums["policy_loss"] = loss.detach()
        if hidden_ND is not None and isinstance(self.value, SharedValue):
            value_BT, _ = self._as_rows(self.value.read(hidden_ND, source_M), experience, group)
            error = self._value_error(value_BT, experience, rows, num_tokens)
            loss = loss + config.value_coef * error.value
            sums |= {**error.sums, "value_loss": error.value.detach()}
        return Loss(loss, sums)

    def _value_step(self, trainer: Trainer, experience: Experience, chosen: Sequence[int]) -> StepReport:
        num_tokens = max(1.0, float(experience.mask_BT[list(chosen)].sum()))
        return trainer.step(self._groups(experience, chosen), partial(self._value_loss, experience), num_tokens)

    def _value_loss(self, experience: Experience, group: Sequence[int], num_tokens: float) -> Loss:
        places = self._pack(experience.sequences, experience.prompt_lengths, group)
        value_BT, _ = self._as_rows(self._values(*places), experience, group)
        return self._value_error(value_BT, experience, self._rows(group), num_tokens)

    def _value_error(self, value_BT: Tensor, experience: Experience, rows: Tensor, num_tokens: float) -> Loss:
        clip = self.config.value_clip
        given = experience.value_BT[rows], experience.return_BT[rows], experience.mask_BT[rows]
        sums = value_sums(value_BT.detach(), *given, clip=clip)
        return Loss(value_loss(value_BT, *given, clip=clip, num_tokens=num_tokens), sums)

    def _rows(self, group: Sequence[int]) -> Tensor:
        """The group's rows of an experience, to index it by without waiting for a GPU."""
        return sent_to(self.policy.device, torch.tensor(list(group)))

    def _as_rows(self, value_M: Tensor, experience: Experience, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        counts = [experience.response_lengths[index] for index in group]
        return pad_rows(value_M, counts, width=experience.mask_BT.shape[1])

    def _groups(self, experience: Experience, chosen: Sequence[int]) -> list[list[int]]:
        groups = self._microbatches([experience.cost(index) for index in chosen])
        return [[chosen[place] for place in group] for group in groups]

    def _text_batch(self, episodes: int, place: int) -> tuple[list[Packed], float]:
        amount = max(1, round(episodes * self.config.ptx_examples_per_episode))
        pieces = [self.texts[index] for index in self.draw_text(place * amount, amount)]
        groups = self._microbatches([len(ids) for ids in pieces])
        batches = [pack([pieces[index] for index in group]).to(self.policy.device) for group in groups]
        return batches, float(sum(len(ids) - 1 for ids in pieces))

    def _ptx_loss(self, packed: Packed, num_tokens: float) -> Loss:
        source_M, target_M = next_token_places(packed)
        logprob_M = self.policy.predict(packed, source_M, target_M).logprob_M
        mask_M = torch.ones_like(logprob_M, dtype=torch.bool)
        return Loss(ptx_loss(logprob_M, mask_M, gamma=self.config.ptx_coef, num_tokens=num_tokens))

    # Checks that a correct implementation passes, at run time.

    def _check_reference(self, old_logprob_BT: Tensor, ref_logprob_BT: Tensor, mask_BT: Tensor) -> None:
        """Before any step the policy is the reference, so the KL is 0: exactly, where one kind of pass reads both."""
        kl = float((old_logprob_BT - ref_logprob_BT)[mask_BT].abs().mean())
        alike = self.config.old_logprobs == "trainer" and not (self.config.policy.compile or processes.several())
        allowed = FP32_TOLERANCE if alike else self._tolerance()
        if kl > allowed:
            raise TrainingError(
                f"before the first step, policy and reference differ by {kl:.2e} nats a token, though they are "
                f"the same model (allowed: {allowed:.0e}). Dropout or a temperature may act on one only, or "
                "the model computes differently each time; compare two forward passes of it on one sequence.",
                finding="stopped",
            )

    def _check_ratio(self, report: StepReport, iteration: int) -> None:
        """Before an iteration's first step nothing has changed since the rollout, so every ratio is 1."""
        drift = _drift(report)
        if drift > self._tolerance():
            raise TrainingError(
                f"at the first minibatch of iteration {iteration} new and old log-probs differ by {drift:.2e} nats "
                f"a token, though nothing was trained in between (allowed: {self._tolerance():.0e}). The rollout was "
                "scored under other weights, another temperature or with dropout on.",
                finding="ratio-not-1",
            )

    def _tolerance(self) -> float:
        return FP32_TOLERANCE if self.config.policy.precision == "float32" else 0.1

    def _summary(
        self, policy: Sequence[StepReport], value: Sequence[StepReport], ptx: Sequence[float]
    ) -> dict[str, float]:
        token_counts = [report.sums["tokens"] for report in policy]
        tokens = max(1.0, sum(token_counts))

        def mean(losses: Sequence[float]) -> float:  # each is one already, over its minibatch's tokens
            return sum(loss * count for loss, count in zip(losses, token_counts, strict=True)) / tokens

        metrics = {
            "policy_loss": mean([report.sums["policy_loss"] for report in policy]),
            "grad_norm": sum(report.grad_norm for report in policy) / len(policy),
            "learning_rate": policy[-1].learning_rate,
            "clip_fraction": sum(report.sums["clipped"] for report in policy) / tokens,
            "value_clip_fraction": sum(report.sums["value_clipped"] for report in value or policy) / tokens,
            "approx_kl": 0.5 * sum(report.sums["square_log_ratio"] for report in policy) / tokens,
            "first_log_ratio": _drift(policy[0]),
            "ratio_mean": sum(report.sums["ratio"] for report in policy) / tokens,
            "ratio_max": parallel.largest(float(self.ratio_max)),
        }
        if self.texts:
            metrics["ptx_loss"] = sum(ptx) / len(ptx)
        if value:
            metrics["value_loss"] = mean([report.loss for report in value])
            metrics["value_grad_norm"] = sum(report.grad_norm for report in value) / len(value)
            metrics["value_learning_rate"] = value[-1].learning_rate
        else:
            metrics["value_loss"] = mean([report.sums["value_loss"] for report in policy])
        return metrics


def _drift(report: StepReport) -> float:
    """Mean absolute change of log-prob since the rollout, nats a token."""
    return report.sums["abs_log_ratio"] / max(report.sums["tokens"], 1.0)


def check_for_several(config: PpoConfig) -> None:
    """Refuse what several processes cannot train together.

    Raises:
        ConfigError: adapters, or a value function on the policy's own trunk.
    """
    for asked, setting, instead in (
        (config.lora is not None, "lora is set", "leave lora out"),
        (config.value_function == "shared", "value_function is 'shared'", "set it to 'separate'"),
    ):
        if asked:
            raise ConfigError(f"{setting}, which several processes cannot train together; start one, or {instead}.")


class _Controller:
    """The adaptive KL coefficient as part of a checkpoint."""

    def __init__(self, run: PpoRun) -> None:
        self.run = run

    def state(self) -> Mapping[str, Any]:
        return {"kl_coef": self.run.kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.run.kl_coef = float(state["kl_coef"])
