"""Starts the demo's programs, restarts those that die (as systemd would), and leaves none behind.

Knows commands and logs; what the programs are for is `story.py`'s.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

STOP_SECONDS = 15.0  # the server drains its web, its ingest and its broker
RESTART_SECONDS = 0.5


@dataclass
class Program:
    """One program that should run until the demo ends."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    wanted: bool = True
    exits: list[int] = field(default_factory=list)


class Programs:
    """The demo's programs, watched by one thread."""

    def __init__(self, logs: Path) -> None:
        """``logs``: folder for one log file per program."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._programs: dict[str, Program] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch programs", daemon=True)
        self._watcher.start()

    def start(
        self, name: str, module: str, *arguments: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> Program:
        """Start ``python -m module arguments…`` and keep it running; ``environment`` is added to ours."""
        program = Program(
            name=name,
            command=[sys.executable, "-m", module, *arguments],
            environment={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            log=self._logs / f"{name}.log",
        )
        with self._lock:
            self._programs[name] = program
            self._launch(program)
        return program

    def pid(self, name: str) -> int:
        """Return the process id of a running program."""
        process = self._programs[name].process
        assert process is not None
        return process.pid

    def kill(self, name: str, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill a program as a fault would; the watcher starts it again."""
        os.kill(self.pid(name), sig)

    def stop(self, name: str) -> None:
        """Ask a program to end, for good; kill it if it does not."""
        with self._lock:
            program = self._programs[name]
            program.wanted = False
            if program.process and program.process.poll() is None:
                program.process.terminate()
            _end(program, time.monotonic() + STOP_SECONDS)

    def stop_all(self) -> None:
        """Ask all programs to end, agents first, and kill what does not."""
        self._ending.set()
        self._watcher.join()
        with self._lock:
            for program in reversed(self._programs.values()):
                program.wanted = False
                if program.process and program.process.poll() is None:
                    program.process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for program in self._programs.values():
                _end(program, deadline)

    def tail(self, name: str, lines: int = 15) -> str:
        """Return the end of a program's log, for a failed step."""
        try:
            return "\n".join(self._programs[name].log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def _launch(self, program: Program) -> None:
        with program.log.open("ab") as log:
            program.process = subprocess.Popen(
                program.command,
                env=program.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends them in order
            )
        program.starts += 1

    def _watch(self) -> None:
        while not self._ending.wait(RESTART_SECONDS):
            with self._lock:
                for program in self._programs.values():
                    code = program.process.poll() if program.process else None
                    if code is not None and program.wanted:
                        program.exits.append(code)
                        self._launch(program)


def _end(program: Program, deadline: float) -> None:
    if program.process is None:
        return
    try:
        program.process.wait(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        program.process.kill()
        program.process.wait()
