"""Our side of a case: the stages as users run them, stopped between steps. `python -m benchmarks.bench.ours SPEC`.

Each stage is called by its public function with a real config; only the loop's pace is held from outside, and the
phases are timed by wrapping methods. How long a response becomes is decided by the benchmark, for both engines: the
end token is drawn where the plan says so and nowhere else.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from benchmarks.bench.kernels import KernelProfiler
from benchmarks.bench.measuring import WARM_UP_TOKENS, Pace, count_optimizer_steps
from torch import Tensor

from tastemaker import model, parallel
from tastemaker.checkpoint import load_policy, load_reward_model
from tastemaker.generation import Generator, Sampling, pool, sampling
from tastemaker.packing import Packed
from tastemaker.records import Demonstration, Message, Prompt, Ranking, Response
from tastemaker.responses import DecodingConfig, seed_for
from tastemaker.scoring import ModelScorer
from tastemaker.settings import VALUE_OPTIMIZER
from tastemaker.stages import dpo, ppo, reward, sft
from tastemaker.training import OptimizerConfig, Trainer, WeightAverage

PACKAGES = ("torch", "transformers", "tastemaker")
ENDLESS = 100_000  # steps; the driver says when to stop
RATE = 1e-6
END = 1 - 2.0**-24  # in place of a random number: the end token is due
SEED = 0
FORWARD = "forward"
UPDATE = "update, forward"  # what is left of it beside the backward pass and the optimizer

Spec = Mapping[str, Any]


def main() -> None:
    """Do what the spec says, at the driver's pace."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    pace = Pace(spec, PACKAGES, KernelProfiler())
    data = json.loads(Path(spec["data"]).read_text(encoding="utf-8"))
    device = parallel.prepare()
    count_optimizer_steps(pace)
    _time_training(pace)
    tasks = {"sft": run_sft, "reward": run_reward, "dpo": run_dpo, "ppo": run_ppo, "rollout": run_rollout}
    tasks[spec["task"]](spec, data, pace, device)


def run_sft(spec: Spec, data: Mapping[str, Any], pace: Pace, device: torch.device) -> None:
    _count_packed(sft, pace)
    _hold(sft, pace, before=lambda: _plan(pace, data["rows"]))
    sft.train_sft(
        Path(spec["folder"]),
        config=sft.SftConfig(
            epochs=ENDLESS,
            batch_size=len(data["rows"]),
            keep_epochs="last",
            optimizer=_optimizer(spec),
            residual_dropout=0.0,
            checkpoint_every=ENDLESS,
        ),
        base=spec["model"],
        demonstrations=[Demonstration(prompt=_prompt(row), response=row["responses"][0]) for row in data["rows"]],
        device=device,
        seed=SEED,
    )


def run_reward(spec: Spec, data: Mapping[str, Any], pace: Pace, device: torch.device) -> None:
    _count_packed(reward, pace)
    _hold(reward, pace, before=lambda: _plan(pace, data["rows"]))
    reward.train_reward_model(
        Path(spec["folder"]),
        config=reward.RewardConfig(
            epochs=ENDLESS, batch_size=len(data["rows"]), optimizer=_optimizer(spec), checkpoint_every=ENDLESS
        ),
        init=spec["model"],
        rankings=_rankings(data["rows"]),
        device=device,
        seed=SEED,
    )


def run_dpo(spec: Spec, data: Mapping[str, Any], pace: Pace, device: torch.device) -> None:
    """The reference's log-probs are taken once for all steps; here anew for every step, as one epoch over data has it.

    The peer takes them in every step. So both do a reference pass for every pair that is trained on.
    """
    plain, taken = dpo.pair_logprobs, list[Callable[[], Tensor]]()

    def pair_logprobs(*arguments: Any, **options: Any) -> Tensor:
        taken.append(partial(plain, *arguments, **options))
        return taken[-1]()

    def before() -> None:
        _plan(pace, data["rows"])
        with pace.phases("reference"):
            taken[0]()

    dpo.pair_logprobs = pair_logprobs
    _count_packed(dpo, pace)
    _hold(dpo, pace, before=before)
    dpo.train_dpo(
        Path(spec["folder"]),
        config=dpo.DpoConfig(
            init=spec["model"],
            epochs=ENDLESS,
            batch_size=len(data["rows"]),
            optimizer=_optimizer(spec),
            checkpoint_every=ENDLESS,
        ),
        init=spec["model"],
        rankings=_rankings(data["rows"]),
        device=device,
        seed=SEED,
    )


