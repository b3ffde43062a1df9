"""Personal data and secrets in texts, found by patterns and check digits; texts with them are not trained on.

The paper filters personal data from all training prompts (3.2, A.2) and names no tool. Here names, postal addresses and
whatever has no form of its own are not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import phonenumbers
from stdnum import iban, luhn

from tastemaker.records import Demonstration, Prompt, Ranking

Kind = Literal["email", "phone", "card", "iban", "secret"]
Record = TypeVar("Record", bound=Prompt | Demonstration | Ranking)

PHONE_REGIONS = ("US",)

# The quantifiers are bounded and begin at a boundary, so that no long word makes them slow.
EMAIL = re.compile(r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")

CARD = re.compile(
    r"(?<![\w.,-])(?:\d{14,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -])\d{6}\2\d{5})(?![\w]|[.,]\d)"
)
# Numbers that issuers give out, by length: Visa; Mastercard; American Express; Discover and JCB; Diners; UnionPay. The
# check digit alone would take every tenth long number for a card. Visa's old numbers of 13 digits are left out.
ISSUED_CARD = re.compile(
    r"4\d{15}(?:\d{3})?|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|(?:6011|65\d\d|64[4-9]\d|35\d\d)\d{12}|3[0689]\d{12}"
    r"|62\d{14,17}"
)

IBAN_START = re.compile(r"(?<![A-Za-z0-9])(?=[A-Za-z]{2}\d{2}[ -]?[A-Za-z0-9])")
IBAN_RUN = re.compile(r"(?:[A-Za-z0-9][ -]?){15,34}")

SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----",
        r"(?<![A-Za-z0-9_-])sk-(?=[\w-]*\d)[\w-]{20,}",  # OpenAI, Anthropic
        r"(?<![A-Za-z0-9_])[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
        r"(?<![A-Za-z0-9])A(?:KIA|SIA)[0-9A-Z]{16}(?![A-Za-z0-9])",  # AWS
        r"(?<![A-Za-z0-9])AIza[\w-]{35}(?![\w-])",  # Google
        r"(?<![A-Za-z0-9])gh[oprsu]_[A-Za-z0-9]{36,}",  # GitHub
        r"(?<![A-Za-z0-9])github_pat_\w{22,}",
        r"(?<![A-Za-z0-9])glpat-[\w-]{20,}",  # GitLab
        r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{34,}",  # Hugging Face
        r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
        r"(?<![A-Za-z0-9])xox[abeprs]-[A-Za-z0-9-]{10,}",  # Slack
        r"(?<![A-Za-z0-9])SG\.[\w-]{22}\.[\w-]{43}(?![\w-])",  # SendGrid
        r"(?<![A-Za-z0-9])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON web token
        r"://[^\s:/@]{1,64}:[^\s:/@]{3,64}@[A-Za-z0-9]",  # user:password@host
        # A value given to a name that says secret: eight characters or more with a letter and a digit among them.
        r"(?i)(?<![A-Za-z0-9])(?:password|passwd|api[_ -]?key|secret[_ -]?key|access[_ -]?token)[\"']?"
        r"\s{0,3}[:=]\s{0,3}[\"']?(?=\S{0,64}\d)(?=\S{0,64}[A-Za-z])[\w+/=.!@#$%^&*~-]{8,128}(?=[\s\"',;]|$)",
    )
)


def find_personal_data(text: str, *, phone_regions: Sequence[str] = PHONE_REGIONS) -> tuple[Kind, ...]:
    """The kinds of personal data and secrets found in a text: "email", "phone", "card", "iban", "secret"."""
    found: Mapping[Kind, bool] = {
        "email": EMAIL.search(text) is not None,
        "phone": any(True for _ in _phone_numbers(text, phone_regions)),
        "card": any(_is_card(match.group()) for match in CARD.finditer(text)),
        "iban": any(_begins_with_iban(text, match.start()) for match in IBAN_START.finditer(text)),
        "secret": any(pattern.search(text) for pattern in SECRETS),
    }
    return tuple(kind for kind, is_found in found.items() if is_found)


def personal_data_in(record: Prompt | Demonstration | Ranking, phone_regions: Sequence[str]) -> tuple[Kind, ...]:
    """The same of a record: of every turn of its prompt, and of what was written or shown as response."""
    return find_personal_data("\n".join(_texts_of(record)), phone_regions=phone_regions)


def without_personal_data(
    records: Sequence[Record], *, phone_regions: Sequence[str] = PHONE_REGIONS
) -> tuple[list[Record], int]:
    """The records in which none is found, and how many others there were."""
    kept = [record for record in records if not personal_data_in(record, phone_regions)]
    return kept, len(records) - len(kept)


def _texts_of(record: Prompt | Demonstration | Ranking) -> Iterator[str]:
    prompt = record if isinstance(record, Prompt) else record.prompt
    yield from (turn.content for turn in prompt.messages)
    if isinstance(record, Demonstration):
        yield record.response
    if isinstance(record, Ranking):
        yield from (response.text for response in record.responses)


def _phone_numbers(text: str, regions: Sequence[str]) -> Iterator[str]:
    """Numbers grouped as their country groups them.

    Bare digits without a plus are left: on real prompts they were sums and order numbers, never telephones. So were
    digits after a plus and a space.
    """
    for region in dict.fromkeys((*regions, None)):
        matcher = phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.EXACT_GROUPING)
        for match in matcher:
            number = match.raw_string
            if not number.isdigit() and not number.startswith("+ "):
                yield number


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return ISSUED_CARD.fullmatch(digits) is not None and bool(luhn.is_valid(digits))


def _begins_with_iban(text: str, start: int) -> bool:
    """Whether an account number begins here. How long one is depends on its country, so each end is tried."""
    run = IBAN_RUN.match(text, start)
    if run is None:
        return False
    ends = (end for end in range(start + 15, run.end() + 1) if not text[end : end + 1].isalnum())
    return any(iban.is_valid(text[start:end]) for end in ends)
