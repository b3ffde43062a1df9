"""Every shape of a row, and the same record from each shape that can say it."""

from __future__ import annotations

import pytest

from tastemaker.errors import DataError
from tastemaker.records import About, Author, Demonstration, Message, Prompt, Ranking, Response
from tastemaker.shapes import Row, Unusable, demonstrations_in, prompts_in, rankings_in, texts_in

USER, OAK, MORE = Message("user", "Name a tree."), Message("assistant", "Oak."), Message("user", "Another?")
TURNS = (USER, OAK, MORE)
MESSAGES = [turn.to_json() for turn in TURNS]
FROM_VALUE = [
    {"from": "human", "value": "Name a tree."},
    {"from": "gpt", "value": "Oak."},
    {"from": "human", "value": "Another?"},
]
TRANSCRIPT = "\n\nHuman: Name a tree.\n\nAssistant: Oak.\n\nHuman: Another?"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": MESSAGES},
        {"messages": MESSAGES},
        {"conversations": FROM_VALUE},
        {"prompt": TRANSCRIPT},
        {"prompt": TRANSCRIPT + "\n\nAssistant:"},
        {"prompt": TRANSCRIPT + " \n\nAssistant: ", "completion": " Elm."},
        {"instruction": "Another?", "history": [["Name a tree.", "Oak."]]},
        {"prompt": "Another?", "history": [["Name a tree.", "Oak."]]},
        {"prompt": MESSAGES, "messages": "unread, as the shape with 'prompt' comes first"},
        {"chosen": TRANSCRIPT + "\n\nAssistant: Elm.", "rejected": TRANSCRIPT + "\n\nAssistant: Ash."},
        # The conversations part before the last turn: what both share up to a user turn is still the prompt.
        {
            "chosen": TRANSCRIPT + "\n\nAssistant: Elm.\n\nHuman: Thanks.\n\nAssistant: :)",
            "rejected": TRANSCRIPT + "\n\nAssistant: Ash.",
        },
        {
            "chosen": TRANSCRIPT + "\n\nAssistant: Elm.\n\nHuman: Thanks.\n\nAssistant: :)",
            "rejected": TRANSCRIPT + "\n\nAssistant: Elm.\n\nHuman: More.\n\nAssistant: Ash.",
        },
    ],
)
def test_one_prompt_in_many_shapes(row: Row) -> None:
    assert prompts_in(row) == [Prompt(messages=TURNS)]


def test_a_prompt_with_all_that_may_be_known() -> None:
    row = {"prompt": "Name a tree.", "id": 7, "user": "ann", "category": "open_qa", "split": "test", "source": {"a": 1}}
    about = About(id="7", user="ann", category="open_qa", split="test", extra={"source": {"a": 1}})
    assert prompts_in(row) == [Prompt(messages=(USER,), about=about)]


def test_white_space_of_a_plain_prompt_is_its_own() -> None:
    assert prompts_in({"prompt": " Human: hi\n"})[0].messages == (Message("user", " Human: hi\n"),)


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"instruction": "Translate.", "input": "Baum"}, "Translate.\n\nBaum"),
        ({"instruction": "Translate.", "context": "Baum"}, "Translate.\n\nBaum"),
        ({"instruction": "Translate.", "input": "Baum", "context": "of a lesson"}, "Translate.\n\nBaum"),
        ({"instruction": "Name a tree.", "context": ["not", "text"]}, "Name a tree."),
        ({"instruction": "Name a tree.", "input": ""}, "Name a tree."),
        ({"instruction": "Name a tree.", "input": None}, "Name a tree."),
    ],
)
def test_instruction_and_input(row: Row, content: str) -> None:
    assert prompts_in(row)[0].messages == (Message("user", content),)


def test_a_system_field_is_the_first_turn() -> None:
    system = Message("system", "Be brief.")
    assert prompts_in({"system": "Be brief.", "prompt": "Name a tree."})[0].messages == (system, USER)
    assert prompts_in({"system": "", "prompt": "Name a tree."})[0].messages == (USER,)
    history = {"history": [["Name a tree.", "Oak."]]}
    assert prompts_in({"system": "Be brief.", "prompt": "Another?", **history})[0].messages == (system, *TURNS)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": MESSAGES}, "prompt"),
        ({"prompt": TRANSCRIPT}, "prompt"),
        ({"messages": MESSAGES}, "messages"),
        ({"conversations": FROM_VALUE}, "conversations"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, "chosen"),
    ],
)
def test_a_conversation_says_itself_what_came_before(row: Row, name: str) -> None:
    """Earlier turns beside a whole conversation: dropped without a word, the model would learn from half of it."""
    with pytest.raises(DataError, match=f"a 'history' field, and '{name}' is a whole conversation"):
        prompts_in({**row, "history": [["Hello.", "Hi."]]})
    assert prompts_in({**row, "history": []}) == prompts_in(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": MESSAGES, "completion": "Elm."},
        {"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "Elm."}]},
        {"prompt": TRANSCRIPT + "\n\nAssistant:", "completion": " Elm."},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Elm."}]},
        {"prompt": "unread", "messages": [*MESSAGES, {"role": "assistant", "content": "Elm."}]},
        {"conversations": [*FROM_VALUE, {"from": "gpt", "value": "Elm."}]},
        {"instruction": "Another?", "output": "Elm.", "history": [["Name a tree.", "Oak."]]},
        {"prompt": "Another?", "completion": "Elm.", "history": [["Name a tree.", "Oak."]]},
    ],
)
def test_one_demonstration_in_many_shapes(row: Row) -> None:
    row = {**row, "rater": "r1", "origin": "human", "id": "d"}
    author = Author(rater="r1", origin="human")
    prompt = Prompt(messages=TURNS, about=About(id="d"))
    assert demonstrations_in(row) == [Demonstration(prompt=prompt, response="Elm.", author=author)]


