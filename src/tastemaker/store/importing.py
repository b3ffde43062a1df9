"""Rows of files as the items of a study: a prompt, the responses to be judged, and for gold items the known answer.

    demonstration   any shape of a prompt that `tastemaker.shapes` reads
    others          the same with `responses` (a list), or `chosen` and `rejected`; perhaps `finished` and `sources`
    gold            beside that `expected`: an answer as `answer_to_json` writes it, A being the first response

A ranking that the row has already is passed over: it is asked for. What a row holds beside these is kept with the
prompt, never shown to a rater, and written back by exports. A file is read whole or refused whole, with its line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tastemaker import shapes
from tastemaker.errors import DataError, StoreError
from tastemaker.files import read_rows
from tastemaker.records import Prompt, Response
from tastemaker.store.gold import check_expected
from tastemaker.store.questions import Study, checked
from tastemaker.store.tasks import Answer, NewItem, NewOutput, answer_from_json

Found = TypeVar("Found")

UNKNOWN_SOURCE = "unknown"
OURS = ("sources", "expected")


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldItem:
    """A question whose answer is known, in queued letters: A is the output queued first. Demonstrations have none."""

    item: NewItem
    expected: Answer | None


def read_items(path: Path, study: Study, known: Mapping[str, str], *, shown_as: str | None = None) -> list[NewItem]:
    """The items of a file. `known` holds the content hashes of the items that the study has, by key.

    `shown_as` is the file's name in errors, where it was uploaded and lies under another.
    """
    return _read(path, shown_as, _Rows(study, known).items)


def read_gold(path: Path, study: Study, known: Mapping[str, str], *, shown_as: str | None = None) -> list[GoldItem]:
    """The items of a file with their expected answers."""
    return _read(path, shown_as, _Rows(study, known).gold)


def _read(path: Path, shown_as: str | None, rows_in: Callable[[shapes.Row], list[Found]]) -> list[Found]:
    try:
        return read_rows(path, rows_in)
    except DataError as error:
        if shown_as is None:
            raise
        raise DataError(str(error).replace(str(path), shown_as)) from None


class _Rows:
    """Reads rows one by one, so that what is wrong with one is said while its place is known."""

    def __init__(self, study: Study, known: Mapping[str, str]) -> None:
        self._study = study
        self._known = dict(known)

    def items(self, row: shapes.Row) -> list[NewItem]:
        try:
            return [self._item(row)]
        except StoreError as error:
            raise DataError(str(error)) from None

    def gold(self, row: shapes.Row) -> list[GoldItem]:
        try:
            item = self._item(row)
            expected = row.get("expected")
            if expected is None and self._study.kind == "demonstration":
                return [GoldItem(item=item, expected=None)]
            if expected is None:
                raise DataError("the row has no 'expected' answer; a gold item needs one, A being its first response.")
            answer = answer_from_json(self._study.kind, expected)
            check_expected(self._study.kind, answer, len(item.outputs))
            return [GoldItem(item=item, expected=answer)]
        except StoreError as error:
            raise DataError(str(error)) from None

    def _item(self, row: shapes.Row) -> NewItem:
        plain = {key: value for key, value in row.items() if key not in OURS}
        if self._study.kind == "demonstration":
            prompts = shapes.prompts_in(plain)
            if len(prompts) != 1:
                raise DataError(f"the row holds {len(prompts)} prompts; give one a row.")
            item = NewItem(key=prompts[0].key, prompt=prompts[0])
        else:
            prompt, responses = _candidates(plain)
            sources = _sources(row, len(responses))
            item = NewItem(
                key=prompt.key,
                prompt=prompt,
                outputs=tuple(
                    NewOutput(response=response, source=source)
                    for response, source in zip(responses, sources, strict=True)
                ),
            )
        content = checked(self._study, item).content_hash
        if self._known.setdefault(item.key, content) != content:
            raise DataError(
                f"item {item.key!r} is in study {self._study.name!r} (or earlier in this file) already, with another "
                "content; answers belong to what was asked. Give the new one another 'id'."
            )
        return item


def _candidates(row: shapes.Row) -> tuple[Prompt, tuple[Response, ...]]:
    """A prompt and its responses, by the reader of rankings: all tied, as nobody has ranked them yet."""
    responses = row.get("responses")
    if not isinstance(responses, list):
        if row.get("chosen") is None:
            raise DataError("the row has no 'responses'; give the list of responses to be judged.")
        (ranking,) = shapes.rankings_in(row)
        return ranking.prompt, ranking.responses
    if not responses:
        raise DataError("'responses' is empty; give the responses to be judged.")
    # A ranking has two responses or more, a rating perhaps one: it is read twice, and the second left out again.
    times = 2 if len(responses) == 1 else 1
    finished = row.get("finished")
    whole = {
        **row,
        "prompt": _prompt_turns(row),
        "responses": responses * times,
        "finished": finished * times if isinstance(finished, list) else finished,
        "ranking": [list(range(len(responses) * times))],
    }
    (ranking,) = shapes.rankings_in(whole)
    return ranking.prompt, ranking.responses[: len(responses)]


def _prompt_turns(row: shapes.Row) -> object:
    """The row's conversation, whichever shape of prompt it has; a `system` field is added by whoever reads on."""
    if row.get("prompt") is not None:
        return row["prompt"]
    prompts = shapes.prompts_in({key: value for key, value in row.items() if key != "system"})
    if len(prompts) != 1:
        raise DataError(f"the row holds {len(prompts)} prompts; give one a row.")
    return [message.to_json() for message in prompts[0].messages]


def _sources(row: shapes.Row, count: int) -> list[str]:
    sources = row.get("sources")
    if sources is None:
        return ["chosen", "rejected"] if row.get("responses") is None else [UNKNOWN_SOURCE] * count
    if not isinstance(sources, list) or len(sources) != count or not all(isinstance(one, str) for one in sources):
        raise DataError(f"'sources' is {sources!r}; give the name of what wrote each of the {count} responses.")
    return list(sources)
