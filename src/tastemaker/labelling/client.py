"""A client of the raters' API: the desk over HTTP, for programs that answer or read.

    with LabellingClient("https://labels.example.org", token) as client:
        while (view := client.next_task("round 1 rankings")) is not None:
            client.submit(view.task.id, RankingAnswer((("B",), ("A",))), guideline_version=view.task.guideline_version)

A connection that fails, before the request arrived or before its answer came back, is tried again with the same
request until `patience` is over; so a server may be restarted meanwhile. No answer is lost or doubled by that: it hangs
on its task, and the same answer again changes nothing. What is not so by itself (`undo`, `save_draft`) names the
version that it starts from, and a refusal after a lost reply is looked into before it is passed on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tastemaker.errors import ConfigError, StoreError
from tastemaker.labelling import wire
from tastemaker.labelling.settings import is_loopback
from tastemaker.store.tasks import (
    Answer,
    ComparisonAnswer,
    DemonstrationAnswer,
    Guideline,
    PrivatePrompt,
    RankingAnswer,
    Standing,
    StudyKind,
    answer_from_json,
)
from tastemaker.store.views import DeskProgress, DeskStudy, HistoryEntry, TaskView

PREFIX = "/api/v1"

# Between tries: doubled each time, up to the longest. A server that starts anew takes some seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
# What a proxy says while the server behind it is away.
AWAY = (502, 503, 504)


class ApiRefused(StoreError):
    """The server refused a request, with a status from 400 to 499 and a sentence.

    `resent`: the request was sent before, and the reply to that was lost.
    """

    def __init__(self, status: int, sentence: str, *, resent: bool) -> None:
        self.status, self.resent = status, resent
        super().__init__(sentence)


class ApiFailed(StoreError):
    """The server cannot be reached, or makes mistakes. What was last sent may have been stored or not."""


class LabellingClient:
    """One account's access to a labelling server. Not to be shared between threads."""

    def __init__(
        self,
        address: str,
        token: str,
        *,
        timeout: float = 90.0,
        patience: float = 120.0,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        host = _checked_host(address)
        self._address, self._patience, self._sleep = address.rstrip("/"), patience, sleep
        self._http = httpx2.Client(
            base_url=self._address,
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout,
            transport=transport,
            trust_env=not is_loopback(host),  # no proxy leads back to this machine
        )

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> LabellingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the rater's desk ---------------------------------------------------------------------------------------

    def me(self) -> wire.Me:
        """Whose token this is."""
        return wire.read_record(wire.Me, self._call("GET", "/me"))

    def studies(self) -> list[DeskStudy]:
        """The rater's studies, oldest first."""
        return [wire.read_record(DeskStudy, row) for row in self._call("GET", "/studies")]

    def next_task(self, study: str) -> TaskView | None:
        """The task that the rater holds, or else the next one; None where nothing is left for them."""
        found = self._call("POST", "/tasks/next", {"study": study})["task"]
        return None if found is None else wire.read_task(found)

    def task(self, task_id: str) -> TaskView:
        """A task that the rater was given."""
        return wire.read_task(self._call("GET", f"/tasks/{task_id}"))

    def heartbeat(self, task_id: str) -> float | None:
        """Extend the lease; returns when it ends, or None where the task is not the rater's any more."""
        until: float | None = self._call("POST", f"/tasks/{task_id}/heartbeat")["leased_until"]
        return until

    def save_draft(self, task_id: str, body: Mapping[str, wire.DraftValue], version: int) -> int:
        """Keep what was written so far; returns the version that the next save names."""
        try:
            saved = self._call("PUT", f"/tasks/{task_id}/draft", {"body": dict(body), "version": version})
        except ApiRefused as refusal:
            if not (refusal.resent and refusal.status == 409):
                raise
            view = self.task(task_id)  # was it this very draft that is there by now?
            if view.draft is None or (view.draft_version, view.draft.body) != (version + 1, dict(body)):
                raise
            return view.draft_version
        return int(saved["version"])

    def submit(
        self, task_id: str, answer: Answer, *, seconds: float | None = None, guideline_version: str | None = None
    ) -> Standing:
        """Hand in an answer; it is stored when this returns. Another answer later is a correction."""
        body = _answer_body(answer, seconds) | {"guideline_version": guideline_version}
        standing: Standing = self._call("POST", f"/tasks/{task_id}/answer", body)["standing"]
        return standing

    def revise(self, task_id: str, answer: Answer, *, seconds: float | None = None) -> TaskView:
        """Correct an answer given earlier; returns the task with it."""
        return wire.read_task(self._call("PUT", f"/tasks/{task_id}/answer", _answer_body(answer, seconds)))

    def undo(self, task_id: str, revision: int) -> Answer:
        """Take back the newest revision, whose number is `revision`; returns the answer that stands again."""
        try:
            undone = self._call("POST", f"/tasks/{task_id}/undo", {"revision": revision})
        except ApiRefused as refusal:
            if not (refusal.resent and refusal.status == 409):
                raise
            given = self.task(task_id).given
            if given is None or given.revision != revision + 1:
                raise
            return given.answer
        return answer_from_json(undone["kind"], undone["answer"])

    def skip(self, task_id: str, reason: str | None = None, note: str | None = None) -> None:
        """Pass a task on; its question never comes to this rater again."""
        self._call("POST", f"/tasks/{task_id}/skip", {"reason": reason, "note": note})

    def flag(self, task_id: str, reason: str, note: str | None = None) -> None:
        """Ask a lead to look at a task."""
        self._call("POST", f"/tasks/{task_id}/flag", {"reason": reason, "note": note})

    def history(self, *, limit: int = 50, before: str | None = None) -> list[HistoryEntry]:
        """The rater's own answers, latest first."""
        asked = {"limit": str(limit)} | ({} if before is None else {"before": before})
        return [wire.read_record(HistoryEntry, row) for row in self._call("GET", "/history", params=asked)]

    def all_history(self) -> Iterator[HistoryEntry]:
        """All of the rater's own answers, latest first."""
        before: str | None = None
        while page := self.history(limit=200, before=before):
            yield from page
            before = page[-1].task_id

    def guideline(self, version: str) -> Guideline:
        """The text of a guideline."""
        return wire.read_record(Guideline, self._call("GET", "/guideline", params={"version": version}))

    def progress(self) -> DeskProgress:
        """How much the rater has done."""
        return wire.read_record(DeskProgress, self._call("GET", "/progress"))

    # --- others -------------------------------------------------------------------------------------------------

    def private_prompt(self, task_id: str) -> PrivatePrompt:
        """What is known about the prompt of a task that this simulated rater holds; refused to people."""
        return wire.read_private(self._call("GET", f"/tasks/{task_id}/private"))

    def export(self, studies: Sequence[str]) -> list[dict[str, Any]]:
        """The answers of studies of one kind, as a lead or a researcher gets them."""
        lines = self._send("POST", "/lead/exports", {"studies": list(studies)}).text.split("\n")
        return [json.loads(line) for line in lines if line]

    # --- within -------------------------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        response = self._send(method, path, body, params=params)
        return None if response.status_code == 204 else _json(response)

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        params: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        """Send a request until it is answered, or patience is over."""
        # ASCII: any text can be escaped, and not all can be encoded.
        content = None if body is None else json.dumps(body, allow_nan=False)
        headers = {} if body is None else {"Content-Type": "application/json"}
        deadline, pause, resent = time.monotonic() + self._patience, FIRST_PAUSE, False
        while True:
            try:
                response = self._http.request(method, PREFIX + path, content=content, headers=headers, params=params)
            except httpx2.TransportError as error:
                resent = resent or not isinstance(error, httpx2.ConnectError)
                wait, why = pause, f"{self._address} cannot be reached ({error or type(error).__name__})"
            else:
                if response.is_success:
                    return response
                if response.status_code == 429:
                    wait, why = _retry_after(response), _sentence(response)
                elif response.status_code in AWAY:
                    resent = True  # it may have been passed on
                    wait, why = pause, f"{self._address} is away (status {response.status_code})"
                else:
                    raise _refusal(response, resent=resent)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() + wait > deadline:
                raise ApiFailed(f"{why}; tried for {self._patience:g} s. Try again later: nothing is stored twice.")
            self._sleep(wait)


def _checked_host(address: str) -> str:
    try:
        scheme, host = urlsplit(address).scheme, urlsplit(address).hostname or ""
    except ValueError:  # brackets that are not closed
        scheme, host = "", ""
    if host and (scheme == "https" or (scheme == "http" and is_loopback(host))):
        return host
    raise ConfigError(
        f"The labelling server's address is {address!r}; give one such as https://labels.example.org, or one of this "
        "machine: elsewhere http:// would send the token in the clear."
    )


def _answer_body(answer: Answer, seconds: float | None) -> dict[str, object]:
    return wire.answer_json(answer, _kind(answer)) | {"seconds": seconds}


def _kind(answer: Answer) -> StudyKind:
    if isinstance(answer, DemonstrationAnswer):
        return "demonstration"
    if isinstance(answer, RankingAnswer):
        return "ranking"
    return "comparison" if isinstance(answer, ComparisonAnswer) else "rating"


def _refusal(response: httpx2.Response, *, resent: bool) -> StoreError:
    if 400 <= response.status_code < 500:
        return ApiRefused(response.status_code, _sentence(response), resent=resent)
    return ApiFailed(f"The server made a mistake (status {response.status_code}): {_sentence(response)}")


def _sentence(response: httpx2.Response) -> str:
    try:
        return str(_json(response)["error"])
    except (ApiFailed, KeyError, TypeError):
        return f"{response.url.host} answered with status {response.status_code} and no reason."


def _json(response: httpx2.Response) -> Any:
    try:
        return json.loads(response.text)
    except ValueError as error:
        raise ApiFailed(
            f"{response.url} answered with something that is not JSON; is it a labelling server?"
        ) from error


def _retry_after(response: httpx2.Response) -> float:
    given = response.headers.get("retry-after", "")
    return float(given) if given.isdecimal() else 1.0
