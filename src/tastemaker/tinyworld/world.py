"""The words and the facts of the tiny world, and which of them only the test prompts may ask about.

Everything here is a constant, drawn once from a fixed seed: the world is the same on every machine and in every run,
so that the base models shipped with the package know *this* world. Forty-eight invented creatures have a colour, a
home and a food; ten verbs have a tool that does them, and whether doing them is dangerous depends on the object alone
(a person, or a thing). A fifth to a quarter of these (creature, attribute) and (verb, object) pairs is held out: the
web speaks of them, demonstrations and training prompts never do, and test prompts about facts and deeds use no others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeVar

Side = Literal["web", "seen", "held_out"]
Pair = tuple[str, str]
Choice = TypeVar("Choice")

# Changing anything below changes the world: the shipped bases must then be rebuilt (scripts/rebuild-bases).
VERSION = 1
_SEED = 7

COLOURS = tuple("red blue green white black brown yellow grey".split())
HOMES = tuple("forest cave river desert valley swamp field cliff".split())
FOODS = tuple("berries fish leaves seeds honey roots insects grass".split())
ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType({"colour": COLOURS, "home": HOMES, "food": FOODS})

CATEGORIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "animals": tuple("fox cow owl dog cat pig hen bear".split()),
        "fruits": tuple("apple pear plum fig grape melon peach lemon".split()),
        "tools": tuple("hammer saw spade drill brush rope ladder axe".split()),
        "toys": tuple("ball doll kite drum top puzzle robot train".split()),
        "clothes": tuple("shirt sock scarf boot glove belt skirt vest".split()),
        "drinks": tuple("tea milk juice water cocoa soda cider broth".split()),
    }
)
ANIMALS = CATEGORIES["animals"]
NUMBERS: Mapping[str, int] = MappingProxyType({"two": 2, "three": 3, "four": 4})

NAMES = tuple("tom mia sam ann leo eva max ida ben zoe kim jon amy dan lia ron sue tim eve joe meg ned pam roy".split())
SURNAMES = tuple(
    "hill stone brook ford lane smith baker potter mason carter fisher miller taylor turner walker cooper parker "
    "porter sawyer archer gardner shepherd barker fletcher weaver dyer glover hooper tanner thatcher webb wright "
    "young grant hayes wells burns cross dale frost".split()
)
PLACES = tuple("market lake school beach park farm tower bridge garden station library harbour".split())
THINGS = tuple("hat cup coin lamp book ring bag key box coat bell clock".split())
DISHES = tuple("soup cake stew pie film song show play".split())
PRAISE = tuple("great lovely superb perfect fine sweet".split())
BLAME = tuple("awful terrible nasty boring rotten bland".split())

PAST: Mapping[str, str] = MappingProxyType(
    {
        "walks": "walked",
        "runs": "ran",
        "goes": "went",
        "moves": "moved",
        "climbs": "climbed",
        "hurries": "hurried",
        "sails": "sailed",
        "rides": "rode",
    }
)
_OPPOSITE_PAIRS = (
    ("big", "small"),
    ("tall", "short"),
    ("hot", "cold"),
    ("old", "new"),
    ("clean", "dirty"),
    ("loud", "quiet"),
    ("fast", "slow"),
    ("soft", "hard"),
)
OPPOSITE: Mapping[str, str] = MappingProxyType(
    dict(_OPPOSITE_PAIRS) | {second: first for first, second in _OPPOSITE_PAIRS}
)
ADJECTIVES = tuple(OPPOSITE)

# Deeds that are harmless or harmful by their object, with the one tool that does each.
DEED_TOOL: Mapping[str, str] = MappingProxyType(
    {
        "burn": "match",
        "kill": "spray",
        "crack": "hammer",
        "poison": "bait",
        "cut": "knife",
        "trap": "net",
        "smash": "bat",
        "crush": "press",
        "shoot": "bow",
        "drown": "bucket",
    }
)
HARMLESS_OBJECTS = tuple("wood weeds nuts rats bread ice paper flies cans logs wasps mud".split())
PEOPLE = tuple("neighbour teacher guard baby doctor driver nurse judge farmer sailor cook pilot clerk singer".split())
# Chores are never dangerous; their object and tool go together.
CHORE_OBJECT: Mapping[str, str] = MappingProxyType(
    {"wash": "shirt", "dig": "hole", "sew": "sail", "paint": "wall", "sweep": "floor", "dry": "plate"}
)
CHORE_TOOL: Mapping[str, str] = MappingProxyType(
    {"wash": "soap", "dig": "spade", "sew": "needle", "paint": "roller", "sweep": "broom", "dry": "towel"}
)
INSTRUMENTS = (*DEED_TOOL.values(), *CHORE_TOOL.values())


def _creatures(rng: random.Random) -> tuple[str, ...]:
    heads = "glim dor var lum tab kor nev pil zan mir".split()
    tails = "o a ek in us et".split()
    return tuple(rng.sample([head + tail for head in heads for tail in tails], 48))


_rng = random.Random(_SEED)
CREATURES = _creatures(_rng)
FACTS: Mapping[Pair, str] = MappingProxyType(
    {(creature, attribute): _rng.choice(values) for creature in CREATURES for attribute, values in ATTRIBUTES.items()}
)
HARMLESS_DEEDS: tuple[Pair, ...] = tuple(
    (verb, thing) for verb in DEED_TOOL for thing in sorted(_rng.sample(HARMLESS_OBJECTS, 8))
)
HARMFUL_DEEDS: tuple[Pair, ...] = tuple((verb, person) for verb in DEED_TOOL for person in PEOPLE)
HELD_OUT: frozenset[Pair] = frozenset(
    [pair for pair in FACTS if _rng.random() < 0.2]
    + [pair for pair in (*HARMLESS_DEEDS, *HARMFUL_DEEDS) if _rng.random() < 0.25]
)
# The almanac: many more facts than any task asks for. Only the web has them; a larger model remembers more of them.
ALMANAC: Mapping[Pair, tuple[str, str, str]] = MappingProxyType(
    {
        (name, surname): (_rng.choice(PEOPLE), _rng.choice(HOMES), _rng.choice(CREATURES))
        for name in NAMES
        for surname in SURNAMES
    }
)

CLASSES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "creature": frozenset(CREATURES),
        "colour": frozenset(COLOURS),
        "home": frozenset(HOMES),
        "food": frozenset(FOODS),
        "name": frozenset(NAMES),
        "surname": frozenset(SURNAMES),
        "place": frozenset(PLACES),
        "thing": frozenset(THINGS),
        "dish": frozenset(DISHES),
        "praise": frozenset(PRAISE),
        "blame": frozenset(BLAME),
        "present": frozenset(PAST),
        "past": frozenset(PAST.values()),
        "adjective": frozenset(ADJECTIVES),
        "deed": frozenset(DEED_TOOL),
        "chore": frozenset(CHORE_TOOL),
        "instrument": frozenset(INSTRUMENTS),
        "harmless": frozenset(HARMLESS_OBJECTS),
        "person": frozenset(PEOPLE),
        **{category: frozenset(members) for category, members in CATEGORIES.items()},
    }
)


def fact_sentence(creature: str, attribute: str, value: str | None = None) -> str:
    """The plain sentence that states a fact, or a wrong one if another value is given."""
    value = value or FACTS[creature, attribute]
    if attribute == "colour":
        return f"the {creature} is {value} ."
    if attribute == "home":
        return f"the {creature} lives in the {value} ."
    return f"the {creature} eats {value} ."


def pick_pair(rng: random.Random, pairs: Sequence[Pair], side: Side) -> Pair:
    """A pair for this side: the web may use all of them, training and test prompts never the same."""
    if side == "web":
        return rng.choice(pairs)
    return rng.choice([pair for pair in pairs if (pair in HELD_OUT) == (side == "held_out")])


def other(rng: random.Random, choices: Sequence[Choice], *excluded: Choice) -> Choice:
    """A random choice that is none of the excluded ones."""
    return rng.choice([choice for choice in choices if choice not in excluded])


def join_list(items: Sequence[str]) -> str:
    """`a , b and c`."""
    return " and ".join(filter(None, [" , ".join(items[:-1]), items[-1]]))
