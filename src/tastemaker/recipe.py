"""A recipe: everything a whole run needs, as one frozen dataclass read from a TOML file.

Each section configures the stage of the same name and is defined beside it. Variants are named tables:
`[sft.baseline]`, `[reward.main]`, `[policy.ppo-ptx]`; one that is `like` another (`config.resolve_likes`) arrives here
whole. A source of records is a file, a `datasets` name, or a Python function `module:function(seed)` that returns
records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from tastemaker.config import nearest
from tastemaker.errors import ConfigError
from tastemaker.guidelines import GuidelinesConfig
from tastemaker.halves import Part
from tastemaker.ranges import check_range, check_seed_and_threads
from tastemaker.stages.comparisons import ComparisonsConfig
from tastemaker.stages.demonstrations import DemonstrationsConfig
from tastemaker.stages.dpo import DpoConfig
from tastemaker.stages.evaluation import Check, EvaluationConfig
from tastemaker.stages.ppo import PpoConfig
from tastemaker.stages.prompts import PromptsConfig
from tastemaker.stages.reward import RewardConfig
from tastemaker.stages.sft import SftConfig

VARIANT_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """The language model that everything starts from."""

    model: str
    """A folder, a `.gguf` file, `package:NAME/PATH`, or a hub name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Pretraining text: for the mix of SFT and PPO-ptx, and held out, for the alignment tax."""

    source: str
    """Documents to train on."""
    held_out: str
    """Documents that nothing is trained on."""
    documents: int | None = None
    """Documents to read (none: all)."""
    held_out_documents: int = 200
    """Held-out documents to read."""

    def __post_init__(self) -> None:
        check_range(self, "documents", least=1)
        check_range(self, "held_out_documents", least=0)


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
    """How many raters demonstrate and rank."""
    held_out_raters: int = 20
    """How many others judge."""
    agreement: float = 0.73
    """How often two training raters agree on an untied pair; the raters' noise is set to reach it (paper: 72.6 %),
    their tie thresholds left aside, so that they agree a little more often than this."""

    def __post_init__(self) -> None:
        check_range(self, "training_raters", "held_out_raters", least=1)
        check_range(self, "agreement", least=0.5, most=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run of the whole paper."""

    name: str
    """What the run is called in results and report."""
    base: BaseConfig
    """The language model that everything starts from."""
    prompts: PromptsConfig
    """Where prompts come from, and how they are filtered and split."""
    raters: Literal["people", "simulated"] = "people"
    """Who demonstrates, ranks and judges."""
    seed: int = 0
    """Everything random follows from it."""
    threads: int | None = None
    """Processor threads (None: all)."""
    database: str | None = None
    """The label store's URL (None: labels.db in the output folder)."""
    address: str | None = None
    """Where people answer; printed while answers are missing (None: the command that serves the pages)."""
    simulation: SimulationConfig | None = None
    """Who simulated raters are."""
    guidelines: GuidelinesConfig = GuidelinesConfig()
    """What raters read beside their tasks."""
    text: TextConfig | None = None
    """Pretraining text."""
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    """How many demonstrations are written, or where they are."""
    sft: dict[str, SftConfig] = field(default_factory=dict)
    """Supervised variants by name."""
    comparisons: ComparisonsConfig | None = None
    """What is ranked, and by how many; none where nothing learns from rankings."""
    reward: dict[str, RewardConfig] = field(default_factory=dict)
    """Reward model variants by name; the first is the one that evaluation scores with."""
    selection: dict[str, str] = field(default_factory=dict)
    """SFT variant -> reward variant by whose score its epoch is chosen, once that exists."""
    policy: dict[str, PpoConfig | DpoConfig] = field(default_factory=dict)
    """Policies by name."""
    evaluation: EvaluationConfig | None = None
    """Who is compared with whom, and which claims are judged."""

    def __post_init__(self) -> None:
        """Everything that one section says of another is checked before any work: a run may take days."""
        check_seed_and_threads(self)
        if self.raters == "simulated" and self.simulation is None:
            raise ConfigError('raters = "simulated" needs a [simulation] section that says who they are.')
        for name in (*self.sft, *self.reward, *self.policy):
            if not VARIANT_NAME.fullmatch(name):
                raise ConfigError(f"a variant is called {name!r}; names are folders: letters, digits, '-', '_', '.'.")
        self._check_variants()
        self._check_text()
        if self.evaluation is not None:
            self._check_evaluation(self.evaluation)
        self._check_raters()

    def _check_raters(self) -> None:
        """Simulated raters are as many as the recipe says, and no comparison can be made by more."""
        needed: list[tuple[str, int, str]] = []
        if self.comparisons is not None and self.comparisons.source is None:
            overlap = self.comparisons.validation_overlap if self.comparisons.validation != 0 else 1
            needed.append(("comparisons: overlap", self.comparisons.overlap, "training"))
            needed += [("comparisons: validation_overlap", overlap, group) for group in ("training", "held-out")]
        if self.evaluation is not None:
            judges = self.evaluation.judges if self.evaluation.judge_reward is None else ("reward",)
            count = self.evaluation.judges_per_comparison
            needed += [("evaluation: judges_per_comparison", count, group) for group in judges]
        there = {"reward": 1}
        if self.raters == "simulated" and self.simulation is not None:
            there |= {"training": self.simulation.training_raters, "held-out": self.simulation.held_out_raters}
        for setting, count, group in needed:
            if count > there.get(group, count):
                who = "the reward model that judges" if group == "reward" else f"the {group} raters of [simulation]"
                raise ConfigError(f"{setting} is {count}, but {who} are {there[group]} in all; lower it.")

    def _check_variants(self) -> None:
        if "base" in self.sft:
            raise ConfigError('an SFT variant is called "base", which means the base model in `init`; rename it.')
        starts = ("base", *self.sft)
        for name, reward in self.reward.items():
            _require(reward.init, starts, f"reward.{name}: init", "SFT")
        for name, policy in self.policy.items():
            _require(policy.init, starts, f"policy.{name}: init", "SFT")
            if isinstance(policy, PpoConfig) and ":" not in policy.reward:
                _require(policy.reward, self.reward, f"policy.{name}: reward", "reward")
        for name, judge in self.selection.items():
            _require(name, self.sft, "selection", "SFT")
            _require(judge, self.reward, f"selection: {name}", "reward")
            if f"{name}-selected" in self.sft:
                raise ConfigError(
                    f'an SFT variant is called "{name}-selected", as the folder of the epoch that [selection] chooses '
                    f"of {name!r} is; rename it."
                )
            if self.sft[name].keep_epochs == "last":
                raise ConfigError(
                    f"selection: {name}: its epochs are chosen among, but sft.{name}.keep_epochs is 'last'; set it to "
                    "'all', the default."
                )
        if self.comparisons is None:
            needy = [f"reward.{name}" for name in self.reward]
            needy += [f"policy.{name}" for name, policy in self.policy.items() if isinstance(policy, DpoConfig)]
            if needy:
                raise ConfigError(f"{', '.join(needy)} learns from rankings; give a [comparisons] section.")
        else:
            for source in self.comparisons.sources:
                kind, _, variant = source.partition("/")
                if kind != "sft" or ":" in variant:
                    raise ConfigError(
                        f"comparisons: sources: {source!r} cannot respond; name supervised variants, as 'sft/NAME'. A "
                        "policy is trained after the comparisons, and the base does not end its responses."
                    )
                _require(variant, self.sft, "comparisons: sources", "SFT")

    def _check_text(self) -> None:
        if self.text is not None:
            return
        needy = [f"sft.{name}: pretraining_mix" for name, config in self.sft.items() if config.pretraining_mix]
        needy += [
            f"policy.{name}: ptx_coef"
            for name, config in self.policy.items()
            if isinstance(config, PpoConfig) and config.ptx_coef
        ]
        if needy:
            raise ConfigError(f"{', '.join(needy)} needs pretraining text; give a [text] section.")

    def _check_evaluation(self, evaluation: EvaluationConfig) -> None:
        for name, contestant in evaluation.contestants.items():
            for model in (contestant.model, contestant.reference):
                if model is not None:
                    self._check_model(model, f"evaluation.contestants.{name}")
            if (contestant.best_of or contestant.few_shot) and not self.reward:
                raise ConfigError(f"evaluation.contestants.{name}: best_of and few_shot choose by a reward model.")
        if evaluation.judge_reward is not None:
            _require(evaluation.judge_reward, self.reward, "evaluation: judge_reward", "reward")
            self._check_independence(evaluation, evaluation.judge_reward)
        for claim in evaluation.claims:
            for check in claim.checks:
                self._check_measure(check, f"claim {claim.id}")

    def _check_independence(self, evaluation: EvaluationConfig, judge: str) -> None:
        """A reward model does not tell whether what it chose, or what its rankings shaped, became better."""
        part = self.reward[judge].part
        for what, how, reward, other in self._shaped(evaluation):
            if reward == judge:
                why = f"is what {what} {how}, so it would always seem better"
            elif part == other or "all" in (part, other):
                why = f"(part {part!r}) learned from rankings that shaped {what} too (part {other!r})"
            else:
                continue
            raise ConfigError(
                f"evaluation: judge_reward {judge!r} {why}; train the judge on one half of the rankings, and whatever "
                "else learns from them on the other (part)."
            )

    def _shaped(self, evaluation: EvaluationConfig) -> Iterator[tuple[str, str, str | None, Part]]:
        """What rankings shaped: what it is and how, by which reward model, and by which part of the rankings."""
        for name, contestant in evaluation.contestants.items():
            kind, _, variant = contestant.model.partition("/")
            policy = self.policy.get(variant.partition(":")[0]) if kind == "policy" else None
            if isinstance(policy, DpoConfig):
                yield f"contestant {name!r}", "", None, policy.part
            elif policy is not None and policy.reward in self.reward:
                yield f"contestant {name!r}", "was optimised for", policy.reward, self.reward[policy.reward].part
            if contestant.best_of or contestant.few_shot:  # by the first, as `round_evaluation` has it
                first, config = next(iter(self.reward.items()))
                yield f"contestant {name!r}", "is chosen by", first, config.part
        for name, reward in self.selection.items():
            yield f"the epoch of sft.{name}", "is chosen by", reward, self.reward[reward].part

    def _check_measure(self, check: Check, where: str) -> None:
        """Whether the recipe has what a claim's number is computed from."""
        if check.measure.startswith("reward_"):
            for variant in (check.a, check.b):
                if variant is not None:
                    _require(variant, self.reward, where, "reward")
        collected = self.comparisons is not None and self.comparisons.source is None
        if check.measure == "reward_accuracy_drop" and not collected:
            raise ConfigError(
                f"{where}: {check.measure} needs rankings by held-out raters, which only collected comparisons have."
            )
        if check.measure.startswith("text_loss_") and self.text is None:
            raise ConfigError(f"{where}: {check.measure} needs text; give a [text] section.")

    def _check_model(self, model: str, where: str) -> None:
        """A name such as "sft/NAME" must be of a variant of this recipe; anything else is a model source."""
        kind, _, variant = model.partition("/")
        variant, _, which = variant.partition(":")
        if kind == "sft":
            _require(variant, self.sft, where, "SFT")
        if kind == "policy":
            _require(variant, self.policy, where, "policy")
            if which and not _keeps(self.policy[variant], which):
                raise ConfigError(
                    f"{where}: {model!r} is not kept. PPO keeps its average as policy/NAME:ema, and with keep_every "
                    "the models of those iterations, as policy/NAME:40."
                )


def start_model(init: str) -> str:
    """The model that an `init` means, as models are named: the base, or an SFT variant."""
    return init if init == "base" else f"sft/{init}"


def _require(name: str, known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    if name not in known:
        hint = nearest(name, known) if known else f"It has no {what} variants."
        raise ConfigError(f"{where}: {name!r} is no {what} variant of this recipe. {hint}")


def _keeps(policy: PpoConfig | DpoConfig, which: str) -> bool:
    if not isinstance(policy, PpoConfig):
        return False
    if which.isdigit() and policy.keep_every is not None:
        return 1 <= int(which) <= policy.iterations and int(which) % policy.keep_every == 0
    return which == "ema"
