"""A rater's pages as forms without JavaScript, on both databases, and what they leave in the store."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from typing import TYPE_CHECKING

import pytest
from fastapi import FastAPI
from tests.labelling.conftest import Browser, People
from tests.store.conftest import Clock, Make

from tastemaker.labelling.answer_forms import MAX_TEXT
from tastemaker.labelling.web import Services
from tastemaker.store.audit import Actor
from tastemaker.store.importing import GoldItem
from tastemaker.store.tasks import DemonstrationAnswer, Guideline, RankingAnswer, StudyKind

if TYPE_CHECKING:
    from httpx2 import Response

HIDDEN = re.compile(r'<input type="hidden" name="([^"]+)" value="([^"]*)">')
CHECKED = re.compile(r'name="([^"]+)" value="([^"]*)"[^>]* checked')
TEXT = re.compile(r'<textarea id="text"[^>]*>\n(.*?)</textarea>', re.S)
PROBLEM = re.compile(r'<p class="message error" role="alert">([^<]+)</p>')
OUTPUTS: dict[StudyKind, int] = {"demonstration": 0, "ranking": 3, "comparison": 2, "rating": 2}


class Desk:
    """A rater at a browser without JavaScript: presses the buttons that pages hold."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def start(self, study: str = "study") -> str:
        """Press Start; the path of the task."""
        answer = self.browser.submit("/desk/next", form="/desk", study=study)
        assert answer.status_code == 303, answer.text
        return str(answer.headers["location"])

    def page(self, path: str) -> str:
        answer = self.browser.get(path)
        assert answer.status_code == 200, answer.text
        return str(answer.text)

    def send(self, path: str, act: str = "submit", **fields: str) -> Response:
        """Fill in the task's form and press a button; what is in the form already goes along."""
        page = self.page(path)
        return self.browser.post(path, data={**dict(HIDDEN.findall(page)), **filled(page), "act": act, **fields})

    def draft(self, path: str, body: dict[str, str], version: int) -> Response:
        kinds = {"content-type": "application/json", "accept": "application/json"}
        headers = {"x-csrf-token": self.browser.token(path), **kinds}
        return self.browser.post(
            f"{path}/draft", content=json.dumps({"body": body, "version": version}), headers=headers
        )


def filled(page: str) -> dict[str, str]:
    """What a task's form holds, as a person sees it."""
    answer = page.split("data-answer")[1].split("data-trouble")[0]
    found = dict(CHECKED.findall(answer))
    text = TEXT.search(answer)
    return {**found, "text": unescape(text[1])} if text else found


def texts(page: str) -> dict[str, str]:
    """The letter under which a page shows each response, by its text."""
    return {
        text: letter
        for letter, text in re.findall(r'id="response-(.)".*?<div class="text raw"[^>]*>(.*?)<', page, re.S)
    }


def problem(answer: Response, status: int = 422) -> str:
    assert answer.status_code == status, answer.text
    found = PROBLEM.search(answer.text)
    assert found, "the page says what is wrong"
    return unescape(found[1])


@pytest.fixture
def ann(people: People) -> Desk:
    return Desk(people.browser("ann", "rater"))


def queue(services: Services, make: Make, kind: StudyKind, *, name: str = "study", items: int = 2) -> None:
    services.labels.queue(make.study(kind, name=name), make.items(items, OUTPUTS[kind]))


# --- each kind, from the home page to the readers -------------------------------------------------------------------


def test_a_demonstration_is_written(ann: Desk, services: Services, make: Make, clock: Clock) -> None:
    queue(services, make, "demonstration")
    assert "Write a response" in ann.page("/desk")
    path = ann.start()
    page = ann.page(path)
    assert [words in page for words in ("Be brief.", "Question key-0?", "Prefer the helpful.")] == [True] * 3
    clock.now += 30.0
    answer = ann.send(path, text="\r\nFirst & foremost:\r\n<b>second</b>", seconds="12.5")
    assert (answer.status_code, answer.headers["location"] != path) == (303, True)
    (found,) = services.labels.demonstrations("study")
    assert (found.response, found.author.rater, found.author.guideline_version) == (
        "\nFirst & foremost:\n<b>second</b>",
        "ann",
        "v1",
    )
    assert "Question key-1?" in ann.page(answer.headers["location"])
    assert filled(ann.page(path)) == {"text": "\nFirst & foremost:\n<b>second</b>"}


