"""A recipe: everything a whole run needs, as one frozen dataclass read from a TOML file.

Each section configures the stage of the same name and is defined beside it. Variants are named tables:
`[sft.baseline]`, `[reward.main]`, `[policy.ppo-ptx]`. A source of records is a file, a `datasets` name, or a Python
function `module:function(seed)` that returns records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tastemaker.errors import ConfigError
from tastemaker.stages.comparisons import ComparisonsConfig
from tastemaker.stages.demonstrations import DemonstrationsConfig
from tastemaker.stages.dpo import DpoConfig
from tastemaker.stages.evaluation import EvaluationConfig
from tastemaker.stages.ppo import PpoConfig
from tastemaker.stages.prompts import PromptsConfig
from tastemaker.stages.reward import RewardConfig
from tastemaker.stages.sft import SftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """The language model that everything starts from."""

    model: str
    """A folder, a `.gguf` file, `package:NAME/PATH`, or a hub name."""
    stop_texts: tuple[str, ...] = ()
    """Further tokens that end its responses, such as a forum's mark of the next question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Pretraining text: for the mix of SFT and PPO-ptx, and held out, for the alignment tax."""

    source: str
    held_out: str
    documents: int | None = None
    held_out_documents: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """Simulated people, as Python functions `module:function`; only for `raters = "simulated"`."""

    raters: str
    """`(group, count, seed) -> list of RaterProfile`; groups are "training" and "held-out"."""
    features: str
    """`(prompt, response) -> mapping of floats`: what a rater sees in a response."""
    write: str | None = None
    """`(prompt, seed) -> str`: a demonstration."""
    flags: str | None = None
    """`(prompt, response) -> set of str`: the paper's yes/no fields that are true of a response."""
    training_raters: int = 8
    held_out_raters: int = 20
    agreement: float = 0.73
    """How often two training raters agree on an untied pair; the raters' noise is set to reach it (paper: 72.6 %)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run of the whole paper."""

    name: str
    base: BaseConfig
    prompts: PromptsConfig
    raters: Literal["people", "simulated"] = "people"
    seed: int = 0
    threads: int | None = None
    """Processor threads (None: all)."""
    database: str | None = None
    """The label store's URL (None: labels.db in the output folder)."""
    address: str = "tastemaker label"
    """Where people answer; printed while answers are missing."""
    simulation: SimulationConfig | None = None
    text: TextConfig | None = None
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    sft: dict[str, SftConfig] = field(default_factory=dict)
    comparisons: ComparisonsConfig | None = None
    reward: dict[str, RewardConfig] = field(default_factory=dict)
    selection: dict[str, str] = field(default_factory=dict)
    """SFT variant -> reward variant by whose score its epoch is chosen, once that exists."""
    policy: dict[str, PpoConfig | DpoConfig] = field(default_factory=dict)
    evaluation: EvaluationConfig | None = None

    def __post_init__(self) -> None:
        if self.raters == "simulated" and self.simulation is None:
            raise ConfigError('raters = "simulated" needs a [simulation] section that says who they are.')
        for name, policy in self.policy.items():
            if policy.init not in self.sft:
                raise ConfigError(f"policy.{name}: init {policy.init!r} is no SFT variant of this recipe.")
            if isinstance(policy, PpoConfig) and policy.reward not in self.reward and ":" not in policy.reward:
                raise ConfigError(f"policy.{name}: reward {policy.reward!r} is no reward variant of this recipe.")
        for name, reward in self.selection.items():
            if name not in self.sft or reward not in self.reward:
                raise ConfigError(f"selection: {name} = {reward!r} must name an SFT and a reward variant.")
