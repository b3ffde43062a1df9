"""Writes the figures of docs/peers.md from the results: `python -m benchmarks.peer_losses.page`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench.driver import ROOT
from benchmarks.bench.table import table
from benchmarks.pages import put
from benchmarks.peer_losses.cases import CASES

RESULTS, PAGE = ROOT / "benchmarks/results/peer-losses.json", ROOT / "docs/peers.md"
BEGIN, END = "<!-- made by benchmarks/peer_losses from benchmarks/results -->", "<!-- end -->"
WITHIN = 1e-5  # of the largest number of a figure, or of 1

Results = Mapping[str, Any]


def load(path: Path = RESULTS) -> Results:
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def write(results: Results, page: Path = PAGE) -> None:
    """Put the figures between the marks of the page."""
    put(page, BEGIN, END, render(results))


def render(results: Results) -> str:
    """All figures, as Markdown."""
    header = ["", "figure", "numbers", "ours", "TRL", "largest difference", "as a share"]
    rows = []
    for name, figures in results["cases"].items():
        for place, figure in enumerate(figures):
            case = CASES[name]
            rows.append(
                [
                    f"{case.title} ({case.peer})" if place == 0 else "",
                    figure["name"] if figure["name"] != "gradient" else "gradient (norm)",
                    f"{figure['count']:,}",
                    _shown(figure["ours"]),
                    _shown(figure["peer"]),
                    f"{figure['difference']:.1e}",
                    f"{figure['share']:.1e}",
                ]
            )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{versions}; fp32 on a processor.\n\n{table(header, rows)}\n\n{_verdict(results)}\n"


def _shown(number: float) -> str:
    return f"{round(number, 6) + 0.0:.6f}"  # no -0.000000


def _verdict(results: Results) -> str:
    shares = [(figure["share"], name, figure["name"]) for name, found in results["cases"].items() for figure in found]
    most, name, figure = max(shares)
    apart = [f"{CASES[name].title}, {figure}" for share, name, figure in shares if share > WITHIN]
    if apart:
        return f"More than {WITHIN:.0e} apart: {'; '.join(apart)}."
    return (
        f"All {len(shares)} figures are within {WITHIN:.0e} of one another; furthest apart is {CASES[name].title}, "
        f"{figure}, by {most:.1e}."
    )


if __name__ == "__main__":
    write(load())
