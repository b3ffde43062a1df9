"""Opening, creating and migrating a label store."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import exc

import tastemaker.store
from tastemaker.errors import StoreError
from tastemaker.store import LabelService, Store
from tastemaker.store.schema import APPEND_ONLY, SCHEMA_VERSION, metadata
from tastemaker.store.tasks import RankingAnswer

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


def test_more_threads_than_connections_wait_for_each_other(url: str) -> None:
    """A server that opened a connection a thread would ask a database under load for more than it gives."""
    threads, most = 7, 2
    opened, lock, ready = list[object](), threading.Lock(), threading.Barrier(threads)
    with Store.open(url, connections=most) as store:

        def note(connection: object, _record: object) -> None:
            with lock:
                opened.append(connection)

        sa.event.listen(store._engine, "connect", note)

        def register(index: int) -> None:
            ready.wait()
            for turn in range(3):
                LabelService(store).add_rater(f"rater-{index}-{turn}", group="team", origin="human")

        work = [threading.Thread(target=register, args=(index,)) for index in range(threads)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        with store.read() as connection:
            raters = sa.select(sa.func.count()).select_from(metadata.tables["raters"])
            assert connection.execute(raters).scalar_one() == 3 * threads
    assert len(opened) <= most


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
    with pytest.raises(StoreError, match=rf"schema version '9999'.*up to '{SCHEMA_VERSION}'\. Upgrade tastemaker"):
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
        connection.execute(sa.text(FILL_0001[0]))

    def write_two() -> None:
        with store.write() as connection:
            connection.execute(sa.text(FILL_0001[1]))
            connection.execute(sa.text(FILL_0001[0]))  # there already

    with pytest.raises(exc.IntegrityError):
        write_two()
    with store.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM guidelines")).scalar() == 0


@pytest.mark.parametrize("table", APPEND_ONLY)
@pytest.mark.parametrize("change", ["UPDATE {table} SET {key} = {key} + 1", "DELETE FROM {table}"])
def test_append_only_tables_refuse_changes(store: Store, table: str, change: str) -> None:
    fill(store)
    (key,) = metadata.tables[table].primary_key
    with pytest.raises(exc.DatabaseError, match=f"{table} are append-only"), store.write() as connection:
        connection.execute(sa.text(change.format(table=table, key=key.name)))
    with store.read() as connection:
        assert connection.execute(sa.select(key)).scalars().all() == [1]


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_replacing_a_row_is_refused(sqlite: str, table: str) -> None:
    """SQLite's INSERT OR REPLACE deletes the row in its way."""
    with Store.open(sqlite) as store:
        fill(store)
        with pytest.raises(exc.DatabaseError, match=f"{table} are append-only"), store.write() as connection:
            connection.execute(sa.text(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}"))


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_truncate_is_refused(postgresql: str, table: str) -> None:
    with (
        Store.open(postgresql) as store,
        pytest.raises(exc.DatabaseError, match="are append-only"),  # perhaps said by a table that hangs on this one
        store.write() as connection,
    ):
        connection.execute(sa.text(f"TRUNCATE {table} CASCADE"))


def test_every_migration_guards_its_append_only_tables() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS)).walk_revisions()
    assert {table for script in scripts for table in script.module.APPEND_ONLY} == set(APPEND_ONLY)


# --- a store of an older version ------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database that has no tables yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'old.db'}"
        return
    server = sa.make_url(request.getfixturevalue("postgresql_server")).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE old"))
        yield server.set(database="old", drivername="postgresql").render_as_string(hide_password=False)
        connection.execute(sa.text("DROP DATABASE old"))
    engine.dispose()


def test_a_store_of_version_0001_is_migrated_and_keeps_everything(old_url: str) -> None:
    make_version_0001(old_url)
    before = contents(old_url)
    assert {table for table, rows in before.items() if rows} == set(before)  # there is something to lose everywhere
    with Store.open(old_url) as store:
        with store.read() as connection:
            assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == SCHEMA_VERSION
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
            new = connection.execute(
                sa.text("SELECT gold_share, closed_at FROM studies WHERE NOT screening ORDER BY id")
            ).all()
            assert [tuple(row) for row in new] == [(0.0, None)]
        ranking = RankingAnswer((("C",), ("A", "B")))
        (counted,) = LabelService(store).rankings("study")
        assert counted.order == ((1,), (0, 2))  # the second revision, in letters as shown: C was queued as 1, A as 2
        LabelService(store).revise("t", "ann", ranking)  # and work goes on
    after = contents(old_url)
    assert len(after["answers"]) == len(before["answers"]) + 1
    after["answers"] = after["answers"][: len(before["answers"])]
    assert {table: after[table] for table in before} == before
    with (
        Store.open(old_url) as store,
        pytest.raises(exc.DatabaseError, match="answers are append-only"),
        store.write() as connection,
    ):
        connection.execute(sa.text("DELETE FROM answers"))


def test_a_store_of_version_0002_keeps_its_decisions_and_takes_cut_offs(old_url: str) -> None:
    make_version(old_url, "0002", (*FILL_0001, *FILL_0002))
    with Store.open(old_url) as store:
        with store.read() as connection:
            assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == SCHEMA_VERSION
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
            assert connection.execute(sa.text("SELECT id, reason FROM screening_decisions")).all() != []
            assert connection.execute(sa.text("SELECT count(*) FROM screening_cut_offs")).scalar() == 0
        with store.write() as connection:
            connection.exec_driver_sql(FILL_0003[0])
        with pytest.raises(exc.DatabaseError, match="are append-only"), store.write() as connection:
            connection.execute(sa.text("DELETE FROM screening_cut_offs"))


