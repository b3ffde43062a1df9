"""Drawings of the report as SVG files that stand alone, for pages that can only show an image.

A file holds its own style and its own paper: an image knows whether its reader prefers dark, and not what it lies on.
It names no font that must be fetched, and no other file. The same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from tastemaker.errors import ConfigError
from tastemaker.report.curves import policy_course
from tastemaker.report.distance import distance
from tastemaker.report.families import Inks
from tastemaker.report.run import STAGES, Run
from tastemaker.report.svg import element, style_sheet, text, text_width
from tastemaker.report.winners import winners
from tastemaker.report.words import listed, plain

MARGIN = 26.0
COLUMN_GAP, ROW_GAP, PART_GAP, HEADING_GAP = 34.0, 22.0, 28.0, 18.0
WORDS_SIZE, WORDS_LINE = 12.5, 18.0
SMALL = (272.0, 176.0)  # three drawings side by side, at a size that pages show unshrunk
OVER_OPTIMISATION, TRAINING, WINS = "over-optimisation", "training-", "wins"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Drawings under one heading, and what is to be known of them."""

    heading: str = ""
    words: str = ""
    panels: tuple[Markup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a file shows. `words` stand below all drawings."""

    title: str
    subtitle: str
    parts: tuple[Part, ...]
    columns: int
    words: str


@dataclass(frozen=True, slots=True)
class _Placed:
    """A drawing with its size, ready to be put somewhere."""

    root: ElementTree.Element
    width: float
    height: float

    @classmethod
    def read(cls, panel: Markup) -> _Placed:
        root = ElementTree.fromstring(panel)
        width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
        return cls(root, width, height)

    def at(self, x: float, y: float) -> Markup:
        self.root.attrib |= {
            name: f"{value:.1f}" for name, value in (("x", x), ("y", y), ("width", self.width), ("height", self.height))
        }
        self.root.attrib.pop("style", None)  # how wide a page may draw it
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))


def figure(run: Run, name: str) -> Figure:
    """The figure of that name. Raises ConfigError where there is none, or the run has not what it shows."""
    inks = Inks.for_models((model.name, model.kind) for model in run.results.models)
    if name == OVER_OPTIMISATION or name.startswith(f"{OVER_OPTIMISATION}-"):
        return _over_optimisation(run, name, inks)
    if name.startswith(TRAINING):
        return _training(run, name.removeprefix(TRAINING), inks)
    if name == WINS or name.startswith(f"{WINS}-"):
        return _wins(run, name, inks)
    raise ConfigError(
        f"there is no figure {name!r}; there are {OVER_OPTIMISATION} (also -sweep and -course alone), {TRAINING}POLICY "
        f"and {WINS} (also {WINS}-OPPONENT alone)."
    )


def _over_optimisation(run: Run, name: str, inks: Inks) -> Figure:
    views = distance(run, inks)
    wanted = [view for view in views if name in (OVER_OPTIMISATION, f"{OVER_OPTIMISATION}-{view.name}")]
    if not wanted:
        there = listed([f"{OVER_OPTIMISATION}-{view.name}" for view in views]) or "no view of distance at all"
        raise ConfigError(f"the run has nothing for {name!r}; it has {there}.")
    return Figure(
        title="How far is too far",
        subtitle=_origin(run),
        parts=tuple(
            Part(heading=view.title, words=f"{view.finding} {view.note}".strip(), panels=view.panels) for view in wanted
        ),
        columns=2,
        words="Distance from the reference is drawn on a square-root scale. Whiskers are 95% intervals.",
    )


def _training(run: Run, policy: str, inks: Inks) -> Figure:
    course = policy_course(run, policy, inks, width=SMALL[0], height=SMALL[1])
    if course is None:
        there = [folder.variant for folder in run.of_stage(STAGES[5]) if folder.curves]
        raise ConfigError(
            f"the run has no curves of a policy {policy!r}; it has those of {listed(sorted(set(there))) or 'none'}."
        )
    return Figure(
        title=course.title,
        subtitle=_origin(run),
        parts=(Part(panels=course.panels),),
        columns=3,
        words=course.note,
    )


def _wins(run: Run, name: str, inks: Inks) -> Figure:
    found = winners(run, inks)
    opponents = () if found is None else found.opponents
    wanted = [opponent for opponent in opponents if name in (WINS, f"{WINS}-{opponent.name}")]
    if found is None or not wanted:
        there = listed([f"{WINS}-{opponent.name}" for opponent in opponents]) or "no comparisons"
        raise ConfigError(f"the run has nothing for {name!r}; it has {there}.")
    words = "Blindly, on the same prompt; ties count half."
    words += f" Each row rests on {found.prompts} judgements." if found.prompts else ""
    words += " Whiskers are 95% intervals: one that crosses the middle line has shown no winner."
    if found.has_controlled:
        words += " The hollow mark below is the same comparison with the advantage of length taken out."
    return Figure(
        title=f"Preferred by {found.judge}",
        subtitle=_origin(run),
        parts=tuple(Part(heading=f"Against {opponent.name}", panels=opponent.panels) for opponent in wanted),
        columns=2,
        words=words,
    )


def _origin(run: Run) -> str:
    recipe = f"recipe {plain(run.results.recipe or run.name)}"
    return recipe if run.results.seed is None else f"{recipe}, seed {run.results.seed}"


def standalone(figure: Figure) -> str:
    """The figure as the text of an SVG file."""
    parts = [(part, [_Placed.read(panel) for panel in part.panels]) for part in figure.parts]
    columns = min(figure.columns, max(len(panels) for _, panels in parts))
    column = max(panel.width for _, panels in parts for panel in panels)
    inner = columns * column + (columns - 1) * COLUMN_GAP
    children = [
        text(MARGIN, MARGIN + 13, figure.title, "title"),
        text(MARGIN, MARGIN + 33, figure.subtitle, "words"),
    ]
    y = MARGIN + 33
    for part, panels in parts:
        drawn, y = _part(part, panels, y + PART_GAP, columns=columns, column=column, inner=inner)
        children += drawn
    if figure.words:
        drawn, y = _words(figure.words, y + PART_GAP, inner)
        children += drawn
    width, height = inner + 2 * MARGIN, y + MARGIN
    told = f"{figure.subtitle}. {' '.join(part.words for part in figure.parts)} {figure.words}"
    whole = element(
        "svg",
        element("title", figure.title),
        element("desc", " ".join(told.split())),
        element("style", style_sheet("chart.css"), style_sheet("figure.css")),
        element("rect", width=width, height=height, class_="paper"),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.1f} {height:.1f}",
        width=width,
        height=height,
        role="img",
        class_="chart figure",
    )
    return f"{whole}\n"


def _part(
    part: Part, panels: Sequence[_Placed], y: float, *, columns: int, column: float, inner: float
) -> tuple[list[Markup], float]:
    """The drawings of a part from `y` on, and where they end."""
    drawn: list[Markup] = []
    if part.heading:
        drawn.append(text(MARGIN, y + 10, part.heading, "part"))
        y += 10
    if part.words:
        lines, y = _words(part.words, y + 8, inner)
        drawn += lines
    y += HEADING_GAP if part.heading or part.words else 0
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        y += ROW_GAP if first else 0
        drawn += [panel.at(MARGIN + place * (column + COLUMN_GAP), y) for place, panel in enumerate(row)]
        y += max(panel.height for panel in row)
    return drawn, y


def _words(words: str, y: float, width: float) -> tuple[list[Markup], float]:
    """Words in lines that fit, the first below `y`, and where the last ends."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, WORDS_SIZE) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    drawn = [text(MARGIN, y + WORDS_LINE * (place + 0.7), line, "words") for place, line in enumerate(lines)]
    return drawn, y + WORDS_LINE * len(lines)
