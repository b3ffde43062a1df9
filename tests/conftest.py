"""What every test starts from: one thread, no network, the same random numbers.

torch is imported where it is needed: the process that only shares tests out to others does without.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

gc.disable()  # what is imported and collected stays: to go through it again and again took as long as to import it
# A busy machine is no failure, and an example that fails once fails always.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """From here on the garbage collector sees to what tests make, and less often than it would by itself."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """`torch.manual_seed(0)`, without its note of who called it for each kind of device that is not there."""
    import torch

    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tiny world's words."""
    from tests.bases import save_random_base

    return save_random_base(tmp_path_factory.mktemp("random-base") / "model")
