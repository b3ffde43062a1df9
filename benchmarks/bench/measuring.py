"""The worker's side of a measurement: steps taken in turns on command, timed by phase, with what else ran meanwhile.

A worker is a process of its own that does one engine's share of a case. It warms up, says that it is ready, and then
takes a turn of so many steps whenever it is told to, so that two engines alternate step by step and meet the same
machine. What it says is one JSON object a line on its standard output; whatever libraries print goes to its log.

The share of processor time that others took in a turn is what /proc/stat counted as busy, less the worker's own time.
Standard library only, because the peer's environment runs it too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

OTHER = "other"
WARM_UP_TOKENS = 8  # at most, of an engine's first responses
PRIMITIVES_KEPT, LARGE_BLOCK = 64, 8 * 2**20  # as `tastemaker.parallel` has them, which the peer cannot import
TICKS = os.sysconf("SC_CLK_TCK")
IDLE_FIELDS = (3, 4)  # idle and iowait, in the first line of /proc/stat


class Profiler(Protocol):
    """Something that watches one step and then tells the seconds by kind of kernel."""

    def start(self) -> None: ...
    def stop(self) -> dict[str, float]: ...


def busy_seconds() -> float:
    """Seconds that all processors were busy since the machine started, for whomever."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(word) for word in file.readline().split()[1:9]]  # guests are in user time already
    return sum(ticks for place, ticks in enumerate(fields) if place not in IDLE_FIELDS) / TICKS


def own_seconds() -> float:
    """Seconds that this process and its children computed."""
    return sum(os.times()[:4])


class Phases:
    """Seconds by phase; of nested phases the inner one gets the time."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open = [OTHER]
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def inside(self, name: str) -> bool:
        return name in self._open

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        self._charge()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def of(self, owner: Any, name: str, phase: str | Callable[..., str | None]) -> None:
        """Time a function or method of `owner` from outside; None as the phase leaves a call to the enclosing one.

        A name that is not there is passed over: its time then counts to what calls it.
        """
        inner = getattr(owner, name, None)
        if inner is None:
            print(f"nothing named {name} to time in {owner}", file=sys.stderr)
            return

        @functools.wraps(inner)
        def timed(*arguments: Any, **options: Any) -> Any:
            found = phase(*arguments, **options) if callable(phase) else phase
            if found is None:
                return inner(*arguments, **options)
            with self(found):
                return inner(*arguments, **options)

        setattr(owner, name, timed)


class Pace:
    """Lets a training loop go on step by step. The loop calls `boundary` before its first step and after every one."""

    def __init__(self, spec: dict[str, Any], packages: Sequence[str], profiler: Profiler | None = None) -> None:
        self._channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # from here on what libraries print goes to the log
        self.phases = Phases()
        self.counts: Counter[str] = Counter()
        self._warmup, self._packages, self._profiler = int(spec["warmup"]), packages, profiler
        self._started = False
        self._left = self._warmup
        self._steps: list[dict[str, Any]] = []
        self._began = self._cpu_began = self._busy = self._own = self._turn_began = 0.0
        self._profiling = False

    def boundary(self) -> None:
        """Between two steps: note the one that ended, and wait for a command if the turn is over."""
        if self._started:
            seconds, cpu = time.perf_counter() - self._began, own_seconds() - self._cpu_began
            taken = {"seconds": seconds, "cpu": cpu, "phases": self.phases.take(), "counts": dict(self.counts)}
            self._steps.append(taken)
            self._left -= 1
        if self._profiling and self._profiler is not None:
            self._say({"kernels": self._profiler.stop(), "seconds": self._steps[-1]["seconds"]})
            self._profiling = False
        elif self._started and self._left == 0:
            self._say(self._report())
        while self._left == 0:
            self._obey()
        self._started = True
        self.counts.clear()
        self.phases.take()
        self._began, self._cpu_began = time.perf_counter(), own_seconds()

    def _obey(self) -> None:
        """Wait for `turn N`, `profile` or `stop`."""
        command, *arguments = (sys.stdin.readline() or "stop").split()
        if command == "stop":
            os._exit(0)  # what a training loop would do after its last step is not measured
        self._steps = []
        self._left = int(arguments[0]) if arguments else 1
        if command == "profile" and self._profiler is not None:
            self._profiling = True
            self._profiler.start()
        self._turn_began, self._busy, self._own = time.perf_counter(), busy_seconds(), own_seconds()

    def _report(self) -> dict[str, Any]:
        told: dict[str, Any] = {"steps": self._steps, "peak_rss": peak_rss()}
        if self._turn_began:
            wall = time.perf_counter() - self._turn_began
            others = busy_seconds() - self._busy - (own_seconds() - self._own)
            told["foreign"] = max(0.0, others) / (wall * (os.cpu_count() or 1))
        else:
            told["versions"] = versions(self._packages)
        return told

    def _say(self, told: dict[str, Any]) -> None:
        print(json.dumps(told), file=self._channel, flush=True)


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def count_optimizer_steps(pace: Pace) -> None:
    """Count the calls of each optimizer's `step`; two networks with an optimizer each have two counts."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    names: dict[int, str] = {}

    def hook(optimizer: Any, *_: Any) -> None:
        name = names.setdefault(id(optimizer), f"steps of optimizer {len(names) + 1}")
        pace.counts[name] += 1

    register_optimizer_step_post_hook(hook)


def switch_on() -> None:
    """What `tastemaker.parallel.prepare` sets for a process, for the peer."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES_KEPT))
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-3, LARGE_BLOCK)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    fp32_through_onednn()


def fp32_through_onednn() -> bool:
    """Send fp32 products through oneDNN where that keeps fp32 accuracy, as `tastemaker.parallel` does. Says whether."""
    import torch

    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, generator=generator) for size in ((192, 256), (256, 192)))
    exact = left.double() @ right.double()
    if float(((left @ right).double() - exact).norm() / exact.norm()) <= 2e-6:
        return True
    matmul.fp32_precision = before
    return False
