"""Every number that a user can set has a range: a config field or option without one fails here."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tastemaker.cli import main
from tastemaker.commands import inspecting, intake, people, sampling, training, whole
from tastemaker.config import from_mapping
from tastemaker.errors import ConfigError
from tastemaker.ranges import MAX_SEED, check_range, parse_size
from tastemaker.recipe import Recipe

# What a config that has required fields is built from; the others build themselves.
REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "OptimizerConfig": {"learning_rate": 1e-3},
    "PromptsConfig": {"source": "x"},
    "ComparisonsConfig": {"sources": ["sft/x"]},
    "PpoConfig": {"init": "x", "reward": "m:f"},
    "DpoConfig": {"init": "x"},
    "Contestant": {"model": "x"},
    "FewShot": {"template": "{prompt} {response} "},
    "Check": {"measure": "win_rate", "a": "x", "b": "y", "above": 0.5},
    "Claim": {"id": "1", "statement": "s", "checks": []},
    "EvaluationConfig": {"contestants": {}, "pairs": []},
    "BaseConfig": {"model": "x"},
    "TextConfig": {"source": "x", "held_out": "y"},
    "SimulationConfig": {"raters": "m:f", "features": "m:f"},
    "Recipe": {"name": "x", "base": {"model": "x"}, "prompts": {"source": "x"}},
}
TAKES_ZERO = {
    "OptimizerConfig.floor",
    "OptimizerConfig.warmup_steps",
    "OptimizerConfig.betas",
    "OptimizerConfig.weight_decay",
    "PromptsConfig.validation_share",
    "PromptsConfig.test_share",
    "PromptsConfig.seed",
    "SftConfig.residual_dropout",
    "SftConfig.pretraining_mix",
    "RewardConfig.cross_validation_folds",
    "PpoConfig.warmup_iterations",
    "PpoConfig.kl_coef",
    "PpoConfig.gamma",
    "PpoConfig.lam",
    "PpoConfig.value_coef",
    "PpoConfig.truncation_penalty",
    "PpoConfig.ptx_coef",
    "PpoConfig.ema_decay",
    "DpoConfig.label_smoothing",
    "Check.above",
    "TextConfig.held_out_documents",
    "DemonstrationsConfig.validation",
    "ComparisonsConfig.validation",
    "EvaluationConfig.heldout_texts",
    "Recipe.seed",
}
ANY_FINITE = {"Check.above"}  # a bound may be negative
EXCLUSIVE = {"Check.below"}  # as above; only one of the two may be given
SHARES = {  # the most that each takes, and whether that itself is taken
    "OptimizerConfig.floor": (1.0, True),
    "OptimizerConfig.betas": (1.0, False),
    "PromptsConfig.validation_share": (1.0, False),
    "PromptsConfig.test_share": (1.0, False),
    "SftConfig.residual_dropout": (1.0, False),
    "SftConfig.pretraining_mix": (1.0, False),
    "PpoConfig.gamma": (1.0, True),
    "PpoConfig.lam": (1.0, True),
    "PpoConfig.ema_decay": (1.0, True),
    "DpoConfig.label_smoothing": (0.5, False),
}


def kinds_in(hint: Any) -> set[type]:
    """The plain types and dataclasses in a type hint."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return {hint}
    return {kind for argument in typing.get_args(hint) for kind in kinds_in(argument)}


def configs(cls: type, seen: dict[str, type] | None = None) -> dict[str, type]:
    """A config class and all that it holds, by name."""
    seen = {} if seen is None else seen
    if cls.__name__ not in seen:
        seen[cls.__name__] = cls
        for hint in typing.get_type_hints(cls).values():
            for kind in kinds_in(hint):
                if dataclasses.is_dataclass(kind):
                    configs(kind, seen)
    return seen


def numeric_fields(cls: type) -> Iterator[tuple[str, type]]:
    for name, hint in typing.get_type_hints(cls).items():
        for kind in (int, float):
            if kind in kinds_in(hint) and typing.get_origin(hint) is not dict:
                yield name, kind


CONFIGS = configs(Recipe)
FIELDS = {f"{cls.__name__}.{name}": (cls, name, kind) for cls in CONFIGS.values() for name, kind in numeric_fields(cls)}


def changed(cls: type, name: str, value: float) -> Any:
    """The config with one field set; a pair of numbers has its second one set."""
    made: Any = from_mapping(cls, REQUIRED.get(cls.__name__, {}), where="test")
    given = (0.5, value) if isinstance(getattr(made, name), tuple) else value
    return dataclasses.replace(made, **{name: given})


