"""How many raters does one labelling server bear, and is every answer kept once? Over HTTP, against a real server.

    python benchmarks/labelling_load.py [--raters 200] [--seconds 60] [--think 8] [--scale 1.0]
        [--saturate 20] [--items 20000] [--database URL] [--workers 1] [--seed 1]

Starts `tastemaker label serve` on a free port, over a new SQLite file or the empty PostgreSQL database at URL, and has
simulated raters rank four outputs each, as programs do: claim, think (exponential, mean `--think` times `--scale`
seconds), submit. They see what people see. Afterwards, for `--saturate` seconds, nobody thinks: that is the most
that the server does while raters and server share this machine. Then every rater's history is read and held against
what was acknowledged. Prints a Markdown table and a JSON line.

- lost: answers that were acknowledged and are not in the store
- doubled: answers stored twice, or by a second rater for a slot that was answered
- given twice: tasks that two raters were given while the lease of the first ran
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tastemaker.labelling.client import LabellingClient
from tastemaker.raters import SimulatedRater, average
from tastemaker.records import Message, Prompt, Response
from tastemaker.store import LabelService, Store
from tastemaker.store.access import AccessService
from tastemaker.store.audit import COMMAND_LINE
from tastemaker.store.tasks import Guideline, NewItem, NewOutput, PrivatePrompt, StudyConfig
from tastemaker.store.views import TaskView

STUDY, GROUP, OUTPUTS = "load", "load", 4
WORDS = "apple pear plum cherry lemon fig quince grape melon date".split()
STARTS_WITHIN = 180.0


@dataclass(slots=True)
class Rater:
    """One rater's thread: what it was given, what was acknowledged, and how long it waited."""

    name: str
    token: str
    given: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # claim and submit of one answer, in seconds
    failed: list[str] = field(default_factory=list)


def opinion(name: str) -> SimulatedRater:
    profile = average(name, group=GROUP, weights={"fruits": 1.0}, noise=0.5)
    return SimulatedRater(profile, 1, lambda _prompt, response: {"fruits": float(response.text.count(","))})


def items(count: int, seed: int, outputs: int = OUTPUTS) -> list[NewItem]:
    """Questions about outputs of some hundred words."""
    drawn = random.Random(seed)

    def text() -> str:
        return ", ".join(drawn.choices(WORDS, k=drawn.randint(40, 160)))

    return [
        NewItem(
            key=f"item-{index}",
            prompt=Prompt(messages=(Message("user", f"Name fruits, number {index}."),)),
            outputs=tuple(
                NewOutput(response=Response(text=text()), source=f"model-{place}") for place in range(outputs)
            ),
        )
        for index in range(count)
    ]


def prepare(database: str, raters: int, count: int, seed: int) -> list[Rater]:
    """A study with enough to do, and an account with its token for each rater."""
    guideline = Guideline(version="load", text="Prefer what names more fruits.")
    study = StudyConfig(name=STUDY, kind="ranking", purpose="training", rater_group=GROUP, guideline=guideline)
    with Store.open(database) as store:
        access = AccessService(store)
        LabelService(store).queue(study, items(count, seed))
        made = []
        for index in range(raters):
            account = access.create_service(f"load-{index + 1}", rater_group=GROUP, actor=COMMAND_LINE)
            made.append(Rater(account.name, access.create_api_token(account, "load", actor=COMMAND_LINE)))
    return made


