"""What the doctor finds in runs broken on purpose and in healthy ones: `python -m tests.doctor.thresholds`.

Its thresholds were set with the strengths of `set_at`, the seeds 10 to 14 and the demo of seed 0; `--tried` plants the
strengths that tests plant.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests.doctor.planted import FAULTS, fine_tuned, run_ppo

from tastemaker.doctor import Diagnosis, examine
from tastemaker.doctor.findings import ends

SEEDS = range(10, 15)
SHOWN = (
    *("kl", "entropy", "response_tokens", "truncated_rate", "score", "score_spread", "explained_variance"),
    *("value_loss", "value_clip_fraction", "clip_fraction", "approx_kl", "sampler_mismatch"),
)


def course(diagnosis: Diagnosis) -> str:
    """Every metric's first and last quarter."""
    held = ((name, diagnosis.measured.series(name)) for name in SHOWN)
    return "; ".join(
        f"{name} {first.mean:.3g} -> {last.mean:.3g}"
        for name, series in held
        if series
        for first, last in [ends(series)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tried", action="store_true", help="plant the strengths that tests plant")
    parser.add_argument("--only", help="a finding, or healthy")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, number = fine_tuned(Path(folder)), 0
        planted: list[tuple[str, float | None, int, dict[str, Any]]] = [
            ("healthy", None, seed, {}) for seed in (range(5) if options.tried else SEEDS)
        ]
        planted += [
            (fault.finding, strength, seed, fault.plant(strength))
            for fault in FAULTS
            for strength in (fault.tried_at if options.tried else fault.set_at)
            for seed in ((0,) if options.tried else SEEDS[:1])
        ]
        for name, strength, seed, settings in planted:
            if options.only not in (None, name):
                continue
            number += 1
            (diagnosis,) = examine(run_ppo(Path(folder) / f"run-{number}", base, seed=seed, **settings))
            found = [finding.kind.name for finding in diagnosis.findings]
            right = diagnosis.is_healthy if name == "healthy" else name in found
            head = name if strength is None else f"{name} at {strength:g}"
            print(f"{'' if right else 'WRONG '}{head}, seed {seed}: {', '.join(found) or 'nothing'}")
            print(f"    {course(diagnosis)}", flush=True)


if __name__ == "__main__":
    main()