def test_the_passage_of_an_instruction_is_read_once() -> None:
    """Dolly's fields: the passage is part of the prompt, and no field beside it."""
    row: Row = {"instruction": "Summarise it.", "context": "A tale.", "response": "In short.", "category": "summary"}
    prompt = Prompt(messages=(Message("user", "Summarise it.\n\nA tale."),), about=About(category="summary"))
    assert prompts_in(row) == [prompt]
    assert demonstrations_in(row) == [Demonstration(prompt=prompt, response="In short.")]


def test_instances_of_one_instruction() -> None:
    instances = [{"input": "Baum", "output": "tree"}, {"input": "Haus", "output": "house"}]
    row = {"id": "t", "instruction": "Translate.", "instances": instances}
    found = [(one.prompt.key, one.prompt.messages[0].content, one.response) for one in demonstrations_in(row)]
    assert found == [("t-1", "Translate.\n\nBaum", "tree"), ("t-2", "Translate.\n\nHaus", "house")]
    assert [prompt.key for prompt in prompts_in({**row, "instances": instances[:1]})] == ["t"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": MESSAGES, "responses": ["Elm.", "No."], "ranking": [[0], [1]]},
        {"prompt": MESSAGES, "responses": ["Elm.", "No."], "ranking": [0, 1]},
        {"prompt": MESSAGES, "chosen": "Elm.", "rejected": "No."},
        {"prompt": TRANSCRIPT + "\n\nAssistant:", "chosen": " Elm.", "rejected": " No."},
        {"prompt": MESSAGES, "chosen": {"role": "assistant", "content": "Elm."}, "rejected": "No."},
        {
            "prompt": MESSAGES,
            "chosen": [*MESSAGES, {"role": "assistant", "content": "Elm."}],
            "rejected": [*MESSAGES, {"role": "assistant", "content": "No."}],
        },
        {
            "chosen": [*MESSAGES, {"role": "assistant", "content": "Elm."}],
            "rejected": [*MESSAGES, {"role": "assistant", "content": "No."}],
        },
        {"chosen": TRANSCRIPT + "\n\nAssistant: Elm.", "rejected": TRANSCRIPT + "\n\nAssistant: No."},
        {
            "conversations": FROM_VALUE,
            "chosen": {"from": "gpt", "value": "Elm."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"instruction": "Another?", "history": [["Name a tree.", "Oak."]], "chosen": "Elm.", "rejected": "No."},
        {"prompt": "Another?", "history": [["Name a tree.", "Oak."]], "chosen": "Elm.", "rejected": "No."},
    ],
)
def test_one_ranking_in_many_shapes(row: Row) -> None:
    responses = (Response(text="Elm."), Response(text="No."))
    prompt = Prompt(messages=TURNS, about=About(extra={"margin": 2}))
    expected = Ranking(prompt=prompt, responses=responses, order=((0,), (1,)), author=Author(rater="r1"))
    assert rankings_in({**row, "rater": "r1", "margin": 2}) == [expected]


def test_a_weak_order_and_unfinished_responses() -> None:
    row = {"prompt": "P", "responses": ["a", "b", "c"], "ranking": [[2], [0, 1]], "finished": [True, False, True]}
    ranking = rankings_in(row)[0]
    assert ranking.ranks == (1, 1, 0)
    assert [response.finished for response in ranking.responses] == [True, False, True]


def test_a_pair_of_equal_texts_is_a_tie() -> None:
    assert rankings_in({"prompt": "P", "chosen": "a", "rejected": "a"})[0].order == ((0, 1),)
    same = TRANSCRIPT + "\n\nAssistant: Elm."
    assert rankings_in({"chosen": same, "rejected": same})[0].ranks == (0, 0)


def test_silence_may_be_ranked() -> None:
    row = {"chosen": TRANSCRIPT + "\n\nAssistant: Elm.", "rejected": TRANSCRIPT + "\n\nAssistant:"}
    assert rankings_in(row)[0].responses[1].text == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": TRANSCRIPT + "\n\nAssistant: Elm.", "rejected": "\n\nHuman: Other\n\nAssistant: No."},
            r"\(4 turns\) and 'rejected' \(2 turns\) differ from turn 1 on",
        ),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, "'chosen' ends in a turn by user"),
        # One stops where the other goes on: neither is an answer to the same prompt.
        (
            {"chosen": TRANSCRIPT + "\n\nAssistant: Elm.", "rejected": TRANSCRIPT},
            "'rejected' ends in a turn by user",
        ),
        ({"chosen": "\n\nAssistant: Elm.", "rejected": "\n\nAssistant: No."}, "the last turn is by nobody"),
        (
            {"prompt": "P", "chosen": [*MESSAGES, OAK.to_json()], "rejected": "No."},
            "'chosen' repeats a conversation that is not the row's prompt",
        ),
    ],
)
def test_unusable_pairs(row: Row, message: str) -> None:
    with pytest.raises(Unusable, match=message):
        rankings_in(row)


def test_pairs_without_a_common_user_turn_have_no_prompt() -> None:
    with pytest.raises(Unusable, match="share no user turn"):
        prompts_in({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"})


def test_names_of_shapes_never_become_extra_fields() -> None:
    row = {"prompt": "P", "prompt_id": "x", "chosen": "a", "rejected": "b", "messages": MESSAGES}
    assert rankings_in(row)[0].prompt.about.extra == {"prompt_id": "x"}


def test_errors_show_little_of_a_long_value() -> None:
    with pytest.raises(DataError) as caught:
        texts_in({"text": ["word"] * 1000})
    assert len(str(caught.value)) < 120