def test_every_study_of_a_store_of_version_0003_gets_a_secret_of_its_own(old_url: str) -> None:
    second = FILL_0001[2].replace("(1, 'study'", "(2, 'second'")
    make_version(old_url, "0003", (*FILL_0001, *FILL_0002, *FILL_0003, second))
    with Store.open(old_url) as store, store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        secrets = connection.execute(sa.text("SELECT secret FROM studies ORDER BY id")).scalars().all()
    assert len(set(secrets)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", secret) for secret in secrets)


@pytest.mark.parametrize("values", ["1.01, NULL, NULL", "NULL, -0.01, NULL", "NULL, NULL, 0.9", "NULL, NULL, 7.1"])
def test_database_refuses_cut_offs_that_nobody_could_meet_or_miss(store: Store, values: str) -> None:
    fill(store)
    row = f"INSERT INTO screening_cut_offs VALUES (2, 'team', {values}, 1, 0)"
    with pytest.raises(exc.IntegrityError), store.write() as connection:
        connection.execute(sa.text(row))


def make_version_0001(url: str) -> None:
    """A store as version 0001 made it, with a ranking that was corrected once."""
    make_version(url, "0001", (*FILL_0001, *RANKING_0001))
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":  # which counts only the ids that it chose itself
            connection.exec_driver_sql("SELECT setval('answers_id_seq', 2)")
    engine.dispose()


def make_version(url: str, version: str, statements: Sequence[str]) -> None:
    """A store as that version made it, with these rows."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, version)
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def contents(url: str) -> dict[str, list[tuple[object, ...]]]:
    """Every row of the tables of version 0001, in its columns of then."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        found = {
            table: [
                tuple(row)
                for row in connection.execute(
                    sa.text(f"SELECT {columns} FROM {table} ORDER BY {columns.split()[0][:-1]}")
                )
            ]
            for table, columns in COLUMNS_0001.items()
        }
    engine.dispose()
    return found


def test_database_refuses_a_rater_twice_on_an_item(store: Store) -> None:
    """The last line of defence, should the service err."""
    fill(store)
    with pytest.raises(exc.IntegrityError), store.write() as connection:
        connection.execute(sa.text(SLOT.format(task="u", slot=1)))


def fill(store: Store) -> None:
    """A row in every append-only table, and what it hangs on."""
    with store.write() as connection:
        for statement in (*FILL_0001, *FILL_0002, *FILL_0003):
            connection.exec_driver_sql(statement)


SLOT = "INSERT INTO assignments VALUES ('{task}', 1, 1, {slot}, {slot}, 7, 'done', 1, 'token', NULL)"
FILL_0001 = (
    "INSERT INTO raters VALUES (1, 'ann', 'team', 'human', 0)",
    "INSERT INTO guidelines VALUES ('v1', '\"text\"', 0)",
    "INSERT INTO studies (id, name, kind, purpose, guideline_version, overlap, rater_group, lease_seconds, created_at) "
    "VALUES (1, 'study', 'ranking', 'training', 'v1', 2, 'team', 60, 0)",
    """INSERT INTO items VALUES (1, 1, 0, 'key', '[{"role":"user","content":"Q?"}]', NULL, """
    """'{"id":null,"user":null,"split":null,"extra":{}}', 'hash')""",
    SLOT.format(task="t", slot=0),
    "INSERT INTO leases VALUES (1, 't', 'token', 1, 0)",
    """INSERT INTO answers VALUES (1, 1, 1, '[["A","B","C"]]', 1, 'v1', '[2, 0, 1]', 0, 0.1, 0.1, 'human')""",
)
# Answered by the letters shown: A is the output queued as 2, B the one queued as 0, C the one queued as 1.
RANKING_0001 = (
    """INSERT INTO answers VALUES (2, 1, 2, '[["C"],["B","A"]]', 1, 'v1', '[2, 0, 1]', 0.1, 0.2, 0.3, 'human')""",
    *(
        f"INSERT INTO outputs VALUES ({position + 1}, 1, {position}, '\"text \\u0000 {position}\"', "
        f"{'true' if position else 'false'}, '\"model-{position}\"')"
        for position in range(3)
    ),
)
FILL_0002 = (
    "INSERT INTO accounts VALUES (1, 'lee', NULL, NULL, 0, NULL)",
    "INSERT INTO remarks VALUES (1, 1, 'flag', 'spam', NULL, 0)",
    "INSERT INTO grades VALUES (1, 1, 1, 7, 0)",
    "INSERT INTO adjudications VALUES (1, 1, 1, '[]', '\"why\"', 1, 0)",
    "INSERT INTO screening_decisions VALUES (1, 1, true, '\"why\"', 1, 0)",
    "INSERT INTO audit VALUES (1, 0, 'lee', 'lead', 'act', 'thing', '{}', NULL, 'before', 'hash')",
)
FILL_0003 = ("INSERT INTO screening_cut_offs VALUES (1, 'team', 0.8, NULL, 5.5, 1, 0)",)
COLUMNS_0001 = {
    "raters": "id, name, rater_group, origin, created_at",
    "guidelines": "version, text, created_at",
    "studies": "id, name, kind, purpose, guideline_version, overlap, rater_group, lease_seconds, created_at",
    "items": "id, study_id, position, key, messages, category, private, content_hash",
    "outputs": "id, item_id, position, text, finished, source",
    "assignments": "id, study_id, item_id, slot, sequence, order_seed, state, rater_id, claim_token, leased_until",
    "leases": "id, assignment_id, token, rater_id, started_at",
    "answers": "id, lease_id, revision, body, answer_schema, guideline_version, order_shown, started_at, "
    "submitted_at, seconds, origin",
}
