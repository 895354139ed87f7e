"""What downloads may take: bytes per second, and bytes per day on a ledger that outlives this process.

Knows how to wait and where the ledger lies; how much is left, and how long to wait, is ``core/downloading.py``'s.
"""

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.adapters.https import CHUNK
from agent.core.downloading import Ledger, book, full_bucket, left_today, seconds_to_next_day, take, today
from agent.ports import Postponed, Trouble

log = logging.getLogger(__name__)

AHEAD = 1024 * 1024  # bytes booked before they come: a kill may waste some of the budget, and never exceeds it
PARTS = 16  # of the budget that are booked at once at most, so that a kill wastes no day
SLICE = 0.25  # seconds; a wait looks so often whether it is still wanted
SHARE = 8  # of a second's bytes that are read at once, so that the pace is even
MAX_LEDGER = 4096


class Allowance:
    """One download at a time takes from it, between `begin` and `end`."""

    def __init__(
        self,
        file: Path | None = None,
        *,
        bandwidth: int = 0,
        bytes_per_day: int = 0,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``file`` keeps the ledger (None: none is kept); 0 is no limit; ``clock`` gives UTC ms."""
        self._file = file
        self._bandwidth = bandwidth
        self._budget = bytes_per_day
        self._clock = clock
        self._monotonic = monotonic
        self._sleep = sleep
        self._bucket = full_bucket(bandwidth, monotonic())
        self._booked = Ledger()  # ahead: its day, and what of it has not come yet
        self._unkept = Ledger()  # where there is no file
        self._forced = False

    def begin(self, *, forced: bool = False) -> None:
        """Begin a download; raise `Postponed` when nothing is left today. A forced one has no daily limit."""
        self._forced = forced
        if self._limited:
            self._book_ahead()

    def end(self) -> None:
        """Give back what was booked and did not come."""
        now = self._clock()
        if self._limited and self._booked.spent and self._booked.day == today(self._booked, now).day:
            self._write(book(self._read(), -self._booked.spent, now))
        self._booked = Ledger()

    def size(self) -> int:
        """Return how many bytes may be read at once."""
        size = min(CHUNK, max(1, self._bandwidth // SHARE)) if self._bandwidth else CHUNK
        return min(size, self._booked.spent) if self._limited else size

    def spend(self, count: int, is_wanted: Callable[[], bool]) -> None:
        """Take bytes that came, and wait as the pace demands; raise `Postponed` when the day's last one is gone."""
        self._pace(count, is_wanted)
        if self._limited:
            self._booked = Ledger(day=self._booked.day, spent=self._booked.spent - count)
            if self._booked.spent <= 0:
                self._book_ahead()

    @property
    def _limited(self) -> bool:
        return bool(self._budget) and not self._forced

    def _pace(self, count: int, is_wanted: Callable[[], bool]) -> None:
        if not self._bandwidth:
            return
        self._bucket, wait = take(self._bucket, count, self._monotonic())
        while wait > 0 and is_wanted():
            self._sleep(min(wait, SLICE))
            wait -= SLICE

    def _book_ahead(self) -> None:
        now = self._clock()
        ledger = today(self._read(), now)
        ahead = min(AHEAD, max(1, self._budget // PARTS))
        amount = min(ahead, left_today(ledger, self._budget, now) or 0)
        if not amount:
            self._booked = Ledger()
            raise Postponed(
                f"the {self._budget} bytes that may be downloaded a day are used up; it goes on after midnight UTC",
                retry_after=seconds_to_next_day(now, random.random()),  # noqa: S311 - it spreads load, it hides nothing
            )
        self._write(book(ledger, amount, now))
        self._booked = Ledger(day=ledger.day, spent=amount)

    def _read(self) -> Ledger:
        if self._file is None:
            return self._unkept
        try:
            return msgspec.json.decode(read_capped(self._file, MAX_LEDGER) or b"{}", type=Ledger)
        except (msgspec.DecodeError, UnicodeDecodeError, Trouble) as error:
            log.warning("%s is unreadable, the day's budget begins anew: %s", self._file, error)
            return Ledger()

    def _write(self, ledger: Ledger) -> None:
        if self._file is None:
            self._unkept = ledger
        else:
            write_atomically(self._file, msgspec.json.encode(ledger))
