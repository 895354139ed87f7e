"""All pipelines of this process: started and stopped together, asked about over HTTP, counted in ``/metrics``.

While a planned restart lets two data planes live at once, only one of them runs the pipelines: the folder's lock
tells them apart, and the kernel frees it however a process ends.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.inference.pipelines.flow import ready_frame

if TYPE_CHECKING:  # where no pipeline is configured, what they are made of is not imported
    from agent.inference.pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)

LOCK = "pipelines.lock"
LOCK_SECONDS = 0.1  # between two tries


class UnknownPipeline(Exception):
    """There is no such pipeline; the message names those that are."""


class NotPushed(Exception):
    """This pipeline's frames come from elsewhere."""


class NoRoom(Exception):
    """A frame was not taken; later there may be room."""


class Pipelines:
    """Implements nothing; wires pipelines to a process."""

    def __init__(self, pipelines: "Sequence[Pipeline]", state: Path | None = None) -> None:
        """``state``: folder whose lock is shared with the process that comes before or after this one."""
        self._pipelines = {one.settings.name: one for one in pipelines}
        self._state = state
        self._stop = threading.Event()
        self._starter: threading.Thread | None = None
        self._lock: int | None = None

    # ------------------------------------------------------------ life
    def start(self) -> None:
        """Start them in the background, as soon as no other process runs them."""
        if self._pipelines and self._starter is None:
            self._starter = threading.Thread(target=self._start_all, name="pipelines", daemon=True)
            self._starter.start()

    def stop_soon(self) -> None:
        """Have no more frames taken; returns at once."""
        self._stop.set()
        for one in self._pipelines.values():
            one.stop.set()

    def finish(self) -> None:
        """Stop them and wait for that."""
        self.stop_soon()
        if self._starter is not None:
            self._starter.join()
            for one in self._pipelines.values():
                one.finish()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _start_all(self) -> None:
        if self._state is not None and not self._acquire(self._state / LOCK):
            return
        for one in self._pipelines.values():
            if not self._stop.is_set():
                one.start()
        log.info("%d pipelines run", len(self._pipelines))

    def _acquire(self, path: Path) -> bool:
        """Wait for the lock; False when stopped before."""
        try:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.error("%s cannot be opened (%s); pipelines run without it", path, error.strerror)
            return True
        while not self._stop.is_set():
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._stop.wait(LOCK_SECONDS)
            else:
                return True
        return False

    # ------------------------------------------------------------ for local programs
    def describe(self) -> list[dict[str, Any]]:
        """Return how each is faring."""
        return [one.describe() for one in self._pipelines.values()]

    def find(self, name: str) -> "Pipeline":
        """Return a pipeline; raise `UnknownPipeline`."""
        found = self._pipelines.get(name)
        if found is None:
            known = ", ".join(self._pipelines) or "none"
            raise UnknownPipeline(f"there is no pipeline {name[:80]!r} here; those that are: {known}")
        return found

    def pushed(self, name: str) -> "Pipeline":
        """Return a pipeline that takes frames from local programs; raise `UnknownPipeline` or `NotPushed`."""
        found = self.find(name)
        if (kind := found.settings.source.__struct_config__.tag) != "http":
            raise NotPushed(f"pipeline {name} takes its frames from its {kind} source")
        return found

    def push(self, name: str, data: bytes) -> None:
        """Give a pipeline a frame; raise `NoRoom`."""
        found = self.pushed(name)
        if not found.offer(ready_frame("pushed", data)):
            raise NoRoom(f"{len(found.mailbox)} frames wait already for pipeline {name}")

    # ------------------------------------------------------------ metrics
    def metrics(self) -> Iterator[str]:
        """Return Prometheus lines."""
        if not self._pipelines:
            return
        for name, text, value in _COUNTERS:
            yield from (f"# HELP {name} {text}", f"# TYPE {name} counter")
            for one in self._pipelines.values():
                yield f'{name}{{pipeline="{one.settings.name}"}} {value(one)}'
        yield from ("# HELP edgewarden_pipeline_up Whether the pipeline runs", "# TYPE edgewarden_pipeline_up gauge")
        for one in self._pipelines.values():
            yield f'edgewarden_pipeline_up{{pipeline="{one.settings.name}"}} {int(one.state == "running")}'
        for name, text, attribute in _SINK_COUNTERS:
            yield from (f"# HELP {name} {text}", f"# TYPE {name} counter")
            for one in self._pipelines.values():
                for number, sink in enumerate(one.deliveries):
                    labels = f'pipeline="{one.settings.name}",sink="{number}",kind="{sink.kind}"'
                    yield f"{name}{{{labels}}} {getattr(sink, attribute)}"


_COUNTERS: "tuple[tuple[str, str, Callable[[Pipeline], int]], ...]" = (
    ("edgewarden_pipeline_frames", "Frames that came from the source", lambda one: one.frames),
    ("edgewarden_pipeline_answered", "Frames that the model answered", lambda one: one.answered),
    ("edgewarden_pipeline_dropped", "Frames that a newer one pushed out", lambda one: one.mailbox.dropped),
    ("edgewarden_pipeline_bad", "Frames that could not be used", lambda one: one.bad),
    ("edgewarden_pipeline_refused", "Times that the model had no room", lambda one: one.refused),
    ("edgewarden_pipeline_failed", "Frames that the model failed on", lambda one: one.failed),
    ("edgewarden_pipeline_source_restarts", "Times the source was started again", lambda one: one.health.restarts),
)
_SINK_COUNTERS = (
    ("edgewarden_pipeline_sink_delivered", "Results delivered", "delivered"),
    ("edgewarden_pipeline_sink_dropped", "Results thrown away", "dropped"),
    ("edgewarden_pipeline_sink_failures", "Attempts to deliver that failed", "failures"),
)
