"""The client and the simulated raters who use it, against the real server: what is lost on the way is sent again."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from tests.forked import forked
from tests.labelling.conftest import PASSWORD, QUICK, served
from tests.labelling.programs import GROUP, simulated, simulated_token
from tests.labelling.test_serve import server
from tests.store.conftest import Make

from tastemaker.errors import ConfigError, StoreError
from tastemaker.labelling.client import FIRST_PAUSE, ApiFailed, ApiRefused, LabellingClient
from tastemaker.labelling.drivers import Acknowledged, answer_study, answer_together
from tastemaker.labelling.web import Services
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE
from tastemaker.store.tasks import PrivatePrompt, RankingAnswer, StudyConfig, StudyKind

KINDS: dict[StudyKind, int] = {"demonstration": 0, "ranking": 3, "comparison": 2, "rating": 2}


class LosesReplies(httpx2.BaseTransport):
    """A connection that breaks once for each request that changes something, when the server has done its work."""

    def __init__(self) -> None:
        self._inner = httpx2.HTTPTransport()
        self._lost: set[tuple[str, bytes]] = set()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self._inner.handle_request(request)
        name = (str(request.url), request.content)
        if request.method == "GET" or name in self._lost:
            return response
        self._lost.add(name)
        response.read()
        response.close()
        raise httpx2.ReadError("the connection broke", request=request)

    def close(self) -> None:
        self._inner.close()


def study_of(make: Make, kind: StudyKind = "ranking", name: str = "study") -> StudyConfig:
    return replace(make.study(kind, name=name), rater_group=GROUP)


def services_of(store: Store) -> Services:
    return Services.over(store, hasher=QUICK)


def person_token(services: Services, name: str) -> str:
    invited = services.access.invite({"rater"}, rater_group="team", actor=COMMAND_LINE)
    account = services.access.accept(invited.token, name=name, password=PASSWORD)
    return services.access.create_api_token(account, "test")


def test_replies_that_are_lost_double_nothing(store: Store, make: Make) -> None:
    services = services_of(store)
    services.labels.queue(make.study(), make.items(2))
    token = person_token(services, "ann")
    with served(store) as address, LabellingClient(address, token, transport=LosesReplies()) as ann:
        view = ann.next_task("study")
        assert view is not None
        task_id, first, second = view.task.id, RankingAnswer((("B",), ("A", "C"))), RankingAnswer((("A",), ("B", "C")))
        assert ann.save_draft(task_id, {"rank-A": "1"}, 0) == 1
        assert ann.submit(task_id, first, seconds=0.0, guideline_version="v1") == "counted"
        given = ann.task(task_id).given
        assert given is not None
        assert (given.answer, given.revision, given.standing) == (first, 1, "counted")
        revised = ann.revise(task_id, second).given
        assert revised is not None
        assert (revised.answer, revised.revision) == (second, 2)
        assert ann.undo(task_id, 2) == first
        undone = ann.task(task_id).given
        assert undone is not None
        assert (undone.answer, undone.revision) == (first, 3)

        other = ann.next_task("study")
        assert other is not None
        assert other.task.id != task_id
        ann.flag(other.task.id, "broken", "the end is missing")
        ann.skip(other.task.id, "unclear")
        assert ann.next_task("study") is None
        assert [entry.task_id for entry in ann.all_history()] == [task_id]
        assert (ann.progress().total, ann.guideline("v1").text) == (1, "Prefer the helpful.")
        assert [(study.answered, study.left) for study in ann.studies()] == [(1, 0)]
        with pytest.raises(ApiRefused, match="role service"):
            ann.private_prompt(task_id)
        with pytest.raises(ApiRefused, match="not 7"):
            ann.undo(task_id, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_raters_answer_over_http_as_in_process(store: Store, make: Make, kind: StudyKind) -> None:
    """What a rater needs arrives whole: the answers are those that follow from the items as they were queued."""
    services, rater, items = services_of(store), simulated("bot"), make.items(5, KINDS[kind])
    token = simulated_token(services, "bot")
    services.labels.queue(study_of(make, kind), items)
    stored: list[Acknowledged] = []
    with served(store) as address, LabellingClient(address, token) as client:
        assert answer_study(client, "study", rater, acknowledged=stored.append) == 5
        assert answer_study(client, "study", rater) == 0
        given = [client.task(each.task.id).given for each in stored]
    assert [None if each is None else each.answer for each in given] == [each.answer for each in stored]
    for each, item in zip(stored, items, strict=True):
        responses = {output.response.text: output.response for output in item.outputs}
        private = PrivatePrompt(
            prompt=item.prompt, responses=tuple(responses[output.text] for output in each.task.outputs)
        )
        assert each.answer == rater.answer(each.task, private, study="study")


def test_a_token_is_used_for_its_own_rater(store: Store, make: Make) -> None:
    services = services_of(store)
    token = simulated_token(services, "bot")
    with served(store) as address:
        with (
            LabellingClient(address, token) as client,
            pytest.raises(ConfigError, match="token is that of rater 'bot', and the rater 'other'"),
        ):
            answer_study(client, "study", simulated("other"))
        with LabellingClient(address, "tastemaker_nobody") as client, pytest.raises(ApiRefused) as refusal:
            client.me()
        assert refusal.value.status == 401


def test_tokens_do_not_travel_in_the_clear() -> None:
    for address in (
        "http://labels.example.org",
        "ftp://127.0.0.1",
        "labels.example.org",
        "https://",
        "http://10.0.0.7",
    ):
        with pytest.raises(ConfigError, match="in the clear"):
            LabellingClient(address, "token")
    LabellingClient("https://labels.example.org", "token").close()


def test_patience_ends() -> None:
    """A pause that would end later than patience does is not begun."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"  # bound and not listening
        slept: list[float] = []
        client = LabellingClient(address, "token", patience=FIRST_PAUSE / 2, sleep=slept.append)
        with client, pytest.raises(ApiFailed, match=r"cannot be reached .*; tried for 0.025 s"):
            client.me()
    assert slept == []


