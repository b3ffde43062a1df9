"""A server under load that is killed again and again: every answer that it acknowledged is there, once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.forked import forked
from tests.labelling.conftest import QUICK
from tests.labelling.programs import GROUP, simulated, simulated_token
from tests.labelling.test_serve import server
from tests.store.conftest import Make

from tastemaker.labelling import client
from tastemaker.labelling.client import LabellingClient
from tastemaker.labelling.drivers import Acknowledged, answer_together
from tastemaker.labelling.web import Services
from tastemaker.store import Store

KILLS = 20
RATERS = 4
ANSWERS_BETWEEN = 8
WITHIN = 600  # seconds; the machine may be busy


@pytest.mark.slow
def test_nothing_acknowledged_is_lost(url: str, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.1)  # nobody is away for long when the next kill comes
    kill_and_check(url, tmp_path / "labels", make, kills=KILLS)


def kill_and_check(url: str, folder: Path, make: Make, *, kills: int) -> None:
    """Raters answer a study while the server is killed `kills` times in the middle of it and started again."""
    items = make.items(ANSWERS_BETWEEN * (kills + 1))
    stored: list[Acknowledged] = []
    with Store.open(url) as store:
        services = Services.over(store, hasher=QUICK)
        services.labels.queue(replace(make.study(), rater_group=GROUP), items)
        raters = [(simulated(f"bot-{index}"), simulated_token(services, f"bot-{index}")) for index in range(RATERS)]
        port = "0"
        with ThreadPoolExecutor(max_workers=1) as background:
            answering = None
            for kill in range(kills):
                with server(folder, "--database", url, "--port", port, start=forked) as (process, address):
                    port = re.findall(r"\d+", address)[-1]
                    if answering is None:
                        work = (address, "study", raters)
                        answering = background.submit(
                            answer_together, *work, acknowledged=stored.append, patience=WITHIN
                        )
                    wait_for(stored, ANSWERS_BETWEEN * (kill + 1) - kill, answering.done)
                    process.kill()  # SIGKILL, whatever it is doing
                    process.wait()
            assert answering is not None
            assert not answering.done(), "the last kill came while there was work"
            with server(folder, "--database", url, "--port", port, start=forked):
                assert answering.result(WITHIN) == len(stored)
                check(f"http://127.0.0.1:{port}", services, stored, [token for _, token in raters], len(items))


def wait_for(stored: list[Acknowledged], count: int, over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN
    while len(stored) < count:
        assert not over()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def check(address: str, services: Services, stored: list[Acknowledged], tokens: list[str], slots: int) -> None:
    history = {}
    for token in tokens:
        with LabellingClient(address, token) as reader:
            for entry in reader.all_history():
                assert entry.task_id not in history, "a slot was given out twice"
                given = reader.task(entry.task_id).given
                assert given is not None
                assert (entry.revision, entry.standing) == (1, "counted"), "an answer was doubled"
                history[entry.task_id] = given.answer
    assert len({each.task.id for each in stored}) == len(stored)
    assert {each.task.id: each.answer for each in stored} == history
    assert len(history) == slots
    progress = services.labels.progress("study")
    assert (progress.answered, progress.open, progress.leased, progress.extra) == (slots, 0, 0, 0)
