"""What is compared, and the settings that both sides take.

Standard library only, because the peer's environment reads it too. Where the two systems mean something else by a name,
docs/peers.md says what, and how the batch or the figure allows for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PEER, PEER_PPO = "1.16.0", "1.12.0"  # the second is the last TRL with PPO

BETA, SMOOTHING = 0.1, 0.15  # of DPO
TEMPERATURE, KL_COEF, LAM, CLIP = 0.7, 0.1, 0.95, 0.2  # of PPO
RESPONSE_TOKENS = 7  # of every response in PPO


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison, and the version of TRL that it is made with."""

    title: str
    peer: str = PEER


CASES: Mapping[str, Case] = {
    "sft": Case(title="SFT, prompt masked"),
    "reward-2": Case(title="reward model, K = 2"),
    "reward-4": Case(title="reward model, K = 4"),
    "dpo": Case(title="DPO"),
    "dpo-smoothed": Case(title="DPO, label smoothing"),
    "ipo": Case(title="IPO"),
    "ppo-rollout": Case(title="PPO, a rollout", peer=PEER_PPO),
    "ppo-policy": Case(title="PPO, the policy's step", peer=PEER_PPO),
    "ppo-value": Case(title="PPO, the value's step", peer=PEER_PPO),
}
