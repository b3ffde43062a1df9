"""Devices, threads, processor settings and processes: the only module that knows what the program runs on.

One process is the rule, and then nothing here starts a process group. Where `torchrun` has started several, they train
one model together. What is trained lies in parts, one in each process (FSDP2), and so do its gradients and the
optimizer's state; layer by layer the parts are put together when they are needed. Every process is told the whole batch
and takes its turns at it; since losses are divided by denominators of the whole batch, gradients of processes add up
(FSDP2 would take their mean) to those of one process. All must call the same collectives in the same order, so a
process that has no micro-batch left computes one whose gradient is multiplied by 0.

A process that fails ends without a word to the others; `torchrun` ends those.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tastemaker import artefacts, processes
from tastemaker.errors import TastemakerError, TrainingError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

PRIMITIVES_KEPT = 64  # of oneDNN's kernels, each made for one shape: more than a micro-batch needs. Usual are 1,024
LARGE_BLOCK = 8 * 2**20  # bytes, from which on a freed block goes back to the system where memory is tight
MAPPED_BLOCKS = 2**16  # as many as glibc allows by itself
GROWTH = 1.25  # of a process from step to step, before what it has freed goes back to the system
FP32_RELATIVE_ERROR = 2e-6  # what a true fp32 product keeps; bf16 rounding gives about 3e-3
PATIENCE = timedelta(minutes=30)  # for the slowest of several processes, before the others take it to hang
WHOLE = ".whole"  # the end of the name of a state that was put together of parts
# Methods by which models are run, beside `forward`: parts are put together when one is called.
ENTRIES = ("read_logprobs", "at")


def prepare(threads: int | None = None, *, tight: bool = False, patience: timedelta = PATIENCE) -> torch.device:
    """Choose the device, set the thread count, and make an ordinary processor fast. Returns the device.

    Where memory is `tight`, what is freed in large blocks goes back to the system at once, which costs time.
    Of several processes each waits here for the others, and then for `patience` whenever it needs them; without a
    number of `threads` each takes its share of the machine's cores.
    """
    if processes.several():
        _join(patience)
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        # fp32 is fp32: a product in TF32 keeps 10 bits, as few as fp16, and who wants speed says bfloat16.
        torch.set_float32_matmul_precision("highest")
        # PyTorch would prefer cuDNN on Hopper and later, which plans anew for every shape, as most micro-batches have.
        torch.backends.cuda.enable_cudnn_sdp(enabled=False)
        return torch.device("cuda")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES_KEPT))  # read when oneDNN is first used
    _keep_freed_memory(but_large_blocks=tight)
    _route_fp32_products()
    return torch.device("cpu")


def _keep_freed_memory(*, but_large_blocks: bool) -> None:
    """Let glibc keep freed blocks: page faults made a training step up to 1.7 times slower.

    Or all but large ones, since those that micro-batches of other lengths left fit none of the next: SFT of 25M
    parameters on real demonstrations held 3.9 GB where 2.5 were expected, and without them 2.5.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(-4, MAPPED_BLOCKS if but_large_blocks else 0)  # M_MMAP_MAX
        libc.mallopt(-3, LARGE_BLOCK)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never. The largest number it takes is 2 GiB, less than a step frees


def give_back_memory() -> None:
    """After a stage: what it freed goes back to the system, in place of staying beneath what the next one needs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


class SteadyMemory:
    """Gives freed memory back to the system whenever a process has grown by a quarter from step to step.

    The C library keeps what is freed, and micro-batches of ever new lengths leave it blocks that fit none of the next
    ones: SFT of a 135M model on real demonstrations, of 6 GB, held 15 after 24 steps.
    """

    def __init__(self) -> None:
        self._usual: int | None = None

    def after_step(self) -> None:
        """To be called between steps. The first one, and the first after memory went back, say what is usual."""
        if torch.cuda.is_available():
            return
        held = artefacts.resident_memory()
        if self._usual is None:
            self._usual = held
        elif held > GROWTH * self._usual:
            give_back_memory()
            self._usual = None


def on_gpu() -> bool:
    """Whether `prepare` gives a GPU."""
    return torch.cuda.is_available()


def forget_peak() -> None:
    """Let `peak_memory` begin again."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    artefacts.forget_peak_memory()


