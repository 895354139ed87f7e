"""A file read, or a program run, every so often. The data plane's only importer of APScheduler.

Its cron triggers say when; the waiting is done here, in short steps against the wall clock, so that a clock that is
set neither delays a run for years nor makes up for all that were missed.
"""

import time
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

from apscheduler.triggers.cron import CronTrigger

from agent.core.pipelines import IntervalSource
from agent.inference.pipelines.children import CannotStart, run_once
from agent.inference.pipelines.directory import read_file
from agent.inference.pipelines.flow import BadFrame, Feed, Frame, SourceFailed

STEP = 1.0  # seconds between two looks at the clock


class IntervalFrames:
    """Implements `flow.Source` by the clock."""

    def __init__(self, settings: IntervalSource, cap: int) -> None:
        """``cap``: bytes of the largest file or output."""
        self._settings = settings
        self._cap = cap

    def run(self, feed: Feed) -> None:
        """Hand over a frame whenever it is time; raise `SourceFailed` when the times cannot be understood."""
        trigger = self._trigger()
        feed.up()
        number = 0
        while self._wait(trigger, feed):
            number += 1
            if not feed.put(Frame(name=str(number), read=partial(self._read))):
                return

    def _trigger(self) -> CronTrigger | None:
        if not self._settings.cron:
            return None
        try:
            return CronTrigger.from_crontab(self._settings.cron, timezone=timezone.utc)
        except ValueError as error:
            raise SourceFailed(f"cron {self._settings.cron!r}: {error}") from error

    def _wait(self, trigger: CronTrigger | None, feed: Feed) -> bool:
        """Wait for the next time; False when the pipeline stops."""
        if trigger is None:
            return not feed.stop.wait(self._settings.seconds)
        planned_at = _now()
        due = trigger.get_next_fire_time(None, planned_at)
        if due is None:
            raise SourceFailed(f"cron {self._settings.cron!r} names no time that is still to come")
        while _now() < due:
            if feed.stop.wait(STEP):
                return False
            if _now() < planned_at - timedelta(seconds=STEP):
                return self._wait(trigger, feed)  # the clock was set back
        return True

    def _read(self) -> bytes:
        settings = self._settings
        try:
            if settings.path:
                return read_file(Path(settings.path), self._cap)
            return run_once(settings.command, cap=self._cap, seconds=settings.timeout_seconds)
        except OSError as error:
            raise BadFrame(f"{settings.path}: {error.strerror}") from error
        except CannotStart as error:
            raise BadFrame(str(error)) from error


def _now() -> datetime:
    return datetime.fromtimestamp(time.time(), timezone.utc)
