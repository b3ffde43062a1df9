"""Accounts, sessions and roles; drafts, remarks, gold items, adjudication and screening; the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tastemaker.store.migrations.triggers import refuse_changes

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

APPEND_ONLY = ("remarks", "grades", "adjudications", "screening_decisions", "audit")
INDEXES = (
    ("leases", "rater_id"),
    ("sessions", "account_id"),
    ("api_tokens", "account_id"),
    ("remarks", "lease_id"),
    ("grades", "answer_id"),
    ("screening_decisions", "rater_id"),
)


def upgrade() -> None:
    op.add_column("studies", sa.Column("screening", sa.Boolean, server_default=sa.false(), nullable=False))
    op.add_column("studies", sa.Column("gold_share", sa.Double, server_default="0", nullable=False))
    op.add_column("studies", sa.Column("closed_at", sa.Double))
    _create_accounts()
    _create_access()
    _create_what_lies_beside_answers()
    _create_decisions_and_audit()
    for table, column in INDEXES:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])
    for table in APPEND_ONLY:
        refuse_changes(table)


def downgrade() -> None:
    raise NotImplementedError("Labels are never migrated backwards: restore the copy made before the upgrade.")


def _create_accounts() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("password_hash", sa.Text),
        sa.Column("rater_id", sa.Integer),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("disabled_at", sa.Double),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name=op.f("fk_accounts_rater_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_accounts")),
        sa.UniqueConstraint("name", name=op.f("uq_accounts_name")),
        sa.UniqueConstraint("rater_id", name=op.f("uq_accounts_rater_id")),
    )
    op.create_table(
        "account_roles",
        sa.Column("account_id", sa.Integer, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.CheckConstraint(
            "role IN ('admin', 'lead', 'adjudicator', 'rater', 'researcher', 'auditor', 'service')",
            name=op.f("ck_account_roles_role"),
        ),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_account_roles_account_id")),
        sa.PrimaryKeyConstraint("account_id", "role", name=op.f("pk_account_roles")),
    )
    op.create_table(
        "invitations",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("token_hash", sa.Text, nullable=False),
        sa.Column("roles", sa.JSON, nullable=False),
        sa.Column("rater_group", sa.Text),
        sa.Column("invited_by", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("used_at", sa.Double),
        sa.Column("account_id", sa.Integer),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_invitations_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invitations")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_invitations_token_hash")),
    )


def _create_access() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("token_hash", sa.Text, nullable=False),
        sa.Column("account_id", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_sessions_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_sessions_token_hash")),
    )
    op.create_table(
        "api_tokens",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("token_hash", sa.Text, nullable=False),
        sa.Column("account_id", sa.Integer, nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_api_tokens_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_api_tokens_token_hash")),
    )
    op.create_table(
        "throttles",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("tokens", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_throttles")),
    )
    op.create_table(
        "study_raters",
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("rater_id", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name=op.f("fk_study_raters_rater_id")),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name=op.f("fk_study_raters_study_id")),
        sa.PrimaryKeyConstraint("study_id", "rater_id", name=op.f("pk_study_raters")),
    )
    op.create_table(
        "rater_profiles",
        sa.Column("rater_id", sa.Integer, nullable=False),
        sa.Column("topics", sa.JSON, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name=op.f("fk_rater_profiles_rater_id")),
        sa.PrimaryKeyConstraint("rater_id", name=op.f("pk_rater_profiles")),
    )


def _create_what_lies_beside_answers() -> None:
    op.create_table(
        "drafts",
        sa.Column("lease_id", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("saved_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"], name=op.f("fk_drafts_lease_id")),
        sa.PrimaryKeyConstraint("lease_id", name=op.f("pk_drafts")),
    )
    op.create_table(
        "remarks",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("lease_id", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("note", sa.JSON),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.CheckConstraint("kind IN ('skip', 'flag')", name=op.f("ck_remarks_kind")),
        sa.ForeignKeyConstraint(["lease_id"], ["leases.id"], name=op.f("fk_remarks_lease_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_remarks")),
    )
    op.create_table(
        "gold",
        sa.Column("item_id", sa.Integer, nullable=False),
        sa.Column("expected", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name=op.f("fk_gold_item_id")),
        sa.PrimaryKeyConstraint("item_id", name=op.f("pk_gold")),
    )
    op.create_table(
        "adjudications",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("item_id", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("reason", sa.JSON, nullable=False),
        sa.Column("account_id", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_adjudications_account_id")),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name=op.f("fk_adjudications_item_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adjudications")),
        sa.UniqueConstraint("item_id", "revision", name=op.f("uq_adjudications_item_id_revision")),
    )
    op.create_table(
        "grades",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("answer_id", sa.Integer, nullable=False),
        sa.Column("account_id", sa.Integer, nullable=False),
        sa.Column("score", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.CheckConstraint("score BETWEEN 1 AND 7", name=op.f("ck_grades_score")),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_grades_account_id")),
        sa.ForeignKeyConstraint(["answer_id"], ["answers.id"], name=op.f("fk_grades_answer_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_grades")),
    )


def _create_decisions_and_audit() -> None:
    op.create_table(
        "screening_decisions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("rater_id", sa.Integer, nullable=False),
        sa.Column("passed", sa.Boolean, nullable=False),
        sa.Column("reason", sa.JSON, nullable=False),
        sa.Column("account_id", sa.Integer),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_screening_decisions_account_id")),
        sa.ForeignKeyConstraint(["rater_id"], ["raters.id"], name=op.f("fk_screening_decisions_rater_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_screening_decisions")),
    )
    op.create_table(
        "audit",
        sa.Column("sequence", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("object", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("request_id", sa.Text),
        sa.Column("previous_hash", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit")),
        sa.UniqueConstraint("hash", name=op.f("uq_audit_hash")),
    )
