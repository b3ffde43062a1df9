"""`tastemaker label serve` and `label invite`: the real server as a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from tests.forked import Running, free_port

from tastemaker.cli import main
from tastemaker.errors import ConfigError
from tastemaker.labelling.serve import Address, _create_app, bind, connections_each
from tastemaker.labelling.settings import LabellingSettings, loopback_origins
from tastemaker.store import Store
from tastemaker.store.access import AccessService
from tastemaker.store.audit import COMMAND_LINE
from tastemaker.store.schema import throttles

STARTS_WITHIN, STOPS_WITHIN = 300, 60  # seconds; the machine may be busy with all the other tests


def started(arguments: Sequence[str], log: Path) -> Running:
    """The command as people start it."""
    command = [sys.executable, "-m", "tastemaker.cli", *arguments]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


@contextmanager
def server(
    folder: Path, *options: str, port: int = 0, start: Callable[[Sequence[str], Path], Running] = started
) -> Iterator[tuple[Running, str]]:
    """A server, when it answers, and its address; stopped in the end.

    With port 0 it takes a free one and says which; one behind a proxy says another's address, so its port is given.
    """
    said = folder.with_suffix(".log")
    said.unlink(missing_ok=True)
    process = start(["label", "serve", "--data", str(folder), "--port", str(port), *options], said)
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        address = ""
        while not address:
            text = said.read_text() if said.exists() else ""
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            found = re.search(r"http://127\.0\.0\.1:\d+", text)
            tried = f"http://127.0.0.1:{port}" if port else found[0] if found else ""
            address = tried if tried and _answers(tried) else ""
            time.sleep(0.05)
        yield process, address
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOPS_WITHIN)


def _answers(address: str) -> bool:
    try:
        # There is no TLS, and getting ready to verify some would take longer than the answer.
        answer = httpx2.get(f"{address}/health", timeout=2, verify=False)
    except httpx2.TransportError:
        return False
    return answer.status_code in (200, 421)  # 421: it has another name


def _wait_for_workers(parent: int, count: int) -> None:
    """Until so many processes see to SIGTERM themselves: a Ctrl-C before that meets an interpreter still starting."""
    deadline, started = time.monotonic() + STARTS_WITHIN, 0
    while started < count:
        assert time.monotonic() < deadline, f"{started} of {count} have started"
        time.sleep(0.05)
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        statuses = [Path(f"/proc/{child}/status").read_text() for child in children]
        caught = [int(mask, 16) for mask in re.findall(r"^SigCgt:\s*(\w+)", "\n".join(statuses), re.MULTILINE)]
        started = sum(mask >> (signal.SIGTERM - 1) & 1 for mask in caught)


def log_of(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


def test_one_command_from_nothing_to_a_sign_in_page(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "labels"
    folder.parent.mkdir()
    with server(folder) as (process, address):
        assert (folder / "labels.db").exists()
        (link,) = re.findall(rf"{address}/invitation/[\w-]{{43}}", log_of(folder))
        assert "You are invited as admin" in httpx2.get(link).text
        assert "label invite --roles admin" in log_of(folder)
        assert httpx2.get(f"{address}/sign-in").status_code == 200
        process.terminate()
        assert process.wait(STOPS_WITHIN) == 0
    assert "Stopped" in log_of(folder)
    assert link.rpartition("/")[2] not in log_of(folder).replace(link, ""), "no log holds the secret"


def test_several_processes_share_one_store(tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    with Store.open(folder / "labels.db") as store:
        access = AccessService(store)
        access.accept(access.invite({"admin"}, actor=COMMAND_LINE).token, name="root", password="four plain words")
    with server(folder, "--workers", "2") as (process, address):
        assert "/invitation/" not in log_of(folder), "there is an admin"
        assert {httpx2.get(f"{address}/sign-in").status_code for _ in range(6)} == {200}
        _wait_for_workers(process.pid, 2)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
        assert process.wait(STOPS_WITHIN) == 0
    assert "Traceback" not in log_of(folder)
    assert "Stopped" in log_of(folder)


@pytest.mark.parametrize("origin", [[], ["--origin", "http://127.0.0.1:8000"]])
def test_a_public_address_without_tls_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], origin: list[str]
) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "labels.example.org"):
        assert main(["label", "serve", "--data", str(tmp_path / "x"), "--host", host, *origin]) == 2
        assert "in the clear" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_nothing_listens_where_passwords_would_travel_in_the_clear(host: str) -> None:
    with pytest.raises(ConfigError, match="in the clear"):
        bind(Address(host=host, port=0))[0].close()


def test_no_part_of_an_answer_waits_until_the_one_before_it_is_acknowledged() -> None:
    listening, _ = bind(Address(port=0))

    async def connect() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accepted, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.close()
            return await found

    assert asyncio.run(connect()) == 1


def test_a_public_address_behind_tls_is_taken() -> None:
    listening, settings = bind(Address(host="0.0.0.0", port=0, origins=("https://labels.example.org",)))
    listening.close()
    assert settings.secure
    assert settings.hosts == {"labels.example.org"}


def test_behind_a_proxy_its_word_on_addresses_counts_and_nobody_elses(tmp_path: Path) -> None:
    folder, host, port = tmp_path / "labels", "labels.example.org", free_port()
    options = ("--origin", f"https://{host}", "--proxy", "127.0.0.2", "192.0.2.0/24")
    with server(folder, *options, port=port) as (_, address):
        assert re.search(rf"https://{host}/invitation/[\w-]{{43}}", log_of(folder))

        def get(path: str, peer: str, forwarded: str = "") -> httpx2.Response:
            with httpx2.Client(transport=httpx2.HTTPTransport(local_address=peer)) as client:
                headers = {"host": host} | ({"x-forwarded-for": forwarded} if forwarded else {})
                return client.get(f"{address}{path}", headers=headers)

        cookie = get("/sign-in", "127.0.0.2").headers["set-cookie"]
        assert cookie.startswith("__Host-tastemaker-visitor=")
        assert "; Secure" in cookie

        def addresses() -> int:
            """How many callers' addresses are counted; each invitation that is tried counts against one."""
            with Store.open(folder / "labels.db") as store, store.read() as connection:
                return connection.execute(sa.select(sa.func.count()).select_from(throttles)).scalar_one()

        def try_invitation(peer: str, forwarded: str = "") -> None:
            assert get("/invitation/none", peer, forwarded).status_code == 410

        try_invitation("127.0.0.1")
        assert addresses() == 1
        for number in range(3):  # not from the proxy: whatever it says, it is who it was
            try_invitation("127.0.0.1", f"198.51.100.{number}")
        assert addresses() == 1
        for number in range(3):
            try_invitation("127.0.0.2", f"198.51.100.{number}")
        assert addresses() == 4
        for number in range(3):  # what the caller wrote there itself stands to the left of what proxies add
            try_invitation("127.0.0.2", f"203.0.113.{number}, 198.51.100.0, 192.0.2.7")
        assert addresses() == 4


