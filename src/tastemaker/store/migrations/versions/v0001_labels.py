"""Raters, studies, items, slots, leases and answers; answers and leases are append-only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tastemaker.store.migrations.triggers import refuse_changes

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

APPEND_ONLY = ("leases", "answers")


def upgrade() -> None:
    _create_people_and_studies()
    _create_questions()
    _create_answers()
    for table in APPEND_ONLY:
        refuse_changes(table)


def downgrade() -> None:
    raise NotImplementedError("Labels are never migrated backwards: restore the copy made before the upgrade.")


def _create_people_and_studies() -> None:
    op.create_table(
        "raters",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("rater_group", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_raters"),
        sa.UniqueConstraint("name", name="uq_raters_name"),
        sa.CheckConstraint("origin IN ('human', 'simulated')", name=op.f("ck_raters_origin")),
    )
    op.create_table(
        "guidelines",
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("text", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_guidelines"),
    )
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("guideline_version", sa.Text, nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("rater_group", sa.Text, nullable=False),
        sa.Column("lease_seconds", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_studies"),
        sa.UniqueConstraint("name", name="uq_studies_name"),
        sa.ForeignKeyConstraint(["guideline_version"], ["guidelines.version"], name="fk_studies_guideline_version"),
        sa.CheckConstraint(
            "kind IN ('demonstration', 'ranking', 'comparison', 'rating')", name=op.f("ck_studies_kind")
        ),
        sa.CheckConstraint("purpose IN ('training', 'evaluation')", name=op.f("ck_studies_purpose")),
        sa.CheckConstraint("overlap >= 1", name=op.f("ck_studies_overlap")),
    )


def _create_questions() -> None:
    op.create_table(
        "items",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("messages", sa.JSON, nullable=False),
        sa.Column("category", sa.JSON),
        sa.Column("private", sa.JSON, nullable=False),
        sa.Column("content_hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_items_study_id"),
        sa.UniqueConstraint("study_id", "key", name="uq_items_study_id_key"),
        sa.UniqueConstraint("study_id", "position", name="uq_items_study_id_position"),
    )
    op.create_table(
        "outputs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("item_id", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("text", sa.JSON, nullable=False),
        sa.Column("finished", sa.Boolean, nullable=False),
        sa.Column("source", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outputs"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_outputs_item_id"),
        sa.UniqueConstraint("item_id", "position", name="uq_outputs_item_id_position"),
    )


def _create_answers() -> None:
    op.create_table(
        "assignments",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("item_id", sa.Integer, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("order_seed", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("rater_id", sa.Integer),
        sa.Column("claim_token", sa.Text),
        sa.Column("leased_until", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_assignments"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_assignments_study_id"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_assignments_item_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name="fk_assignments_rater_id"),
        sa.UniqueConstraint("item_id", "slot", name="uq_assignments_item_id_slot"),
        sa.UniqueConstraint("item_id", "rater_id", name="uq_assignments_item_id_rater_id"),
        sa.CheckConstraint("state IN ('open', 'leased', 'done')", name=op.f("ck_assignments_state")),
        sa.CheckConstraint("(state = 'open') = (rater_id IS NULL)", name=op.f("ck_assignments_holder")),
        sa.CheckConstraint("(rater_id IS NULL) = (claim_token IS NULL)", name=op.f("ck_assignments_token")),
    )
    op.create_index("ix_assignments_study_id_state_sequence", "assignments", ["study_id", "state", "sequence"])
    op.create_table(
        "leases",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("assignment_id", sa.Text, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("rater_id", sa.Integer, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_leases"),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignments.id"], name="fk_leases_assignment_id"),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name="fk_leases_rater_id"),
        sa.UniqueConstraint("assignment_id", "token", name="uq_leases_assignment_id_token"),
    )
    op.create_table(
        "answers",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("lease_id", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("answer_schema", sa.Integer, nullable=False),
        sa.Column("guideline_version", sa.Text, nullable=False),
        sa.Column("order_shown", sa.JSON, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("submitted_at", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_answers"),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"], name="fk_answers_lease_id"),
        sa.ForeignKeyConstraint(["guideline_version"], ["guidelines.version"], name="fk_answers_guideline_version"),
        sa.UniqueConstraint("lease_id", "revision", name="uq_answers_lease_id_revision"),
        sa.CheckConstraint("origin IN ('human', 'simulated')", name=op.f("ck_answers_origin")),
    )
