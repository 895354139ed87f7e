"""A short-lived child under limits: asked once on standard input, heard until it ends, and never believed to end.

The child limits its own memory and CPU; its time is bounded here, and so is what is read from it. What its answer
means is its caller's business.
"""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from agent.adapters.data_plane import CHILD_ENVIRONMENT
from agent.channel import PARENT_PID
from agent.listening import without_activation

MAX_ANSWER = 64 * 1024  # bytes of standard output
KEPT_ERRORS = 2000  # last bytes of standard error
CHUNK = 16 * 1024


@dataclass(kw_only=True)
class Heard:
    """What the child wrote before it ended or was ended."""

    answer: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    ended_for: str = ""  # why it was killed, if it was
    returncode: int = 0

    def trouble(self, cpu_seconds: int) -> str:
        """Return how it came to a bad end, or nothing when it ended well."""
        if self.ended_for:
            return f"was ended: {self.ended_for}"
        if self.returncode != 0:
            return f"{_cause(self.returncode, cpu_seconds)}{_last_line(self.errors)}"
        return ""


class LimitedChild:
    """Runs ``python -m MODULE``, one at each call."""

    def __init__(
        self,
        module: str,
        *,
        wall_seconds: float,
        python: str = sys.executable,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` gives seconds that only grow."""
        self._command = [python, "-m", module]
        self._wall_seconds = wall_seconds
        self._clock = clock

    def ask(self, request: bytes) -> Heard:
        """Start one, tell it the request, and wait for its end."""
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**without_activation(os.environ), **CHILD_ENVIRONMENT, PARENT_PID: str(os.getpid())},
        ) as child:
            heard = self._converse(child, request)
        heard.returncode = child.returncode
        return heard

    def _converse(self, child: "subprocess.Popen[bytes]", request: bytes) -> Heard:
        heard = Heard()
        try:
            _tell(child, request)
            self._listen(child, heard)
        finally:
            if heard.ended_for or child.poll() is None:
                child.kill()
        return heard

    def _listen(self, child: "subprocess.Popen[bytes]", heard: Heard) -> None:
        """Read both streams until they end, the time is over, or too much came; then wait for the child's end."""
        deadline = self._clock() + self._wall_seconds
        with selectors.DefaultSelector() as ready:
            for stream in (child.stdout, child.stderr):
                if stream:
                    ready.register(stream, selectors.EVENT_READ)
            while ready.get_map() and not heard.ended_for:
                self._listen_once(child, ready, heard, deadline)
        if not heard.ended_for:
            self._await_end(child, heard, deadline)

    def _listen_once(
        self, child: "subprocess.Popen[bytes]", ready: selectors.BaseSelector, heard: Heard, deadline: float
    ) -> None:
        left = deadline - self._clock()
        if left <= 0:
            heard.ended_for = self._out_of_time()
            return
        for key, _ in ready.select(left):
            chunk = os.read(key.fd, CHUNK)
            if not chunk:
                ready.unregister(key.fileobj)
            elif key.fileobj is child.stdout:
                heard.answer += chunk
            else:
                heard.errors = (heard.errors + chunk)[-KEPT_ERRORS:]
        if len(heard.answer) > MAX_ANSWER:
            heard.ended_for = f"it wrote more than {MAX_ANSWER} bytes"

    def _await_end(self, child: "subprocess.Popen[bytes]", heard: Heard, deadline: float) -> None:
        try:
            child.wait(max(0.0, deadline - self._clock()))
        except subprocess.TimeoutExpired:
            heard.ended_for = self._out_of_time()

    def _out_of_time(self) -> str:
        return f"it was not done within {self._wall_seconds:g} s"


def _tell(child: "subprocess.Popen[bytes]", request: bytes) -> None:
    stream: IO[bytes] | None = child.stdin
    if stream is None:
        return
    try:
        stream.write(request)
        stream.close()
    except BrokenPipeError:
        return  # it died at its start; its exit code says more


def _cause(returncode: int, cpu_seconds: int) -> str:
    if returncode > 0:
        return f"ended with {returncode}"
    if -returncode == signal.SIGXCPU:
        return f"used up its {cpu_seconds} s of CPU time"
    try:
        return f"died of {signal.Signals(-returncode).name}"
    except ValueError:
        return f"died of signal {-returncode}"


def _last_line(errors: bytearray) -> str:
    said = errors.decode(errors="replace").strip().splitlines()
    lines = [line for line in said if not line.startswith("INFO")]  # the runtimes greet there
    return f": {lines[-1]}" if lines else ""
