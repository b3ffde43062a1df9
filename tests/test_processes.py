"""Which process this is, as torchrun tells it; what the others leave to the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tastemaker import parallel, processes
from tastemaker.cli import _check_together
from tastemaker.config import from_mapping
from tastemaker.errors import ConfigError
from tastemaker.files import atomic_write, write_json
from tastemaker.metrics import MetricsWriter
from tastemaker.settings import PpoConfig
from tastemaker.stages.ppo import check_for_several


def as_process(number: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_one_process_is_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.count(), processes.number(), processes.is_first()) == (1, 0, True)
    monkeypatch.setenv("WORLD_SIZE", "4")  # somebody's, without a number for this process
    assert not processes.several()
    monkeypatch.setenv("RANK", "2")
    assert (processes.count(), processes.number(), processes.is_first()) == (4, 2, False)


def test_own_seeds_are_distinct_and_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for number in range(5):
        as_process(number, 5, monkeypatch)
        seeds.append([processes.own_seed(seed) for seed in (0, 1, 2_000_003)])
        assert seeds[-1] == [processes.own_seed(seed) for seed in (0, 1, 2_000_003)]
    assert seeds[0] == [0, 1, 2_000_003], "as with one process"
    assert len({seed for row in seeds for seed in row}) == 15
    assert all(0 <= seed < 2**63 for row in seeds for seed in row)


def test_the_first_process_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(1, 2, monkeypatch)
    write_json(tmp_path / "a" / "results.json", {"x": 1})
    with atomic_write(tmp_path / "b", binary=True) as file:
        file.write(b"x")
    MetricsWriter(tmp_path / "metrics.jsonl").write(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    as_process(0, 2, monkeypatch)
    write_json(tmp_path / "a" / "results.json", {"x": 1})
    MetricsWriter(tmp_path / "metrics.jsonl").write(0, {"loss": 1.0})
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == {"x": 1}
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_what_one_process_does_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_together("run")
    as_process(1, 2, monkeypatch)
    _check_together("sft")
    with pytest.raises(ConfigError, match="run is done by one process; several can do sft, reward, ppo, dpo"):
        _check_together("run")


def test_what_several_processes_cannot_train_is_refused() -> None:
    given = {"init": "", "reward": "", "batch_size": 8}
    check_for_several(from_mapping(PpoConfig, given, where="test"))
    with pytest.raises(ConfigError, match="lora is set, which several processes cannot train together; start one"):
        check_for_several(from_mapping(PpoConfig, given | {"lora": {}}, where="test"))
    with pytest.raises(ConfigError, match=r"value_function is 'shared', .* or set it to 'separate'"):
        check_for_several(from_mapping(PpoConfig, given | {"value_function": "shared"}, where="test"))


ENDING = """
import atexit, threading, time
from tastemaker import processes
atexit.register(print, "the interpreter is taken down")
threading.Thread(target=time.sleep, args=[600]).start()
print("all is done", end="")
processes.end(3)
"""


def test_a_process_ends_though_its_threads_live_on() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "all is done", "")


@given(count=st.integers(1, 7), items=st.integers(0, 40))
def test_however_many_processes_share_a_list_each_item_counts_once(count: int, items: int) -> None:
    """All have as many turns, and the last of them at the same time: they add up together then."""
    shares = []
    for number in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", str(count))
            patch.setenv("RANK", str(number))
            shares.append(list(parallel.turns(range(items))))
    assert sorted(turn.item for share in shares for turn in share if turn.counts) == list(range(items))
    assert {len(share) for share in shares} == {-(-items // count)}
    if count > 1:
        assert all(turn.last == (place == len(share) - 1) for share in shares for place, turn in enumerate(share))
    first = shares[0]
    assert all(turn.counts for turn in first), "the first process never repeats"
