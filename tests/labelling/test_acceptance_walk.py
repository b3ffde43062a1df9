"""The whole of labelling as new users meet it: a server started from nothing, real browsers, and the keyboard alone.

A lead sets up the account from the link that the server printed, makes studies and invites a rater. The rater comes,
takes the screening test, is let in, writes a demonstration, ranks five responses with a tie, undoes and ranks again.
The lead finds both in the exports. Nobody clicks, and nobody types an address that they were not given.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.forked import forked
from tests.labelling.keyboard import Keyboard
from tests.labelling.test_serve import log_of, server

from tastemaker.files import read_demonstrations, read_rankings

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium

GUIDELINE = "Be **helpful** first. Say so where you do not know."
QUESTION = "Why is the sky dark at night?"
WRITTEN = "Because the universe is young: light of most stars has not reached us yet."
RESPONSES = ("zero", "one", "two", "three", "four")  # the texts, by their places in the file


@pytest.mark.slow
def test_from_nothing_to_an_export_by_keyboard_alone(chromium: Chromium, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    with server(folder, start=forked) as (_process, address):
        (link,) = re.findall(rf"{address}/invitation/[\w-]+", log_of(folder))
        lead = Keyboard(chromium, link)
        become_admin(lead)
        make_study(lead, tmp_path, "first test", "Demonstration", {"prompt": "Greet a guest."}, screening=True)
        make_study(lead, tmp_path, "written", "Demonstration", {"prompt": QUESTION})
        make_study(lead, tmp_path, "ranked", "Ranking", {"prompt": QUESTION, "responses": list(RESPONSES)})
        rater = Keyboard(chromium, invite(lead))
        accept_and_sign_in(rater)
        take_the_test(rater)
        let_in(lead)
        demonstrate(rater)
        rank_and_undo(rater)
        assert exported_demonstrations(lead, tmp_path / "written") == [(QUESTION, WRITTEN)]
        assert exported_orders(lead, tmp_path / "ranked") == [[["two"], ["four", "one"], ["zero"], ["three"]]]
        for person in (lead, rater):
            person.close()


def test_a_keyboard_finds_only_what_tab_reaches(chromium: Chromium) -> None:
    page = "<label>Here <input></label><button>Go</button><button tabindex=-1>Never</button><a>Dead</a>"
    keyboard = Keyboard(chromium, f"data:text/html,{page}")
    keyboard.write("Here", "x")
    assert keyboard.to("Go").role == "button"
    assert keyboard.to("Here").role == "textbox", "the round goes on at the beginning"
    for name in ("Never", "Dead", "go"):
        with pytest.raises(AssertionError, match=rf"Tab does not reach '{name}' .* it reaches .*'Go', 'Here'"):
            keyboard.to(name)
    with pytest.raises(AssertionError, match="does not reach 'Grade'"):
        keyboard.choose("Grade", "6")
    keyboard.close()


# --- the lead ---------------------------------------------------------------------------------------------------------


def become_admin(lead: Keyboard) -> None:
    lead.reads("# Welcome")
    lead.write("Name", "lea")
    lead.write("Password", "a few words in a row")
    lead.write("Password again", "a few words in a row")
    lead.activate("Create account")
    lead.reads("Welcome, lea.")


def make_study(
    lead: Keyboard, folder: Path, name: str, kind: str, row: dict[str, object], *, screening: bool = False
) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text(json.dumps({"id": name, **row}) + "\n", encoding="utf-8")
    lead.activate("Studies")
    lead.reads("# Studies")
    lead.activate("New study")
    lead.reads("# New study")
    lead.write("Name", name)
    lead.pick("Kind", kind)
    lead.write("Rater group", "team")
    if screening:
        lead.tick("A screening test")
    lead.write("Guideline version", "2026-11")
    if screening:  # the first one; the others have the same, by its version
        lead.write("Guideline", GUIDELINE)
    lead.activate("Create study")
    lead.reads(f"The study {name} is made; now import its items.")
    lead.choose_file("File of items", file)
    lead.activate("Add items")
    lead.reads("1 item added.")


def invite(lead: Keyboard) -> str:
    """The link that the lead sends to the rater."""
    lead.activate("People")
    lead.reads("# People")
    lead.write("Rater group", "team")
    lead.activate("Make invitation")
    lead.reads("The invitation.")
    return lead.text("#secret")


def let_in(lead: Keyboard) -> None:
    lead.activate("Screening")
    lead.reads("# Screening")
    lead.reads("Good evening, come in.")
    lead.choose("Grade", "6")
    lead.activate("Keep grade")
    lead.reads("The grade is kept.")
    lead.activate("Decide")
    lead.write("Reason", "A good greeting.")
    lead.activate("May work")
    lead.reads("ann may work now.")


def export(lead: Keyboard, study: str, kind: str, folder: Path) -> list[Path]:
    """The files of answers in the zip."""
    lead.activate("Exports")
    lead.reads("# Exports")
    lead.tick(f"{study} {kind}, 1 answer")
    downloaded = lead.download("Download")
    with zipfile.ZipFile(downloaded.path()) as packed:
        packed.extractall(folder)
    return sorted(folder.rglob("*.jsonl"))


def exported_demonstrations(lead: Keyboard, folder: Path) -> list[tuple[str, str]]:
    found = [one for file in export(lead, "written", "demonstration", folder) for one in read_demonstrations(file)]
    return [(one.prompt.messages[-1].content, one.response) for one in found]


def exported_orders(lead: Keyboard, folder: Path) -> list[list[list[str]]]:
    """Each ranking as the texts of its responses, best first; those of a tie by the alphabet."""
    found = [one for file in export(lead, "ranked", "ranking", folder) for one in read_rankings(file)]
    return [[sorted(one.responses[index].text for index in group) for group in one.order] for one in found]


# --- the rater --------------------------------------------------------------------------------------------------------


def accept_and_sign_in(rater: Keyboard) -> None:
    rater.reads("lea invites you as rater in the group team.")
    rater.write("Name", "ann")
    rater.write("Password", "other words in a row")
    rater.write("Password again", "other words in a row")
    rater.activate("Create account")
    rater.reads("Welcome, ann.")
    rater.activate("Sign out")
    rater.reads("You are signed out.")
    rater.write("Name", "ann")
    rater.write("Password", "other words in a row")
    rater.press("Enter")
    rater.reads("# Your work")


def take_the_test(rater: Keyboard) -> None:
    rater.reads("Not open to you yet")
    rater.activate("say how well you can judge each topic")
    rater.reads("# Your topics")
    rater.choose("mathematics", "4")
    rater.activate("Save")
    rater.reads("what you say of your topics is stored.")
    rater.activate("Start: Write a response")
    rater.reads("Greet a guest.")
    rater.write("Your response", "Good evening, come in.")
    rater.activate("Submit")
    rater.reads("You have answered the whole screening test")


def demonstrate(rater: Keyboard) -> None:
    rater.activate("Work")
    rater.reads("# Your work")
    rater.activate("Start: Write a response")
    rater.reads(QUESTION)
    rater.reads("Say so where you do not know.")
    rater.write("Your response", WRITTEN)
    rater.press("Control+Enter")
    rater.reads("Your answer is stored.")


def rank_and_undo(rater: Keyboard) -> None:
    rater.activate("Start: Rank responses")
    rater.reads("# Rank responses")
    letters = {rater.text(f"[data-response={letter}] .text"): letter for letter in "ABCDE"}
    assert set(letters) == set(RESPONSES)
    for letter in "ABCDE":  # in the order of the page, by Tab and arrows
        text = next(one for one, under in letters.items() if under == letter)
        rater.choose(f"Rank of {letter}", {"zero": "1", "one": "2", "two": "2", "three": "4", "four": "5"}[text])
    assert "to go" not in rater.text("[data-order]")
    rater.activate("Submit")
    rater.reads("Your answer is stored.")
    # A slip: everything equally good.
    rater.activate("Answers")
    rater.reads("# Your answers")
    rater.activate("Rank responses")
    rater.reads("You answered this on")
    for letter in "abcde":
        rater.press(letter, "1")
    rater.activate("Change answer")
    rater.reads("Your answer is stored as it is now.")
    rater.activate("Undo last change")
    rater.reads("The answer before counts again.")
    order = rater.text("[data-order]")
    tie = " = ".join(sorted(letters[text] for text in ("one", "two")))
    assert order == f"Best first: {letters['zero']}, then {tie}, then {letters['three']}, then {letters['four']}"
    # And again, by single keys.
    for text, rank in {"zero": "3", "one": "2", "two": "1", "three": "5", "four": "2"}.items():
        rater.press(letters[text].lower(), rank)
    rater.press("Control+Enter")
    rater.reads("Your answer is stored as it is now.")
