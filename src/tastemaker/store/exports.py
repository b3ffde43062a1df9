"""Answers as files, in the shapes that training reads, with a manifest that says what they are.

    FOLDER/
      manifest.json     studies, guidelines with their texts, raters by pseudonym, counts and hashes of the files
      train.jsonl  validation.jsonl  test.jsonl     answers of the groups that train, split by the prompt's author
      held-out.jsonl                                answers of the groups that are held out to judge
      pairs/...                                     of rankings, if asked: each untied pair as chosen and rejected

A prompt keeps the split that it has; else all prompts of one author go the same way, by a hash. Raters go by
pseudonyms, which are the same in every export of a store and tell nothing: they come from the random token of a
rater's first lease, which nobody else has seen. Unless an export is unblinded, an item's responses stand in an order of
its own: the one in which they were queued may tell what wrote them. What people and what simulated raters said never
shares an export. An adjudicated answer stands in place of the raters' and is marked. The folder appears whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Literal, get_args

import sqlalchemy as sa

from tastemaker import __version__
from tastemaker.artefacts import hash_tree
from tastemaker.config import to_json
from tastemaker.errors import ConfigError, DataError, StoreError
from tastemaker.files import atomic_write, sync_folder, write_json
from tastemaker.records import Author, Demonstration, Prompt, Split, with_about
from tastemaker.store import adjudication, audit, questions
from tastemaker.store.audit import Actor
from tastemaker.store.database import Store
from tastemaker.store.given import Given, Item, all_given, as_ranking, of_studies
from tastemaker.store.gold import in_shown_letters
from tastemaker.store.questions import Study
from tastemaker.store.schema import guidelines, leases, raters, studies
from tastemaker.store.tasks import (
    LETTERS,
    Answer,
    ComparisonAnswer,
    DemonstrationAnswer,
    RankingAnswer,
    RatingAnswer,
)

Row = dict[str, object]
Format = Literal["jsonl", "parquet"]

MANIFEST = "manifest.json"
HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What an export holds beside the answers themselves."""

    format: Format = "jsonl"
    validation: float = 0.1
    """The share of authors whose prompts are kept for validation, of those without a split."""
    test: float = 0.0
    """The share of authors whose prompts are kept for the test."""
    held_out_groups: tuple[str, ...] = ()
    """Rater groups whose answers are kept apart."""
    pairs: bool = False
    """Rankings and comparisons as pairs too. Ties have no pair: they are counted in the manifest."""
    adjudicated: bool = True
    """Whether an adjudicated answer stands in place of the raters'."""
    seed: int = 0
    """Of the splits."""

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ConfigError(f"format is {self.format!r}; it must be one of {', '.join(get_args(Format))}.")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ConfigError(
                f"validation is {self.validation} and test {self.test}; both are shares that leave some for training."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written: the number of answers in each file, by its name."""

    folder: Path
    answers: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """An answer that goes into the export: a rater's, or an adjudicator's (who has no pseudonym)."""

    item: Item
    answer: Answer
    author: Author
    adjudicated: bool
    given: Given | None


class Exports:
    """Writes exports of one kind of study at a time."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def export(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        actor: Actor,
        config: ExportConfig = ExportConfig(),
        unblind_reason: str | None = None,
    ) -> ExportReport:
        """Write the answers of studies of one kind into a new folder.

        What wrote the outputs is left out, unless a reason for unblinding is given, which is audited.
        """
        if folder.exists():
            raise DataError("exists already; an export is a new folder, so name another.", path=folder)
        if unblind_reason is not None and not unblind_reason.strip():
            raise StoreError("Unblinding needs a reason; it is written into the audit log.")
        with self._store.read() as connection:
            found = [questions.find(connection, name) for name in dict.fromkeys(names)]
            answered = _answered(connection, found, config)
            known = _manifest(connection, found, answered, config)
        if unblind_reason is None:
            by_name = {study.name: study for study in found}
            answered = [_reordered(row, by_name[row.item.study]) for row in answered]
        files, ties = _files(answered, config, unblinded=unblind_reason is not None)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            for name, rows in files.items():
                _write(aside / f"{name}.{config.format}", rows, config.format)
            counts = {f"{name}.{config.format}": len(rows) for name, rows in files.items()}
            hashes = hash_tree(aside)
            manifest = known | {
                "files": {name: {"rows": counts[name], "hash": hashes[name]} for name in counts},
                "tied_pairs_left_out": ties if config.pairs else None,
                "unblinded": unblind_reason is not None,
                "exported_at": self._clock(),
            }
            write_json(aside / MANIFEST, manifest)
            self._record(actor, found, counts, hashes, unblind_reason)
            sync_folder(aside)
            aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(folder.parent)
        return ExportReport(folder=folder, answers=counts)

    def _record(
        self,
        actor: Actor,
        found: Sequence[Study],
        counts: Mapping[str, int],
        hashes: Mapping[str, str],
        unblind_reason: str | None,
    ) -> None:
        """Before the folder gets its name: no export without its row."""
        with self._store.write() as connection:
            about = ", ".join(study.name for study in found)
            details: dict[str, object] = {"files": dict(counts), "hashes": dict(hashes)}
            audit.record(connection, actor, "export", about, details, now=self._clock())
            if unblind_reason is not None:
                unblinding = {"reason": unblind_reason, "by": "export"}
                audit.record(connection, actor, "study.unblind", about, unblinding, now=self._clock())


