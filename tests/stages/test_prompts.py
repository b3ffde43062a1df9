"""Prompt intake: each rule of the paper alone, then what must hold whatever comes in."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.growth import growth

from tastemaker.config import from_mapping, to_json
from tastemaker.errors import ConfigError, DataError
from tastemaker.files import read_prompts
from tastemaker.personal_data import find_personal_data, personal_data_in, without_personal_data
from tastemaker.records import About, Demonstration, Message, Prompt, Ranking, Response, Split
from tastemaker.stages.prompts import PromptsConfig, identify_language, overlap, take_in

PLAIN = PromptsConfig(source="unread")
ALL_TRAIN = replace(PLAIN, validation_share=0.0, test_share=0.0)


def ask(
    text: str,
    *,
    user: str | None = None,
    id: str | None = None,
    split: Split | None = None,
    category: str | None = None,
    system: str | None = None,
) -> Prompt:
    opening = () if system is None else (Message("system", system),)
    about = About(id=id, user=user, split=split, category=category)
    return Prompt(messages=(*opening, Message("user", text)), about=about)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[-1].content for prompt in prompts]


# --- prompts that begin alike ---------------------------------------------------------------------------------------


def test_the_first_of_a_long_common_prefix_is_kept() -> None:
    config = replace(ALL_TRAIN, prefix_characters=7)
    kept, report = take_in([ask("abcdefg one"), ask("abcdefX two"), ask("ABCDEFG  three"), ask("abcdefg")], config)
    assert texts(kept) == ["abcdefg one", "abcdefX two"]
    assert (report.dropped["shared_prefix"], report.dropped["duplicate"]) == (2, 0)


def test_prompts_shorter_than_the_prefix_are_dropped_only_when_equal() -> None:
    config = replace(ALL_TRAIN, prefix_characters=7)
    kept, report = take_in([ask("abc"), ask("abcd"), ask(" ABC\n"), ask("abcdef")], config)
    assert texts(kept) == ["abc", "abcd", "abcdef"]
    assert (report.dropped["shared_prefix"], report.dropped["duplicate"]) == (0, 1)


def test_without_a_prefix_only_equal_prompts_are_dropped() -> None:
    long = "x" * 997
    kept, report = take_in([ask(long), ask(long + "y"), ask(long)], replace(ALL_TRAIN, prefix_characters=None))
    assert texts(kept) == [long, long + "y"]
    assert report.dropped["duplicate"] == 1


def test_a_common_system_turn_is_no_common_prefix() -> None:
    system = "You are the assistant of a shop. " * 11
    prompts = [
        ask("Hours?", system=system),
        ask("Parking?", system=system),
        ask("Hours?"),
        ask("hours?", system=system),
    ]
    kept, _ = take_in(prompts, ALL_TRAIN)
    assert kept == [replace(kept[i], messages=prompts[i].messages) for i in range(3)]


def test_a_copy_in_training_does_not_shrink_a_given_test_set() -> None:
    prompts = [ask("Name a tree.", split="train", id="a"), ask("Name a tree.", id="b")]
    prompts += [ask("Name a tree.", split="test", id="c"), ask("Name a tree.", split="validation", id="d")]
    kept, report = take_in(prompts, PLAIN)
    assert [prompt.key for prompt in kept] == ["c"]
    assert report.examples == {"duplicate": ("d", "a", "b")}


def test_many_prompts_with_one_prefix_take_linear_time() -> None:
    prompts = [ask("the same beginning of them all " * 9 + str(number)) for number in range(8_009)]
    labelled = [replace(p, about=replace(p.about, extra={"language": "en"})) for p in prompts]
    assert len(take_in(labelled, ALL_TRAIN)[0]) == 1
    # Four times as many take some four times as long; comparing all pairs would take sixteen times.
    assert growth(lambda count: take_in(labelled[:count], ALL_TRAIN), 2_003, 8_009) < 10


# --- users ----------------------------------------------------------------------------------------------------------


def test_a_user_keeps_at_most_so_many_prompts_whatever_their_order() -> None:
    many = [ask(f"Question {number}", user="ann") for number in range(13)]
    others = [ask("Mine", user="bob"), ask("Nobody's"), ask("Nobody's either")]
    config = replace(ALL_TRAIN, max_per_user=5)
    kept, report = take_in(many + others, config)
    assert [prompt.about.user for prompt in kept] == ["ann"] * 5 + ["bob", None, None]
    assert report.dropped["over_user_limit"] == 8
    backwards, _ = take_in([*others, *reversed(many)], config)
    assert sorted(texts(backwards)) == sorted(texts(kept))
    assert sorted(texts(take_in(many, replace(config, seed=1))[0])) != sorted(texts(kept[:5]))


def test_shares_are_shares_of_users() -> None:
    prompts = [ask(f"Question {number}", user=f"user {number}") for number in range(2003)]
    labelled = [replace(p, about=replace(p.about, extra={"language": "en"})) for p in prompts]
    _, report = take_in(labelled, replace(PLAIN, validation_share=0.3, test_share=0.2))
    # Four standard deviations of a binomial of 2,003: 4 sqrt(2003 * 0.3 * 0.7) = 82, with 0.2: 72, with 0.5: 90.
    assert abs(report.users_by_split["validation"] - 601) < 82
    assert abs(report.users_by_split["test"] - 401) < 72
    assert abs(report.users_by_split["train"] - 1001) < 90
    assert report.users_by_split == report.by_split


def test_a_given_split_is_kept_and_holds_for_all_of_the_user() -> None:
    prompts = [ask("One", user="ann", split="test"), ask("Two", user="ann"), ask("Three", split="validation")]
    kept, _ = take_in(prompts, ALL_TRAIN)
    assert [prompt.about.split for prompt in kept] == ["test", "test", "validation"]


def test_a_user_in_two_given_splits_is_an_error() -> None:
    prompts = [ask("One", user="ann", split="test"), ask("Two", user="bob"), ask("One", user="ann", split="train")]
    with pytest.raises(DataError, match=r"1 users have prompts in more than one split \(ann\)"):
        take_in(prompts, PLAIN)


def test_a_user_named_like_the_id_of_a_prompt_is_someone_else() -> None:
    prompts = [ask("One", user="a", split="test"), ask("Two", id="a", split="train")]
    assert [prompt.about.split for prompt in take_in(prompts, PLAIN)[0]] == ["test", "train"]


def test_one_id_for_two_prompts_is_an_error() -> None:
    with pytest.raises(DataError, match=r"1 ids belong to several different prompts \(a\)"):
        take_in([ask("One", id="a"), ask("Two", id="a")], PLAIN)
    assert len(take_in([ask("One", id="a"), ask("one", id="a")], PLAIN)[0]) == 1  # one prompt sent twice


# --- length, language, category -------------------------------------------------------------------------------------


def test_length_counts_the_whole_conversation() -> None:
    config = replace(ALL_TRAIN, max_characters=11)
    kept, report = take_in([ask("12345678901"), ask("123456789012"), ask("1234567", system="12345")], config)
    assert texts(kept) == ["12345678901"]
    assert report.dropped["too_long"] == 2


ENGLISH = "Please explain to me why the sky is blue and the sunset is red."
GERMAN = "Bitte erkläre mir, warum der Himmel blau und der Sonnenuntergang rot ist."


def test_languages_are_labelled_and_all_kept() -> None:
    kept, report = take_in([ask(ENGLISH), ask(GERMAN), ask("2 + 2 = ?")], ALL_TRAIN)
    assert [prompt.about.extra for prompt in kept] == [{"language": "en"}, {"language": "de"}, {"language": "und"}]
    assert report.by_language == {"de": 1, "en": 1, "und": 1}


def test_languages_may_be_chosen_and_the_undetermined_stay() -> None:
    kept, report = take_in([ask(ENGLISH), ask(GERMAN), ask("hi")], replace(ALL_TRAIN, languages=("de",)))
    assert texts(kept) == [GERMAN, "hi"]
    assert report.dropped["other_language"] == 1


def test_a_label_that_came_with_the_prompt_stays() -> None:
    prompt = replace(ask(ENGLISH), about=About(extra={"language": "tl", "source": "x"}))
    assert take_in([prompt], ALL_TRAIN)[0][0].about.extra == {"language": "tl", "source": "x"}


@pytest.mark.parametrize("text", ["", "hi", "1234567890", "?!", "🙂"])
def test_too_little_to_tell_a_language(text: str) -> None:
    assert identify_language(text) == "und"


def test_categories_are_kept_and_counted() -> None:
    kept, report = take_in([ask("a", category="chat"), ask("b", category="haiku"), ask("c")], ALL_TRAIN)
    assert [prompt.about.category for prompt in kept] == ["chat", "haiku", None]
    assert report.by_category == {"chat": 1, "haiku": 1, "none given": 1}


# --- personal data --------------------------------------------------------------------------------------------------

# Keys are put together here, so that no scanner takes this file for a leak.
PERSONAL: list[tuple[str, tuple[str, ...]]] = [
    ("Write to ann.lee+work@mail.example.co.uk, please.", ("email",)),
    ("<ANN@EXAMPLE.ORG>", ("email",)),
    ("Call me at (415) 555-2671.", ("phone",)),
    ("650-253-0000", ("phone",)),
    ("650.253.0000", ("phone",)),
    ("Meine Nummer: +49 30 901820", ("phone",)),
    ("+442079460958", ("phone",)),
    ("pay with 4111 1111 1111 1111 12/27", ("card",)),
    ("4111111111111111", ("card",)),
    ("5555-5555-5555-4444.", ("card",)),
    ("amex 3782 822463 10005", ("card",)),
    ("DE89 3704 0044 0532 0130 00 please", ("iban",)),
    ("to GB82WEST12345698765432", ("iban",)),
    ("nl91abna0417164300, thanks", ("iban",)),
    ("key " + "sk-" + "proj-a1B2c3D4e5F6g7H8i9J0", ("secret",)),
    ("AKIA" + "IOSFODNN7EXAMPLE", ("secret",)),
    ("token=" + "ghp_" + "a1B2" * 9, ("secret",)),
    ("hf_" + "aBcD" * 9, ("secret",)),
    ("xoxb-" + "123456789012-abcdef", ("secret",)),
    ("AIza" + "Sy" + "a1B" * 11, ("secret",)),
    ("-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE", ("secret",)),
    ("Bearer " + "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJ" + "zdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N", ("secret",)),
    ("postgres://ann:pa55" + "word@db/x", ("secret",)),
    ('password: "hunter' + '2hunter2"', ("secret",)),
    ("API_KEY=" + "abc123def456", ("secret",)),
    ("ann@example.org or 650-253-0000", ("email", "phone")),
]


@pytest.mark.parametrize(("text", "kinds"), PERSONAL)
def test_personal_data_is_found(text: str, kinds: tuple[str, ...]) -> None:
    assert find_personal_data(text) == kinds
    assert find_personal_data(f"One line.\n{text}\nAnother line.") == kinds


ORDINARY = [
    "On 2024-01-15 at 10:30:00, or 01/15/2024, or 15.01.2024",
    "It cost $1,234,567,890.12 in 1994-2004 and 2023 2024 2025",
    "ISBN 978-0-306-40615-7, ISBN-10 0-306-40615-2, EAN 9780306406157",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "3600000000000 + 62426244000 = 3662426244000",
    "256626720691 + 3956256292305 = 4212883012996",  # begins as a card and has its check digit, but is too short
    "2^32 = 4294967296 and 6502530000 is a number",
    "pi is 3.14159265358979 and 4.111111111111111",
    "4111 1111 1111 1112",  # wrong check digit
    "9111111111111111 1111111111111117",  # no issuer's
    "353270045617329",  # the serial number of a telephone, with a right check digit
    "call 911 or 555-1234",
    "192.168.100.200 version 10.0.19045.3803",
    "DE00 3704 0044 0532 0130 00",  # wrong check digits
    "AB12 CD34 EF56 are seat rows",
    "git clone git@github.com:someone/something.git",
    "@app.route and @mention, a@b, x @ y.z, array[i]@matrix",
    "my password: please reset it; password = input()",
    "The secret key: perseverance. API key = your-key-here",
    "task-oriented, risk-averse, sk-learn-contrib-and-other-names",
    "See https://example.org:8080/path?key=value",
    "UUID 123e4567-e89b-12d3-a456-426614174000",
    "sha d41d8cd98f00b204e9800998ecf8427e",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_numbers_and_words_are_no_personal_data(text: str) -> None:
    assert find_personal_data(text) == ()


def test_telephones_of_other_regions_on_request() -> None:
    assert find_personal_data("020 7946 0958") == ()
    assert find_personal_data("020 7946 0958", phone_regions=("GB",)) == ("phone",)


@pytest.mark.parametrize(
    "piece", ["a", "a.", "1 ", "DE89", "password=", "4111 ", "ab12 ", "sk-", "a@b.", "://", "eyJa."]
)
def test_no_text_makes_the_search_slow(piece: str) -> None:
    """Four times as long a text takes some four times as long; going back over all of it would take sixteen times."""
    assert growth(lambda length: find_personal_data(piece * (length // len(piece))), 5_003, 20_011) < 10


def test_only_training_prompts_are_filtered() -> None:
    prompts = [ask("I am ann@example.org", split="train", id="ann@example.org")]
    prompts += [ask("I am bob@example.org, 650-253-0000", split="train", id="b")]
    prompts += [ask("I am cid@example.org", split="validation"), ask("I am dan@example.org", split="test")]
    kept, report = take_in(prompts, PLAIN)
    assert [prompt.about.split for prompt in kept] == ["validation", "test"]
    assert report.personal_data == {"email": 2, "phone": 1}
    assert report.examples["personal_data"][1] == "b"
    assert "@" not in json.dumps(to_json(report)) + report.summary()
    kept, report = take_in(prompts, replace(PLAIN, filter_personal_data=False))
    assert (len(kept), report.personal_data) == (4, {})


def test_every_turn_is_searched() -> None:
    turns = (Message("user", "Hi"), Message("assistant", "I am at ann@example.org"), Message("user", "Thanks"))
    assert take_in([Prompt(messages=turns)], ALL_TRAIN)[1].dropped["personal_data"] == 1


# --- whatever comes in ----------------------------------------------------------------------------------------------

words = st.sampled_from(["tree", "river", "why", "how", "explain", "Write to a@b.cd", "650-253-0000", "und so weiter"])
users = st.none() | st.sampled_from(["ann", "bob", "cid", "dan", "eve"])
GIVEN: dict[str | None, Split] = {"ann": "test", "bob": "train"}


@st.composite
def incoming(draw: st.DrawFn) -> Prompt:
    user = draw(users)
    split = GIVEN.get(user) if user and draw(st.booleans()) else None
    return ask(" ".join(draw(st.lists(words, min_size=1, max_size=4))), user=user, split=split)


configs = st.builds(
    PromptsConfig,
    source=st.just("unread"),
    prefix_characters=st.none() | st.integers(1, 20),
    max_per_user=st.integers(1, 3),
    max_characters=st.integers(5, 50),
    validation_share=st.sampled_from([0.0, 0.3]),
    test_share=st.sampled_from([0.0, 0.4]),
    filter_personal_data=st.booleans(),
    languages=st.sampled_from([(), ("en",)]),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(incoming(), max_size=12), configs)
def test_what_was_taken_in_is_taken_in_again_unchanged(prompts: list[Prompt], config: PromptsConfig) -> None:
    kept, report = take_in(prompts, config)
    again, second = take_in(kept, config)
    assert again == kept
    assert second.dropped == dict.fromkeys(report.dropped, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(incoming(), max_size=12), configs)
def test_every_prompt_is_kept_or_counted_and_no_user_or_text_is_in_two_splits(
    prompts: list[Prompt], config: PromptsConfig
) -> None:
    kept, report = take_in(prompts, config)
    assert report.kept + sum(report.dropped.values()) == report.read == len(prompts)
    assert report.kept == len(kept) == sum(report.by_split.values()) == sum(report.by_language.values())
    splits_of: dict[str, set[Split | None]] = defaultdict(set)
    for prompt in kept:
        splits_of[prompt.about.user or prompt.key].add(prompt.about.split)
    assert all(len(splits) == 1 and None not in splits for splits in splits_of.values())
    for split in ("train", "validation", "test"):
        inside = [prompt for prompt in kept if prompt.about.split == split]
        assert overlap(inside, [prompt for prompt in kept if prompt.about.split != split]) == []
    positions = [texts(prompts).index(text) for text in texts(kept) if texts(prompts).count(text) == 1]
    assert positions == sorted(positions)


@settings(max_examples=60, deadline=None)
@given(st.lists(incoming(), max_size=12).flatmap(lambda many: st.tuples(st.just(many), st.permutations(many))), configs)
def test_no_order_of_arrival_moves_a_user(orders: tuple[list[Prompt], list[Prompt]], config: PromptsConfig) -> None:
    first, second = (
        {prompt.about.user or prompt.key: prompt.about.split for prompt in take_in(many, config)[0]} for many in orders
    )
    assert all(first[owner] == second[owner] for owner in first.keys() & second.keys())


def test_prompts_that_come_later_go_where_their_user_is() -> None:
    early = [ask(f"Question {number}", user=f"user {number % 7}") for number in range(7)]
    late = [ask(f"Another question {number}", user=f"user {number}") for number in range(11)]
    config = replace(PLAIN, validation_share=0.3, test_share=0.3)
    split_of = {prompt.about.user: prompt.about.split for prompt in take_in(early, config)[0]}
    assert len(set(split_of.values())) == 3
    both = take_in(early + late, config)[0]
    assert all(split_of.get(prompt.about.user, prompt.about.split) == prompt.about.split for prompt in both)


# --- overlap, config ------------------------------------------------------------------------------------------------


def test_overlap_names_the_prompts_that_occur_on_both_sides() -> None:
    evaluation = [ask("Name a tree.", id="a"), ask("name  a\ntree.", id="b"), ask("Name a river.", id="c")]
    training = [ask("NAME A TREE."), ask("Name a river. Or two."), ask("Name a river.", system="Be brief.")]
    assert overlap(evaluation, training) == ["a", "b"]
    assert overlap(evaluation, []) == overlap([], training) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefix_characters": 0}, "prefix_characters is 0"),
        ({"max_per_user": 0}, "max_per_user is 0"),
        ({"max_characters": -1}, "max_characters is -1"),
        ({"test_share": -0.1}, r"test_share is -0\.1"),
        ({"test_share": 0.5, "validation_share": 0.5}, "leave some users for training"),
        ({"phone_regions": ["UK"]}, "phone_regions holds UK"),
    ],
)
def test_a_wrong_config_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(PromptsConfig, {"source": "x", **wrong}, where="recipe")


def test_a_config_from_a_recipe() -> None:
    config = from_mapping(PromptsConfig, {"source": "a.jsonl", "languages": ["en"]}, where="recipe")
    assert config == replace(PLAIN, source="a.jsonl", languages=("en",))


def test_summary() -> None:
    _, report = take_in([ask(ENGLISH, user="ann"), ask(ENGLISH, user="ann"), ask(GERMAN, user="ann")], ALL_TRAIN)
    assert report.summary() == (
        "2 of 3 prompts kept\n  dropped, duplicate: 1\n  train: 2 prompts from 1 users\n"
        "  validation: 0 prompts from 0 users\n  test: 0 prompts from 0 users\n  languages: de 1, en 1"
    )


@pytest.mark.skipif("TASTEMAKER_REAL_DATA" not in os.environ, reason="TASTEMAKER_REAL_DATA names no folder")
def test_real_prompts_lose_only_what_is_personal() -> None:
    folder = Path(os.environ["TASTEMAKER_REAL_DATA"])
    prompts = read_prompts(folder / "hh-rlhf-harmless-base-test.jsonl.gz")
    kept, report = take_in(prompts, replace(ALL_TRAIN, source="hh"))
    assert len(prompts) == 2312
    assert (report.dropped["duplicate"], report.dropped["shared_prefix"]) == (2, 65)
    assert report.personal_data == {"email": 4, "phone": 6}  # read one by one: each is a mail address or a telephone
    assert report.by_language["en"] > 0.98 * len(kept)


# --- demonstrations and rankings --------------------------------------------------------------------------------------

MAIL = "write to ann@farm.example"


@pytest.mark.parametrize(
    ("record", "kinds"),
    [
        (Prompt(messages=(Message("user", "hello"),)), ()),
        (Prompt(messages=(Message("user", "hello"), Message("assistant", "yes"), Message("user", MAIL))), ("email",)),
        (Demonstration(prompt=Prompt(messages=(Message("user", "hello"),)), response=MAIL), ("email",)),
        (Demonstration(prompt=Prompt(messages=(Message("system", MAIL),)), response="yes"), ("email",)),
        (
            Ranking(
                prompt=Prompt(messages=(Message("user", "hello"),)),
                responses=(Response(text="yes"), Response(text=f"no, {MAIL}")),
                order=((0,), (1,)),
            ),
            ("email",),
        ),
    ],
)
def test_every_text_of_a_record_is_looked_at(record: Prompt | Demonstration | Ranking, kinds: tuple[str, ...]) -> None:
    assert personal_data_in(record, ("US",)) == kinds
    assert without_personal_data([record, record]) == (([], 2) if kinds else ([record, record], 0))
