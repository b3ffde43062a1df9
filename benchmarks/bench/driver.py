"""Lets the engines of a case take turns, and notes what they say. Standard library only: it shares the processors.

A case's engines stay loaded side by side while memory allows and take turns, ours and the peer's alternating; those
that do not fit are started anew for every round. A turn in which other programs took more than `FOREIGN` of the
processors is repeated, a bounded number of times, and marked if it never was undisturbed. Engines that did not do the
same work are an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench.cases import (
    MODELS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Case,
    Engine,
    steps_of,
)
from benchmarks.bench.environments import peer_python, trl_of, vllm_python
from benchmarks.bench.measuring import busy_seconds

ROOT = Path(__file__).parents[2]
FOREIGN = 0.06
GIB = 2**30
SHARE_OF_MEMORY = 0.9  # of what is available, for the engines that are loaded side by side
WARM_UP_STEPS = {"sft": 2}  # until the allocator has about all that a step takes; else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a measurement is made."""

    out: Path
    rounds: int
    tries: int
    threads: int


class WorkerError(Exception):
    """A worker ended before it was told to, or did other work than the others."""


class Worker:
    """A process that does one engine's share of a case."""

    def __init__(self, command: Sequence[str], log: Path, settings: Settings) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(settings.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.ready = self._read()

    def turn(self, steps: int) -> dict[str, Any]:
        return self._ask(f"turn {steps}")

    def profile(self) -> dict[str, Any]:
        return self._ask("profile")

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and `_read` says how
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise WorkerError(f"a worker ended with exit code {self._process.wait()}; {self._log} ends with\n{tail}")
        told: dict[str, Any] = json.loads(line)
        return told


def environment(threads: int) -> dict[str, str]:
    """The same for all: so many threads, no GPU, no network, and what Python compiled is kept, as installed."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return given | fixed | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def measure(case: Case, model: str, settings: Settings, names: Sequence[str] = ()) -> dict[str, Any]:
    """All engines of a case (or those that are named), every turn of theirs, and what the work was."""
    found: dict[str, Any] = {}
    for sitting in case.sittings:
        able = [engine for engine in sitting if model == "M" or not engine.switched]
        engines = [engine for engine in able if not names or engine.name in names]
        if engines:
            found |= _sit(case, model, engines, settings)
    check_same_work(case, found)
    return {"case": case.name, "model": model, "task": case.task, "threads": settings.threads, "engines": found}


def _sit(case: Case, model: str, engines: Sequence[Engine], settings: Settings) -> dict[str, Any]:
    """Rounds of turns of engines that are compared with one another."""
    found: dict[str, Any] = {engine.name: asdict(engine) | {"turns": [], "peak_rss": 0} for engine in engines}
    steps = steps_of(case.task, MODELS[model].sizes)
    stays = _residents(engines, model, available_memory())
    with ExitStack() as loaded:
        workers: dict[str, Worker] = {}
        for round_ in range(settings.rounds):
            for engine in engines if round_ % 2 == 0 else reversed(engines):
                record = found[engine.name]
                if engine.name in workers:
                    _take_turn(workers[engine.name], record, steps, round_, settings)
                    continue
                with ExitStack() as passing:
                    stack = loaded if engine.name in stays else passing
                    worker = stack.enter_context(_started(case, model, engine, settings))
                    record["versions"] = worker.ready["versions"]
                    if engine.name in stays:
                        workers[engine.name] = worker
                    _take_turn(worker, record, steps, round_, settings)
    return found


def check_same_work(case: Case, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Engines that are compared read the same tokens, but for pairs of rankings, generate as many, step as often.

    Raises:
        WorkerError: they did not; the figures of the case mean nothing then.
    """
    compared = {"generated"} if case.task == "reward" else {"sequences", "tokens", "generated"}
    work: dict[str, dict[str, int]] = {}
    for name, record in found.items():
        counts = record["turns"][-1]["steps"][-1].get("counts", {})
        if counts:
            steps = max((count for what, count in counts.items() if what.startswith("steps of")), default=0)
            told = counts | {"tokens": tokens(counts)}
            work[name] = {"steps": steps} | {what: told[what] for what in compared if what in told}
    if len({json.dumps(done, sort_keys=True) for done in work.values()}) > 1:
        raise WorkerError(f"{case.name}: the engines did not do the same work: {json.dumps(work)}")


def tokens(counts: Mapping[str, int]) -> int:
    """Tokens of a step's sequences, prompts included and padding not."""
    return counts["tokens"] if "tokens" in counts else counts.get("prompt", 0) + counts.get("response", 0)


def _residents(engines: Sequence[Engine], model: str, memory: float) -> set[str]:
    """Who stays loaded: as many as fit, in order, beside the largest of those that come and go."""
    need = {engine.name: engine.memory if model == "M" else min(engine.memory, 2.0) for engine in engines}
    stays: set[str] = set()
    for name in need:
        chosen = stays | {name}
        passing = max((size for other, size in need.items() if other not in chosen), default=0.0)
        if sum(need[one] for one in chosen) + passing <= SHARE_OF_MEMORY * memory:
            stays = chosen
    return stays


def _take_turn(worker: Worker, record: dict[str, Any], steps: int, round_: int, settings: Settings) -> None:
    """A turn, again while others disturb it; the least disturbed one is kept."""
    turns = []
    for _ in range(settings.tries):
        turns.append(worker.turn(steps))
        if turns[-1]["foreign"] <= FOREIGN:
            break
    best = min(turns, key=lambda turn: float(turn["foreign"]))
    record["peak_rss"] = max(record["peak_rss"], best.pop("peak_rss"))
    thrown_away = [{"foreign": one["foreign"], "steps": one["steps"]} for one in turns if one is not best]
    record["turns"].append({"round": round_, "tries": len(turns), **best, "thrown_away": thrown_away})
    seconds, cpu = (median(step[name] for step in best["steps"]) for name in ("seconds", "cpu"))
    print(f"    {record['name']:<20} {seconds:8.2f} s {cpu:8.2f} of CPU   others {best['foreign']:.0%}", flush=True)


def profile(case: Case, model: str, engine: Engine, settings: Settings) -> dict[str, Any]:
    """One step of an engine of ours by kind of kernel."""
    with _started(case, model, engine, settings) as worker:
        return worker.profile()


@contextmanager
def _started(case: Case, model: str, engine: Engine, settings: Settings) -> Iterator[Worker]:
    worker = Worker(
        _command(case, model, engine, settings),
        settings.out / "logs" / f"{model}-{case.name}-{engine.name}.log",
        settings,
    )
    try:
        yield worker
    finally:
        worker.stop()


def _command(case: Case, model: str, engine: Engine, settings: Settings, *, warmup: int | None = None) -> list[str]:
    python = _python(case, engine, settings)
    folder = settings.out / "work" / f"{model}-{case.name}-{engine.name}"
    shutil.rmtree(folder, ignore_errors=True)
    sizes = MODELS[model].sizes
    spec = {
        "task": "sft" if case.task == "start" else case.task,
        "model": str(settings.out / "models" / model),
        "reward": str(settings.out / "models" / f"{model}-reward"),
        "data": str(settings.out / "data" / f"{model}-{case.name}.json"),
        "folder": str(folder),
        "precision": engine.precision,
        "switched": engine.switched,
        "shared": engine.shared,
        "autocast": engine.autocast,
        "minibatches": sizes.minibatches,
        "inner_epochs": sizes.inner_epochs,
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "warmup": WARM_UP_STEPS.get(case.task, 1) if warmup is None else warmup,
    }
    return [python, "-m", f"benchmarks.bench.{engine.side}", json.dumps(spec)]


def _python(case: Case, engine: Engine, settings: Settings) -> str:
    if engine.side == "ours":
        return sys.executable
    return str(vllm_python(settings.out) if engine.side == "vllm" else peer_python(settings.out, trl_of(case)))


# --- from the command to the first step -----------------------------------------------------------------------------


def measure_start(case: Case, model: str, settings: Settings, names: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds from starting a program until its first optimizer step is done: our command, the peer's trainer."""
    engines = [engine for engine in case.engines if not names or engine.name in names]
    found: dict[str, Any] = {engine.name: asdict(engine) | {"turns": []} for engine in engines}
    for round_ in range(settings.rounds):
        for engine in engines:
            tries = list[dict[str, Any]]()
            while not tries or (tries[-1]["foreign"] > FOREIGN and len(tries) < settings.tries):
                tries.append(_start(case, model, engine, settings))
            best = min(tries, key=lambda turn: float(turn["foreign"]))
            record = found[engine.name]
            record["versions"] = best.pop("versions", record.get("versions", {}))
            record["turns"].append({"round": round_, "tries": len(tries), **best})
            seconds = best["steps"][0]["seconds"]
            print(f"    {engine.name:<20} {seconds:8.2f} s   others {best['foreign']:.0%}", flush=True)
    return {"case": case.name, "model": model, "task": case.task, "threads": settings.threads, "engines": found}


def _start(case: Case, model: str, engine: Engine, settings: Settings) -> dict[str, Any]:
    """One start, and what others took of the processors meanwhile."""
    began, busy, own = time.perf_counter(), busy_seconds(), sum(os.times()[2:4])
    turn: dict[str, Any] = {}
    if engine.side == "ours":
        _first_step_of_command(case, model, settings)
    else:
        with _started(case, model, engine, settings) as worker:
            turn["versions"] = worker.ready["versions"]
    seconds = time.perf_counter() - began
    others = busy_seconds() - busy - (sum(os.times()[2:4]) - own)
    foreign = max(0.0, others) / (seconds * (os.cpu_count() or 1))
    return turn | {"foreign": foreign, "steps": [{"seconds": seconds}]}


def _first_step_of_command(case: Case, model: str, settings: Settings) -> None:
    """Run `tastemaker sft` until the first line of its metrics is there."""
    data = json.loads((settings.out / "data" / f"{model}-{case.name}.json").read_text(encoding="utf-8"))
    rows = settings.out / "data" / f"{model}-{case.name}.jsonl"
    lines = [json.dumps({"prompt": row["prompt"], "completion": row["responses"][0]}) for row in data["rows"]]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = settings.out / "work" / f"{model}-{case.name}-command"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("tastemaker")),
        "sft",
        "--model",
        str(settings.out / "models" / model),
    ]
    command += ["--data", str(rows), "--out", str(folder), "--batch-size", str(len(lines)), "--epochs", "1000"]
    command += ["--optimizer.precision", "bfloat16", "--residual-dropout", "0"]
    log = settings.out / "logs" / f"{model}-{case.name}-command.log"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(settings.threads), stdout=file, stderr=file)
    try:
        while not _has_line(folder / "metrics.jsonl"):
            if process.poll() is not None:
                raise WorkerError(f"{' '.join(command)} ended with exit code {process.returncode}; see {log}")
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


def _has_line(path: Path) -> bool:
    return path.exists() and path.read_bytes().endswith(b"\n")


# --- the machine ----------------------------------------------------------------------------------------------------


def available_memory() -> float:
    """Memory that can be had without swapping, in GiB."""
    return _meminfo("MemAvailable") / GIB


def machine() -> dict[str, Any]:
    """What is known of the machine without naming it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_gib": round(_meminfo("MemTotal") / GIB, 1),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
    }


def _meminfo(field: str) -> int:
    rows: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    )
    return int(rows[field].split()[0]) * 1024