# --- what is exported -----------------------------------------------------------------------------------------------


def _answered(connection: sa.Connection, found: Sequence[Study], config: ExportConfig) -> list[_Answered]:
    kinds = sorted({study.kind for study in found})
    if len(kinds) != 1:
        raise StoreError(f"An export is of one kind of study; given were {', '.join(kinds) or 'none'}.")
    ids = [study.id for study in found]
    given = [one for one in all_given(connection, of_studies(ids)) if one.counts and one.is_work]
    if not given:
        raise StoreError("These studies have no answers that count yet, so there is nothing to export.")
    origins = sorted({one.origin for one in given})
    if len(origins) > 1:
        raise StoreError("These studies hold answers of people and of simulated raters; export them one by one.")
    settled = adjudication.newest(connection, ids) if config.adjudicated else {}
    if settled and origins == ["simulated"]:
        raise StoreError(
            "People have adjudicated answers of simulated raters here; an export is of one origin. Export without the "
            "adjudicated answers."
        )
    pseudonyms = _pseudonyms(connection)
    rows: list[_Answered] = []
    done: set[int] = set()
    for one in given:
        if one.item.id not in settled:
            author = replace(one.author, rater=pseudonyms[one.rater])
            rows.append(_Answered(item=one.item, answer=one.answer, author=author, adjudicated=False, given=one))
        elif one.item.id not in done:
            done.add(one.item.id)
            author = replace(one.author, rater=None)
            answer = settled[one.item.id]
            rows.append(_Answered(item=one.item, answer=answer, author=author, adjudicated=True, given=None))
    return rows


def _pseudonyms(connection: sa.Connection) -> dict[str, str]:
    """A name for each rater: a hash of the token of their first lease, which is random and is never changed."""
    first = sa.select(sa.func.min(leases.c.id)).group_by(leases.c.rater_id)
    rows = connection.execute(
        sa.select(raters.c.name, leases.c.token)
        .join(leases, leases.c.rater_id == raters.c.id)
        .where(leases.c.id.in_(first))
    )
    return {
        row.name: "rater-" + hashlib.blake2b(row.token.encode(), digest_size=5, person=b"pseudonym").hexdigest()
        for row in rows
    }


def _manifest(
    connection: sa.Connection, found: Sequence[Study], answered: Sequence[_Answered], config: ExportConfig
) -> Row:
    versions = sorted({row.author.guideline_version for row in answered if row.author.guideline_version is not None})
    texts = connection.execute(
        sa.select(guidelines.c.version, guidelines.c.text)
        .where(guidelines.c.version.in_(versions))
        .order_by(guidelines.c.version)
    )
    purposes = connection.execute(
        sa.select(studies.c.name, studies.c.purpose).where(studies.c.id.in_([study.id for study in found]))
    )
    purpose = {row.name: row.purpose for row in purposes}
    of_rater = Counter((row.author.rater, row.author.rater_group) for row in answered if not row.adjudicated)
    return {
        "kind": found[0].kind,
        "origin": answered[0].author.origin,
        "studies": [
            {
                "name": study.name,
                "purpose": purpose[study.name],
                "rater_group": study.rater_group,
                "answers": sum(row.item.study == study.name for row in answered),
            }
            for study in found
        ],
        "guidelines": {row.version: row.text for row in texts},
        "raters": [
            {"rater": rater, "rater_group": group, "answers": count}
            for (rater, group), count in sorted(of_rater.items(), key=str)
        ],
        "adjudicated": sum(row.adjudicated for row in answered),
        "config": to_json(config),
        "tastemaker": __version__,
    }


