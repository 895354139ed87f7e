"""What passes between the parts of a pipeline: frames, the place where they wait, and how a part is faring.

Knows no source and no sink. Everything that waits is bounded, and what is thrown away is counted.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol

import numpy.typing as npt

Data = bytes | npt.NDArray[Any]  # an array is a picture: height, width, RGB


class Outcome(Enum):
    """What became of a frame."""

    USED = "used"
    DROPPED = "dropped"  # a newer one took its place
    BAD = "bad"  # it cannot be what the model takes


class BadFrame(Exception):
    """A frame is not what this pipeline is told to expect; the next one may be."""


class SourceFailed(Exception):
    """A source cannot go on and is started again later."""


class SinkFailed(Exception):
    """A result was not delivered; trying again later may help. ``wait``: seconds that the other side asked for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        """Carry the sentence that is shown."""
        super().__init__(message)
        self.wait = wait


class Undeliverable(SinkFailed):
    """Trying this result again cannot help."""


def _nothing(_: Outcome) -> None:
    return


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One thing to ask the model about. It is read when its turn comes, so that waiting costs no memory."""

    name: str  # for people: a file name, a topic, a number
    read: Callable[[], Data]  # raises `BadFrame`
    settle: Callable[[Outcome], None] = _nothing  # called once


def ready_frame(name: str, data: bytes) -> Frame:
    """Return a frame whose bytes are here already."""
    return Frame(name=name, read=lambda: data)


class Feed(Protocol):
    """What a source is given."""

    stop: threading.Event

    def up(self) -> None:
        """Say that the source works: the folder is there, the broker has answered."""

    def put(self, frame: Frame) -> bool:
        """Hand over a frame, waiting for room if nothing may be dropped; False when the pipeline stops."""


class Source(Protocol):
    """Where frames come from."""

    def run(self, feed: Feed) -> None:
        """Hand over frames until ``feed.stop``; raise `SourceFailed`."""


class Sink(Protocol):
    """Where results go. Used by one thread."""

    def deliver(self, record: bytes) -> None:
        """Deliver one JSON object; raise `SinkFailed`."""

    def close(self) -> None:
        """Let go of everything; `deliver` may come again."""


class Mailbox:
    """Where frames wait. One that holds only the latest drops what waits; any other makes the source wait."""

    def __init__(self, size: int, *, latest: bool) -> None:
        """``size`` is of no meaning when only the latest counts."""
        self._latest = latest
        self._size = 1 if latest else size
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self.dropped = 0

    def put(self, frame: Frame, timeout: float) -> bool:
        """Hand over a frame; False when there was no room in time."""
        pushed_out = None
        with self._changed:
            if self._latest and self._frames:
                pushed_out = self._frames.popleft()
                self.dropped += 1
            elif not self._changed.wait_for(lambda: len(self._frames) < self._size, timeout):
                return False
            self._frames.append(frame)
            self._changed.notify_all()
        if pushed_out is not None:
            pushed_out.settle(Outcome.DROPPED)
        return True

    def take(self, timeout: float) -> Frame | None:
        """Return the next frame, or None when none came in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._frames, timeout):
                return None
            frame = self._frames.popleft()
            self._changed.notify_all()
            return frame

    def __len__(self) -> int:
        return len(self._frames)


Working = Literal["starting", "running", "failing", "stopped"]


class Health:
    """How a source or a sink is faring. Written by its own thread, read by any."""

    def __init__(self) -> None:
        self.state: Working = "starting"
        self.error = ""  # the last one, also when all is well again
        self.restarts = 0
        self.failures = 0  # in a row

    def up(self) -> None:
        """It works."""
        self.state = "running"
        self.failures = 0

    def failed(self, error: str) -> None:
        """It does not work just now."""
        self.state = "failing"
        self.error = error[:500]
        self.failures += 1
