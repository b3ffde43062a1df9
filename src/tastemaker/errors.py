"""What can go wrong, as exceptions whose text is the whole message a user sees.

    TastemakerError              exit code 2 unless said otherwise; the command line prints it as one sentence
    ├── ConfigError              a recipe or an option is wrong
    ├── DataError                a file holds something we cannot use (names file and line)
    ├── ModelError               a folder is not a model, or lacks what the stage needs
    ├── TrainingError            NaN, divergence, a broken invariant while training
    ├── StoreError               the label store refuses (a lease that is not ours, a ranking that is not whole)
    └── AnswersMissing           exit code 3: people still have to answer; run the same command again afterwards

A message says what was given, what is allowed, and what to do.
"""

from __future__ import annotations

from pathlib import Path


class TastemakerError(Exception):
    """Base of every error that is meant for a user; `exit_code` is what the command line exits with.

    `finding` is what `tastemaker doctor` calls it, where training came to it by going wrong.
    """

    exit_code = 2
    finding: str | None = None


class ConfigError(TastemakerError):
    """A recipe, a config field or a command line option is wrong."""


class DataError(TastemakerError):
    """Input data is wrong. `location` names where, as precisely as is known."""

    def __init__(self, message: str, *, path: Path | str | None = None, line: int | None = None) -> None:
        self.path, self.line = path, line
        place = "" if path is None else f"{path}{'' if line is None else f', line {line}'}: "
        super().__init__(f"{place}{message}")


class ModelError(TastemakerError):
    """A model folder cannot be used for what was asked."""

    def __init__(self, message: str, *, finding: str | None = None) -> None:
        self.finding = finding
        super().__init__(message)


class TrainingError(TastemakerError):
    """Training met something that must not be trained through."""

    def __init__(self, message: str, *, finding: str | None = None) -> None:
        self.finding = finding
        super().__init__(message)


class StoreError(TastemakerError):
    """The label store refused an operation."""


class AnswersMissing(TastemakerError):
    """Tasks are queued and people have not answered them all yet."""

    exit_code = 3

    def __init__(
        self, *, missing: int, task: str, group: str, address: str, invitation: str = "", overlap: int = 1
    ) -> None:
        """`invitation` is the command that lets one more rater of the group in, `overlap` how many answer each task."""
        self.missing, self.task, self.group, self.address = missing, task, group, address
        answers, are = ("answer", "is") if missing == 1 else ("answers", "are")
        said = [
            f"{missing} {task} {answers} by {group} raters {are} still missing. They answer at {address}; "
            "run the same command again when they have."
        ]
        if overlap > 1:
            said.append(f"Each task is for {overlap} different raters.")
        said.append("What one of them skips, another has to answer.")
        if invitation:
            said.append(f"`{invitation}` lets another of them in.")
        super().__init__(" ".join(said))
