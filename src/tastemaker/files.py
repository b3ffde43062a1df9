"""Files in and files out: where rows come from, and how anything is written.

Read: `.jsonl`, `.json` (an array), `.csv`, `.tsv`, `.txt` (documents separated by blank lines) and each of them with
`.gz` behind it; `.parquet`; a folder saved by `datasets`; or the name of a data set, `org/name:split`, for which the
extra `tastemaker[datasets]` must be installed. What a row may look like is in `shapes`.

A file is read whole or refused whole, with its line (or row, counted from 1) in the message. The one exception is
asked for by the caller: with a list passed as `skipped`, well-formed rows that are of no use are left out and noted
there. Written files appear complete or not at all: written aside, flushed to the disk, renamed. Of several processes
that work together all write the same, and what the first one writes is kept.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import IO, BinaryIO, Literal, NoReturn, TextIO, TypeVar, overload

from tastemaker import processes, shapes
from tastemaker.errors import DataError
from tastemaker.records import Demonstration, Prompt, Ranking, Text

Read = TypeVar("Read")

DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A row that was left out, where it stands and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a row stands: a line of a text file, or the n-th row of a source that has no lines."""

    source: str
    number: int
    unit: Literal["line", "row"]

    def error(self, message: str) -> DataError:
        if self.unit == "line":
            return DataError(message, path=self.source, line=self.number)
        return DataError(f"row {self.number}: {message}", path=self.source)

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


_Rows = Iterator[tuple[_Place, object]]


# --- reading --------------------------------------------------------------------------------------------------------


def read_prompts(source: str | Path, *, skipped: list[Skipped] | None = None) -> list[Prompt]:
    """The prompts of a source. Files of demonstrations or rankings give theirs, where the keys leave no doubt."""
    return _read(source, shapes.prompts_in, skipped)


def read_demonstrations(source: str | Path, *, skipped: list[Skipped] | None = None) -> list[Demonstration]:
    """The demonstrations of a source."""
    return _read(source, shapes.demonstrations_in, skipped)


def read_rankings(source: str | Path, *, skipped: list[Skipped] | None = None) -> list[Ranking]:
    """The rankings of a source; `chosen` and `rejected` make a ranking of two."""
    return _read(source, shapes.rankings_in, skipped)


def read_texts(source: str | Path, *, skipped: list[Skipped] | None = None) -> list[Text]:
    """The documents of a source."""
    return _read(source, shapes.texts_in, skipped)


def read_rows(source: str | Path, rows_in: Callable[[shapes.Row], list[Read]]) -> list[Read]:
    """What `rows_in` makes of each row of a source, whole or refused whole: a DataError of a row gets its place."""
    return _read(source, rows_in, None)


def describe_skipped(skipped: list[Skipped], *, source: str | Path) -> str:
    """One sentence for people: how many rows were left out, and where the first of them are."""
    first = "; ".join(f"{one.place}: {one.reason.rstrip('.')}" for one in skipped[:3])
    return f"{source}: left out {_rows_counted(len(skipped))} that cannot be used ({first})"


def _read(
    source: str | Path, records_in: Callable[[shapes.Row], list[Read]], skipped: list[Skipped] | None
) -> list[Read]:
    records: list[Read] = []
    unusable: list[tuple[_Place, str]] = []
    count = 0
    for place, row in _rows(source):
        count += 1
        if not isinstance(row, dict):
            hint = " A JSON array belongs in a file named .json." if isinstance(row, list) else ""
            raise place.error(f"expected a JSON object, found {type(row).__name__}.{hint}")
        try:
            records += records_in(row)
        except shapes.Unusable as error:
            unusable.append((place, str(error)))
        except DataError as error:
            raise place.error(str(error)) from None
    if unusable and skipped is None:
        place, reason = unusable[0]
        raise place.error(f"{reason} {_rows_counted(len(unusable))} of {count} cannot be used; repair or remove them.")
    if not records and not count:
        raise DataError("is empty; it holds no row.", path=source)
    if not records:
        why = f"; {unusable[0][0]}: {unusable[0][1].rstrip('.')}" if unusable else ""
        raise DataError(f"no record in it can be used ({_rows_counted(count)} read{why}).", path=source)
    if skipped is not None:
        skipped += [Skipped(place=str(place), reason=reason) for place, reason in unusable]
    return records


