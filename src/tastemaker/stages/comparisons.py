"""Comparisons: sample K responses to each prompt, and let raters rank them, ties allowed (sections 3.4 and 3.5).

K is from 4 to 9, as in the paper. `sources` names the supervised policies that respond (the paper's later rounds have
PPO policies among them), and response k of a prompt comes from source k modulo their number. A response that another
one repeats word for word is not shown twice; a prompt left with a single response is left out.

What was sampled is kept (`kept`): rankings belong to these words, whatever a second sampling would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tastemaker.console import progress
from tastemaker.errors import ConfigError
from tastemaker.kept import Kept
from tastemaker.model import LanguageModel
from tastemaker.panel import Panel, collect
from tastemaker.ranges import check_range
from tastemaker.records import Prompt, Ranking, Response, messages_hash
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
    """The supervised variants that respond, such as "sft/baseline"; at least one, unless `source` is given."""
    train: int | None = None
    """Prompts to rank for training (None: all)."""
    validation: int | None = None
    """Prompts to rank for measuring, by training and by held-out raters both (None: all)."""
    overlap: int = 1
    """Raters who rank each training prompt. The paper's comparisons mostly have one."""
    validation_overlap: int = 2
    """Raters of each group who rank each validation prompt; from two on, agreement is measured."""
    decoding: DecodingConfig = DecodingConfig()
    """How they are sampled, and the responses by which an SFT variant's epoch is selected."""

    def __post_init__(self) -> None:
        check_range(self, "responses_per_prompt", least=2, most=9)  # the paper: 4 to 9
        check_range(self, "train", "overlap", "validation_overlap", least=1)
        check_range(self, "validation", least=0)
        if self.source is None and not self.sources:
            raise ConfigError("sources is empty; name the policies whose responses are ranked, as 'sft/baseline'.")
        if len(self.sources) > self.responses_per_prompt and self.source is None:
            raise ConfigError(
                f"responses_per_prompt is {self.responses_per_prompt}, but there are {len(self.sources)} sources, "
                "which take turns, so that some would never respond; name fewer, or raise responses_per_prompt."
            )
        if self.source is not None:
            meaningless = [
                one.name
                for one in fields(self)
                if one.name not in ("source", "decoding") and getattr(self, one.name) != one.default
            ]
            if meaningless:
                raise ConfigError(
                    f"source gives rankings that exist already, all of which are used; {', '.join(meaningless)} would "
                    "have no effect. Leave out one or the other."
                )

    def shape(self) -> dict[str, object]:
        """What shapes the responses that are ranked; how many prompts there are does not."""
        return {"k": self.responses_per_prompt, "sources": list(self.sources), "decoding": self.decoding.law}


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

    def to_json(self) -> list[dict[str, object]]:
        """The responses, as they are kept."""
        pairs = zip(self.responses, self.sources, strict=True)
        return [{"text": one.text, "finished": one.finished, "source": source} for one, source in pairs]

    @classmethod
    def from_json(cls, prompt: Prompt, rows: Sequence[Mapping[str, Any]]) -> Candidates:
        return cls(
            prompt=prompt,
            responses=tuple(Response(text=row["text"], finished=row["finished"]) for row in rows),
            sources=tuple(row["source"] for row in rows),
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


def kept_candidates(
    kept: Kept, prompts: Sequence[Prompt], draw: Callable[[Sequence[Prompt]], list[Candidates]], *, depends: str
) -> list[Candidates]:
    """The prompts' candidates: those kept under `depends`, the others drawn and kept."""
    key_of = {prompt.key: ("candidates", depends, prompt.key, messages_hash(prompt.messages)) for prompt in prompts}
    missing = [prompt for prompt in prompts if key_of[prompt.key] not in kept]
    if missing:
        drawn = {candidates.prompt.key: candidates.to_json() for candidates in draw(missing)}
        kept.add({key_of[prompt.key]: drawn.get(prompt.key, []) for prompt in missing})
    found = ((prompt, kept[key_of[prompt.key]]) for prompt in prompts)
    return [Candidates.from_json(prompt, rows) for prompt, rows in found if rows]


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
    items = [candidate.item() for candidate in candidates]
    return collect(
        service,
        config,
        items,
        panel,
        read=service.rankings,
        slot=lambda answer: (answer.prompt.key, answer.author.rater),
    )
