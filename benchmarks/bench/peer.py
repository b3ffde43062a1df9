"""The peer's side of a case: TRL's trainers, stopped between steps. `python -m benchmarks.bench.peer SPEC`.

Runs in the peer's own environment, so it imports nothing of the product. Defaults are the peer's, but for what would
make the work unequal or the measurement longer: no gradient checkpointing, no accumulation, no checkpoints, no reports.
It is given ids where it takes them, since tokenization is not measured.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from benchmarks.bench.measuring import WARM_UP_TOKENS, Pace, count_optimizer_steps, switch_on
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)

ENDLESS = 100_000  # steps; the driver says when to stop
PACKAGES = ("torch", "transformers", "trl", "accelerate")

Spec = Mapping[str, Any]


class Boundary(TrainerCallback):  # type: ignore[misc]
    """Makes a trainer wait for the driver between steps."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.pace.boundary()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.pace.boundary()


class PlannedLengths(LogitsProcessor):  # type: ignore[misc]
    """Ends every response where the plan says so, and nowhere else. No response has a pad token."""

    def __init__(self, lengths: list[int], prompt_tokens: int, end_id: int, pad_id: int) -> None:
        self.length_B = torch.tensor(lengths)
        self.prompt_tokens, self.end_id, self.pad_id = prompt_tokens, end_id, pad_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends_B = self.length_B == input_ids.shape[1] - self.prompt_tokens + 1
        scores[:, self.pad_id] = -torch.inf
        scores[:, self.end_id] = torch.where(ends_B, 1e4, -torch.inf)
        return scores


def main() -> None:
    """Do what the spec says, at the driver's pace."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    pace = Pace(spec, PACKAGES)
    if spec["switched"]:
        switch_on()
    if spec["autocast"]:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # what `accelerate launch --mixed_precision bf16` sets
    count_optimizer_steps(pace)
    pace.phases.of(Tensor, "backward", "backward")
    data = json.loads(Path(spec["data"]).read_text(encoding="utf-8"))
    tasks = {"sft": run_sft, "reward": run_reward, "dpo": run_dpo, "ppo": run_ppo, "rollout": run_rollout}
    tasks[spec["task"]](spec, data, pace)


def settings(spec: Spec, rows: int) -> dict[str, Any]:
    """What all trainers are given."""
    return {
        "output_dir": spec["folder"],
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }


def run_sft(spec: Spec, data: Mapping[str, Any], pace: Pace) -> None:
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    rows = [
        {
            "input_ids": [*row["prompt_ids"], *row["response_ids"][0]],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"][0]),
        }
        for row in data["rows"]
    ]
    trainer = SFTTrainer(
        model=language_model(spec),
        args=SFTConfig(**settings(spec, len(rows)), max_steps=ENDLESS, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(spec),
        callbacks=[Boundary(pace)],
    )
    count_inputs(trainer, pace)
    trainer.train()


def run_reward(spec: Spec, data: Mapping[str, Any], pace: Pace) -> None:
    """Every pair of a ranking, the better response first."""
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": [*row["prompt_ids"], *better], "rejected_ids": [*row["prompt_ids"], *worse]}
        for row in data["rows"]
        for better, worse in itertools.combinations(row["response_ids"], 2)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(spec["model"], dtype=torch.float32, num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**settings(spec, len(rows)), max_steps=ENDLESS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(spec),
        callbacks=[Boundary(pace)],
    )
    count_inputs(trainer, pace)
    trainer.train()


def run_dpo(spec: Spec, data: Mapping[str, Any], pace: Pace) -> None:
    """DPO's trainer takes no ids; it makes the same ones of the same text."""
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]}
        for row in data["rows"]
    ]
    trainer = DPOTrainer(
        model=language_model(spec),
        args=DPOConfig(**settings(spec, len(rows)), max_steps=ENDLESS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(spec),
        callbacks=[Boundary(pace)],
    )
    count_inputs(trainer, pace)
    trainer.train()


def run_ppo(spec: Spec, data: Mapping[str, Any], pace: Pace) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

    rows, prompt_tokens = data["rows"], max(len(row["prompt_ids"]) for row in data["rows"])
    policy = language_model(spec)
    hold_lengths(policy, PlannedLengths(data["response_lengths"], prompt_tokens, data["end_id"], data["pad_id"]), pace)
    config = PPOConfig(
        **settings(spec, len(rows)),
        num_mini_batches=spec["minibatches"],
        num_ppo_epochs=spec["inner_epochs"],
        total_episodes=ENDLESS * len(rows),
        response_length=spec["response_tokens"],
        temperature=1.0,
        stop_token="eos",
        num_sample_generations=0,
    )
    reads = tokenizer(spec, padding_side="left")
    trainer = PPOTrainer(
        args=config,
        processing_class=reads,
        model=policy,
        ref_model=language_model(spec),
        reward_model=reward_model(spec),
        value_model=reward_model(spec),
        train_dataset=Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in rows]),
        callbacks=[Boundary(pace)],
    )
    pace.phases.of(ppo_trainer, "batch_generation", "rollout")
    pace.phases.of(
        ppo_trainer, "forward", lambda model, *_: "update, forward" if model is trainer.model else "reference"
    )
    pace.phases.of(ppo_trainer, "get_reward", lambda model, *_: "scores" if model is trainer.reward_model else "values")
    pace.phases.of(trainer.optimizer, "step", "optimizer")
    trainer.train()


