"""The audit log's chain: what shows, where, and how refusals are kept from filling it; its table."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa
from data_world import NOW
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import tables
from fleet_server.adapters.database.audit_log import DatabaseAuditLog
from fleet_server.core.audit import (
    BEGINNING,
    MAX_KINDS,
    MINUTE,
    ORIGIN,
    Act,
    Broken,
    Entry,
    Head,
    Refusals,
    Result,
    check,
    digest_of,
    follow,
)


def act(number: int = 0, **fields: object) -> Act:
    said: dict[str, object] = {
        "at": NOW + number,
        "who": "ada",
        "by": "session",
        "address": "::1",
        "action": "deploy",
    }
    return Act(**(said | {"about": f"digits version {number}"} | fields))  # type: ignore[arg-type]  # any field


def chain(length: int) -> list[Entry]:
    entries: list[Entry] = []
    head = BEGINNING
    for number in range(length):
        entries.append(follow(head, act(number)))
        head = Head(sequence=entries[-1].sequence, digest=entries[-1].digest)
    return entries


CHAIN = chain(5)


def forged(entry: Entry, **fields: object) -> Entry:
    """An entry that was changed by somebody who knows how digests are made."""
    changed = replace(entry.act, **fields)  # type: ignore[arg-type]  # any field
    return replace(entry, act=changed, digest=digest_of(entry.sequence, changed, previous=entry.previous))


def test_a_chain_that_nobody_touched_holds() -> None:
    assert check(CHAIN) == Head(sequence=5, digest=CHAIN[-1].digest)
    assert CHAIN[0].previous == ORIGIN
    assert check([]) == BEGINNING


def test_a_digest_is_what_the_documentation_says() -> None:
    content = (
        '{"about":"\\u00e9","action":"login","address":"::1","at":7,"by":"session","detail":"",'
        '"result":"refused","sequence":3,"who":"ada"}'
    )
    one = act(at=7, about="é", action="login", result=Result.REFUSED)
    assert digest_of(3, one, previous="ab") == hashlib.sha256(f"ab\n{content}".encode()).hexdigest()


Tampering = Callable[[list[Entry]], Sequence[Entry]]
TAMPERED: dict[str, tuple[Tampering, int]] = {
    "who is changed": (lambda c: [*c[:2], replace(c[2], act=replace(c[2].act, who="eve")), *c[3:]], 3),
    "the time is changed": (lambda c: [replace(c[0], act=replace(c[0].act, at=1)), *c[1:]], 1),
    "the result is changed": (lambda c: [*c[:4], replace(c[4], act=replace(c[4].act, result=Result.REFUSED))], 5),
    "an entry is made anew with its digest": (lambda c: [*c[:2], forged(c[2], about="nothing"), *c[3:]], 4),
    "one is deleted": (lambda c: [*c[:2], *c[3:]], 3),
    "the first is deleted": (lambda c: c[1:], 1),
    "two change places": (lambda c: [c[0], c[2], c[1], *c[3:]], 2),
    "two change places and numbers": (
        lambda c: [c[0], replace(c[2], sequence=2), replace(c[1], sequence=3), *c[3:]],
        2,
    ),
    "one is there twice": (lambda c: [*c[:2], c[1], *c[2:]], 3),
    "one is put in": (lambda c: [*c[:2], follow(Head(sequence=2, digest=c[1].digest), act(9)), *c[2:]], 4),
}


@pytest.mark.parametrize(("tamper", "place"), TAMPERED.values(), ids=TAMPERED.keys())
def test_the_first_broken_link_is_named(tamper: Tampering, place: int) -> None:
    with pytest.raises(Broken) as broken:
        check(tamper(list(CHAIN)))
    assert broken.value.sequence == place
    assert str(place) in str(broken.value)


UNSEEN: dict[str, tuple[Tampering, int]] = {
    "the end is cut off": (lambda c: c[:3], 4),
    "everything is gone": (lambda _: [], 1),
    "all is made anew from the third on": (
        lambda c: [*c[:2], *_remade(Head(sequence=2, digest=c[1].digest), 3)],
        5,
    ),
}


def _remade(head: Head, count: int) -> list[Entry]:
    entries = []
    for number in range(count):
        entries.append(follow(head, act(number, who="eve")))
        head = Head(sequence=entries[-1].sequence, digest=entries[-1].digest)
    return entries


@pytest.mark.parametrize(("tamper", "place"), UNSEEN.values(), ids=UNSEEN.keys())
def test_what_the_chain_alone_cannot_show_is_shown_by_an_end_that_was_kept(tamper: Tampering, place: int) -> None:
    changed = tamper(list(CHAIN))
    check(changed)
    with pytest.raises(Broken) as broken:
        check(changed, known=Head(sequence=5, digest=CHAIN[-1].digest))
    assert broken.value.sequence == place


def test_texts_are_cut_and_cleaned_before_they_are_sealed() -> None:
    entry = follow(BEGINNING, act(who="x" * 200, about="a\x00b\ud800\x1b[31m" + "c" * 5000, address="é"))
    assert (len(entry.act.who), len(entry.act.about)) == (64, 1000)
    assert entry.act.about.startswith("a\ufffdb\ufffd\ufffd[31m")
    check([entry])


# ---------------------------------------------------------------- refusals
def refused(number: int = 0, **fields: object) -> Act:
    return act(number, result=Result.REFUSED, detail="no", **fields)


def test_of_many_refusals_the_first_is_written_and_then_their_number() -> None:
    refusals = Refusals()
    assert [refusals.admit(refused(n)) for n in range(50)] == [True] + [False] * 49
    assert refusals.due(NOW + MINUTE - 1) == ()
    (total,) = refusals.due(NOW + MINUTE)
    assert (total.who, total.result, "49 more" in total.detail) == ("ada", Result.REFUSED, True)
    assert refusals.admit(refused(MINUTE))


def test_a_refusal_alone_needs_no_sum() -> None:
    refusals = Refusals()
    assert refusals.admit(refused())
    assert refusals.due(NOW + MINUTE) == ()


def test_whoever_comes_from_ever_new_addresses_is_counted_together() -> None:
    refusals = Refusals()
    written = sum(refusals.admit(refused(address=f"10.0.{n}")) for n in range(10 * MAX_KINDS))
    assert written == MAX_KINDS
    (total,) = refusals.due(NOW + MINUTE)
    assert total.detail.startswith(f"{9 * MAX_KINDS} more")
    assert not refusals.held


# ---------------------------------------------------------------- on a database
def test_the_table_gives_back_what_was_sealed_and_pages_by_number(opened: Engine) -> None:
    log = DatabaseAuditLog(opened)
    log.append([act(n, who=f"u{n % 2}") for n in range(7)])
    log.append([act(7)])
    assert check(log.entries(after=0, limit=100)).sequence == 8
    assert [e.sequence for e in log.entries(after=5, limit=2)] == [6, 7]
    assert [e.sequence for e in log.newest(before=7, limit=2, who="u1", action="deploy")] == [6, 4]
    assert log.newest(before=None, limit=9, who=None, action="login") == []


def test_writers_at_the_same_time_make_one_chain(opened: Engine) -> None:
    log = DatabaseAuditLog(opened)

    def write(who: str) -> None:
        for number in range(10):
            log.append([act(number, who=who)])

    threads = [threading.Thread(target=write, args=(f"u{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert check(log.entries(after=0, limit=100)).sequence == 40


def test_a_row_that_is_changed_in_the_database_shows(opened: Engine) -> None:
    log = DatabaseAuditLog(opened)
    log.append([act(n) for n in range(5)])
    with opened.begin() as connection:
        connection.execute(sa.update(tables.audit).where(tables.audit.c.sequence == 2).values(who="eve"))
    with pytest.raises(Broken, match="entry 2: was changed"):
        check(log.entries(after=0, limit=100))
