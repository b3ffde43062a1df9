"""Arguments of commands: sections that are chosen by their fields, and what is said of a misspelt option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from tastemaker.commands.options import Here, parse
from tastemaker.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveKl:
    target: float = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    adaptive_kl: AdaptiveKl | None = None
    lora: LoraConfig | None = None
    epochs: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    model: str
    data: str
    config: Annotated[Config, Here] = Config()


GIVEN = ["--model", "m", "--data", "d"]
LORA = Config(lora=LoraConfig(rank=4, targets=("q", "v")), epochs=5)


@pytest.mark.parametrize(
    "words",
    [
        [*GIVEN, "--lora.rank", "4", "--lora.targets", "q", "v", "--epochs", "5"],
        ["--lora.rank=4", "--epochs", "5", "--lora.targets", "q", "v", *GIVEN],
        [*GIVEN, "--epochs", "5", "lora:lora-config", "--lora.rank", "4", "--lora.targets", "q", "v"],
    ],
)
def test_a_field_of_a_section_chooses_it_wherever_it_stands(words: list[str]) -> None:
    assert parse(Options, words, "sft").config == LORA


def test_two_sections_and_none() -> None:
    both = parse(Options, ["--lora.rank", "2", "--adaptive-kl.target", "-1", *GIVEN], "sft").config
    assert both == Config(adaptive_kl=AdaptiveKl(target=-1.0), lora=LoraConfig(rank=2))
    assert parse(Options, ["--adaptive_kl.target", "2", *GIVEN], "sft").config.adaptive_kl == AdaptiveKl(target=2.0)
    assert parse(Options, GIVEN, "sft").config == Config()


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(Options, words, "sft")
    return str(refused.value)


def test_a_misspelt_required_option_is_told_before_what_is_missing() -> None:
    hint = "`tastemaker sft --help` lists the options."
    assert (
        refusal("--modle", "m", "--data", "d") == f"Unknown: --modle. Did you mean --model? Required: --model. {hint}"
    )
    assert refusal("--xyz=3", "--data", "d") == f"Unknown: --xyz=3. Required: --model. {hint}"
    assert refusal("--data", "d") == f"Required: --model. {hint}"


def test_a_misspelt_field_of_a_section_is_told_its_name() -> None:
    assert "Did you mean --lora.rank?" in refusal(*GIVEN, "--lora.rnk", "4")
