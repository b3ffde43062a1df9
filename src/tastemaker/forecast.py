"""What a stage that trains will need, before it starts: its networks' shapes and the lengths of its data, no weights.

`memory` knows how much each thing takes; here is which things a stage holds at once, and which micro-batches it will
have. A forecast is a function of the stage's config, so that a limit (`--max-memory`) can try budgets: `fitted` takes
the largest one that fits. How many tokens go through a network at once changes no gradient, so nothing else changes.

Lengths are those of a sample of the records. How long a policy's responses will be nobody knows, so they are taken to
be as long as they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

from tastemaker import parallel
from tastemaker.attention import LONGEST_BY_PRODUCTS
from tastemaker.checkpoint import Reader, load_reader, load_shape
from tastemaker.console import say
from tastemaker.corpus import encode_pieces
from tastemaker.errors import ConfigError, DataError, ModelError
from tastemaker.memory import BF16, FP32, PROCESS, Estimate, Item, Pass, Shape, in_words, largest, pass_phase, rollouts
from tastemaker.packing import microbatches
from tastemaker.records import Demonstration, Prompt, Ranking, Text
from tastemaker.settings import DpoConfig, OptimizerConfig, PpoConfig, RewardConfig, SftConfig

Config = TypeVar("Config", SftConfig, RewardConfig, PpoConfig, DpoConfig)
Forecast = Callable[[Config], Estimate]

SAMPLE = 256  # records, evenly spaced, tell lengths well enough
BATCHES = 8  # of them, tried for the largest micro-batch
STEP = 256  # tokens between the budgets that are tried


def watched(
    work: Callable[[], object], forecast: Callable[[], Forecast[Config]], config: Config
) -> dict[str, dict[str, Any]]:
    """Do a stage's work; say before what memory is expected, and after what it was. Returns both, for the manifest."""
    expected = None
    with suppress(ModelError, DataError):  # the stage itself says better what is wrong with its model or data
        parallel.forget_peak()
        expected = _after_earlier_stages(forecast()(config), parallel.peak_memory())
        say(f"  memory: {expected} expected at the peak, in micro-batches of {config.microbatch_tokens} tokens")
    parallel.forget_peak()
    work()
    peak = parallel.peak_memory()
    if expected is None:
        return {"memory": {"peak_mb": _megabytes(peak)}}
    say(f"  memory: {in_words(peak)} at the peak, {in_words(expected.total)} were expected")
    parts = {name: _megabytes(size) for name, size in expected.parts.items()}
    return {"memory": {"peak_mb": _megabytes(peak), "expected_mb": _megabytes(expected.total), "parts_mb": parts}}


def _after_earlier_stages(expected: Estimate, resident: int) -> Estimate:
    """With the process as large as it is by now. A limit assumes one that has just begun, so that choices repeat."""
    process = expected.parts.get("process")
    return expected if process is None else Estimate(parts={**expected.parts, "process": max(process, resident)})


