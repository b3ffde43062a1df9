"""The database under the label store: opening, migrating, and its two kinds of transaction.

SQLite by default, PostgreSQL by URL. A write transaction is the only writer of what it touches: on SQLite it takes the
database's one write lock at its start (`BEGIN IMMEDIATE`; a deferred one would fail half-way when two readers both
turn into writers), on PostgreSQL the caller locks the rows of the studies concerned (`lock_studies`). So each
statement of `service` can be read as if nobody else were there, on both.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from tastemaker.errors import StoreError
from tastemaker.store import schema

# How long a writer waits for the one before it. Writes take milliseconds: who waits longer waits for a dead machine.
BUSY_SECONDS = 60

# Any fixed number: the name, among PostgreSQL's advisory locks, of the right to migrate this product's tables.
_MIGRATION_LOCK = 0x7A57E


class Store:
    """An open label store. Safe to share between threads; every process opens its own."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        # SQLite lets writers wait by trying again after ever longer sleeps, so that under load some wait for seconds.
        # Within one process they queue here instead; on PostgreSQL the locks of rows are queues already.
        self._one_writer: AbstractContextManager[object] = nullcontext()
        if engine.dialect.name == "sqlite":
            self._one_writer = threading.Lock()

    @staticmethod
    def open(url: str | Path, *, connections: int = 50) -> Store:
        """Open the store at a path (SQLite) or a URL, creating folder, database and tables as needed.

        Of more threads than `connections` that use it at once, some wait for the others.
        """
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        # ASCII only: escaped, even characters that the databases refuse in text survive.
        engine = sa.create_engine(parsed, json_serializer=_to_json, **_options(parsed.get_backend_name(), connections))
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        store = Store(engine)
        try:
            store._migrate(parsed)
        except exc.DBAPIError as error:
            store.close()
            raise StoreError(
                f"The label store {parsed.render_as_string()} cannot be opened: {error.orig}. "
                "Give the path of a SQLite file (created if absent) or the URL of a PostgreSQL database that runs."
            ) from error
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close all connections. Everything acknowledged is already stored."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that writes: committed whole at the end, or not at all."""
        with (
            self._one_writer,
            self._engine.connect().execution_options(tastemaker_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    def lock_studies(self, connection: sa.Connection, studies: Collection[int]) -> None:
        """Make this transaction the only writer of these studies until it ends (SQLite has seen to it already)."""
        if connection.dialect.name != "sqlite":
            # In the order of ids, so that two who lock the same studies never wait for each other.
            rows = sa.select(schema.studies.c.id).where(schema.studies.c.id.in_(studies)).order_by(schema.studies.c.id)
            connection.execute(rows.with_for_update(key_share=True))

    def lock_store(self, connection: sa.Connection) -> None:
        """Make this transaction the only one of its kind in the whole store: for new studies, raters and tables."""
        if connection.dialect.name != "sqlite":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))

    def _migrate(self, url: sa.URL) -> None:
        with self.read() as connection:
            if _version(connection) == schema.SCHEMA_VERSION:
                return
        # Imported here because a store that is up to date needs none of it.
        from alembic import command, util
        from alembic.config import Config

        with self.write() as connection:
            self.lock_store(connection)
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except util.CommandError as error:
                raise StoreError(
                    f"The label store {url.render_as_string()} has schema version {_version(connection)!r}; this "
                    f"tastemaker knows versions up to {schema.SCHEMA_VERSION!r}. Upgrade tastemaker to open it."
                ) from error


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _options(backend: str, connections: int) -> dict[str, Any]:
    kept = min(5, connections)
    pool = {"pool_size": kept, "max_overflow": connections - kept, "pool_timeout": BUSY_SECONDS}
    if backend == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}, **pool}
    return {"pool_pre_ping": True, **pool}  # the server may have been restarted since a connection was last used


def _parse(url: str | Path) -> sa.URL:
    if isinstance(url, Path) or "://" not in url:
        return sa.URL.create("sqlite", database=str(url))
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError as error:
        raise StoreError(
            f"{url!r} is not the address of a label store; give a path, sqlite:///PATH or postgresql://HOST/DATABASE."
        ) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    if backend == "postgresql":
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise StoreError("PostgreSQL needs its driver: pip install 'tastemaker[postgresql]'.") from error
        return parsed.set(drivername="postgresql+psycopg")
    raise StoreError(
        f"A label store cannot live at {parsed.render_as_string()}; labels are kept in a SQLite file or in PostgreSQL: "
        "give a path, sqlite:///PATH or postgresql://HOST/DATABASE."
    )


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _set_up_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None  # the driver then begins no transactions of its own; `_begin_sqlite` does
    _read_beside_the_writer(connection)
    for pragma in (
        "synchronous = NORMAL",  # a killed process loses nothing; a power cut may lose the last moments, whole
        "foreign_keys = ON",
        "recursive_triggers = ON",  # or INSERT OR REPLACE would delete rows past the triggers that refuse deleting
    ):
        connection.execute(f"PRAGMA {pragma}")


def _read_beside_the_writer(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. SQLite itself does not wait where another connection does so at this moment."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("tastemaker_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
