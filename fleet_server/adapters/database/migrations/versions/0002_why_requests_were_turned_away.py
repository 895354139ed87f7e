"""Of the requests that were turned away, those for a deadline and those in distress."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COLUMNS = ("late", "shed")


def upgrade() -> None:
    """Apply. What was stored before was not told apart."""
    for name in COLUMNS:
        op.add_column("statistics", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Undo."""
    with op.batch_alter_table("statistics") as table:
        for name in COLUMNS:
            table.drop_column(name)
