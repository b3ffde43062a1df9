"""The text of a response while it is being sampled: pieces that are certain, and the texts that end it.

Ids cannot be decoded one by one: a character's bytes may be spread over several, and some tokenizers write a space
before every token but the first. So each is decoded behind those before it, and only what it adds is text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""The exact text of some ids."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose last bytes are missing


class GrowingText:
    """The text of ids that come one at a time, up to the first of `stop_texts`, which is left out."""

    def __init__(self, decode: Decode, stop_texts: Sequence[str] = ()) -> None:
        self._decode, self._stop_texts = decode, stop_texts
        self._ids: list[int] = []
        self._given = 0  # ids before this one have been turned into text
        self._context = 0  # ids from here to `_given` are decoded again, for those after them
        self._held = ""  # text that may turn out to be the beginning of a stop text
        self.stopped_by: str | None = None
        """The stop text that has been completed."""

    def add(self, token: int) -> str:
        """Take the next id. Returns the text that has become certain, which may be none."""
        self._ids.append(token)
        new = self._new_text()
        text = self._held + new
        self.stopped_by = first_in(text, self._stop_texts)
        if self.stopped_by is not None:
            self._held = ""
            return text[: text.index(self.stopped_by)]
        if new.endswith(INCOMPLETE):
            return ""
        self._context, self._given = self._given, len(self._ids)
        certain = len(text) - longest_beginning(text, self._stop_texts)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was held back, once the response has ended."""
        return "" if self.stopped_by is not None else self._held + self._new_text()

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(known) :]


def first_in(text: str, stop_texts: Sequence[str]) -> str | None:
    """Which of these texts comes first in `text`, if any is in it."""
    found = [stop for stop in stop_texts if stop in text]
    return min(found, key=text.index, default=None)


def longest_beginning(text: str, stop_texts: Sequence[str]) -> int:
    """The length of the longest end of `text` that one of these texts begins with."""
    lengths = (length for stop in stop_texts for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)
