"""A tiny model that says a few words and ends, for PPO that a doctor is to look at."""

from __future__ import annotations

import pytest
from tests.doctor.planted import fine_tuned


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fine_tuned(tmp_path_factory.mktemp("talker"))