def test_responses_are_ranked_with_ties(ann: Desk, services: Services, make: Make, clock: Clock) -> None:
    queue(services, make, "ranking", items=1)
    path = ann.start()
    assert filled(ann.page(path)) == {}, "nothing is preselected"
    letter = texts(ann.page(path))
    ranks = {"Text 0 of key-0": "2", "Text 1 of key-0": "1", "Text 2 of key-0": "2"}
    answer = ann.send(path, **{f"rank-{letter[text]}": rank for text, rank in ranks.items()})
    assert answer.headers["location"] == "/desk/finished?study=study"
    (found,) = services.labels.rankings("study")
    assert found.order == ((1,), (0, 2))
    assert "Nothing left here" in ann.page("/desk/finished?study=study")
    assert "You have answered 1 task of this kind" in ann.page("/desk/finished?study=study")


def test_each_response_is_rated(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "rating", items=1)
    path = ann.start()
    letter = texts(ann.page(path))
    first, second = letter["Text 0 of key-0"], letter["Text 1 of key-0"]
    fields = {f"likert-{first}": "6", f"likert-{second}": "2"}
    ann.send(path, **fields, **{f"hallucination-{second}": "yes", f"expresses_opinion-{second}": "yes"})
    ratings = services.labels.ratings("study")
    assert [(one.likert, one.flags) for one in ratings] == [(6, ()), (2, ("hallucination", "expresses_opinion"))]


@pytest.mark.parametrize(("choice", "preference"), [("first", 1.0), ("second", 0.0), ("tie", 0.5)])
def test_two_responses_are_compared(ann: Desk, services: Services, make: Make, choice: str, preference: float) -> None:
    queue(services, make, "comparison", items=1)
    path = ann.start()
    letter = texts(ann.page(path))
    chosen = {"first": letter["Text 0 of key-0"], "second": letter["Text 1 of key-0"]}.get(choice, choice)
    ann.send(path, choice=chosen)
    assert [one.preference for one in services.labels.comparisons("study")] == [preference]


# --- what is wrong is said next to the form, which comes back as it was ---------------------------------------------


def test_a_form_with_a_mistake_comes_back_filled(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "ranking")
    path = ann.start()
    answer = ann.send(path, **{"rank-A": "2", "rank-C": "1", "note": "Hm & <hm>"})
    assert "none yet for B" in problem(answer)
    assert filled(answer.text) == {"rank-A": "2", "rank-C": "1"}
    assert "Hm &amp; &lt;hm&gt;</textarea>" in answer.text
    assert services.labels.rankings("study") == []
    whole = {"rank-A": "2", "rank-B": "1", "rank-C": "1"}
    for wrong, sentence in (
        ({"rank-B": "NaN"}, "'NaN'"),
        ({"rank-D": "1"}, "no field 'rank-D'"),
        ({"seconds": "NaN"}, "'NaN'"),
        ({"seconds": "-1"}, "'-1'"),
        ({"seconds": "1e400"}, "'1e400'"),
        ({"guideline_version": "v9"}, "never had"),
    ):
        assert sentence in problem(ann.send(path, **{**whole, **wrong}))
    assert services.labels.rankings("study") == []


def test_a_text_that_is_empty_or_too_long_comes_back(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "demonstration")
    path = ann.start()
    assert "is empty" in problem(ann.send(path, text=" \r\n"))
    long = "ä" * (MAX_TEXT + 1)
    answer = ann.send(path, text=long)
    assert f"{MAX_TEXT} are allowed" in problem(answer)
    assert filled(answer.text) == {"text": long}
    assert "4000 are allowed" in problem(ann.send(path, "skip", text="mine", note="x" * 4001))
    assert services.labels.demonstrations("study") == []