def run_rollout(spec: Spec, data: Mapping[str, Any], pace: Pace) -> None:
    """The library's `generate`, which is also what TRL samples by."""
    model = language_model(spec, precision=spec["precision"]).eval()
    hold_lengths(
        model, PlannedLengths(data["response_lengths"], spec["prompt_tokens"], data["end_id"], data["pad_id"]), pace
    )
    ids_BT = torch.tensor([row["prompt_ids"] for row in data["rows"]])
    config = GenerationConfig(
        max_new_tokens=spec["response_tokens"],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=data["end_id"],
        pad_token_id=data["pad_id"],
    )
    while True:
        pace.boundary()
        with torch.no_grad():
            model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=config)


# --- models, and what is held and counted from outside --------------------------------------------------------------


def language_model(spec: Spec, *, precision: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, precision))


def reward_model(spec: Spec) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(spec["reward"], dtype=torch.float32, num_labels=1)


def tokenizer(spec: Spec, **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(spec["model"], **options)


def hold_lengths(model: Any, planned: PlannedLengths, pace: Pace) -> None:
    """Give every call of `generate` the plan, and count what it generates.

    The first call, by which the engine warms up, makes no more than `WARM_UP_TOKENS`.
    """
    generate, limits = model.generate, itertools.chain([WARM_UP_TOKENS], itertools.repeat(None))

    def as_planned(*arguments: Any, **options: Any) -> Any:
        config = copy.copy(options.pop("generation_config"))
        config.max_new_tokens = next(limits) or config.max_new_tokens
        held = {"generation_config": config, "logits_processor": LogitsProcessorList([planned])}
        made = generate(*arguments, **options, **held)
        sequences = made if isinstance(made, Tensor) else made.sequences
        response_BT = sequences[:, planned.prompt_tokens :]
        pace.counts["prompt"] = int(options["attention_mask"].sum())
        pace.counts["generated"] = pace.counts["response"] = int((response_BT != planned.pad_id).sum())
        pace.counts["sequences"] = len(sequences)
        return made

    model.generate = as_planned


def count_inputs(trainer: Any, pace: Pace) -> None:
    """Count the tokens of a step, without padding."""
    compute_loss = trainer.compute_loss

    def counted(model: Any, inputs: Mapping[str, Tensor], *arguments: Any, **options: Any) -> Any:
        mask = inputs["attention_mask"]
        response = inputs.get("labels", inputs.get("completion_mask"))
        if response is not None:
            predicted = int((response > 0).sum() if "labels" not in inputs else (response != -100).sum())
            pace.counts["response"] += predicted
            pace.counts["prompt"] += int(mask.sum()) - predicted
        else:
            pace.counts["tokens"] += int(mask.sum())
        pace.counts["sequences"] += len(mask)
        pace.counts["processed"] += mask.numel()
        with pace.phases("forward"):
            return compute_loss(model, inputs, *arguments, **options)

    trainer.compute_loss = counted


if __name__ == "__main__":
    main()
