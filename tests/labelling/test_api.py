"""The API under /api/v1: what a rater's program can do, and all that it cannot."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from httpx2 import Response
from hypothesis import HealthCheck
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from tests.labelling.conftest import ORIGIN, People
from tests.labelling.programs import GROUP, Program, simulated_token, token_of
from tests.store.conftest import Clock, Make

from tastemaker.labelling.api import document
from tastemaker.labelling.settings import LabellingSettings
from tastemaker.labelling.web import Services
from tastemaker.store import Store
from tastemaker.store.audit import COMMAND_LINE, AuditLog
from tastemaker.store.tasks import StudyKind, answer_from_json, answer_to_json

NOBODYS = "0" * 32
SENTENCE = re.compile(r"\w.*[.)]", re.DOTALL)
KINDS: dict[StudyKind, int] = {"demonstration": 0, "ranking": 3, "comparison": 2, "rating": 2}
ANSWERS: dict[StudyKind, list[object]] = {
    "demonstration": ["An apple \0 \u2028.", "A pear."],
    "ranking": [[["C"], ["A", "B"]], [["A"], ["B"], ["C"]]],
    "comparison": ["B", "tie"],
    "rating": [
        {"A": {"likert": 7, "flags": ["hallucination"]}, "B": {"likert": 1, "flags": []}},
        {"A": {"likert": 6, "flags": []}, "B": {"likert": 1, "flags": []}},
    ],
}


@pytest.fixture
def program(app: FastAPI, people: People, services: Services) -> Callable[..., Program]:
    """A program of a new account: `program("ann")` is a rater's."""

    def make(name: str, *roles: str) -> Program:
        people.account(name, *(roles or ("rater",)))
        return Program(app, ORIGIN, token_of(services, name))

    return make


@pytest.fixture
def machine(app: FastAPI, services: Services) -> Callable[[str], Program]:
    """A program of a new simulated rater."""
    return lambda name: Program(app, ORIGIN, simulated_token(services, name))


