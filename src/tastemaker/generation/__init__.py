"""The rollout engine: samples responses from any causal language model, fast, reproducibly and with log-probs.

A small interface over much machinery; it knows no algorithm, no record and no stage. `docs/generation.md` explains it.
"""

from tastemaker.generation.generator import Generator
from tastemaker.generation.rollout import FinishReason, Piece, Rollout
from tastemaker.generation.sampling import Sampling
from tastemaker.generation.text import Decode, GrowingText

__all__ = ["Decode", "FinishReason", "Generator", "GrowingText", "Piece", "Rollout", "Sampling"]
