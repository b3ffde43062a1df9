"""Comparisons: sample K responses to each prompt, and let raters rank them, ties allowed (sections 3.4 and 3.5).

K is from 4 to 9, as in the paper. Responses come mostly from supervised policies and, in later rounds, from PPO
policies too: `sources` names them, and response k of a prompt comes from source k modulo their number. A response that
another one repeats word for word is not shown twice; a prompt left with a single response is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tastemaker.console import progress
from tastemaker.errors import ConfigError
from tastemaker.model import LanguageModel
from tastemaker.panel import Panel, collect
from tastemaker.records import Prompt, Ranking, Response
from tastemaker.responses import DecodingConfig, sample_responses
from tastemaker.store import LabelService
from tastemaker.store.tasks import Guideline, NewItem, NewOutput, StudyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonsConfig:
    """What is ranked, and by how many."""

    source: str | None = None
    """A file, dataset or Python function of ready rankings; none are collected then."""
    responses_per_prompt: int = 4
    """K, from 2 to 9 (paper: 4 to 9)."""
    sources: tuple[str, ...] = ()
    """The policies that respond, such as "sft/baseline"; at least one, unless `source` is given."""
    train: int | None = None
    """Prompts to rank for training (None: all)."""
    validation: int | None = None
    """Prompts to rank for measuring, by training and by held-out raters both (None: all)."""
    overlap: int = 1
    """Raters who rank each training prompt. The paper's comparisons mostly have one."""
    validation_overlap: int = 2
    """Raters of each group who rank each validation prompt; from two on, agreement is measured."""
    decoding: DecodingConfig = DecodingConfig()
    """How they are sampled."""

    def __post_init__(self) -> None:
        if not 2 <= self.responses_per_prompt <= 9:
            raise ConfigError(
                f"responses_per_prompt is {self.responses_per_prompt}; it must be 2 to 9 (paper: 4 to 9)."
            )
        if self.source is None and not self.sources:
            raise ConfigError("sources is empty; name the policies whose responses are ranked, as 'sft/baseline'.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The responses to one prompt that raters will rank, each with the policy it came from."""

    prompt: Prompt
    responses: tuple[Response, ...]
    sources: tuple[str, ...]

    def item(self) -> NewItem:
        outputs = zip(self.responses, self.sources, strict=True)
        return NewItem(
            key=self.prompt.key,
            prompt=self.prompt,
            outputs=tuple(NewOutput(response=response, source=source) for response, source in outputs),
        )


def sample_candidates(
    policies: Mapping[str, LanguageModel], prompts: Sequence[Prompt], config: ComparisonsConfig, *, seed: int
) -> list[Candidates]:
    """K responses to each prompt, without repetitions."""
    drawn: dict[str, list[list[Response]]] = {}
    for place, (name, policy) in enumerate(policies.items()):
        share = len(range(place, config.responses_per_prompt, len(policies)))
        with progress(f"responses of {name}", share * len(prompts)) as ticker:
            drawn[name] = sample_responses(
                policy,
                prompts,
                n=share,
                decoding=config.decoding,
                seed=seed,
                purpose=f"comparisons/{name}",
                progress=lambda count, ticker=ticker: ticker.advance(count),  # type: ignore[misc]
            )
    candidates = []
    for place, prompt in enumerate(prompts):
        unique: dict[str, tuple[Response, str]] = {}
        for number in range(config.responses_per_prompt):
            name = list(policies)[number % len(policies)]
            response = drawn[name][place][number // len(policies)]
            unique.setdefault(response.text, (response, name))
        if len(unique) > 1:
            responses, sources = zip(*unique.values(), strict=True)
            candidates.append(Candidates(prompt=prompt, responses=responses, sources=sources))
    return candidates


def collect_rankings(
    service: LabelService,
    candidates: Sequence[Candidates],
    panel: Panel,
    *,
    study: str,
    guideline: Guideline,
    overlap: int,
) -> list[Ranking]:
    """Rankings of all candidates by `overlap` raters of the panel."""
    config = StudyConfig(
        name=study,
        kind="ranking",
        purpose="training",
        rater_group=panel.group,
        guideline=guideline,
        overlap=overlap,
    )
    collect(service, config, [candidate.item() for candidate in candidates], panel)
    return service.rankings(study)
