"""Reading and writing records: every shape in, every malformed input refused with its place, and the way round."""

from __future__ import annotations

import datetime
import decimal
import errno
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tastemaker.errors import DataError
from tastemaker.files import (
    Skipped,
    atomic_write,
    describe_skipped,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_texts,
    write_json,
    write_records,
)
from tastemaker.records import (
    ABOUT_FIELDS,
    AUTHOR_FIELDS,
    About,
    Author,
    Demonstration,
    Message,
    Messages,
    Prompt,
    Ranking,
    Response,
    Text,
    records_hash,
)
from tastemaker.shapes import SHAPE_KEYS

Reader = Callable[[Path], object]

GOOD = '{"prompt": "Name a tree."}\n'
PAIR_A = "\n\nHuman: Name a tree.\n\nAssistant: Oak.\n\nHuman: Another?\n\nAssistant: Elm."
PAIR_B = "\n\nHuman: Name a tree.\n\nAssistant: Oak.\n\nHuman: Another?\n\nAssistant: No."


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- sources --------------------------------------------------------------------------------------------------------


def contents(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[-1].content for prompt in prompts]


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"prompt": "One"}\r\n\r\n{"prompt": "Zw\xc3\xb6lf"}')
    assert contents(read_prompts(path)) == ["One", "Zwölf"]


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"prompt": "One\u2028two\x85three"}\n')
    assert contents(read_prompts(str(path))) == ["One\u2028two\x85three"]


def test_gzip(tmp_path: Path) -> None:
    assert contents(read_prompts(write(tmp_path, "a.jsonl.gz", gzip.compress(GOOD.encode())))) == ["Name a tree."]
    array = gzip.compress(json.dumps([{"prompt": "One"}, {"prompt": "Two"}]).encode())
    assert contents(read_prompts(write(tmp_path, "A.JSON.GZ", array))) == ["One", "Two"]


def test_csv_quoted_cells_and_empty_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'id,prompt,user,label\n7,"Two\nlines, really",,safe\n8,Next,ann,\n')
    first, second = read_prompts(path)
    assert first == Prompt(
        messages=(Message("user", "Two\nlines, really"),), about=About(id="7", extra={"label": "safe"})
    )
    assert (second.about.user, second.about.extra) == ("ann", {"label": None})


def test_tsv(tmp_path: Path) -> None:
    assert contents(read_prompts(write(tmp_path, "a.tsv", "id\tprompt\n1\tOne, two\n"))) == ["One, two"]


