"""The tables of the label store. Migrations create them; a test holds the two together.

    raters ──────────────┐
    guidelines ── studies ── items ── outputs
                               └── assignments ── leases ── answers

An item of a study has `overlap` assignments, its slots. A lease is one rater's go at one slot; answers hang on leases.
The slot names, by rater and token, the lease that it counts: everything else is kept beside it and not counted.

    accounts ── account_roles, sessions, api_tokens, invitations      who may do what; `raters` is who answers
    leases ── drafts, remarks      items ── gold, adjudications      answers ── grades
    raters ── screening_decisions, rater_profiles      a group of raters ── screening_cut_offs

What people said or decided is append-only (`APPEND_ONLY`): triggers refuse to change or delete it, so a correction is a
new row. Secrets are stored as hashes only.

Text that people or models wrote is stored as JSON: PostgreSQL's text type refuses NUL characters and neither database
takes half a surrogate pair, and a model may produce both. Times are seconds since 1970, UTC.
"""

from __future__ import annotations

import sqlalchemy as sa

# The newest migration. Opening a database of this version needs no migration machinery.
SCHEMA_VERSION = "0004"

# How answers' bodies are written; recorded with each, because the fields asked change over a project's life, and a
# field that was not asked is not a "no".
ANSWER_SCHEMA = 1

# Tables whose rows no statement may change or delete; the migrations put triggers on them.
APPEND_ONLY = (
    "leases",
    "answers",
    "remarks",
    "grades",
    "adjudications",
    "screening_decisions",
    "screening_cut_offs",
    "audit",
)

# What an account may do. A person may have several roles; a rater's account is bound to a row of `raters`.
ROLES = ("admin", "lead", "adjudicator", "rater", "researcher", "auditor", "service")

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
    # A screening study is a new rater's test: all of its items have a known answer, or are graded by a lead.
    sa.Column("screening", sa.Boolean, nullable=False, server_default=sa.false()),
    # The share of a rater's tasks that are hidden gold items.
    sa.Column("gold_share", sa.Double, nullable=False, server_default="0"),
    sa.Column("closed_at", sa.Double),  # nobody can claim its slots from then on
    # Random, drawn when the study is made; the empty default is what SQLite asks of a column that is added. What raters
    # must not foresee follows from it, so it is in no view, file or export.
    sa.Column("secret", sa.Text, nullable=False, server_default=""),
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
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id"), nullable=False, index=True),
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


# --- who may do what ----------------------------------------------------------------------------------------------

accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("password_hash", sa.Text),  # argon2id; a service account has none and works by token
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id"), unique=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("disabled_at", sa.Double),
)

account_roles = sa.Table(
    "account_roles",
    metadata,
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), primary_key=True),
    sa.Column("role", sa.Text, primary_key=True),
    sa.CheckConstraint(f"role IN {ROLES!r}", name="role"),
)

invitations = sa.Table(
    "invitations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token_hash", sa.Text, nullable=False, unique=True),
    sa.Column("roles", sa.JSON, nullable=False),
    sa.Column("rater_group", sa.Text),  # the group that a rater joins
    sa.Column("invited_by", sa.Text, nullable=False),  # an account's name, or "command line"
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("used_at", sa.Double),
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id")),  # who came, or whose password it sets
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token_hash", sa.Text, nullable=False, unique=True),  # forms' tokens follow from the token as well
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), nullable=False, index=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("ended_at", sa.Double),
)

api_tokens = sa.Table(
    "api_tokens",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token_hash", sa.Text, nullable=False, unique=True),
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), nullable=False, index=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("seen_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
)

# Token buckets of the rate limits, in the database so that several server processes share them.
throttles = sa.Table(
    "throttles",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),  # a hash: it may have been made of anything that was typed
    sa.Column("tokens", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False, index=True),
)

study_raters = sa.Table(
    "study_raters",  # where a study has any, only these of its group may work on it
    metadata,
    sa.Column("study_id", sa.Integer, sa.ForeignKey("studies.id"), primary_key=True),
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id"), primary_key=True),
)

