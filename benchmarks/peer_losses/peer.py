"""The peer's side: TRL's own trainers on the same batch. `python -m benchmarks.peer_losses.peer FOLDER VERSION`.

Runs in the peer's environment, so it imports nothing of the product. The trainers are given the batch as their own
collators make it, and asked for their loss, without the optimizer. PPO's loss is inside its `train`, which runs for one
iteration on the given responses in place of sampled ones. Everything is in fp32.

Dimensions in names: B rows, T response tokens, S sequences.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch
from benchmarks.peer_losses.cases import (
    BETA,
    CLIP,
    KL_COEF,
    LAM,
    PEER_PPO,
    RESPONSE_TOKENS,
    SMOOTHING,
    TEMPERATURE,
)
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

Rows = Sequence[Mapping[str, Any]]
Found = dict[str, Tensor]
TINY = 1e-7  # what TRL adds to a temperature


def main() -> None:
    logging.disable_progress_bar()
    folder, version = Path(sys.argv[1]), sys.argv[2]
    data = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    if version == PEER_PPO:
        found = ppo_figures(folder, data["ppo"])
    else:
        found = sft_figures(folder, data["sft"])
        for name in ("reward-2", "reward-4"):
            found |= reward_figures(folder, name, data[name])
        found |= dpo_figures(folder, "dpo", data["dpo"])
        found |= smoothed_figures(folder, "dpo-smoothed", data["dpo"])
        found |= ipo_figures(folder, data["ipo"])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, str(folder / f"trl-{version}.safetensors"))


def settings(folder: Path, rows: int) -> dict[str, Any]:
    """What all trainers are given."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }


def language_model(folder: Path, name: str = "policy") -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder / name), dtype=torch.float32)


def classifier(folder: Path, name: str = "reward") -> Any:
    return AutoModelForSequenceClassification.from_pretrained(str(folder / name), dtype=torch.float32, num_labels=1)


def tokenizer(folder: Path, **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(str(folder / "policy"), **options)


def step(case: str, trainer: Any, inputs: dict[str, Any]) -> Found:
    """The trainer's loss of a batch, and its gradient."""
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return gradients(case, trainer.model) | {f"{case}/loss": loss.detach()}


def gradients(case: str, model: Any) -> Found:
    return {
        f"{case}/gradient/{name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def sft_figures(folder: Path, rows: Rows) -> Found:
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    given = [
        {
            "input_ids": [*row["prompt"], *response],
            "completion_mask": [0] * len(row["prompt"]) + [1] * len(response),
        }
        for row in rows
        for response in row["responses"]
    ]
    trainer = SFTTrainer(
        model=language_model(folder),
        args=SFTConfig(**settings(folder, len(given)), completion_only_loss=True),
        train_dataset=Dataset.from_list(given),
        processing_class=tokenizer(folder),
    )
    inputs = trainer.data_collator([trainer.train_dataset[place] for place in range(len(given))])
    found = step("sft", trainer, inputs)
    with torch.no_grad():
        outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
    return found | {"sft/log-probs": outputs.log_probs.sum(1)}


def reward_figures(folder: Path, name: str, rows: Rows) -> Found:
    """Every pair of a ranking, the better response first."""
    from trl import RewardConfig, RewardTrainer

    given = [
        {"chosen_ids": [*row["prompt"], *better], "rejected_ids": [*row["prompt"], *worse]}
        for row in rows
        for better, worse in itertools.combinations(row["responses"], 2)
    ]
    trainer = RewardTrainer(
        model=classifier(folder),
        args=RewardConfig(**settings(folder, len(given))),
        train_dataset=Dataset.from_list(given),
        processing_class=tokenizer(folder),
    )
    inputs = trainer.data_collator(given)
    found = step(name, trainer, inputs)
    with torch.no_grad():
        better_S, worse_S = trainer.model(**inputs, use_cache=False).logits[:, 0].chunk(2)
    return found | {f"{name}/margins": better_S - worse_S}


def dpo_trainer(folder: Path, rows: Rows, **more: Any) -> Any:
    """It takes text only, so its data set is a stand-in; its collator gets the ids."""
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=language_model(folder),
        ref_model=language_model(folder, "reference"),
        args=DPOConfig(**settings(folder, len(rows)), beta=BETA, **more),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}] * 2),
        processing_class=tokenizer(folder),
    )


def pairs(trainer: Any, rows: Rows, *, turned: bool = False) -> dict[str, Any]:
    """A batch; `turned`: the worse response of each pair as the chosen one."""
    keys = ("rejected_ids", "chosen_ids") if turned else ("chosen_ids", "rejected_ids")
    given = [{"prompt_ids": row["prompt"], **dict(zip(keys, row["responses"], strict=True))} for row in rows]
    batch: dict[str, Any] = trainer.data_collator(given)
    return batch


def dpo_figures(folder: Path, name: str, rows: Rows, **more: Any) -> Found:
    trainer = dpo_trainer(folder, rows, **more)
    return step(name, trainer, pairs(trainer, rows)) | logprobs(name, trainer, rows)


