"""The audit log: one chain, whole on both databases, in which every change is found."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from tastemaker.cli import main
from tastemaker.errors import StoreError
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE, GENESIS, Actor, AuditLog, Head, record
from tastemaker.store.schema import audit

LEE = Actor("lee", "lead", "request-7")
ROWS = 7


def fill(store: Store, rows: int = ROWS, *, actor: Actor = LEE) -> None:
    for number in range(rows):
        with store.write() as connection:
            details = {"number": number, "text": "é\x00\ud800", "nested": {"b": [1, 2.5, None], "a": True}}
            record(connection, actor, "thing.do", f"thing {number}", details, now=1000.0 + number / 3)


@contextmanager
def without_triggers(store: Store) -> Iterator[sa.Connection]:
    """A transaction of someone who may do everything in the database."""
    with store.write() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            yield connection
            return
        triggers = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'audit'"
        ).all()
        for name, _ in triggers:
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
        yield connection
        for _, statement in triggers:
            connection.exec_driver_sql(statement)


def test_entries_are_what_was_recorded(store: Store) -> None:
    fill(store, 2)
    with store.write() as connection:
        record(connection, COMMAND_LINE, "other.do", "other", now=5)
    newest, second, first = AuditLog(store).entries(limit=10)
    assert (first.sequence, second.sequence, newest.sequence) == (1, 2, 3)
    assert (second.actor, second.role, second.request_id) == ("lee", "lead", "request-7")
    assert (second.action, second.object, second.at) == ("thing.do", "thing 1", 1000.0 + 1 / 3)
    assert second.details == {"number": 1, "text": "é\x00\ud800", "nested": {"b": [1, 2.5, None], "a": True}}
    assert (newest.actor, newest.request_id, newest.details, newest.at) == ("command line", None, {}, 5.0)


def test_entries_by_page_action_and_actor(store: Store) -> None:
    fill(store, 5)
    fill(store, 2, actor=Actor("ann", "admin"))
    log = AuditLog(store)
    assert [entry.sequence for entry in log.entries(limit=3)] == [7, 6, 5]
    assert [entry.sequence for entry in log.entries(limit=3, before=5)] == [4, 3, 2]
    assert [entry.sequence for entry in log.entries(limit=9, actor="ann")] == [7, 6]
    assert [entry.sequence for entry in log.entries(limit=9, actor="lee", before=3)] == [2, 1]
    assert log.entries(limit=9, action="thing.undo") == []
    assert len(log.entries(limit=9, action="thing.do")) == 7


def test_an_act_that_fails_leaves_no_row(store: Store) -> None:
    fill(store, 1)

    def fail() -> None:
        with store.write() as connection:
            record(connection, LEE, "thing.do", "thing", now=0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    fill(store, 1)
    assert AuditLog(store).verify().rows == 2


def test_rows_are_recorded_in_write_transactions_only(store: Store) -> None:
    with pytest.raises(AssertionError, match="own write transaction"), store.read() as connection:
        record(connection, LEE, "thing.do", "thing", now=0)


def test_details_that_are_no_json_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"), store.write() as connection:
        record(connection, LEE, "thing.do", "thing", {"seconds": float("nan")}, now=0)


def test_the_chain_begins_and_goes_on_as_documented(store: Store) -> None:
    """By an independent reading of the documentation: canonical JSON, BLAKE2b of 32 bytes with our name in it."""
    fill(store, 1)
    with store.read() as connection:
        row = dict(connection.execute(sa.select(audit)).one()._mapping)
    assert row["previous_hash"] == GENESIS == "0" * 64
    text = (
        '{"action":"thing.do","actor":"lee","at":1000.0,"details":{"nested":{"a":true,"b":[1,2.5,null]},"number":0,'
        '"text":"\\u00e9\\u0000\\ud800"},"object":"thing 0","previous_hash":"' + "0" * 64 + '",'
        '"request_id":"request-7","role":"lead","sequence":1}'
    )
    expected = hashlib.blake2b(text.encode("ascii"), digest_size=32, person=b"tastemaker-audit").hexdigest()
    assert row["hash"] == expected


def test_an_untouched_log_is_whole(store: Store) -> None:
    log = AuditLog(store)
    empty = log.verify()
    assert (empty.ok, empty.rows, empty.head) == (True, 0, None)
    fill(store)
    verdict = log.verify()
    newest = log.entries(limit=1)[0]
    assert (verdict.ok, verdict.rows, verdict.head) == (True, ROWS, Head(ROWS, newest.hash))
    assert verdict.head is not None
    fill(store, 1)
    assert log.verify(since=verdict.head).ok


def test_a_long_log_is_read_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tastemaker.store.audit._PAGE", 3)
    fill(store)
    assert AuditLog(store).verify().rows == ROWS
    with without_triggers(store) as connection:
        connection.execute(sa.update(audit).where(audit.c.sequence == 6).values(actor="someone"))
    assert AuditLog(store).verify().bad_sequence == 6


CHANGES: Mapping[str, object] = {
    "at": 999.0,
    "actor": "someone",
    "role": "admin",
    "action": "thing.undo",
    "object": "another thing",
    "details": {"number": 3, "text": "another", "nested": {"b": [1, 2.5, None], "a": True}},
    "request_id": None,
    "previous_hash": "f" * 64,
    "hash": "f" * 64,
}


def test_every_column_is_tried() -> None:
    assert {*CHANGES, "sequence"} == set(audit.c.keys())


@pytest.mark.parametrize("column", CHANGES)
@pytest.mark.parametrize("sequence", [1, 4, ROWS])
def test_a_changed_column_is_found(store: Store, column: str, sequence: int) -> None:
    fill(store)
    with without_triggers(store) as connection:
        connection.execute(sa.update(audit).where(audit.c.sequence == sequence).values({column: CHANGES[column]}))
    verdict = AuditLog(store).verify()
    assert (verdict.ok, verdict.bad_sequence, verdict.rows) == (False, sequence, sequence - 1)
    assert verdict.problem is not None
    assert f"row {sequence} " in verdict.problem


@pytest.mark.parametrize(
    ("old", "new", "bad", "says"),
    [
        (4, 40, 4, "row 4 is missing"),
        (ROWS, 8, ROWS, "row 7 is missing"),
        (1, 0, 0, "row 0 was put in"),
        (4, -4, -4, "row -4 was put in"),
    ],
)
def test_a_changed_sequence_is_found(store: Store, old: int, new: int, bad: int, says: str) -> None:
    fill(store)
    with without_triggers(store) as connection:
        connection.execute(sa.update(audit).where(audit.c.sequence == old).values(sequence=new))
    verdict = AuditLog(store).verify()
    assert (verdict.bad_sequence, verdict.problem) == (bad, says)


def test_a_row_written_anew_with_its_hash_is_found_by_the_next(store: Store) -> None:
    fill(store)
    this = audit.c.sequence == 3
    with without_triggers(store) as connection:
        row = dict(connection.execute(sa.select(audit).where(this)).one()._mapping)
        assert hash_of(row) == row["hash"]
        forged = row | {"actor": "someone"}
        connection.execute(sa.update(audit).where(this).values(actor="someone", hash=hash_of(forged)))
    verdict = AuditLog(store).verify()
    assert (verdict.bad_sequence, verdict.problem) == (4, "row 4 does not follow from the row before it")


def hash_of(row: Mapping[str, object]) -> str:
    """As documented, which whoever may write to the database can read too."""
    text = json.dumps({name: row[name] for name in row if name != "hash"}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=32, person=b"tastemaker-audit").hexdigest()


def test_swapped_rows_are_found(store: Store) -> None:
    fill(store)
    with without_triggers(store) as connection:
        for old, new in ((3, 100), (4, 3), (100, 4)):
            connection.execute(sa.update(audit).where(audit.c.sequence == old).values(sequence=new))
    assert AuditLog(store).verify().bad_sequence == 3


@pytest.mark.parametrize("sequence", [1, 4])
def test_a_removed_row_is_found(store: Store, sequence: int) -> None:
    fill(store)
    with without_triggers(store) as connection:
        connection.execute(sa.delete(audit).where(audit.c.sequence == sequence))
    verdict = AuditLog(store).verify()
    assert (verdict.bad_sequence, verdict.problem) == (sequence, f"row {sequence} is missing")


def test_details_that_someone_made_unreadable_are_found(sqlite: str) -> None:
    """SQLite takes any text for JSON; PostgreSQL refuses what is none."""
    with Store.open(sqlite) as store:
        fill(store)
        with without_triggers(store) as connection:
            connection.exec_driver_sql("UPDATE audit SET details = 'oh' WHERE sequence = 2")
            connection.exec_driver_sql("UPDATE audit SET actor = x'ff' WHERE sequence = 3")
        assert AuditLog(store).verify().bad_sequence == 2


def test_a_cut_tail_is_found_by_who_kept_the_last_place(store: Store) -> None:
    fill(store)
    kept = AuditLog(store).verify().head
    assert kept is not None
    with without_triggers(store) as connection:
        connection.execute(sa.delete(audit).where(audit.c.sequence > ROWS - 2))
    assert AuditLog(store).verify().ok  # the chain alone cannot tell
    verdict = AuditLog(store).verify(since=kept)
    assert (verdict.ok, verdict.bad_sequence) == (False, ROWS - 1)
    assert verdict.problem == "the log ends with row 5, and row 7 was there before: its end was cut"
    fill(store, 2, actor=Actor("someone", "lead"))  # as many rows again, and other ones
    assert AuditLog(store).verify().ok
    verdict = AuditLog(store).verify(since=kept)
    assert (verdict.bad_sequence, verdict.rows) == (ROWS, ROWS - 1)
    assert "written anew" in str(verdict.problem)


@pytest.mark.parametrize(
    "text", ["", "7", "7:", "7:abc", f"0:{'a' * 64}", f"-1:{'a' * 64}", f"x:{'a' * 64}", f"7:{'g' * 64}"]
)
def test_a_place_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="SEQUENCE:HASH"):
        Head.parse(text)


def test_a_place_is_read_as_it_was_written() -> None:
    assert Head.parse(str(Head(7, "0a" * 32))) == Head(7, "0a" * 32)


WRITER = """
import sys
from tastemaker.store import Store
from tastemaker.store.audit import Actor, record

