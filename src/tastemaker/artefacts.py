"""Stage folders and their manifests: what ran, on what, and whether it has to run again.

A stage writes into its own folder. `started.json` says what it is working on and stays until the end; `manifest.json`
is written last and makes the folder finished. So a folder whose manifest matches the stage's config and inputs is
skipped, one that was interrupted is resumed, and anything else is begun anew. Hashes are taken of content, in canonical
order; timings are left out of what is compared.

Where a check of the training stopped it, `started.json` says why, for whoever asks the doctor.

A result that a stage replaces is set aside until the new one is finished. If something that was given turns out to be
wrong before anything was written, the folder is left as it was found; after a kill whoever comes next in the
folder sees to it. One process at a time works in a folder (`claimed`). A stage may name one file to `keep`: it is
handed on to whatever task comes next in the folder, because people's answers belong to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tastemaker import __version__
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError, TastemakerError, TrainingError
from tastemaker.files import atomic_write, write_json

MANIFEST = "manifest.json"
STARTED = "started.json"
CHECKPOINT = "checkpoint"
VOLATILE = (MANIFEST, STARTED, "metrics.jsonl", "report.html")  # hold timings, or are the record itself or made of it
# Settings of memory and safety, by the last part of their name: the task is the same whatever they are, and its result
# differs by rounding at most (and by residual dropout, whose noise is drawn micro-batch by micro-batch).
WITHOUT_EFFECT = frozenset({"microbatch_tokens", "batch_tokens", "gradient_checkpointing", "checkpoint_every"})
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors", "sqlalchemy")


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What happened to a stage: its folder, whether it was up to date already, and how long it took."""

    folder: Path
    skipped: bool
    seconds: float