def _megabytes(size: int) -> float:
    return round(size / 2**20, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where training runs, as far as memory goes: on a GPU only its own memory counts."""

    gpu: bool

    @classmethod
    def here(cls) -> Place:
        return cls(gpu=parallel.on_gpu())

    @property
    def process(self) -> dict[str, int]:
        return {} if self.gpu else {"process": PROCESS}

    def passing(self, optimizer: OptimizerConfig) -> Pass:
        return Pass(
            bfloat16=optimizer.precision == "bfloat16",
            recompute=optimizer.gradient_checkpointing,
            by_products=not self.gpu,
            compiled=optimizer.compile,
        )


def sft_forecast(
    model: str, rows: Sequence[Demonstration], text: Sequence[Text], place: Place
) -> Callable[[SftConfig], Estimate]:
    """Fine-tuning: one network."""
    shape, reader = load_shape(model), load_reader(model)
    items = [_item(reader, row.prompt, [row.response]) for row in _sample(rows)]
    pieces = cache(partial(_pieces, tuple(_sample(text)), reader))

    def estimate(config: SftConfig) -> Estimate:
        batches = _batches(items, config.batch_size, of=len(rows))
        if config.pretraining_mix and text:
            count = round(config.batch_size * config.pretraining_mix / (1 - config.pretraining_mix))
            batches = [[*batch, *_filled(pieces(config.max_text_tokens), max(1, count))] for batch in batches]
        return _trained(shape, batches, config.microbatch_tokens, config.optimizer, place)

    return estimate


def reward_forecast(model: str, rows: Sequence[Ranking], place: Place) -> Callable[[RewardConfig], Estimate]:
    """A reward model: one network without a head of its own."""
    shape, reader, sample = load_shape(model, scores=True), load_reader(model), _sample(rows)

    @cache
    def elements(grouping: str, limit: int | None) -> list[Item]:
        items = list[Item]()
        for row in sample:
            whole = [response.text for response in row.responses]
            grouped = [whole] if grouping == "prompt" else _pairs(row)
            items += [_item(reader, row.prompt, each, limit=limit, heads=False) for each in grouped]
        return items

    def estimate(config: RewardConfig) -> Estimate:
        items = elements(config.grouping, config.max_prompt_tokens)
        each = len(items) / max(1, len(sample))
        batches = _batches(items, round(each * config.batch_size), of=round(each * len(rows)))
        return _trained(shape, batches, config.microbatch_tokens, config.optimizer, place)

    return estimate


def dpo_forecast(model: str, rows: Sequence[Ranking], place: Place) -> Callable[[DpoConfig], Estimate]:
    """DPO: one network; what the reference says of the data is computed once and kept as numbers."""
    shape, reader, sample = load_shape(model), load_reader(model), _sample(rows)

    @cache
    def pairs(limit: int | None) -> list[Item]:
        return [_item(reader, row.prompt, pair, limit=limit) for row in sample for pair in _pairs(row)]

    def estimate(config: DpoConfig) -> Estimate:
        items = pairs(config.max_prompt_tokens)
        total = round(len(items) / max(1, len(sample)) * len(rows))
        batches = _batches(items, config.batch_size, of=total)
        return _trained(shape, batches, config.microbatch_tokens, config.optimizer, place)

    return estimate


def ppo_forecast(
    model: str, reward: str | None, rows: Sequence[Prompt], text: Sequence[Text], place: Place
) -> Callable[[PpoConfig], Estimate]:
    """PPO: policy, reference, average, value function and reward model (None: a Python function) at once."""
    shape, reader = load_shape(model), load_reader(model)
    judge = None if reward is None else load_shape(reward, scores=True)
    value = load_shape(model if reward is None else reward, scores=True)
    lengths = [len(reader.tokenizer.prompt_ids(row.messages)) for row in _sample(rows)]
    pieces = cache(partial(_pieces, tuple(_sample(text)), reader))

    def estimate(config: PpoConfig) -> Estimate:
        new, episodes = config.decoding.max_new_tokens, config.batch_size // config.minibatches
        fitting = [length for length in lengths if length + new <= reader.context] or [max(1, reader.context - new)]
        valued = 0 if config.value_function == "shared" else value.parameters
        trained = shape.parameters if config.lora is None else shape.adapters(config.lora.rank)
        policy = shape if config.lora is None else replace(shape, own_layers=False)  # the library's, with adapters
        held = {
            "weights": FP32 * valued + _policies(shape, trained, config) + _frozen(judge, config),
            "optimizer": 2 * FP32 * (trained + valued),
            **place.process,
        }
        phases = [
            held | {"cache": _rollouts(shape, config, max(fitting))},
            held | {"copies to be saved": 2 * FP32 * shape.parameters},
        ]
        texts = list[Item]()
        if config.ptx_coef and text:
            texts = _filled(pieces(config.max_text_tokens), max(1, round(episodes * config.ptx_examples_per_episode)))
        for most in {new, min(new, max(1, LONGEST_BY_PRODUCTS - max(fitting)))}:
            items = [Item(lengths=(length + most,), tokens=length + most, predicted=most) for length in fitting]
            for batch in _batches(items, episodes, of=episodes):
                groups = _groups(batch, config.microbatch_tokens)
                of_policy, how = groups + _groups(texts, config.microbatch_tokens), place.passing(config.policy)
                phases.append(pass_phase(policy, of_policy, how, trained=trained, held=held))
                if valued:
                    phases.append(pass_phase(value, groups, place.passing(config.value), trained=valued, held=held))
        return largest(phases)

    return estimate


def _policies(shape: Shape, trained: int, config: PpoConfig) -> int:
    """Bytes of the policy, its average, its bf16 copy for rollouts and the reference (under adapters the policy)."""
    held = FP32 * (shape.parameters + (trained if config.ema_decay else 0))
    if (config.decoding.precision or config.policy.precision) == "bfloat16":
        held += BF16 * shape.parameters
    return held + (_frozen(shape, config) if config.lora is None else FP32 * trained)


def _frozen(shape: Shape | None, config: PpoConfig) -> int:
    """Bytes of a network that is not trained: beside training in bf16, what stands in products is held in bf16."""
    if shape is None:
        return 0
    half = shape.inner_matrices if config.policy.precision == "bfloat16" else 0
    return FP32 * (shape.parameters - half) + BF16 * half


def fitted(config: Config, forecast: Forecast[Config], limit: int) -> Config:
    """The config with the largest budgets, up to its own, whose estimate is at most `limit` bytes.

    Raises:
        ConfigError: even the smallest do not fit; says what takes how much.
    """
    budgets: dict[str, int] = {"microbatch_tokens": config.microbatch_tokens}
    if isinstance(config, PpoConfig):
        budgets["batch_tokens"] = config.decoding.batch_tokens
    for name, budget in budgets.items():
        config = _with_budget(config, name, min(STEP, budget))
    least = forecast(config)
    if least.total > limit:
        raise ConfigError(
            f"{in_words(limit)} of memory are not enough: with the smallest micro-batches this takes about {least}. "
            "Save some by gradient_checkpointing, by precision = 'bfloat16', by lora in PPO, by shorter sequences, or "
            "take a smaller model."
        )
    for name, most in budgets.items():
        for tried in _downwards(most):
            candidate = _with_budget(config, name, tried)
            if forecast(candidate).total <= limit:
                config = candidate
                break
    return config


def _downwards(budget: int) -> list[int]:
    return [budget, *range((budget - 1) // STEP * STEP, STEP, -STEP)]


def _with_budget(config: Config, name: str, budget: int) -> Config:
    if isinstance(config, PpoConfig) and name == "batch_tokens":
        return replace(config, decoding=replace(config.decoding, batch_tokens=budget))
    return replace(config, microbatch_tokens=budget)


def _trained(
    shape: Shape, batches: Iterable[Sequence[Item]], budget: int, optimizer: OptimizerConfig, place: Place
) -> Estimate:
    """A stage with a single network, all of which is trained."""
    held = {"weights": FP32 * shape.parameters, "optimizer": 2 * FP32 * shape.parameters, **place.process}
    how, trained = place.passing(optimizer), shape.parameters
    phases = [pass_phase(shape, _groups(batch, budget), how, trained=trained, held=held) for batch in batches]
    return largest([*phases, held | {"copies to be saved": FP32 * shape.parameters}])


def _rollouts(shape: Shape, config: PpoConfig, prompt: int) -> int:
    new = config.decoding.max_new_tokens
    rows = min(config.batch_size, max(1, config.decoding.batch_tokens // (prompt + new)))
    return rollouts(shape, rows=rows, prompt_tokens=prompt, new_tokens=new)


def _groups(batch: Sequence[Item], budget: int) -> list[list[Item]]:
    costs = [max(item.lengths) * len(item.lengths) for item in batch]
    return [[batch[index] for index in group] for group in microbatches(costs, budget=budget)]


def _item(
    reader: Reader, prompt: Prompt, responses: Sequence[str], *, limit: int | None = None, heads: bool = True
) -> Item:
    """A prompt with the responses that share it."""
    opening = len(reader.tokenizer.prompt_ids(prompt.messages))
    opening = opening if limit is None else min(opening, limit)
    each = [len(reader.tokenizer.response_ids(text, finished=True)) for text in responses]
    lengths = tuple(min(reader.context, opening + count) for count in each)
    return Item(lengths=lengths, tokens=opening + sum(each), predicted=sum(each) if heads else 0)


def _pieces(text: Sequence[Text], reader: Reader, most: int) -> list[Item]:
    pieces = encode_pieces(text, reader, max_tokens=most)
    return [Item(lengths=(len(ids),), tokens=len(ids), predicted=len(ids) - 1) for ids in pieces]


def _pairs(row: Ranking) -> list[list[str]]:
    """The texts of a ranking's untied pairs."""
    return [[row.responses[better].text, row.responses[worse].text] for better, worse in row.untied_pairs]


Sampled = TypeVar("Sampled")


def _sample(rows: Sequence[Sampled]) -> Sequence[Sampled]:
    return rows[:: 1 + len(rows) // SAMPLE]


def _filled(items: Sequence[Item], count: int) -> list[Item]:
    """So many items, from the beginning again where there are fewer."""
    return [items[place % len(items)] for place in range(count)]


def _batches(items: Sequence[Item], size: int, *, of: int) -> list[list[Item]]:
    """Some batches of an optimizer step, made of sampled items that stand for `of` of them."""
    size = max(1, min(size, of))
    drawn = _filled(items, size * min(BATCHES, max(1, of // size))) if items else []
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]
