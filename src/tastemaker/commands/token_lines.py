"""Sequences of tokens as lines of text: every token bounded, every sign visible, what it is for beside it.

What a token is for stands in words at the left of its line, so nothing is lost without colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from tastemaker.inspection import Seen

BORDER = "│"
VISIBLE = {" ": "·", "\n": "⏎", "\t": "→"}
NO_TEXT = "…"  # of a token that is a part of a character, or adds nothing
LABEL_WIDTH = 22
SHOWN_LEFT_OUT = 30
STYLES = {"left out": "dim strike", "prompt": "blue", "trained": "green", "read": "yellow"}
CONTROL, STOP, SCORE = "bold", "bold magenta", "reverse"
MEANINGS = {
    "prompt": "read, and not learned from",
    "trained": "learned from: the loss is on this token's log-prob behind all those before it",
    "read": "read, without a loss of its own",
    "stop": "the end token: the response was finished, and ends here",
    "score": "the score is read at this token",
    "left out": "cut off before the stage reads anything",
}


def lines_of(seen: Sequence[Seen], *, ids: bool, width: int) -> Iterator[Text]:
    """All that is to be shown of some sequences, line by line."""
    before: Seen | None = None
    for one in seen:
        if before is None or before.example != one.example:
            yield Text()
            yield Text(f"{one.example}{'' if one.title else counts(one)}", style="bold")
        if one.title:
            yield Text(f"  {one.title}{counts(one)}", style="bold")
        known = before is not None and before.example == one.example and _opening(before) == _opening(one)
        yield from _sequence(one, ids=ids, width=width, prompt_is_known=known)
        before = one


def counts(one: Seen) -> str:
    """How many tokens there are, and how many of them are learned from."""
    cut = f", {len(one.left_out)} before them left out" if one.left_out else ""
    return f": {len(one.ids)} tokens, {len(one.trained)} of them trained{cut}"


def legend(seen: Sequence[Seen]) -> Iterator[Text]:
    """What the words at the left mean, as far as they occur."""
    used = {word for one in seen for place in range(len(one.ids)) for word in _label(one, place).split(", ")}
    used |= {"left out"} if any(one.left_out for one in seen) else set()
    yield Text()
    for word, meaning in MEANINGS.items():
        if word in used:
            yield Text.assemble((f"{word:<{LABEL_WIDTH}}", _style(word)), meaning)
    yield Text(f"{BORDER} between tokens; {', '.join(f'{shown} {name}' for shown, name in _signs().items())}")


def _signs() -> Mapping[str, str]:
    return {
        VISIBLE[" "]: "a space",
        VISIBLE["\n"]: "a new line",
        VISIBLE["\t"]: "a tabulator",
        "⟪ ⟫": "a control token",
        NO_TEXT: "a part of a character",
    }


def _sequence(one: Seen, *, ids: bool, width: int, prompt_is_known: bool) -> Iterator[Text]:
    from tastemaker.inspection import token_texts

    controls = one.tokenizer.control_ids

    def shown(tokens: Sequence[int]) -> list[str]:
        texts = token_texts(tokens, one.tokenizer)
        return [
            token_shown(text, token, control=token in controls, ids=ids)
            for text, token in zip(texts, tokens, strict=True)
        ]

    if one.left_out and not prompt_is_known:
        left = shown(one.left_out)
        hidden = len(left) - SHOWN_LEFT_OUT
        left = [f"({hidden} more)", *left[hidden:]] if hidden > 0 else left
        yield from _segment("left out", left, width)
    texts = shown(one.ids)
    start = 0
    if prompt_is_known and one.prompt:
        start = one.prompt
        yield _line("prompt", f"(the same {start} tokens)")
    for label, places in groupby(range(start, len(one.ids)), lambda place: _label(one, place)):
        yield from _segment(label, [texts[place] for place in places], width)
    for note in one.notes:
        yield Text(f"{'':<{LABEL_WIDTH}}({note})", style="italic")


def _opening(one: Seen) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return one.left_out, one.ids[: one.prompt]


def _label(one: Seen, place: int) -> str:
    marks = [one.role(place)] + ["stop"] * (place == one.stop) + ["score"] * (place == one.score)
    return ", ".join(marks)


def _style(label: str) -> str:
    first, *marks = label.split(", ")
    style = STYLES.get(first, "")
    if "stop" in (first, *marks):
        style = STOP
    return f"{style} {SCORE}".strip() if "score" in (first, *marks) else style


def _segment(label: str, tokens: Sequence[str], width: int) -> Iterator[Text]:
    """Tokens of one label, in as many lines as they take; a line ends behind a token that ends one."""
    room, line, used, first = max(20, width - LABEL_WIDTH), list[str](), 0, True
    for token in tokens:
        size = cell_len(token) + len(BORDER)
        if line and used + size > room:
            yield _line(label if first else "", BORDER.join(line), label)
            line, used, first = [], 0, False
        line.append(token)
        used += size
        if VISIBLE["\n"] in token:
            yield _line(label if first else "", BORDER.join(line), label)
            line, used, first = [], 0, False
    if line:
        yield _line(label if first else "", BORDER.join(line), label)


def _line(shown: str, text: str, label: str | None = None) -> Text:
    style = _style(shown if label is None else label)
    return Text.assemble((f"{shown:<{LABEL_WIDTH}}", ""), (text, style))


def token_shown(text: str, token: int, *, control: bool, ids: bool) -> str:
    """A token's text with all its signs visible; a terminal obeys none of them."""
    shown = visible(text) if text else NO_TEXT
    shown = f"⟪{shown}⟫" if control else shown
    return f"{shown}={token}" if ids else shown


def visible(text: str) -> str:
    """Spaces and line ends as signs, and whatever a terminal would not print as Python writes it."""
    return "".join(VISIBLE.get(sign, sign if sign.isprintable() else _escaped(sign)) for sign in text)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
