"""Prompt intake: which prompts are used, for what, and what was left out (section 3.2 and appendices A.2, A.4, C).

In the paper's order: prompts that share a long prefix are dropped but the first, a user keeps at most 200, users (not
prompts) are split into train, validation and test, and prompts with personal data leave the training split only.
Before that, prompts too long to train on go (C: over 1k tokens) and every prompt is labelled with its language (A.4).

Departures, because the paper names no numbers or tools for them: a prefix is long from `prefix_characters` on, counted
without the system turn, which all prompts of one application share; personal data is what patterns and check digits
find, so names and addresses are not found; languages are told by py3langid, the successor of the paper's langid.py.

Which split a user is in depends on the user's name and the seed alone. So prompts that arrive in later rounds go where
their user already is, and no order of arrival changes that.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import phonenumbers

from tastemaker.console import say
from tastemaker.errors import ConfigError, DataError
from tastemaker.halves import first_turn, openings
from tastemaker.personal_data import PHONE_REGIONS, Kind, find_personal_data, personal_data_in
from tastemaker.ranges import MAX_SEED, check_range
from tastemaker.records import Demonstration, Prompt, Split, messages_hash, with_about

Reason = Literal[
    "too_long",
    "other_language",
    "duplicate",
    "shared_prefix",
    "over_user_limit",
    "begins_with_test_prompt",
    "personal_data",
]

LANGUAGE = "language"
UNDETERMINED = "und"  # ISO 639-2 for a language that cannot be told
# Below this probability py3langid is often wrong: of 1,876 English prompts it then took 13 for another language, and
# above it none. What falls below is mostly short ("hi", "2+2=?").
LANGUAGE_CERTAINTY = 0.5
EXAMPLES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """Prompt intake. The defaults follow the paper where it gives a number."""

    source: str
    """A file, a folder saved by datasets, or the name of a data set."""
    prefix_characters: int | None = 128
    """Prompts that begin with the same so many characters are taken for one; without it only equal prompts are."""
    max_per_user: int = 200
    """Prompts kept of one user (3.2)."""
    max_characters: int = 4000
    """Longest conversation kept; about the paper's 1k tokens of English."""
    validation_share: float = 0.1
    """Share of users whose prompts are for validation."""
    test_share: float = 0.1
    """Share of users whose prompts are for the final evaluation."""
    filter_personal_data: bool = True
    """Drop training prompts in which personal data or secrets are found."""
    phone_regions: tuple[str, ...] = PHONE_REGIONS
    """Regions whose telephone numbers are found without their +country prefix."""
    languages: tuple[str, ...] = ()
    """Languages to keep (codes such as "en"); none named keeps all. Prompts too short to tell are always kept."""
    test_source: str | None = None
    """Further prompts that are all for the final evaluation, such as a public set of instructions. Prompts of either
    source that name no category then have their file's name as category, so that results are told apart."""
    first_turn_only: bool = False
    """Keep only a conversation's first user turn (and what the system says before it) as the prompt."""
    seed: int = 0
    """Chooses the users of each split. Apart from the run's seed, so that training again does not move users."""

    def __post_init__(self) -> None:
        check_range(self, "prefix_characters", "max_per_user", "max_characters", least=1)
        check_range(self, "validation_share", "test_share", least=0, below=1)
        check_range(self, "seed", least=0, most=MAX_SEED)
        shares = self.validation_share, self.test_share
        if sum(shares) >= 1:
            raise ConfigError(
                f"validation_share is {shares[0]} and test_share {shares[1]}; together they must leave some users for "
                "training."
            )
        unknown = sorted(set(self.phone_regions) - phonenumbers.SUPPORTED_REGIONS)
        if unknown:
            raise ConfigError(f"phone_regions holds {', '.join(unknown)}; use two-letter regions such as US or GB.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsReport:
    """What came in and what became of it. Holds counts and a few keys, no text of any prompt."""

    read: int
    kept: int
    dropped: Mapping[Reason, int]
    examples: Mapping[Reason, tuple[str, ...]]
    """Keys of a few dropped prompts. A key in which personal data is found is replaced by a hash of the prompt."""
    personal_data: Mapping[Kind, int]
    """Training prompts dropped, by what was found; one prompt may count under several."""
    by_split: Mapping[Split, int]
    users_by_split: Mapping[Split, int]
    by_category: Mapping[str, int]
    by_language: Mapping[str, int]

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{self.kept} of {self.read} prompts kept"]
        lines += [f"  dropped, {reason.replace('_', ' ')}: {count}" for reason, count in self.dropped.items() if count]
        lines += [
            f"  {split}: {count} prompts from {self.users_by_split[split]} users"
            for split, count in self.by_split.items()
        ]
        languages = ", ".join(f"{language} {count}" for language, count in self.by_language.items())
        return "\n".join([*lines, f"  languages: {languages or 'none'}"])


def gathered(given: Sequence[Prompt], further: Sequence[Prompt] | None, config: PromptsConfig) -> list[Prompt]:
    """The prompts of `source` and, if there is one, of `test_source`, as they are filtered and split."""
    prompts = list(given)
    if config.test_source is not None and further is not None:
        tested = [with_about(prompt, split="test") for prompt in _categorised(further, config.test_source)]
        prompts = [*_categorised(given, config.source), *tested]
    return [first_turn(prompt) for prompt in prompts] if config.first_turn_only else prompts


def _categorised(rows: Sequence[Prompt], source: str) -> list[Prompt]:
    """The prompts, those without a category under their source's name."""
    name = Path(source).name.partition(".")[0]
    return [prompt if prompt.about.category else with_about(prompt, category=name) for prompt in rows]


def take_in(prompts: Sequence[Prompt], config: PromptsConfig) -> tuple[list[Prompt], PromptsReport]:
    """Filter, label and split prompts. Those kept carry `split` and `extra["language"]`, in the order they came in.

    A prompt that comes with a split keeps it, and so do the other prompts of its user. What was taken in once is
    taken in again unchanged.

    Raises:
        DataError: a user's prompts come with different splits, or two different prompts have the same id.
    """
    split_of = _split_users(prompts, config)
    kept = [_with_language(prompt) for prompt in prompts]
    dropped: dict[Reason, list[Prompt]] = {reason: [] for reason in get_args(Reason)}

    def drop(reason: Reason, unwanted: Callable[[Prompt], bool]) -> None:
        nonlocal kept
        dropped[reason] += filter(unwanted, kept)
        kept = [prompt for prompt in kept if not unwanted(prompt)]

    drop("too_long", lambda prompt: _length(prompt) > config.max_characters)
    if config.languages:
        drop("other_language", lambda prompt: prompt.about.extra[LANGUAGE] not in {*config.languages, UNDETERMINED})
    kept, dropped["duplicate"], dropped["shared_prefix"] = _without_common_prefix(kept, config.prefix_characters)
    _check_ids(kept)
    kept, dropped["over_user_limit"] = _with_user_limit(kept, config)
    kept = [with_about(prompt, split=split_of[_owner(prompt)]) for prompt in kept]
    tested = {_comparable(prompt) for prompt in kept if prompt.about.split == "test"}
    drop("begins_with_test_prompt", lambda prompt: prompt.about.split != "test" and _goes_through(prompt, tested))
    found: dict[str, tuple[Kind, ...]] = {}
    if config.filter_personal_data:
        training = [prompt for prompt in kept if prompt.about.split == "train"]
        found = {prompt.key: personal_data_in(prompt, config.phone_regions) for prompt in training}
        drop("personal_data", lambda prompt: bool(found.get(prompt.key)))
    return kept, _report(len(prompts), kept, dropped, Counter(chain.from_iterable(found.values())))


def overlap(a: Iterable[Prompt], b: Iterable[Prompt]) -> list[str]:
    """The keys of those prompts of `a` whose text also occurs in `b`, case and white space aside.

    As a prompt of its own, or as what a conversation goes on from.
    """
    texts = {_comparable(opening) for prompt in b for opening in openings(prompt)}
    return [prompt.key for prompt in a if _comparable(prompt) in texts]


def apart(rows: Sequence[Demonstration], held_out: Iterable[Prompt]) -> list[Demonstration]:
    """The rows that may be trained on where those prompts measure.

    A conversation that goes on from such a prompt is left out as well; how many are is said.
    """
    known = set(map(_comparable, held_out))
    kept = [row for row in rows if not _goes_through(row.prompt, known)]
    if len(kept) < len(rows):
        say(f"  {len(rows) - len(kept)} of {len(rows)} training records have a validation prompt and are left out")
    return kept


def _goes_through(prompt: Prompt, held_out: Container[tuple[str, str]]) -> bool:
    """Whether the conversation goes on from one of those prompts: a reply to it would be learned."""
    return any(_comparable(opening) in held_out for opening in openings(prompt))


def say_shortfall(prompts: Sequence[Prompt], count: int | None, what: str) -> None:
    """Say where there are fewer prompts than a recipe asks for."""
    if count is not None and len(prompts) < count:
        say(f"  {count} {what} were asked for, and {len(prompts)} are there")


# --- the paper's rules ----------------------------------------------------------------------------------------------


def _without_common_prefix(
    prompts: Sequence[Prompt], prefix_characters: int | None
) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """The first of all prompts that begin alike; the equal ones dropped; the others dropped. Linear in their number.

    A prompt shorter than the prefix is dropped only for an equal one. Prompts that came with a split go before those
    that did not, and held-out ones before training: a copy in the training data must not shrink a given test set.
    """
    kept: set[int] = set()
    duplicates: list[Prompt] = []
    sharing: list[Prompt] = []
    first: dict[tuple[str, str], str] = {}
    precedence = {"test": 0, "validation": 1, "train": 2, None: 3}
    for index in sorted(range(len(prompts)), key=lambda index: precedence[prompts[index].about.split]):
        system, spoken = _comparable(prompts[index])
        earlier = first.setdefault((system, spoken[:prefix_characters]), spoken)
        if earlier is spoken:
            kept.add(index)
        else:
            (duplicates if earlier == spoken else sharing).append(prompts[index])
    return [prompt for index, prompt in enumerate(prompts) if index in kept], duplicates, sharing


def _with_user_limit(prompts: Sequence[Prompt], config: PromptsConfig) -> tuple[list[Prompt], list[Prompt]]:
    """At most `max_per_user` prompts of a user, chosen by hash: a sample of all of them, whatever their order."""
    keys_of: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        keys_of[_owner(prompt)].append(prompt.key)
    chosen: set[str] = set()
    for keys in keys_of.values():
        chosen.update(sorted(keys, key=lambda key: _uniform("limit", key, config.seed))[: config.max_per_user])
    return [p for p in prompts if p.key in chosen], [p for p in prompts if p.key not in chosen]


def _split_users(prompts: Iterable[Prompt], config: PromptsConfig) -> dict[str, Split]:
    """The split of every user: the one given with the user's prompts, else drawn."""
    given: dict[str, set[Split]] = {}
    for prompt in prompts:
        splits = given.setdefault(_owner(prompt), set())
        if prompt.about.split is not None:
            splits.add(prompt.about.split)
    mixed = sorted(owner for owner, splits in given.items() if len(splits) > 1)
    if mixed:
        names = ", ".join(json.loads(owner)[1] for owner in mixed[:5])
        raise DataError(
            f"{len(mixed)} users have prompts in more than one split ({names}{', ...' if mixed[5:] else ''}). A user "
            "belongs in one split; correct the 'split' fields, or remove them to have users split anew."
        )
    return {owner: splits.pop() if splits else _drawn_split(owner, config) for owner, splits in given.items()}


def _drawn_split(owner: str, config: PromptsConfig) -> Split:
    draw = _uniform("split", owner, config.seed)
    if draw < config.test_share:
        return "test"
    return "validation" if draw < config.test_share + config.validation_share else "train"


def _owner(prompt: Prompt) -> str:
    """Who a prompt belongs to; one without a user is its own. The tag keeps user names and prompt keys apart."""
    return json.dumps(["user", prompt.about.user] if prompt.about.user else ["prompt", prompt.key])


def _uniform(*parts: str | int) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _check_ids(prompts: Iterable[Prompt]) -> None:
    counts = Counter(prompt.key for prompt in prompts)
    doubled = sorted(key for key, count in counts.items() if count > 1)
    if doubled:
        raise DataError(
            f"{len(doubled)} ids belong to several different prompts ({', '.join(doubled[:5])}). Answers are kept by "
            "id; give each prompt its own, or leave ids out to have prompts named by their text."
        )


def _comparable(prompt: Prompt) -> tuple[str, str]:
    """The system turn and all other turns, without differences of case, white space and Unicode form."""
    system = [_normal(turn.content) for turn in prompt.messages if turn.role == "system"]
    spoken = [_normal(turn.content) for turn in prompt.messages if turn.role != "system"]
    return "\n".join(system), "\n".join(spoken)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _length(prompt: Prompt) -> int:
    return sum(len(turn.content) for turn in prompt.messages)


def _report(
    read: int, kept: Sequence[Prompt], dropped: Mapping[Reason, Sequence[Prompt]], personal_data: Counter[Kind]
) -> PromptsReport:
    splits: tuple[Split, ...] = get_args(Split)
    kinds: tuple[Kind, ...] = get_args(Kind)
    categories = Counter(prompt.about.category or "none given" for prompt in kept)
    languages = Counter(str(prompt.about.extra[LANGUAGE]) for prompt in kept)
    return PromptsReport(
        read=read,
        kept=len(kept),
        dropped={reason: len(prompts) for reason, prompts in dropped.items()},
        examples={reason: tuple(map(_safe_key, p[:EXAMPLES_SHOWN])) for reason, p in dropped.items() if p},
        personal_data={kind: personal_data[kind] for kind in kinds if personal_data[kind]},
        by_split={split: sum(prompt.about.split == split for prompt in kept) for split in splits},
        users_by_split={split: len({_owner(p) for p in kept if p.about.split == split}) for split in splits},
        by_category=dict(sorted(categories.items())),
        by_language=dict(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
    )


def _safe_key(prompt: Prompt) -> str:
    return messages_hash(prompt.messages) if find_personal_data(prompt.key) else prompt.key


# --- language -------------------------------------------------------------------------------------------------------


def identify_language(text: str) -> str:
    """The language of a text as a code such as "en", or "und" where it cannot be told with some certainty."""
    language, certainty = _language_identifier().classify(text)
    return str(language) if certainty >= LANGUAGE_CERTAINTY else UNDETERMINED


def _with_language(prompt: Prompt) -> Prompt:
    """The prompt labelled with its language; a label that it came with stays."""
    if isinstance(prompt.about.extra.get(LANGUAGE), str):
        return prompt
    text = "\n".join(turn.content for turn in prompt.messages if turn.role == "user")
    return with_about(prompt, extra={**prompt.about.extra, LANGUAGE: identify_language(text)})


@cache
def _language_identifier():  # type: ignore[no-untyped-def]  # py3langid has no types
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # its model takes most of a second to load

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
