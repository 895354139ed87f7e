"""Tries a candidate in a short-lived child, and turns whatever becomes of the child into a verdict.

Implements `agent.ports.Trials`. The child limits its own memory and CPU; its time is bounded here, and so is what is
read from it. A child that hangs, dies, or says nothing sensible is a failed verdict that names how it ended.
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

import msgspec

from agent.adapters.data_plane import CHILD_ENVIRONMENT
from agent.channel import PARENT_PID, TrialRequest, TrialVerdict
from agent.listening import without_activation
from agent.ports import Target
from protocol.states import RejectReason

MAX_ANSWER = 64 * 1024  # bytes of standard output
KEPT_ERRORS = 2000  # last bytes of standard error that go into the verdict's detail
CHUNK = 16 * 1024
WALL_SECONDS = 60.0
CPU_SECONDS = 30
MEMORY_FACTOR = 2  # over what the packer measured: another machine and another runtime take more
MEMORY_MARGIN = 16 * 1024 * 1024  # bytes
SELFTEST_FAILED = RejectReason.SELFTEST_FAILED.value


@dataclass(kw_only=True)
class _Heard:
    """What the child wrote before it ended or was ended."""

    answer: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    ended_for: str = ""  # why it was killed, if it was


class TrialChild:
    """Runs ``python -m agent.inference.trial``."""

    def __init__(
        self,
        *,
        runtime: str = "auto",
        wall_seconds: float = WALL_SECONDS,
        ladder_seconds: float = 0.0,
        cpu_seconds: int = CPU_SECONDS,
        memory_factor: int = MEMORY_FACTOR,
        memory_margin: int = MEMORY_MARGIN,
        python: str = sys.executable,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``runtime``: ``auto`` or the one this device is set to; ``ladder_seconds``: see `TrialRequest`."""
        self._runtime = runtime
        self._wall_seconds = wall_seconds
        self._ladder_seconds = ladder_seconds
        self._cpu_seconds = cpu_seconds
        self._memory_factor = memory_factor
        self._memory_margin = memory_margin
        self._command = [python, "-m", "agent.inference.trial"]
        self._clock = clock

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:
        request = self._request(bundle, folder, target)
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment(),
        ) as child:
            heard = self._converse(child, msgspec.json.encode(request))
        return self._judge(child.returncode, heard)

    def _request(self, bundle: str, folder: str, target: Target) -> TrialRequest:
        release = target.release
        return TrialRequest(
            bundle=bundle,
            folder=folder,
            task=release.task,
            runtime=self._runtime,
            memory_bytes=release.needs.memory * self._memory_factor + self._memory_margin,
            cpu_seconds=self._cpu_seconds,
            model=release.model,
            version=release.version,
            variant=release.variant,
            ladder_seconds=self._ladder_seconds,
        )

    def _environment(self) -> dict[str, str]:
        return {**without_activation(os.environ), **CHILD_ENVIRONMENT, PARENT_PID: str(os.getpid())}

    # ------------------------------------------------------------ listening to the child
    def _converse(self, child: "subprocess.Popen[bytes]", request: bytes) -> _Heard:
        heard = _Heard()
        try:
            _tell(child, request)
            self._listen(child, heard)
        finally:
            if heard.ended_for or child.poll() is None:
                child.kill()
        return heard

    def _listen(self, child: "subprocess.Popen[bytes]", heard: _Heard) -> None:
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
        self, child: "subprocess.Popen[bytes]", ready: selectors.BaseSelector, heard: _Heard, deadline: float
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

    def _await_end(self, child: "subprocess.Popen[bytes]", heard: _Heard, deadline: float) -> None:
        try:
            child.wait(max(0.0, deadline - self._clock()))
        except subprocess.TimeoutExpired:
            heard.ended_for = self._out_of_time()

    def _out_of_time(self) -> str:
        return f"it was not done within {self._wall_seconds:g} s"

    # ------------------------------------------------------------ judging
    def _judge(self, returncode: int, heard: _Heard) -> TrialVerdict:
        if heard.ended_for:
            return _failed(f"the trial was ended: {heard.ended_for}")
        if returncode != 0:
            return _failed(f"the trial {self._cause(returncode)}{_last_line(heard.errors)}")
        try:
            return msgspec.json.decode(bytes(heard.answer), type=TrialVerdict)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _failed("the trial ended without a verdict")

    def _cause(self, returncode: int) -> str:
        if returncode > 0:
            return f"ended with {returncode}"
        if -returncode == signal.SIGXCPU:
            return f"used up its {self._cpu_seconds} s of CPU time"
        try:
            return f"died of {signal.Signals(-returncode).name}"
        except ValueError:
            return f"died of signal {-returncode}"


def _tell(child: "subprocess.Popen[bytes]", request: bytes) -> None:
    stream: IO[bytes] | None = child.stdin
    if stream is None:
        return
    try:
        stream.write(request)
        stream.close()
    except BrokenPipeError:
        return  # it died at its start; its exit code says more


def _failed(detail: str) -> TrialVerdict:
    return TrialVerdict(passed=False, reason=SELFTEST_FAILED, detail=detail)


def _last_line(errors: bytearray) -> str:
    said = errors.decode(errors="replace").strip().splitlines()
    lines = [line for line in said if not line.startswith("INFO")]  # the runtimes greet there
    return f": {lines[-1]}" if lines else ""
