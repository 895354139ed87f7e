"""The audit log as a chain: each entry seals the one before it, so that a change anywhere shows.

An entry's digest is SHA-256 over the digest of the entry before, a line feed, and the entry as canonical JSON (ASCII,
keys in order, no white space). Pure: entries in, the first broken link out. What the chain proves and what not:
``docs/explanation/audit.md``.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum

ORIGIN = "0" * 64  # what the first entry seals
MAX_FIELD, MAX_TEXT = 64, 1000  # characters
MINUTE = 60_000  # ms
MAX_KINDS = 100  # of refusals that are written in full within a minute; the rest of them is counted
SERVER = "server"  # who acts when nobody asked


class Result(str, Enum):
    """What became of it."""

    DONE = "done"
    REFUSED = "refused"  # not allowed to: no permission, wrong password, too often
    FAILED = "failed"  # allowed to, and yet nothing was changed: a bad or outdated request, or an error inside


@dataclass(frozen=True, kw_only=True)
class Act:
    """Somebody did, or tried, something."""

    at: int  # UTC ms by the server's clock
    who: str  # user name as it was given; `SERVER`; empty when nobody said who they are
    by: str  # session, token:<id>, password, server; empty
    address: str
    action: str
    about: str = ""  # on what
    result: Result = Result.DONE
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An act at its place in the chain."""

    sequence: int  # 1, 2, 3, …
    act: Act
    previous: str  # digest of the entry before, or `ORIGIN`
    digest: str


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where the chain ends, or ended once. Whoever keeps one elsewhere sees when the chain is cut or made anew."""

    sequence: int = 0
    digest: str = ORIGIN


BEGINNING = Head()


class Broken(Exception):
    """The chain does not hold; ``sequence`` is the first place where it shows."""

    def __init__(self, sequence: int, why: str) -> None:
        """Say where and why."""
        super().__init__(f"entry {sequence}: {why}")
        self.sequence = sequence


# ---------------------------------------------------------------- the chain
def follow(head: Head, act: Act) -> Entry:
    """Return an act as the next entry."""
    act = fit(act)
    sequence = head.sequence + 1
    return Entry(
        sequence=sequence, act=act, previous=head.digest, digest=digest_of(sequence, act, previous=head.digest)
    )


def digest_of(sequence: int, act: Act, *, previous: str) -> str:
    """Return the digest an entry must have."""
    content = json.dumps({"sequence": sequence, **asdict(act)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{previous}\n{content}".encode("ascii")).hexdigest()


def check(entries: Iterable[Entry], start: Head = BEGINNING, known: Head | None = None) -> Head:
    """Return where the chain ends; raise `Broken` at the first place where it does not hold.

    ``start`` is where the entries go on from, ``known`` an end that was seen before and must be passed.
    """
    head = start
    for entry in entries:
        _check_link(head, entry)
        head = Head(sequence=entry.sequence, digest=entry.digest)
        if known is not None and known.sequence == head.sequence and known.digest != head.digest:
            raise Broken(head.sequence, "this is not the entry that stood here when the log was last verified")
    if known is not None and known.sequence > head.sequence:
        raise Broken(head.sequence + 1, f"missing: the log had {known.sequence} entries when it was last verified")
    return head


def _check_link(head: Head, entry: Entry) -> None:
    expected = head.sequence + 1
    if entry.sequence != expected:
        raise Broken(expected, f"missing or moved: entry {entry.sequence} stands in its place")
    if entry.previous != head.digest:
        raise Broken(entry.sequence, "does not seal the entry before it")
    if entry.digest != digest_of(entry.sequence, entry.act, previous=entry.previous):
        raise Broken(entry.sequence, "was changed: its content does not give its digest")


def fit(act: Act) -> Act:
    """Return an act as it can be stored: texts cut to their columns, without what a database would not take."""
    return Act(
        at=act.at,
        who=_clean(act.who, MAX_FIELD),
        by=_clean(act.by, MAX_FIELD),
        address=_clean(act.address, MAX_FIELD),
        action=_clean(act.action, MAX_FIELD),
        about=_clean(act.about, MAX_TEXT),
        result=act.result,
        detail=_clean(act.detail, MAX_TEXT),
    )


def _clean(text: str, most: int) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:most]


# ---------------------------------------------------------------- refusals
Kind = tuple[str, str, str, str, Result]


@dataclass
class _Held:
    since: int
    newest: Act
    more: int = 0


@dataclass(kw_only=True)
class Refusals:
    """Keeps a stranger from filling the log: of one kind the first is written at once, the rest as one sum a minute.

    A kind is who, from where, at what action, with which result. Beyond `MAX_KINDS` within a minute all kinds share
    one sum. Not thread-safe.
    """

    held: dict[Kind, _Held] = field(default_factory=dict)

    def admit(self, act: Act) -> bool:
        """Tell whether to write an act now; otherwise it is in the sum that `due` returns later."""
        kind: Kind = (act.who, act.address, act.action, act.by, act.result)
        if kind not in self.held and len(self.held) >= MAX_KINDS:
            kind = ("", "many", "many", "", Result.REFUSED)
        if kind not in self.held:
            self.held[kind] = _Held(since=act.at, newest=act)
            return kind[1] != "many"
        self.held[kind].more += 1
        self.held[kind].newest = act
        return False

    def due(self, now: int) -> tuple[Act, ...]:
        """Return the sums of kinds whose minute is over, and forget these kinds."""
        over = [kind for kind, held in self.held.items() if now - held.since >= MINUTE]
        sums = [(kind, held) for kind in over if (held := self.held.pop(kind)).more or kind[1] == "many"]
        return tuple(_sum(kind, held, now) for kind, held in sums)


def _sum(kind: Kind, held: _Held, now: int) -> Act:
    who, address, action, by, result = kind
    count = held.more + (address == "many")
    detail = f"{count} more like this since {held.since}; the newest: {held.newest.detail or held.newest.about}"
    return Act(
        at=now, who=who, by=by, address=address, action=action, about=held.newest.about, result=result, detail=detail
    )
