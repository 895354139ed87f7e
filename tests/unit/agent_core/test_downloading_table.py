"""Decisions of a download, as tables."""

import pytest

from agent.core.downloading import (
    DAY_MS,
    RESERVE,
    Judgement,
    Ledger,
    Told,
    book,
    choose_delta,
    full_bucket,
    judge,
    left_today,
    seconds_to_next_day,
    sources,
    space_needed,
    take,
    today,
    worth_telling,
)
from protocol.release import BSDIFF, DELTA_METHODS, NO_BASE, ZSTD, ZSTD_PATCH, Delta

DAY = 20_000
NOON = DAY * DAY_MS + DAY_MS // 2
HERE, GONE = "a" * 64, "b" * 64
PLENTY = 10**9

STATUSES = [
    (200, Judgement.WHOLE),
    (206, Judgement.PART),
    (302, Judgement.TROUBLE),
    (401, Judgement.TROUBLE),
    (404, Judgement.ABSENT),
    (410, Judgement.ABSENT),
    (416, Judgement.RESTART),
    (429, Judgement.BUSY),
    (500, Judgement.TROUBLE),
    (503, Judgement.BUSY),
]


@pytest.mark.parametrize(("status", "judgement"), STATUSES)
def test_each_status_has_one_meaning(status: int, judgement: Judgement) -> None:
    assert judgement is judge(status)


BUDGETS = [
    ("no budget is no limit", Ledger(day=DAY, spent=10**12), 0, False, None),
    ("a fresh day has all of it", Ledger(), 1000, False, 1000),
    ("what was spent today is gone", Ledger(day=DAY, spent=400), 1000, False, 600),
    ("what was spent yesterday is not", Ledger(day=DAY - 1, spent=400), 1000, False, 1000),
    ("a clock that was ahead does not keep tomorrow's", Ledger(day=DAY + 1, spent=1000), 1000, False, 1000),
    ("a smaller budget than was spent leaves nothing", Ledger(day=DAY, spent=4000), 1000, False, 0),
    ("a forced download has no limit", Ledger(day=DAY, spent=4000), 1000, True, None),
]


@pytest.mark.parametrize(("name", "ledger", "budget", "forced", "left"), BUDGETS, ids=[row[0] for row in BUDGETS])
def test_the_day_s_budget(name: str, ledger: Ledger, budget: int, forced: bool, left: int | None) -> None:
    assert left == left_today(ledger, budget, NOON, forced=forced)


def test_booking_adds_up_gives_back_and_begins_anew_at_midnight() -> None:
    ledger = book(book(Ledger(), 500, NOON), -200, NOON)
    assert Ledger(day=DAY, spent=300) == ledger
    assert Ledger(day=DAY + 1, spent=50) == book(ledger, 50, NOON + DAY_MS // 2)
    assert Ledger(day=DAY, spent=0) == book(ledger, -1000, NOON)
    assert Ledger(day=DAY, spent=300) == today(ledger, NOON + DAY_MS // 2 - 1)


def test_midnight_is_utc() -> None:
    assert 12 * 3600 == seconds_to_next_day(NOON, 0.0)
    assert 0.001 == seconds_to_next_day(NOON + DAY_MS // 2 - 1, 0.0)
    assert 12 * 3600 + 450 == seconds_to_next_day(NOON, 0.5)


def test_the_pace_allows_one_burst_and_then_the_rate() -> None:
    bucket, wait = take(full_bucket(1000, at=5.0), 1000, at=5.0)
    assert 0 == wait
    bucket, wait = take(bucket, 500, at=5.0)
    assert 0.5 == wait
    bucket, wait = take(bucket, 500, at=5.5)
    assert 0.5 == wait
    _, wait = take(bucket, 1000, at=100.0)
    assert 0 == wait, "what was saved up is one burst, not more"


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    bucket, _ = take(full_bucket(1000, at=5.0), 1000, at=5.0)
    _, wait = take(bucket, 100, at=1.0)
    assert 0.1 == wait


def test_mirrors_come_in_order_without_those_that_lied_and_the_server_is_last() -> None:
    assert (None,) == sources((), ())
    assert ("m1", "m3", None) == sources(("m1", "m2", "m3"), {"m2"})


def delta(method: str, length: int) -> Delta:
    return Delta(method=method, length=length, sha256="c" * 64)


CHOICES: list[tuple[str, dict[str, Delta], dict[str, object], str | None]] = [
    ("none offered", {}, {}, None),
    ("the smallest wins", {HERE: delta(BSDIFF, 90), NO_BASE: delta(ZSTD, 80)}, {}, NO_BASE),
    ("a base that is not here is no base", {GONE: delta(BSDIFF, 10), NO_BASE: delta(ZSTD, 800)}, {}, NO_BASE),
    ("an unknown method is passed over", {HERE: delta("xdelta9", 10)}, {}, None),
    ("a method without its library is passed over", {HERE: delta(BSDIFF, 10)}, {"methods": (ZSTD,)}, None),
    ("a delta larger than the bundle", {HERE: delta(ZSTD_PATCH, 1001)}, {}, None),
    ("most of the bundle is here already", {HERE: delta(ZSTD_PATCH, 200)}, {"held": 900}, None),
    ("an empty delta is none", {HERE: delta(ZSTD_PATCH, 0)}, {}, None),
    ("a rebuild that takes too much of the machine", {HERE: delta(BSDIFF, 10)}, {"memory": 10_000}, None),
]


@pytest.mark.parametrize(("deltas", "changes", "base"), [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_which_delta_is_taken(deltas: dict[str, Delta], changes: dict[str, object], base: str | None) -> None:
    facts = {"length": 1000, "held": 0, "methods": DELTA_METHODS, "has": HERE.__eq__, "memory": PLENTY, **changes}
    offer = choose_delta(deltas, **facts)  # type: ignore[arg-type]  # facts of several types
    assert base == (offer.base if offer else None)


def test_room_is_for_what_comes_what_it_becomes_and_a_reserve() -> None:
    assert RESERVE + 2000 == space_needed(1000, 0)
    assert RESERVE + 1400 == space_needed(1000, 600)
    assert RESERVE + 2050 == space_needed(1000, 0, delta(ZSTD, 50))


TELLING = [
    ("nothing new in the same quarter", Told(quarter=1, at=0), 49, 60_000, None),
    ("a quarter that comes too soon is left out", Told(quarter=1, at=0), 50, 9_999, None),
    ("a quarter is told", Told(quarter=1, at=0), 50, 10_000, 2),
    ("the newest quarter is told when some were left out", Told(quarter=0, at=0), 99, 10_000, 3),
    ("the end is told", Told(quarter=3, at=0), 100, 10_000, 4),
]


@pytest.mark.parametrize(
    ("told", "done", "now", "quarter"), [row[1:] for row in TELLING], ids=[r[0] for r in TELLING]
)
def test_progress_is_told_by_quarters_and_not_too_often(told: Told, done: int, now: int, quarter: int | None) -> None:
    news = worth_telling(told, done, 100, now)
    assert quarter == (news.quarter if news else None)
