"""The few pieces of which the charts are made: escaped elements, scales, round ticks and labels that keep clear.

Colours live in the style sheet: an element names its classes, and `--c` of a family's class is its ink in light, in
dark and in print.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup, escape

from tastemaker.report.words import NEGATIVE

# Average advance of a sans-serif letter in ems, on the wide side: a label that is given too much room does no harm.
LETTER_WIDTH = 0.54

Attribute = str | float | None


def element(name: str, /, *children: Markup | str, **attributes: Attribute) -> Markup:
    """An element, its text and attributes escaped; in attribute names, underscores turn to hyphens (`text_anchor`)."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(escape(child) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")


def group(*children: Markup, **attributes: Attribute) -> Markup:
    return element("g", *children, **attributes)


def text(x: float, y: float, content: str, class_: str, *, anchor: str | None = None) -> Markup:
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    steps = "L".join(f"{_attribute(x)} {_attribute(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def drawing(*children: Markup, width: float, height: float, title: str, description: str, class_: str = "") -> Markup:
    """A whole drawing with the title and description that a screen reader tells."""
    body = "".join(children)
    key = hashlib.blake2s(f"{title}{description}{body}".encode(), digest_size=5).hexdigest()
    return element(
        "svg",
        element("title", title, id=f"t{key}"),
        element("desc", description, id=f"d{key}"),
        *children,
        viewBox=f"0 0 {_attribute(width)} {_attribute(height)}",
        role="img",
        aria_labelledby=f"t{key} d{key}",
        class_=f"chart {class_}".strip(),
        style=f"--w:{_attribute(width)}px",
    )


def style_sheet(name: str) -> Markup:
    """One of our own style sheets: `chart.css` has what drawings need."""
    return Markup(resources.files("tastemaker.report").joinpath(f"templates/{name}").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps a domain onto a stretch of the drawing, linearly or by square root (for KL, which grows like a square)."""

    domain: tuple[float, float]
    range: tuple[float, float]
    by_root: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._bend(number) for number in (*self.domain, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.range[0] + share * (self.range[1] - self.range[0])

    def _bend(self, value: float) -> float:
        return math.sqrt(max(value, 0.0)) if self.by_root else value


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (multiples of 1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"the domain [{low}, {high}] must be finite")
    if high <= low:
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [_rounded(index * step, step) for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float], unit: Callable[[float], str] | None = None) -> list[str]:
    """The ticks as texts with as many decimals as tell them apart."""
    if unit is not None:
        return [unit(tick) for tick in ticks]
    step = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = next((places for places in range(12) if _is_whole(step * 10**places)), 12)
    return [_thousands(tick) if step >= 1000 else f"{tick:.{decimals}f}".replace("-", NEGATIVE) for tick in ticks]


def share_labels(ticks: Sequence[float]) -> list[str]:
    """Shares as percentages with as many decimals as tell them apart."""
    return [f"{label}%" for label in tick_labels([100 * tick for tick in ticks])]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to `wanted` as can be (least squares), in the same order, at least `gap` apart.

    They stay within [low, high] when they fit. Shifting the i-th by i gaps turns the task into isotonic regression,
    which pooling adjacent violators solves.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    pools: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        mean, size = wanted[index] - place * gap, 1
        while pools and pools[-1][0] > mean:
            previous, count = pools.pop()
            mean, size = (mean * size + previous * count) / (size + count), size + count
        pools.append((mean, size))
    shifted = [mean for mean, size in pools for _ in range(size)]
    top = max(low, high - (len(wanted) - 1) * gap)
    placed = [0.0] * len(wanted)
    for place, index in enumerate(order):
        placed[index] = min(max(shifted[place], low), top) + place * gap
    return placed


def text_width(content: str, size: float) -> float:
    """About how wide a text is when set in a sans-serif of `size`."""
    return LETTER_WIDTH * size * len(content)


def _attribute(value: str | float | None) -> str:
    if not isinstance(value, float):
        return str(value)
    written = f"{value:.1f}".removesuffix(".0")
    return "0" if written == "-0" else written


def _is_whole(value: float) -> bool:
    return round(value) != 0 and abs(value - round(value)) < 1e-6 * abs(value)


def _rounded(value: float, step: float) -> float:
    return round(value, max(0, 3 - math.floor(math.log10(step))))


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k".replace("-", NEGATIVE) if value else "0"
