"""Text of ids that come one at a time: the text of all of them, and never a letter that has to be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import make_tokenizer
from tests.test_tokenizer import train_bpe
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tastemaker.generation import GrowingText
from tastemaker.generation.text import first_in, longest_beginning
from tastemaker.tokenizer import wrap_tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama's: a space is part of the word after it, and the first is left out of the text."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁", "at"]
    inner = Inner(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "bytes": wrap_tokenizer(train_bpe()),
    "words": wrap_tokenizer(make_tokenizer()),
    "metaspace": wrap_tokenizer(metaspace()),
}


def grown(text: GrowingText, ids: Sequence[int]) -> list[str]:
    return [text.add(token) for token in ids]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_pieces_are_the_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=13))
    text = GrowingText(tokenizer.decode)
    assert "".join(grown(text, ids)) + text.rest() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=9), stops=st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3))
def test_it_ends_where_the_first_stop_text_is_complete(text: str, stops: list[str]) -> None:
    """Over random text among letters that the stop texts are made of, its bytes one by one."""
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.response_ids("ab a" + text + "bab", finished=False)
    growing, pieces, taken = GrowingText(tokenizer.decode, stops), [], 0
    for taken, token in enumerate(ids, start=1):
        pieces.append(growing.add(token))
        so_far = tokenizer.decode(ids[:taken])
        assert (growing.stopped_by is not None) == any(stop in so_far for stop in stops)
        if growing.stopped_by is not None:
            break
    so_far = tokenizer.decode(ids[:taken])
    first = min((so_far.index(stop) for stop in stops if stop in so_far), default=len(so_far))
    assert "".join(pieces) + growing.rest() == so_far[:first]


def test_what_may_become_a_stop_text_is_held_back() -> None:
    text = GrowingText(letters, ["Q: "])
    assert grown(text, [ord(letter) for letter in "so Q"]) == ["s", "o", " ", ""]
    assert text.add(ord(".")) == "Q."
    assert grown(text, [ord(letter) for letter in "QQ:"]) == ["", "Q", ""]
    assert text.rest() == "Q:"
    assert text.add(ord(" ")) == ""
    assert (text.stopped_by, text.rest()) == ("Q: ", "")


def test_a_character_is_given_out_when_its_bytes_are_there() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.response_ids("aé", finished=False)
    assert len(ids) == 3  # the two bytes of é
    text = GrowingText(tokenizer.decode)
    assert grown(text, ids[:2]) == ["a", ""]
    assert text.rest() == "\N{REPLACEMENT CHARACTER}"
    assert text.add(ids[2]) == "é"


def test_a_stop_text_before_half_a_character_ends_it_at_once() -> None:
    parts = {0: b"a", 1: b"b:\xe2", 2: b"\x82\xac"}
    decode: Callable[[Sequence[int]], str] = lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace")  # noqa: E731
    text = GrowingText(decode, ["b:"])
    assert grown(text, [0, 1]) == ["a", ""]
    assert text.stopped_by == "b:"


def letters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def test_which_text_comes_first_and_what_begins_one() -> None:
    assert first_in("xbab", ["ab", "b"]) == "b"
    assert first_in("xab", ["ab", "b"]) == "ab"
    assert first_in("x", ["ab", "b"]) is None
    assert longest_beginning("xaba", ["abac", "bb"]) == 3
    assert longest_beginning("xab", ["ab"]) == 0  # whole, it would have ended the text
