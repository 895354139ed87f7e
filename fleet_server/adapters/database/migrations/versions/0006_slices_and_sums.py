"""What devices report in slices by arrival, and sums over quarters of an hour and days.

The four tables are made anew, since neither database can turn a table into a partitioned one: their rows wait in a
table without keys meanwhile. Sums are made by the server afterwards, from the buckets that are marked here.
"""

import json
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

QUARTER, DAY = 900_000, 86_400_000  # ms
REPORTED = ("statistics", "resources", "truth", "report")
STREAM = ("device", "spool", "sequence")
COUNTS = ("requests", "errors", "dropped", "late", "shed")
TEXTS = ("latency_json", "confidence_json", "classes_json")
STATISTICS = (*STREAM, "position", "digest", "start", "span", *COUNTS, *TEXTS)
RESOURCES = (*STREAM, "position", "start", "span", "resources_json")
JUDGED = ("device", "digest", "minute", "correct", "total", "confusion_json")


def upgrade() -> None:
    """Apply."""
    _set_aside(*REPORTED)
    _make_sliced()
    _make_sums()
    same = " AND ".join(f"r.{column} = o.{column}" for column in STREAM)
    received = f"(SELECT r.received_at FROM aside_report r WHERE {same})"  # noqa: S608 - names from above
    newest = "COALESCE((SELECT MAX(r.received_at) FROM aside_report r WHERE r.device = o.device), o.minute)"
    _bring_back("report", (*STREAM, "covers", "dropped"), "o.received_at")
    _bring_back("statistics", STATISTICS, received)
    _bring_back("resources", RESOURCES, received)
    _bring_back("truth", JUDGED, newest, {"spool": "''", "sequence": "0"})
    _drop_aside(*REPORTED)
    for width in (QUARTER, DAY):
        _mark("statistics", "start", width)
        _mark("truth", "minute", width)


def downgrade() -> None:
    """Undo. Sums go, and with them what is older than the reports."""
    for name in ("dirty", "day", "quarter"):
        op.drop_table(name)
    _set_aside(*REPORTED)
    _make_flat()
    for name, columns in (
        ("report", (*STREAM, "covers", "dropped", "received_at")),
        ("statistics", STATISTICS),
        ("resources", RESOURCES),
    ):
        listed = _listed(columns)
        op.execute(f"INSERT INTO {name} ({listed}) SELECT {listed} FROM aside_{name}")  # noqa: S608 - names from above
    _merge_truth()
    _drop_aside(*REPORTED)


# ---------------------------------------------------------------- moving rows
def _set_aside(*names: str) -> None:
    for name in names:
        op.execute(f"CREATE TABLE aside_{name} AS SELECT * FROM {name}")  # noqa: S608 - names from above
        op.drop_table(name)
    op.execute("CREATE INDEX ix_aside_report ON aside_report (device, spool, sequence)")


def _drop_aside(*names: str) -> None:
    for name in names:
        op.drop_table(f"aside_{name}")


def _bring_back(name: str, columns: Sequence[str], received: str, constants: dict[str, str] | None = None) -> None:
    """Copy rows, each with its arrival, into slices made for them."""
    old = f"(SELECT o.*, {received} AS arrival FROM aside_{name} o) o"  # noqa: S608 - names from above
    if op.get_bind().dialect.name == "postgresql":
        days = f"SELECT DISTINCT arrival / {DAY} FROM {old}"  # noqa: S608 - names from above
        for number in sorted(op.get_bind().scalars(sa.text(days))):
            bounds = f"FROM ({number * DAY}) TO ({(number + 1) * DAY})"
            op.execute(f"CREATE TABLE {name}_s{number} PARTITION OF {name} FOR VALUES {bounds}")
    extra = constants or {}
    into = _listed(("received_at", *columns, *extra))
    values = ", ".join(("o.arrival", *(f'o."{column}"' for column in columns), *extra.values()))
    op.execute(f"INSERT INTO {name} ({into}) SELECT {values} FROM {old}")  # noqa: S608 - names from above


def _mark(name: str, at: str, width: int) -> None:
    """Mark what was there as not summed yet."""
    op.execute(
        f"INSERT INTO dirty (width, arrived, device, start) "  # noqa: S608 - names and numbers from above
        f'SELECT DISTINCT {width}, received_at - received_at % {DAY}, device, "{at}" - "{at}" % {width} '
        f"FROM {name} WHERE true ON CONFLICT DO NOTHING"
    )


def _merge_truth() -> None:
    """Put the rows of a minute together again."""
    merged: dict[tuple[str, str, int], dict[tuple[int, int], int]] = {}
    rows = op.get_bind().execute(sa.text("SELECT device, digest, minute, confusion_json FROM aside_truth"))
    for device, digest, minute, text in rows:
        cells = merged.setdefault((device, digest, minute), {})
        for true, predicted, n in json.loads(text):
            cells[true, predicted] = cells.get((true, predicted), 0) + n
    truth = sa.table("truth", *(sa.column(name) for name in JUDGED))
    made = [_truth_row(key, cells) for key, cells in sorted(merged.items())]
    if made:
        op.bulk_insert(truth, made)


def _truth_row(key: tuple[str, str, int], cells: dict[tuple[int, int], int]) -> dict[str, object]:
    device, digest, minute = key
    return {
        "device": device,
        "digest": digest,
        "minute": minute,
        "correct": sum(n for (true, predicted), n in cells.items() if true == predicted),
        "total": sum(cells.values()),
        "confusion_json": json.dumps([[*pair, n] for pair, n in sorted(cells.items())], separators=(",", ":")),
    }


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


