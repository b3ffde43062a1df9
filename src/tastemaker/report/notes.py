"""Where the small texts beside points go: clear of each other and of the points; of lines where that can be.

Every note tries the same few places about its point, the usual one first, and takes the first that covers least. That
is no optimum over all notes together, and needs none: a chart has a dozen. A note that would have to lie on another
note or on a point is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ASCENT, DESCENT = 0.8, 0.24  # of a text's size, above and below its baseline
REACH = 11.0  # from the middle of a point to the nearest edge of a note beside it
LIFT = 7.0  # from the end of a whisker to a note above or below it
FURTHER = (0.0, 13.0, 26.0)  # how much further off a note may move where the nearest place is taken
SOLID = 1000.0  # what a square unit of another note or a point costs, where one of a line costs 1


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * tall if wide > 0 and tall > 0 else 0.0

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A text of this size for the point (x, y), whose whisker runs from `high` down to `low` (y grows downward)."""

    x: float
    y: float
    high: float
    low: float
    width: float
    size: float


def place_notes(
    notes: Sequence[Note], *, points: Sequence[Box], lines: Sequence[Box], bounds: Box
) -> list[tuple[float, float] | None]:
    """The middle and the baseline of each note; None where there is no room. The first notes choose first."""
    taken = list(points)
    places: list[tuple[float, float] | None] = []
    for note in notes:
        best: tuple[float, float] | None = None
        least = SOLID
        for at in _places(note):
            box = _box(note, at)
            if not box.inside(bounds):
                continue
            cost = SOLID * sum(box.overlap(one) for one in taken) + sum(box.overlap(one) for one in lines)
            if cost < least:
                best, least = at, cost
        if best is not None:
            taken.append(_box(note, best))
        places.append(best)
    return places


def _places(note: Note) -> list[tuple[float, float]]:
    """Above and below the whisker, beside the point, and the same again further off."""
    up, down = note.high - LIFT, note.low + LIFT + ASCENT * note.size
    middle = note.y + (ASCENT - DESCENT) / 2 * note.size
    aside = REACH + note.width / 2
    found: list[tuple[float, float]] = []
    for more in FURTHER:
        found += [(note.x, up - more), (note.x, down + more)]
        found += [(note.x + side, middle + lift) for side in (aside, -aside) for lift in dict.fromkeys((-more, more))]
    return found


def _box(note: Note, at: tuple[float, float]) -> Box:
    x, baseline = at
    half = note.width / 2
    return Box(x - half, baseline - ASCENT * note.size, x + half, baseline + DESCENT * note.size)
