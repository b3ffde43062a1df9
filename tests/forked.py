"""Processes forked from one that has imported the product already, for tests that start many, or several together.

Each is a process of its own and is really killed; what it does not do is spend its first seconds on the same imports,
which took longer than what such a test is about. That the command starts by itself is seen elsewhere
(`tests/labelling/test_serve.py`, `tests/test_cli.py`), and several processes by `torchrun` in `tests/parallel`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from tastemaker.cli import main

# What the commands `label serve` and `run` import when they are called, what several processes do, and this module,
# which is where a fork begins.
PRELOADED = (
    "tests.forked",
    "tests.parallel.driver",
    "torch.distributed.fsdp",
    "tastemaker.commands.people",
    "tastemaker.labelling.serve",
    "alembic.command",
    "tastemaker.pipeline",
    "transformers.models.llama.modeling_llama",
)
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(list(PRELOADED))


class Running(Protocol):
    """What tests do with a process, forked or not."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Forked:
    """`work(*given)` in a forked process on one thread; what it says is added to `log`."""

    def __init__(self, work: Callable[..., None], *given: object, log: Path) -> None:
        self._process = _FORKS.Process(target=_run, args=(str(log), work, *given), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def forked(arguments: Sequence[str], log: Path) -> Forked:
    """`tastemaker ARGUMENTS`."""
    return Forked(run_command, list(arguments), log=log)


def run_command(arguments: Sequence[str]) -> None:
    """The program in this process, which ends with its code."""
    sys.argv = ["tastemaker", *arguments]
    raise SystemExit(main(arguments))


def _run(log: str, work: Callable[..., None], *given: object) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    work(*given)
