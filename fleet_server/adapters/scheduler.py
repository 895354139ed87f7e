"""Runs jobs at intervals. The only importer of APScheduler; what a job does is its driver's."""

import logging
from collections.abc import Callable
from datetime import datetime, timezone

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

_log = logging.getLogger(__name__)


class Jobs:
    """Jobs at intervals, none twice at the same time; a failed run is logged, and the next one comes."""

    def __init__(self) -> None:
        self._scheduler = BackgroundScheduler(
            timezone=timezone.utc,
            executors={"default": ThreadPoolExecutor(2)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    def every(self, seconds: float, name: str, job: Callable[[], object], *, at_once: bool = False) -> None:
        """Run a job at an interval; ``at_once`` runs it at the start too."""
        # APScheduler reads "no next run" as "paused", so the argument is left out when it is not wanted.
        first = {"next_run_time": datetime.now(timezone.utc)} if at_once else {}
        self._scheduler.add_job(_logged(name, job), "interval", seconds=seconds, id=name, name=name, **first)

    def start(self) -> None:
        """Begin."""
        self._scheduler.start()

    def stop(self) -> None:
        """End; waits for jobs that run."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)


def _logged(name: str, job: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        try:
            job()
        except Exception:  # noqa: BLE001 - a job that fails must come again, and people must hear of it
            _log.exception("the job %s failed", name)

    return run
