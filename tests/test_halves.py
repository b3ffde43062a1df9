"""Halves of the prompts: disjoint, of equal expected size, and never with one conversation in both."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tastemaker.halves import first_turn, in_part
from tastemaker.records import About, Message, Prompt


def prompt(*turns: str) -> Prompt:
    return Prompt(messages=tuple(Message("assistant" if n % 2 else "user", turn) for n, turn in enumerate(turns)))


def test_halves_share_no_prompt_and_leave_none_out() -> None:
    prompts = [prompt(f"w{n}") for n in range(400)]
    first = [in_part(one, "first half") for one in prompts]
    assert [in_part(one, "second half") for one in prompts] == [not inside for inside in first]
    assert all(in_part(one, "all") for one in prompts)
    assert 150 < sum(first) < 250


@given(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=2, max_size=2))
def test_a_conversation_and_its_beginning_are_in_one_half(opening: str, later: list[str]) -> None:
    assert in_part(prompt(opening), "first half") == in_part(prompt(opening, *later), "first half")


def test_what_is_cut_is_another_prompt() -> None:
    long = Prompt(
        messages=(Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v")),
        about=About(id="p1", user="ann"),
    )
    cut = first_turn(long)
    assert [message.content for message in cut.messages] == ["s", "u"]
    assert (cut.about.id, cut.about.user) == (None, "ann")
    short = Prompt(messages=(Message("user", "u"),), about=About(id="p2"))
    assert first_turn(short) is short
