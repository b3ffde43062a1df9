"""The responses of an evaluation's contestants, and what only their models can tell: sampled once, and kept.

Judges who are people take days. What was sampled before they were asked is what they judge, so it is kept in the
stage's folder (`kept`) and never sampled again while everything that it depends on is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

from tastemaker.checkpoint import load_reader
from tastemaker.config import to_json
from tastemaker.console import through
from tastemaker.corpus import encode_texts, text_loss
from tastemaker.errors import ConfigError
from tastemaker.files import read_demonstrations
from tastemaker.inputs import FOLDERS, Input, Inputs
from tastemaker.kept import Kept, digest
from tastemaker.model import LanguageModel, count_parameters
from tastemaker.records import Demonstration, Prompt, messages_hash
from tastemaker.responses import DecodingConfig, leaving_room
from tastemaker.scoring import Scorer
from tastemaker.stages.evaluation import Contestant, EvaluationConfig, Field, Sampled, best_prefix
from tastemaker.stages.evaluation.contestants import drawn_prefixes, longest_prefix, respond, winner

TEXT_BUDGET = 8192
MAX_TEXT_TOKENS = 512

LoadModel = Callable[[str, tuple[str, ...]], LanguageModel]


class Sampling:
    """Everybody's responses. Made before the stage works, since it declares what sampling reads.

    `scorer` names what chooses few-shot prefixes and the best of n.
    """

    def __init__(self, config: EvaluationConfig, inputs: Inputs, scorer: str | None, load_model: LoadModel) -> None:
        self.config, self._load_model = config, load_model
        self.seed = inputs.seed()
        self._scorer = None if scorer is None else inputs.scorer(scorer)
        self._validation = inputs.prompts("validation")
        self._texts = inputs.held_out_texts()
        self._models: dict[str, Input[str]] = {}
        self._examples: dict[str, Input[list[Demonstration]]] = {}
        for name, contestant in config.contestants.items():
            for model in (contestant.model, contestant.reference):
                if model is not None:
                    self._models[model] = inputs.model(model)
            if contestant.few_shot is not None:
                self._examples[name] = _examples(name, contestant.few_shot.source, inputs)
        self._loaded: dict[tuple[str, tuple[str, ...]], LanguageModel] = {}

    @cached_property
    def scorer(self) -> Scorer | None:
        """What chooses few-shot prefixes and the best of n."""
        return None if self._scorer is None else self._scorer.load()

    def shape(self, names: Iterable[str], decodings: Sequence[DecodingConfig]) -> dict[str, object]:
        """What shapes the responses of some contestants, for the name of a study."""
        contestants = {name: self._depends(name) for name in sorted(set(names))}
        return {"contestants": contestants, "decodings": [decoding.law for decoding in decodings]}

    def fitting(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that everybody can respond to. The intake sees to the base and what is trained from it, but not
        to few-shot prefixes and to models from elsewhere."""
        kept = list(prompts)
        new_tokens = max(decoding.max_new_tokens for decoding in self.config.decodings)
        for name, contestant in self.config.contestants.items():
            reader = load_reader(self._models[contestant.model].load())
            if contestant.reference is not None:  # it reads the same tokens
                other = load_reader(self._models[contestant.reference].load())
                if reader.tokenizer.library.get_vocab() != other.tokenizer.library.get_vocab():
                    raise ConfigError(
                        f"evaluation.contestants.{name}: the reference {contestant.reference!r} has another tokenizer "
                        f"than {contestant.model!r}, so there is no KL between them; leave 'reference' out."
                    )
                reader = replace(reader, context=min(reader.context, other.context))
            tokens = longest_prefix(reader.tokenizer, self._prefixes(name, contestant))
            what = f"test prompts (contestant {name!r})"
            kept = leaving_room(kept, reader, new_tokens=new_tokens, prefix_tokens=tokens, what=what)
        return kept

    def contest(self, name: str, kept: Kept) -> list[dict[str, Any]]:
        """The few-shot prefixes that were tried for a contestant, with their scores; none where it has no prefix."""
        contestant = self.config.contestants[name]
        if contestant.few_shot is None:
            return []
        key = ("contest", self._depends(name))
        if key not in kept:
            if self.scorer is None:
                raise ConfigError("few_shot needs a reward model to choose the prefix by; train one, or leave it out.")
            _, contest = best_prefix(
                self._model(contestant.model, contestant.stop_texts),
                contestant.few_shot,
                self._examples[name].load(),
                self._validation.load(),
                self.scorer,
                sampled_decoding(self.config),
                seed=self.seed,
            )
            kept.add({key: contest})
        found: list[dict[str, Any]] = kept[key]
        return found

    def responses(self, name: str, decoding: DecodingConfig, prompts: Sequence[Prompt], kept: Kept) -> Sampled:
        """A contestant's response to each prompt: those kept, the others sampled and kept."""
        depends = digest([self._depends(name), decoding.law])
        keys = [("response", depends, name, prompt.key, messages_hash(prompt.messages)) for prompt in prompts]
        missing = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in kept]
        if missing:
            field = self._field(name, kept)
            rows = respond(name, field, missing, decoding, self.scorer, seed=self.seed).rows()
            kept.add(dict(zip([key for key in keys if key not in kept], rows, strict=True)))
        return Sampled.of_rows([kept[key] for key in keys])

    def text_losses(self, name: str, kept: Kept) -> list[float]:
        """The loss of a contestant's model on each held-out document."""
        contestant, count = self.config.contestants[name], self.config.heldout_texts
        key = ("text losses", self._models[contestant.model].fingerprint, self._texts.fingerprint, str(count))
        if key not in kept:
            policy = self._model(contestant.model, contestant.stop_texts)
            limit = min(MAX_TEXT_TOKENS, policy.context)
            losses = []
            for text in through(self._texts.load()[:count], f"{name}, held-out document"):
                pieces = encode_texts([text], policy.tokenizer, max_tokens=limit)
                losses.append(text_loss(policy, pieces, budget=TEXT_BUDGET))
            kept.add({key: losses})
        found: list[float] = kept[key]
        return found

    def parameters(self, name: str, kept: Kept) -> int:
        """The size of a contestant's model."""
        contestant = self.config.contestants[name]
        key = ("parameters", self._models[contestant.model].fingerprint)
        if key not in kept:
            kept.add({key: count_parameters(self._model(contestant.model, contestant.stop_texts))})
        return int(kept[key])

    def _depends(self, name: str) -> str:
        """A hash of all that a contestant's responses depend on, but the decoding."""
        contestant = self.config.contestants[name]
        known: dict[str, object] = {
            "name": name,
            "contestant": to_json(contestant),
            "model": self._models[contestant.model].fingerprint,
            "seed": self.seed,
        }
        if contestant.reference is not None:
            known["reference"] = self._models[contestant.reference].fingerprint
        if self._scorer is not None and (contestant.best_of or contestant.few_shot):
            known["chosen by"] = self._scorer.fingerprint
        if contestant.few_shot is not None:
            known["examples"] = self._examples[name].fingerprint
            known["validation"] = self._validation.fingerprint
            known["decoding"] = sampled_decoding(self.config).law
        return digest(known)

    def _prefixes(self, name: str, contestant: Contestant) -> list[str]:
        if contestant.few_shot is None:
            return []
        examples = self._examples[name].load()
        return drawn_prefixes(contestant.few_shot, examples, self._validation.load(), seed=self.seed)[1]

    def _field(self, name: str, kept: Kept) -> Field:
        contestant = self.config.contestants[name]
        contest = self.contest(name, kept)
        return Field(
            contestant=contestant,
            policy=self._model(contestant.model, contestant.stop_texts),
            prefix=winner(contest) if contest else "",
            reference=None if contestant.reference is None else self._model(contestant.reference, ()),
        )

    def _model(self, name: str, stop_texts: tuple[str, ...]) -> LanguageModel:
        """Load a model; the last two are kept, since contestants share models and references."""
        wanted = self._models[name].load(), stop_texts
        if wanted not in self._loaded:
            if len(self._loaded) > 1:
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[wanted] = self._load_model(*wanted)
        return self._loaded[wanted]