# ---------------------------------------------------------------- tables
def _number(name: str, **options: object) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger(), nullable=False, **options)  # type: ignore[arg-type]  # passed on


def _key(name: str) -> "sa.Column[int]":
    return _number(name, autoincrement=False)


def _text(name: str, length: int | None = None) -> "sa.Column[str]":
    return sa.Column(name, sa.String(length) if length else sa.Text(), nullable=False)


def _stream() -> list["sa.Column[str] | sa.Column[int]"]:
    return [_text("device", 63), _text("spool", 64), _key("sequence")]


def _position() -> "sa.Column[int]":
    return sa.Column("position", sa.Integer(), autoincrement=False, nullable=False)


def _measured() -> list["sa.Column[str] | sa.Column[int]"]:
    counts = [_number(name) for name in COUNTS[:3]]
    told_apart = [_number(name, server_default="0") for name in COUNTS[3:]]
    return [_number("start"), _number("span"), *counts, *told_apart, *(_text(name) for name in TEXTS)]


def _of_device(name: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["device"], ["device.id"], name=op.f(f"fk_{name}_device"))


def _of_report(name: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        STREAM,
        [f"report.{column}" for column in STREAM],
        name=op.f(f"fk_{name}_device_spool_sequence"),
        ondelete="CASCADE",
    )


def _make_sliced() -> None:
    arrival = "RANGE (received_at)"
    key = ("received_at", *STREAM)
    op.create_table(
        "report",
        *(_key("received_at"), *_stream(), _number("covers"), _number("dropped"), _of_device("report")),
        sa.PrimaryKeyConstraint(*key, name=op.f("pk_report")),
        postgresql_partition_by=arrival,
    )
    op.create_table(
        "statistics",
        *(_key("received_at"), *_stream(), _position(), _text("digest", 64), *_measured()),
        sa.PrimaryKeyConstraint(*key, "position", "digest", name=op.f("pk_statistics")),
        postgresql_partition_by=arrival,
    )
    op.create_table(
        "resources",
        *(_key("received_at"), *_stream(), _position(), _number("start"), _number("span"), _text("resources_json")),
        sa.PrimaryKeyConstraint(*key, "position", name=op.f("pk_resources")),
        postgresql_partition_by=arrival,
    )
    op.create_table(
        "truth",
        *(_key("received_at"), *_stream(), _text("digest", 64), _key("minute")),
        *(_number("correct"), _number("total"), _text("confusion_json")),
        sa.PrimaryKeyConstraint(*key, "digest", "minute", name=op.f("pk_truth")),
        postgresql_partition_by=arrival,
    )
    _make_common_indexes()
    op.create_index("ix_truth_device_minute", "truth", ["device", "minute"])


def _make_common_indexes() -> None:
    op.create_index("ix_statistics_device_start", "statistics", ["device", "start"])
    op.create_index(op.f("ix_statistics_start"), "statistics", ["start"])
    op.create_index("ix_resources_device_start", "resources", ["device", "start"])
    op.create_index("ix_truth_minute", "truth", ["minute"])


def _make_sums() -> None:
    for name in ("quarter", "day"):
        op.create_table(
            name,
            *(_key("arrived"), _text("device", 63), _text("digest", 64), _key("start")),
            *(_number(count) for count in COUNTS),
            *(_text(text) for text in TEXTS),
            *(_number("correct"), _number("total"), _text("confusion_json")),
            sa.PrimaryKeyConstraint("arrived", "device", "digest", "start", name=op.f(f"pk_{name}")),
            postgresql_partition_by="RANGE (arrived)",
        )
        op.create_index(f"ix_{name}_device_start", name, ["device", "start"])
        op.create_index(f"ix_{name}_digest", name, ["digest"])
    op.create_table(
        "dirty",
        *(_key("width"), _key("arrived"), _text("device", 63), _key("start")),
        sa.PrimaryKeyConstraint("width", "arrived", "device", "start", name=op.f("pk_dirty")),
    )


def _make_flat() -> None:
    op.create_table(
        "report",
        *(*_stream(), _number("covers"), _number("dropped"), _number("received_at"), _of_device("report")),
        sa.PrimaryKeyConstraint(*STREAM, name=op.f("pk_report")),
    )
    op.create_index(op.f("ix_report_received_at"), "report", ["received_at"])
    op.create_table(
        "statistics",
        *(*_stream(), _position(), _text("digest", 64), *_measured(), _of_report("statistics")),
        sa.PrimaryKeyConstraint(*STREAM, "position", "digest", name=op.f("pk_statistics")),
    )
    op.create_table(
        "resources",
        *(
            *_stream(),
            _position(),
            _number("start"),
            _number("span"),
            _text("resources_json"),
            _of_report("resources"),
        ),
        sa.PrimaryKeyConstraint(*STREAM, "position", name=op.f("pk_resources")),
    )
    op.create_table(
        "truth",
        *(_text("device", 63), _text("digest", 64), _key("minute")),
        *(_number("correct"), _number("total"), _text("confusion_json"), _of_device("truth")),
        sa.PrimaryKeyConstraint("device", "digest", "minute", name=op.f("pk_truth")),
    )
    _make_common_indexes()
    op.create_index(op.f("ix_truth_digest"), "truth", ["digest"])