rater_profiles = sa.Table(
    "rater_profiles",
    metadata,
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id"), primary_key=True),
    sa.Column("topics", sa.JSON, nullable=False),  # topic -> how well they say they can judge it
    sa.Column("updated_at", sa.Double, nullable=False),
)

# --- beside an answer ---------------------------------------------------------------------------------------------

drafts = sa.Table(
    "drafts",
    metadata,
    sa.Column("lease_id", sa.Integer, sa.ForeignKey("leases.id"), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),  # counts savings: an older window never overwrites a newer one
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("saved_at", sa.Double, nullable=False),
)

remarks = sa.Table(
    "remarks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("lease_id", sa.Integer, sa.ForeignKey("leases.id"), nullable=False, index=True),
    sa.Column("kind", sa.Text, nullable=False),  # a skip gives the slot back; a flag goes with an answer
    sa.Column("reason", sa.Text),
    sa.Column("note", sa.JSON),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.CheckConstraint("kind IN ('skip', 'flag')", name="kind"),
)

gold = sa.Table(
    "gold",
    metadata,
    sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id"), primary_key=True),
    sa.Column("expected", sa.JSON, nullable=False),  # an answer whose letters name the outputs as queued
    sa.Column("created_at", sa.Double, nullable=False),
)

adjudications = sa.Table(
    "adjudications",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id"), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),  # an answer whose letters name the outputs as queued
    sa.Column("reason", sa.JSON, nullable=False),
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.UniqueConstraint("item_id", "revision"),
)

grades = sa.Table(
    "grades",  # a lead's quality score of a demonstration
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("answer_id", sa.Integer, sa.ForeignKey("answers.id"), nullable=False, index=True),
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), nullable=False),
    sa.Column("score", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.CheckConstraint("score BETWEEN 1 AND 7", name="score"),
)

screening_decisions = sa.Table(
    "screening_decisions",  # the newest counts; cut-offs only advise
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("rater_id", sa.Integer, sa.ForeignKey("raters.id"), nullable=False, index=True),
    sa.Column("passed", sa.Boolean, nullable=False),
    sa.Column("reason", sa.JSON, nullable=False),
    sa.Column(
        "account_id", sa.Integer, sa.ForeignKey("accounts.id")
    ),  # null: every cut-off was met, no lead was needed
    sa.Column("created_at", sa.Double, nullable=False),
)

screening_cut_offs = sa.Table(
    "screening_cut_offs",  # what is asked of a group's new raters: the newest counts; none: the paper's
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("rater_group", sa.Text, nullable=False),
    sa.Column("flags", sa.Double),  # the least share; null, here and below: that part is not asked
    sa.Column("rankings", sa.Double),  # the least share
    sa.Column("demonstrations", sa.Double),  # the least mean grade
    sa.Column("account_id", sa.Integer, sa.ForeignKey("accounts.id"), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.CheckConstraint("flags BETWEEN 0 AND 1", name="flags"),
    sa.CheckConstraint("rankings BETWEEN 0 AND 1", name="rankings"),
    sa.CheckConstraint("demonstrations BETWEEN 1 AND 7", name="demonstrations"),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),  # from 1, without gaps
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),  # under which the actor did it
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("object", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Column("request_id", sa.Text),
    sa.Column("previous_hash", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False, unique=True),
)


def again(table: sa.Table) -> sa.FromClause:
    """A table for a second time in one query, to be kept by a module: making it takes longer than the rest of a query.

    Its columns are there when it is, because threads share it.
    """
    found = table.alias()
    _ = found.c
    return found


_REVISIONS = again(answers)


def newest_revision() -> sa.ScalarSelect[int]:
    """Within a query over `leases`: the number of the newest answer under each. What an answer now is, is this one."""
    newest = sa.select(sa.func.max(_REVISIONS.c.revision)).where(_REVISIONS.c.lease_id == leases.c.id)
    return newest.correlate(leases).scalar_subquery()
