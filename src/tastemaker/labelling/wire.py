"""What travels between the raters' API and its clients, as JSON: the shapes, and both directions of each.

Bodies that come in are pydantic models, so that they are checked whole and described in the OpenAPI document. What
goes out are the records of `store.views`, flat, and no field more: those decide what a rater may see. An answer is
written as in the files of `store.exchange`, with its kind beside it.

Going out and on the client's side nothing is checked by pydantic: a model may have written half a surrogate pair, which
the store keeps, JSON escapes, and pydantic takes for no text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tastemaker.config import to_json
from tastemaker.records import About, Message, Prompt, Response
from tastemaker.store.accounts import Account
from tastemaker.store.tasks import (
    FLAGS,
    Answer,
    PrivatePrompt,
    ShownOutput,
    Standing,
    StudyKind,
    Task,
    answer_from_json,
    answer_to_json,
)
from tastemaker.store.views import Draft, GivenAnswer, TaskState, TaskView

Record = TypeVar("Record")

MOST_STUDIES = 50
# The largest whole number that both databases store in a column of the usual kind.
MOST = 2**31 - 1


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name has no control characters")
    return name


Name = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
DraftValue = str | int | float | bool | list[str] | None


# --- what comes in ----------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """A body of a request. A field that is not known is an error, as is a number in quotes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NextTaskBody(Body):
    """Which study the rater wants to work on."""

    study: Name


class GivenBody(Body):
    """What stands beside every answer."""

    seconds: float | None = Field(None, ge=0, description="Time spent; no more than since the task was given out.")
    guideline_version: Name | None = Field(None, description="The guideline that the rater had before them.")


class DemonstrationBody(GivenBody):
    """The response that the assistant should give."""

    kind: Literal["demonstration"]
    answer: str


class RankingBody(GivenBody):
    """Groups of letters, best first; letters of one group tie."""

    kind: Literal["ranking"]
    answer: list[list[str]] = Field(examples=[[["C"], ["A", "D"], ["B"]]])


class ComparisonBody(GivenBody):
    """The better of the two outputs, or a tie."""

    kind: Literal["comparison"]
    answer: Literal["A", "B", "tie"]


class RatingOfOutput(Body):
    """Overall quality from 1 to 7, and the flags that are set; one that is not named was answered "no"."""

    likert: int = Field(ge=1, le=7)
    flags: list[str] = Field([], description=f"Some of {', '.join(FLAGS)}.")


class RatingBody(GivenBody):
    """One rating a letter."""

    kind: Literal["rating"]
    answer: dict[str, RatingOfOutput]


AnswerBody = Annotated[
    DemonstrationBody | RankingBody | ComparisonBody | RatingBody,
    Field(discriminator="kind"),
]


def answer_of(body: DemonstrationBody | RankingBody | ComparisonBody | RatingBody) -> Answer:
    """The answer that a body holds. Whether it answers its task is for the store to say."""
    return answer_from_json(body.kind, body.model_dump()["answer"])


class DraftBody(Body):
    """What has been written so far, as the fields of a form."""

    body: dict[str, DraftValue] = Field(examples=[{"rank-A": "1", "rank-B": "2"}])
    version: int = Field(ge=0, le=MOST, description="The task's `draft_version`, from which this draft was made.")


class RemarkBody(Body):
    """Why a task is skipped or flagged."""

    reason: str | None = Field(None, description="One of the reasons that the rater's pages offer.")
    note: str | None = None


class FlagBody(RemarkBody):
    """What a lead should look at."""

    reason: str


class UndoBody(Body):
    """Which answer is taken back, so that asking twice takes back one."""

    revision: int = Field(ge=1, le=MOST, description="The `revision` of the answer as the caller knows it.")


class ExportBody(Body):
    """Whose answers are exported, and how they are split."""

    studies: list[Name] = Field(min_length=1, max_length=MOST_STUDIES)
    validation: float = Field(0.1, ge=0, lt=1, description="The share of authors kept for validation.")
    test: float = Field(0.0, ge=0, lt=1, description="The share of authors kept for the test.")
    adjudicated: bool = Field(True, description="Whether an adjudicated answer stands in place of the raters'.")


