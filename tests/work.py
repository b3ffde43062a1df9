"""What a unit of work does, in figures that a busy machine does not change: arithmetic, operators, bytes.

    python -m tests.work                    renew tests/work_done.json, the ceilings of `test_work_done.py`
    python -m tests.work "SFT step, fp32"   which operators a unit calls, how often, and what they write

PyTorch shows every operator that reaches its dispatcher, those of a backward pass and of our own autograd functions
too. Arithmetic is counted by PyTorch's own formulas (`torch.utils.flop_counter`), two for each multiplication and
addition. What an operator writes are its results, views of what was given left out, and what it changes in place.

The units are steps of the stages themselves, on a model so small that a step takes some hundredths of a second. Every
first step is left out: there the optimizer makes its state.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from tests.models import save_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tastemaker.checkpoint import load_policy, load_reward_model, new_reward_model, save_reward_model
from tastemaker.config import from_mapping
from tastemaker.files import write_json
from tastemaker.generation import FinishReason, Rollout, Sampling
from tastemaker.generation.decoding import choose_path
from tastemaker.model import freeze
from tastemaker.packing import pack
from tastemaker.records import Demonstration, Message, Prompt, Ranking, Response
from tastemaker.responses import engine_for
from tastemaker.scoring import ModelScorer, Scorer
from tastemaker.settings import DecodingConfig, Precision
from tastemaker.stages import dpo, reward, sft
from tastemaker.stages.ppo import PpoConfig, PpoRun

CEILINGS = Path(__file__).parent / "work_done.json"
ALLOWED = 0.03  # above a ceiling
CPU = torch.device("cpu")
PRECISIONS: dict[str, Precision] = {"fp32": "float32", "bf16": "bfloat16"}

# --- counting -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Work:
    """What was done, by operator; and every tensor that was written: by which operator, its type and its shape."""

    flops: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    tensors: Counter[tuple[str, torch.dtype, tuple[int, ...]]] = field(default_factory=Counter)

    @property
    def by_weights(self) -> int:
        """Arithmetic with the weights of linear layers: plain products of two matrices."""
        return self.flops["mm"] + self.flops["addmm"]

    @property
    def by_attention(self) -> int:
        """All other arithmetic: batched products and attention kernels."""
        return self.flops.total() - self.by_weights

    def figures(self) -> dict[str, int]:
        """What is held against ceilings."""
        return {
            "operations": self.flops.total(),
            "operators": self.operators.total(),
            "bytes written": self.written.total(),
        }


@contextmanager
def counting() -> Iterator[Work]:
    """Count what is done within the block; blocks may lie within one another."""
    work = Work()
    with _Counting(work):
        yield work


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the library is untyped
    def __init__(self, work: Work) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = work

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        result = func(*args, **named)
        name, formula = func.overloadpacket.__name__, FORMULAS.get(func.overloadpacket)
        self.work.operators[name] += 1
        if formula is not None:
            self.work.flops[name] += int(formula(*args, **named, out_val=result))
        for tensor in _written(func, args, named, result):
            self.work.written[name] += tensor.numel() * tensor.element_size()
            self.work.tensors[name, tensor.dtype, tuple(tensor.shape)] += 1
        return result


def _written(func: Any, args: Sequence[Any], named: Mapping[str, Any], result: Any) -> Iterator[Tensor]:
    """Results in memory of their own, and what is changed in place."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(named)
    changed = {each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write}
    yield from _tensors([given[name] for name in names if name in changed and name in given])
    if "empty" not in func.overloadpacket.__name__:
        memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(list(given.values()))}
        yield from (one for one in _tensors(result) if one.untyped_storage().data_ptr() not in memory)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _attention_on_cpu(query_BHTD: Tensor, key_BGSD: Tensor, *_: object, **__: object) -> int:
    """Two products; hidden places are computed as well."""
    rows, heads, tokens, size = query_BHTD.shape
    return 4 * rows * heads * tokens * key_BGSD.shape[2] * size


# PyTorch's own formulas know the attention kernels of GPUs alone.
FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
}


def steps_of(stage: ModuleType, train: Callable[[], object]) -> list[Work]:
    """What each step of a training run does, without loading, saving and measuring before and after."""
    run_steps, found = stage.run_steps, list[Work]()

    def counted_steps(folder: Path, *, step: Callable[[int], Mapping[str, float]], **options: Any) -> None:
        def counted(number: int) -> Mapping[str, float]:
            with counting() as work:
                metrics = step(number)
            found.append(work)
            return metrics

        run_steps(folder, step=counted, **options)

    stage.run_steps = counted_steps  # type: ignore[attr-defined]
    try:
        train()
    finally:
        stage.run_steps = run_steps  # type: ignore[attr-defined]
    return found


# --- the data: as few words as leave every length unequal ------------------------------------------------------------

