"""What every test starts from: one thread, no network, the same random numbers."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from tests.bases import save_random_base

torch.set_num_threads(1)
# A busy machine is no failure, and an example that fails once fails always.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tiny world's words."""
    return save_random_base(tmp_path_factory.mktemp("random-base") / "model")
