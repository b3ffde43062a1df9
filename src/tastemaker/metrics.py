"""What is measured while training, by declared names with units, in `metrics.jsonl`.

One object a step, `{"step": 12, "loss": 1.234, ...}`. A name that is not declared here cannot be written, so every
metric has a unit and a meaning, and the documentation is made of this table.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tastemaker import processes
from tastemaker.errors import TrainingError
from tastemaker.files import atomic_write

# If the responses are the policy's own, exp(-sum of log pi - log ref) over any responses is 1 on average, so that such
# a sum ever falls below -t with a probability of at most exp(-t), whatever policy, reference and number of responses
# (Ville's inequality). exp(-20) is 2e-9; any iteration may be the start, which makes it 1e-6 in 500.
KL_SURPRISE = 20.0  # nats, summed over responses
KL_ROUNDING = 0.01  # nats a response that rounding may add up to


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured quantity: its unit, and what it says."""

    unit: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    # every trained stage
    "loss": Metric("nats", "the stage's loss, a mean over what it counts (tokens, prompts or pairs) in the step"),
    "grad_norm": Metric("1", "global norm of the gradient before clipping"),
    "learning_rate": Metric("1", "learning rate of the step"),
    "epoch": Metric("epochs", "passes over the data so far"),
    "seconds": Metric("s", "wall time of the step"),
    "validation_loss": Metric("nats", "loss on held-out data"),
    "heldout_text_loss": Metric("nats/token", "loss on held-out pretraining text; its rise is the alignment tax"),
    "ptx_loss": Metric("nats/token", "loss on the pretraining text mixed in, before gamma"),
    # reward model
    "accuracy": Metric(
        "share",
        "pairs whose better response scores higher, ties aside; in DPO equal scores, up to rounding, are half",
    ),
    "validation_accuracy": Metric("share", "the same on held-out prompts; at the end `accuracy` of `results.json`"),
    "score_gap": Metric("1", "mean score of the better minus the worse response of a pair"),
    # RL
    "score": Metric("1", "mean score of the responses, before penalties"),
    "score_spread": Metric("1", "standard deviation of the scores of an iteration's responses"),
    "reward": Metric("1", "mean over responses of the summed reward, the KL penalty and others in it"),
    "kl": Metric("nats/response", "estimate k1 of KL(policy || reference), summed over a response"),
    "kl_error": Metric("nats/response", "standard error of `kl` over the responses of the iteration"),
    "kl_coef": Metric("1", "coefficient of the KL penalty in force"),
    "entropy": Metric("nats/token", "entropy of the policy, estimated by the mean of -log p over the sampled tokens"),
    "response_tokens": Metric("tokens", "mean length of the responses, the end token included"),
    "length_correlation": Metric("1", "correlation of the responses' scores with their lengths in tokens"),
    "truncated_rate": Metric("share", "responses cut off at the length limit"),
    "policy_loss": Metric("1", "PPO's clipped surrogate, mean over response tokens"),
    "value_loss": Metric("1", "half the clipped squared error of the value function, mean over response tokens"),
    "explained_variance": Metric("share", "1 - Var(return - value) / Var(return) before the update"),
    "clip_fraction": Metric("share", "tokens where the clip took hold: the policy's clipped loss is the larger"),
    "value_clip_fraction": Metric("share", "tokens where the clip took hold: the value's clipped error is the larger"),
    "approx_kl": Metric("nats/token", "half the mean squared change of log-prob since the rollout"),
    "first_log_ratio": Metric(
        "nats/token",
        "mean absolute change of log-prob at the iteration's first minibatch, before anything is trained",
    ),
    "ratio_mean": Metric("1", "mean of new over old probability"),
    "ratio_max": Metric("1", "largest of new over old probability in the iteration"),
    "sampler_mismatch": Metric("nats/token", "mean absolute difference of sampler and trainer log-probs"),
    "sampler_mismatch_max": Metric("nats/token", "the largest such difference in the iteration"),
    "sampler_ratio": Metric(
        "1",
        "mean over tokens of the larger of sampler and trainer probability over the smaller; none of the three is "
        "measured with `old_logprobs = sampler`, where nothing else is there to hold the sampler against",
    ),
    "value_learning_rate": Metric("1", "learning rate of the value function's step"),
    "value_grad_norm": Metric("1", "global norm of the value function's gradient before clipping"),
    # DPO
    "margin": Metric("nats", "mean implicit reward of the chosen minus the rejected response"),
    "chosen_logprob": Metric("nats/response", "mean log-prob of the chosen responses"),
    "rejected_logprob": Metric("nats/response", "mean log-prob of the rejected responses"),
}


class MetricsWriter:
    """Appends one object a step to a file; on resuming, steps from `resume_at` on are written anew."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] < resume_at]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of `step`; an undeclared name is an error of ours."""
        undeclared = [name for name in values if name not in METRICS]
        if undeclared:
            raise TrainingError(f"metrics {', '.join(undeclared)} are not declared in tastemaker.metrics")
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the metric {name} is {value} at step {step}; training cannot go on from there.",
                    finding="not-finite",
                )
        if not processes.is_first():
            return
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """See to it that what is written survives a power cut, as a checkpoint does that counts on it."""
        if processes.is_first():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none if it does not exist. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