# --- the server is killed in the middle of a submit -------------------------------------------------------------------


def submit_while_blocked(address: str, token: str, task_id: str, said: list[object]) -> threading.Thread:
    """A client that submits, in a thread of its own; what it was told goes into `said`."""

    def work() -> None:
        try:
            with LabellingClient(address, token, patience=300) as client:
                said.append(client.submit(task_id, RankingAnswer((("C",), ("A", "B")))))
        except StoreError as error:
            said.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_nothing_is_acknowledged_before_it_is_stored(store: Store, make: Make) -> None:
    said: list[object] = []
    services = services_of(store)
    services.labels.queue(make.study(), make.items(1))
    token = person_token(services, "ann")
    with served(store) as address:
        with LabellingClient(address, token) as client:
            view = client.next_task("study")
            assert view is not None
        with store.write() as connection:  # nobody else can write to the study meanwhile
            store.lock_studies(connection, [study.id for study in services.labels.studies()])
            thread = submit_while_blocked(address, token, view.task.id, said)
            thread.join(1.0)
            assert said == []
        thread.join(300)
    assert said == ["counted"]
    assert services.labels.progress("study").answered == 1


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_submit(tmp_path: Path, make: Make) -> None:
    """The answer is neither lost, as it had not been acknowledged, nor doubled when it is sent again."""
    said: list[object] = []
    folder = tmp_path / "labels"
    with Store.open(folder / "labels.db") as store:
        services = services_of(store)
        services.labels.queue(make.study(), make.items(1))
        token = person_token(services, "ann")
        with server(folder, start=forked) as (process, address):
            with LabellingClient(address, token) as client:
                view = client.next_task("study")
                assert view is not None
            with store.write():  # the server waits for us, in the middle of its work
                thread = submit_while_blocked(address, token, view.task.id, said)
                thread.join(1.0)
                process.kill()
                process.wait()
            assert said == []
        assert services.labels.progress("study").answered == 0
        port = re.findall(r"\d+", address)[-1]
        with server(folder, "--port", port, start=forked) as (_, again):
            assert again == address
            thread.join(300)
            assert said == ["counted"]
            with LabellingClient(address, token) as client:
                (entry,) = client.history()
        assert (entry.task_id, entry.revision, entry.standing) == (view.task.id, 1, "counted")
        (ranking,) = services.labels.rankings("study")
        assert sorted(len(group) for group in ranking.order) == [1, 2]


def test_several_raters_share_a_study(store: Store, make: Make) -> None:
    services = services_of(store)
    services.labels.queue(study_of(make), make.items(13))
    raters = [(simulated(name), simulated_token(services, name)) for name in ("bot-1", "bot-2", "bot-3")]
    stored: list[Acknowledged] = []
    with served(store) as address:
        assert answer_together(address, "study", raters, acknowledged=stored.append) == 13
    assert len({each.task.id for each in stored}) == 13
    assert services.labels.progress("study").answered == 13
    assert all(each.standing == "counted" for each in stored)
