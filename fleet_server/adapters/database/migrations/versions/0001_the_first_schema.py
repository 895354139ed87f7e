"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "account",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_account")),
    )
    op.create_table(
        "bundle",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("bundle_json", sa.Text(), nullable=False),
        sa.Column("published_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("path", name=op.f("pk_bundle")),
    )
    op.create_index(op.f("ix_bundle_model"), "bundle", ["model"], unique=False)
    op.create_index(op.f("ix_bundle_sha256"), "bundle", ["sha256"], unique=False)
    op.create_table(
        "dead_letter",
        sa.Column("row", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("row", name=op.f("pk_dead_letter")),
    )
    op.create_table(
        "deployment",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("by", sa.String(length=64), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("targets_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployment")),
    )
    op.create_index(op.f("ix_deployment_at"), "deployment", ["at"], unique=False)
    op.create_table(
        "device",
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("enrolled_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_device")),
    )
    op.create_table(
        "token",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_token")),
    )
    op.create_table(
        "attempt",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_attempt_device")),
        sa.PrimaryKeyConstraint("device", "sha256", name=op.f("pk_attempt")),
    )
    op.create_table(
        "desired",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("assigned_json", sa.Text(), nullable=False),
        sa.Column("config_json", sa.Text(), nullable=False),
        sa.Column("timestamp", sa.LargeBinary(), nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=False),
        sa.Column("targets", sa.LargeBinary(), nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_desired_device")),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_desired")),
    )
    op.create_index(op.f("ix_desired_expires_at"), "desired", ["expires_at"], unique=False)
    op.create_table(
        "event",
        sa.Column("row", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("spool", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("model", sa.String(length=64), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=32), nullable=True),
        sa.Column("reason", sa.String(length=64), nullable=True),
        sa.Column("attempt", sa.BigInteger(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_event_device")),
        sa.PrimaryKeyConstraint("row", name=op.f("pk_event")),
        sa.UniqueConstraint("device", "spool", "sequence", name=op.f("uq_event_device_spool_sequence")),
    )
    op.create_index("ix_event_device_model_state", "event", ["device", "model", "state"], unique=False)
    op.create_index("ix_event_device_row", "event", ["device", "row"], unique=False)
    op.create_table(
        "position",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("spool", sa.String(length=64), nullable=False),
        sa.Column("stream", sa.String(length=16), nullable=False),
        sa.Column("position_json", sa.Text(), nullable=False),
        sa.Column("missing", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_position_device")),
        sa.PrimaryKeyConstraint("device", "spool", "stream", name=op.f("pk_position")),
    )
    op.create_table(
        "presence",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("birth_json", sa.Text(), nullable=True),
        sa.Column("ended", sa.BigInteger(), nullable=False),
        sa.Column("goodbye", sa.Boolean(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=False),
        sa.Column("last_seen", sa.BigInteger(), nullable=True),
        sa.Column("report_interval", sa.BigInteger(), nullable=False),
        sa.Column("resources_json", sa.Text(), nullable=True),
        sa.Column("resources_at", sa.BigInteger(), nullable=False),
        sa.Column("reports", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_presence_device")),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_presence")),
    )
    op.create_table(
        "report",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("spool", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("covers", sa.BigInteger(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_report_device")),
        sa.PrimaryKeyConstraint("device", "spool", "sequence", name=op.f("pk_report")),
    )
    op.create_index(op.f("ix_report_received_at"), "report", ["received_at"], unique=False)
    op.create_table(
        "session",
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("csrf", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["account.name"], name=op.f("fk_session_account")),
        sa.PrimaryKeyConstraint("token_sha256", name=op.f("pk_session")),
    )
    op.create_table(
        "truth",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("minute", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("correct", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("confusion_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f("fk_truth_device")),
        sa.PrimaryKeyConstraint("device", "digest", "minute", name=op.f("pk_truth")),
    )
    op.create_index("ix_truth_digest", "truth", ["digest"], unique=False)
    op.create_index("ix_truth_minute", "truth", ["minute"], unique=False)
    op.create_table(
        "resources",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("spool", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("span", sa.BigInteger(), nullable=False),
        sa.Column("resources_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device", "spool", "sequence"],
            ["report.device", "report.spool", "report.sequence"],
            name=op.f("fk_resources_device_spool_sequence"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("device", "spool", "sequence", "position", name=op.f("pk_resources")),
    )
    op.create_index("ix_resources_device_start", "resources", ["device", "start"], unique=False)
    op.create_table(
        "statistics",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("spool", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("span", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("errors", sa.BigInteger(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("latency_json", sa.Text(), nullable=False),
        sa.Column("confidence_json", sa.Text(), nullable=False),
        sa.Column("classes_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device", "spool", "sequence"],
            ["report.device", "report.spool", "report.sequence"],
            name=op.f("fk_statistics_device_spool_sequence"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("device", "spool", "sequence", "position", "digest", name=op.f("pk_statistics")),
    )
    op.create_index("ix_statistics_device_start", "statistics", ["device", "start"], unique=False)
    op.create_index(op.f("ix_statistics_start"), "statistics", ["start"], unique=False)


def downgrade() -> None:
    """Undo."""
    op.drop_index(op.f("ix_statistics_start"), table_name="statistics")
    op.drop_index("ix_statistics_device_start", table_name="statistics")
    op.drop_table("statistics")
    op.drop_index("ix_resources_device_start", table_name="resources")
    op.drop_table("resources")
    op.drop_index("ix_truth_minute", table_name="truth")
    op.drop_index("ix_truth_digest", table_name="truth")
    op.drop_table("truth")
    op.drop_table("session")
    op.drop_index(op.f("ix_report_received_at"), table_name="report")
    op.drop_table("report")
    op.drop_table("presence")
    op.drop_table("position")
    op.drop_index("ix_event_device_row", table_name="event")
    op.drop_index("ix_event_device_model_state", table_name="event")
    op.drop_table("event")
    op.drop_index(op.f("ix_desired_expires_at"), table_name="desired")
    op.drop_table("desired")
    op.drop_table("attempt")
    op.drop_table("token")
    op.drop_table("device")
    op.drop_index(op.f("ix_deployment_at"), table_name="deployment")
    op.drop_table("deployment")
    op.drop_table("dead_letter")
    op.drop_index(op.f("ix_bundle_sha256"), table_name="bundle")
    op.drop_index(op.f("ix_bundle_model"), table_name="bundle")
    op.drop_table("bundle")
    op.drop_table("account")