def test_no_form_crashes_the_server(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "demonstration")
    path = ann.start()
    for act in ("delete", "", "\x00"):
        assert ann.send(path, act, text="mine").status_code == 422
    token = {"csrf_token": ann.browser.token(path)}
    assert ann.browser.post(path, data={**token, "text": ["one", "two"]}).status_code == 422
    assert ann.browser.post(path, data=token, files={"text": b"mine"}).status_code == 422
    for study in ("", "\x00", "none"):
        assert ann.browser.post("/desk/next", data={**token, "study": study}).status_code == 404
    headers = {"x-csrf-token": token["csrf_token"], "accept": "application/json"}
    wrong: list[object] = [{}, [], {"body": {"text": 1}, "version": 0}, {"body": {}, "version": "x"}, {"body": []}]
    for body in wrong:
        assert ann.browser.post(f"{path}/draft", json=body, headers=headers).status_code == 422
    for fields in ({"text": "\ud800"}, {"other": "x"}, {"text": "x" * (MAX_TEXT + 1)}, {"seconds": "NaN"}):
        assert ann.draft(path, fields, 0).status_code == 422
    assert filled(ann.page(path)) == {"text": ""}


# --- whose it is ----------------------------------------------------------------------------------------------------

TASK_POSTS = ("", "/draft", "/heartbeat", "/undo")


def test_anothers_task_does_not_exist(ann: Desk, people: People, services: Services, make: Make) -> None:
    queue(services, make, "demonstration")
    path, bob = ann.start(), Desk(people.browser("bob", "rater"))
    for foreign in (path, f"/desk/tasks/{'0' * 32}", "/desk/tasks/x%00"):
        assert bob.browser.get(foreign).status_code == 404
        headers = {"x-csrf-token": bob.browser.token("/desk")}
        for what in TASK_POSTS:
            answer = bob.browser.post(f"{foreign}{what}", json={"body": {}, "version": 0}, headers=headers)
            assert answer.status_code == 404, what
    assert bob.browser.get(f"/desk/history?before={path.rpartition('/')[2]}").status_code == 404
    assert bob.browser.get("/desk/guideline?version=v2").status_code == 404


def test_every_form_needs_its_token_and_every_page_a_rater(
    app: FastAPI, ann: Desk, people: People, services: Services, make: Make
) -> None:
    queue(services, make, "demonstration")
    path = ann.start()
    for post in ("/desk/next", "/desk/topics", *(f"{path}{what}" for what in TASK_POSTS)):
        assert ann.browser.post(post, data={"study": "study", "text": "mine", "act": "submit"}).status_code == 403
    assert services.labels.demonstrations("study") == []
    lead, visitor = people.browser("lea", "lead"), Browser(app)
    for page in ("/desk", "/desk/history", "/desk/topics", "/desk/finished", path):
        assert lead.get(page).status_code == 403
        assert visitor.get(page).headers["location"].startswith("/sign-in?next=/desk")


# --- drafts ---------------------------------------------------------------------------------------------------------


def test_a_draft_is_there_after_a_new_sign_in(app: FastAPI, ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "demonstration")
    path = ann.start()
    assert ann.draft(path, {"text": "half a\nsentence", "seconds": "7.5"}, 0).json() == {"version": 1}
    ann.browser.submit("/sign-out", form="/desk")
    again = Desk(Browser(app).sign_in("ann"))
    assert again.start() == path
    assert filled(again.page(path)) == {"text": "half a\nsentence"}
    assert 'name="seconds" value="7.5"' in again.page(path)
    assert services.labels.demonstrations("study") == []
    again.send(path, text="a whole sentence")
    assert [one.response for one in services.labels.demonstrations("study")] == ["a whole sentence"]
    assert filled(again.page(path)) == {"text": "a whole sentence"}, "the answer wiped the draft"


def test_an_older_window_never_overwrites_a_draft(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "demonstration")
    path = ann.start()
    assert ann.draft(path, {"text": "newer"}, 0).status_code == 200
    refused = ann.draft(path, {"text": "older"}, 0)
    assert refused.status_code == 409
    assert "saved elsewhere meanwhile" in refused.json()["error"]
    answer = ann.send(path, "draft", text="older, by hand", draft_version="0")
    assert "saved elsewhere meanwhile" in problem(answer, 409)
    assert filled(answer.text) == {"text": "older, by hand"}
    assert 'name="draft_version" value="0"' in answer.text, "and the next save is refused too"
    assert filled(ann.page(path)) == {"text": "newer"}


