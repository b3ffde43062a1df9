"""Blind judging (section 3.6): pairs of responses in random order, and each response on the 1 to 7 scale.

Judges are held-out raters: they belong to a group that ranked nothing for training. They read a guideline in which, as
in the paper's final evaluations, truthfulness and harmlessness come before helpfulness. Two responses of the same text
are a tie without asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tastemaker.errors import ConfigError
from tastemaker.panel import Panel, collect
from tastemaker.ranges import check_range
from tastemaker.records import Prompt
from tastemaker.responses import DecodingConfig
from tastemaker.stages.evaluation.claims import FIELDS, Check, Claim
from tastemaker.stages.evaluation.contestants import Contestant, Responses
from tastemaker.store import LabelService
from tastemaker.store.tasks import Guideline, NewItem, NewOutput, Rating, StudyConfig

SEPARATOR = " | "  # between the parts of an item's key
SAME_TEXT = "same text"  # the rater of two responses of one text, about which nobody is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Who is compared with whom, on how many prompts."""

    contestants: dict[str, Contestant]
    """Who responds, by name."""
    pairs: tuple[tuple[str, str], ...]
    """Pairs to judge; the win rate is of the first over the second."""
    prompts: int | None = None
    """Test prompts, taken evenly from all of them (None: all)."""
    baseline: str | None = None
    """The contestant that win rates by category are measured against."""
    decodings: tuple[DecodingConfig, ...] = (DecodingConfig(greedy=True), DecodingConfig())
    """How they respond; a claim that names none is judged under the last."""
    judges: tuple[Literal["held-out", "training"], ...] = ("held-out",)
    """Which groups of raters judge. The paper reports both; only held-out ones trained nothing."""
    judge_reward: str | None = None
    """A reward variant that judges in place of raters: one that is independent of what the policies were trained on."""
    judges_per_comparison: int = 1
    """Raters of a group who judge each comparison."""
    rated: tuple[str, ...] = ()
    """Contestants whose responses are also rated, 1 to 7, with the paper's yes/no fields, by held-out raters."""
    heldout_texts: int = 200
    """Documents of held-out pretraining text on which every model's loss is taken."""
    gold: str | None = None
    """A Python function `module:function` that knows the true worth of a response, where there is one."""
    claims: tuple[Claim, ...] = ()
    """Statements that the run is to bear out."""

    def __post_init__(self) -> None:
        check_range(self, "prompts", "judges_per_comparison", least=1)
        check_range(self, "heldout_texts", least=0)
        named = {name for pair in self.pairs for name in pair} | {*self.rated}
        if self.baseline is not None:
            named.add(self.baseline)
        if self.rated and self.judge_reward is not None:
            raise ConfigError(
                "rated needs raters; judge_reward has a reward model in their place, and it rates nothing."
            )
        unknown = sorted(named - set(self.contestants))
        if unknown:
            known = ", ".join(sorted(self.contestants))
            raise ConfigError(f"{', '.join(map(repr, unknown))} is no contestant; contestants are {known}.")
        for name in self.contestants:
            if SEPARATOR in name:
                raise ConfigError(f"a contestant is called {name!r}; leave {SEPARATOR!r} out of its name.")
        if not self.decodings or len(names := [one.name for one in self.decodings]) > len(set(names)):
            raise ConfigError("decodings must be at least one, each with a temperature of its own.")
        for claim in self.claims:
            for check in claim.checks:
                problem = self._problem(check)
                if problem is not None:
                    raise ConfigError(f"claim {claim.id}: {check.measure} of {check.a!r}: {problem}")
        silent = [name for name, one in self.contestants.items() if one.best_of is not None]
        if silent and all(one.greedy for one in self.decodings):
            raise ConfigError(f"contestant {silent[0]!r} is the best of several samples; give a decoding that draws.")

    def _problem(self, check: Check) -> str | None:
        """What keeps a check from being measured in this evaluation: found now, not after days of training."""
        if check.measure.startswith("reward_"):
            return None  # of a reward variant, which the recipe knows
        names = [name for name in (check.a, check.b, check.base) if name is not None]
        for name in names:
            if name not in self.contestants:
                return f"{name!r} is no contestant."
        of_responses = self._problem_of_responses(check, names) if "decoding" in FIELDS[check.measure] else None
        return of_responses or self._problem_of_measure(check, names)

    def _problem_of_responses(self, check: Check, names: Sequence[str]) -> str | None:
        """Whether the responses that the check is about are sampled."""
        by_name = {one.name: one for one in self.decodings}
        decoding = by_name.get(check.decoding or self.decodings[-1].name)
        if decoding is None:
            return f"the decoding {check.decoding!r} is none of {', '.join(by_name)}."
        alike = [name for name in names if decoding.greedy and self.contestants[name].best_of is not None]
        return f"{alike[0]!r} is the best of several samples, and has no greedy responses." if alike else None

    def _problem_of_measure(self, check: Check, names: Sequence[str]) -> str | None:
        contestants = {name: self.contestants[name] for name in names}
        if "win_rate" in check.measure:
            if (check.a, check.b) not in self.pairs:
                return f"the pair with {check.b!r} is not judged; add it to pairs."
            judge = check.judge or ("held-out" if self.judge_reward is None else None)
            if judge is not None and (self.judge_reward is not None or judge not in self.judges):
                return f"{judge!r} raters do not judge; add them to judges."
        if "flag" in check.measure or "likert" in check.measure:
            if self.judge_reward is not None:
                return "such a claim needs raters; a reward model judges here, and rates nothing."
            if not set(names) <= set(self.rated):
                return "such a claim needs ratings; add the contestants to rated."
        if check.measure == "gold_difference" and self.gold is None:
            return "give 'gold', the function that knows the true worth."
        for name, one in contestants.items():
            if check.measure == "reference_loss_difference" and one.reference is None:
                return f"{name!r} has no reference; give it one."
            if check.measure.startswith("text_loss_") and not self.heldout_texts:
                return "heldout_texts is 0; no loss on held-out text is taken."
            if check.measure.startswith("text_loss_") and (one.best_of is not None or one.few_shot is not None):
                return f"{name!r} is no plain model, so it has no loss on held-out text."
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A comparison as the statistics need it: `preference` is 1 where `a` won, 0.5 for a tie."""

    a: str
    b: str
    decoding: str
    prompt: Prompt
    preference: float
    length_a: int
    """Characters, as raters see them: contestants may have different tokenizers."""
    length_b: int
    rater: str
    judge: str


def judge(
    service: LabelService,
    prompts: Sequence[Prompt],
    responses: Responses,
    config: EvaluationConfig,
    panel: Panel,
    *,
    study: str,
    guideline: Guideline,
) -> list[Judged]:
    """Have every pair compared on every prompt under every decoding that both contestants have."""
    by_key = {prompt.key: place for place, prompt in enumerate(prompts)}
    items, ties = _questions(prompts, responses, config)
    settings = _study(study, "comparison", panel, guideline, overlap=config.judges_per_comparison)
    answers = collect(
        service,
        settings,
        items,
        panel,
        read=service.comparisons,
        slot=lambda answer: (answer.key, answer.rater),
    )

    def as_judged(a: str, b: str, name: str, place: int, preference: float, rater: str) -> Judged:
        return Judged(
            a=a,
            b=b,
            decoding=name,
            prompt=prompts[place],
            preference=preference,
            length_a=len(responses[a, name].responses[place].text),
            length_b=len(responses[b, name].responses[place].text),
            rater=rater,
            judge=panel.group,
        )

    judged = []
    for answer in answers:
        key, a, b, name = answer.key.rsplit(SEPARATOR, 3)  # a prompt's key is a user's, and may hold anything
        judged.append(as_judged(a, b, name, by_key[key], answer.preference, answer.rater))
    # A tie counts as much as what was asked, however many judges each comparison has.
    return judged + [as_judged(*tie, 0.5, SAME_TEXT) for tie in ties for _ in range(config.judges_per_comparison)]


def _questions(
    prompts: Sequence[Prompt], responses: Responses, config: EvaluationConfig
) -> tuple[list[NewItem], list[tuple[str, str, str, int]]]:
    """What judges are asked; and the pairs of one text, which are not: contestants, decoding, place of the prompt."""
    items, ties = [], []
    for a, b in config.pairs:
        for decoding in config.decodings:
            if (a, decoding.name) not in responses or (b, decoding.name) not in responses:
                continue
            ours, theirs = responses[a, decoding.name], responses[b, decoding.name]
            for place, prompt in enumerate(prompts):
                if ours.responses[place].text == theirs.responses[place].text:
                    ties.append((a, b, decoding.name, place))
                    continue
                items.append(
                    NewItem(
                        key=SEPARATOR.join((prompt.key, a, b, decoding.name)),
                        prompt=prompt,
                        outputs=(
                            NewOutput(response=ours.responses[place], source=a),
                            NewOutput(response=theirs.responses[place], source=b),
                        ),
                    )
                )
    return items, ties


def rate(
    service: LabelService,
    prompts: Sequence[Prompt],
    responses: Responses,
    config: EvaluationConfig,
    panel: Panel,
    *,
    decoding: str,
    study: str,
    guideline: Guideline,
) -> list[Rating]:
    """Have the rated contestants' responses rated, each on its own scale.

    As in the paper's tool, a rater sees all responses to a prompt in one task, in random order, and rates each: so they
    are rated beside one another, and which contestants are rated is part of the question.
    """
    names = [name for name in config.rated if (name, decoding) in responses]
    items = [
        NewItem(
            key=prompt.key,
            prompt=prompt,
            outputs=tuple(
                NewOutput(response=responses[name, decoding].responses[place], source=name) for name in names
            ),
        )
        for place, prompt in enumerate(prompts)
    ]
    if not names:
        return []
    settings = _study(study, "rating", panel, guideline, overlap=1)
    return collect(
        service, settings, items, panel, read=service.ratings, slot=lambda answer: (answer.key, answer.rater)
    )


def _study(name: str, kind: str, panel: Panel, guideline: Guideline, *, overlap: int) -> StudyConfig:
    return StudyConfig(
        name=name,
        kind="comparison" if kind == "comparison" else "rating",
        purpose="evaluation",
        rater_group=panel.group,
        guideline=guideline,
        overlap=overlap,
    )