# --- what goes out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request was refused, in one sentence."""

    error: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Me:
    """Whose token it is."""

    name: str
    roles: list[str]
    rater: str | None
    rater_group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownMessage:
    """A turn of the conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """The rater's own answer as it stands."""

    answer: object
    revision: int
    standing: Standing
    submitted_at: float
    guideline_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTask:
    """A task with all that its rater may see of it. `id` names it; `token` differs each time it is given out."""

    id: str
    token: str
    kind: StudyKind
    study: str
    guideline_version: str
    messages: list[ShownMessage]
    outputs: list[ShownOutput]
    state: TaskState
    leased_until: float | None
    draft: Draft | None
    draft_version: int
    given: ShownAnswer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTask:
    """The next task, or null where nothing is left for this rater."""

    task: ShownTask | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """When the lease ends; null where the task is not the rater's any more."""

    leased_until: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSaved:
    """The version that the next save names."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """Whether the answer counts, or is kept beside one that came before it."""

    standing: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """The answer that stands again."""

    kind: StudyKind
    answer: object


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownResponse:
    """A response, and whether its writer came to an end."""

    text: str
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPrivate:
    """A task's prompt with all that is known about it, and its responses in the order shown."""

    messages: list[ShownMessage]
    about: dict[str, Any]
    responses: list[ShownResponse]
    place: int


def me(account: Account) -> Me:
    """An account as it is told of itself."""
    return Me(name=account.name, roles=sorted(account.roles), rater=account.rater, rater_group=account.rater_group)


def shown_task(view: TaskView) -> ShownTask:
    """A task as it travels."""
    task, given = view.task, view.given
    return ShownTask(
        id=task.id,
        token=task.token,
        kind=task.kind,
        study=view.study,
        guideline_version=task.guideline_version,
        messages=_messages(task.messages),
        outputs=list(task.outputs),
        state=view.state,
        leased_until=view.leased_until,
        draft=view.draft,
        draft_version=view.draft_version,
        given=None
        if given is None
        else ShownAnswer(
            answer=answer_to_json(given.answer),
            revision=given.revision,
            standing=given.standing,
            submitted_at=given.submitted_at,
            guideline_version=given.guideline_version,
        ),
    )


def shown_private(private: PrivatePrompt) -> ShownPrivate:
    """What simulated raters need beside a task, as it travels."""
    about: dict[str, Any] = to_json(private.prompt.about)
    return ShownPrivate(
        messages=_messages(private.prompt.messages),
        about=about,
        responses=[ShownResponse(text=each.text, finished=each.finished) for each in private.responses],
        place=private.place,
    )


def _messages(messages: tuple[Message, ...]) -> list[ShownMessage]:
    return [ShownMessage(role=message.role, content=message.content) for message in messages]


# --- the client's side ------------------------------------------------------------------------------------------------


def read_record(cls: type[Record], row: Mapping[str, Any]) -> Record:
    """A flat record; fields that a newer server adds are passed over."""
    assert dataclasses.is_dataclass(cls)
    return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})


def read_task(row: Mapping[str, Any]) -> TaskView:
    """The inverse of `shown_task`."""
    draft, given = row["draft"], row["given"]
    return TaskView(
        task=Task(
            id=row["id"],
            token=row["token"],
            kind=row["kind"],
            guideline_version=row["guideline_version"],
            messages=_read_messages(row),
            outputs=tuple(read_record(ShownOutput, output) for output in row["outputs"]),
        ),
        study=row["study"],
        state=row["state"],
        leased_until=row["leased_until"],
        draft=None if draft is None else read_record(Draft, draft),
        draft_version=row["draft_version"],
        given=None
        if given is None
        else read_record(GivenAnswer, {**given, "answer": answer_from_json(row["kind"], given["answer"])}),
    )


def read_private(row: Mapping[str, Any]) -> PrivatePrompt:
    """The inverse of `shown_private`."""
    prompt = Prompt(messages=_read_messages(row), about=read_record(About, row["about"]))
    responses = tuple(read_record(Response, each) for each in row["responses"])
    return PrivatePrompt(prompt=prompt, responses=responses, place=row["place"])


def _read_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(message["role"], message["content"]) for message in row["messages"])


def answer_json(answer: Answer, kind: StudyKind) -> dict[str, object]:
    """An answer as a body that the API takes."""
    return {"kind": kind, "answer": answer_to_json(answer)}
