"""The engines on a GPU: whether both ways of each agree, and how long each takes.

    python -m benchmarks.gpu [--shape M] [--rounds 5] [--out benchmarks/results/gpu.json]

Rollouts are decoded with CUDA graphs and without; training attends by the kernel for different lengths and by the
padded one. Models are Llamas with random weights, all responses are as long as they may be. Ends with 1 where there is
no GPU, and where the two ways do not agree; the file is written in the second case too.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers
from benchmarks.bench.cases import spread_lengths
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tastemaker import attention, parallel
from tastemaker.files import write_json
from tastemaker.generation import Generator, Rollout, Sampling
from tastemaker.head import target_logprobs
from tastemaker.model import Trunk
from tastemaker.packing import Packed, pack
from tastemaker.settings import OptimizerConfig
from tastemaker.training.trainer import Loss, Trainer

# The kernel for different lengths may be so many times as far from the exact result as the padded one.
NO_WORSE = 1.5
# Log-probs of the same tokens in fp32, with graphs and without: rounding alone is some millionths.
SAME_LOGPROB = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama, and how much it is given to do."""

    layers: int
    width: int
    heads: int
    groups: int
    inner: int
    vocabulary: int
    rollouts: tuple[tuple[int, int, int], ...]
    """Responses, tokens of a prompt, new tokens."""
    sequences: int
    longest: int
    """Of a training step."""


SHAPES = {
    "S": Shape(
        layers=4,
        width=256,
        heads=8,
        groups=4,
        inner=688,
        vocabulary=4096,
        rollouts=((32, 64, 64), (256, 64, 64)),
        sequences=64,
        longest=128,
    ),
    "M": Shape(
        layers=30,
        width=576,
        heads=9,
        groups=3,
        inner=1536,
        vocabulary=49152,
        rollouts=((32, 64, 64), (128, 64, 64), (64, 256, 512)),
        sequences=32,
        longest=512,
    ),
}


def make_model(shape: Shape, device: torch.device) -> Any:
    """A random model in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device).eval()


def sequences_of(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Wall time of each round after two that warm up."""
    taken = []
    for _ in range(rounds + 2):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return [round(one, 5) for one in taken[2:]]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- training ---------------------------------------------------------------------------------------------------------


@contextmanager
def padded_only() -> Iterator[None]:
    """Without the kernel for different lengths."""
    with patch.object(attention, "varlen_kernel", lambda device: None):
        yield


