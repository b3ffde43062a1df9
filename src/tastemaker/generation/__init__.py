"""The rollout engine: samples responses from any causal language model, fast, reproducibly and with log-probs.

A small interface over much machinery; it knows no algorithm, no record and no stage. `docs/generation.md` explains it.
"""

from tastemaker.generation.generator import Generator
from tastemaker.generation.rollout import FinishReason, Rollout
from tastemaker.generation.sampling import Sampling

__all__ = ["FinishReason", "Generator", "Rollout", "Sampling"]
