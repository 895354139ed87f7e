"""One contract, run on the SQLite spool and on its in-memory twin; then what only a file can suffer."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from agent.adapters.spool import RECORD_OVERHEAD, SqliteSpool
from agent.ports import EVENTS, TELEMETRY, Spool, Trouble
from simulator.memory import MemorySpool

Make = Callable[..., Spool]


def join(older: bytes, newer: bytes) -> bytes | None:
    """Merge two payloads of this test: shorter than both together, and nothing is lost."""
    return None if b"!" in older + newer else older + b"+" + newer


@pytest.fixture(params=["sqlite", "memory"])
def make_spool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    opened: list[SqliteSpool] = []

    def make(limit: int = 1_000_000) -> Spool:
        if request.param == "memory":
            return MemorySpool(limit=limit, merge=join)
        opened.append(SqliteSpool(tmp_path / "spool.db", merge=join, limit=limit))
        return opened[-1]

    yield make
    for spool in opened:
        spool.close()


def fill(spool: Spool, *payloads: bytes, stream: str = TELEMETRY) -> list[int]:
    return [spool.append(stream, lambda _, payload=payload: payload) for payload in payloads]


def publish_all(spool: Spool, stream: str = TELEMETRY) -> list[int]:
    numbers = [number for number, _ in spool.unpublished(stream, 1000)]
    for number in numbers:
        spool.mark_published(stream, number)
    return numbers


def waiting(spool: Spool, stream: str = TELEMETRY) -> list[int]:
    return [number for number, _ in spool.unpublished(stream, 1000)]


# ---------------------------------------------------------------- the contract
def test_each_stream_is_numbered_from_one(make_spool: Make) -> None:
    spool = make_spool()
    assert [1, 2] == fill(spool, b"a", b"b")
    assert [1] == fill(spool, b"e", stream=EVENTS)
    assert [2, 3] == fill(spool, b"f", b"g", stream=EVENTS)


def test_a_record_is_made_with_the_number_it_gets(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"first")
    spool.append(TELEMETRY, lambda number: b"number %d" % number)
    assert [(1, b"first"), (2, b"number 2")] == list(spool.unpublished(TELEMETRY, 10))


def test_a_number_is_not_used_up_when_the_record_cannot_be_made(make_spool: Make) -> None:
    spool = make_spool()

    def fail(number: int) -> bytes:
        raise RuntimeError(number)

    with pytest.raises(RuntimeError):
        spool.append(TELEMETRY, fail)
    assert [1] == fill(spool, b"a")


def test_unpublished_comes_oldest_first_and_bounded(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"a", b"b", b"c")
    assert [(1, b"a"), (2, b"b")] == list(spool.unpublished(TELEMETRY, 2))


def test_published_records_stay_until_the_server_has_them(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"a", b"b", b"c")
    publish_all(spool)
    assert [] == waiting(spool)
    assert 3 == spool.depth(TELEMETRY)
    assert 2 == spool.acknowledge(TELEMETRY, 2, ())
    assert 1 == spool.depth(TELEMETRY)


ACKNOWLEDGEMENTS = [
    # name, upto, missing, dropped, unpublished afterwards
    ("all", 5, (), 5, []),
    ("none", 0, (), 0, []),
    ("a hole", 5, ((2, 3),), 3, [2, 3]),
    ("two holes", 5, ((1, 1), (4, 4)), 3, [1, 4]),
    ("a hole above what it has", 3, ((5, 5),), 3, [5]),
    ("only send again", 0, ((2, 2),), 0, [2]),
    ("holes that overlap", 5, ((1, 3), (2, 4)), 1, [1, 2, 3, 4]),
    ("a hole the other way round", 5, ((4, 2),), 5, []),
    ("numbers nobody used", 10**30, ((10**25, 10**26), (-(10**30), -5)), 5, []),
    ("negative", -(10**30), (), 0, []),
]


@pytest.mark.parametrize(("upto", "missing", "dropped", "again"), [case[1:] for case in ACKNOWLEDGEMENTS],
                         ids=[case[0] for case in ACKNOWLEDGEMENTS])  # fmt: skip
def test_acknowledgements(
    make_spool: Make, upto: int, missing: tuple[tuple[int, int], ...], dropped: int, again: list[int]
) -> None:
    spool = make_spool()
    fill(spool, b"a", b"b", b"c", b"d", b"e")
    publish_all(spool)
    assert dropped == spool.acknowledge(TELEMETRY, upto, missing)
    assert again == waiting(spool)
    assert 5 - dropped == spool.depth(TELEMETRY)


def test_the_server_cannot_have_what_was_never_sent(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"a", b"b")
    spool.unpublished(TELEMETRY, 1)
    spool.mark_published(TELEMETRY, 1)
    assert 1 == spool.acknowledge(TELEMETRY, 99, ())
    assert [2] == waiting(spool)


def test_an_acknowledgement_of_one_stream_leaves_the_other(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"a")
    fill(spool, b"e", stream=EVENTS)
    publish_all(spool)
    publish_all(spool, EVENTS)
    spool.acknowledge(TELEMETRY, 1, ())
    assert (0, 1) == (spool.depth(TELEMETRY), spool.depth(EVENTS))


def test_a_new_connection_sends_everything_again(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"a", b"b")
    publish_all(spool)
    spool.forget_published()
    assert [1, 2] == waiting(spool)


def test_a_number_is_never_used_again(make_spool: Make) -> None:
    spool = make_spool()
    fill(spool, b"a", b"b")
    publish_all(spool)
    spool.acknowledge(TELEMETRY, 2, ())
    assert [3] == fill(spool, b"c")


# ---------------------------------------------------------------- a full spool
def room(*payloads: bytes) -> int:
    return sum(len(payload) + RECORD_OVERHEAD for payload in payloads)


def test_a_full_spool_merges_the_neighbours_that_cover_least(make_spool: Make) -> None:
    spool = make_spool(limit=room(b"a", b"b", b"c+d", b"e"))
    fill(spool, b"a", b"b", b"c", b"d", b"e")
    assert [(2, b"a+b"), (3, b"c"), (4, b"d"), (5, b"e")] == list(spool.unpublished(TELEMETRY, 9))
    assert 0 == spool.dropped()


def test_resolution_degrades_evenly(make_spool: Make) -> None:
    spool = make_spool(limit=4 * RECORD_OVERHEAD + 20)
    fill(spool, *[b"%d" % (number % 10) for number in range(1, 9)])
    assert [(2, b"1+2"), (4, b"3+4"), (6, b"5+6"), (8, b"7+8")] == list(spool.unpublished(TELEMETRY, 9))


def test_what_was_handed_out_is_never_merged(make_spool: Make) -> None:
    spool = make_spool(limit=room(b"a", b"b", b"c+d"))
    fill(spool, b"a", b"b")
    publish_all(spool)
    spool.forget_published()
    fill(spool, b"c", b"d")
    assert [(1, b"a"), (2, b"b"), (4, b"c+d")] == list(spool.unpublished(TELEMETRY, 9))


def test_the_oldest_report_is_dropped_and_counted_when_nothing_merges(make_spool: Make) -> None:
    spool = make_spool(limit=room(b"!1", b"!2"))
    fill(spool, b"!1", b"!2", b"!3", b"!4")
    assert [(3, b"!3"), (4, b"!4")] == list(spool.unpublished(TELEMETRY, 9))
    assert 2 == spool.dropped()


def test_dropping_a_merged_report_counts_all_it_covers(make_spool: Make) -> None:
    spool = make_spool(limit=room(b"!!!!", b"!!!!"))
    fill(spool, b"a", b"b", b"!!!!")
    fill(spool, b"!!!!")
    assert 2 == spool.dropped()


def test_events_outlive_reports_and_never_merge(make_spool: Make) -> None:
    spool = make_spool(limit=room(b"e", b"e"))
    fill(spool, b"r")
    fill(spool, b"e", b"e", stream=EVENTS)
    assert (0, 2, 1) == (spool.depth(TELEMETRY), spool.depth(EVENTS), spool.dropped())
    fill(spool, b"e", stream=EVENTS)
    assert [2, 3] == waiting(spool, EVENTS)
    assert 1 == spool.dropped()


def test_threads_get_different_numbers(make_spool: Make) -> None:
    spool = make_spool()
    threads = [threading.Thread(target=fill, args=(spool, *[b"x"] * 20)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(range(1, 81)) == waiting(spool)


# ---------------------------------------------------------------- what only a file can suffer
@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool.db"


def opened(path: Path, limit: int = 1_000_000) -> SqliteSpool:
    path.parent.mkdir(exist_ok=True)
    return SqliteSpool(path, merge=join, limit=limit)


def test_a_restart_keeps_id_numbers_records_and_drops(path: Path) -> None:
    first = opened(path, limit=room(b"!1", b"!2"))
    fill(first, b"!1", b"!2", b"!3")
    publish_all(first)
    first.close()
    second = opened(path)
    assert first.id == second.id
    assert 1 == second.dropped()
    assert [(2, b"!2"), (3, b"!3")] == list(second.unpublished(TELEMETRY, 9))
    assert [4] == fill(second, b"!4")
    second.close()


def test_what_was_handed_out_before_a_restart_is_never_merged(path: Path) -> None:
    first = opened(path)
    fill(first, b"a", b"b")
    publish_all(first)
    first.close()
    second = opened(path, limit=room(b"a", b"b", b"c+d"))
    fill(second, b"c", b"d")
    assert [(1, b"a"), (2, b"b"), (4, b"c+d")] == list(second.unpublished(TELEMETRY, 9))
    second.close()


def test_numbers_go_on_when_the_spool_was_empty_at_the_restart(path: Path) -> None:
    first = opened(path)
    fill(first, b"a", b"b")
    publish_all(first)
    first.acknowledge(TELEMETRY, 2, ())
    first.close()
    second = opened(path)
    assert [3] == fill(second, b"c")
    second.close()


def garbage(path: Path) -> None:
    path.write_bytes(b"this is not a database" * 100)


def tear(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))


def lose_a_table(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("DROP TABLE stream")
    database.close()


def come_from_the_future(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()


@pytest.mark.parametrize("damage", [garbage, tear, lose_a_table, come_from_the_future])
def test_an_unreadable_file_is_moved_aside_and_a_new_series_begins(
    path: Path, damage: Callable[[Path], None]
) -> None:
    first = opened(path)
    fill(first, *[b"x" * 500] * 20)
    first.close()
    damage(path)
    second = opened(path)
    assert path.with_name("spool.db.unreadable") == second.replaced
    assert second.replaced.exists()
    assert first.id != second.id
    assert [1] == fill(second, b"a")
    second.close()
    third = opened(path)
    assert (None, second.id) == (third.replaced, third.id)
    third.close()


def test_a_folder_that_refuses_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "spool.db").mkdir()
    with pytest.raises(Trouble):
        SqliteSpool(tmp_path / "spool.db", merge=join)


def test_a_disk_that_refuses_is_trouble_and_changes_nothing(path: Path) -> None:
    spool = opened(path)
    fill(spool, b"a")
    spool._database.execute("PRAGMA max_page_count = 1")  # SQLite's own way of saying: the disk is full
    with pytest.raises(Trouble):
        fill(spool, b"x" * 1_000_000)
    spool._database.execute("PRAGMA max_page_count = 1000000")
    assert [2] == fill(spool, b"b")
    spool.close()


def test_the_file_stays_near_its_limit(path: Path) -> None:
    limit = 200_000
    spool = opened(path, limit=limit)
    fill(spool, *[b"!" + b"x" * 3000] * 200)
    spool.close()
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 2 * limit
    assert 0 < spool.dropped()


WRITER = dedent("""
    import sys
    from pathlib import Path
    from agent.adapters.spool import SqliteSpool
    spool = SqliteSpool(Path(sys.argv[1]), merge=lambda a, b: None)
    while True:
        print(spool.append("telemetry", lambda number: b"%d" % number), flush=True)
""")


def test_what_append_returned_survives_a_kill_and_its_number_is_never_used_again(path: Path) -> None:
    path.parent.mkdir()
    promised = 0
    for lines in (1, 7, 30, 13):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(lines)]
        child.kill()
        told += [int(line) for line in child.stdout.read().split("\n")[:-1]]
        child.stdout.close()
        child.wait()
        assert told[0] > promised
        promised = told[-1]
        spool = opened(path)
        records = list(spool.unpublished(TELEMETRY, 1_000_000))
        spool.close()
        assert [(number, b"%d" % number) for number in range(1, len(records) + 1)] == records
        assert promised <= len(records) <= promised + 1
        promised = len(records)
