"""The records that stages exchange, and the shapes in which they are read from and written to files.

A prompt is always a conversation (`Messages`); a plain string is one user turn. Optional fields (`id, user, category,
split, rater, rater_group, origin, guideline_version`) may stand on any record, and fields that are not ours are kept
in `extra` and written back unchanged. A ranking is a weak order of response indices, best group first:
`[[2], [0, 3], [1]]` says that 2 is best, 0 and 3 tie, 1 is worst.

Bad input is refused whole, with file and line; nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tastemaker.errors import DataError

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation", "test"]
Origin = Literal["human", "simulated"]
WeakOrder = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What may be known about a prompt or a text. `extra` holds the fields that are not ours."""

    id: str | None = None
    user: str | None = None
    category: str | None = None
    split: Split | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return _given_fields(self, ABOUT_FIELDS) | dict(self.extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Who gave an answer, and under which guideline."""

    rater: str | None = None
    rater_group: str | None = None
    origin: Origin | None = None
    guideline_version: str | None = None

    def to_json(self) -> dict[str, Any]:
        return _given_fields(self, AUTHOR_FIELDS)


ABOUT_FIELDS = ("id", "user", "category", "split")
AUTHOR_FIELDS = ("rater", "rater_group", "origin", "guideline_version")
NOTHING_KNOWN = About()
UNKNOWN_AUTHOR = Author()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation whose next turn is the assistant's."""

    messages: Messages
    about: About = NOTHING_KNOWN

    @property
    def key(self) -> str:
        """The record's id, or a hash of its text: what answers, seeds and splits are keyed by."""
        return self.about.id or messages_hash(self.messages)

    def to_json(self) -> dict[str, Any]:
        return {"messages": [message.to_json() for message in self.messages]} | self.about.to_json()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and the response a person wrote for it."""

    prompt: Prompt
    response: str
    author: Author = UNKNOWN_AUTHOR

    def to_json(self) -> dict[str, Any]:
        turns = (*self.prompt.messages, Message("assistant", self.response))
        about = self.prompt.about.to_json() | self.author.to_json()
        return {"messages": [message.to_json() for message in turns]} | about


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A response to a prompt. `finished` is False where it was cut off at the length limit."""

    text: str
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """K responses to one prompt and one rater's weak order of them, best first."""

    prompt: Prompt
    responses: tuple[Response, ...]
    order: WeakOrder
    author: Author = UNKNOWN_AUTHOR

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each response: 0 is best, equal ranks are ties."""
        rank_of = {index: rank for rank, group in enumerate(self.order) for index in group}
        return tuple(rank_of[index] for index in range(len(self.responses)))

    @property
    def untied_pairs(self) -> list[tuple[int, int]]:
        """The pairs that say something: responses of different texts that are not tied, as places, better one first."""
        ranks, texts = self.ranks, [response.text for response in self.responses]
        places = range(len(ranks))
        return [(one, two) for one in places for two in places if ranks[one] < ranks[two] and texts[one] != texts[two]]

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "prompt": [message.to_json() for message in self.prompt.messages],
            "responses": [response.text for response in self.responses],
            "ranking": [list(group) for group in self.order],
        }
        if not all(response.finished for response in self.responses):
            row["finished"] = [response.finished for response in self.responses]
        return row | self.prompt.about.to_json() | self.author.to_json()


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document of plain text, for pretraining."""

    text: str
    about: About = NOTHING_KNOWN

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text} | self.about.to_json()


def about_from_json(row: Mapping[str, Any], *, used: Sequence[str]) -> About:
    """Read the optional fields of `row` that say what it is; what is neither ours nor in `used` goes to `extra`."""
    named = {name: str(row[name]) for name in ABOUT_FIELDS if row.get(name) is not None}
    _check_choice("split", named.get("split"), get_args(Split))
    taken = {*ABOUT_FIELDS, *AUTHOR_FIELDS, *used}
    extra = {key: value for key, value in row.items() if key not in taken}
    return About(**named, extra=extra)  # type: ignore[arg-type]


def author_from_json(row: Mapping[str, Any]) -> Author:
    """Read the optional fields of `row` that say who answered."""
    named = {name: str(row[name]) for name in AUTHOR_FIELDS if row.get(name) is not None}
    _check_choice("origin", named.get("origin"), get_args(Origin))
    return Author(**named)  # type: ignore[arg-type]


def messages_hash(messages: Messages) -> str:
    """A short stable hash of a conversation."""
    text = json.dumps([message.to_json() for message in messages], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def records_hash(records: Sequence[Prompt | Demonstration | Ranking | Text]) -> str:
    """A hash of records in their order; of what JSON has no form for only the type counts."""
    hashed = hashlib.blake2b(digest_size=16)
    for record in records:
        row = json.dumps(record.to_json(), skipkeys=True, default=lambda value: type(value).__name__)
        hashed.update(f"{row}\n".encode())
    return hashed.hexdigest()


def with_about(prompt: Prompt, **changes: Any) -> Prompt:
    """`prompt` with some of its optional fields replaced."""
    return replace(prompt, about=replace(prompt.about, **changes))


def _given_fields(record: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names if getattr(record, name) is not None}


def _check_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise DataError(f"{name!r} is {value!r}; it must be one of {', '.join(allowed)}.")


def check_weak_order(order: Any, count: int) -> WeakOrder:
    """Validate that `order` (nested lists) mentions each of `count` responses exactly once.

    Raises DataError that says what is missing, doubled or unknown.
    """
    if not isinstance(order, list) or not order:
        raise DataError(f"'ranking' is {order!r}; expected groups of indices, best first, such as [[1], [0, 2]].")
    groups = [group if isinstance(group, list) else [group] for group in order]
    flat = [index for group in groups for index in group]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in flat):
        raise DataError(f"'ranking' is {order!r}; its entries must be whole numbers, the indices of the responses.")
    if sorted(flat) != list(range(count)) or not all(groups):
        missing = sorted(set(range(count)) - set(flat))
        unknown = sorted(set(flat) - set(range(count)))
        doubled = sorted({index for index in flat if flat.count(index) > 1})
        problems = [
            f"{what} {', '.join(map(str, found))}"
            for what, found in (("missing", missing), ("unknown", unknown), ("repeated", doubled))
            if found
        ] or ["an empty group"]
        raise DataError(
            f"'ranking' {order!r} must name each of the {count} responses (0 to {count - 1}) exactly once; "
            f"{'; '.join(problems)}."
        )
    return tuple(tuple(group) for group in groups)
