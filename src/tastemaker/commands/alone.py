"""One stage alone in a folder of the user's: what it may not write over, and what it says when it is done.

Of several processes (`parallel`) the first looks after the folder; the others wait for its word, and do their share.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tastemaker import processes
from tastemaker.artefacts import CHECKPOINT, STARTED, claimed, hash_path, read_manifest, run_stage, with_effect
from tastemaker.commands.loading import heavy_imports
from tastemaker.config import to_json
from tastemaker.console import say
from tastemaker.errors import ConfigError

Work = Callable[[Path], Mapping[str, Any] | None]

HASH = re.compile(r"[0-9a-f]{32}")
SHOWN_DIFFERENCES = 4


def stage(
    out: Path,
    stage: str,
    config: Any,
    inputs: Mapping[str, Path | str],
    work: Work,
    *,
    replace: bool = True,
    result: Callable[[Path], str] | None = None,
) -> None:
    """Run one stage alone: skip what is done, continue what was interrupted.

    Refuses to write over what is no result of this stage, over what it reads itself and, without `replace`, over a
    result of other settings. `result` says in a sentence what came out.
    """

    def alone(work: Work) -> None:
        _check_apart(out, inputs)
        with claimed(out):
            _check_place(out, stage)
            hashed = {name: hash_path(value) if isinstance(value, Path) else value for name, value in inputs.items()}
            if not replace:
                _check_same(out, to_json(config), hashed)
            outcome = run_stage(out, stage=stage, config=config, inputs=hashed, work=work)
        say(f"{out} is up to date" if outcome.skipped else f"{out} written in {outcome.seconds:.0f} s")
        if result is not None:
            say(result(out))

    if processes.several():
        _together(alone, out, work)
    else:
        alone(work)


def _together(alone: Callable[[Work], None], out: Path, work: Work) -> None:
    """The first process runs the stage and tells the others to work with it, if there is anything to do."""
    with heavy_imports():
        from tastemaker import parallel
    told = False

    def announced(folder: Path) -> Mapping[str, Any]:
        nonlocal told
        told = parallel.from_first(True)
        with parallel.joined():  # in here too: what an error of this kind leaves is looked after as of any other
            return {**(work(folder) or {}), "processes": processes.count()}

    with parallel.joined():
        if processes.is_first():
            alone(announced)
            if not told:
                parallel.from_first(False)
        elif parallel.from_first(False):
            work(out)


def _check_place(out: Path, stage: str) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a new folder for --out.")
    finished, started = read_manifest(out), _started(out)
    for held, what in ((finished, "the result of"), (started, "the beginning of")):
        if held is not None and held.get("stage") != stage:
            raise ConfigError(
                f"{out} holds {what} {held.get('stage')!r}, not of {stage!r}; give a new folder for --out."
            )
    if finished is None and not (out / STARTED).exists() and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something that is not a stage of ours; give a new folder for --out.")


def _started(out: Path) -> dict[str, Any] | None:
    """The task that has not finished in `out`; None where there is none, or a kill left its mark unreadable."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        started = json.loads((out / STARTED).read_text(encoding="utf-8"))
        return started if isinstance(started, dict) else None
    return None


def _check_apart(out: Path, inputs: Mapping[str, Path | str]) -> None:
    """What is read must not be moved aside for what is written, nor be changed by it."""
    for name, path in inputs.items():
        if not isinstance(path, Path):
            continue
        option, ours, theirs = _option(name), out.resolve(), path.resolve()
        if ours == theirs:
            raise ConfigError(f"{option} {path} is --out itself; give another --out.")
        if theirs.is_relative_to(ours):
            raise ConfigError(f"{option} {path} lies inside --out {out}; give another --out.")
        if ours.is_relative_to(theirs):
            raise ConfigError(f"--out {out} lies inside {option} {path}; give another --out.")


def _check_same(out: Path, config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Nor is what was begun and not finished to be lost for an option that is another, once it has a checkpoint."""
    done, what = read_manifest(out), "the result"
    if done is None and (out / CHECKPOINT).exists():
        done, what = _started(out), "the beginning, with a checkpoint,"
    if done is None:
        return
    before, now = _flat(with_effect(done.get("config", {}))), _flat(with_effect(config))
    changes = [
        f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    earlier = done.get("inputs", {})
    for name in sorted({*earlier, *inputs}):
        changes += _change_of_input(name, earlier.get(name, "none"), inputs.get(name, "none"))
    if changes:
        rest = len(changes) - SHOWN_DIFFERENCES
        told = ", ".join(changes[:SHOWN_DIFFERENCES]) + (f" and {rest} more" if rest > 0 else "")
        raise ConfigError(
            f"{out} holds {what} of other settings: {told}. Give a new folder for --out, or --replace to write over it."
        )


def _change_of_input(name: str, before: str, now: str) -> list[str]:
    if before == now:
        return []
    if HASH.fullmatch(before) or HASH.fullmatch(now):
        return [f"another {_option(name)}"]
    function, _, code = before.partition(" ")
    if code and now.partition(" ")[0] == function:
        return [f"another text of the module of {function}"]
    return [f"{name.replace('_', ' ')} {before} -> {now}"]


def _option(name: str) -> str:
    kind, slash, rest = name.partition("/")
    return f"--policies {rest}" if slash else f"--{kind.replace('_', '-')}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config, those of its sections by dotted names."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return fields


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