def refused(answer: Response, status: int) -> str:
    """A refusal is JSON with one sentence, which is returned."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "request_id"}
    sentence: str = answer.json()["error"]
    assert SENTENCE.fullmatch(sentence), sentence
    return sentence


def next_task(program: Program, study: str = "study") -> dict[str, Any]:
    answer = program.post("/api/v1/tasks/next", json={"study": study})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["task"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_rater_works(kind: StudyKind, services: Services, make: Make, program: Callable[..., Program]) -> None:
    services.labels.queue(make.study(kind), make.items(3, KINDS[kind]))
    ann = program("ann")
    assert ann.get("/api/v1/me").json() == {"name": "ann", "roles": ["rater"], "rater": "ann", "rater_group": "team"}
    (study,) = ann.get("/api/v1/studies").json()
    assert (study["name"], study["kind"], study["left"], study["answered"]) == ("study", kind, 3, 0)

    task = next_task(ann)
    path = f"/api/v1/tasks/{task['id']}"
    assert next_task(ann)["token"] == task["token"], "asking again gives the same task"
    assert [output["letter"] for output in task["outputs"]] == list("ABC"[: KINDS[kind]])
    assert task["messages"][0] == {"role": "system", "content": "Be brief."}
    text = ann.get("/api/v1/guideline", params={"version": task["guideline_version"]}).json()
    assert text == {"version": "v1", "text": "Prefer the helpful."}

    draft = {"body": {"text": "An ap", "rank-A": "2", "ticks": ["x"], "n": 1, "none": None}, "version": 0}
    assert ann.put(f"{path}/draft", json=draft).json() == {"version": 1}
    assert "saved elsewhere" in refused(ann.put(f"{path}/draft", json=draft), 409)
    held = ann.get(path).json()
    assert (held["draft"]["body"], held["draft_version"], held["given"]) == (draft["body"], 1, None)
    assert ann.post(f"{path}/heartbeat").json()["leased_until"] > 0

    first, second = ANSWERS[kind]
    body = {"kind": kind, "answer": first, "seconds": 0.0, "guideline_version": "v1"}
    for _ in range(2):
        assert ann.post(f"{path}/answer", json=body).json() == {"standing": "counted"}
    given = ann.get(path).json()
    assert (given["state"], given["draft"], given["given"]["revision"]) == ("answered", None, 1)
    assert given["given"]["answer"] == answer_to_json(answer_from_json(kind, first))
    assert ann.post(f"{path}/heartbeat").json() == {"leased_until": None}

    revised = ann.put(f"{path}/answer", json={"kind": kind, "answer": second}).json()
    assert (revised["given"]["revision"], revised["given"]["answer"]) == (2, second)
    assert ann.post(f"{path}/undo", json={"revision": 2}).json()["kind"] == kind
    assert "revision 3" in refused(ann.post(f"{path}/undo", json={"revision": 2}), 409), "one undo, however often sent"

    passed = next_task(ann)
    assert ann.post(f"/api/v1/tasks/{passed['id']}/flag", json={"reason": "broken", "note": "\0"}).status_code == 204
    assert ann.post(f"/api/v1/tasks/{passed['id']}/skip", json={}).status_code == 204
    last = next_task(ann)
    assert ann.post(f"/api/v1/tasks/{last['id']}/answer", json={"kind": kind, "answer": second}).status_code == 200
    assert ann.post("/api/v1/tasks/next", json={"study": "study"}).json() == {"task": None}

    entries = ann.get("/api/v1/history").json()
    assert [(entry["task_id"], entry["revision"]) for entry in entries] == [(last["id"], 1), (task["id"], 3)]
    older = ann.get("/api/v1/history", params={"before": last["id"], "limit": 1}).json()
    assert [entry["task_id"] for entry in older] == [task["id"]]
    assert ann.get("/api/v1/progress").json()["total"] == 2
    assert services.labels.progress("study").answered == 2


def test_half_a_character_of_a_model_arrives_escaped(
    services: Services, make: Make, program: Callable[..., Program]
) -> None:
    item = make.item("key", 2)
    broken = dataclasses.replace(
        item.outputs[0], response=dataclasses.replace(item.outputs[0].response, text="x \ud800")
    )
    services.labels.queue(make.study("comparison"), [dataclasses.replace(item, outputs=(broken, item.outputs[1]))])
    assert "x \ud800" in [output["text"] for output in next_task(program("ann"))["outputs"]]


# --- whose -----------------------------------------------------------------------------------------------------------


def about_a_task(task_id: str) -> list[tuple[str, str, dict[str, object] | None]]:
    """A good request of each kind that is about one task."""
    path = f"/api/v1/tasks/{task_id}"
    answer: dict[str, object] = {"kind": "ranking", "answer": ANSWERS["ranking"][0]}
    return [
        ("GET", path, None),
        ("POST", f"{path}/heartbeat", None),
        ("PUT", f"{path}/draft", {"body": {}, "version": 0}),
        ("POST", f"{path}/answer", answer),
        ("PUT", f"{path}/answer", answer),
        ("POST", f"{path}/undo", {"revision": 1}),
        ("POST", f"{path}/skip", {}),
        ("POST", f"{path}/flag", {"reason": "other"}),
        ("GET", f"/api/v1/history?before={task_id}", None),
    ]


def test_anothers_task_is_as_one_that_does_not_exist(
    services: Services, make: Make, program: Callable[..., Program]
) -> None:
    services.labels.queue(make.study(), make.items(2))
    ann, bob = program("ann"), program("bob")
    task_id = next_task(ann)["id"]
    for mine, theirs in zip(about_a_task(NOBODYS), about_a_task(task_id), strict=True):
        there, absent = (bob.request(method, path, json=body) for method, path, body in (theirs, mine))
        assert refused(there, 404) == refused(absent, 404).replace(NOBODYS, task_id)
    assert ann.get(f"/api/v1/tasks/{task_id}").json()["state"] == "yours"
    refused(bob.post("/api/v1/tasks/next", json={"study": "nothing"}), 404)
    refused(bob.get("/api/v1/guideline", params={"version": "v9"}), 404)


def test_what_is_known_about_a_prompt_is_for_its_simulated_rater_alone(
    services: Services, make: Make, program: Callable[..., Program], machine: Callable[[str], Program], app: FastAPI
) -> None:
    for group in ("team", GROUP):
        study = dataclasses.replace(make.study(name=group), rater_group=group)
        services.labels.queue(study, make.items(3))
    ann, bot, other = program("ann"), machine("bot"), machine("other")
    anns, bots = next_task(ann, "team"), next_task(bot, GROUP)
    for person in (ann, program("lea", "lead", "rater"), program("root", "admin"), program("rita", "researcher")):
        for task in (anns, bots):
            assert "role service" in refused(person.get(f"/api/v1/tasks/{task['id']}/private"), 403)
    refused(other.get(f"/api/v1/tasks/{bots['id']}/private"), 404)
    refused(bot.get(f"/api/v1/tasks/{anns['id']}/private"), 404)
    idle = services.access.create_service("watcher", actor=COMMAND_LINE)
    watcher = Program(app, ORIGIN, services.access.create_api_token(idle, "test", actor=COMMAND_LINE))
    refused(watcher.get(f"/api/v1/tasks/{bots['id']}/private"), 403)

    known = bot.get(f"/api/v1/tasks/{bots['id']}/private").json()
    assert known["about"]["extra"]["truth"]["answer"].startswith("truth key-")
    assert [each["text"] for each in known["responses"]] == [output["text"] for output in bots["outputs"]]
    assert {each["text"].split()[1]: each["finished"] for each in known["responses"]}["1"] is False
    assert "model-" not in json.dumps(known), "not even they are told what wrote the responses"
    bot.post(f"/api/v1/tasks/{bots['id']}/answer", json={"kind": "ranking", "answer": ANSWERS["ranking"][0]})
    refused(bot.get(f"/api/v1/tasks/{bots['id']}/private"), 409)  # answered: there is no more need


def test_a_simulated_rater_whose_lease_was_lost_is_told_nothing_more(
    services: Services, make: Make, machine: Callable[[str], Program], clock: Clock
) -> None:
    services.labels.queue(dataclasses.replace(make.study(), rater_group=GROUP), make.items(1))
    bot, other = machine("bot"), machine("other")
    task = next_task(bot)
    clock.now += 3600
    assert next_task(other)["id"] == task["id"]
    refused(bot.get(f"/api/v1/tasks/{task['id']}/private"), 409)
    assert other.get(f"/api/v1/tasks/{task['id']}/private").status_code == 200


def test_a_browsers_session_counts_for_nothing(people: People) -> None:
    ann = people.browser("ann", "rater")
    assert ann.get("/account").status_code == 200
    assert "Bearer TOKEN" in refused(ann.get("/api/v1/me"), 401)


def test_a_token_that_was_revoked_is_nobodys(services: Services, program: Callable[..., Program]) -> None:
    ann = program("ann")
    (account,) = services.access.accounts()
    (token,) = services.access.api_tokens(account)
    assert ann.get("/api/v1/me").status_code == 200
    services.access.revoke_api_token(account, token.id)
    assert refused(ann.get("/api/v1/me"), 401)


def test_leads_routes_are_for_leads(
    services: Services, store: Store, make: Make, program: Callable[..., Program]
) -> None:
    services.labels.queue(make.study("comparison"), make.items(2, 2))
    ann, lea = program("ann"), program("lea", "lead")
    refused(ann.get("/api/v1/lead/studies"), 403)
    refused(ann.post("/api/v1/lead/exports", json={"studies": ["study"]}), 403)
    refused(lea.get("/api/v1/studies"), 403)  # she answers as no rater
    assert "no answers" in refused(lea.post("/api/v1/lead/exports", json={"studies": ["study"]}), 422)
    task = next_task(ann)
    ann.post(f"/api/v1/tasks/{task['id']}/answer", json={"kind": "comparison", "answer": "A"})
    (study,) = lea.get("/api/v1/lead/studies").json()
    assert (study["name"], study["slots"], study["answered"]) == ("study", 2, 1)
    answer = lea.post("/api/v1/lead/exports", json={"studies": ["study"]})
    (row,) = [json.loads(line) for line in answer.text.split("\n") if line]
    assert answer.headers["content-type"].startswith("application/jsonl")
    assert row["rater"].startswith("rater-")
    assert "ann" not in json.dumps(row)
    assert "model-" not in json.dumps(row)
    newest = AuditLog(store).entries(limit=1)[0]
    assert (newest.actor, newest.action) == ("lea", "export")


# --- blindness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_of_the_api_says_what_a_rater_may_not_know(
    kind: StudyKind, services: Services, make: Make, program: Callable[..., Program]
) -> None:
    items = []
    for index in range(4):
        item = make.item(f"canary-key-{index}", KINDS[kind])
        about = dataclasses.replace(
            item.prompt.about, id="canary-id", user="canary-user", category="canary-kind", extra={"canary": ["canary"]}
        )
        prompt = dataclasses.replace(item.prompt, messages=item.prompt.messages[:1], about=about)
        outputs = tuple(
            dataclasses.replace(
                each, source=f"canary-model-{place}", response=dataclasses.replace(each.response, text=f"Text {place}")
            )
            for place, each in enumerate(item.outputs)
        )
        items.append(dataclasses.replace(item, prompt=prompt, outputs=outputs))
    services.labels.queue(make.study(kind, overlap=2), items)
    ann, bob = program("ann"), program("bob")
    bobs = next_task(bob)
    bob.post(f"/api/v1/tasks/{bobs['id']}/answer", json={"kind": kind, "answer": ANSWERS[kind][0]})
    task = next_task(ann)
    first, second = ANSWERS[kind]
    path = f"/api/v1/tasks/{task['id']}"
    requests: list[tuple[str, str, object]] = [
        *about_a_task(task["id"]),
        ("POST", f"{path}/answer", {"kind": kind, "answer": first}),
        ("PUT", f"{path}/answer", {"kind": kind, "answer": second}),
        ("POST", f"{path}/undo", {"revision": 2}),
        ("POST", f"{path}/answer", {"kind": "ranking", "answer": [["Z"]]}),
        *[("GET", f"/api/v1/{what}", None) for what in ("me", "studies", "history", "progress", "openapi.json")],
        ("GET", "/api/v1/guideline?version=v1", None),
        ("GET", path, None),
        ("GET", f"{path}/private", None),
        ("GET", "/api/v1/lead/studies", None),
        ("POST", "/api/v1/tasks/next", {"study": "study"}),
        ("GET", f"/api/v1/tasks/{bobs['id']}", None),
    ]
    said = [json.dumps(task)]
    for method, where, body in requests:
        answer = ann.request(method, where, json=body)
        said += [answer.text, str(answer.headers)]
    assert any("Be brief." in each for each in said)
    assert [each for each in said if "canary" in each] == []
    assert not any("bob" in each for each in said)


# --- errors ----------------------------------------------------------------------------------------------------------

RANKING = {"kind": "ranking", "answer": [["A"], ["B"], ["C"]]}
BAD: list[tuple[int, str, str, object]] = [
    (404, "GET", "/api/v1/nothing", None),
    (404, "GET", "/api/v2/me", None),
    (405, "DELETE", "/api/v1/me", None),
    (404, "GET", "/api/v1/tasks/%00", None),
    (404, "GET", "/api/v1/tasks/..%2F..%2Fetc", None),
    (422, "GET", "/api/v1/history?limit=0", None),
    (422, "GET", "/api/v1/history?limit=x", None),
    (404, "GET", "/api/v1/history?before=%00", None),
    (422, "GET", "/api/v1/guideline", None),
    (404, "GET", "/api/v1/guideline?version=%00%ff", None),
    (422, "POST", "/api/v1/tasks/next", None),
    (422, "POST", "/api/v1/tasks/next", {}),
    (422, "POST", "/api/v1/tasks/next", {"study": "a\0"}),
    (422, "POST", "/api/v1/tasks/next", {"study": ["study"]}),
    (422, "POST", "/api/v1/tasks/next", {"study": "study", "rater": "bob"}),
    (422, "PUT", "TASK/draft", {"body": {"a": {"b": 1}}, "version": 0}),
    (422, "PUT", "TASK/draft", {"body": {"\ud800": [1]}, "version": 0}),
    (422, "PUT", "TASK/draft", {"body": {}, "version": "0"}),
    (422, "PUT", "TASK/draft", {"body": {}, "version": 2**70}),
    (409, "PUT", "TASK/draft", {"body": {}, "version": 7}),
    (422, "POST", "TASK/answer", {"kind": "essay", "answer": "x"}),
    (422, "POST", "TASK/answer", {"answer": "x"}),
    (422, "POST", "TASK/answer", {"kind": "comparison", "answer": "A"}),
    (422, "POST", "TASK/answer", {"kind": "comparison", "answer": "C"}),
    (422, "POST", "TASK/answer", {"kind": "demonstration", "answer": "\udfff"}),
    (422, "POST", "TASK/answer", {"kind": "ranking", "answer": [["A"], ["B"]]}),
    (422, "POST", "TASK/answer", {"kind": "ranking", "answer": [["A", "A"], ["B"], ["\ud800"]]}),
    (422, "POST", "TASK/answer", {"kind": "ranking", "answer": "ABC"}),
    (422, "POST", "TASK/answer", {"kind": "rating", "answer": {"\ud800": 1}}),
    (422, "POST", "TASK/answer", {"kind": "rating", "answer": {"A": {"likert": True}}}),
    (422, "POST", "TASK/answer", {**RANKING, "seconds": -1}),
    (422, "POST", "TASK/answer", {**RANKING, "guideline_version": "v7"}),
    (422, "PUT", "TASK/answer", RANKING),
    (422, "POST", "TASK/undo", {"revision": 1}),
    (422, "POST", "TASK/skip", {"reason": "bored"}),
    (422, "POST", "TASK/skip", {"note": "x" * 5000}),
    (422, "POST", "TASK/flag", {}),
    (422, "POST", "/api/v1/lead/exports", {"studies": []}),
    (422, "POST", "/api/v1/lead/exports", {"studies": ["nothing"]}),
    (422, "POST", "/api/v1/lead/exports", {"studies": ["a\0"]}),
    (422, "POST", "/api/v1/lead/exports", {"studies": ["study"], "validation": 0.6, "test": 0.6}),
]
UNREADABLE = [b"", b"{", b"\xff", b"[" * 100_000, b'{"study": NaN}', b'{"study": ' + b"9" * 5000 + b"}", b'"study"']


def test_every_mistake_has_its_sentence(services: Services, make: Make, program: Callable[..., Program]) -> None:
    services.labels.queue(make.study(), make.items(2))
    both = program("both", "rater", "lead")
    task_id = next_task(both)["id"]
    for status, method, path, body in BAD:
        answer = both.request(
            method,
            path.replace("TASK", f"/api/v1/tasks/{task_id}"),
            content=None if body is None else json.dumps(body),
            headers={"content-type": "application/json"},
        )
        assert (answer.status_code, method, path, body) == (status, method, path, body), answer.text
        refused(answer, status)
    for content in UNREADABLE:
        answer = both.post("/api/v1/tasks/next", content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text
        refused(answer, answer.status_code)
    long = both.post("/api/v1/tasks/next", json={"study": "x" * (1 << 20)})
    refused(long, 413)
    refused(both.post("/api/v1/tasks/next", data={"study": "study"}), 422)
    assert both.get(f"/api/v1/tasks/{task_id}").json()["draft"] is None, "nothing of all that was stored"
    assert services.labels.progress("study").answered == 0


def test_people_are_slowed_down_and_programs_less(
    services: Services,
    make: Make,
    clock: Clock,
    settings: LabellingSettings,
    program: Callable[..., Program],
    machine: Callable[[str], Program],
) -> None:
    for group in ("team", GROUP):
        services.labels.queue(dataclasses.replace(make.study(name=group), rater_group=group), make.items(1))
    ann, bot = program("ann"), machine("bot")
    for _ in range(settings.claim.burst):
        next_task(ann, "team")
        next_task(bot, GROUP)
    answer = ann.post("/api/v1/tasks/next", json={"study": "team"})
    assert "try again in 1 s" in refused(answer, 429)
    assert answer.headers["retry-after"] == "1"
    next_task(bot, GROUP)
    clock.now += 1
    next_task(ann, "team")


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_document_describes_every_route(app: FastAPI) -> None:
    found = Program(app, ORIGIN, None).get("/api/v1/openapi.json")
    assert found.json() == json.loads(json.dumps(document()))
    operations = [one for path in found.json()["paths"].values() for one in path.values()]
    assert len(operations) > 15
    for operation in operations:
        assert operation["description"].endswith((".", ")"))
        assert set(operation["responses"]) in ({"200", "4XX"}, {"204", "4XX"})
        assert operation["tags"]
    assert found.json()["security"] == [{"token": []}]


EXAMPLES = 3  # for each route, good requests and bad ones each


def test_no_request_that_the_document_allows_or_forbids_breaks_the_server(
    services: Services, make: Make, program: Callable[..., Program], clock: Clock
) -> None:
    services.labels.queue(make.study(), make.items(30))
    both = program("both", "rater", "lead")
    task_id = next_task(both)["id"]
    schema = schemathesis.openapi.from_dict(document())
    modes = list(schemathesis.GenerationMode)

    def try_out(operation: schemathesis.APIOperation[Any, Any, Any, Any], mode: schemathesis.GenerationMode) -> None:
        @hypothesis.settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case[Any]) -> None:
            clock.now += 60  # no 429s
            if "task_id" in case.path_parameters:
                case.path_parameters["task_id"] = task_id
            kwargs = case.as_transport_kwargs(base_url=ORIGIN)
            kwargs = {{"data": "content"}.get(name, name): value for name, value in kwargs.items() if name != "cookies"}
            answer = both.request(**kwargs)
            assert answer.status_code < 500, (case.method, case.formatted_path, case.body, answer.text)
            if answer.status_code >= 400:
                refused(answer, answer.status_code)
            else:
                case.validate_response(answer, checks=[response_schema_conformance, status_code_conformance])

        check()

    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        for mode in modes:
            try_out(found.ok(), mode)