url, name, rows = sys.argv[1:]
with Store.open(url) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(rows)):
        with store.write() as connection:
            record(connection, Actor(name, "service"), "thing.do", str(number), now=number)
"""


def test_processes_that_record_at_once_make_one_chain(url: str) -> None:
    rows = 40
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, name, str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both at once
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=300)
        assert writer.returncode == 0
    with Store.open(url) as store:
        verdict = AuditLog(store).verify()
        assert (verdict.ok, verdict.rows) == (True, 2 * rows)
        for name in ("one", "two"):
            mine = AuditLog(store).entries(limit=100, actor=name)
            assert [entry.object for entry in mine] == [str(number) for number in reversed(range(rows))]


# --- the command ----------------------------------------------------------------------------------------------------


def test_verify_audit(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["label", "verify-audit", "--database", url.removeprefix("sqlite:///")]
    assert main(command) == 0
    assert capsys.readouterr().out == "0 rows checked, each as it was written; the last is none yet\n"
    with Store.open(url) as store:
        fill(store)
        head = AuditLog(store).verify().head
        assert main(command) == 0
        assert capsys.readouterr().out == f"7 rows checked, each as it was written; the last is {head}\n"
        assert main([*command, "--since", str(head)]) == 0
        with without_triggers(store) as connection:
            connection.execute(sa.delete(audit).where(audit.c.sequence == ROWS))
        assert main(command) == 0
        capsys.readouterr()
        assert main([*command, "--since", str(head)]) == 2
        assert capsys.readouterr().err == (
            "error: The audit log does not hold: the log ends with row 6, and row 7 was there before: its end was cut; "
            "the 6 rows before it are good.\n"
        )
        with without_triggers(store) as connection:
            connection.execute(sa.update(audit).where(audit.c.sequence == 3).values(role="admin"))
        assert main(command) == 2
        assert (
            "error: The audit log does not hold: row 3 is not what was written; the 2 rows" in capsys.readouterr().err
        )
        assert main([*command, "--since", "3"]) == 2
        assert "give SEQUENCE:HASH" in capsys.readouterr().err


def test_verify_audit_needs_a_store_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "verify-audit", "--database", str(tmp_path / "labels.db")]) == 2
    assert "does not exist" in capsys.readouterr().err
