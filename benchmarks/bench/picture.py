"""One PPO iteration as a picture: TRL's and ours by phase, ours by kind of kernel.

The parts of a bar that is stacked in rows, so that each has room for its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench.cases import PROMPT_TOKENS, RESPONSE_TOKENS
from benchmarks.bench.driver import ROOT
from benchmarks.bench.results import KERNELS, Results
from markupsafe import Markup

from tastemaker.files import atomic_write
from tastemaker.report.figure import Figure, Part, standalone
from tastemaker.report.svg import drawing, element, text, text_width

PICTURE = ROOT / "docs/images/performance-ppo.svg"
WIDTH, HEADING, ROW, BAR, SIZE = 560.0, 22.0, 17.0, 12.0, 11.5
LEAST_SHARE = 0.012  # of a bar; what is smaller is drawn together, as "rest"
REST = "rest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A stacked bar: what it is, and its parts in seconds."""

    title: str
    ink: str
    parts: Mapping[str, float]


def write_picture(folder: Path, results: Results) -> None:
    """Write the picture, where PPO has been measured on M."""
    made = picture(folder, results)
    if made is not None:
        with atomic_write(PICTURE) as file:
            file.write(made)


def picture(folder: Path, results: Results) -> str | None:
    """The picture of what was measured of PPO on M; None where nothing was."""
    bars, counts = [], dict[str, int]()
    for title, name, ink in (("TRL in fp32, by phase", "peer", "ppo"), ("ours in bf16, by phase", "ours", "ppo-ptx")):
        measured = results.engine("M", "ppo-uniform", name)
        if measured is not None:
            bars.append(Bar(title=title, ink=ink, parts=measured.phases))
            counts.update(measured.counts)
    if (folder / KERNELS).exists():
        watched = json.loads((folder / KERNELS).read_text(encoding="utf-8"))
        bars.append(Bar(title="ours, by kind of kernel", ink="dpo", parts=watched["kernels"]))
    if not counts:
        return None
    work = f"{counts['sequences']} episodes of {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens"
    figure = Figure(
        title="What a PPO iteration is spent on",
        subtitle=f"SmolLM2-135M, {work}, {counts['steps of optimizer 1']} steps of each optimizer",
        parts=(Part(panels=tuple(draw(bar, folded(bar.parts)) for bar in bars)),),
        columns=1,
        words="Each drawing is as wide as its own iteration; seconds stand beside the names.",
    )
    return standalone(figure)


def folded(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """The parts, largest first; those too small to see are one, at the end."""
    whole = sum(parts.values())
    large = {name: seconds for name, seconds in parts.items() if seconds >= LEAST_SHARE * whole}
    small = whole - sum(large.values())
    shown = sorted(((name, value) for name, value in large.items() if name != REST), key=lambda part: -part[1])
    small += large.get(REST, 0.0)
    return [*shown, (REST, small)] if small > 0 else shown


def draw(bar: Bar, parts: Sequence[tuple[str, float]]) -> Markup:
    """The parts of a bar in rows, each beginning where the last one ended, with its name beside it."""
    whole = sum(seconds for _, seconds in parts)
    children = [text(0.0, 11.0, f"{bar.title}: {whole:.1f} s", "heading")]
    labels = [f"{name} {seconds:.1f}" for name, seconds in parts]
    x = 0.0
    for place, ((_, seconds), label) in enumerate(zip(parts, labels, strict=True)):
        width, y, ink = WIDTH * seconds / whole, HEADING + place * ROW, f"f-{bar.ink} v0"
        children.append(element("rect", x=x, y=y, width=max(width, 1.0), height=BAR, class_=f"dot {ink}"))
        end = x + width
        if end + 6 + text_width(label, SIZE) <= WIDTH:
            children.append(text(end + 6, y + BAR - 2, label, f"label {ink}"))
        else:
            children.append(text(x - 6, y + BAR - 2, label, f"label {ink}", anchor="end"))
        x = end
    height = HEADING + len(parts) * ROW
    return drawing(*children, width=WIDTH, height=height, title=bar.title, description=", ".join(labels))
