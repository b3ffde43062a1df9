"""A run with people, from nothing to its report: it waits, people answer in browsers, it goes on.

Two people: ann, whose answers train, and ben, who is held out. Both go by the alphabet; ben ties the last two.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.forked import forked
from tests.labelling.conftest import PASSWORD, PATIENCE
from tests.labelling.test_serve import server

from tastemaker.cli import main
from tastemaker.files import read_demonstrations, read_rankings
from tastemaker.store import LabelService, Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

RECIPE = """
name = "with-people"
raters = "people"
threads = 1
base.model = "{base}"
prompts.source = "tastemaker.tinyworld.study:prompts?train=4&validation=2&test=2"
demonstrations = {{ train = 2, validation = 0 }}

[sft.first]
epochs = 1
batch_size = 2
optimizer.learning_rate = 1e-3

[comparisons]
responses_per_prompt = 4
sources = ["sft/first"]
train = 2
validation_overlap = 1
decoding = {{ max_new_tokens = 5 }}

[reward.main]
init = "first"
batch_size = 2
optimizer.learning_rate = 1e-3

[policy.ppo]
kind = "ppo"
init = "first"
reward = "main"
iterations = 1
batch_size = 2
minibatches = 1
decoding = {{ max_new_tokens = 5 }}
policy.learning_rate = 1e-3
value.learning_rate = 1e-3

