"""The cut-offs of screening tests, as leads set them for a group of raters."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tastemaker.store.migrations.triggers import refuse_changes

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

APPEND_ONLY = ("screening_cut_offs",)


def upgrade() -> None:
    op.create_table(
        "screening_cut_offs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("rater_group", sa.Text, nullable=False),
        sa.Column("flags", sa.Double),
        sa.Column("rankings", sa.Double),
        sa.Column("demonstrations", sa.Double),
        sa.Column("account_id", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.CheckConstraint("flags BETWEEN 0 AND 1", name=op.f("ck_screening_cut_offs_flags")),
        sa.CheckConstraint("rankings BETWEEN 0 AND 1", name=op.f("ck_screening_cut_offs_rankings")),
        sa.CheckConstraint("demonstrations BETWEEN 1 AND 7", name=op.f("ck_screening_cut_offs_demonstrations")),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_screening_cut_offs_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_screening_cut_offs")),
    )
    for table in APPEND_ONLY:
        refuse_changes(table)


def downgrade() -> None:
    raise NotImplementedError("Labels are never migrated backwards: restore the copy made before the upgrade.")
