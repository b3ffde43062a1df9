"""`tastemaker label serve` and `label invite`. What they need is imported when they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tastemaker.console import say
from tastemaker.errors import ConfigError

if TYPE_CHECKING:
    from tastemaker.labelling.serve import Address
    from tastemaker.store import Store


def serve(database: str, address: Address, workers: int) -> None:
    """Create what is missing, say where to go, and answer until told to stop."""
    from tastemaker.labelling.serve import admin_link, bind
    from tastemaker.labelling.serve import serve as answer
    from tastemaker.store import Store

    if workers < 1:
        raise ConfigError(f"--workers is {workers}; it must be at least 1.")
    listening, settings = bind(address)
    with Store.open(database) as store:
        link = admin_link(store, settings)
    say(f"Labelling at {settings.origins[0]} (labels in {_without_password(database)}); Ctrl-C stops it.")
    if link is not None:
        say("Nobody administers it yet. Whoever opens this link first does; it works once, for a day:")
        print(link, flush=True)
        say("Lost it? Start again or run `tastemaker label invite --roles admin` on this database: both print another.")
    answer(database, listening, settings, workers=workers)
    say("Stopped; all answers are stored.")


def invite(store: Store, roles: Sequence[str], group: str | None, origins: Sequence[str]) -> None:
    """Print a link by which one person makes an account."""
    from tastemaker.labelling.serve import invitation_link
    from tastemaker.labelling.settings import LabellingSettings
    from tastemaker.store import LabelService
    from tastemaker.store.access import AccessService
    from tastemaker.store.audit import COMMAND_LINE

    origin = LabellingSettings(origins=tuple(origins) or ("http://127.0.0.1:8000",)).origins[0]
    invited = AccessService(store).invite(roles, rater_group=group, actor=COMMAND_LINE)
    print(invitation_link(invited.token, origin))
    say(f"Good once, for a week: an account as {', '.join(sorted(invited.roles))}.")
    waiting = sorted({study.rater_group for study in LabelService(store).studies()})
    if group is not None and waiting and group not in waiting:
        say(f"Nothing is asked of group {group!r} so far; what there is to answer is for {' and '.join(waiting)}.")


def _without_password(database: str) -> str:
    scheme, found, rest = database.partition("://")
    if not found:
        return database
    credentials, at, place = rest.rpartition("@")
    return f"{scheme}://{credentials.partition(':')[0]}{at}{place}"
