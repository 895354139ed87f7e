"""Programs that a pipeline starts: they give frames, take results, or are run for one frame.

A program lives no longer than the thread that started it (the kernel sees to that), never gets a shell, and what it
writes is read under a cap. When to start one again is decided by the pipeline.
"""

import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from agent.core.pipelines import ExecSink, ExecSource
from agent.inference.pipelines.flow import BadFrame, Feed, SinkFailed, SourceFailed, ready_frame

CHUNK = 64 * 1024
TAKE_SECONDS = 10.0  # a sink's program that has not read a result by then is started again
LEAVE_SECONDS = 1.0  # between the end of its input and the end of a program
TICK = 0.25
_LENGTH = struct.Struct(">I")
# The kernel kills the program when its starter's thread ends; set by a step that then becomes the program.
_LEASH = "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,ctypes.c_ulong(9));os.execvp(sys.argv[1],sys.argv[1:])"


class CannotStart(Exception):
    """A program cannot be started; the message names it."""


class ExecFrames:
    """Implements `flow.Source` with a program's standard output."""

    def __init__(self, settings: ExecSource, cap: int) -> None:
        """``cap``: bytes of the longest line or frame."""
        self._command = settings.command
        self._split = split_lines if settings.framing == "lines" else split_lengths
        self._cap = cap

    def run(self, feed: Feed) -> None:
        """Hand over what the program writes; raise `SourceFailed` when it ends or writes what it should not."""
        try:
            with started(self._command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
                feed.up()
                assert process.stdout is not None
                self._read(process.stdout, feed)
                if not feed.stop.is_set():
                    raise SourceFailed(_ending(self._command, process))
        except CannotStart as error:
            raise SourceFailed(str(error)) from error

    def _read(self, stream: IO[bytes], feed: Feed) -> None:
        pending, number = bytearray(), 0
        while not feed.stop.is_set():
            if not select.select([stream], [], [], TICK)[0]:
                continue
            chunk = os.read(stream.fileno(), CHUNK)
            pending += chunk
            try:
                for data in self._split(pending, self._cap):
                    number += 1
                    if not feed.put(ready_frame(f"{number}", data)):
                        return
            except ValueError as error:
                raise SourceFailed(f"{self._command[0]}: {error}") from error
            if not chunk:
                return


class ExecDelivery:
    """Implements `flow.Sink` with a program's standard input."""

    def __init__(self, settings: ExecSink, *, take_seconds: float = TAKE_SECONDS) -> None:
        """Start nothing before the first result."""
        self._command = settings.command
        self._take_seconds = take_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def deliver(self, record: bytes) -> None:
        """Write one line; raise `SinkFailed` when the program has ended or does not read."""
        try:
            process = self._process = self._process or start(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        except CannotStart as error:
            raise SinkFailed(str(error)) from error
        assert process.stdin is not None
        try:
            write_all(process.stdin, record + b"\n", self._take_seconds)
        except (OSError, TimeoutError) as error:
            self._drop()
            raise SinkFailed(f"{self._command[0]}: {error}") from error

    def close(self) -> None:
        """End the program's input, and the program if it does not end by itself."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_SECONDS)
        self._drop()

    def _drop(self) -> None:
        if self._process is not None:
            end(self._process)
        self._process = None


def run_once(command: Sequence[str], *, given: bytes = b"", cap: int, seconds: float) -> bytes:
    """Return what a program prints; raise `BadFrame` when it fails, is slow, or prints too much."""
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + seconds
        assert process.stdin is not None
        assert process.stdout is not None
        output = _exchange(process.stdin, process.stdout, given, cap, deadline)
        if output is None:
            raise BadFrame(f"{command[0]} printed more than {cap} bytes, or was slower than {seconds:g} s")
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise BadFrame(f"{command[0]} did not end within {seconds:g} s") from None
    if code != 0:
        raise BadFrame(f"{command[0]} ended with code {code}")
    return output


# ---------------------------------------------------------------- splitting
def split_lines(pending: bytearray, cap: int) -> Iterator[bytes]:
    """Take whole lines out of what was read; raise ValueError at one over the cap. Empty ones are left out."""
    while (at := pending.find(b"\n")) >= 0:
        line = bytes(pending[:at]).rstrip(b"\r")
        del pending[: at + 1]
        if len(line) > cap:
            raise ValueError(f"a line is longer than the {cap} bytes of max_frame")
        if line:
            yield line
    if len(pending) > cap:
        raise ValueError(f"a line is longer than the {cap} bytes of max_frame")


def split_lengths(pending: bytearray, cap: int) -> Iterator[bytes]:
    """Take whole frames out of what was read; raise ValueError at one that announces more than the cap."""
    while len(pending) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(pending)
        if length > cap:
            raise ValueError(f"a frame of {length} bytes is over the {cap} of max_frame")
        if len(pending) < _LENGTH.size + length:
            return
        data = bytes(pending[_LENGTH.size : _LENGTH.size + length])
        del pending[: _LENGTH.size + length]
        yield data


# ---------------------------------------------------------------- starting and ending
def start(command: Sequence[str], *, stdin: int, stdout: int) -> "subprocess.Popen[bytes]":
    """Start a program on a leash; raise `CannotStart`."""
    if shutil.which(command[0]) is None:
        raise CannotStart(f"{command[0]}: there is no such program, or it may not be run")
    leash = [sys.executable, "-I", "-S", "-c", _LEASH, *command]
    try:
        return subprocess.Popen(leash, stdin=stdin, stdout=stdout, bufsize=0, start_new_session=True)
    except OSError as error:
        raise CannotStart(f"{command[0]}: {error.strerror}") from error


@contextmanager
def started(command: Sequence[str], *, stdin: int, stdout: int) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a program; it has ended when the block has."""
    process = start(command, stdin=stdin, stdout=stdout)
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a program and those it started, if they are still there, and close its pipes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # what was not written is lost
                stream.close()


def _ending(command: Sequence[str], process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{command[0]} closed its output"
    return f"{command[0]} ended with code {code}"


# ---------------------------------------------------------------- pipes that may be stuck
def write_all(stream: IO[bytes], data: bytes, seconds: float) -> None:
    """Write everything; raise TimeoutError when the reader does not read, OSError when it is gone."""
    os.set_blocking(stream.fileno(), False)
    view, deadline = memoryview(data), time.monotonic() + seconds
    while view:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([], [stream], [], left)[1]:
            raise TimeoutError(f"it does not read its standard input: {len(view)} bytes wait since {seconds:g} s")
        view = view[_write_some(stream, view) :]


def _write_some(stream: IO[bytes], view: memoryview) -> int:
    try:
        return os.write(stream.fileno(), view[:CHUNK])
    except BlockingIOError:
        return 0


def _exchange(stdin: IO[bytes], stdout: IO[bytes], given: bytes, cap: int, deadline: float) -> bytes | None:
    """Write and read at once, for the program may do so too; None when it is over the cap or the deadline."""
    os.set_blocking(stdin.fileno(), False)
    output, view = bytearray(), memoryview(given)
    writing = _next_writing(stdin, view)
    while (left := deadline - time.monotonic()) > 0:
        readable, writable, _ = select.select([stdout], writing, [], left)
        if writable:
            view = view[_write_or_all(stdin, view) :]
            writing = _next_writing(stdin, view)
        if readable:
            chunk = os.read(stdout.fileno(), CHUNK)
            output += chunk
            if not chunk:
                return bytes(output)
            if len(output) > cap:
                return None
    return None


def _next_writing(stdin: IO[bytes], view: memoryview) -> list[IO[bytes]]:
    if view:
        return [stdin]
    stdin.close()
    return []


def _write_or_all(stdin: IO[bytes], view: memoryview) -> int:
    """Return how much was written; a program that does not want its input is done with it."""
    try:
        return _write_some(stdin, view)
    except BrokenPipeError:
        return len(view)
