"""What PPO's rollouts are computed in, and that they are of the policy as it is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.stages.test_ppo import config, run_of

from tastemaker.errors import ConfigError

STEEP = {"learning_rate": 0.3, "schedule": "constant", "epsilon": 1.0}


@pytest.mark.parametrize(
    ("policy", "decoding", "least", "most"),
    [
        ("float32", {}, 0.0, 1e-5),
        ("float32", {"precision": "bfloat16"}, 1e-4, 0.02),
        ("bfloat16", {}, 1e-4, 0.02),
        ("bfloat16", {"precision": "float32"}, 1e-4, 0.02),
    ],
)
def test_rollouts_are_of_the_policy_after_each_update(
    random_base: Path, policy: str, decoding: dict[str, Any], least: float, most: float
) -> None:
    """bf16 stays within some hundredths of a nat; weights of the iteration before would be farther off."""
    run = run_of(
        str(random_base), policy=STEEP | {"precision": policy}, decoding={"max_new_tokens": 5} | decoding, kl_coef=0.0
    )
    before = [parameter.detach().clone() for parameter in run.policy.parameters()]
    for iteration in range(3):
        mismatch = run.step(iteration)["sampler_mismatch"]
        assert least < mismatch < most
    moved = max(
        float((new.detach() - old).abs().max()) for new, old in zip(run.policy.parameters(), before, strict=True)
    )
    assert moved > 0.05


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decoding": {"stop_texts": ["Q:"]}}, "without the end token"),
        ({"decoding": {"precision": "bfloat16"}, "old_logprobs": "sampler"}, "in bf16 the two differ too much"),
        ({"decoding": {"stop_texts": [""]}}, "empty text"),
    ],
)
def test_what_ppo_does_not_sample_by(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**changes)
