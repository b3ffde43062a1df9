"""A secret for each study, and an index by which buckets of rate limits are forgotten.

What followed from hashes of public names could be computed by raters.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

APPEND_ONLY = ()


def upgrade() -> None:
    op.add_column("studies", sa.Column("secret", sa.Text, server_default="", nullable=False))
    studies = sa.table("studies", sa.column("id"), sa.column("secret"))
    connection = op.get_bind()
    for study_id in connection.execute(sa.select(studies.c.id)).scalars().all():
        drawn = sa.update(studies).where(studies.c.id == study_id).values(secret=secrets.token_hex(16))
        connection.execute(drawn)
    op.create_index(op.f("ix_throttles_updated_at"), "throttles", ["updated_at"])


def downgrade() -> None:
    raise NotImplementedError("Labels are never migrated backwards: restore the copy made before the upgrade.")
