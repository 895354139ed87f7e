"""What an examination of a server finds, in words: facts in, findings out. Pure.

A finding says how bad it is, what is so, and what to do. A trouble keeps the fleet from something now; a warning may
later. Times are UTC ms.
"""

from collections.abc import Sequence
from enum import Enum

import msgspec

from fleet_server.core.expiry import remind

DAY = 86_400_000
MIN_FREE_BYTES = 1 << 30
MIN_FREE_SHARE = 0.05
CLOCK_SLACK = 300_000  # ms
SUMS_LATE = 2 * DAY  # after their day; they are made every hour
LEAF_DAYS, CA_DAYS = 25, 180  # days left from which people are told; leaves are renewed with 30 days left


class Level(str, Enum):
    """How bad."""

    FINE = "fine"
    WARNING = "warning"
    TROUBLE = "trouble"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    about: str
    level: Level
    sentence: str
    remedy: str = ""


def fine(about: str, sentence: str) -> Finding:
    """Return that all is well."""
    return Finding(about=about, level=Level.FINE, sentence=sentence)


def warning(about: str, sentence: str, remedy: str) -> Finding:
    """Return something that will be a trouble."""
    return Finding(about=about, level=Level.WARNING, sentence=sentence, remedy=remedy)


def trouble(about: str, sentence: str, remedy: str) -> Finding:
    """Return something that is one."""
    return Finding(about=about, level=Level.TROUBLE, sentence=sentence, remedy=remedy)


def is_in_trouble(findings: Sequence[Finding]) -> bool:
    """Tell whether anything is a trouble."""
    return any(finding.level is Level.TROUBLE for finding in findings)


def judge_disk(free: int, total: int) -> Finding:
    """Judge the disk under the data folder."""
    said = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    remedy = "free some space, or shorten retention_days: when the disk is full, no report is stored or acknowledged"
    if free < MIN_FREE_BYTES // 4:
        return trouble("disk", said, remedy)
    low = free < MIN_FREE_BYTES or free < MIN_FREE_SHARE * total
    return warning("disk", said, remedy) if low else fine("disk", said)


def judge_clock(now: int, newest: int | None) -> Finding:
    """Judge the clock by the newest thing in the database, which this clock has dated."""
    if newest is not None and newest > now + CLOCK_SLACK:
        minutes = (newest - now) // 60_000
        said = f"the clock is {minutes} minutes behind the newest thing in the database"
        return trouble(
            "clock", said, "set the clock (timedatectl set-ntp true): certificates and signatures go by it"
        )
    return fine("clock", "the clock is not behind what is stored")


def judge_schema(found: str | None, known: str, *, is_known: bool) -> Finding:
    """Judge the database's schema."""
    if found == known:
        return fine("database", f"it is reached and has schema {known}")
    if found is not None and not is_known:
        said = f"it has schema {found}, and this program knows {known}"
        return trouble("database", said, "a newer edgewarden-server has used it: install that version again")
    said = f"it has schema {found or 'none yet'}, and this program knows {known}"
    return warning("database", said, "start the server: it brings the database up to date")


def judge_sums(oldest: int | None, now: int) -> Finding:
    """Judge whether sums are made; nothing that is not summed is dropped."""
    if oldest is not None and now - oldest > SUMS_LATE + DAY:
        said = f"what came in {(now - oldest) // DAY} days ago is not summed yet, and so nothing is dropped"
        return warning("sums", said, "look for 'sum up' in the server's log; a server must run for it")
    return fine("sums", "sums over quarters of an hour and days are made")


def judge_certificate(name: str, expires_at: int, now: int, *, is_ca: bool) -> Finding:
    """Judge one of the server's own certificates."""
    about, days = f"certificate {name}", (expires_at - now) // DAY
    remedy = (
        "run: edgewarden-server ca rotate"
        if is_ca
        else "restart the server: it renews its certificates at the start and every day"
    )
    if days < 0:
        return trouble(about, f"it expired {-days} days ago", remedy)
    late = days < (CA_DAYS if is_ca else LEAF_DAYS)
    said = f"it expires in {days} days"
    return warning(about, said, remedy) if late else fine(about, said)


def judge_role(name: str, expires_at: int, now: int) -> Finding:
    """Judge a role of the trust metadata."""
    about, reminder = f"trust {name}", remind(name, expires_at, now)
    if not reminder.warning:
        return fine(about, f"it expires in {reminder.days_left} days")
    remedy = f"run: {reminder.command}" if reminder.command else "look into the server's log: it renews it by itself"
    judge = trouble if reminder.days_left < 0 else warning
    return judge(about, reminder.warning, remedy)


def judge_mode(path: str, mode: int, *, is_ours: bool) -> Finding:
    """Judge who may look into something that holds keys."""
    about = f"permissions of {path}"
    if mode & 0o077:
        return trouble(about, f"others may look into it (mode {mode:04o})", f"run: chmod go= {path}")
    if not is_ours:
        return trouble(
            about, "it belongs to somebody else", "run this as the server's user, or chown it to that user"
        )
    return fine(about, "only its owner may look into it")