# Words of each prompt, and of the responses to it. A prompt is 3 tokens longer than its words, a response 1.
DEMONSTRATIONS = ((2, 3), (5, 11), (1, 17), (7, 2), (3, 29))
RANKED = ((7, (3, 5, 11, 2)), (13, (4, 1, 6, 17)))
EPISODES = ((2, 5), (3, 7), (5, 2), (7, 3), (4, 11), (6, 4))
PROMPT_TOKENS, RESPONSE_TOKENS = 3, 1

ROWS, ROWS_OF_A_PROMPT, PROMPT_LENGTH, NEW_TOKENS = 16, 8, 11, 5


def words(count: int, first: int) -> str:
    """So many words; different ones for another `first`, from the first word on."""
    return " ".join(f"w{2 + (first + 7 * place) % 90}" for place in range(count))


def prompt(count: int, number: int = 0) -> Prompt:
    return Prompt(messages=(Message("user", words(count, number)),))


def demonstrations() -> list[Demonstration]:
    return [Demonstration(prompt=prompt(before), response=words(after, 1)) for before, after in DEMONSTRATIONS]


def rankings() -> list[Ranking]:
    """Best first, without ties. No two responses begin alike."""
    return [
        Ranking(
            prompt=prompt(before),
            responses=tuple(Response(text=words(after, number)) for number, after in enumerate(responses)),
            order=tuple((number,) for number in range(len(responses))),
        )
        for before, responses in RANKED
    ]


