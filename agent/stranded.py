"""Serves what served before on a device whose identity is damaged, until a person has put it in order. Wires its own.

Without its identity a device cannot talk to the fleet, nor know what the fleet wants; the models on its disk are
verified all the same, and local programs need their answers. So the data plane runs, ``edgewarden-agent status`` says
what is wrong with its remedy, and the identity is looked at again and again. The whole agent is `daemon.py`.
"""

import logging
import queue
import signal
from collections.abc import Callable
from pathlib import Path

from agent.adapters.data_plane import DataPlaneProcesses
from agent.adapters.identity import IdentityFolder
from agent.adapters.local_socket import LocalServer
from agent.adapters.model_store import FolderStore
from agent.adapters.systemd import notifier_from
from agent.channel import Refused
from agent.config import AgentSettings
from agent.daemon import configuration, data_plane_options, listening_sockets
from agent.local_api import SOCKET_NAME, AskStatus, Denied, LocalAnswer, LocalRequest, Status
from agent.ports import Trouble
from agent.supervisor import Event, Supervisor
from protocol import __version__

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between two looks at the identity


def trouble_with_identity(settings: AgentSettings) -> Trouble | None:
    """Return why this device's identity cannot be used, or None when it is whole."""
    try:
        IdentityFolder(Path(settings.device.state) / "identity").load()
    except Trouble as trouble:
        return trouble
    return None


def has_served(settings: AgentSettings) -> bool:
    """Tell whether there is something to serve: a device that was never enrolled has nothing."""
    return bool(FolderStore(Path(settings.device.state)).active())


class Stranded:
    """The data plane alone, and the local socket."""

    def __init__(self, settings: AgentSettings, trouble: Trouble, *, log_level: str) -> None:
        """Build everything; nothing runs before `run`. Raises `Trouble` and `CannotListen`."""
        state = Path(settings.device.state)
        self._settings = settings
        self._trouble = trouble
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._store = FolderStore(state)
        self._sockets = listening_sockets(settings)
        self._supervisor = Supervisor(
            launcher=DataPlaneProcesses(self._sockets, options=data_plane_options(settings.inference, log_level)),
            post=_hear,
            configuration=configuration(settings),
        )
        self._local = LocalServer(state / SOCKET_NAME, self._answer)

    def run(self) -> bool:
        """Serve; return True once the identity is whole again, False when told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._wake.put(False))
        log.error("%s", self._trouble)
        notifier = notifier_from()
        self._supervisor.start()
        self._local.start()
        for digest in self._store.active().values():
            if stored := self._store.find(digest):
                self._supervisor.serve(0, stored)
        notifier.ready()
        notifier.status(str(self._trouble))
        try:
            return self._wait(notifier.alive)
        finally:
            self._local.close()
            self._supervisor.stop()
            self._sockets.close()

    def _wait(self, alive: Callable[[], None]) -> bool:
        while True:
            try:
                return self._wake.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                alive()
            trouble = trouble_with_identity(self._settings)
            if trouble is None:
                log.info("the identity is whole again")
                return True
            self._trouble = trouble

    def _answer(self, asked: LocalRequest, reply: Callable[[LocalAnswer], None]) -> None:
        if not isinstance(asked, AskStatus):
            reply(Denied(why=f"without its identity this device only serves: {self._trouble}"))
            return
        status = Status(
            device="unknown",
            agent=__version__,
            boot="",
            connected=False,
            server_up=False,
            spooled_events=0,
            spooled_reports=0,
            dropped_reports=0,
            data_plane=self._supervisor.pid,
            trouble=str(self._trouble),
        )
        reply(status)


def _hear(told: Event) -> None:
    if isinstance(told, Refused):
        log.error("%s does not serve: %s", told.model, told.reason)
