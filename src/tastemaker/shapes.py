"""What a row of a file means: the shapes of the ecosystem, read as records. Pure functions of one row; no files here.

    prompts          {"prompt"}  {"messages"}  {"conversations"}  {"chosen", "rejected"}  {"instruction", "input"}
    demonstrations   {"prompt", "completion"}  {"messages"}  {"conversations"}  {"instruction", "input", "output"}
    rankings         {"prompt", "responses", "ranking"}  {"prompt", "chosen", "rejected"}  {"chosen", "rejected"}
                     {"conversations", "chosen", "rejected"}  {"instruction", "input", "chosen", "rejected"}
    texts            {"text"}

A conversation is a list of `{"role", "content"}` or `{"from", "value"}`, or Anthropic's transcript
`"\\n\\nHuman: ...\\n\\nAssistant: ..."`. A key whose value is null counts as absent. The first shape of the list that a
row has all keys of is the one that is read.

Two things can be wrong with a row, and they differ. It is malformed (keys, types, an index that names no response):
`DataError`, always fatal, because the file is not what its owner thinks. Or it is well formed and of no use (blank, no
user turn last, `chosen` and `rejected` answering different conversations): `Unusable`, which public data holds a few
of per thousand rows, so a reader may leave such rows out if it is told to count them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tastemaker.errors import DataError
from tastemaker.records import (
    Demonstration,
    Message,
    Messages,
    Prompt,
    Ranking,
    Response,
    Role,
    Text,
    WeakOrder,
    about_from_json,
    author_from_json,
    check_weak_order,
    with_about,
)

Row = Mapping[str, object]
Record = TypeVar("Record")
Shapes = Sequence[tuple[tuple[str, ...], Callable[[Row], list[Record]]]]

BEST_FIRST: WeakOrder = ((0,), (1,))
TIE: WeakOrder = ((0, 1),)

# Names that carry content in some shape. They never become extra fields of a record: a record that kept another
# shape's "messages" beside its own would be written as one row and read back as something else.
SHAPE_KEYS = frozenset(
    "prompt completion messages conversations system instruction input output history instances "
    "chosen rejected response responses ranking finished text".split()
)

ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
ROLE_OF_FROM: Mapping[str, Role] = {**ROLES, "human": "user", "gpt": "assistant"}
ROLE_IN_TRANSCRIPT: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}

TURN_OF_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT_START = "\n\nHuman:"


class Unusable(DataError):
    """A well-formed row that cannot serve as the record asked for."""


def prompts_in(row: Row) -> list[Prompt]:
    """The prompts of a row. Rows of demonstrations and rankings give the conversation before the response."""
    return _match(row, PROMPT_SHAPES, "a prompt")


def demonstrations_in(row: Row) -> list[Demonstration]:
    """The demonstrations of a row; several where an instruction has several `instances`."""
    return _match(row, DEMONSTRATION_SHAPES, "a demonstration")


def rankings_in(row: Row) -> list[Ranking]:
    """The ranking of a row. A pair is a ranking of two, `chosen` first; a pair of equal texts is a tie."""
    return _match(row, RANKING_SHAPES, "a ranking")


def texts_in(row: Row) -> list[Text]:
    """The document of a row."""
    return _match(row, TEXT_SHAPES, "a text")


def _match(row: Row, shapes: Shapes[Record], what: str) -> list[Record]:
    present = {key for key, value in row.items() if value is not None}
    for keys, read in shapes:
        if present.issuperset(keys):
            return read(row)
    accepted = "; ".join("{" + ", ".join(keys) + "}" for keys, _ in shapes)
    found = ", ".join(key if key in present else f"{key} (null)" for key in row) or "none"
    hint = _hint(row, [key for keys, _ in shapes for key in keys])
    raise DataError(f"not {what}. Its keys are: {found}. Accepted: {accepted}.{hint}")


def _hint(row: Row, known: Sequence[str]) -> str:
    """What was probably meant: other separators, or a key that is misspelt."""
    if len(row) == 1 and ";" in next(iter(row)):
        return " The fields are separated by ';'; use commas."
    absent = [key for key in known if key not in row]
    for key in (key for key in row if key not in SHAPE_KEYS):
        close = difflib.get_close_matches(key, absent, n=1)
        if close:
            return f" Did you mean {close[0]!r} by {key!r}?"
    return ""


# --- one shape each -------------------------------------------------------------------------------------------------


def _prompt_from_prompt(row: Row) -> list[Prompt]:
    return [_prompt(row, _turns_of_prompt(row)[0])]


def _prompt_from_messages(row: Row) -> list[Prompt]:
    return [_prompt(row, _conversation(row, "messages"))]


def _prompt_from_conversations(row: Row) -> list[Prompt]:
    return [_prompt(row, _conversation(row, "conversations"))]


def _prompt_from_pair(row: Row) -> list[Prompt]:
    """The turns that chosen and rejected share, up to the last user turn: unlike a ranking, that is never in doubt."""
    chosen, rejected = _whole_conversations(row)
    shared = chosen[: _common_length(chosen, rejected)]
    while shared and shared[-1].role != "user":
        shared = shared[:-1]
    if not shared:
        raise Unusable("'chosen' and 'rejected' share no user turn, so they have no common prompt.")
    return [_prompt(row, shared)]


def _prompt_from_instruction(row: Row) -> list[Prompt]:
    row = _with_input(row)
    return [_prompt(row, _turns_of_instruction(row, row.get("input")))]


def _prompts_from_instances(row: Row) -> list[Prompt]:
    return [prompt for prompt, _ in _instances(row)]


def _demonstration_from_completion(row: Row) -> list[Demonstration]:
    turns, is_transcript = _turns_of_prompt(row)
    return [_demonstration(row, turns, _response(row["completion"], "completion", turns, strip=is_transcript))]


def _demonstration_from_messages(row: Row) -> list[Demonstration]:
    return [_demonstration(row, *_split_last(_conversation(row, "messages"), "messages"))]


def _demonstration_from_conversations(row: Row) -> list[Demonstration]:
    return [_demonstration(row, *_split_last(_conversation(row, "conversations"), "conversations"))]


def _demonstration_from_output(row: Row) -> list[Demonstration]:
    row = _with_input(row)
    name = "output" if "output" in row else "response"
    return [_demonstration(row, _turns_of_instruction(row, row.get("input")), _text(row[name], name))]


def _demonstrations_from_instances(row: Row) -> list[Demonstration]:
    author = author_from_json(row)
    return [
        Demonstration(prompt=prompt, response=_filled(_text(output, "output"), "the response"), author=author)
        for prompt, output in _instances(row)
    ]


def _ranking_from_responses(row: Row) -> list[Ranking]:
    turns, is_transcript = _turns_of_prompt(row)
    values = row["responses"]
    if not isinstance(values, list) or len(values) < 2:
        raise DataError(f"'responses' is {_shown(values)}; a ranking needs a list of at least two responses.")
    texts = [_response(value, f"responses[{index}]", turns, strip=is_transcript) for index, value in enumerate(values)]
    return [_ranking(row, turns, texts, check_weak_order(row["ranking"], len(texts)))]


def _ranking_from_prompt(row: Row) -> list[Ranking]:
    return _pair(row, *_turns_of_prompt(row))


def _ranking_from_conversations(row: Row) -> list[Ranking]:
    return _pair(row, _conversation(row, "conversations"), False)


def _ranking_from_instruction(row: Row) -> list[Ranking]:
    row = _with_input(row)
    return _pair(row, _turns_of_instruction(row, row.get("input")), False)


def _ranking_from_whole_conversations(row: Row) -> list[Ranking]:
    chosen, rejected = _whole_conversations(row)
    shared = _common_length(chosen, rejected)
    if shared < max(len(chosen), len(rejected)) - 1:
        raise Unusable(
            f"'chosen' ({len(chosen)} turns) and 'rejected' ({len(rejected)} turns) differ from turn {shared + 1} on; "
            "they must answer the same conversation and differ in the last assistant turn only."
        )
    (turns, better), (_, worse) = _split_last(chosen, "chosen"), _split_last(rejected, "rejected")
    return [_ranking(row, turns, [better, worse], TIE if better == worse else BEST_FIRST)]


def _text_from_text(row: Row) -> list[Text]:
    text = _filled(_text(row["text"], "text"), "'text'")
    return [Text(text=text, about=about_from_json(row, used=tuple(SHAPE_KEYS)))]


PROMPT_SHAPES: Shapes[Prompt] = (
    (("prompt",), _prompt_from_prompt),
    (("messages",), _prompt_from_messages),
    (("conversations",), _prompt_from_conversations),
    (("instruction", "instances"), _prompts_from_instances),
    (("instruction",), _prompt_from_instruction),
    (("chosen", "rejected"), _prompt_from_pair),
)
DEMONSTRATION_SHAPES: Shapes[Demonstration] = (
    (("prompt", "completion"), _demonstration_from_completion),
    (("messages",), _demonstration_from_messages),
    (("conversations",), _demonstration_from_conversations),
    (("instruction", "instances"), _demonstrations_from_instances),
    (("instruction", "output"), _demonstration_from_output),
    (("instruction", "response"), _demonstration_from_output),
)
RANKING_SHAPES: Shapes[Ranking] = (
    (("prompt", "responses", "ranking"), _ranking_from_responses),
    (("prompt", "chosen", "rejected"), _ranking_from_prompt),
    (("conversations", "chosen", "rejected"), _ranking_from_conversations),
    (("instruction", "chosen", "rejected"), _ranking_from_instruction),
    (("chosen", "rejected"), _ranking_from_whole_conversations),
)
TEXT_SHAPES: Shapes[Text] = ((("text",), _text_from_text),)


# --- records from parts ---------------------------------------------------------------------------------------------


def _prompt(row: Row, turns: Messages) -> Prompt:
    """A checked prompt. A `system` field of the row is its first turn."""
    system = _text(row.get("system") or "", "system")
    if system:
        if turns and turns[0].role == "system":
            raise DataError("the row has a 'system' field and its conversation opens with a system turn; keep one.")
        turns = (Message("system", system), *turns)
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError("a system turn stands in the middle of the conversation; it may only be the first turn.")
    if not turns or turns[-1].role != "user":
        last = turns[-1].role if turns else "nobody"
        raise Unusable(
            f"the last turn is by {last}; a prompt ends in a user turn."
            + (" Where the last turn is a response, read the file as demonstrations." if last == "assistant" else "")
        )
    for turn in turns:
        if turn.role == "user":
            _filled(turn.content, "a user turn" if len(turns) > 1 else "the prompt")
    return Prompt(messages=turns, about=about_from_json(row, used=tuple(SHAPE_KEYS)))


def _demonstration(row: Row, turns: Messages, response: str) -> Demonstration:
    # A blank response is refused here and kept in rankings: a rater may well prefer words to silence, but a
    # demonstration of silence teaches it.
    _filled(response, "the response")
    return Demonstration(prompt=_prompt(row, turns), response=response, author=author_from_json(row))


def _ranking(row: Row, turns: Messages, texts: Sequence[str], order: WeakOrder) -> Ranking:
    finished = row.get("finished")
    if finished is None:
        finished = [True] * len(texts)
    if (
        not isinstance(finished, list)
        or len(finished) != len(texts)
        or not all(isinstance(value, bool) for value in finished)
    ):
        raise DataError(f"'finished' is {_shown(finished)}; expected {len(texts)} times true or false.")
    responses = tuple(Response(text=text, finished=whole) for text, whole in zip(texts, finished, strict=True))
    return Ranking(prompt=_prompt(row, turns), responses=responses, order=order, author=author_from_json(row))


def _pair(row: Row, turns: Messages, strip: bool) -> list[Ranking]:
    better = _response(row["chosen"], "chosen", turns, strip=strip)
    worse = _response(row["rejected"], "rejected", turns, strip=strip)
    return [_ranking(row, turns, [better, worse], TIE if better == worse else BEST_FIRST)]


def _instances(row: Row) -> list[tuple[Prompt, object]]:
    """Self-instruct: one instruction, several inputs and outputs. Ids get the number of the instance if it has any."""
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(one, Mapping) for one in instances):
        raise DataError(f"'instances' is {_shown(instances)}; expected a list of objects with 'input' and 'output'.")
    found = []
    for number, instance in enumerate(instances, 1):
        prompt = _prompt(row, _turns_of_instruction(row, instance.get("input")))
        if prompt.about.id is not None and len(instances) > 1:
            prompt = with_about(prompt, id=f"{prompt.about.id}-{number}")
        found.append((prompt, instance.get("output")))
    return found


# --- conversations --------------------------------------------------------------------------------------------------


def _turns_of_prompt(row: Row) -> tuple[Messages, bool]:
    """The turns of a `prompt` field, and whether it was a transcript (whose responses begin with a space)."""
    value = row["prompt"]
    if not isinstance(value, str):
        return _conversation(row, "prompt"), False
    if not value.startswith(TRANSCRIPT_START):
        return (*_history(row), Message("user", _text(value, "prompt"))), False
    _refuse_history(row, "prompt")
    turns = _transcript(value, "prompt")
    # "...\n\nAssistant:" asks for the response that another field holds.
    return (turns[:-1] if turns[-1] == Message("assistant", "") else turns), True


def _with_input(row: Row) -> Row:
    """Dolly calls `context` what an instruction applies to: without it, "summarise the passage" has no passage."""
    if row.get("input") or not isinstance(row.get("context"), str):
        return row
    return {name: value for name, value in row.items() if name != "context"} | {"input": row["context"]}


def _turns_of_instruction(row: Row, given_input: object) -> Messages:
    """Alpaca's fields; a blank line joins the instruction and what it applies to."""
    instruction = _text(row["instruction"], "instruction")
    extra_input = _text("" if given_input is None else given_input, "input")
    asked = f"{instruction}\n\n{extra_input}" if extra_input.strip() else instruction
    return (*_history(row), Message("user", asked))