def attention_errors(shape: Shape, device: torch.device, window: int | None) -> dict[str, float] | None:
    """How far both kernels are from attention in float64, as shares of its norm: outputs and gradients in bf16."""
    kernel = attention.varlen_kernel(device) if device.type == "cuda" else None
    if kernel is None:
        return None
    packed = pack(sequences_of(spread_lengths(8, shape.longest), shape.vocabulary)).to(device)
    generator = torch.Generator(device).manual_seed(2)
    size = shape.width // shape.heads
    inputs = [
        torch.randn(len(packed.id_N), count, size, generator=generator, device=device).bfloat16().transpose(0, 1)
        for count in (shape.heads, shape.groups, shape.groups)
    ]

    def outcome(attend: Callable[..., Tensor], *given: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        query, key, value = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        attended = attend(query, key, value, packed, window, None, *given)
        gradients = torch.autograd.grad(attended.square().sum(), (query, key, value))
        return torch.cat([tensor.detach().double().flatten() for tensor in (attended, *gradients)])

    exact = outcome(attention._attend_by_library, dtype=torch.float64)
    found = {"varlen": outcome(attention._attend_by_varlen, kernel), "padded": outcome(attention._attend_by_library)}
    return {name: float((tensor - exact).norm() / exact.norm()) for name, tensor in found.items()}


def time_training(shape: Shape, device: torch.device, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """A step of bf16 training on one micro-batch, with each kernel that there is."""
    model = make_model(shape, device).train()
    config = OptimizerConfig(learning_rate=1e-6, schedule="constant", precision="bfloat16")
    trainer = Trainer(model, config, total_steps=1_000_000)
    sequences = sequences_of(lengths, shape.vocabulary)
    predicted = float(sum(lengths) - len(lengths))

    def loss_of(packed: Packed, denominator: float) -> Loss:
        source_M, target_M = packed.predicted([1] * len(lengths))
        hidden_MD = Trunk(model).hidden(packed).index_select(0, source_M)
        logprob_M, _ = target_logprobs(hidden_MD, model.get_output_embeddings().weight, target_M)
        return Loss(-logprob_M.sum() / denominator)

    def step() -> None:
        trainer.step([pack(sequences).to(device)], loss_of, predicted)

    found: dict[str, Any] = {"sequences": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {"padded": padded_only}
    if device.type == "cuda" and attention.varlen_kernel(device) is not None:
        ways["varlen"] = nullcontext
    for name, within in ways.items():
        with within():
            parallel.forget_peak()
            found[name] = {"seconds": seconds(step, device, rounds), "peak_bytes": parallel.peak_memory()}
    return found


# --- rollouts ---------------------------------------------------------------------------------------------------------


def engines(model: Any, shape: Shape, dtype: torch.dtype) -> dict[str, Generator]:
    """The engine with graphs, where it has them, and without. Both have the model's weights."""
    longest = max(prompt + new for _, prompt, new in shape.rollouts)
    room = max(rows for rows, _, _ in shape.rollouts) * longest
    found = {
        name: Generator(model, vocabulary=shape.vocabulary, dtype=dtype, max_batch_tokens=room)
        for name in ("graphs", "eager")
    }
    found["eager"]._path = replace(found["eager"]._path, graphs=None)
    return found


def roll_out(engine: Generator, shape: Shape, rows: int, prompt: int, new: int) -> list[Rollout]:
    """Four responses to each of `rows / 4` prompts, of `new` tokens each."""
    prompts = sequences_of([prompt] * (rows // 4), shape.vocabulary)
    sampling = Sampling(max_new_tokens=new, stop_token_ids=())
    return [one for row in engine.generate(prompts, 4, sampling, range(len(prompts))) for one in row]


def rollout_difference(engines_of: dict[str, Generator], shape: Shape) -> dict[str, Any]:
    """How far log-probs of the same tokens lie apart, and how many responses have the same tokens throughout."""
    rows, prompt, new = shape.rollouts[0]
    found = [roll_out(engine, shape, rows, prompt, new) for engine in engines_of.values()]
    largest, equal = 0.0, 0
    for one, other in zip(*found, strict=True):
        equal += one.response_ids == other.response_ids
        pairs = zip(one.response_ids, other.response_ids, one.logprobs, other.logprobs, strict=True)
        for mine, theirs, logprob, their_logprob in pairs:
            if mine != theirs:
                break  # what comes after another token has another log-prob
            largest = max(largest, abs(logprob - their_logprob))
    graphs = engines_of["graphs"]._path.graphs
    return {
        "responses": rows,
        "equal_responses": equal,
        "largest_logprob_difference": largest,
        "graphs": graphs is not None,
        "failure": None if graphs is None else graphs.failure,
    }


def time_rollouts(model: Any, shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Any]:
    """Each rollout with both engines."""
    both, found = engines(model, shape, dtype), []
    for rows, prompt, new in shape.rollouts:
        record: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "rows": rows,
            "prompt": prompt,
            "new": new,
        }
        for name, engine in both.items():

            def work(engine: Generator = engine, size: tuple[int, int, int] = (rows, prompt, new)) -> None:
                roll_out(engine, shape, *size)

            taken = seconds(work, device, rounds)
            record[name] = {"seconds": taken, "tokens_per_second": round(rows * new / median(taken))}
        found.append(record)
    return found


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """All checks and timings on a device."""
    model = make_model(shape, device)
    checks = {
        "attention": attention_errors(shape, device, None),
        "attention_window": attention_errors(shape, device, shape.longest // 3),
        "rollouts": rollout_difference(engines(model, shape, torch.float32), shape),
    }
    return {
        "checks": checks,
        "problems": problems(checks),
        "rollouts": [
            record
            for dtype in (torch.float32, torch.bfloat16)
            for record in time_rollouts(model, shape, device, dtype, rounds)
        ],
        "training": {
            "uniform": time_training(shape, device, [shape.longest] * shape.sequences, rounds),
            "spread": time_training(shape, device, spread_lengths(shape.sequences, shape.longest), rounds),
        },
    }


def problems(checks: dict[str, Any]) -> list[str]:
    """What of the checks is not as it should be, in words."""
    found = []
    for name in ("attention", "attention_window"):
        errors = checks[name]
        if errors is None:
            found.append(f"{name}: there is no kernel for different lengths")
        elif not errors["varlen"] <= NO_WORSE * errors["padded"]:
            found.append(f"{name}: {errors['varlen']:.1e} off, and padded {errors['padded']:.1e}")
    rollouts = checks["rollouts"]
    if not rollouts["graphs"] or rollouts["failure"]:
        found.append(f"rollouts: no graphs ({rollouts['failure'] or 'see the log'})")
    if not rollouts["largest_logprob_difference"] <= SAME_LOGPROB:
        found.append(f"rollouts: log-probs differ by {rollouts['largest_logprob_difference']:.1e}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args(arguments)
    if not parallel.on_gpu():
        print("There is no CUDA device here, so nothing was measured and nothing written.", file=sys.stderr)
        return 1
    device = parallel.prepare()
    found = {
        "device": torch.cuda.get_device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
        },
        "shape": options.shape,
        **measure(SHAPES[options.shape], device, options.rounds),
    }
    write_json(options.out, found)
    for problem in found["problems"]:
        print(problem, file=sys.stderr)
    print(f"written to {options.out}")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