def logprobs(name: str, trainer: Any, rows: Rows) -> Found:
    """Of both responses of each pair, under policy and reference."""
    inputs = pairs(trainer, rows)
    policy, reference = (
        torch.stack(trainer.compute_ref_log_probs(model, inputs), 1).flatten()
        for model in (trainer.model, trainer.ref_model)
    )
    return {f"{name}/log-probs": policy, f"{name}/reference's log-probs": reference}


def smoothed_figures(folder: Path, name: str, rows: Rows) -> Found:
    """(1 - e) of the pairs' loss and e of the loss of the pairs the other way round."""
    trainer = dpo_trainer(folder, rows)
    straight, turned = (step(name, trainer, pairs(trainer, rows, turned=way)) for way in (False, True))
    smoothed = {figure: (1 - SMOOTHING) * straight[figure] + SMOOTHING * turned[figure] for figure in straight}
    return smoothed | logprobs(name, trainer, rows)


def ipo_figures(folder: Path, rows: Rows) -> Found:
    """Times the square of the responses' one length."""
    found = dpo_figures(folder, "ipo", rows, loss_type=["ipo"])
    length = len(rows[0]["responses"][0])
    scaled = ("ipo/loss", "ipo/gradient/")
    return {name: tensor * length**2 if name.startswith(scaled) else tensor for name, tensor in found.items()}


# --- PPO ------------------------------------------------------------------------------------------------------------


def ppo_figures(folder: Path, rows: Rows) -> Found:
    """One iteration of `train`, watched from outside; all figures in the order of the rows."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

    policy, value = language_model(folder), classifier(folder, "value")
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings(folder, len(rows)),
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=len(rows),
            response_length=RESPONSE_TOKENS,
            temperature=TEMPERATURE,
            kl_coef=KL_COEF,
            lam=LAM,
            cliprange=CLIP,
            vf_coef=1.0,
            num_sample_generations=0,
        ),
        processing_class=tokenizer(folder, padding_side="left"),
        model=policy,
        ref_model=language_model(folder, "reference"),
        reward_model=classifier(folder),
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": row["prompt"]} for row in rows]),
    )
    watched = Watched(rows, ppo_trainer)
    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = watched.generate, watched.whiten
    ppo_trainer.get_reward = watched.get_reward
    trainer.log = lambda metrics, *_, **__: watched.metrics.update(metrics)
    seen: Found = {}
    hook = register_optimizer_step_pre_hook(
        lambda *_: seen.update(gradients("ppo-policy", policy) | gradients("ppo-value", value))
    )
    trainer.train()
    hook.remove()
    tokens = len(rows) * RESPONSE_TOKENS
    factor = (tokens / (tokens - 1)) ** 0.5
    found = {name: one * factor if name.startswith("ppo-policy/") else one for name, one in seen.items()}
    return found | watched.figures()


class Watched:
    """Stands in for sampling, and notes what the trainer's functions are given and give."""

    def __init__(self, rows: Rows, module: Any) -> None:
        self.rows, self.module = rows, module
        self.plain_whiten, self.plain_reward = module.masked_whiten, module.get_reward
        self.order, self.metrics = list[int](), dict[str, float]()
        self.seen: Found = {}

    def generate(self, model: Any, queries: Tensor, _size: int, pad_id: int, _config: Any) -> tuple[Tensor, Tensor]:
        """The given responses, and the logits that they would have been drawn from."""
        prompts = [tuple(row["prompt"]) for row in self.rows]
        self.order = [prompts.index(tuple(ids[ids != pad_id].tolist())) for ids in queries]
        response_BT = torch.tensor([self.rows[place]["response"] for place in self.order])
        sequence_BT = torch.cat([queries, response_BT], 1)
        logits_BTV = self.module.forward(model, sequence_BT, pad_id).logits[:, queries.shape[1] - 1 : -1]
        logits_BTV = logits_BTV / (TEMPERATURE + TINY)
        self.seen["log-probs"] = self.module.selective_log_softmax(logits_BTV, response_BT)
        return sequence_BT, logits_BTV

    def whiten(self, values: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """Only advantages are whitened."""
        assert bool(mask.all())
        self.seen["advantages"] = values.clone()
        whitened: Tensor = self.plain_whiten(values, mask, **options)
        return whitened

    def get_reward(self, model: Any, sequence_BT: Tensor, pad_id: int, start: int) -> Any:
        """The value function is asked first, the reward model second."""
        found = self.plain_reward(model, sequence_BT, pad_id, start)
        self.seen.setdefault("values", found[0][:, start - 1 : -1, 0].clone())
        return found

    def figures(self) -> Found:
        back = torch.tensor(self.order).argsort()
        rows = {f"ppo-rollout/{name}": tensor[back].flatten() for name, tensor in self.seen.items()}
        rows["ppo-rollout/returns"] = rows["ppo-rollout/advantages"] + rows["ppo-rollout/values"]
        means = {"mean KL": "objective/kl", "mean score": "objective/scores", "mean reward": "objective/rlhf_reward"}
        found = {f"ppo-rollout/{name}": torch.tensor(self.metrics[metric]) for name, metric in means.items()}
        found["ppo-policy/loss"] = torch.tensor(self.metrics["loss/policy_avg"])
        found["ppo-value/loss"] = torch.tensor(self.metrics["loss/value_avg"])
        return rows | found


if __name__ == "__main__":
    main()