def _history(row: Row) -> Messages:
    """The turns before the one that the row asks, LLaMA-Factory's `history`: pairs of user and assistant."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"'history' is {_shown(history)}; expected [user, assistant] pairs.")
    earlier: list[Message] = []
    for user, assistant in history:
        earlier += [Message("user", _text(user, "history")), Message("assistant", _text(assistant, "history"))]
    return tuple(earlier)


def _refuse_history(row: Row, name: str) -> None:
    """A conversation says itself what came before; which of the two holds, only the owner of the file knows."""
    if row.get("history"):
        raise DataError(
            f"the row has a 'history' field, and '{name}' is a whole conversation; put the earlier turns into "
            f"'{name}', or take the field out."
        )


def _conversation(row: Row, name: str) -> Messages:
    """A field that holds all turns of the conversation."""
    _refuse_history(row, name)
    return _messages(row[name], name)


def _whole_conversations(row: Row) -> tuple[Messages, Messages]:
    """`chosen` and `rejected` as whole conversations: both transcripts or both lists of messages."""
    _refuse_history(row, "chosen")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _transcript(chosen, "chosen"), _transcript(rejected, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _messages(chosen, "chosen"), _messages(rejected, "rejected")
    raise DataError(
        f"'chosen' is {_shown(chosen)} and 'rejected' is {_shown(rejected)}; without a 'prompt' both must be "
        "transcripts or both lists of messages."
    )


def _transcript(text: str, name: str) -> Messages:
    r"""Read "\n\nHuman: ...\n\nAssistant: ...". White space around a turn belongs to the format, not to the turn."""
    parts = TURN_OF_TRANSCRIPT.split("\n\n" + _text(text, name).lstrip())
    if len(parts) < 2 or parts[0].strip():
        raise DataError(
            f"'{name}' is {_shown(text)}; without a 'prompt' it must be a transcript such as "
            r"'\n\nHuman: ...\n\nAssistant: ...' or a list of messages."
        )
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Message(ROLE_IN_TRANSCRIPT[speaker], content.strip()) for speaker, content in turns)


def _messages(value: object, name: str) -> Messages:
    """A list of {"role", "content"} or of {"from", "value"}."""
    if not isinstance(value, list) or not value:
        raise DataError(f"'{name}' is {_shown(value)}; expected text or a non-empty list of messages.")
    return tuple(_message(one, f"{name}[{index}]") for index, one in enumerate(value))


def _message(value: object, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"'{name}' is {_shown(value)}; a message is an object with 'role' and 'content'.")
    for role_key, text_key, roles in (("role", "content", ROLES), ("from", "value", ROLE_OF_FROM)):
        if value.get(role_key) is not None:
            role = value[role_key]
            if not isinstance(role, str) or role not in roles:
                raise DataError(f"'{name}.{role_key}' is {_shown(role)}; it must be one of {', '.join(roles)}.")
            return Message(roles[role], _text(value.get(text_key), f"{name}.{text_key}"))
    raise DataError(
        f"'{name}' has the keys {', '.join(map(str, value)) or 'none'}; a message has 'role' and 'content'."
    )


def _response(value: object, name: str, prompt: Messages, *, strip: bool) -> str:
    """A response given as text, as one assistant message, or as the prompt's conversation with the response last."""
    if isinstance(value, str):
        return _text(value, name).strip() if strip else _text(value, name)
    turns = (_message(value, name),) if isinstance(value, Mapping) else _messages(value, name)
    earlier, response = _split_last(turns, name)
    if earlier and earlier != prompt:
        raise Unusable(f"'{name}' repeats a conversation that is not the row's prompt.")
    return response


def _split_last(turns: Messages, name: str) -> tuple[Messages, str]:
    if turns[-1].role != "assistant":
        raise Unusable(f"'{name}' ends in a turn by {turns[-1].role}; its last turn must be the assistant's.")
    return turns[:-1], turns[-1].content


def _common_length(first: Messages, second: Messages) -> int:
    """How many leading turns are the same in both."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"'{name}' is {_shown(value)}; expected text.")
    if "\x00" in value:
        raise DataError(f"'{name}' holds a NUL character, which label stores cannot keep; remove it.")
    return value


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise Unusable(f"{what} is blank.")
    return text


def _shown(value: object, limit: int = 60) -> str:
    """A value for an error message, cut to a readable length."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
