"""Many simulated devices in one process, stepped by one thread; each has its own connection to the broker.

Needs one enrolled identity per device (the folders that ``edgewarden-agent enroll`` makes), because the broker knows
devices by their certificates. What a device does stands in `simulator.device`.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent.adapters.connection_counter import ConnectionCounter
from agent.adapters.identity import Identity, IdentityFolder
from agent.adapters.mqtt import BrokerSettings, Ears, MqttUplink, Words
from agent.core.retry import BackOff
from agent.ports import EVENTS, TELEMETRY, Trouble
from simulator.device import Connect, Scene, SimulatedDevice

log = logging.getLogger(__name__)

STEP = 1.0  # seconds; as often as the agent's own tick


class Fleet:
    """Simulated devices that live and end together."""

    def __init__(self, devices: Sequence[SimulatedDevice]) -> None:
        """``devices``: not started yet."""
        self.devices = tuple(devices)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start all devices; stop all that were started, whatever happens in between."""
        started: list[SimulatedDevice] = []
        try:
            for device in self.devices:
                device.start()
                started.append(device)
            yield
        finally:
            for device in started:
                device.stop()

    def step(self) -> None:
        """Let every device do what is due."""
        for device in self.devices:
            device.step()

    def run(self, until: Callable[[], bool], *, wait: Callable[[float], object] = time.sleep) -> None:
        """Step once a second until told to end."""
        while not until():
            began = time.monotonic()
            self.step()
            wait(max(0.0, STEP - (time.monotonic() - began)))

    def backlog(self) -> int:
        """Return how many records the server has not acknowledged."""
        return sum(device.spool.depth(stream) for device in self.devices for stream in (TELEMETRY, EVENTS))


def identities_in(folder: Path, count: int | None = None) -> list[Identity]:
    """Load the identities under ``folder``, one per sub-folder, by name; raise `Trouble` when there are too few."""
    folders = [IdentityFolder(place) for path in sorted(folder.iterdir()) if (place := _identity_place(path))]
    enrolled = [each.load() for each in folders if each.enrolled()]
    if not enrolled or (count is not None and len(enrolled) < count):
        raise Trouble(
            f"{folder} holds {len(enrolled)} enrolled identities, and {count or 1} are needed",
            remedy="Enrol each with `edgewarden-agent enroll`, with a folder of its own under it",
        )
    return enrolled[:count]


def device_of(
    identity: Identity, scene: Scene, *, now: Callable[[], int], keepalive: int = 60, will_delay: int = 30
) -> SimulatedDevice:
    """Return the simulated device that connects with a real identity."""
    return SimulatedDevice(
        device=identity.device, scene=scene, connect=_connect(identity, keepalive, will_delay), now=now
    )


def _connect(identity: Identity, keepalive: int, will_delay: int) -> Connect:
    broker = BrokerSettings(
        host=identity.settings.broker_host,
        port=identity.settings.broker_port,
        keepalive=keepalive,
        will_delay=will_delay,
        back_off=BackOff(first=1.0, ceiling=30.0),
    )

    def connect(words: Words, ears: Ears) -> MqttUplink:
        return MqttUplink(
            device=identity.device,
            broker=broker,
            tls=identity.broker_tls,
            next_connection=ConnectionCounter(_counter_file(identity)).next,
            random=random.random,
            words=words,
            ears=ears,
        )

    return connect


def _counter_file(identity: Identity) -> Path:
    """Return the agent's own counter when the folder is an agent's: connection numbers must never go back."""
    folder = identity.folder
    return (folder.parent if folder.name == "identity" else folder) / "connections"


def _identity_place(path: Path) -> Path | None:
    """Return where in a device's folder its identity stands: it may be a whole state folder of an agent."""
    places = (path / "identity", path)
    return next((place for place in places if (place / "identity.json").is_file()), None)
