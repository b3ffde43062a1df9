"""The machine's own limit: large matrix products, in GFLOP/s. `python -m benchmarks.bench.limits`.

The best of several products in each of three ways: fp32 as PyTorch comes, fp32 through oneDNN (where that keeps fp32
accuracy), bf16. What share of it a training step reaches says how far from the machine's limit it is.
"""

from __future__ import annotations

import json
import time

import torch
from benchmarks.bench.measuring import fp32_through_onednn

SIZE = 2048
SECONDS = 1.0


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of the products that fit into the time."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(SIZE, SIZE, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best / 1e9


def main() -> None:
    """Print the three peaks as JSON."""
    peaks = {"fp32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    if fp32_through_onednn():
        peaks["fp32-onednn"] = peak(torch.float32)
    print(json.dumps({name: round(value, 1) for name, value in peaks.items()}))


if __name__ == "__main__":
    main()