def split_of(prompt: Prompt, config: ExportConfig) -> Split:
    """The split that a prompt has, or the one of its author: nobody's prompts stand in two."""
    if prompt.about.split is not None:
        return prompt.about.split
    author = f"user {prompt.about.user}" if prompt.about.user is not None else f"prompt {prompt.key}"
    digest = hashlib.blake2b(f"{config.seed}|{author}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < config.validation:
        return "validation"
    return "test" if place < config.validation + config.test else "train"


def _reordered(row: _Answered, study: Study) -> _Answered:
    """The same answer, with the item's outputs in its blind order."""
    order = questions.blind_order(study, row.item.key, len(row.item.outputs))
    item = replace(row.item, outputs=tuple(row.item.outputs[index] for index in order))
    given = row.given
    if given is not None:
        given = replace(given, order_shown=tuple(order.index(index) for index in given.order_shown))
    return replace(row, item=item, answer=in_shown_letters(row.answer, order), given=given)


# --- rows and files -------------------------------------------------------------------------------------------------


def _files(answered: Sequence[_Answered], config: ExportConfig, *, unblinded: bool) -> tuple[dict[str, list[Row]], int]:
    """The rows of each file, and how many pairs were tied. A file of no rows is not written."""
    files: dict[str, list[Row]] = {}
    ties = 0
    for row in answered:
        split = split_of(row.item.prompt, config)
        name = HELD_OUT if row.author.rater_group in config.held_out_groups else split
        prompt = with_about(row.item.prompt, split=split)
        if row.adjudicated:
            prompt = with_about(prompt, extra={**prompt.about.extra, "adjudicated": True})
        marked = replace(row, item=replace(row.item, prompt=prompt))
        files.setdefault(name, []).extend(_rows(marked, unblinded=unblinded))
        if config.pairs and isinstance(row.answer, RankingAnswer | ComparisonAnswer):
            pairs, tied = _pairs(marked)
            ties += tied
            files.setdefault(f"pairs/{name}", []).extend(pairs)
    return {name: rows for name, rows in files.items() if rows}, ties


def _rows(row: _Answered, *, unblinded: bool) -> Iterable[Row]:
    sources = [output.source for output in row.item.outputs]
    if isinstance(row.answer, DemonstrationAnswer):
        yield Demonstration(prompt=row.item.prompt, response=row.answer.text, author=row.author).to_json()
    elif isinstance(row.answer, RatingAnswer):
        yield from _ratings(row, row.answer, unblinded=unblinded)
    else:
        ranking = as_ranking(row.item, row.answer, row.author).to_json()
        if row.given is not None:
            ranking["order_shown"] = list(row.given.order_shown)
        yield ranking | ({"sources": sources} if unblinded else {})


def _ratings(row: _Answered, answer: RatingAnswer, *, unblinded: bool) -> Iterable[Row]:
    about = row.item.prompt.about.to_json() | row.author.to_json()
    for letter, output in zip(LETTERS, row.item.outputs, strict=False):
        rating = answer.ratings[letter]
        rated: Row = {
            "prompt": [message.to_json() for message in row.item.prompt.messages],
            "response": output.response.text,
            "finished": output.response.finished,
            "likert": rating.likert,
            "flags": list(rating.flags),
        }
        yield rated | ({"source": output.source} if unblinded else {}) | about


def _pairs(answered: _Answered) -> tuple[list[Row], int]:
    assert isinstance(answered.answer, RankingAnswer | ComparisonAnswer)
    ranking = as_ranking(answered.item, answered.answer, answered.author)
    about = ranking.prompt.about.to_json() | ranking.author.to_json()
    prompt = [message.to_json() for message in ranking.prompt.messages]
    rows: list[Row] = []
    for better, worse in combinations(ranking.order, 2):
        for chosen, rejected in product(better, worse):
            both = (ranking.responses[chosen], ranking.responses[rejected])
            if both[0].text != both[1].text:  # equal texts would be read back as a tie
                finished = [response.finished for response in both]
                row: Row = {"prompt": prompt, "chosen": both[0].text, "rejected": both[1].text}
                rows.append(row | ({} if all(finished) else {"finished": finished}) | about)
    tied = sum(len(group) * (len(group) - 1) // 2 for group in ranking.order)
    return rows, tied


def _write(path: Path, rows: Sequence[Row], format: Format) -> None:
    if format == "jsonl":
        with atomic_write(path) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        return
    import pyarrow
    from pyarrow import parquet

    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
        with atomic_write(path, binary=True) as binary:
            parquet.write_table(table, binary)
    except (pyarrow.ArrowException, TypeError) as error:
        raise DataError(f"the prompts' extra fields do not fit into columns ({error}); export as jsonl.") from None
