"""What an ordinary processor is told: faster products only where they are true fp32 products."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tastemaker import artefacts, parallel
from tastemaker.errors import TrainingError
from tastemaker.settings import OptimizerConfig
from tastemaker.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


def test_products_keep_fp32_accuracy_after_preparing() -> None:
    device = parallel.prepare(threads=1)
    assert torch.get_num_threads() == 1
    if device.type != "cpu":
        pytest.skip("only a processor's products are rerouted")
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(65, 301, generator=generator), torch.randn(301, 97, generator=generator)
    exact = left.double() @ right.double()
    assert float(((left @ right).double() - exact).norm() / exact.norm()) < parallel.FP32_RELATIVE_ERROR


def test_rounding_to_bf16_would_be_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(192, 256, generator=generator), torch.randn(256, 192, generator=generator)
    exact = left.double() @ right.double()
    rounded = left.bfloat16().double() @ right.bfloat16().double()
    assert float((rounded - exact).norm() / exact.norm()) > 100 * parallel.FP32_RELATIVE_ERROR
    assert parallel._product_error() < parallel.FP32_RELATIVE_ERROR


def test_a_processor_that_rounds_keeps_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    matmul.fp32_precision = "ieee"
    monkeypatch.setattr(parallel, "FP32_RELATIVE_ERROR", 0.0)  # no product is this accurate
    parallel._route_fp32_products()
    assert matmul.fp32_precision == "ieee"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with two GPUs, as far as settings go: the precisions of fp32 products that are asked for."""
    precisions = list[str]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)
    yield precisions
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)


def test_attention_on_a_gpu_makes_no_plan_for_every_shape(on_gpu: list[str]) -> None:
    assert parallel.prepare().type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    assert on_gpu == ["highest"]


@pytest.mark.usefixtures("on_gpu")
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    parallel._take_gpu(1, torch.cuda.device_count())
    with pytest.raises(TrainingError, match=r"process 3 .* there are 2; start torchrun with --nproc-per-node 2"):
        parallel._take_gpu(2, torch.cuda.device_count())
    assert taken == [1]


@pytest.mark.parametrize(
    ("cores", "count", "set_by", "asked", "threads"),
    [
        (8, 3, "1", None, 2),  # torchrun sets 1 where nobody has set anything
        (2, 3, "1", None, 1),
        (8, 3, "5", None, 7),  # 7 stands for what torch has made of it
        (8, 3, "1", 4, 4),
        (8, 1, "1", None, 7),
    ],
)
def test_of_several_processes_each_takes_its_share_of_the_cores(
    cores: int, count: int, set_by: str, asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, value in (("RANK", 0), ("WORLD_SIZE", count), ("LOCAL_WORLD_SIZE", count), ("OMP_NUM_THREADS", set_by)):
        monkeypatch.setenv(name, str(value))
    torch.set_num_threads(7)
    parallel.prepare(asked)
    assert torch.get_num_threads() == threads


RESIDENT = """
import os, torch
from tastemaker import parallel
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
parallel.prepare(1)
blocks = [torch.ones(2**18) for _ in range(300)]
last = torch.ones(2**18)
del blocks
kept = resident()
parallel.give_back_memory()
print(kept - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told what to do with freed memory")
def test_freed_memory_is_kept_within_a_stage_and_given_back_after_it() -> None:
    """300 MiB were freed below a block that is still used, so nothing but a request gives them back."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250


AGAIN = """
import resource, torch
from tastemaker import parallel
parallel.prepare(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**24) for _ in range(36)]  # 2.25 GiB
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told what to do with freed memory")
def test_more_than_two_gigabytes_are_kept_too() -> None:
    """What a step of a model of 135M frees: given back, all of it came again, by 589,824 page faults.

    Some of the 36 blocks may still come anew (16,384 faults each), where something small was put in the middle of what
    was freed: one as a rule, two once.
    """
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 36 // 4 * 16_384


TIGHT = """
import sys, torch
from tastemaker import parallel
from tastemaker.artefacts import resident_memory
parallel.prepare(1, tight=sys.argv[1] == "tight")
blocks = [torch.ones(2**22) for _ in range(30)]
held = resident_memory()
del blocks[::2]
print((held - resident_memory()) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told what to do with freed memory")
@pytest.mark.parametrize(("memory", "least", "most"), [("tight", 200, 260), ("plenty", -20, 20)])
def test_large_blocks_go_back_at_once_where_memory_is_tight(memory: str, least: int, most: int) -> None:
    """Of thirty blocks of 16 MiB every second one is freed: 240 MiB."""
    done = subprocess.run([sys.executable, "-c", TIGHT, memory], capture_output=True, text=True, check=True)
    assert least < int(done.stdout) < most


def test_what_is_freed_goes_back_when_a_process_has_grown_by_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = 0

    def give_back() -> None:
        nonlocal returned
        returned += 1

    monkeypatch.setattr(parallel, "give_back_memory", give_back)
    memory, after = parallel.SteadyMemory(), list[int]()
    for held in (400, 499, 500, 501, 700, 801, 875, 876):
        monkeypatch.setattr(artefacts, "resident_memory", lambda held=held: held)
        memory.after_step()
        after.append(returned)
    assert after == [0, 0, 0, 1, 1, 1, 1, 2]  # 501 is more than 400 and a quarter; then 700 is usual


def test_memory_that_is_held_now_is_less_than_the_most_that_was_held() -> None:
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    assert artefacts.resident_memory() > len(block)
    del block
    assert 0 < artefacts.resident_memory() <= artefacts.peak_memory()


def test_onednn_keeps_few_kernels() -> None:
    program = """
import os
from tastemaker import parallel
parallel.prepare()
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(parallel.PRIMITIVES_KEPT)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    parallel.warn_of_slow_bf16.cache_clear()
    yield
    parallel.warn_of_slow_bf16.cache_clear()


@pytest.mark.parametrize(("slowness", "warned"), [(3.7, True), (0.4, False)])
def test_bf16_that_is_slower_than_fp32_is_said_once(
    slowness: float, warned: bool, asked_anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "slowness_of_bf16", lambda: slowness)
    for precision in ("float32", "bfloat16", "bfloat16"):
        Trainer(torch.nn.Linear(2, 3), OptimizerConfig(learning_rate=1e-3, precision=precision), total_steps=1)
        assert caplog.messages == [
            "this processor has no units for bf16: products take it 3.7 times as long as in fp32, so training is "
            'faster here with precision = "float32"'
        ] * (warned and precision == "bfloat16")


def test_how_slow_bf16_is_is_measured_in_a_moment() -> None:
    assert 1e-2 < parallel.slowness_of_bf16() < 1e2
