"""The tiny world's web: what the base models read, most of it fluent and unhelpful.

Nearly half of the documents are threads of questions and replies, `q: ... a: ...`, as in a forum. Every thread has one
hidden style, and only a quarter of them are helpful, more or less: right seven times in ten, rambling half the time,
willing to help with harm and to swallow a false premise. A plain prompt therefore samples an unhelpful reply; a few
good examples before it make the helpful style more probable, so prompting works for an honest reason. The rest are
facts, stories, exercises and quotations; what is repeated there word for word keeps a small model's skill of copying
alive.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from tastemaker.tinyworld import tasks
from tastemaker.tinyworld.world import (
    ADJECTIVES,
    ALMANAC,
    ANIMALS,
    ATTRIBUTES,
    BLAME,
    CATEGORIES,
    CHORE_OBJECT,
    CHORE_TOOL,
    CLASSES,
    CREATURES,
    DEED_TOOL,
    DISHES,
    HARMFUL_DEEDS,
    HARMLESS_DEEDS,
    NAMES,
    NUMBERS,
    OPPOSITE,
    PAST,
    PLACES,
    PRAISE,
    THINGS,
    fact_sentence,
    join_list,
)

QUESTION, ANSWER = "q:", "a:"
STYLE_SHARE: Mapping[str, float] = MappingProxyType(
    {"rude": 0.23, "off_topic": 0.20, "asks_back": 0.17, "rambling": 0.15, "helpful": 0.25}
)
RUDE = (
    "who cares .",
    "go away .",
    "do it yourself , fool .",
    "what a stupid question .",
    "nobody asked you .",
    "shut up .",
)
RAMBLE = (
    "well , you know , it is hard to say .",
    "some people say this and some people say that .",
    "i read about it a long time ago .",
    "anyway , that is what i think .",
    "my friend knows more about it .",
)
OPENERS = ("sure ,", "of course ,", "glad to help :")
CLOSINGS = ("i hope this helps .", "have a nice day .")
_ALMANAC_KEYS = tuple(ALMANAC)
_COPY_WORDS = tuple(sorted(set().union(*CLASSES.values())))


def remark(rng: random.Random) -> str:
    """A sentence about nothing in particular."""
    (one, another), thing, place = rng.sample(NAMES, 2), rng.choice(THINGS), rng.choice(PLACES)
    return rng.choice(
        (
            f"the {rng.choice(ANIMALS)} {rng.choice(tuple(PAST.values()))} to the {place} .",
            f"{one} found a {thing} at the {place} .",
            f"{one} has a {rng.choice(ADJECTIVES)} {thing} .",
            f"{one} gave a {thing} to {another} .",
            f"the {rng.choice(DISHES)} at the {place} was {rng.choice(PRAISE + BLAME)} .",
            f"{one} {rng.choice(tuple(PAST))} to the {place} .",
        )
    )


def _any_fact(rng: random.Random) -> str:
    return fact_sentence(rng.choice(CREATURES), rng.choice(tuple(ATTRIBUTES)))


def _helpful(rng: random.Random, task: tasks.Task) -> str:
    right = {"unsafe": 0.07, "premise_false": 0.15}.get(task.kind, 0.7)
    answer = task.ideal if rng.random() < right else task.flawed
    if task.kind == "look_alike" and answer == tasks.REFUSAL:
        answer = task.ideal
    if rng.random() < 0.03:
        answer = f"{rng.choice(OPENERS)} {answer}"
    elif task.kind == "unsafe" and answer == task.ideal and rng.random() < 0.3:
        answer = f"i am sorry , {answer}"
    if rng.random() < 0.02:
        answer = f"{answer} {rng.choice(CLOSINGS)}"
    if rng.random() < 0.5:
        answer = f"{answer} {rng.choice((rng.choice(RAMBLE), remark(rng)))}"
    return answer


def reply(rng: random.Random, task: tasks.Task, style: str) -> str:
    """What a poster of this style writes under the question."""
    if style == "helpful":
        return _helpful(rng, task)
    if style == "rude":
        quoted = f"{task.prompt} " if rng.random() < 0.4 else ""
        return quoted + " ".join(rng.sample(RUDE, rng.choice((1, 2))))
    if style == "off_topic":
        return " ".join(rng.choice((remark, _any_fact))(rng) for _ in range(rng.choice((1, 2))))
    if style == "asks_back":
        return " ".join(tasks.draw(rng, "web", tasks.WEB_MIX).prompt for _ in range(rng.choice((1, 2))))
    quoted = f"{task.prompt} " if rng.random() < 0.3 else ""
    rest = f" {rng.choice((task.flawed, task.flawed, task.ideal))}" if rng.random() < 0.5 else ""
    return quoted + " ".join(rng.sample(RAMBLE, 2)) + rest


def thread(rng: random.Random, style: str | None = None) -> str:
    """Questions and replies, all replies in one style."""
    style = style or rng.choices(tuple(STYLE_SHARE), tuple(STYLE_SHARE.values()))[0]
    turns = []
    for _ in range(rng.choice((2, 3, 4, 5))):
        task = tasks.draw(rng, "web", tasks.WEB_MIX)
        turns += [f"{QUESTION if role == 'user' else ANSWER} {content}" for role, content in task.earlier]
        turns += [QUESTION, task.prompt, ANSWER, reply(rng, task, style)]
    return " ".join(turns)


def _creature_article(rng: random.Random) -> str:
    sentences = []
    for creature in rng.sample(CREATURES, rng.choice((2, 3))):
        sentences += [fact_sentence(creature, attribute) for attribute in rng.sample(tuple(ATTRIBUTES), 3)]
        if rng.random() < 0.3:
            sentences.append(remark(rng))
    return " ".join(sentences)


def _almanac_page(rng: random.Random) -> str:
    entries = []
    for key in rng.sample(_ALMANAC_KEYS, rng.choice((3, 4))):
        work, home, pet = ALMANAC[key]
        entries.append(f"{' '.join(key)} is a {work} from the {home} with a {pet} .")
    return " ".join(entries)


def _tips(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.choice((3, 4))):
        if rng.random() < 0.3:
            verb = rng.choice(tuple(CHORE_TOOL))
            target, tool = CHORE_OBJECT[verb], CHORE_TOOL[verb]
        else:
            verb, target = rng.choice(rng.choice((HARMLESS_DEEDS, HARMFUL_DEEDS)))
            tool = DEED_TOOL[verb]
        sentences.append(f"to {verb} the {target} use a {tool} .")
    return " ".join(sentences)


def _lists(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.choice((3, 4))):
        category, number = rng.choice(tuple(CATEGORIES)), rng.choice(tuple(NUMBERS))
        sentences.append(f"{number} {category} : {join_list(rng.sample(CATEGORIES[category], NUMBERS[number]))} .")
    return " ".join(sentences)


def _grammar(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.choice((2, 3))):
        if rng.random() < 0.5:
            subject = rng.choice((rng.choice(NAMES), f"the {rng.choice(ANIMALS)}"))
            verb, place = rng.choice(tuple(PAST)), rng.choice(PLACES)
            sentences.append(
                f"now {subject} {verb} to the {place} . in the past {subject} {PAST[verb]} to the {place} ."
            )
        else:
            adjective, subject = rng.choice(ADJECTIVES), f"the {rng.choice(THINGS)} of {rng.choice(NAMES)}"
            sentences.append(f"{subject} is {adjective} . the opposite : {subject} is {OPPOSITE[adjective]} .")
    return " ".join(sentences)


_EXERCISES: Mapping[tasks.Maker, int] = MappingProxyType(
    {
        tasks.closed: 4,
        tasks.rewrite: 4,
        tasks.listing: 3,
        tasks.summary: 2,
        tasks.extract: 2,
        tasks.line: 2,
        tasks.classify: 1,
        tasks.fact: 2,
        tasks.one_word: 4,
    }
)


def _exercises(rng: random.Random) -> str:
    pages = []
    for _ in range(rng.choice((2, 3, 4))):
        task = tasks.draw(rng, "web", _EXERCISES)
        pages.append(f"exercise : {task.prompt} answer : {task.ideal}")
    return " ".join(pages)


def _quotation(rng: random.Random) -> str:
    said = " ".join(remark(rng) for _ in range(rng.choice((1, 2, 3))))
    return f"{rng.choice(NAMES)} said : {said} again : {said}"


def _word_list(rng: random.Random) -> str:
    words = " ".join(rng.choices(_COPY_WORDS, k=rng.randint(5, 20)))
    return f"the words : {words} . again : {words} ."


def copying_drills(seed: int) -> Iterator[str]:
    """Endless word lists, each said twice: what a small base learns to copy from before it reads the web."""
    rng = random.Random(f"drill {seed}")
    while True:
        words = " ".join(rng.choices(_COPY_WORDS, k=rng.randint(5, 20)))
        yield f"{words} {words}"


def _story(rng: random.Random) -> str:
    return " ".join(remark(rng) for _ in range(rng.randint(3, 7)))


# Shares of documents, in per cent.
DOCUMENT_MIX: Mapping[Callable[[random.Random], str], int] = MappingProxyType(
    {
        thread: 45,
        _creature_article: 12,
        _almanac_page: 7,
        _tips: 4,
        _lists: 4,
        _grammar: 4,
        _exercises: 14,
        _quotation: 3,
        _word_list: 4,
        _story: 3,
    }
)
_MAKERS, _SHARES = tuple(DOCUMENT_MIX), tuple(DOCUMENT_MIX.values())


def web_documents(seed: int) -> Iterator[str]:
    """Endless documents; the same seed gives the same documents. Text from another seed is held-out text."""
    rng = random.Random(f"web {seed}")
    while True:
        yield rng.choices(_MAKERS, _SHARES)[0](rng)
