"""Starting a program in several processes, on the loopback device: by `torchrun` as users do, or forked.

Of a short job most of the time goes into starting three interpreters, each of which imports everything. So what is
about `torchrun` is started by it (`launch`), and jobs that are about what processes do together are forked (`drive`).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.forked import Forked, free_port

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 900  # after which the job is taken to hang
TERMINATED_SECONDS = 30  # that one has to end once it is told to; torchrun gives as many
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
}


def launch(log: Path, *arguments: str | Path, count: int = 2) -> tuple[int, str]:
    """Run `python ARGUMENTS` in `count` processes by `torchrun`; its code and what all have said, by way of `log`.

    `torchrun` itself is forked: it would only import once more what it does not use.
    """
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
    started = Forked(_torchrun, [*options, *map(str, arguments)], log=log)
    try:
        return started.wait(LONGEST_SECONDS), log.read_text()
    finally:
        started.terminate()


def _torchrun(command: list[str]) -> None:
    from torch.distributed import run

    os.environ |= SETTINGS
    run.main(command)


def drive(folder: Path, *jobs: str, count: int = 2) -> None:
    """Do some of `driver`'s jobs in several forked processes, each job in a folder of its own below `folder`."""
    from tests.parallel import driver

    codes, said = together(folder / "said.log", driver.do, folder, jobs, count=count)
    assert codes == [0] * count, said


def together(log: Path, work: Callable[..., None], *given: object, count: int = 2) -> tuple[list[int | None], str]:
    """Do `work(*given)` in forked processes, told by their environment what `torchrun` would tell them.

    As with it, one that fails ends the others. The code of each comes back, None where it had to be killed, and what
    all of them have said.
    """
    port = free_port()
    parts = [Forked(_take_part, number, count, port, work, given, log=log) for number in range(count)]
    deadline = time.monotonic() + LONGEST_SECONDS
    while None in (codes := [part.poll() for part in parts]) and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.01)
    for part in parts:
        part.terminate()
    for part in parts:
        with suppress(subprocess.TimeoutExpired):
            part.wait(TERMINATED_SECONDS)
    codes = [part.poll() for part in parts]
    for part in parts:
        part.kill()
    return codes, log.read_text()


def _take_part(number: int, count: int, port: int, work: Callable[..., None], given: tuple[object, ...]) -> None:
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= SETTINGS | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {name: str(value) for name, value in places.items()}
    work(*given)
