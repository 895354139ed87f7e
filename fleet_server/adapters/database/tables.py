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
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
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
    Column("next_certificate", Text, nullable=False, server_default=""),  # issued; counts once its key has signed
    Column("open_until", BigInteger, nullable=False, server_default="0"),  # until then the id may enrol again, once
)

# Certificates that count no more though they have not expired: what the broker's revocation list is made from.
retired_certificate = Table(
    "retired_certificate",
    metadata,
    Column("sha256", DIGEST, primary_key=True),
    Column("device", DEVICE, ForeignKey("device.id"), nullable=False, index=True),
    Column("certificate", Text, nullable=False),
    Column("retired_at", BigInteger, nullable=False),
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

# What devices reported. Everything of a batch has one time of arrival, and the rows of a table are kept in slices by
# it (`partitions.py`); PostgreSQL wants the arrival in the key for that. A report is known by its number, not by
# its row (`position`).
report = Table(
    "report",
    metadata,
    Column("received_at", BigInteger, primary_key=True, autoincrement=False),
    Column("device", DEVICE, ForeignKey("device.id"), primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("covers", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False),
    postgresql_partition_by="RANGE (received_at)",
)

# One row per report, window and model version. Start and span are by the device's clock.
statistics = Table(
    "statistics",
    metadata,
    Column("received_at", BigInteger, primary_key=True, autoincrement=False),
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
    Index("ix_statistics_device_start", "device", "start"),
    postgresql_partition_by="RANGE (received_at)",
)

resources = Table(
    "resources",
    metadata,
    Column("received_at", BigInteger, primary_key=True, autoincrement=False),
    Column("device", DEVICE, primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("start", BigInteger, nullable=False),
    Column("span", BigInteger, nullable=False),
    Column("resources_json", Text, nullable=False),
    Index("ix_resources_device_start", "device", "start"),
    postgresql_partition_by="RANGE (received_at)",
)

# Truth arrives late, in any report. One row per report, version and minute of predictions; rows of a minute add up.
truth = Table(
    "truth",
    metadata,
    Column("received_at", BigInteger, primary_key=True, autoincrement=False),
    Column("device", DEVICE, primary_key=True),
    Column("spool", STREAM_ID, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", STREAM_ID, primary_key=True),
    Column("minute", BigInteger, primary_key=True, autoincrement=False),
    Column("correct", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("confusion_json", Text, nullable=False),
    Index("ix_truth_minute", "minute"),
    Index("ix_truth_device_minute", "device", "minute"),
    postgresql_partition_by="RANGE (received_at)",
)


def _sums(name: str) -> Table:
    """Return a table of sums (`core/rollups.py`): per day of arrival, device, version and bucket."""
    return Table(
        name,
        metadata,
        Column("arrived", BigInteger, primary_key=True, autoincrement=False),  # start of the UTC day
        Column("device", DEVICE, primary_key=True),
        Column("digest", STREAM_ID, primary_key=True),
        Column("start", BigInteger, primary_key=True, autoincrement=False),  # of the bucket, by the device's clock
        Column("requests", BigInteger, nullable=False),
        Column("errors", BigInteger, nullable=False),
        Column("dropped", BigInteger, nullable=False),
        Column("late", BigInteger, nullable=False),
        Column("shed", BigInteger, nullable=False),
        Column("latency_json", Text, nullable=False),
        Column("confidence_json", Text, nullable=False),
        Column("classes_json", Text, nullable=False),
        Column("correct", BigInteger, nullable=False),
        Column("total", BigInteger, nullable=False),
        Column("confusion_json", Text, nullable=False),
        Index(f"ix_{name}_device_start", "device", "start"),
        Index(f"ix_{name}_digest", "digest"),
        postgresql_partition_by="RANGE (arrived)",
    )


quarter = _sums("quarter")
day = _sums("day")

# Buckets whose sums are older than what they sum.
dirty = Table(
    "dirty",
    metadata,
    Column("width", BigInteger, primary_key=True, autoincrement=False),  # ms: a quarter of an hour, or a day
    Column("arrived", BigInteger, primary_key=True, autoincrement=False),
    Column("device", DEVICE, primary_key=True),
    Column("start", BigInteger, primary_key=True, autoincrement=False),
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

# What devices were asked to do once, and what became of it. Expiry is derived when it is read.
command = Table(
    "command",
    metadata,
    Column("id", STREAM_ID, primary_key=True),
    Column("device", DEVICE, ForeignKey("device.id"), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("by", String(64), nullable=False),
    Column("issued_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),  # what is signed each time that it is sent
    Column("outcome", String(32)),
    Column("reason", String(64)),
    Column("detail", Text, nullable=False),
    Column("answered_at", BigInteger),
    UniqueConstraint("device", "sequence"),
)

account = Table(
    "account",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("password_hash", Text, nullable=False),
    Column("role", String(16), nullable=False, server_default="admin"),
    Column("disabled", Boolean, nullable=False, server_default=false()),
    Column("created_at", BigInteger, nullable=False, server_default="0"),
    Column("revision", BigInteger, nullable=False, server_default="1"),  # grows with each change
)

# A log-in changes its id now and then; the id before is then ``replaced`` and ends shortly after.
session = Table(
    "session",
    metadata,
    Column("token_sha256", DIGEST, primary_key=True),
    Column("account", String(64), ForeignKey("account.name"), nullable=False, index=True),
    Column("csrf", String(64), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False, server_default="0"),  # the log-in
    Column("renewed_at", BigInteger, nullable=False, server_default="0"),  # when it got this id
    Column("replaced", Boolean, nullable=False, server_default=false()),
)

# For programs. Enrolment tokens of devices are in ``token``.
api_token = Table(
    "api_token",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("account", String(64), ForeignKey("account.name"), nullable=False, index=True),
    Column("name", String(64), nullable=False),
    Column("secret_sha256", DIGEST, nullable=False),
    Column("scopes_json", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("last_used_at", BigInteger),
    Column("revoked_at", BigInteger),
)

# Who did what. Each row seals the one before it (`core/audit.py`); nothing here is ever changed or deleted.
audit = Table(
    "audit",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("who", String(64), nullable=False),
    Column("by", String(64), nullable=False),
    Column("address", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("about", Text, nullable=False),
    Column("result", String(16), nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous", DIGEST, nullable=False),
    Column("digest", DIGEST, nullable=False),
    Index("ix_audit_who", "who", "sequence"),
)

# Answers to requests that carried an Idempotency-Key, sealed with that key; without an answer it is under way.
kept_answer = Table(
    "kept_answer",
    metadata,
    Column("key_sha256", DIGEST, primary_key=True),
    Column("request_sha256", DIGEST, nullable=False),
    Column("at", BigInteger, nullable=False, index=True),
    Column("sealed", LargeBinary),
)