@pytest.mark.parametrize(
    ("proxies", "origins", "message"),
    [
        (("10.0.0.2",), (), r"--proxy 10\.0\.0\.2 was given without the https:// address"),
        (("10.0.0.2",), ("http://127.0.0.1:8000",), "without the https:// address"),
        (("proxy",), ("https://labels.example.org",), "'proxy' is neither an address nor a network"),
        (("*",), ("https://labels.example.org",), "neither an address nor a network"),
        (("10.0.0.2/16",), ("https://labels.example.org",), "has host bits set"),
        (("::1", "0.0.0.0/0"), ("https://labels.example.org",), "'0.0.0.0/0' is everybody"),
    ],
)
def test_proxies_that_cannot_be(proxies: tuple[str, ...], origins: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(Address(port=0, origins=origins, proxies=proxies))


def test_a_taken_port_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["label", "serve", "--data", str(tmp_path), "--port", port]) == 2
    assert f"port {port}" in capsys.readouterr().err
    assert main(["label", "serve", "--data", str(tmp_path), "--port", "70000"]) == 2
    assert main(["label", "serve", "--data", str(tmp_path), "--workers", "0"]) == 2


def test_invitations_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = str(tmp_path / "labels.db")
    assert main(["label", "invite", "--database", database]) == 2, "there is no store yet"
    Store.open(database).close()
    capsys.readouterr()
    arguments = ["label", "invite", "--database", database, "--roles", "rater", "lead", "--group", "team"]
    assert main([*arguments, "--origin", "https://labels.example.org"]) == 0
    link = capsys.readouterr().out.strip()
    assert link.startswith("https://labels.example.org/invitation/")
    with Store.open(database) as store:
        invited = AccessService(store).invitation(link.rpartition("/")[2])
    assert invited.roles == {"rater", "lead"}
    assert invited.rater_group == "team"
    assert main(["label", "invite", "--database", database, "--roles", "king"]) == 2
    assert "king" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 4, 7, 60, 61])
def test_all_processes_together_leave_the_database_connections_for_others(workers: int) -> None:
    """PostgreSQL has 100 by default. More processes than connections have one each."""
    assert 1 <= connections_each(workers) <= max(1, 80 // workers)


def test_a_process_opens_no_more_connections_than_it_may(tmp_path: Path) -> None:
    application = _create_app(tmp_path / "labels.db", LabellingSettings(origins=loopback_origins(1)), 3)
    pool = application.state.web.services.access._store._engine.pool
    assert pool.size() + pool._max_overflow == 3


def test_pages_and_styles_are_packaged() -> None:
    """What a wheel would hold is what lies in the package's folder and git does not ignore."""
    import tastemaker.labelling

    folder = Path(tastemaker.labelling.__file__).parent
    assert (folder / "templates" / "base.html").is_file()
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, [*folder.glob("templates/*"), *folder.glob("static/*")])],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    assert ignored.stdout == ""
