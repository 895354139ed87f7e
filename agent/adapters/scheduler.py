"""Recurring jobs of the control process. The only importer of APScheduler.

Jobs run in a small pool of threads, so they post to the control queue rather than do work. A job that is late is run
once, not once per missed time; a job that is still running is not started again; one that fails is logged and runs
again at its next time.

APScheduler plans by the wall clock, and a device's clock jumps: it wakes in 1970 and is set right by NTP. With the
stock interval trigger a jump forward lists every second since 1970 (minutes of work, gigabytes), and a jump backward
leaves all jobs waiting for years. `SteadyInterval` and `SteadyJobs` keep the interval through both.
"""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

log = logging.getLogger(__name__)

_THREADS = 2  # jobs only post or poll; the second keeps one slow poll from delaying the watchdog


class Scheduler:
    """Runs actions at fixed intervals until stopped."""

    def __init__(self) -> None:
        """Start the scheduler's thread."""
        # UTC: intervals need no zone, and a device without /etc/localtime must not fail here.
        self._jobs = BackgroundScheduler(
            timezone="UTC",
            jobstores={"default": SteadyJobs()},
            executors={"default": ThreadPoolExecutor(_THREADS)},
        )
        self._jobs.start()

    def every(self, seconds: float, name: str, action: Callable[[], None]) -> None:
        """Run ``action`` every ``seconds``, for the first time after one interval. The same name replaces the job."""
        self._jobs.add_job(
            _logged(name, action),
            SteadyInterval(timedelta(seconds=seconds)),
            id=name,
            name=name,
            replace_existing=True,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,  # however late (suspend, a jump of the clock): run once, now
        )

    def stop(self) -> None:
        """Start no more jobs and wait for the running ones."""
        self._jobs.shutdown(wait=True)


class SteadyInterval(BaseTrigger):  # type: ignore[misc]  # APScheduler has no type information
    """Fires one interval after the last time, or after now when that has been missed by more than an interval."""

    __slots__ = ("interval",)

    def __init__(self, interval: timedelta) -> None:
        """``interval``: between two runs."""
        self.interval = interval

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """Answer APScheduler's question; at most two answers lie before any ``now``."""
        if previous_fire_time is None or abs(now - previous_fire_time) > 2 * self.interval:
            return now + self.interval
        return previous_fire_time + self.interval


class SteadyJobs(MemoryJobStore):  # type: ignore[misc]  # APScheduler has no type information
    """Jobs in memory; one that lies further ahead than its interval is due, because the clock went back."""

    def get_due_jobs(self, now: datetime) -> list[object]:
        """Return the jobs to run now, after pulling back those that a clock set back has put out of reach."""
        for job in self.get_all_jobs():
            if job.next_run_time - now > 2 * job.trigger.interval:
                job.next_run_time = now
                self.update_job(job)
        due: list[object] = super().get_due_jobs(now)
        return due


def _logged(name: str, action: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            action()
        except Exception:
            log.exception("job %s failed; it runs again at its next time", name)

    return run
