"""Starting a program in several processes, as a user does: by `torchrun`, here on the loopback device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 900  # after which the job is taken to hang


def launch(*arguments: str | Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in `count` processes; what all of them print comes back."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    started_by = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [*started_by, "--nproc-per-node", str(count), *map(str, arguments)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_SECONDS,
    )


def drive(folder: Path, *jobs: str, count: int = 2) -> None:
    """Do some of `driver`'s jobs in several processes, each in a folder of its own below `folder`."""
    done = launch(ROOT / "tests/parallel/driver.py", folder, *jobs, count=count)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
