"""What two sides found for a case, held beside each other. Standard library and PyTorch only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GRADIENT = "gradient"


def compared(ours: Mapping[str, Tensor], peer: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One figure for each name; the gradients of all parameters are one.

    Each has how many numbers it is, what stands for them on both sides (their mean, or a gradient's norm), and the
    largest difference of two numbers, also as a share of the largest number.
    """
    if ours.keys() != peer.keys():
        raise SystemExit(f"the sides measured different things: {sorted(ours.keys() ^ peer.keys())}")
    names = dict.fromkeys(name.partition("/")[0] for name in ours)
    return [_figure(name, _joined(name, ours), _joined(name, peer)) for name in sorted(names, key=_order)]


def _order(name: str) -> tuple[bool, bool, str]:
    """The loss first, the gradient last."""
    return name == GRADIENT, name != "loss", name


def _joined(name: str, found: Mapping[str, Tensor]) -> Tensor:
    """All numbers of a name, in the order of what stands behind it."""
    parts = [found[key] for key in sorted(found) if key.partition("/")[0] == name]
    return torch.cat([part.double().flatten() for part in parts])


def _figure(name: str, ours: Tensor, peer: Tensor) -> dict[str, Any]:
    if len(ours) != len(peer):
        raise SystemExit(f"{name} is {len(ours)} numbers on our side and {len(peer)} on the peer's")
    stands_for = torch.linalg.vector_norm if name == GRADIENT else torch.mean
    largest, difference = float(ours.abs().max()), float((ours - peer).abs().max())
    return {
        "name": name,
        "count": len(ours),
        "ours": float(stands_for(ours)),
        "peer": float(stands_for(peer)),
        "largest": largest,
        "difference": difference,
        "share": difference / max(largest, 1.0) if name != GRADIENT else difference / largest,
    }


def of_case(case: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The figures of one case, by what stands behind its name."""
    return {name.removeprefix(f"{case}/"): tensor for name, tensor in found.items() if name.startswith(f"{case}/")}
