"""What kind of model a name stands for, and the ink it is drawn in: one colour per policy in every chart of a report.

The order of the families is the paper's ladder (base, few-shot prompted base, SFT, PPO, PPO with pretraining mix).
Colours are Okabe and Ito's, which stay apart for colour-blind readers; a family's further members differ in shade.
Every line and every row carries its name, so that colour is never alone in telling two apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

SHADES = 4
SFT_BASELINES = ("sft", "baseline")  # two names of the model that the others are held against


class Family(IntEnum):
    """A rung of the ladder; a higher one should win."""

    BASE = 0
    FEW_SHOT = 1
    OTHER = 2
    SFT = 3
    REWARD = 4
    BEST_OF = 5
    DPO = 6
    PPO = 7
    PPO_PTX = 8

    @property
    def css(self) -> str:
        return "f-" + self.name.lower().replace("_", "-")


# The first sign found decides, so the more particular ones stand first.
SIGNS: tuple[tuple[Family, tuple[str, ...]], ...] = (
    (Family.FEW_SHOT, ("few-shot", "few_shot", "fewshot", "-shot", "prompted")),
    (Family.PPO_PTX, ("ptx",)),
    (Family.BEST_OF, ("best-of", "best_of", "best of", "rejection")),
    (Family.DPO, ("dpo", "ipo")),
    (Family.SFT, ("sft", "baseline", "supervised")),
    (Family.PPO, ("ppo", "rlhf", "policy")),
    (Family.REWARD, ("reward",)),
    (Family.BASE, ("base", "pretrained", "gpt")),
)
# A kind says the family roughly; the name may say it more exactly.
REFINED_BY_NAME = {Family.BASE: (Family.FEW_SHOT,), Family.PPO: (Family.PPO_PTX, Family.DPO, Family.BEST_OF)}


def family_of(name: str, kind: str = "") -> Family:
    """The family of the model called `name` and described as `kind` (either may say nothing)."""
    by_kind, by_name = _sign_in(kind), _sign_in(name)
    if by_kind is None:
        return by_name if by_name is not None else Family.OTHER
    return by_name if by_name is not None and by_name in REFINED_BY_NAME.get(by_kind, ()) else by_kind


def _sign_in(text: str) -> Family | None:
    words = text.lower()
    return next((family for family, signs in SIGNS if any(sign in words for sign in signs)), None)


@dataclass(slots=True)
class Inks:
    """Gives each (family, name) its CSS classes, the same ones whenever it is asked again."""

    _members: dict[Family, list[str]] = field(default_factory=dict)
    _kinds: dict[str, str] = field(default_factory=dict)

    @classmethod
    def for_models(cls, kinds: Iterable[tuple[str, str]]) -> Inks:
        """Inks for models given as (name, kind), in the order in which their families' shades are handed out."""
        inks = cls()
        for name, kind in kinds:
            inks._kinds[name] = kind
            inks.of(name, kind)
        return inks

    def family(self, name: str, kind: str = "") -> Family:
        return family_of(name, kind or self._kinds.get(name, ""))

    def of(self, name: str, kind: str = "") -> str:
        """The CSS classes of a model; `kind` helps where the name alone does not say the family."""
        family = self.family(name, kind)
        name = name.rpartition("/")[2]  # `3-sft/baseline` and `baseline` are one model
        if family is Family.SFT and name in SFT_BASELINES:
            name = SFT_BASELINES[0]
        members = self._members.setdefault(family, [])
        if name not in members:
            members.append(name)
        return f"{family.css} v{members.index(name) % SHADES}"