def test_a_draft_is_saved_by_a_button_too(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "rating")
    path = ann.start()
    answer = ann.send(path, "draft", **{"likert-A": "3", "hallucination-B": "yes"})
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    assert filled(ann.page(path)) == {"likert-A": "3", "hallucination-B": "yes"}


# --- leases, skips, flags -------------------------------------------------------------------------------------------


def test_after_a_lost_lease_the_answer_is_kept(
    ann: Desk, people: People, services: Services, make: Make, clock: Clock
) -> None:
    queue(services, make, "demonstration", items=1)
    path = ann.start()
    ann.draft(path, {"text": "slow"}, 0)
    clock.now += 3600.0
    bob = Desk(people.browser("bob", "rater"))
    taken = bob.start()
    page = ann.page(path)
    assert "has run out, and it may go to somebody else" in page
    assert filled(page) == {"text": "slow"}
    held = ann.browser.post(f"{path}/heartbeat", json={}, headers={"x-csrf-token": ann.browser.token(path)})
    assert held.json() == {"held": False}
    answer = ann.send(path, text="slow but sure")
    assert "Your answer is kept." in ann.page(answer.headers["location"])
    bob.send(taken, text="fast")
    assert [one.response for one in services.labels.demonstrations("study")] == ["fast"]
    assert filled(ann.page(path)) == {"text": "slow but sure"}
    assert "kept beside somebody else" in ann.page("/desk/history")


def test_a_heartbeat_keeps_the_lease(ann: Desk, people: People, services: Services, make: Make, clock: Clock) -> None:
    queue(services, make, "demonstration", items=1)
    path, bob = ann.start(), Desk(people.browser("bob", "rater"))
    for _ in range(3):
        clock.now += 1200.0
        headers = {"x-csrf-token": ann.browser.token(path)}
        assert ann.browser.post(f"{path}/heartbeat", json={}, headers=headers).json() == {"held": True}
    assert bob.start().startswith("/desk/finished")


def test_a_report_keeps_what_was_typed_and_a_skip_moves_on(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "demonstration")
    path = ann.start()
    assert "Choose what a lead should look at" in problem(ann.send(path, "flag", text="so far"))
    answer = ann.send(path, "flag", text="so far", flag_reason="personal_data", note="An address")
    assert answer.headers["location"] == path
    assert filled(ann.page(path)) == {"text": "so far"}
    assert "must be one of" in problem(ann.send(path, "skip", skip_reason="boring"))
    following = ann.send(path, "skip").headers["location"]
    assert "Question key-1?" in ann.page(following)
    assert ann.send(following, "skip", skip_reason="unclear").headers["location"] == "/desk/finished?study=study"
    (overview,) = services.lead.studies()
    assert (overview.skips, overview.flags) == (2, 1)
    assert "You skipped this task" in ann.page(path)
    ann.send(path, text="after all")
    assert [one.response for one in services.labels.demonstrations("study")] == ["after all"]


# --- undo, revise, history ------------------------------------------------------------------------------------------


def test_an_answer_is_changed_and_the_change_undone(ann: Desk, services: Services, make: Make) -> None:
    queue(services, make, "ranking", items=1)
    path = ann.start()
    first = {"rank-A": "1", "rank-B": "2", "rank-C": "2"}
    ann.send(path, **first)
    before = services.labels.rankings("study")
    assert "Undo last change" not in ann.page(path)
    answer = ann.send(path, **{"rank-A": "2", "rank-B": "2", "rank-C": "1"})
    assert answer.headers["location"] == path
    assert "Your answer is stored as it is now." in ann.page(path)
    assert services.labels.rankings("study") != before
    assert '<input type="hidden" name="revision" value="2">' in ann.page(path)
    assert "Undo last change" in ann.page(path)
    for _ in range(2):  # a double click sends the same form twice
        answer = ann.browser.submit(f"{path}/undo", form=path, revision="2")
        assert answer.headers["location"] == path
    assert "Nothing was undone by that" in ann.page(path)
    assert [one.order for one in services.labels.rankings("study")] == [one.order for one in before]
    assert filled(ann.page(path)) == first
    assert "(version 3)" in ann.page(path)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # long, and the same on either database
