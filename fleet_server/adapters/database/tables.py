"""The tables, for SQLite and PostgreSQL alike.

Times are UTC ms by the server's clock unless the column says otherwise. Columns ending in ``_json`` hold what
msgspec encoded from a typed fact and are decoded back into it; nothing else reads them. What changes here needs a
migration beside it (`migrations/versions`); a test compares the two.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

# SQLite gives row numbers only to INTEGER PRIMARY KEY, which is 64 bits there; PostgreSQL needs BIGINT for the same.
ROW = BigInteger().with_variant(Integer, "sqlite")
DEVICE = String(63)
DIGEST = String(64)
STREAM_ID = String(64)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

device = Table(
    "device",
    metadata,
    Column("id", DEVICE, primary_key=True),
    Column("labels_json", Text, nullable=False),
    Column("certificate", Text, nullable=False),
    Column("enrolled_at", BigInteger, nullable=False),
    Column("revoked", Boolean, nullable=False),
)

token = Table(
    "token",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("secret_sha256", DIGEST, nullable=False),
    Column("labels_json", Text, nullable=False),
    Column("uses_left", Integer, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)

bundle = Table(
    "bundle",
    metadata,
    Column("path", Text, primary_key=True),  # TUF target path
    Column("sha256", DIGEST, nullable=False, index=True),
    Column("length", BigInteger, nullable=False),
    Column("model", String(63), nullable=False, index=True),
    Column("version", BigInteger, nullable=False),
    Column("bundle_json", Text, nullable=False),
    Column("published_at", BigInteger, nullable=False),
)

desired = Table(
    "desired",
    metadata,
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("assigned_json", Text, nullable=False),
    Column("config_json", Text, nullable=False),
    Column("timestamp", LargeBinary, nullable=False),
    Column("snapshot", LargeBinary, nullable=False),
    Column("targets", LargeBinary, nullable=False),
    Column("issued_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
)

# The highest attempt ever assigned, so that a digest that failed can be tried again under a higher one.
attempt = Table(
    "attempt",
    metadata,
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("sha256", DIGEST, primary_key=True),
    Column("attempt", BigInteger, nullable=False),
)

deployment = Table(
    "deployment",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("model", String(63), nullable=False),
    Column("by", String(64), nullable=False),
    Column("at", BigInteger, nullable=False, index=True),
    Column("targets_json", Text, nullable=False),
)

# One row per device, written with each batch: what `core/presence.py` derives the state from, and the newest readings
presence = Table(
    "presence",
    metadata,
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("birth_json", Text),
    Column("ended", BigInteger, nullable=False),
    Column("goodbye", Boolean, nullable=False),
    Column("ended_at", BigInteger, nullable=False),
    Column("last_seen", BigInteger),
    Column("report_interval", BigInteger, nullable=False),
    Column("resources_json", Text),
    Column("resources_at", BigInteger, nullable=False),  # device's clock: start of the window they are from
    Column("reports", BigInteger, nullable=False),  # stored so far, deleted ones included
)

report = Table(
    "report",
    metadata,
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("covers", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False),
    Column("received_at", BigInteger, nullable=False, index=True),
)

# One row per report, window and model version. Start and span are by the device's clock.
statistics = Table(
    "statistics",
    metadata,
    Column("device", DEVICE, primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),  # of the window in its report
    Column("digest", STREAM_ID, primary_key=True),
    Column("start", BigInteger, nullable=False, index=True),
    Column("span", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False),
    Column("late", BigInteger, nullable=False, server_default="0"),  # of the dropped
    Column("shed", BigInteger, nullable=False, server_default="0"),  # of the dropped
    Column("latency_json", Text, nullable=False),
    Column("confidence_json", Text, nullable=False),
    Column("classes_json", Text, nullable=False),
    ForeignKeyConstraint(
        ["device", "spool", "sequence"], ["report.device", "report.spool", "report.sequence"], ondelete="CASCADE"
    ),
    Index("ix_statistics_device_start", "device", "start"),
)

resources = Table(
    "resources",
    metadata,
    Column("device", DEVICE, primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("start", BigInteger, nullable=False),
    Column("span", BigInteger, nullable=False),
    Column("resources_json", Text, nullable=False),
    ForeignKeyConstraint(
        ["device", "spool", "sequence"], ["report.device", "report.spool", "report.sequence"], ondelete="CASCADE"
    ),
    Index("ix_resources_device_start", "device", "start"),
)

# Truth arrives late, in any report, and adds up.
truth = Table(
    "truth",
    metadata,
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("digest", STREAM_ID, primary_key=True),
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("correct", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("confusion_json", Text, nullable=False),
    Index("ix_truth_minute", "minute"),
    Index("ix_truth_digest", "digest"),
)

event = Table(
    "event",
    metadata,
    Column("row", ROW, primary_key=True),
    Column("device", DEVICE, ForeignKey("device.id"), nullable=False),
    Column("spool", STREAM_ID, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("received_at", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),  # device's clock
    Column("kind", String(32), nullable=False),
    Column("model", String(64)),
    Column("version", BigInteger),
    Column("digest", DIGEST),
    Column("state", String(32)),
    Column("reason", String(64)),
    Column("attempt", BigInteger),
    Column("detail", Text, nullable=False),
    UniqueConstraint("device", "spool", "sequence"),
    Index("ix_event_device_row", "device", "row"),
    Index("ix_event_device_model_state", "device", "model", "state"),
)

# Which numbers of each stream have arrived (`core/positions.py`).
position = Table(
    "position",
    metadata,
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("stream", String(16), primary_key=True),
    Column("position_json", Text, nullable=False),
    Column("missing", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
)

dead_letter = Table(
    "dead_letter",
    metadata,
    Column("row", ROW, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("reason", Text, nullable=False),
    Column("received_at", BigInteger, nullable=False),
)

account = Table(
    "account",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("password_hash", Text, nullable=False),
)

session = Table(
    "session",
    metadata,
    Column("token_sha256", DIGEST, primary_key=True),
    Column("account", String(64), ForeignKey("account.name"), nullable=False),
    Column("csrf", String(64), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)
