"""Which step of which golden curve moved first, and by how much."""

from __future__ import annotations

from collections.abc import Mapping

from tests.golden.curves import Curve

TOLERANCE = 1e-6


def first_moves(name: str, found: Mapping[str, Curve], recorded: Mapping[str, Curve]) -> list[str]:
    """A line for every curve of a stage that has moved, the one that did so first above the others."""
    moves = [
        (place, f"{name}: {metric} {what}")
        for metric in [*found, *(metric for metric in recorded if metric not in found)]
        if (move := first_move(found.get(metric), recorded.get(metric))) is not None
        for place, what in [move]
    ]
    return [line for _, line in sorted(moves, key=lambda move: move[0])]


def first_move(found: Curve | None, recorded: Curve | None) -> tuple[int, str] | None:
    """The first step at which two curves differ, counted from 1, and what differs; None if they are one."""
    if found is None or recorded is None:
        return 0, "is new" if recorded is None else "is not measured any more"
    for step, (now, then) in enumerate(zip(found, recorded, strict=False), 1):
        if now is None or then is None:
            if now is not then:
                return step, f"at step {step}: {now} where {then} was recorded"
        elif not abs(now - then) <= TOLERANCE:  # a NaN has moved
            rest = [abs(a - b) for a, b in zip(found, recorded, strict=False) if a is not None and b is not None]
            return step, (
                f"moved at step {step} of {len(recorded)}: {now:.9f} where {then:.9f} was recorded, {now - then:+.1e}; "
                f"by {max(rest):.1e} at most"
            )
    if len(found) != len(recorded):
        return min(len(found), len(recorded)) + 1, f"has {len(found)} steps where {len(recorded)} were recorded"
    return None