def run_stage(
    folder: Path,
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, Path | str],
    work: Callable[[Path], Mapping[str, Any] | None],
    keep: str | None = None,
) -> StageOutcome:
    """Run `work(folder)` unless the folder already holds its result for this config and these inputs.

    `inputs` names files or folders, hashed by content, or plain strings, taken as they are. `work` keeps what it needs
    to resume under `folder/checkpoint`, which is removed at the end, and returns what else the manifest should tell.
    The folder is to be `claimed`. `keep` is a file in the folder that stays when the config or an input changes.
    """
    task = {"stage": stage, "config": to_json(config), "inputs": _hash_inputs(inputs)}
    done = read_manifest(folder)
    if done is not None and _same_task(done, task) and _outputs_stand(folder, done):
        _tidy(folder)
        return StageOutcome(folder, skipped=True, seconds=float(done["seconds"]))
    earlier = _prepare(folder, task, keep)
    before, codes = float(earlier.get("seconds", 0.0)), list(earlier.get("codes", []))
    began, stopped = time.monotonic(), dict[str, Any]()
    forget_peak_memory()
    try:
        told = work(folder)
    except TastemakerError as error:
        if isinstance(error, TrainingError) or error.finding is not None:
            stopped = {"stopped": {"message": str(error), "finding": error.finding}}
        if error.finding is None or _aside(folder).exists():  # else the doctor is told, even of a first step
            _put_back(folder, keep)
        raise
    finally:
        seconds = before + time.monotonic() - began
        if (folder / STARTED).exists():
            write_json(folder / STARTED, task | {"seconds": seconds, "codes": codes} | stopped)
    manifest = task | {
        "outputs": hash_tree(folder),
        "code": {"version": __version__, "source": source_hash()} | ({"earlier": codes[:-1]} if codes[1:] else {}),
        "libraries": library_versions(),
        "python": platform.python_version(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "peak_memory_mb": round(peak_memory() / 2**20, 1),
        **(told or {}),
    }
    write_json(folder / MANIFEST, manifest)
    _tidy(folder)
    return StageOutcome(folder, skipped=False, seconds=seconds)


@contextmanager
def claimed(folder: Path, *, keep: str | None = None) -> Iterator[None]:
    """Within the block no other process works in the folder. What a kill had left set aside there is put back first.

    Raises:
        ConfigError: another process works there.
    """
    place = folder.resolve()
    lock = place.parent / f".{place.name}.lock"
    handle = _lock(lock, folder)
    try:
        for torn in folder.glob(f".{STARTED}.*.partial"):  # by a kill before anything was begun
            torn.unlink()
        if _aside(folder).exists():
            _put_back(folder, keep)
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _lock(path: Path, folder: Path) -> int | None:
    """A file held by this process until it closes it or ends, however it ends. None where that cannot be had."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT)
        except OSError:  # nothing can be written here, then by nobody else either
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"another process works in {folder}; wait for its end, or give another folder. Several processes train "
                "together where torchrun starts them."
            ) from None
        except FileNotFoundError:  # who held it has just ended, and deleted it
            pass
        except OSError:  # a file system without locks
            path.unlink(missing_ok=True)
            os.close(handle)
            return None
        os.close(handle)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError("is not a manifest; delete the stage's folder to run it again.", path=path) from error
    assert isinstance(manifest, dict)
    return manifest


def hash_path(path: Path) -> str:
    """A hash of a file's content, or of the names and contents of a folder's files."""
    if path.is_file():
        return _hash_file(path)
    if not path.is_dir():
        raise DataError("does not exist, but a stage needs it as input.", path=path)
    return _hash_text(json.dumps(hash_tree(path), sort_keys=True))


def hash_tree(folder: Path) -> dict[str, str]:
    """The hash of every file under `folder` that holds results, by relative name."""
    return {
        str(path.relative_to(folder)): _hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in VOLATILE
        and CHECKPOINT not in path.relative_to(folder).parts
    }


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("does not exist.", path=path) from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not JSON: {error}.", path=path) from error


def forget_peak_memory() -> None:
    """Let `peak_memory` begin again with what is resident now, where the system can: Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The process's largest resident size in bytes, since `forget_peak_memory` or in all."""
    return _status_of_memory("VmHWM") or _largest_ever()


def resident_memory() -> int:
    """The process's resident size in bytes now; where the system does not tell, the largest that it had."""
    return _status_of_memory("VmRSS") or _largest_ever()


def _status_of_memory(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _largest_ever() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions() -> dict[str, str]:
    """The versions of the libraries that results depend on."""
    return {name: metadata.version(name) for name in LIBRARIES}


@cache
def source_hash() -> str:
    """A hash of the package's own source."""
    package = Path(__file__).parent
    return _hash_text(json.dumps({str(p.relative_to(package)): _hash_file(p) for p in sorted(package.rglob("*.py"))}))


def _same_task(done: Mapping[str, Any], task: Mapping[str, Any]) -> bool:
    return all(with_effect(done.get(name)) == with_effect(task[name]) for name in ("stage", "config", "inputs"))


def with_effect(config: Any) -> Any:
    """A config as JSON tells it, without the settings that results do not depend on."""
    if isinstance(config, Mapping):
        return {name: with_effect(value) for name, value in config.items() if name not in WITHOUT_EFFECT}
    return [with_effect(value) for value in config] if isinstance(config, list | tuple) else config


def _what_differs(earlier: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    before, now = earlier.get("inputs", {}), task["inputs"]
    names = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    if with_effect(earlier.get("config")) != with_effect(task["config"]):
        names.insert(0, "settings")
    return f"other {', '.join(names)}" if names else "something else"


def _outputs_stand(folder: Path, done: Mapping[str, Any]) -> bool:
    return bool(hash_tree(folder) == done.get("outputs"))


def _prepare(folder: Path, task: Mapping[str, Any], keep: str | None) -> dict[str, Any]:
    """Keep the folder if the same task was interrupted there, else empty it. What is known of that beginning."""
    started, earlier = folder / STARTED, dict[str, Any]()
    if started.exists():
        with contextlib.suppress(json.JSONDecodeError):
            earlier = json.loads(started.read_text(encoding="utf-8"))
        if _same_task(earlier, task):
            for partial in list(folder.rglob(".*.partial")):  # what a kill left of what was being written or dropped
                _remove(partial)
            earlier.pop("stopped", None)  # it goes on
        else:  # another task was interrupted here; its mark goes last, so that a kill here leaves it to be seen
            if (folder / CHECKPOINT).exists():
                say(f"  {task['stage']} begins anew: it was begun with {_what_differs(earlier, task)}")
            earlier = {}
            _clear(folder, but=(STARTED, keep))
    elif folder.exists() and any(folder.iterdir()):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        folder.rename(_aside(folder))
    codes: list[str] = earlier.get("codes", [])
    if codes and codes[-1] != source_hash():
        say(f"  {task['stage']} goes on by another version of Tastemaker than it was begun by")
    folder.mkdir(parents=True, exist_ok=True)
    earlier |= {**task, "codes": codes if codes[-1:] == [source_hash()] else [*codes, source_hash()]}
    write_json(started, earlier)
    if keep is not None and (_aside(folder) / keep).exists() and not (folder / keep).exists():
        with atomic_write(folder / keep, binary=True) as file:
            file.write((_aside(folder) / keep).read_bytes())
    return earlier


def _tidy(folder: Path) -> None:
    """Remove what a finished stage has no more use for; a kill in the middle leaves the rest to the next time."""
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    shutil.rmtree(_aside(folder), ignore_errors=True)
    (folder / STARTED).unlink(missing_ok=True)


def _clear(folder: Path, *, but: tuple[str | None, ...]) -> None:
    """Empty the folder; a checkpoint loses its name first, so that nothing goes on from it where the rest is gone."""
    checkpoint, dropped = folder / CHECKPOINT, folder / f".{CHECKPOINT}.partial"
    if checkpoint.exists():
        _remove(dropped)
        checkpoint.rename(dropped)
    for path in list(folder.iterdir()):
        if path.name not in but:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put_back(folder: Path, keep: str | None) -> None:
    """Leave the folder as it was before the stage began, if the stage has written nothing yet."""

    def is_new(path: Path) -> bool:
        if not path.is_file() or not path.stat().st_size or path.name == STARTED:
            return False
        earlier = _aside(folder) / path.relative_to(folder)
        return path.name != keep or not earlier.exists() or _hash_file(earlier) != _hash_file(path)

    if any(is_new(path) for path in folder.rglob("*")):
        return
    if folder.exists():
        shutil.rmtree(folder)
    if _aside(folder).exists():
        _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    """Where a finished result waits until the one that replaces it is finished too."""
    return folder.parent / f".{folder.name}.before"


def _hash_inputs(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    return {name: hash_path(value) if isinstance(value, Path) else value for name, value in sorted(inputs.items())}


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