def peak_memory() -> int:
    """The most bytes that were held since `forget_peak`: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return artefacts.peak_memory()


def _libc() -> ctypes.CDLL | None:
    """The GNU C library, where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def _route_fp32_products() -> None:
    """Send fp32 matrix products through oneDNN where that keeps fp32 accuracy; 2.2 times faster on AVX-512 AMD.

    The switch is meant to allow bf16 rounding, and on processors with AMX it does: so the result is checked.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if _product_error() > FP32_RELATIVE_ERROR:
        matmul.fp32_precision = before
        log.info("oneDNN rounds fp32 products to bf16 on this processor; left off")


def _product_error() -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(192, 256, generator=generator), torch.randn(256, 192, generator=generator))
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


@cache
def warn_of_slow_bf16() -> None:
    """Say, once, if this processor only emulates bf16, so that training in it takes longer than in fp32, not less."""
    if torch.cuda.is_available() or not processes.is_first():
        return
    slower = slowness_of_bf16()
    if slower > 1:
        log.warning(
            "this processor has no units for bf16: products take it %.1f times as long as in fp32, so training is "
            'faster here with precision = "float32"',
            slower,
        )


def slowness_of_bf16() -> float:
    """How many times as long as in fp32 a matrix product takes in bf16, by the least of several times of each."""
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    times = [list[float](), list[float]()]
    for _ in range(11):
        for matrix, seconds in zip(matrices, times, strict=True):
            start = time.perf_counter()
            _ = matrix @ matrix
            seconds.append(time.perf_counter() - start)
    in_fp32, in_bf16 = map(min, times)
    return in_bf16 / in_fp32


# --- several processes: meeting ---------------------------------------------------------------------------------------


def _join(patience: timedelta) -> None:
    from torch import distributed

    if distributed.is_initialized():
        return
    if torch.cuda.is_available():
        _take_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
    _share_cores()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=patience)


def _share_cores() -> None:
    """Take this process's share of the cores, where nothing but `torchrun` has set a number of threads: it sets 1.

    Who wants one thread says `--threads 1`.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        usable = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
        torch.set_num_threads(max(1, usable // here))


def _take_gpu(number: int, present: int) -> None:
    if number >= present:
        raise TrainingError(
            f"process {number + 1} of this machine finds no GPU of its own: there are {present}; start torchrun with "
            f"--nproc-per-node {present}, or fewer."
        )
    torch.cuda.set_device(number)


@contextmanager
def joined() -> Iterator[None]:
    """Within the block this process works together with the others.

    Raises:
        TrainingError: another process ended in the middle of what all do together.
    """
    from torch import distributed

    prepare()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise TrainingError(
                "another process of this job has ended or hangs, and this one cannot go on without it; what that one "
                "has said tells why."
            ) from error
        raise


def leave() -> None:
    """Part from the other processes, at the end of a program that went well."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    if processes.several():
        from torch import distributed

        distributed.barrier()


def from_first(value: Item) -> Item:
    """What the first process has given, in every process."""
    if not processes.several():
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def summed(tensor: Tensor) -> Tensor:
    """The sum over processes of a tensor that is whole in each; exact where all others hold a 0."""
    if processes.several() and tensor.numel():
        from torch import distributed

        distributed.all_reduce(tensor)
    return tensor


def summed_amounts(amounts: Sequence[float]) -> list[float]:
    """The sums over processes of some numbers."""
    if not processes.several():
        return list(amounts)
    found: list[float] = summed(torch.tensor(list(amounts), dtype=torch.float64)).tolist()
    return found


def largest(amount: float) -> float:
    """The largest of the processes' numbers."""
    if not processes.several():
        return amount
    from torch import distributed

    box = torch.tensor(amount, dtype=torch.float64)
    distributed.all_reduce(box, op=distributed.ReduceOp.MAX)
    return float(box)


# --- several processes: sharing work ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn(Generic[Item]):
    """A process's turn at a list that all share.

    One that does not `count` is there so that all processes have as many turns: its result is to weigh nothing.
    """

    item: Item
    counts: bool = True
    last: bool = True


def turns(items: Iterable[Item]) -> Iterator[Turn[Item]]:
    """This process's turns at `items`, which are the same in every process: with W processes every W-th is its own.

    One that has no item left repeats the last, since micro-batches come longest first and nobody is to wait for it.
    """
    if not processes.several():
        yield from map(Turn, items)
        return
    every = list(items)
    rounds = math.ceil(len(every) / processes.count())
    for number in range(rounds):
        place = number * processes.count() + processes.number()
        counts = place < len(every)
        yield Turn(every[place] if counts else every[-1], counts, last=number == rounds - 1)


def in_shares(count: int, work: Callable[[Sequence[int]], Sequence[Item]]) -> list[Item]:
    """What `work(places)` gives for all places from 0 to `count`, each process doing its share of them.

    An error that the doctor has a name for is raised in all processes, since it is the first that writes it down.
    """
    places = range(count)[processes.number() :: processes.count()]
    if not processes.several():
        return list(work(places)) if places else []
    from torch import distributed

    found: list[Item] | TastemakerError
    try:
        found = list(work(places)) if places else []
    except TastemakerError as error:
        if error.finding is None:
            raise
        found = error
    gathered: list[Any] = [None] * processes.count()
    distributed.all_gather_object(gathered, found)
    for share in gathered:
        if isinstance(share, TastemakerError):
            raise share
    return [gathered[place % len(gathered)][place // len(gathered)] for place in range(count)]


# --- several processes: parameters in parts ---------------------------------------------------------------------------


def shard(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Lay a module's parameters in parts over the processes: those of each layer together, and the rest together.

    Where one process works alone they stay as they are.
    """
    if not processes.several():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(module.parameters()).device.type, (processes.count(),))
    for part in (*layers, module):
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # a sum, since losses are divided by denominators of the whole batch
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for name in ENTRIES:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def sync_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass adds up the processes' gradients, or each keeps its own for one that follows."""
    if processes.several():
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(now)


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all gradients together, of those of which a process has a part too."""
    norm = float(nn.utils.get_total_norm([part_of(gradient) for gradient in gradients]))
    return math.sqrt(summed_amounts([norm**2])[0]) if processes.several() else norm


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; changes in place."""
    if not processes.several():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together of its parts, in every process."""
    if not processes.several():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_as(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor in parts as `like` is, if it has the same shape and `like` is in parts."""
    if not processes.several():
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def all_laid_as(like: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in parts as those of the same name are."""
    return {name: laid_as(like[name], tensor) if name in like else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def fill(model: nn.Module, sharded: nn.Module) -> None:
    """Copy the weights of a model that lies in parts into a whole one, in every process."""
    weights = sharded.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(whole(weights[name]))


# --- several processes: training state on disk ------------------------------------------------------------------------


def save_parts(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a training state by `torch.distributed.checkpoint`, each process its parts; `.metadata` comes last."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with _as_disk_error(folder, "written"):
        save(dict(state), checkpoint_id=folder)


def load_parts(folder: Path) -> dict[str, Any]:
    """A state that any number of processes have written, put together: the first does it, all read what they need.

    The names of dictionaries are text in it, numbers too. What it is put together in, `FOLDER.whole`, is mapped and
    stays: on a file system of several machines it would be gone for the others.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    together = folder.with_name(folder.name + WHOLE)
    if processes.is_first():
        try:
            with _as_disk_error(folder, "put together", RuntimeError):
                dcp_to_torch_save(folder, together)
        except BaseException:
            together.unlink(missing_ok=True)
            raise
    wait()
    state = torch.load(together, map_location="cpu", mmap=True, weights_only=True)
    assert isinstance(state, dict)
    return state


@contextmanager
def _as_disk_error(folder: Path, done: str, *also: type[BaseException]) -> Iterator[None]:
    """What goes wrong at a state in parts, as OSError: a full disk, more often than not.

    The library wraps it into an exception that is no Exception, and where `torch.save` wrote, or another process, the
    error of the system is not in it.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    kinds: tuple[type[BaseException], ...] = (CheckpointException, *also)
    try:
        yield
    except kinds as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, OSError):
            cause.filename = cause.filename or str(folder)
            raise cause from None
        raise OSError(f"{folder} cannot be {done}, for want of space perhaps: {cause}") from error
