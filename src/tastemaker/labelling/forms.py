"""What forms of the leads' pages hold, and how it is read: text that can be stored, numbers, uploads, answers.

Fields come in as text, so that a page can show again what was typed, and are read here; what is wrong with one is an
error of one sentence.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast
from urllib.parse import urlencode

from fastapi import Depends, Form, Query, UploadFile
from pydantic import AfterValidator
from starlette.datastructures import FormData
from starlette.requests import Request

from tastemaker.errors import StoreError
from tastemaker.labelling.web import Page, not_found
from tastemaker.store.lead import StudyOverview
from tastemaker.store.tasks import (
    FLAGS,
    LIKERT_POINTS,
    Answer,
    Choice,
    ComparisonAnswer,
    OutputRating,
    RankingAnswer,
    RatingAnswer,
    StudyKind,
)

# What an upload may be: a packed file could unpack to anything.
UPLOADS = (".jsonl", ".json", ".csv", ".parquet")


def _plain(text: str) -> str:
    """The text with line breaks as they are stored (forms send CR LF), if a database can hold it."""
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it holds a character that cannot be stored")
    return text.replace("\r\n", "\n").replace("\r", "\n")


Text = Annotated[str, AfterValidator(_plain)]
Field = Annotated[Text, Form()]
Asked = Annotated[Text, Query()]


async def _form_of(request: Request) -> FormData:
    return await request.form()


# All fields of a form whose names depend on what is asked.
Fields = Annotated[FormData, Depends(_form_of)]


def plain(fields: Mapping[str, object], name: str) -> str:
    """A text field among `Fields`; empty if it is missing."""
    try:
        return _plain(_text(fields, name))
    except ValueError as error:
        raise StoreError(f"The field {name!r} cannot be read: {error}.") from None


def at(path: str, **query: object) -> str:
    """An address with a query; studies and raters are named there, as their names may hold a slash."""
    return f"{path}?{urlencode({name: str(value) for name, value in query.items()})}"


def known_study(page: Page, name: str) -> StudyOverview:
    """The study of that name, or there is no such page."""
    for study in page.services.lead.studies():
        if study.name == name:
            return study
    not_found()


def whole(text: str, what: str, *, least: int, most: int) -> int:
    """A whole number that was typed."""
    plain = text.strip()
    if not (plain.isascii() and plain.isdecimal() and len(plain) < 12 and least <= int(plain) <= most):
        raise StoreError(f"The {what} is {plain[:40]!r}; it must be a whole number from {least} to {most}.")
    return int(plain)


def number(text: str, what: str, *, least: float, most: float) -> float:
    """A number that was typed."""
    try:
        found = float(text.strip().replace(",", "."))
    except ValueError:
        found = math.nan
    if not least <= found <= most:
        raise StoreError(f"The {what} is {text.strip()[:40]!r}; it must be a number from {least:g} to {most:g}.")
    return found


def percent(text: str, what: str, *, most: float = 100) -> float:
    """A share that was typed in percent."""
    return number(text.strip().removesuffix("%"), f"{what}, in percent,", least=0, most=most) / 100


@contextmanager
def uploaded(file: UploadFile | None) -> Iterator[tuple[Path, str]]:
    """An uploaded file where readers can open it, and the name that errors call it."""
    name = Path((file.filename if file is not None else None) or "").name
    suffix = Path(name).suffix.lower()
    if file is None or not name:
        raise StoreError("No file was chosen; choose one first.")
    if suffix not in UPLOADS:
        raise StoreError(f"The name of {name[-80:]!r} must end in one of {', '.join(UPLOADS)}, by which it is read.")
    with tempfile.TemporaryDirectory(prefix="tastemaker-upload-") as folder:
        path = Path(folder, f"upload{suffix}")
        with path.open("wb") as target:
            while chunk := file.file.read(1 << 20):
                target.write(chunk)
        yield path, name[-80:]


def answer_in(kind: StudyKind, letters: Sequence[str], fields: Mapping[str, object]) -> Answer:
    """The answer that a form's fields give: `rank-A`, `choice`, or `likert-A` and the flags `flag-A-NAME`."""
    if kind == "ranking":
        ranks = [
            whole(_text(fields, f"rank-{letter}"), f"place of {letter}", least=1, most=len(letters))
            for letter in letters
        ]
        groups = (tuple(letter for letter, rank in zip(letters, ranks, strict=True) if rank == one) for one in ranks)
        best_first = sorted(dict.fromkeys(groups), key=lambda group: ranks[letters.index(group[0])])
        return RankingAnswer(tuple(best_first))
    if kind == "comparison":
        return ComparisonAnswer(cast(Choice, _text(fields, "choice")))  # the store refuses what is none
    return RatingAnswer(
        {
            letter: OutputRating(
                whole(_text(fields, f"likert-{letter}"), f"quality of {letter}", least=1, most=LIKERT_POINTS),
                tuple(flag for flag in FLAGS if fields.get(f"flag-{letter}-{flag}")),
            )
            for letter in letters
        }
    )


def _text(fields: Mapping[str, object], name: str) -> str:
    found = fields.get(name, "")
    return found if isinstance(found, str) else ""
