"""Our side: the losses of the stages on the batch. `python -m benchmarks.peer_losses.ours FOLDER`.

Writes `ours.safetensors`: figures by case and name, and gradients by the parameter's name in the library.

Dimensions in names: B rollouts, T response tokens, S sequences, P pairs.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.peer_losses.cases import BETA, CLIP, KL_COEF, LAM, RESPONSE_TOKENS, SMOOTHING, TEMPERATURE
from safetensors.torch import save_file
from torch import Tensor

from tastemaker.checkpoint import load_policy, load_reward_model
from tastemaker.config import from_mapping
from tastemaker.generation import FinishReason, Rollout
from tastemaker.losses import whiten
from tastemaker.model import LanguageModel, RewardModel
from tastemaker.packing import pack
from tastemaker.records import Message, Prompt
from tastemaker.scoring import ModelScorer
from tastemaker.stages import dpo, sft
from tastemaker.stages.ppo import PpoConfig, PpoRun
from tastemaker.stages.reward import Element, element_loss
from tastemaker.training import Loss, OptimizerConfig, Trainer

Rows = Sequence[Mapping[str, Any]]
Found = dict[str, Tensor]

STILL = OptimizerConfig(learning_rate=1e-6)
HALVES = 2  # micro-batches of every step, which TRL's side takes at once


def main() -> None:
    folder = Path(sys.argv[1])
    data = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    found = sft_figures(folder, data["sft"])
    for name in ("reward-2", "reward-4"):
        found |= reward_figures(folder, name, data[name])
    found |= dpo_figures(folder, "dpo", data["dpo"], beta=BETA)
    found |= dpo_figures(folder, "dpo-smoothed", data["dpo"], beta=BETA, label_smoothing=SMOOTHING)
    length = len(data["ipo"][0]["responses"][0])
    found |= dpo_figures(folder, "ipo", data["ipo"], beta=BETA / length, variant="ipo")
    found |= ppo_figures(folder, data["ppo"])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, str(folder / "ours.safetensors"))


def step(
    case: str,
    module: LanguageModel | RewardModel,
    count: int,
    loss: Callable[[Sequence[int], float], Loss],
    total: float,
) -> Found:
    """The loss and the gradient of a step over `count` rows."""
    trainer = Trainer(module, STILL, total_steps=1)
    size = -(-count // HALVES)
    value, _ = trainer.accumulate([range(count)[start : start + size] for start in (0, size)], loss, total)
    gradients = {name: one.grad for name, one in module.library.named_parameters() if one.grad is not None}
    found = {f"{case}/gradient/{name}": gradient.clone() for name, gradient in gradients.items()}
    module.zero_grad(set_to_none=True)
    return found | {f"{case}/loss": torch.tensor(value)}


def sft_figures(folder: Path, rows: Rows) -> Found:
    policy = load_policy(str(folder / "policy"))
    examples = [
        sft.Example((*row["prompt"], *response), len(row["prompt"])) for row in rows for response in row["responses"]
    ]
    loss = partial(sft._example_loss, policy)
    tokens = float(sum(example.num_predicted for example in examples))
    found = step("sft", policy, len(examples), lambda group, n: loss([examples[row] for row in group], n), tokens)
    with torch.no_grad():
        packed = pack([example.ids for example in examples])
        logprob_M = policy.predict(packed, *packed.predicted([example.start for example in examples])).logprob_M
    parts: tuple[Tensor, ...] = torch.split(logprob_M, [example.num_predicted for example in examples])
    return found | {"sft/log-probs": torch.stack([part.sum() for part in parts])}


def reward_figures(folder: Path, name: str, rows: Rows) -> Found:
    model = load_reward_model(str(folder / "reward"))
    elements = [
        Element(
            tuple((*row["prompt"], *response) for response in row["responses"]), (tuple(range(len(row["responses"]))),)
        )
        for row in rows
    ]
    loss = partial(element_loss, model, "pairs")
    count = len(elements)
    found = step(name, model, count, lambda group, n: loss([elements[row] for row in group], n), float(count))
    with torch.no_grad():
        score_S = model.scores(pack([ids for element in elements for ids in element.sequences]))
    margins, first = [], 0
    for element in elements:
        count = len(element.sequences)
        margins += [score_S[first + a] - score_S[first + b] for a, b in itertools.combinations(range(count), 2)]
        first += count
    return found | {f"{name}/margins": torch.stack(margins)}


def dpo_figures(folder: Path, name: str, rows: Rows, **settings: Any) -> Found:
    policy, reference = load_policy(str(folder / "policy")), load_policy(str(folder / "reference"))
    config = from_mapping(dpo.DpoConfig, {"init": ""} | settings, where="comparison")
    pairs = [dpo.Pair((), tuple(row["prompt"]), *map(tuple, row["responses"])) for row in rows]
    trainer = Trainer(policy, STILL, total_steps=1)
    policy_P2, reference_P2 = (dpo.pair_logprobs(model, pairs, config, trainer) for model in (policy, reference))
    loss = partial(dpo._pair_loss, policy, config, pairs, reference_P2)
    figures = {f"{name}/log-probs": policy_P2.flatten(), f"{name}/reference's log-probs": reference_P2.flatten()}
    return step(name, policy, len(pairs), loss, float(len(pairs))) | figures


def ppo_figures(folder: Path, rows: Rows) -> Found:
    """One rollout of all episodes, and the first step of both networks on it."""
    run = ppo_run(folder, rows)
    rollouts = [
        Rollout(tuple(row["prompt"]), list(row["response"]), [0.0] * RESPONSE_TOKENS, FinishReason.LENGTH, 0)
        for row in rows
    ]
    experience, metrics = run.observe(list(range(len(rows))), rollouts, 1)
    raw_BT, mask_BT = experience.advantage_BT.clone(), experience.mask_BT
    experience.advantage_BT.copy_(whiten(raw_BT, mask_BT))
    tokens = float(mask_BT.sum())
    found = {
        "ppo-rollout/mean KL": torch.tensor(metrics["kl"]),
        "ppo-rollout/mean score": torch.tensor(metrics["score"]),
        "ppo-rollout/mean reward": torch.tensor(metrics["reward"]),
        "ppo-rollout/log-probs": experience.old_logprob_BT.flatten(),
        "ppo-rollout/values": experience.value_BT.flatten(),
        "ppo-rollout/advantages": raw_BT.flatten(),
        "ppo-rollout/returns": experience.return_BT.flatten(),
    }
    assert isinstance(run.value, RewardModel)
    found |= step("ppo-policy", run.policy, len(rows), partial(run._policy_loss, experience), tokens)
    return found | step("ppo-value", run.value, len(rows), partial(run._value_loss, experience), tokens)


def ppo_run(folder: Path, rows: Rows) -> PpoRun:
    settings = {
        "init": "",
        "reward": "",
        "batch_size": len(rows),
        "minibatches": 1,
        "decoding": {"max_new_tokens": RESPONSE_TOKENS, "temperature": TEMPERATURE},
        "kl_coef": KL_COEF,
        "lam": LAM,
        "clip": CLIP,
        "truncated": "score",
        "whiten_advantages": False,
    }
    policy = load_policy(str(folder / "policy"))
    prompts = [as_prompt(policy, row["prompt"]) for row in rows]
    run = PpoRun(
        from_mapping(PpoConfig, settings, where="comparison"),
        str(folder / "reference"),
        str(folder / "value"),
        ModelScorer(load_reward_model(str(folder / "reward")), budget=8192),
        prompts,
        (),
        (),
        torch.device("cpu"),
        0,
    )
    assert run.prompt_ids == [list(row["prompt"]) for row in rows]
    run.policy.library.load_state_dict(policy.library.state_dict())
    return run


def as_prompt(policy: LanguageModel, ids: Sequence[int]) -> Prompt:
    """The prompt that has these ids, the first of which opens every text."""
    return Prompt(messages=(Message("user", policy.tokenizer.library.decode(list(ids[1:]))),))


if __name__ == "__main__":
    main()