def test_the_configs_are_found() -> None:
    assert {"OptimizerConfig", "AdaptiveKl", "LoraConfig", "DecodingConfig", "FewShot", "Check"} <= set(CONFIGS)
    assert {"OptimizerConfig.betas", "PpoConfig.keep_every", "AdaptiveKl.target", "Recipe.threads"} <= set(FIELDS)
    assert (TAKES_ZERO | ANY_FINITE | EXCLUSIVE | set(SHARES)) <= set(FIELDS)


@pytest.mark.parametrize("field", sorted(set(FIELDS) - EXCLUSIVE))
def test_every_number_of_a_config_has_a_range(field: str) -> None:
    cls, name, kind = FIELDS[field]
    bad: list[float] = [] if field in ANY_FINITE else [-1]
    bad += [math.nan, math.inf, -math.inf] if kind is float else []
    bad += [] if field in TAKES_ZERO else [0]
    if field in SHARES:
        most, taken = SHARES[field]
        bad += [most + 1e-6] if taken else [most]
        changed(cls, name, most if taken else 0.8 * most)
    if name == "seed":
        bad.append(MAX_SEED + 1)
    for value in bad:
        with pytest.raises(ConfigError, match=name):
            changed(cls, name, value)
    if field in TAKES_ZERO:
        changed(cls, name, 0)


def test_an_unused_bound_is_held_to_its_range_too() -> None:
    cls, _, _ = FIELDS["Check.below"]
    rest = {name: value for name, value in REQUIRED["Check"].items() if name != "above"}
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="below is"):
            from_mapping(cls, rest | {"below": value}, where="test")


# --- options that are not in a config --------------------------------------------------------------------------------

COMMANDS: Mapping[str, tuple[type, str]] = {
    "sft": (training._SftOptions, "--model m --data d --out o"),
    "reward": (training._RewardOptions, "--model m --data d --out o"),
    "ppo": (training._PpoOptions, "--init m --reward m:f --data d --out o"),
    "dpo": (training._DpoOptions, "--init m --data d --out o"),
    "evaluate": (whole._EvaluateOptions, "--policies a m b m --data d --judge m:f --out o"),
    "prompts": (intake._PromptsOptions, "--data d --out o"),
    "sample": (sampling._SampleOptions, "--policies a m --prompt p"),
    "inspect": (inspecting._InspectOptions, "sft --model m --data d"),
    "label": (people._LabelOptions, "status"),
}
OPTIONS_THAT_TAKE_ZERO = {"seed", "port", "validation_share", "test_share"}
OPTIONS = [(command, name) for command, (cls, _) in COMMANDS.items() for name, _ in numeric_fields(cls)]


@pytest.mark.parametrize(("command", "name"), OPTIONS)
def test_every_number_of_a_command_has_a_range(
    command: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = "-1" if name in OPTIONS_THAT_TAKE_ZERO else "0"
    assert main([command, *COMMANDS[command][1].split(), f"--{name.replace('_', '-')}", bad]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{name} is {bad}" in said
    assert list(tmp_path.iterdir()) == []


# --- the sentence ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Farm:
    cows: float | None = 3
    shares: tuple[float, float] = (0.25, 0.5)


@pytest.mark.parametrize(
    ("farm", "name", "bounds", "sentence"),
    [
        (Farm(cows=0), "cows", {"least": 1}, "cows is 0; it must be at least 1."),
        (Farm(cows=0), "cows", {"above": 0}, "cows is 0; it must be above 0."),
        (Farm(cows=7), "cows", {"least": 2, "most": 5}, "cows is 7; it must be from 2 to 5."),
        (Farm(cows=1), "cows", {"least": 0, "below": 1}, "cows is 1; it must be at least 0 and below 1."),
        (Farm(cows=math.inf), "cows", {"least": 0}, "cows is inf; it must be at least 0 and finite."),
        (Farm(cows=math.nan), "cows", {}, "cows is nan; it must be finite."),
        (Farm(shares=(0.5, 2)), "shares", {"most": 1}, r"shares is \(0.5, 2\); it must be at most 1."),
    ],
)
def test_what_was_given_and_what_is_allowed(farm: Farm, name: str, bounds: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        check_range(farm, name, **bounds)


def test_what_lies_inside_passes() -> None:
    check_range(Farm(), "cows", "shares", above=0, most=3)
    check_range(Farm(cows=None), "cows", least=1)
    check_range(Farm(cows=10**400), "cows", least=1)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6_000_000_000), ("512 MiB", 536_870_912), ("1.5kb", 1500), (" 2 TB ", 2 * 10**12), ("3KiB", 3072)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_size(text, "max_memory") == size


@pytest.mark.parametrize("text", ["", "6", "GB", "0GB", "-1GB", "6 gigabytes", "1e9B", "nan GB", "0.0001KB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"max_memory is .*; give a size above 0, such as 6GB or 512MB"):
        parse_size(text, "max_memory")