def test_parquet_nulls_are_absent_keys(tmp_path: Path) -> None:
    rows = [
        {"prompt": "One", "messages": None},
        {"prompt": None, "messages": [{"role": "user", "content": "Two", "name": None}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert contents(read_prompts(tmp_path / "a.parquet")) == ["One", "Two"]


def test_parquet_row_in_errors_counts_over_batches(tmp_path: Path) -> None:
    rows = [{"prompt": "One"}] * 1500 + [{"prompt": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1501: not a prompt"):
        read_prompts(tmp_path / "a.parquet")


def test_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\nOne\r\n  still one\n \t\n\nTwo")
    assert read_texts(path) == [Text(text="One\n  still one"), Text(text="Two")]


def test_dataset_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "One"}, {"prompt": "Two"}])
    data.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert contents(read_prompts(tmp_path / "single")) == ["One", "Two"]
    assert contents(read_prompts(f"{tmp_path}/several:test")) == ["Two"]
    with pytest.raises(DataError, match=r"say which split.*train, test"):
        read_prompts(tmp_path / "several")
    with pytest.raises(DataError, match="no splits"):
        read_prompts(f"{tmp_path}/single:train")


def test_data_set_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="say which split, as nobody/nothing:train"):
        read_prompts("nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python itself leaves where an import is to fail
    with pytest.raises(DataError, match=r"tastemaker\[datasets\]"):
        read_prompts("nobody/nothing:train")


# --- what is refused ------------------------------------------------------------------------------------------------

ROW = '{"prompt": "P", "responses": ["a", "b", "c"], "ranking": %s}'
CHAT = '{"messages": [%s]}'
USER = '{"role": "user", "content": "Hi"}'
REFUSED: dict[str, tuple[str, str | bytes, Reader, str]] = {
    "empty file": ("a.jsonl", "", read_prompts, r"a\.jsonl: is empty"),
    "only blank lines": ("a.jsonl", "\n \n", read_prompts, "is empty"),
    "invalid JSON": ("a.jsonl", GOOD + '{"prompt": "x"', read_prompts, r"line 2: invalid JSON: .* column 15"),
    "not an object": ("a.jsonl", GOOD + "[1]", read_prompts, "line 2: expected a JSON object, found list"),
    "NaN": ("a.jsonl", '{"prompt": "x", "p": NaN}', read_prompts, "line 1: .*NaN is no JSON"),
    "half a pair": ("a.jsonl", GOOD + '{"prompt": "\\ud83d"}', read_prompts, "line 2: .*without its other half"),
    "nested": ("a.jsonl", '{"prompt": ' + "[" * 200_000, read_prompts, "line 1: invalid JSON: nested"),
    "NUL": ("a.jsonl", '{"prompt": "a\\u0000b"}', read_prompts, "line 1: 'prompt' holds a NUL"),
    "latin-1": (
        "a.jsonl",
        GOOD.encode() + b'{"prompt": "\xe9t\xe9"}',
        read_prompts,
        "line 2: not UTF-8: byte 0xe9 .* 13",
    ),
    "utf-16": ("a.jsonl", GOOD.encode("utf-16"), read_prompts, "line 1: not UTF-8"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD.encode() * 9)[:-9],
        read_prompts,
        r"a\.jsonl\.gz, line \d+: .*cut off",
    ),
    "no gzip": ("a.jsonl.gz", GOOD, read_prompts, "line 1: the gzip data is .*damaged"),
    "array in jsonl": ("a.jsonl", f"[{GOOD}]", read_prompts, "line 1: invalid JSON"),
    "object in json": ("a.json", GOOD, read_prompts, r"a\.json: expected an array of objects, found dict"),
    "lines in json": ("a.json", GOOD + GOOD, read_prompts, r"line 2: invalid JSON.*named \.jsonl"),
    "row in json": ("a.json", '[{"prompt": "x"},\n{"prompt": 3}]', read_prompts, "row 2: 'prompt' is 3"),
    "empty json": ("a.json", "[]", read_prompts, "is empty"),
    "long csv row": ("a.csv", "prompt\nx\ny,z\n", read_prompts, "line 3: expected 1 fields"),
    "csv row after lines": ("a.csv", 'prompt\n"x\ny\nz"\na,b\n', read_prompts, "line 5: expected 1 fields"),
    "short csv row": ("a.csv", "id,prompt\n1\n", read_prompts, "line 2: expected 2 fields"),
    "open quote": ("a.csv", 'prompt\n"x\n', read_prompts, "line 2: invalid CSV: unexpected end"),
    "no parquet": ("a.parquet", "PAR1", read_prompts, r"a\.parquet: not a whole parquet file"),
    "unknown suffix": ("a.yaml", GOOD, read_prompts, r"ends in '\.yaml'\. Accepted: \.jsonl, "),
    "packed parquet": ("a.parquet.gz", GOOD, read_prompts, "cannot tell how to read"),
    "texts as prompts": (
        "a.txt",
        "Hello\n",
        read_prompts,
        "line 1: not a prompt. Its keys are: text. Accepted: {prompt};",
    ),
    "wrong keys": ("a.jsonl", '{"query": "x", "prompt": null}', read_prompts, r"keys are: query, prompt \(null\)"),
    "wrong type": ("a.jsonl", '{"prompt": 7}', read_prompts, "'prompt' is 7; expected text or a non-empty list"),
    "no messages": ("a.jsonl", CHAT % "", read_prompts, r"'messages' is \[\]"),
    "message not object": ("a.jsonl", CHAT % '"Hi"', read_prompts, r"'messages\[0\]' is 'Hi'; a message is"),
    "message keys": ("a.jsonl", CHAT % '{"text": "Hi"}', read_prompts, "has the keys text"),
    "unknown role": (
        "a.jsonl",
        CHAT % '{"role": "tool", "content": "x"}',
        read_prompts,
        "is 'tool'; .*system, user, ass",
    ),
    "content parts": (
        "a.jsonl",
        CHAT % '{"role": "user", "content": [1]}',
        read_prompts,
        r"content' is \[1\]; expected text",
    ),
    "late system": (
        "a.jsonl",
        CHAT % f'{USER}, {{"role": "system", "content": "s"}}, {USER}',
        read_prompts,
        "a system turn stands in the middle",
    ),
    "two systems": (
        "a.jsonl",
        '{"system": "a"' + ", " + (CHAT % f'{{"role": "system", "content": "b"}}, {USER}')[1:],
        read_prompts,
        "keep one",
    ),
    "assistant last": (
        "a.jsonl",
        CHAT % f'{USER}, {{"role": "assistant", "content": "Hello"}}',
        read_prompts,
        "line 1: the last turn is by assistant.*demonstrations.* 1 row of 1 ",
    ),
    "blank prompt": (
        "a.jsonl",
        GOOD + '{"prompt": " "}',
        read_prompts,
        "line 2: the prompt is blank. 1 row of 2 cannot",
    ),
    "split": ("a.jsonl", '{"prompt": "x", "split": "dev"}', read_prompts, "line 1: 'split' is 'dev'"),
    "user last": ("a.jsonl", CHAT % USER, read_demonstrations, "ends in a turn by user"),
    "blank output": ("a.jsonl", '{"prompt": "x", "completion": ""}', read_demonstrations, "the response is blank"),
    "no output": ("a.jsonl", '{"instruction": "x", "output": null}', read_demonstrations, "not a demonstration"),
    "origin": (
        "a.jsonl",
        '{"prompt": "x", "completion": "y", "origin": "bot"}',
        read_demonstrations,
        "'origin' is 'bot'",
    ),
    "history": ("a.jsonl", '{"instruction": "x", "history": ["a"]}', read_prompts, "'history' is .* pairs"),
    "instances": ("a.jsonl", '{"instruction": "x", "instances": []}', read_demonstrations, r"'instances' is \[\]"),
    "K = 0": ("a.jsonl", '{"prompt": "P", "responses": [], "ranking": []}', read_rankings, "at least two"),
    "K = 1": ("a.jsonl", '{"prompt": "P", "responses": ["a"], "ranking": [[0]]}', read_rankings, "at least two"),
    "index missing": ("a.jsonl", ROW % "[[0], [2]]", read_rankings, "line 1: .*missing 1"),
    "index twice": ("a.jsonl", ROW % "[[0, 1], [1], [2]]", read_rankings, "line 1: .*repeated 1"),
    "index unknown": ("a.jsonl", ROW % "[[0, 1], [2, 3]]", read_rankings, "line 1: .*unknown 3"),
    "index true": ("a.jsonl", ROW % "[[0, true], [2]]", read_rankings, "line 1: .*whole numbers"),
    "empty group": ("a.jsonl", ROW % "[[0, 1], [], [2]]", read_rankings, "line 1: .*empty group"),
    "response type": ("a.jsonl", (ROW % "[[0, 1], [2]]").replace('"b"', "5"), read_rankings, r"responses\[1\]' is 5"),
    "finished": ("a.jsonl", (ROW % "[[0, 1, 2]]")[:-1] + ', "finished": [true]}', read_rankings, "expected 3 times"),
    "no transcripts": ("a.jsonl", '{"chosen": "a", "rejected": "b"}', read_rankings, "must be a transcript such as"),
    "mixed pair": (
        "a.jsonl",
        '{"chosen": "a", "rejected": [' + USER + "]}",
        read_rankings,
        "both must be transcripts or both",
    ),
    "blank text": ("a.jsonl", '{"text": "\\n"}', read_texts, "'text' is blank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, read, message = REFUSED[case]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder, and not one saved by datasets"):
        read_prompts(tmp_path)
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        read_prompts("missing.jsonl")


def test_unusable_rows_are_left_out_only_when_counted(tmp_path: Path) -> None:
    longer = PAIR_A + "\n\nAssistant: Or ash."
    rows = [{"chosen": PAIR_A, "rejected": PAIR_B}, {"chosen": longer, "rejected": PAIR_B}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    said = r"line 2: .*\(5 turns\).*\(4 turns\) differ from turn 4.*1 row of 2 cannot be used; repair or remove them"
    with pytest.raises(DataError, match=said):
        read_rankings(path)
    skipped: list[Skipped] = []
    assert len(read_rankings(path, skipped=skipped)) == 1
    assert [one.place for one in skipped] == ["line 2"]
    assert describe_skipped(skipped, source=path).startswith(f"{path}: left out 1 row that cannot be used (line 2: ")


def test_malformed_rows_are_never_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", GOOD + '{"prompt": 7}')
    with pytest.raises(DataError, match="line 2"):
        read_prompts(path, skipped=[])


def test_a_file_without_any_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no record in it can be used \(1 row read; line 1: the prompt is blank\)\."):
        read_prompts(write(tmp_path, "a.jsonl", '{"prompt": ""}'), skipped=[])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_an_empty_file_is_called_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_prompts(write(tmp_path, name, "\n"), skipped=[])


@pytest.mark.parametrize("text", ['[{"prompt": "x"}]', '[\n{"prompt": "x"}\n]'])
def test_an_array_is_told_where_it_belongs(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"line 1: .*A JSON array belongs in a file named \.json\."):
        read_prompts(write(tmp_path, "a.jsonl", text))
    assert len(read_prompts(write(tmp_path, "a.json", text))) == 1


def test_other_separators_and_misspelt_keys_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The fields are separated by ';'; use commas"):
        read_rankings(write(tmp_path, "a.csv", "prompt;chosen;rejected\na;b;c\n"))
    with pytest.raises(DataError, match="Did you mean 'completion' by 'completions'"):
        read_demonstrations(write(tmp_path, "a.jsonl", '{"prompt": "x", "completions": "y"}'))
    with pytest.raises(DataError) as unlike:
        read_demonstrations(write(tmp_path, "a.jsonl", '{"prompt": "x", "author": "ann"}'))
    assert "Did you mean" not in str(unlike.value)


# --- the way round --------------------------------------------------------------------------------------------------

some_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
filled_text = some_text.filter(lambda text: bool(text.strip()))
some_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | some_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(some_text, inner, max_size=3),
    max_leaves=5,
)
ours = {*SHAPE_KEYS, *ABOUT_FIELDS, *AUTHOR_FIELDS}
abouts = st.builds(
    About,
    id=st.none() | some_text,
    user=st.none() | some_text,
    category=st.none() | some_text,
    split=st.sampled_from([None, "train", "validation", "test"]),
    extra=st.dictionaries(some_text.filter(lambda key: key not in ours), some_json, max_size=3),
)
authors = st.builds(
    Author,
    rater=st.none() | some_text,
    rater_group=st.none() | some_text,
    origin=st.sampled_from([None, "human", "simulated"]),
    guideline_version=st.none() | some_text,
)


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    turns = [Message("system", draw(some_text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(filled_text)), Message("assistant", draw(some_text))]
    return (*turns, Message("user", draw(filled_text)))


prompts = st.builds(Prompt, messages=conversations(), about=abouts)


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    count = draw(st.integers(2, 5))
    responses = tuple(Response(text=draw(some_text), finished=draw(st.booleans())) for _ in range(count))
    ranks = [draw(st.integers(0, count - 1)) for _ in range(count)]
    order = tuple(tuple(i for i in range(count) if ranks[i] == rank) for rank in sorted(set(ranks)))
    return Ranking(prompt=draw(prompts), responses=responses, order=order, author=draw(authors))


@settings(max_examples=40)
@given(st.lists(prompts, min_size=1, max_size=3))
def test_prompts_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[Prompt]) -> None:
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    write_records(path, records)
    assert read_prompts(path) == records


@settings(max_examples=40)
@given(st.lists(st.builds(Demonstration, prompt=prompts, response=filled_text, author=authors), min_size=1, max_size=3))
def test_demonstrations_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[Demonstration]) -> None:
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    write_records(path, records)
    assert read_demonstrations(path) == records


@settings(max_examples=40)
@given(st.lists(rankings(), min_size=1, max_size=3))
def test_rankings_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[Ranking]) -> None:
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    write_records(path, records)
    assert read_rankings(path) == records
    assert [prompt.messages for prompt in read_prompts(path)] == [record.prompt.messages for record in records]