def _rows_counted(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _rows(source: str | Path) -> _Rows:
    """The rows of a source, each with its place."""
    path = Path(source)
    if path.is_file():
        return _rows_of_file(path)
    name, *parts = str(source).split(":")
    if Path(name).is_dir():
        return _rows_of_saved_dataset(str(source), Path(name), parts)
    if isinstance(source, str) and DATASET_NAME.fullmatch(source) and _suffix(path) not in READERS:
        return _rows_of_hub_dataset(source, name, parts)
    raise DataError("there is no such file.", path=source)


def _rows_of_file(path: Path) -> _Rows:
    read = READERS.get(_suffix(path))
    if read is None:
        raise DataError(
            f"cannot tell how to read it: its name ends in {path.suffix!r}. Accepted: "
            f"{', '.join(READERS)} (all but .parquet also with .gz behind), a folder saved by datasets, "
            "or the name of a data set as org/name:split.",
            path=path,
        )
    try:
        yield from read(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}.", path=path) from error


def _suffix(path: Path) -> str:
    """`.jsonl` for `a.jsonl` and for `a.jsonl.gz`; a packed parquet file has none, as nothing reads it."""
    name = Path(path.stem) if path.suffix.lower() == ".gz" else path
    suffix = name.suffix.lower()
    return "" if suffix == ".parquet" and name is not path else suffix


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1; a byte order mark is dropped, a `.gz` unpacked."""
    number = 0
    packed = path.suffix.lower() == ".gz"
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            message = f"not UTF-8: byte 0x{byte:02x} at position {error.start + 1} of the line. Convert the file."
            raise DataError(message, path=path, line=number) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            message = f"the gzip data is cut off or damaged ({error}). Fetch or pack the file again."
            raise DataError(message, path=path, line=number + 1) from None


def _rows_of_jsonl(path: Path) -> _Rows:
    for number, line in _lines(path):
        place = _Place(source=str(path), number=number, unit="line")
        if line.strip() == "[":
            raise place.error("an array begins here. A JSON array belongs in a file named .json.")
        if line.strip():
            yield place, _parse_json(line.rstrip("\r\n"), place)


def _rows_of_json(path: Path) -> _Rows:
    lines = [line for _, line in _lines(path)]
    text = "".join(lines)
    if not text.strip():
        return
    try:
        values = _parse_json(text, _Place(source=str(path), number=1, unit="line"))
    except DataError as error:
        hint = " One object a line belongs in a file named .jsonl." if lines[0].strip().endswith("}") else ""
        raise DataError(f"{error}{hint}") from None
    if not isinstance(values, list):
        raise DataError(f"expected an array of objects, found {type(values).__name__}.", path=path)
    for number, value in enumerate(values, 1):
        yield _Place(source=str(path), number=number, unit="row"), value


def _parse_json(text: str, place: _Place) -> object:
    """JSON as the standard has it: no NaN, no half of a character pair, which no UTF-8 file could hold again."""
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
        if SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = _Place(source=place.source, number=place.number + error.lineno - 1, unit="line")
        raise where.error(f"invalid JSON: {error.msg} at column {error.colno}.") from None
    except UnicodeEncodeError:
        raise place.error("invalid text: a \\ud800-\\udfff escape without its other half.") from None
    except RecursionError:
        raise place.error("invalid JSON: nested too deeply.") from None
    except ValueError as error:
        raise place.error(f"invalid JSON: {error}.") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null")


def _rows_of_csv(path: Path) -> _Rows:
    """Rows under a header. An empty cell is an absent value: no user is called ''."""
    lines = (line for _, line in _lines(path))
    reader = csv.DictReader(lines, delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
    end = 0
    try:
        header = reader.fieldnames or ()
        end = reader.line_num
        for row in reader:
            place = _Place(source=str(path), number=end + 1, unit="line")
            end = reader.line_num
            if None in row or None in row.values():
                raise place.error(f"expected {len(header)} fields, as the header has.")
            yield place, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise DataError(f"invalid CSV: {error}.", path=path, line=end + 1) from None


def _rows_of_text(path: Path) -> _Rows:
    """Documents separated by blank lines, each placed at its first line."""
    start, document = 0, ""
    for number, line in _lines(path):
        if line.strip():
            start, document = (start, document) if document else (number, "")
            document += line.replace("\r\n", "\n")
        elif document:
            yield _Place(source=str(path), number=start, unit="line"), {"text": document.rstrip("\n")}
            document = ""
    if document:
        yield _Place(source=str(path), number=start, unit="line"), {"text": document.rstrip("\n")}


def _rows_of_parquet(path: Path) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from _numbered(str(path), (row for batch in batches for row in batch.to_pylist()))
    except pyarrow.ArrowException as error:
        raise DataError(f"not a whole parquet file: {error}.", path=path) from None


READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _rows_of_jsonl,
    ".json": _rows_of_json,
    ".csv": _rows_of_csv,
    ".tsv": _rows_of_csv,
    ".parquet": _rows_of_parquet,
    ".txt": _rows_of_text,
}


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder (`save_to_disk`)."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _rows_of_saved_dataset(source: str, folder: Path, parts: list[str]) -> _Rows:
    """A folder written by `save_to_disk`; `folder:split` where it holds several."""
    if not is_saved_dataset(folder):
        raise DataError("is a folder, and not one saved by datasets; name a file in it.", path=source)
    datasets = _import_datasets(source)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library promises no types; all it says is that the folder does not load
        raise DataError(f"datasets cannot load this folder: {error}.", path=source) from error
    if isinstance(loaded, dict) and (len(parts) != 1 or parts[0] not in loaded):
        raise DataError(f"say which split, as {folder}:SPLIT. It has: {', '.join(loaded)}.", path=source)
    if not isinstance(loaded, dict) and parts:
        raise DataError(f"this folder has no splits; name it as {folder}.", path=source)
    return _numbered(source, loaded[parts[0]] if isinstance(loaded, dict) else loaded)


def _rows_of_hub_dataset(source: str, name: str, parts: list[str]) -> _Rows:
    """`name:split` or `name:configuration:split`."""
    if not parts:
        raise DataError(f"there is no such file; if it is a data set, say which split, as {source}:train.", path=source)
    datasets = _import_datasets(source)
    *configuration, split = parts
    try:
        loaded = datasets.load_dataset(name, *configuration, split=split)
    except Exception as error:  # the hub client raises types of several libraries
        raise DataError(f"there is no such file, and datasets cannot load it: {error}", path=source) from error
    return _numbered(source, loaded)


def _import_datasets(source: str):  # type: ignore[no-untyped-def]  # a module of an optional library without types
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            'reading a data set needs the library datasets: pip install "tastemaker[datasets]". '
            "If you meant a file: there is none of this name.",
            path=source,
        ) from error
    return datasets


def _numbered(source: str, rows: Iterable[object]) -> _Rows:
    for number, row in enumerate(rows, 1):
        yield _Place(source=source, number=number, unit="row"), row


# --- writing --------------------------------------------------------------------------------------------------------


def write_records(path: Path, records: Iterable[Prompt | Demonstration | Ranking | Text]) -> None:
    """Write records as JSONL, in a shape that reads back as the same records."""
    if path.suffix.lower() != ".jsonl":
        raise DataError("records are written one a line; the file's name must end in .jsonl.", path=path)
    with atomic_write(path) as file:
        for number, record in enumerate(records, 1):
            try:
                line = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False, default=_as_json)
            except (TypeError, ValueError) as error:
                raise DataError(f"an extra field cannot be written as JSON: {error}.", path=path, line=number) from None
            file.write(line + "\n")


def write_json(path: Path, value: object) -> None:
    """Write one JSON value, indented, with a newline at its end."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


@overload
def atomic_write(path: Path, *, binary: Literal[False] = False) -> AbstractContextManager[TextIO]: ...
@overload
def atomic_write(path: Path, *, binary: Literal[True]) -> AbstractContextManager[BinaryIO]: ...
def atomic_write(path: Path, *, binary: bool = False) -> AbstractContextManager[IO[str] | IO[bytes]]:
    """A file that takes its name only when it is whole and on the disk; after an error, what was there before stays."""
    return _written_aside(path, binary)


@contextmanager
def _written_aside(path: Path, binary: bool) -> Iterator[IO[str] | IO[bytes]]:
    if not processes.is_first():
        with open(os.devnull, "wb") if binary else open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield nowhere
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for each writer; what a killed writer left is overwritten or lies harmless under a hidden name.
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with aside.open("wb") if binary else aside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a full disk, of which the system says no more
            error.filename = str(path)
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Only POSIX systems can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_json(value: object) -> str:
    """Extra fields from parquet may be dates or exact decimals; they are written as text."""
    if isinstance(value, date | time):  # datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")
