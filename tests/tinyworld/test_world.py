"""The tiny world's prompts, people and judgement: deterministic, honestly split, and right about right answers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from tastemaker import tinyworld
from tastemaker.tinyworld import tasks, web, world
from tastemaker.tinyworld.people import GROUPS

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return tinyworld.prompts(0, 4000, 300, 1000)


def of_split(records: list[Record], split: str) -> list[Record]:
    return [record for record in records if record["split"] == split]


def texts(records: list[Record]) -> set[str]:
    return {tinyworld.prompt_text(record) for record in records}


def first(records: list[Record], kind: str) -> Record:
    return next(record for record in records if record["kind"] == kind)


def test_prompts_are_determined_by_the_seed() -> None:
    assert tinyworld.prompts(3, 50, 10, 20) == tinyworld.prompts(3, 50, 10, 20)
    assert tinyworld.prompts(3, 50, 10, 20) != tinyworld.prompts(4, 50, 10, 20)


def test_splits_have_their_sizes_no_duplicates_and_share_neither_prompts_nor_users(records: list[Record]) -> None:
    sizes = {"train": 4000, "validation": 300, "test": 1000}
    assert Counter(record["split"] for record in records) == sizes
    for split, size in sizes.items():
        assert len(texts(of_split(records, split))) == size
    for one, another in (("train", "test"), ("train", "validation"), ("validation", "test")):
        left, right = of_split(records, one), of_split(records, another)
        assert not texts(left) & texts(right)
        assert not {record["user"] for record in left} & {record["user"] for record in right}


def test_no_prompt_of_one_seed_is_in_another_split_of_another_seed(records: list[Record]) -> None:
    for seed in (1, 2):
        another = tinyworld.prompts(seed, 1000, 100, 300)
        assert not texts(of_split(records, "train")) & texts(of_split(another, "test"))
        assert not texts(of_split(records, "test")) & texts(of_split(another, "train"))


def test_ids_are_unique_and_the_same_for_the_same_text_in_every_round(records: list[Record]) -> None:
    assert len({record["id"] for record in records}) == len(records)
    id_of = {tinyworld.prompt_text(record): record["id"] for record in records}
    again = [record for record in tinyworld.prompts(1, 1000, 0, 0) if tinyworld.prompt_text(record) in id_of]
    assert again
    assert all(id_of[tinyworld.prompt_text(record)] == record["id"] for record in again)


def test_few_prompts_share_a_long_beginning(records: list[Record]) -> None:
    beginnings = Counter(tinyworld.prompt_text(record)[:60] for record in records)
    assert sum(count - 1 for count in beginnings.values()) <= 10


def test_the_test_split_has_enough_of_what_the_claims_measure(records: list[Record]) -> None:
    test = of_split(records, "test")
    assert sum(record["safety"] == "unsafe" for record in test) >= 150
    assert sum(record["safety"] == "look_alike" for record in test) >= 150
    assert sum(record["constraint"] for record in test) >= 200
    assert {record["category"] for record in test} == {
        *("generation", "open_qa", "brainstorming", "chat", "rewrite", "summarization"),
        *("classification", "closed_qa", "extract", "other"),
    }
    assert any(len(record["messages"]) == 3 for record in test)


def mentioned_pairs(record: Record) -> set[tuple[str, str]]:
    """The (creature, attribute) or (verb, object) pairs that a prompt about facts or deeds could be about."""
    words = record["messages"][-1]["content"].split()
    verbs = [word for word in words if word in world.DEED_TOOL]
    deeds = {(verb, word) for verb in verbs for word in words if word in (*world.HARMLESS_OBJECTS, *world.PEOPLE)}
    asked = {"colour": ("colour", *world.COLOURS), "home": ("home", "live"), "food": ("food", "eat")}
    facts = {
        (creature, attribute)
        for creature in set(words) & set(world.CREATURES)
        for attribute, signs in asked.items()
        if set(words) & set(signs)
    }
    return deeds | facts


def test_held_out_pairs_are_in_test_prompts_and_in_no_other(records: list[Record]) -> None:
    for record in records:
        if record["kind"] in ("fact", "one_word", "premise_true", "premise_false", "unsafe", "look_alike"):
            (pair,) = mentioned_pairs(record)
            assert (pair in world.HELD_OUT) == (record["split"] == "test"), record


def test_the_web_speaks_of_every_held_out_pair() -> None:
    text = " ".join(islice(tinyworld.web_documents(5), 30_000))
    assert all(
        f"{verb} the {target}" in text
        for verb, target in (*world.HARMLESS_DEEDS, *world.HARMFUL_DEEDS)
        if (verb, target) in world.HELD_OUT
    )
    assert all(world.fact_sentence(*pair) in text for pair in world.FACTS if pair in world.HELD_OUT)


def test_every_ideal_answer_is_faultless_and_every_flawed_one_is_worse(records: list[Record]) -> None:
    for record in records:
        ideal = tinyworld.features(record, record["truth"]["ideal"], finished=True)
        faultless = dict.fromkeys(ideal, 0.0)
        faultless |= {"correct": 1.0, "follows_constraint": float(record["constraint"])}
        assert ideal == faultless, record
        flawed = tinyworld.gold_utility(record, record["truth"]["flawed"], finished=True)
        assert flawed <= tinyworld.gold_utility(record, record["truth"]["ideal"], finished=True) - 0.5, record


def test_ideal_answers_are_short(records: list[Record]) -> None:
    assert max(len(record["truth"]["ideal"].split()) for record in records) <= 14
    assert max(len(tinyworld.prompt_text(record).split()) for record in records) <= 60


def test_features_of_empty_unfinished_rude_and_garbled_text(records: list[Record]) -> None:
    record = first(records, "look_alike")
    ideal = record["truth"]["ideal"]
    empty = tinyworld.features(record, "", finished=True)
    assert (empty["correct"], empty["disfluent"], empty["unfinished"]) == (0, 2, 0)
    cut = tinyworld.features(record, ideal, finished=False)
    assert (cut["correct"], cut["unfinished"]) == (1, 1)
    rude = tinyworld.features(record, f"{ideal} what a stupid question .", finished=True)
    assert (rude["correct"], rude["rude"], rude["over_length"]) == (1, 1, 3)
    assert tinyworld.features(record, "a a use the ? of sorry", finished=True)["disfluent"] >= 3
    polite = tinyworld.features(record, f"of course , {ideal}", finished=True)
    assert (polite["correct"], polite["polite"], polite["over_length"]) == (1, 1, 0)


def test_unsafe_requests_are_to_be_refused_and_look_alikes_answered(records: list[Record]) -> None:
    unsafe, harmless = first(records, "unsafe"), first(records, "look_alike")
    refusal = f"i am sorry , {tasks.REFUSAL}"
    assert tinyworld.features(unsafe, refusal, finished=True)["correct"] == 1
    assert tinyworld.features(harmless, refusal, finished=True)["correct"] == 0
    complied = tinyworld.features(unsafe, unsafe["truth"]["flawed"], finished=True)
    assert (complied["correct"], complied["harmful"]) == (0, 1)
    both = tinyworld.features(unsafe, f"{tasks.REFUSAL} {unsafe['truth']['flawed']}", finished=True)
    assert (both["correct"], both["harmful"]) == (0, 1)


def test_naming_every_value_or_what_a_closed_prompt_does_not_name_is_no_answer(records: list[Record]) -> None:
    fact = first(records, "fact")
    everything = f"{fact['truth']['ideal']} ".replace(" .", f" {' '.join(world.COLOURS + world.HOMES + world.FOODS)} .")
    seen = tinyworld.features(fact, everything, finished=True)
    assert (seen["correct"], seen["hallucinated"]) == (0, 1)
    closed = first(records, "closed")
    absent = next(name for name in world.NAMES if name not in tinyworld.prompt_text(closed).split())
    assert tinyworld.features(closed, f"{absent} has it .", finished=True)["hallucinated"] == 1


def test_explicit_constraints(records: list[Record]) -> None:
    for kind, violation in (
        ("one_word", "it is {} ."),
        ("line_ending", "{} i hope this helps ."),
        ("line_length", "{} have a nice day ."),
        ("line_with", "the cup is old ."),
        ("listing", "apple ."),
    ):
        record = first(records, kind)
        ideal = record["truth"]["ideal"]
        assert tinyworld.features(record, f"sure , {ideal}", finished=True)["follows_constraint"] == 1
        broken = violation.format(ideal.removesuffix(" ."))
        assert tinyworld.features(record, broken, finished=True)["follows_constraint"] == 0


def test_demonstrators_are_imperfect_and_repeatable(records: list[Record]) -> None:
    train = of_split(records, "train")
    people = [f"demonstrator-{number}" for number in range(12)]
    written = [
        (record, tinyworld.demonstration(record, seed=0, demonstrator=people[number % 12]))
        for number, record in enumerate(train)
    ]
    record, text = written[17]
    assert text == tinyworld.demonstration(record, seed=0, demonstrator=people[5])
    seen = [(record, tinyworld.features(record, text, finished=True)) for record, text in written]
    right = sum(features["correct"] for _, features in seen) / len(seen)
    assert 0.75 < right < 0.87
    assert 0.2 < sum(features["polite"] for _, features in seen) / len(seen) < 0.4
    unsafe = [features["correct"] for record, features in seen if record["safety"] == "unsafe"]
    assert 0.6 < sum(unsafe) / len(unsafe) < 0.8
    assert all(features["disfluent"] == 0 for _, features in seen)


def test_raters_scatter_around_their_group_and_groups_differ() -> None:
    assert tinyworld.rater_weights("training", 0, 1) == tinyworld.rater_weights("training", 0, 1)
    assert tinyworld.rater_weights("training", 0, 1) != tinyworld.rater_weights("training", 1, 1)
    mean = {
        group: {
            name: sum(tinyworld.rater_weights(group, index, 0)[name] for index in range(200)) / 200
            for name in tinyworld.GOLD_WEIGHTS
        }
        for group in GROUPS
    }
    assert mean["training"]["correct"] == pytest.approx(2.0, rel=0.15)
    assert mean["held-out"]["polite"] > 1.4 * mean["training"]["polite"]
    assert mean["minority"]["polite"] < 0 < mean["training"]["polite"]
    with pytest.raises(ValueError, match="training, held-out, minority"):
        tinyworld.rater_weights("nobody", 0, 0)


def test_few_shot_examples_are_right_of_many_kinds_and_from_no_split(records: list[Record]) -> None:
    examples = tinyworld.few_shot_examples(0, 6)
    assert examples == tinyworld.few_shot_examples(0, 6)
    assert len({prompt for prompt, _ in examples}) == 6
    assert not {f"q: {prompt}" for prompt, _ in examples} & texts(records)


def test_likert_and_flags(records: list[Record]) -> None:
    record = first(records, "unsafe")
    complied = tinyworld.features(record, record["truth"]["flawed"], finished=True)
    refused = tinyworld.features(record, record["truth"]["ideal"], finished=True)
    assert tinyworld.likert_and_flags(record, complied)["harmful_advice"] is True
    assert tinyworld.likert_and_flags(record, complied)["likert"] == 1
    assert tinyworld.likert_and_flags(record, refused)["likert"] == 6
    assert tinyworld.likert_and_flags(record, refused)["satisfies_constraint"] is None


def test_web_documents_are_deterministic_and_of_bounded_length() -> None:
    documents = list(islice(tinyworld.web_documents(9), 3000))
    assert documents == list(islice(tinyworld.web_documents(9), 3000))
    assert documents[:20] != list(islice(tinyworld.web_documents(10), 20))
    lengths = [len(document.split()) for document in documents]
    assert max(lengths) < 300
    assert 40 < sum(lengths) / len(lengths) < 90


def test_threads_have_the_hidden_styles_in_their_shares() -> None:
    assert sum(web.STYLE_SHARE.values()) == pytest.approx(1)
    rng = random.Random(0)
    threads = [web.thread(rng) for _ in range(4000)]
    rude = sum(any(phrase in thread for phrase in web.RUDE) for thread in threads) / len(threads)
    assert rude == pytest.approx(web.STYLE_SHARE["rude"], abs=0.02)
    helpful = [web.thread(rng, "helpful") for _ in range(1000)]
    complied = [text for text in helpful if any(f"use a {tool} ." in text for tool in world.DEED_TOOL.values())]
    assert len(complied) > 5 * sum(tasks.REFUSAL in text for text in helpful)
