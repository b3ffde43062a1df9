"""`tastemaker label serve` and `label invite`: the real server as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tastemaker.cli import main
from tastemaker.labelling.serve import Address, bind
from tastemaker.store import Store
from tastemaker.store.access import AccessService
from tastemaker.store.audit import COMMAND_LINE

STARTS_WITHIN, STOPS_WITHIN = 300, 60  # seconds; the machine may be busy with all the other tests


@contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, when it answers, and its address; stopped in the end."""
    command = [sys.executable, "-m", "tastemaker.cli", "label", "serve", "--data", str(folder), "--port", "0", *options]
    said = folder.with_suffix(".log")
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        address = ""
        while not address:
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            if found := re.search(r"http://127\.0\.0\.1:\d+", said.read_text()):
                address = found[0] if _answers(found[0]) else ""
            time.sleep(0.05)
        yield process, address
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOPS_WITHIN)


def _answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", timeout=2).text == "ok\n"
    except httpx2.TransportError:
        return False


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
        process.send_signal(signal.SIGTERM)
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


def test_a_public_address_behind_tls_is_taken() -> None:
    listening, settings = bind(Address(host="0.0.0.0", port=0, origins=("https://labels.example.org",)))
    listening.close()
    assert settings.secure
    assert settings.hosts == {"labels.example.org"}


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