def prompts_of_ids(count: int = ROWS // ROWS_OF_A_PROMPT, length: int = PROMPT_LENGTH) -> list[list[int]]:
    return [[4 + (11 * number + 5 * place) % 90 for place in range(length)] for number in range(count)]


# --- units of work --------------------------------------------------------------------------------------------------


class Models:
    """A small policy and a reward model in folders, and the runs of them that are counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.reward = str(save_model(folder / "base")), str(folder / "reward")
        save_reward_model(folder / "reward", new_reward_model(self.base, seed=1))
        self._runs = 0

    def sft_steps(self, precision: Precision, **changes: Any) -> list[Work]:
        config = self._config(sft.SftConfig, precision, {"batch_size": len(DEMONSTRATIONS)} | changes, epochs=2)
        return steps_of(
            sft,
            lambda: sft.train_sft(
                self.empty(), config=config, base=self.base, demonstrations=demonstrations(), device=CPU, seed=0
            ),
        )

    def reward_steps(self, precision: Precision) -> list[Work]:
        config = self._config(reward.RewardConfig, precision, {"batch_size": len(RANKED)}, epochs=2)
        return steps_of(
            reward,
            lambda: reward.train_reward_model(
                self.empty(), config=config, init=self.base, rankings=rankings(), device=CPU, seed=0
            ),
        )

    def dpo_steps(self, precision: Precision) -> list[Work]:
        """All pairs of the first ranking in every step."""
        config = self.dpo_config(precision, epochs=2)
        return steps_of(
            dpo,
            lambda: dpo.train_dpo(
                self.empty(), config=config, init=self.base, rankings=rankings()[:1], device=CPU, seed=0
            ),
        )

    def ppo_run(self, precision: Precision = "float32", scorer: Scorer | None = None, **changes: Any) -> PpoRun:
        """All episodes in one iteration of two minibatches, scored by the reward model unless a scorer is given."""
        optimizer = {"learning_rate": 1e-5, "schedule": "constant", "precision": precision}
        small: dict[str, Any] = {
            "init": self.base,
            "reward": self.reward,
            "iterations": 2,
            "batch_size": len(EPISODES),
            "minibatches": 2,
            "decoding": {"max_new_tokens": NEW_TOKENS},
            "policy": optimizer,
            "warmup_iterations": 0,
        }
        if changes.get("value_function") != "shared":
            small["value"] = optimizer
        config = from_mapping(PpoConfig, small | changes, where="test")
        prompts = [prompt(before, number) for number, (before, _) in enumerate(EPISODES)]
        judge = scorer or self.scorer(precision)
        return PpoRun(config, self.base, self.reward, judge, prompts, (), (), CPU, 0)

    def scorer(self, precision: Precision = "float32") -> ModelScorer:
        return ModelScorer(freeze(load_reward_model(self.reward), precision), budget=8192, precision=precision)

    def rollout(self, precision: Precision) -> Work:
        """The engine's part of a PPO iteration: new weights, then responses that all reach the limit."""
        policy = load_policy(self.base)
        engine = engine_for(policy, DecodingConfig(), precision=precision)
        with counting() as work:
            engine.load_weights(policy.library, 1)
            endless = Sampling(max_new_tokens=NEW_TOKENS, stop_token_ids=())
            engine.generate(prompts_of_ids(), ROWS_OF_A_PROMPT, endless, [1, 2])
        return work

    def decoding_step(self, precision: Precision) -> Work:
        """The second token of 16 rows, 8 to each of two prompts."""
        library = load_policy(self.base).library.to(getattr(torch, precision))
        path = choose_path(library)
        with torch.no_grad(), path.attention(library):
            decoding = path.starter(library, new_tokens=NEW_TOKENS)(0)
            decoding.prefill(prompts_of_ids())
            decoding.branch(torch.arange(ROWS) // ROWS_OF_A_PROMPT)
            decoding.step(torch.arange(ROWS))
            with counting() as work:
                decoding.step(torch.arange(ROWS))
        return work

    def dpo_config(self, precision: Precision, *, epochs: int) -> dpo.DpoConfig:
        """All six pairs of a ranking in every step."""
        config = self._config(dpo.DpoConfig, precision, {"batch_size": 6, "init": self.base}, epochs=epochs)
        assert isinstance(config, dpo.DpoConfig)
        return config

    def _config(self, kind: type[Any], precision: Precision, given: Mapping[str, Any], *, epochs: int) -> Any:
        optimizer = {"learning_rate": 1e-5, "schedule": "constant", "precision": precision}
        return from_mapping(kind, {"optimizer": optimizer, "epochs": epochs} | dict(given), where="test")

    def empty(self) -> Path:
        """A folder for another run."""
        self._runs += 1
        return self.folder / f"run-{self._runs}"


@torch.no_grad()
def made_up_rollouts(run: PpoRun) -> list[Rollout]:
    """Responses of fixed lengths to the run's prompts, each with its end token, and with the policy's log-probs."""
    rollouts = []
    for number, (_, after) in enumerate(EPISODES):
        ids = [*(11 + (number + 3 * place) % 80 for place in range(after)), run.policy.tokenizer.end_id]
        packed = pack([[*run.prompt_ids[number], *ids]])
        predicted = run.policy.predict(packed, *packed.predicted([len(run.prompt_ids[number])]))
        logprobs = predicted.logprob_M.tolist()
        rollouts.append(Rollout(tuple(run.prompt_ids[number]), ids, logprobs, FinishReason.STOP, 0))
    return rollouts


def ppo_parts(run: PpoRun) -> tuple[Work, Work]:
    """What observing and updating do in the second iteration on rollouts of fixed lengths."""
    chosen = list(range(len(EPISODES)))
    for iteration in range(2):
        rollouts = made_up_rollouts(run)  # the same, with log-probs of the policy as it is by now
        with counting() as observing:
            experience, _ = run.observe(chosen, rollouts, iteration)
        with counting() as updating:
            run.update(experience, iteration)
    return observing, updating


def all_units(models: Models) -> dict[str, Work]:
    """Every unit that has ceilings."""
    units = dict[str, Work]()
    for name, precision in PRECISIONS.items():
        units[f"SFT step, {name}"] = models.sft_steps(precision)[1]
        units[f"reward model step, {name}"] = models.reward_steps(precision)[1]
        units[f"DPO step, {name}"] = models.dpo_steps(precision)[1]
        units[f"PPO rollout, {name}"] = models.rollout(precision)
        units[f"PPO observation, {name}"], units[f"PPO update, {name}"] = ppo_parts(models.ppo_run(precision))
        units[f"decoding step of {ROWS} rows, {name}"] = models.decoding_step(precision)
    return units


# --- ceilings -------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Whose operators are counted: PyTorch and the library of models, by major and minor version."""
    found = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
    return {name: ".".join(version.split(".")[:2]) for name, version in found.items()}


def renew() -> None:
    """Write what the units do now as their ceilings, and say what has changed."""
    before = json.loads(CEILINGS.read_text(encoding="utf-8"))["units"] if CEILINGS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        found = {name: work.figures() for name, work in all_units(Models(Path(folder))).items()}
    for name, figures in found.items():
        for what, count in figures.items():
            old = before.get(name, {}).get(what)
            if old != count:
                print(f"{name}: {what} {'new' if old is None else format(old, ',')} -> {count:,}")
    write_json(CEILINGS, {"versions": versions(), "units": found})


def show(name: str) -> None:
    """A unit's operators, those that write most first."""
    with tempfile.TemporaryDirectory() as folder:
        units = all_units(Models(Path(folder)))
    if name not in units:
        raise SystemExit(f"There is no unit {name!r}; give one of: {'; '.join(units)}.")
    work = units[name]
    print(f"{'operator':44} {'calls':>7} {'bytes written':>14} {'operations':>12}")
    for operator, calls in sorted(work.operators.items(), key=lambda row: (-work.written[row[0]], -row[1])):
        print(f"{operator:44} {calls:7,} {work.written[operator]:14,} {work.flops[operator]:12,}")
    print(f"{'all':44} {work.operators.total():7,} {work.written.total():14,} {work.flops.total():12,}")


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        show(sys.argv[1])
    else:
        renew()


if __name__ == "__main__":
    main()
