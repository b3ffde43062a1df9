"""Numbers as a reader wants them: percentages with their intervals, durations, counts, sentences of names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tastemaker.report.fields import Measured

NEGATIVE = "\N{MINUS SIGN}"
RANGE = "\N{EN DASH}"


def percent(value: float) -> str:
    """A proportion as a whole percentage; one decimal only where rounding would say 0 or 100 and be wrong."""
    whole = round(100 * value)
    wrong_end = (whole <= 0 < value) or (whole >= 100 and value < 1)
    return _signed(f"{100 * value:.1f}" if wrong_end else str(whole)) + "%"


def percent_range(measured: Measured) -> str:
    """The interval of a share in whole per cent: "78–84%"; empty where none is known."""
    if not measured.has_interval:
        return ""
    low, high = (_signed(str(round(100 * end))) for end in measured.bounds)
    return f"{low}{RANGE}{high}%"


def percent_with_interval(measured: Measured) -> str:
    """ "81% (95% interval 78–84%)"."""
    interval = percent_range(measured)
    return percent(measured.value) + (f" (95% interval {interval})" if interval else "")


def number(value: float, *, decimals: int | None = None) -> str:
    """A number to three significant digits, or to so many decimals; an exponent only where it is very small."""
    if decimals is None:
        if 0 < abs(value) < 1e-4:
            return _signed(f"{value:.1e}")
        decimals = _decimals(value) if value else 0
    return _signed(f"{value:,.{decimals}f}")


def common_decimals(values: Sequence[float]) -> int:
    """The decimals by which a row of numbers compares: three digits of the smallest, if the largest allows."""
    sizes = [abs(value) for value in values if value]
    return min(_decimals(min(sizes)), _decimals(max(sizes)) + 1) if sizes else 0


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value))))


def interval_decimals(measured: Measured) -> int:
    """The decimals that the width of an interval deserves."""
    low, high = measured.bounds
    if high <= low:
        return _decimals(measured.value) if measured.value else 0
    half = (high - low) / 2
    place = math.floor(math.log10(half))
    return max(0, -place + (half < 2 * 10.0**place))  # a second digit where the first is a 1


def value_and_interval(measured: Measured, decimals: int | None = None) -> tuple[str, str]:
    """A value and its interval ("1.33", "1.25 to 1.41"), with the decimals that the interval's width deserves."""
    if not measured.has_interval:
        return number(measured.value, decimals=decimals), ""
    places = interval_decimals(measured) if decimals is None else decimals
    value, low, high = (number(one, decimals=places) for one in (measured.value, *measured.bounds))
    return value, f"{low} to {high}"  # "to", because the ends may be negative


def number_with_interval(measured: Measured) -> str:
    """ "1.33 (1.25 to 1.41)"."""
    value, interval = value_and_interval(measured)
    return f"{value} ({interval})" if interval else value


def compact(value: float) -> str:
    """A large count in few characters: 950, 4.9 M, 1.3 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == "k" else size)
            return f"{scaled:.3g}\u202f{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    hours, minutes = divmod(round(total / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def memory(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:,.1f} GB"


def counted(count: int, one: str, many: str | None = None) -> str:
    """ "1 ranking", "1,200 rankings"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def plain(name: str) -> str:
    """A field name as words: `held_out_raters` becomes "held-out raters"."""
    words = re.sub(r"\bqa\b", "QA", re.sub(r"[_\s]+", " ", name).strip())
    return re.sub(r"\bheld[ -]?out\b", "held-out", words, flags=re.IGNORECASE)


def rater_words(group: str) -> str:
    """A group of raters: `held-out` becomes "held-out raters"."""
    words = plain(group)
    return words if words.endswith("s") else f"{words} raters".strip()


def decoding_words(decoding: str) -> str:
    """`greedy` becomes "greedy decoding", `T=1` "sampling at T=1"."""
    return f"sampling at {decoding}" if "=" in decoding else f"{plain(decoding)} decoding"


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def times_larger(ratio: float) -> str:
    """How much larger a thing is, in words that do not overstate: "more than five times" for 5.5."""
    words = {2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times", 7: "seven times"}
    words |= {8: "eight times", 9: "nine times", 10: "ten times", 100: "a hundred times"}
    nearest = round(ratio)
    if ratio < 1.95:
        return f"{ratio:.1f} times"
    if abs(ratio - nearest) <= 0.03 * ratio:
        return words.get(nearest, f"{nearest:,} times")
    whole = math.floor(ratio)
    return f"more than {words.get(whole, f'{whole:,} times')}"


def shortened(text: str, length: int) -> str:
    """`text` cut to `length` characters, the cut shown."""
    return text if len(text) <= length else text[: max(1, length - 1)].rstrip() + "…"


def _signed(text: str) -> str:
    if not text.startswith("-"):
        return text
    is_zero = not any(digit in "123456789" for digit in text)
    return text[1:] if is_zero else NEGATIVE + text[1:]
