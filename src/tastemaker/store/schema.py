"""The tables of the label store. Migrations create them; a test holds the two together.

    raters ──────────────┐
    guidelines ── studies ── items ── outputs
                               └── assignments ── leases ── answers

An item of a study has `overlap` assignments, its slots. A lease is one rater's go at one slot; answers hang on leases.
The slot names, by rater and token, the lease that it counts: everything else is kept beside it and not counted.
Answers and leases are append-only: triggers refuse to change or delete them, so a correction is a new revision.

Text that people or models wrote is stored as JSON: PostgreSQL's text type refuses NUL characters and neither database
takes half a surrogate pair, and a model may produce both. Times are seconds since 1970, UTC.
"""

from __future__ import annotations

import sqlalchemy as sa

# The newest migration. Opening a database of this version needs no migration machinery.
SCHEMA_VERSION = "0001"

# How answers' bodies are written; recorded with each, because the fields asked change over a project's life, and a
# field that was not asked is not a "no".
ANSWER_SCHEMA = 1

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

raters = sa.Table(
    "raters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("rater_group", sa.Text, nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.CheckConstraint("origin IN ('human', 'simulated')", name="origin"),
)

guidelines = sa.Table(
    "guidelines",
    metadata,
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("text", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("guideline_version", sa.Text, sa.ForeignKey("guidelines.version"), nullable=False),
    sa.Column("overlap", sa.Integer, nullable=False),
    sa.Column("rater_group", sa.Text, nullable=False),
    sa.Column("lease_seconds", sa.Double, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.CheckConstraint("kind IN ('demonstration', 'ranking', 'comparison', 'rating')", name="kind"),
    sa.CheckConstraint("purpose IN ('training', 'evaluation')", name="purpose"),
    sa.CheckConstraint("overlap >= 1", name="overlap"),
)

items = sa.Table(
    "items",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("messages", sa.JSON, nullable=False),
    sa.Column("category", sa.JSON),
    sa.Column("private", sa.JSON, nullable=False),  # what is known about the prompt; never shown to a rater
    sa.Column("content_hash", sa.Text, nullable=False),
    sa.UniqueConstraint("study_id", "key"),
    sa.UniqueConstraint("study_id", "position"),
)

outputs = sa.Table(
    "outputs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id"), nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("text", sa.JSON, nullable=False),
    sa.Column("finished", sa.Boolean, nullable=False),
    sa.Column("source", sa.JSON, nullable=False),  # which model or run; never shown to a rater
    sa.UniqueConstraint("item_id", "position"),
)

assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # random: it is the task's public name
    sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.id"), nullable=False),
    sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id"), nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column(
        "sequence", sa.Integer, nullable=False
    ),  # item position times overlap plus slot: the order of handing out
    sa.Column("order_seed", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id")),
    sa.Column("claim_token", sa.Text),
    sa.Column("leased_until", sa.Double),
    sa.UniqueConstraint("item_id", "slot"),
    sa.UniqueConstraint("item_id", "rater_id"),  # open slots have no rater, and nulls are all different
    sa.Index(None, "study_id", "state", "sequence"),
    sa.CheckConstraint("state IN ('open', 'leased', 'done')", name="state"),
    sa.CheckConstraint("(state = 'open') = (rater_id IS NULL)", name="holder"),
    sa.CheckConstraint("(rater_id IS NULL) = (claim_token IS NULL)", name="token"),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("assignment_id", sa.Text, sa.ForeignKey("assignments.id"), nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id"), nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.UniqueConstraint("assignment_id", "token"),
)

answers = sa.Table(
    "answers",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("lease_id", sa.Integer, sa.ForeignKey("leases.id"), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("answer_schema", sa.Integer, nullable=False),
    sa.Column("guideline_version", sa.Text, sa.ForeignKey("guidelines.version"), nullable=False),
    sa.Column("order_shown", sa.JSON, nullable=False),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("submitted_at", sa.Double, nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),  # spent on the task, all revisions together
    sa.Column("origin", sa.Text, nullable=False),
    sa.UniqueConstraint("lease_id", "revision"),
    sa.CheckConstraint("origin IN ('human', 'simulated')", name="origin"),
)


def newest_revision() -> sa.ScalarSelect[int]:
    """Within a query over `leases`: the number of the newest answer under each. What an answer now is, is this one."""
    revisions = answers.alias()
    newest = sa.select(sa.func.max(revisions.c.revision)).where(revisions.c.lease_id == leases.c.id)
    return newest.correlate(leases).scalar_subquery()