def check_text_losses(config: EvaluationConfig, base: str) -> None:
    """Refuse claims that compare losses a token of models whose tokens are different ones.

    What a run trains has the tokens of its `base`.

    Raises:
        ConfigError: such a claim; tokens of a larger vocabulary are longer, and their losses larger.
    """
    vocabulary = cache(lambda source: load_reader(source).tokenizer.library.get_vocab())
    for claim in config.claims:
        for check in claim.checks:
            if check.measure not in ("text_loss_difference", "text_loss_recovered"):
                continue
            names = [name for name in (check.a, check.b, check.base) if name in config.contestants]
            models = [config.contestants[name].model for name in names]
            sources = {base if name == "base" or name.partition("/")[0] in FOLDERS else name for name in models}
            if any(vocabulary(one) != vocabulary(other) for one, other in pairwise(sorted(sources))):
                raise ConfigError(
                    f"claim {claim.id} compares the text losses of {' and '.join(names)}, whose tokenizers differ; "
                    "nats a token mean something else for each, so leave that check out."
                )


def sampled_decoding(config: EvaluationConfig) -> DecodingConfig:
    """The first decoding that draws; the last where none does."""
    return next((decoding for decoding in config.decodings if not decoding.greedy), config.decodings[-1])


def _examples(name: str, source: str | None, inputs: Inputs) -> Input[list[Demonstration]]:
    if source is None:
        return inputs.demonstrations("train")
    return inputs.source(f"few-shot examples of {name}", source, read_demonstrations, Demonstration)
