"""Commands about prompts and people; they need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from tastemaker.commands import labelling
from tastemaker.commands.options import parse
from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError, StoreError
from tastemaker.ranges import check_range

if TYPE_CHECKING:
    from tastemaker.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class _LabelOptions:
    """Let people answer in the browser, invite them; see what is missing, hand out tasks as a file, take answers in."""

    action: tyro.conf.Positional[Literal["serve", "invite", "status", "tasks", "answers", "verify-audit"]]
    """serve: run the labelling application. invite: print a link that makes an account. status: every study and what
    is missing. tasks: write tasks for a rater. answers: read a filled-in file. verify-audit: check that no row of the
    audit log was changed or removed."""
    data: Path = Path("labels")
    """The folder that holds the label store, labels.db, where --database names no other."""
    database: str | None = None
    """The label store: a file such as out/demo/labels.db, or a database URL."""
    host: str = "127.0.0.1"
    """serve: the address to listen on. One that others can reach needs an https:// --origin."""
    port: int = 8000
    """serve: the port to listen on; 0 takes a free one."""
    origin: tuple[str, ...] = ()
    """serve, invite: the addresses people type, such as https://labels.example.org, where a proxy ends TLS."""
    proxy: tuple[str, ...] = ()
    """serve: the proxy's addresses or networks, such as 172.18.0.0/16, where it does not run on this machine itself.
    Its word on callers' addresses counts, and nobody else's."""
    workers: int = 1
    """serve: processes that answer requests."""
    roles: tuple[str, ...] = ("rater",)
    """invite: what the account may do: admin, lead, adjudicator, rater, researcher, auditor."""
    group: str | None = None
    """invite: the group that a rater joins."""
    study: str | None = None
    """The study that tasks are taken from."""
    rater: str | None = None
    """The rater's name; registered in the study's group at the first time."""
    file: Path | None = None
    """The JSONL file to write or to read."""
    limit: int = 100
    """Tasks to hand out at most."""
    since: str | None = None
    """SEQUENCE:HASH as an earlier verify-audit printed it: shows also a log whose end was cut or that was made anew."""

    def __post_init__(self) -> None:
        check_range(self, "port", least=0, most=65535)
        check_range(self, "workers", "limit", least=1)


def label(arguments: Sequence[str]) -> None:
    """`tastemaker label`"""
    from tastemaker.store import LabelService, Store

    options = parse(_LabelOptions, arguments, "label")
    database = options.database or str(options.data / "labels.db")
    if options.action == "serve":
        from tastemaker.labelling.serve import Address

        address = Address(host=options.host, port=options.port, origins=options.origin, proxies=options.proxy)
        labelling.serve(database, address, options.workers)
        return
    if "://" not in database and not Path(database).exists():
        raise DataError("does not exist; `label serve` or a run with raters = 'people' creates it.", path=database)
    store = Store.open(database)
    try:
        service = LabelService(store)
        if options.action == "invite":
            labelling.invite(store, options.roles, options.group, options.origin)
        elif options.action == "verify-audit":
            _verify_audit(store, options.since)
        elif options.action == "status":
            for study in service.studies():
                progress = service.progress(study.name)
                print(f"{study.name}\t{study.kind}\t{study.rater_group}\t{progress.answered}/{progress.slots} answered")
        elif options.action == "tasks":
            study, rater, path = _required(options, "study", "rater", "file")
            group = next((known.rater_group for known in service.studies() if known.name == study), None)
            if group is None:
                raise DataError(f"there is no study {study!r}; `tastemaker label status` lists them.")
            service.add_rater(rater, group=group, origin="human")
            count = service.tasks_to_file(study, rater, path, limit=options.limit)
            say(f'{count} tasks for {rater} in {path}: fill in each "answer", then `tastemaker label answers --file`')
        else:
            (path,) = _required(options, "file")
            report = service.answers_from_file(path)
            say(str(report))
    finally:
        store.close()


def _verify_audit(store: Store, since: str | None) -> None:
    from tastemaker.store.audit import AuditLog, Head

    verdict = AuditLog(store).verify(since=None if since is None else Head.parse(since))
    if not verdict.ok:
        raise StoreError(f"The audit log does not hold: {verdict.problem}; the {verdict.rows} rows before it are good.")
    print(f"{verdict.rows} rows checked, each as it was written; the last is {verdict.head or 'none yet'}")


def _required(options: Any, *names: str) -> tuple[Any, ...]:
    missing = [f"--{name}" for name in names if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"`tastemaker label {options.action}` needs {' and '.join(missing)}.")
    return tuple(getattr(options, name) for name in names)