def run_ppo(spec: Spec, data: Mapping[str, Any], pace: Pace, device: torch.device) -> None:
    """As many tokens go through a model at once as a minibatch has. Old log-probs are the trainer's, as by default."""
    rows = data["rows"]
    _hold_lengths(data["response_lengths"], data["end_id"])
    _hold(ppo, pace)
    _time_ppo(pace, rows)
    minibatch_tokens = len(rows) // spec["minibatches"] * (spec["prompt_tokens"] + spec["response_tokens"])
    config = ppo.PpoConfig(
        init=spec["model"],
        reward=spec["reward"],
        iterations=ENDLESS,
        batch_size=len(rows),
        minibatches=spec["minibatches"],
        inner_epochs=spec["inner_epochs"],
        decoding=DecodingConfig(max_new_tokens=spec["response_tokens"]),
        policy=_optimizer(spec),
        value=VALUE_OPTIMIZER if spec["shared"] else _optimizer(spec),
        value_function="shared" if spec["shared"] else "separate",
        truncated="score",
        ema_decay=0.0,  # the peer keeps none
        microbatch_tokens=minibatch_tokens,
        checkpoint_every=ENDLESS,
    )
    scorer = ModelScorer(
        model.freeze(load_reward_model(spec["reward"]), spec["precision"]).to(device),
        budget=minibatch_tokens,
        precision=spec["precision"],
    )
    pace.phases.of(ModelScorer, "__call__", "scores")
    ppo.train_ppo(
        Path(spec["folder"]),
        config=config,
        init=spec["model"],
        reward=spec["reward"],
        scorer=scorer,
        prompts=[_prompt(row) for row in rows],
        device=device,
        seed=SEED,
    )


def run_rollout(spec: Spec, data: Mapping[str, Any], pace: Pace, device: torch.device) -> None:
    """The rollout engine alone, with a copy of the policy in the precision that is asked for."""
    rows = data["rows"]
    _hold_lengths(data["response_lengths"], data["end_id"])
    policy = load_policy(spec["model"]).to(device)
    dtype = torch.bfloat16 if spec["precision"] == "bfloat16" else None
    engine = Generator(policy.library, vocabulary=policy.tokenizer.vocabulary, dtype=dtype)
    law = Sampling(max_new_tokens=spec["response_tokens"], stop_token_ids=policy.tokenizer.stop_ids)
    for number in itertools.count():
        pace.boundary()
        seeds = [seed_for(SEED, number, place) for place in range(len(rows))]
        groups = engine.generate([row["prompt_ids"] for row in rows], 1, law, seeds)
        pace.counts["prompt"] = sum(len(row["prompt_ids"]) for row in rows)
        pace.counts["generated"] = pace.counts["response"] = sum(len(group[0].response_ids) for group in groups)
        pace.counts["sequences"] = len(rows)


# --- records --------------------------------------------------------------------------------------------------------


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(messages=(Message("user", row["prompt"]),))


def _rankings(rows: Sequence[Mapping[str, Any]]) -> list[Ranking]:
    """Best first, without ties."""
    return [
        Ranking(
            prompt=_prompt(row),
            responses=tuple(Response(text=text) for text in row["responses"]),
            order=tuple((place,) for place in range(len(row["responses"]))),
        )
        for row in rows
    ]


def _optimizer(spec: Spec) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=RATE, schedule="constant", precision=spec["precision"])


# --- what is held and timed from outside ----------------------------------------------------------------------------


def _hold(stage: ModuleType, pace: Pace, before: Callable[[], None] = lambda: None) -> None:
    """Make a stage's loop wait for the driver between steps."""
    go_on = stage.run_steps

    def run_steps(folder: Path, *, step: Callable[[int], Mapping[str, float]], **options: Any) -> None:
        def held(number: int) -> Mapping[str, float]:
            pace.boundary()
            before()
            return step(number)

        go_on(folder, step=held, **options)

    stage.run_steps = run_steps  # type: ignore[attr-defined]


