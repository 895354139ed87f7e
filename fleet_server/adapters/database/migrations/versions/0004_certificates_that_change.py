"""Certificates that change: the next one of a device, ids opened for enrolment, and what counts no more."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("device", sa.Column("next_certificate", sa.Text(), nullable=False, server_default=""))
    op.add_column("device", sa.Column("open_until", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "retired_certificate",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("retired_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_retired_certificate_device")),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_retired_certificate")),
    )
    op.create_index(op.f("ix_retired_certificate_device"), "retired_certificate", ["device"], unique=False)


def downgrade() -> None:
    """Undo."""
    op.drop_index(op.f("ix_retired_certificate_device"), table_name="retired_certificate")
    op.drop_table("retired_certificate")
    # Not as a batch: SQLite would make the table anew, and rows of other tables refer to the old one.
    op.drop_column("device", "open_until")
    op.drop_column("device", "next_certificate")
