"""Attention on a CPU: our plain products against the library's kernel, forward and backward, by length.

    python benchmarks/attention.py [--threads 1] [--rounds 6]

Both run in turns, in the process as training sets it up (`parallel.prepare`). Prints the fastest of the rounds in
milliseconds, as a Markdown table. `attention.LONGEST_BY_PRODUCTS` is set from it.
"""

from __future__ import annotations

import argparse
import time

import torch

from tastemaker import parallel
from tastemaker.attention import _attend_by_library, _attend_by_products
from tastemaker.packing import pack

# sequences, query heads, key/value heads, tokens, head size: of the tiny world's small base, and of SmolLM2-135M
SHAPES = (
    (40, 4, 4, 23, 24),
    (40, 4, 4, 57, 24),
    (12, 9, 3, 64, 64),
    (12, 9, 3, 177, 64),
    (8, 9, 3, 256, 64),
    (8, 9, 3, 511, 64),
    (2, 9, 3, 1024, 64),
)


def measure(shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Milliseconds of the library's kernel and of plain products."""
    sequences, heads, groups, longest, size = shape
    generator = torch.Generator().manual_seed(0)
    packed = pack([range(longest)] * sequences)
    inputs = [
        torch.randn(sequences * longest, count, size, generator=generator).to(dtype).transpose(0, 1).requires_grad_()
        for count in (heads, groups, groups)
    ]
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for attend, times in zip((_attend_by_library, _attend_by_products), taken, strict=True):
            start = time.perf_counter()
            attended = attend(inputs[0], inputs[1], inputs[2], packed, None, None)
            torch.autograd.grad(attended.sum(), inputs)
            times.append(time.perf_counter() - start)
    return min(taken[0]) * 1e3, min(taken[1]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    parallel.prepare(options.threads)
    print("| type | sequences x heads x tokens x size | kernel ms | products ms | ratio |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            sequences, heads, _, longest, size = shape
            kernel, products = measure(shape, dtype, options.rounds)
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {sequences} x {heads} x {longest} x {size} | {kernel:.1f} | {products:.1f} "
                f"| {kernel / products:.1f} |"
            )


if __name__ == "__main__":
    main()
