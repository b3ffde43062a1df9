"""Whole runs of the smoke recipe on a random base, for the tests of the pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tastemaker.artefacts import hash_path

SMOKE = Path(__file__).parent.parent / "recipes" / "smoke.toml"


def smoke_command(base: Path, out: Path, *more: str) -> list[str]:
    """The arguments of a run."""
    return ["run", str(SMOKE), "--out", str(out), "--base.model", str(base), *more]


def weights(out: Path) -> dict[str, str]:
    """The hash of every model's weights in a run."""
    return {str(path.relative_to(out)): hash_path(path) for path in sorted(out.rglob("model*.safetensors"))}


def measured(out: Path) -> dict[str, Any]:
    """What a run found, without its timings."""
    results = json.loads((out / "results.json").read_text())
    return {name: results[name] for name in ("comparisons", "models", "claims", "agreement", "seed", "recipe")}


def skipped(out: Path) -> dict[str, bool]:
    """Which stages the last run did not have to run."""
    return {stage["name"]: stage["skipped"] for stage in json.loads((out / "results.json").read_text())["stages"]}