@settings(max_examples=40)
@given(st.lists(st.builds(Text, text=filled_text, about=abouts), min_size=1, max_size=3))
def test_texts_come_back(tmp_path_factory: pytest.TempPathFactory, records: list[Text]) -> None:
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    write_records(path, records)
    assert read_texts(path) == records


def test_dates_and_decimals_of_parquet_are_written_as_text(tmp_path: Path) -> None:
    rows = [{"prompt": "One", "day": datetime.date(2022, 3, 4), "price": decimal.Decimal("1.50")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_records(tmp_path / "b.jsonl", read_prompts(tmp_path / "a.parquet"))
    assert read_prompts(tmp_path / "b.jsonl")[0].about.extra == {"day": "2022-03-04", "price": "1.50"}


@pytest.mark.parametrize("value", [b"bytes", float("nan"), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    prompt = Prompt(messages=(Message("user", "x"),), about=About(extra={"odd": value}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: an extra field"):
        write_records(tmp_path / "a.jsonl", [prompt])
    assert list(tmp_path.iterdir()) == []


def test_records_are_written_as_jsonl_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        write_records(tmp_path / "a.json", [])


# --- writing --------------------------------------------------------------------------------------------------------


def test_atomic_write_shows_the_file_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as file:
        file.write("one\n")
        assert not path.exists()
    assert path.read_bytes() == b"one\n"
    with atomic_write(path, binary=True) as raw:
        raw.write(b"\x00\r\n")
        assert path.read_bytes() == b"one\n"
    assert path.read_bytes() == b"\x00\r\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_write_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "é", "a": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'


# --- real files, where they are -------------------------------------------------------------------------------------


@pytest.mark.skipif("TASTEMAKER_REAL_DATA" not in os.environ, reason="TASTEMAKER_REAL_DATA names no folder")
def test_real_files() -> None:
    folder = Path(os.environ["TASTEMAKER_REAL_DATA"])
    skipped: list[Skipped] = []
    pairs = read_rankings(folder / "hh-rlhf-harmless-base-test.jsonl.gz", skipped=skipped)
    assert (len(pairs), [one.place for one in skipped]) == (
        2307,
        ["line 1255", "line 1689", "line 1951", "line 1953", "line 2037"],
    )
    assert len(read_prompts(folder / "hh-rlhf-harmless-base-test.jsonl.gz")) == 2312
    assert len(read_rankings(folder / "dpo_en_demo.json")) == 300
    assert len(read_demonstrations(folder / "alpaca_en_demo.json")) == 999
    assert len(read_demonstrations(folder / "self-instruct-seed_tasks.jsonl")) == 175
    assert len(read_prompts(folder / "self-instruct-user_oriented_instructions.jsonl")) == 252
    assert len(read_prompts(folder / "xstest_prompts.csv")) == 450


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_names_the_file(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match=r"a\.json") as failed, atomic_write(tmp_path / "a.json"):
        raise OSError(number, "the system says no more")
    assert failed.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_the_hash_of_records_is_of_them_in_their_order() -> None:
    one, two = (Text(text=text, about=About(extra={"when": {1}})) for text in ("a", "b"))
    assert records_hash([one, two]) == records_hash([one, two])
    assert len({records_hash(rows) for rows in ([], [one], [two], [one, two], [two, one])}) == 5
