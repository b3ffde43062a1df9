"""The random policy and reward model that the stages' own tests have."""

from tests.stages.conftest import base, reward_model

__all__ = ["base", "reward_model"]
