"""Starts data plane processes on the listening sockets that control holds.

Implements `agent.ports.DataPlaneLauncher` with a real child process and a socket pair. When to start, restart or
drain one is decided by the supervisor.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from agent.channel import CHANNEL_FD, LISTEN_FDS, PARENT_PID, Answer, Channel, Order
from agent.listening import CannotListen, ListeningSockets, parse_tcp, without_activation

# One BLAS thread: its pool alone takes 40 MB. Two malloc arenas: with more, every swap leaves freed memory behind.
CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


class ChildDataPlane:
    """One running child. Its answers end with `ChannelClosed`; read them to the end before `wait`."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: Channel) -> None:
        """Take over a started process and control's end of its channel."""
        self._process = process
        self._channel = channel

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, order: Order) -> None:
        self._channel.send(order)

    def receive(self) -> Answer:
        return self._channel.receive_answer()

    def wait(self, timeout: float | None = None) -> int | None:
        try:
            returncode = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        self._channel.close()
        return returncode

    def kill(self) -> None:
        self._process.kill()


class DataPlaneProcesses:
    """Launches ``python -m agent.inference``."""

    def __init__(
        self,
        sockets: ListeningSockets,
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        """``options``: command line of the data plane, such as ``--instances 2``. The sockets stay the caller's."""
        self._sockets = sockets
        self._command = [python, "-m", "agent.inference", *options]
        self._environment = dict(os.environ if environment is None else environment)

    def launch(self) -> ChildDataPlane:
        ours, theirs = socket.socketpair()
        with theirs:
            listeners = self._sockets.filenos()
            try:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(*listeners, theirs.fileno()),
                    env=self._child_environment(listeners, theirs.fileno()),
                )
            except OSError:
                ours.close()
                raise
        return ChildDataPlane(process, Channel(ours))

    def _child_environment(self, listeners: Sequence[int], channel: int) -> dict[str, str]:
        return {
            **without_activation(self._environment),
            **CHILD_ENVIRONMENT,
            CHANNEL_FD: str(channel),
            LISTEN_FDS: ",".join(map(str, listeners)),
            PARENT_PID: str(os.getpid()),
        }


__all__ = ["CannotListen", "ChildDataPlane", "DataPlaneProcesses", "ListeningSockets", "parse_tcp"]