def _hold_lengths(lengths: Sequence[int], end_id: int) -> None:
    """Make responses as long as is planned; a planned length of the limit's size ends by the end token, too.

    The first batch, by which an engine warms up, has no more than `WARM_UP_TOKENS`.

    The random number of a row's last step is replaced by one that is never drawn, and the draw, when it meets that
    number, gives the end token, and never otherwise.
    """
    planned = itertools.chain((min(length, WARM_UP_TOKENS) for length in lengths), itertools.cycle(lengths))
    draw, choose = sampling.draw_uniforms, sampling.choose

    def draw_uniforms(seeds: Sequence[int], responses: Sequence[int], steps: int) -> Any:
        uniform_TB = np.minimum(draw(seeds, responses, steps), np.float32(END - 2.0**-23))
        for place in range(len(seeds)):
            uniform_TB[min(next(planned), steps) - 1, place] = END
        return uniform_TB

    def choose_as_planned(logit_BV: Tensor, uniform_B: Tensor, law: Sampling) -> tuple[Tensor, Tensor]:
        token_B, logprob_B = choose(logit_BV, uniform_B, law)
        token_B = torch.where(token_B == end_id, end_id + 2, token_B)
        return torch.where(uniform_B == END, end_id, token_B), logprob_B

    for name, function in (("draw_uniforms", draw_uniforms), ("choose", choose_as_planned)):
        setattr(pool, name, function)


def _plan(pace: Pace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Of a step's tokens those of prompts and those of responses, as planned: by them the operations are counted."""
    pace.counts["prompt"] = sum(len(row["prompt_ids"]) * len(row["response_ids"]) for row in rows)
    pace.counts["prompt once"] = sum(len(row["prompt_ids"]) for row in rows)
    pace.counts["response"] = sum(len(ids) for row in rows for ids in row["response_ids"])


def _count_packed(stage: ModuleType, pace: Pace) -> None:
    """Count what a step of supervised training packs: sequences, their tokens, and the tokens that go through."""
    plain = stage.pack

    def pack(sequences: Sequence[Sequence[int]], **options: Any) -> Packed:
        packed: Packed = plain(sequences, **options)
        if pace.phases.inside(FORWARD):  # and not where the reference reads the same
            pace.counts["sequences"] += len(packed.lengths)
            pace.counts["tokens"] += sum(packed.lengths)
            pace.counts["processed"] += len(packed.id_N)
        return packed

    stage.pack = pack  # type: ignore[attr-defined]


def _time_training(pace: Pace) -> None:
    pace.phases.of(Trainer, "accumulate", lambda *_, **__: None if pace.phases.inside(UPDATE) else FORWARD)
    pace.phases.of(Tensor, "backward", "backward")
    pace.phases.of(Trainer, "apply", "optimizer")


def _time_ppo(pace: Pace, rows: Sequence[Mapping[str, Any]]) -> None:
    phases, run = pace.phases, ppo.PpoRun

    def of_logprobs(self: ppo.PpoRun, policy: model.LanguageModel, *_: Any, **__: Any) -> str:
        return "reference" if policy is self.reference else "old log-probs"

    plain = run.roll_out

    def roll_out(self: ppo.PpoRun, *arguments: Any) -> Any:
        rollouts = plain(self, *arguments)
        pace.counts["prompt"] = sum(len(one.prompt_ids) for one in rollouts)
        pace.counts["generated"] = pace.counts["response"] = sum(len(one.response_ids) for one in rollouts)
        pace.counts["sequences"] = len(rows)
        return rollouts

    run.roll_out = roll_out  # type: ignore[assignment, method-assign]
    phases.of(run, "roll_out", "rollout")
    phases.of(run, "_logprobs", of_logprobs)
    phases.of(run, "_values", lambda *_, **__: None if phases.inside(UPDATE) else "values")
    phases.of(run, "update", UPDATE)
    phases.of(WeightAverage, "update", "weight average")


if __name__ == "__main__":
    main()
