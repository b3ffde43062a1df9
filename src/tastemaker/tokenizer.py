"""From conversations to token ids and back: the one function that renders messages, and what every stage uses.

A prompt is rendered by the chat template saved with the model, up to the place where the assistant speaks. A response
is encoded on its own and closed by the end token, so the prompt's ids are always a prefix of the whole and the loss
mask is exact by construction. Text that users wrote stays text: an "<|eos|>" in a message is no control token.
A rollout is decoded for people, reward models and files, and never encoded again for the policy that produced it, but
as an earlier turn of a conversation.

A base model without a template gets the named default `plain`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tastemaker.errors import ModelError
from tastemaker.records import Message, Messages

log = logging.getLogger(__name__)

SYSTEM_TURN, SEVERAL_TURNS = "a system turn", "several turns"  # kinds of prompts

# A newline after a block's end would be swallowed (the library sets trim_blocks), so the blank line is an expression.
CHAT_TEMPLATES: Mapping[str, str] = {
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
    ),
}
DEFAULT_CHAT_TEMPLATE = "plain"
# Templates that write today's date are told one day always, which is Llama 3.2's own where it knows none: a reward
# model trained on one day is asked on another, and a run that goes on after midnight is the same run. The library lets
# no function in, so this is a macro by the name of its function.
DAY = {
    **{"%-d": "26", "%d": "26", "%e": "26", "%j": "208", "%-m": "7", "%m": "07", "%b": "Jul", "%B": "July"},
    **{"%y": "24", "%Y": "2024", "%a": "Fri", "%A": "Friday", "%F": "2024-07-26"},
    **{"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM", "%T": "00:00:00"},
}
ON_ONE_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{sign}', '{text}')" for sign, text in DAY.items())
    + " }}{%- endmacro %}\n"
)

# Private-use characters around the number of a message whose content must not be read as control tokens.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A Hugging Face fast tokenizer with a chat template and one end token, made by `wrap_tokenizer`.

    `vocabulary` counts the ids that may be sampled; a model's embedding may have more rows. `stop_ids` end a response;
    the first is the end token, `end_id`.
    """

    library: Any
    vocabulary: int
    end_id: int
    """The token that closes a finished response: the chat template's, where it closes replies by a control token."""
    stop_ids: tuple[int, ...]
    control_texts: tuple[str, ...]
    """The texts of all control tokens."""
    rewritten: frozenset[str] = frozenset()
    """The kinds of prompts (with a system turn, several turns) that the template renders differently before a reply."""

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of all control tokens."""
        return frozenset(int(one) for one, token in self.library.added_tokens_decoder.items() if token.special)

    def prompt_ids(self, messages: Messages, *, limit: int | None = None) -> list[int]:
        """Render a conversation up to the place where the assistant speaks, with at most one beginning-of-text id.

        Of more than `limit` ids it is the end, behind the beginning-of-text id if there is one.
        """
        holds_control_text = any(text in message.content for text in self.control_texts for message in messages)
        ids = self._encode_apart(messages) if holds_control_text else self._encode(self._render(messages), control=True)
        ids = self._with_one_bos(ids)
        return ids if limit is None else self.end_of(ids, limit)

    def end_of(self, ids: list[int], count: int) -> list[int]:
        """At most `count` ids of a prompt: its end, behind the beginning-of-text id, which many models lean on."""
        if len(ids) <= count:
            return ids
        opening = ids[:1] if ids[0] == self.library.bos_token_id and count > 1 else []
        return [*opening, *ids[len(ids) - count + len(opening) :]]

    def response_ids(self, text: str, *, finished: bool) -> list[int]:
        """Encode a response as plain text; if it was finished, `end_id` closes it: what the model itself would say."""
        ids = self._encode(text, control=False)
        return [*ids, self.end_id] if finished else ids

    def text_ids(self, text: str) -> list[int]:
        """Encode a pretraining document as plain text, closed by the tokenizer's end token."""
        return [*self._with_one_bos(self._encode(text, control=False)), int(self.library.eos_token_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of `ids`; control tokens are shown, spaces are not cleaned up.

        A NUL character, which no file of ours may hold, becomes U+FFFD, as bytes that are no character do.
        """
        text = self.library.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).replace("\x00", "\ufffd")

    def response_text(self, ids: Sequence[int]) -> str:
        """The text of sampled response ids, without the stop token that may close them."""
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self.decode(kept)

    def save(self, folder: Path) -> None:
        self.library.save_pretrained(str(folder))

    def _encode(self, text: str, *, control: bool) -> list[int]:
        # verbose=False: what is too long for a model is our own check's business
        ids = self.library.encode(text, add_special_tokens=False, split_special_tokens=not control, verbose=False)
        return [int(token) for token in ids]

    def _check_stays(self, messages: Messages) -> None:
        several = sum(message.role == "user" for message in messages) > 1
        for kind, has in ((SYSTEM_TURN, messages[0].role == "system"), (SEVERAL_TURNS, several)):
            if has and kind in self.rewritten:
                raise ModelError(
                    f"the model's chat template renders a prompt with {kind} differently once a reply follows, so what "
                    f"is learned would stand behind another prompt than what is sampled. Leave out prompts with {kind} "
                    "or give the model another chat_template."
                )

    def _render(self, messages: Messages) -> str:
        self._check_stays(messages)
        turns = [message.to_json() for message in messages]
        try:
            return _rendered(self.library, turns, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise ModelError(
                f"the model's chat template refuses a conversation of the turns {roles}: {error}. Leave out what it "
                "refuses (often a system turn), or give the model another chat_template."
            ) from error

    def _encode_apart(self, messages: Messages) -> list[int]:
        """Encode the template's own text with control tokens and each message's text without."""
        rendered = self._render(
            tuple(Message(message.role, f"{_OPEN}{index}{_CLOSE}") for index, message in enumerate(messages))
        )
        ids: list[int] = []
        for place, part in enumerate(_PLACEHOLDER.split(rendered)):
            is_content = place % 2 == 1
            text = messages[int(part)].content if is_content else part
            if text:
                ids += self._encode(text, control=not is_content)
        return ids

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self.library.bos_token_id
        if bos is None:
            return ids
        while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            ids = ids[1:]
        if (not ids or ids[0] != bos) and _adds_bos(self.library):
            ids = [bos, *ids]
        return ids


def load_tokenizer(source: str | Path, *, stop_texts: Sequence[str] = (), **library_options: Any) -> Tokenizer:
    """Load the tokenizer of a model folder or hub name.

    `stop_texts` are further single tokens that end a response, such as a base model's "next question" mark.

    Raises:
        ModelError: no tokenizer there, no end token, or a stop text that is not one token.
    """
    from transformers import AutoTokenizer

    try:
        library = AutoTokenizer.from_pretrained(str(source), **library_options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source} has no tokenizer that the transformers library can load{_reason(error)}. Give a folder "
            "with tokenizer.json and tokenizer_config.json, or the name of a model on the hub."
        ) from error
    return wrap_tokenizer(library, source=str(source), stop_texts=stop_texts)


def wrap_tokenizer(library: Any, *, source: str = "the tokenizer", stop_texts: Sequence[str] = ()) -> Tokenizer:
    """Check a Hugging Face tokenizer and give it the default template if it has none."""
    if library.eos_token_id is None:
        raise ModelError(
            f"{source} has no end-of-text token (eos_token), so a response could never end. "
            "Set eos_token in its tokenizer_config.json."
        )
    if getattr(library, "chat_template", None) is None:
        library.chat_template = CHAT_TEMPLATES[DEFAULT_CHAT_TEMPLATE]
    after_reply = _check_template(library, source)
    closing = _closing_ids(library, after_reply)
    stop_ids = [*closing, int(library.eos_token_id)]
    for text in stop_texts:
        ids = library.encode(text, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == library.unk_token_id:
            raise ModelError(f"stop text {text!r} is not a single token of {source}; choose one that is.")
        stop_ids.append(int(ids[0]))
    return Tokenizer(
        library=library,
        vocabulary=max(library.get_vocab().values()) + 1,  # len() would be too small where ids have gaps
        end_id=(closing or [int(library.eos_token_id)])[0],
        stop_ids=tuple(dict.fromkeys(stop_ids)),
        control_texts=tuple(token.content for token in library.added_tokens_decoder.values() if token.special),
        rewritten=_rewritten_shapes(library),
    )


def _check_template(library: Any, source: str) -> str:
    """Refuse a template that rewrites the prompt once a reply follows: masks and log-probs would be of other tokens.

    Returns what it writes after a reply.
    """
    reply = "Three."
    asked, answered = {"role": "user", "content": "One two."}, {"role": "assistant", "content": reply}
    try:
        prompt = _rendered(library, [asked], add_generation_prompt=True)
        whole = _rendered(library, [asked, answered], add_generation_prompt=False)
    except Exception as error:  # templates run arbitrary Jinja code
        raise ModelError(f"the chat template of {source} fails on a plain question and reply: {error}.") from error
    if not whole.startswith(prompt):
        raise ModelError(
            f"the chat template of {source} renders a prompt differently once a reply follows "
            f"({prompt!r} is not a prefix of {whole!r}). Use a template whose prompt stays as it is."
        )
    return whole[len(prompt) :].partition(reply)[2]


def _rewritten_shapes(library: Any) -> frozenset[str]:
    """The kinds of longer prompts that a template renders differently once a reply follows.

    Some do so with a system turn (Mistral's writes it before the last user turn, if that comes last). Such a model can
    be used all the same, for prompts of other kinds.
    """
    system = {"role": "system", "content": "Be brief."}
    asked, answered = {"role": "user", "content": "One two."}, {"role": "assistant", "content": "Three."}
    found = set()
    for kind, turns in ((SYSTEM_TURN, [system, asked]), (SEVERAL_TURNS, [asked, answered, asked])):
        try:
            prompt = _rendered(library, turns, add_generation_prompt=True)
            whole = _rendered(library, [*turns, answered], add_generation_prompt=False)
        except Exception:  # such as a template that refuses a system turn: whoever gives it one is told
            log.debug("the chat template refuses prompts with %s", kind)
        else:
            found |= set() if whole.startswith(prompt) else {kind}
    return frozenset(found)


def _closing_ids(library: Any, after_reply: str) -> list[int]:
    """The control token by which a template closes a reply, if there is one.

    A model that was tuned on such turns ends them so, and some (Gemma's, Phi's) never write the tokenizer's end token.
    """
    ids = library.encode(after_reply.lstrip(), add_special_tokens=False)
    control = {int(one) for one, token in library.added_tokens_decoder.items() if token.special}
    control -= {library.unk_token_id, library.bos_token_id}
    return [int(one) for one in ids[:1] if int(one) in control]


def _rendered(library: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """A conversation through the model's template, on the same day whenever it is asked."""
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    template = library.get_chat_template()
    if "strftime_now" in template:
        options["chat_template"] = ON_ONE_DAY + template
    return str(library.apply_chat_template(turns, tokenize=False, **options))


def _adds_bos(library: Any) -> bool:
    ids = library.encode("a")
    return bool(ids) and ids[0] == library.bos_token_id


def _reason(error: BaseException) -> str:
    """The first line of what the library says, unless that only opens a list of how it might have gone."""
    lines = str(error).strip().splitlines()
    return "" if not lines or lines[0].rstrip().endswith(":") else f" ({lines[0]})"


def as_messages(text: str) -> Messages:
    """A plain string as a conversation of one user turn."""
    return (Message("user", text),)