def test_the_history_leads_back_to_every_answer(ann: Desk, services: Services, make: Make) -> None:
    assert "You have not answered anything yet." in ann.page("/desk/history")
    queue(services, make, "demonstration", items=52)
    for index in range(52):
        services.desk.submit("ann", *_answer(services, index))
    page = ann.page("/desk/history")
    assert (page.count('<a href="/desk/tasks/'), "Question key-51?" in page, "52 in all" in page) == (50, True, True)
    older = re.search(r'href="(/desk/history\?before=[0-9a-f]+)"', page)
    assert older
    assert re.findall(r"Question (key-\d+)", ann.page(older[1])) == ["key-1", "key-0"]


def _answer(services: Services, index: int) -> tuple[str, DemonstrationAnswer]:
    view = services.desk.next_task("ann", "study")
    assert view is not None
    return view.task.id, DemonstrationAnswer(f"answer {index}")


def test_the_guideline_that_was_shown_is_the_one_that_is_named(
    ann: Desk, services: Services, make: Make, people: People
) -> None:
    people.account("lea", "lead")
    queue(services, make, "demonstration")
    path = ann.start()
    page = ann.page(path)
    services.lead.set_guideline(
        "study", Guideline(version="v2", text="Prefer the *short*."), actor=Actor("lea", "lead")
    )
    ann.browser.post(path, data={**dict(HIDDEN.findall(page)), "text": "mine"})
    (found,) = services.labels.demonstrations("study")
    assert found.author.guideline_version == "v1"
    assert "Prefer the helpful." in ann.page("/desk/guideline?version=v1")
    assert "Prefer the <em>short</em>." in ann.page(ann.start())


# --- screening and topics -------------------------------------------------------------------------------------------


@pytest.fixture
def screened(services: Services, make: Make, people: People) -> Services:
    """A group whose work opens after a screening test of one ranking."""
    people.account("lea", "lead")
    lea = Actor("lea", "lead")
    services.lead.create_study(make.study("ranking", name="test"), actor=lea, screening=True)
    gold = GoldItem(item=make.item("gold"), expected=RankingAnswer((("A",), ("B",), ("C",))))
    services.lead.add_gold("test", [gold], actor=lea)
    services.labels.queue(make.study("demonstration", name="work"), make.items(1, 0))
    return services


def test_work_opens_after_the_screening_test(ann: Desk, screened: Services) -> None:
    page = ann.page("/desk")
    assert page.index("Screening test") < page.index("Not open to you yet")
    assert "say how well you can judge each topic" in page
    assert page.count("<button aria-label=") == 1
    assert ann.start("work") == "/desk"
    assert "opens when you have passed the screening test" in ann.page("/desk")
    path = ann.start("test")
    answer = ann.send(path, **{"rank-A": "1", "rank-B": "2", "rank-C": "3"})
    assert "A lead looks at your answers" in ann.page(answer.headers["location"])
    assert "opens when a lead has looked at your answers" in ann.page("/desk")
    screened.screening.decide("ann", passed=True, reason="good", actor=Actor("lea", "lead"))
    assert ann.start("work").startswith("/desk/tasks/")


def test_raters_say_what_they_can_judge(ann: Desk, services: Services) -> None:
    def send(**fields: str) -> Response:
        page = dict(HIDDEN.findall(ann.page("/desk/topics")))
        return ann.browser.post("/desk/topics", data={**page, **fields})

    answer = send(**{"level-2": "5", "level-10": "2", "topic-10": "beekeeping & <bees>", "level-3": ""})
    assert answer.headers["location"] == "/desk"
    assert services.desk.profile("ann").topics == {"mathematics": 5, "beekeeping & <bees>": 2}
    page = ann.page("/desk/topics")
    assert ("beekeeping &amp; &lt;bees&gt;" in page, 'name="level-2" value="5" checked' in page) == (True, True)
    assert "from 1 to 5" in problem(send(**{"level-0": "6"}))
    assert "Name the topic" in problem(send(**{"level-11": "3"}))
    refused = send(**{"topic-11": "mathematics", "level-11": "3", "level-2": "1"})
    assert "stands there twice" in problem(refused)
    assert 'name="level-2" value="1" checked' in refused.text
    assert services.desk.profile("ann").topics["mathematics"] == 5