[evaluation]
pairs = [["ppo", "sft"]]
judges = ["held-out", "training"]
decodings = [{{ max_new_tokens = 5 }}]
contestants.sft = {{ model = "sft/first" }}
contestants.ppo = {{ model = "policy/ppo", reference = "sft/first" }}
"""


class Person:
    """Somebody with a browser, who takes up an invitation and does what there is to do."""

    def __init__(self, page: Page, name: str, *, ties_last: bool) -> None:
        self.page, self.name, self.ties_last = page, name, ties_last

    def accept(self, link: str) -> None:
        self.page.goto(link)
        for field, value in (("name", self.name), ("password", PASSWORD), ("again", PASSWORD)):
            self.page.fill(f"#{field}", value)
        self.page.get_by_role("button", name="Create account").click()
        self.page.wait_for_selector(f"text=Welcome, {self.name}.")
        self.address = re.sub(r"/invitation/.*", "", link)

    def work(self) -> Counter[str]:
        """Answer all that waits; how many of each kind."""
        done: Counter[str] = Counter()
        self.page.goto(f"{self.address}/desk")
        while (start := self.page.locator("button[aria-label^=Start]")).count():
            title = (
                (start.first.get_attribute("aria-label") or "").removeprefix("Start: ").partition(" (")[0]
            )  # studies of one kind are numbered
            start.first.click()
            self.page.wait_for_url("**/desk/tasks/*")
            while self.page.locator("form[data-task]").count():
                before = self.page.url
                self._answer()
                self.page.get_by_role("button", name="Submit").click()
                self.page.wait_for_url(lambda url, before=before: url != before)  # type: ignore[misc]
                done[title] += 1
            self.page.goto(f"{self.address}/desk")
        return done

    def _answer(self) -> None:
        if self.page.locator("textarea[name=text]").count():
            self.page.fill("textarea[name=text]", "the farmer eats corn .")
            return
        texts = {
            one.get_attribute("data-response") or "": one.locator("> :nth-child(2)").inner_text()
            for one in self.page.locator("[data-response]").all()
        }
        best_first = sorted(texts, key=lambda letter: texts[letter])
        if self.page.locator("[name=choice]").count():
            self.page.keyboard.press(best_first[0].lower())
            return
        assert len(set(texts.values())) == 4, "somebody who reads can tell them apart"
        for rank, letter in enumerate(best_first, start=1):
            self.page.keyboard.press(letter.lower())
            self.page.keyboard.press(str(3 if self.ties_last and rank == 4 else rank))


class Run:
    """`tastemaker run`, given again and again as it says."""

    def __init__(self, recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._command = ["run", str(recipe), "--out", str(out)]
        self._capsys = capsys
        self.said = ""

    def __call__(self) -> str:
        """What it waits for, such as "2 ranking answers by training raters"; nothing when it is through."""
        code = main(self._command)
        self.said = self._capsys.readouterr().err
        waiting = re.search(r"waiting: (.*) (?:is|are) still missing", self.said)
        assert code == (3 if waiting else 0), self.said
        return waiting[1] if waiting else ""

    def invitation(self, address: str) -> str:
        """The link that is printed by the command that the run named."""
        (command,) = re.findall(r"`tastemaker (label invite [^`]*)`", self.said)
        assert main([*shlex.split(command), "--origin", address]) == 0
        return self._capsys.readouterr().out.strip()


@pytest.fixture
def windows(chromium: Chromium) -> Iterator[list[Page]]:
    """Two people's windows."""
    contexts = [chromium.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.set_default_timeout(PATIENCE)
    yield pages
    for context in contexts:
        context.close()


def test_a_run_waits_for_people_and_goes_on(
    random_base: Path, windows: list[Page], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "people.toml", tmp_path / "out"
    recipe.write_text(RECIPE.format(base=random_base))
    run = Run(recipe, out, capsys)
    ann, ben = (Person(page, name, ties_last=name == "ben") for page, name in zip(windows, ("ann", "ben"), strict=True))

    assert run() == "2 demonstration answers by training raters"
    assert f"`tastemaker label serve --database {out / 'labels.db'}`" in run.said
    assert main(["label", "invite", "--data", str(out), "--group", "held-out"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "Nothing is asked of group 'held-out' so far; what there is to answer is for training." in said
    with server(out, start=forked) as (_, address):
        ann.accept(run.invitation(address))
        assert ann.work() == {"Write a response": 2}
        assert run() == "2 ranking answers by training raters"
        assert ann.work() == {"Rank responses": 2}
        assert run() == "2 ranking answers by training raters", "those of the validation prompts"
        assert ann.work() == {"Rank responses": 2}

        assert run() == "2 ranking answers by held-out raters"
        assert ann.work() == {}, "they are for others"
        ben.accept(run.invitation(address))
        assert ben.work() == {"Rank responses": 2}
        assert run() == "2 comparison answers by held-out raters"
        assert ben.work() == {"Compare two responses": 2}
        assert run() == "2 comparison answers by training raters"
        assert ann.work() == {"Compare two responses": 2}
        assert run() == ""

    _check_answers(out)
    _check_agreement(out, windows[0])


def _check_answers(out: Path) -> None:
    stages = out / "round-1"
    written = read_demonstrations(stages / "2-demonstrations/train.jsonl")
    assert [(one.response, one.author.rater, one.author.origin) for one in written] == [
        ("the farmer eats corn .", "ann", "human")
    ] * 2
    for part, rater in (("train", "ann"), ("validation", "ann"), ("held-out", "ben")):
        for ranking in read_rankings(stages / f"4-comparisons/{part}.jsonl"):
            assert (ranking.author.rater, ranking.author.origin) == (rater, "human")
            order = [sorted(ranking.responses[index].text for index in group) for group in ranking.order]
            assert [text for group in order for text in group] == sorted(one.text for one in ranking.responses), (
                "as the person read them"
            )
            assert [len(group) for group in order] == ([1, 1, 2] if rater == "ben" else [1, 1, 1, 1])
    with Store.open(out / "labels.db") as store:
        service = LabelService(store)
        found = [
            one for each in service.studies() if each.kind == "comparison" for one in service.comparisons(each.name)
        ]
    assert Counter((one.rater, one.origin) for one in found) == {("ann", "human"): 2, ("ben", "human"): 2}


def _check_agreement(out: Path, page: Page) -> None:
    agreement = json.loads((out / "results.json").read_text())["agreement"]
    # Six pairs a ranking, of two: they agree on five, and ann prefers one of the two that ben ties.
    across = agreement["training_against_held_out"]
    measured = {name: across[name]["value"] for name in ("ties_excluded", "tie_is_half", "tie_is_a_class")}
    assert measured == pytest.approx({"ties_excluded": 1, "tie_is_half": 11 / 12, "tie_is_a_class": 10 / 12}, abs=1e-9)
    assert (across["raters"], across["other_raters"], across["tie_is_half"]["n"]) == (1, 1, 12)
    assert agreement["evaluation"]["training_against_held_out"]["ties_excluded"]["value"] == 1
    assert "reason" in agreement["training"]["alpha"], "there is one training rater"
    page.goto(f"file://{out / 'report.html'}")
    rows = page.locator("table.agreement tbody tr").all_inner_texts()
    (rankings, final) = (row for row in rows if row.startswith("Training raters with held-out raters"))
    assert "1 with 1\t12\t100%" in " ".join(rankings.split("\n"))
    assert "the final comparisons" in final
