"""Blocking work in threads; results are handed back to whoever runs the main loop."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

WORKERS = 2  # one for the model on its way, one for verifying a desired state meanwhile


class ThreadBackground:
    """Implements `agent.ports.Background`."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        """``post`` hands a callable to the main thread."""
        self._post = post
        self._pool = ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="background")

    def submit(self, name: str, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Run ``work`` in a thread; ``done`` gets its result on the main thread."""

        def run() -> None:
            try:
                self._post(partial(done, work()))
            except Exception:  # work promises not to raise; a bug must still be seen
                log.exception("background work %r failed", name)

        self._pool.submit(run)

    def stop(self) -> None:
        """Take no more work; what runs ends with the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