# --- blindness ------------------------------------------------------------------------------------------------------

SECRET = "canary"
ANSWERS: dict[StudyKind, dict[str, str]] = {
    "demonstration": {"text": "mine"},
    "ranking": {"rank-A": "1", "rank-B": "2", "rank-C": "2"},
    "comparison": {"choice": "tie"},
    "rating": {"likert-A": "1", "likert-B": "7", "harmful_advice-A": "yes"},
}


def skip_all(desk: Desk, path: str) -> str:
    """Skip from this task on; the path of the page that says that nothing is left."""
    while "/tasks/" in path:
        path = desk.send(path, "skip").headers["location"]
    return path


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # long, and the same on either database
def test_no_page_says_what_a_rater_must_not_know(ann: Desk, people: People, services: Services, make: Make) -> None:
    """Every page that a rater can reach by links and buttons, with its headers."""
    bob = Desk(people.browser("bob", "rater"))
    for kind, outputs in OUTPUTS.items():
        items = []
        for index in range(2):
            item = make.item(f"{SECRET}-key-{index}", outputs)
            about = replace(
                item.prompt.about, id=f"{SECRET}-id-{index}", user=SECRET, category=SECRET, extra={SECRET: SECRET}
            )
            prompt = replace(item.prompt, messages=item.prompt.messages[:1], about=about)
            shown = tuple(
                replace(each, source=f"{SECRET}-model", response=replace(each.response, text=f"Text {place}"))
                for place, each in enumerate(item.outputs)
            )
            items.append(replace(item, prompt=prompt, outputs=shown))
        services.labels.queue(replace(make.study(kind, name=f"seen/{kind}", overlap=2)), items)
    seen: dict[str, str] = {}

    def look(answer: Response) -> None:
        told = f"{answer.headers} {answer.text}"
        assert SECRET not in told.lower()
        assert "finished=" not in told
        seen[str(answer.url.path)] = answer.text
        for link in re.findall(r'href="(/[^"]*)"', answer.text):
            if link.partition("?")[0] not in seen and not link.startswith("/static/"):
                look(ann.browser.get(unescape(link)))

    for kind, answer in ANSWERS.items():
        path = bob.start(f"seen/{kind}")
        bob.send(path, "flag", flag_reason="other", note=f"{SECRET} by bob")
        skip_all(bob, path)
        path = ann.start(f"seen/{kind}")
        look(ann.browser.get(path))
        for act in ("submit", "draft", "flag"):
            look(ann.send(path, act))
        following = ann.send(path, **answer).headers["location"]
        look(ann.browser.get(skip_all(ann, following)))
    look(ann.browser.get("/desk"))
    assert {"/desk", "/desk/history", "/desk/topics", "/desk/guideline", "/desk/finished"} <= set(seen)
    assert sum(path.startswith("/desk/tasks/") for path in seen) >= 4
    words = re.sub(r"<[^>]*>", " ", " ".join(seen.values()))
    assert "Be brief." in words, "the walk does reach the tasks"
    assert "seen/" not in words, "a study's name is in no page's words"


def test_three_tasks_begun_are_named_by_their_titles(ann: Desk, services: Services, make: Make) -> None:
    for kind in OUTPUTS:
        queue(services, make, kind, name=f"seen/{kind}")
    queue(services, make, "ranking", name="seen/other")
    for name in ("demonstration", "ranking", "other"):
        ann.start(f"seen/{name}")
    page = ann.page("/desk")
    assert "(Write a response, Rank responses (2), Rank responses): finish or skip one" in page
    assert ann.start("seen/rating") == "/desk"
    assert "Rank responses): finish or skip one" in ann.page("/desk").split("</h1>")[0]