@contextmanager
def server(database: str, folder: Path, workers: int) -> Iterator[str]:
    """The address of a server of its own process."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "tastemaker.cli", "label", "serve", "--data", str(folder), "--database", database]
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--port", "0", "--workers", str(workers)], stdout=said, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait()


class Phase:
    """A stretch of time in which all raters work; it begins when the last of them is connected."""

    def __init__(self, raters: int, *, mean: float, seconds: float, seed: int) -> None:
        self.mean, self.seconds, self.seed = mean, seconds, seed
        self.began = 0.0
        self.ready = threading.Barrier(raters, action=self._begin)

    def _begin(self) -> None:
        self.began = time.monotonic()

    @property
    def left(self) -> float:
        return max(0.0, self.began + self.seconds - time.monotonic())

    def thinking(self, rater: str) -> Callable[[], float]:
        """How long a rater thinks about each task."""
        drawn = random.Random(f"{self.seed}|{self.mean}|{rater}")
        return (lambda: drawn.expovariate(1 / self.mean)) if self.mean > 0 else (lambda: 0.0)


def work(address: str, rater: Rater, phase: Phase) -> None:
    """Answer until the phase is over."""
    mind, think = opinion(rater.name), phase.thinking(rater.name)
    try:
        with LabellingClient(address, rater.token) as client:
            client.me()  # the connection stands
            phase.ready.wait()
            time.sleep(min(think(), phase.left))  # not all at the same moment
            while phase.left > 0:
                began = time.perf_counter()
                view = client.next_task(STUDY)
                waited = time.perf_counter() - began
                if view is None:
                    rater.failed.append("nothing was left to answer; give more --items")
                    return
                rater.given.append(view.task.id)
                answer = mind.answer(view.task, seen(view), study=STUDY)
                time.sleep(think())
                began = time.perf_counter()
                client.submit(view.task.id, answer, guideline_version=view.task.guideline_version)
                waited += time.perf_counter() - began
                rater.acknowledged.append(view.task.id)
                if phase.left > 0:
                    rater.waited.append(waited)
    except Exception as error:  # whatever it is, the run is told, and the others go on
        phase.ready.abort()
        rater.failed.append(f"{type(error).__name__}: {error}")


def seen(view: TaskView) -> PrivatePrompt:
    """The task as a person sees it."""
    shown = tuple(Response(text=output.text) for output in view.task.outputs)
    return PrivatePrompt(prompt=Prompt(messages=view.task.messages), responses=shown)


def run_phase(address: str, raters: list[Rater], phase: Phase) -> dict[str, float | None]:
    """All raters at once; the answers a second, and what an answer waited."""
    for rater in raters:
        rater.waited.clear()
    threads = [threading.Thread(target=work, args=(address, rater, phase)) for rater in raters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited = sorted(each for rater in raters for each in rater.waited)
    return {
        "answers": len(waited),
        "answers_per_second": round(len(waited) / phase.seconds, 2),
        "p50_ms": quantile_ms(waited, 0.50),
        "p99_ms": quantile_ms(waited, 0.99),
    }


def quantile_ms(values: list[float], share: float) -> float | None:
    """The smallest of the sorted seconds that so large a share do not exceed, in milliseconds; None of none."""
    return round(1000 * values[max(0, math.ceil(share * len(values)) - 1)], 1) if values else None


def check(address: str, database: str, raters: list[Rater]) -> dict[str, int]:
    """Hold every rater's history against what was acknowledged to them."""
    lost = doubled = 0
    answered_by: Counter[str] = Counter()
    for rater in raters:
        with LabellingClient(address, rater.token) as client:
            entries = list(client.all_history())
        lost += len(set(rater.acknowledged) - {entry.task_id for entry in entries})
        doubled += sum(entry.revision > 1 or entry.standing != "counted" for entry in entries)
        answered_by.update(entry.task_id for entry in entries)
    doubled += sum(count - 1 for count in answered_by.values())
    given_to = Counter(task_id for rater in raters for task_id in set(rater.given))
    with Store.open(database) as store:
        stored = LabelService(store).progress(STUDY).answered
    return {
        "acknowledged": sum(len(rater.acknowledged) for rater in raters),
        "stored": stored,
        "lost": lost,
        "doubled": doubled,
        "given_twice": sum(count - 1 for count in given_to.values()),
    }


def main() -> None:
    options = parsed()
    mean = options.think * options.scale
    with tempfile.TemporaryDirectory(prefix="labelling-load-") as name:
        folder = Path(name)
        database = options.database or str(folder / "labels.db")
        raters = prepare(database, options.raters, options.items, options.seed)
        with server(database, folder, options.workers) as address:
            working = run_phase(
                address, raters, Phase(len(raters), mean=mean, seconds=options.seconds, seed=options.seed)
            )
            saturated = run_phase(
                address, raters, Phase(len(raters), mean=0.0, seconds=options.saturate, seed=options.seed)
            )
            kept = check(address, database, raters)
    failed = [f"{rater.name}: {why}" for rater in raters for why in rater.failed]
    result = {
        "database": "PostgreSQL" if "://" in database else "SQLite",
        "workers": options.workers,
        "raters": options.raters,
        "think_seconds": mean,
        "working": working,
        "saturated": saturated,
        **kept,
        "failures": failed,
    }
    print(table(result))
    print(json.dumps(result))
    if failed or kept["lost"] or kept["doubled"] or kept["given_twice"]:
        raise SystemExit(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--raters", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long raters think and answer")
    parser.add_argument("--think", type=float, default=8.0, help="mean seconds of thought")
    parser.add_argument("--scale", type=float, default=1.0, help="what the thought is multiplied by")
    parser.add_argument("--saturate", type=float, default=20.0, help="how long nobody thinks")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--database", default=None, help="an empty PostgreSQL database; a new SQLite file if left out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def table(result: dict[str, Any]) -> str:
    """The Markdown table."""
    lines = [
        f"{result['raters']} raters, {result['database']}, {result['workers']} worker(s); {result['acknowledged']} "
        f"answers acknowledged, {result['stored']} stored, {result['lost']} lost, {result['doubled']} doubled, "
        f"{result['given_twice']} tasks given twice, {len(result['failures'])} raters failed",
        "",
        "| phase | answers | answers/s | claim + submit p50 | p99 |",
        "|---|---|---|---|---|",
    ]
    for name, title in (("working", f"thinking {result['think_seconds']:g} s"), ("saturated", "nobody thinks")):
        row = result[name]
        lines.append(
            f"| {title} | {row['answers']} | {row['answers_per_second']} | {row['p50_ms']} ms | {row['p99_ms']} ms |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
