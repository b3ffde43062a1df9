"""Passwords, tokens and what is kept of them: argon2id hashes of the one, plain hashes of the other.

A token is 256 random bits, which nobody can guess however fast a hash is; a password is what a person thought of, so
its hash is made slow. Nothing here is ever stored or printed in clear.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
import unicodedata

import argon2
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.low_level import ARGON2_VERSION

from tastemaker.errors import StoreError

SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 1000

# Hashings at once. Each takes 64 MiB by default, and forty people may sign in at the same moment.
_AT_ONCE = 4


class Passwords:
    """Hashing passwords, and checking them with the same work whether or not there is anything to check against."""

    def __init__(self, hasher: argon2.PasswordHasher) -> None:
        self._hasher = hasher
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        self._of_nobody = _hash_of_nothing(hasher)

    def hash(self, password: str) -> str:
        with self._room:
            return self._hasher.hash(_as_bytes(password))

    def verify(self, stored: str | None, password: str) -> bool:
        """Whether it is the password; with nothing stored, False after as much work."""
        too_long = len(password) > LONGEST_PASSWORD  # nobody's: normalising what is very long may take very long
        against = self._of_nobody if stored is None or too_long else stored
        try:
            with self._room:
                self._hasher.verify(against, b"" if too_long else _as_bytes(password))
        except (VerificationError, InvalidHashError):
            return False
        return against is not self._of_nobody

    def is_outdated(self, stored: str) -> bool:
        """Whether the hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(stored)


def _hash_of_nothing(hasher: argon2.PasswordHasher) -> str:
    """What looks like a hash of `hasher`'s, so that it takes as long to check against, and is of no password.

    To hash something would take as long as a sign-in takes, whenever a server starts.
    """
    salt, digest = (
        base64.b64encode(secrets.token_bytes(size)).decode().rstrip("=") for size in (hasher.salt_len, hasher.hash_len)
    )
    costs = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    return f"$argon2{hasher.type.name.lower()}$v={ARGON2_VERSION}${costs}${salt}${digest}"


def check_password(password: str, *, name: str) -> None:
    """Refuse a new password that is too short, or too easily guessed by who knows the name."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise StoreError(
            f"The password has {len(password)} characters; it must have at least {SHORTEST_PASSWORD} and at most "
            f"{LONGEST_PASSWORD}: a few words in a row are good and easily typed."
        )
    if len(set(password)) < 4 or password.casefold() == name.casefold():
        raise StoreError("The password is too easily guessed; take a few words in a row that nobody would expect.")


def new_token() -> str:
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is stored of a token."""
    return _digest(token, person=b"tastemaker-token")


def form_token(session_token: str) -> str:
    """The token that a session's forms carry: it follows from the session's own, and tells nothing of it."""
    return _digest(session_token, person=b"tastemaker-forms")


def key_hash(key: str) -> str:
    """What is stored of a throttle's key, which may hold anything that was typed and in which address it was."""
    return _digest(key, person=b"tastemaker-limit")


def _digest(text: str, *, person: bytes) -> str:
    return hashlib.blake2b(_plain_bytes(text), digest_size=32, person=person).hexdigest()


def _as_bytes(password: str) -> bytes:
    # A letter with its accent is one character on one keyboard and two on another.
    return _plain_bytes(unicodedata.normalize("NFKC", password))


def _plain_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # whatever is typed has bytes: a wrong password is no crash
