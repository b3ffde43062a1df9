"""What a rater's desk gives and refuses: the whole of what a rater may see.

Every field here is a decision: a rater will see it. None says what produced an output, which item a task is, whether
its answer is known, what others answered, or what a study is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tastemaker.errors import StoreError
from tastemaker.store.tasks import Answer, Standing, StudyKind, Task

# Why a rater passes a task on, as pages offer it. Nobody has to say why.
SKIP_REASONS: Mapping[str, str] = {
    "unclear": "I do not understand what is asked",
    "language": "It is in a language that I do not read well",
    "knowledge": "I do not know enough about the subject",
    "distressing": "I would rather not read this",
    "broken": "Something is wrong with the text",
    "other": "Another reason",
}

# What a rater wants somebody to look at; the answer is given all the same.
FLAG_REASONS: Mapping[str, str] = {
    "none_acceptable": "None of the responses is acceptable",
    "personal_data": "It holds personal data of somebody",
    "dangerous": "It asks for or describes serious harm",
    "broken": "Something is wrong with the text",
    "other": "Another reason",
}

# Offered on a rater's own page; a rater may add others.
TOPICS = (
    "everyday questions",
    "writing and style",
    "mathematics",
    "programming",
    "science",
    "medicine and health",
    "law",
    "finance",
    "history and politics",
    "sensitive speech",
)
TOPIC_LEVELS = 5

# yours: held, and the lease runs or nobody else has asked. lost: given back after its lease; an answer is kept even so.
TaskState = Literal["yours", "lost", "answered", "skipped"]


class NotYours(StoreError):
    """What was asked for does not exist for this rater; whether it does for others is not said."""


class StudyLocked(StoreError):
    """The rater may not work on this study now; the message says why, and what to do."""


class DraftConflict(StoreError):
    """Another window has saved a newer draft. `current` is its version, to be read before saving again."""

    def __init__(self, *, given: int, current: int) -> None:
        self.current = current
        super().__init__(
            f"This draft was saved elsewhere meanwhile (version {current}; this window has {given}); reload the task "
            "to see the newer one."
        )


class RevisionConflict(StoreError):
    """What was to be undone is not the newest revision; it may have been undone already."""

    def __init__(self, *, given: int, newest: int) -> None:
        super().__init__(f"The newest answer is revision {newest}, and not {given}; look at the task before undoing.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskStudy:
    """A study on a rater's home page. `left` counts the tasks still ahead of them, the one they hold included."""

    name: str
    kind: StudyKind
    guideline_version: str
    screening: bool
    answered: int
    left: int
    begun: bool
    locked_because: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a rater has written and not handed in: the fields of the page's form.

    A field about one output is named `NAME-LETTER` (`rank-A`), and the field `choice` holds a letter: so a draft can
    follow its rater to another slot of the same item, where the letters stand for other outputs.
    """

    body: Mapping[str, object]
    version: int
    saved_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAnswer:
    """The rater's own answer as it stands. `revision` counts from 1; above it, there is something to undo."""

    answer: Answer
    revision: int
    standing: Standing
    submitted_at: float
    guideline_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """A task on a rater's desk. `draft_version` is what the next `save_draft` names."""

    task: Task
    study: str
    state: TaskState
    leased_until: float | None
    draft: Draft | None
    draft_version: int
    given: GivenAnswer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One of a rater's own answers. `task_id` names it, and is what the next page of the history begins `before`."""

    task_id: str
    study: str
    kind: StudyKind
    opening: str
    revision: int
    standing: Standing
    answered_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskProgress:
    """How much a rater has done, for their own eyes. A day is one of UTC."""

    today: int
    total: int
    seconds_today: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RaterProfile:
    """A rater's own page: how well they say they can judge each topic, from 1 to 5."""

    name: str
    topics: Mapping[str, int]
