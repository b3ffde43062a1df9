"""Opening, creating and migrating a label store."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import exc

import tastemaker.store
from tastemaker.errors import StoreError
from tastemaker.store import Store
from tastemaker.store.schema import SCHEMA_VERSION, metadata

MIGRATIONS = Path(tastemaker.store.__file__).with_name("migrations")
GOLDEN_SCHEMA = Path(__file__).with_name("schema.sql")


def tables(store: Store) -> set[str]:
    with store.read() as connection:
        return set(sa.inspect(connection).get_table_names())


def test_migrations_create_the_tables_of_the_schema(store: Store) -> None:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    assert tables(store) == {*metadata.tables, "alembic_version"}


def test_newest_migration_is_the_schema_version() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == SCHEMA_VERSION


def test_schema_is_the_golden_one(sqlite_template: Path) -> None:
    """Answers outlive programs: a change of the tables is a migration, seen in review as a change of this file."""
    with sqlite3.connect(sqlite_template) as connection:
        rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")
        schema = "".join(f"{row[0]};\n".replace("\t", "    ") for row in rows)
    connection.close()
    assert schema == GOLDEN_SCHEMA.read_text()


def test_open_creates_folders_and_opens_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "labels.db"
    with Store.open(path) as store:
        first = tables(store)
    with Store.open(str(path)) as store, store.read() as connection:
        assert tables(store) == first
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_several_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    path, errors = tmp_path / "labels.db", []

    def open_it() -> None:
        try:
            Store.open(path).close()
        except BaseException as error:  # a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_failed_migration_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "labels.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE answers (mine TEXT)")  # created last by the migration, so it fails late
    connection.close()
    with pytest.raises(StoreError, match=r"labels\.db cannot be opened: table answers already exists"):
        Store.open(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("answers",)]
    connection.close()


def test_a_store_of_a_newer_version_is_refused(url: str) -> None:
    with Store.open(url) as store, store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"schema version '9999'.*up to '0001'\. Upgrade tastemaker"):
        Store.open(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/labels", "cannot live at mysql"),
        ("sqlite://", "cannot live at sqlite"),
        ("sqlite:///:memory:", "cannot live at sqlite"),
        ("://", "is not the address"),
        ("postgresql://someone:secret@127.0.0.1:1/labels", r"someone:\*\*\*@127.0.0.1:1/labels cannot be opened"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Not a database, and longer than the header of one. " * 10)
    with pytest.raises(StoreError, match="file is not a database"):
        Store.open(path)
    assert path.read_text().startswith("Not a database")


def test_a_write_is_whole_or_not_at_all(store: Store) -> None:
    with store.write() as connection:
        connection.execute(sa.text(FILL[0]))

    def write_two() -> None:
        with store.write() as connection:
            connection.execute(sa.text(FILL[1]))
            connection.execute(sa.text(FILL[0]))  # there already

    with pytest.raises(exc.IntegrityError):
        write_two()
    with store.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM guidelines")).scalar() == 0


@pytest.mark.parametrize("table", ["answers", "leases"])
@pytest.mark.parametrize("change", ["UPDATE {} SET id = id + 1", "DELETE FROM {}"])
def test_append_only_tables_refuse_changes(store: Store, table: str, change: str) -> None:
    with store.write() as connection:
        for statement in FILL:
            connection.execute(sa.text(statement))
    with pytest.raises(exc.DatabaseError, match=f"{table} are append-only"), store.write() as connection:
        connection.execute(sa.text(change.format(table)))
    with store.read() as connection:
        assert connection.execute(sa.text(f"SELECT id FROM {table}")).scalars().all() == [1]


def test_truncate_is_refused(postgresql: str) -> None:
    with (
        Store.open(postgresql) as store,
        pytest.raises(exc.DatabaseError, match="answers are append-only"),
        store.write() as connection,
    ):
        connection.execute(sa.text("TRUNCATE answers"))


def test_database_refuses_a_rater_twice_on_an_item(store: Store) -> None:
    """The last line of defence, should the service err."""
    with store.write() as connection:
        for statement in FILL:
            connection.execute(sa.text(statement))
    with pytest.raises(exc.IntegrityError), store.write() as connection:
        connection.execute(sa.text(SLOT.format(task="u", slot=1)))


SLOT = "INSERT INTO assignments VALUES ('{task}', 1, 1, {slot}, {slot}, 7, 'done', 1, 'token', NULL)"
FILL = (
    "INSERT INTO raters VALUES (1, 'ann', 'team', 'human', 0)",
    "INSERT INTO guidelines VALUES ('v1', '\"text\"', 0)",
    "INSERT INTO studies VALUES (1, 'study', 'ranking', 'training', 'v1', 2, 'team', 60, 0)",
    "INSERT INTO items VALUES (1, 1, 0, 'key', '[]', NULL, '{}', 'hash')",
    SLOT.format(task="t", slot=0),
    "INSERT INTO leases VALUES (1, 't', 'token', 1, 0)",
    "INSERT INTO answers VALUES (1, 1, 1, '[]', 1, 'v1', '[]', 0, 0, 0, 'human')",
)
