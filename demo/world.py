"""The demo's fleet: one server, three devices, their folders, ports and commands.

Knows how each program is started and asked, as a person at a terminal would; `story.py` knows in which order.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from demo.attacks import StolenServer
from demo.processes import Programs
from demo.stream import Counts, DigitStream, input_of
from fleet_server.api_types import DeviceView, EventView, ModelOnDevice, SeriesPoint
from fleet_server.cli.session import COOKIE, ApiError, CookieFile, Session

DEVICES = ("edge-1", "edge-2", "edge-3")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "digits"
MODEL = "digits"
WINDOW_SECONDS = 2
PROBATION_SECONDS = 3
REQUESTS_PER_SECOND = 40.0
CONSOLE_PORT = 8080
PATIENCE = 40.0  # seconds that an observation may take

T = TypeVar("T")


class NotObserved(Exception):
    """Something that should have become visible over REST or MQTT did not."""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Loopback ports of this run."""

    console: int
    devices: int
    broker: int
    admin: int
    inference: dict[str, int]


class World:
    """Everything one run of the demo has."""

    def __init__(self, folder: Path) -> None:
        """Start from an empty folder; nothing runs yet."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder.resolve()
        self.data, self.keys = self.folder / "server", self.folder / "keys"
        self.ports = _choose_ports()
        self.programs = Programs(self.folder / "logs")
        self.streams = self._make_streams()
        self.answered_ever: Counter[str] = Counter()  # by streams that have ended
        self.single_requests: Counter[str] = Counter()  # answered outside of the streams, by device
        self.thief = StolenServer(data=self.data, admin_port=self.ports.admin)
        self.session: Session | None = None

    @property
    def rate(self) -> float:
        """Requests that each stream sends per second."""
        return REQUESTS_PER_SECOND

    # ------------------------------------------------------------ programs
    @property
    def console(self) -> str:
        """Address of the console and the REST API."""
        return f"http://127.0.0.1:{self.ports.console}"

    def start_server(self) -> None:
        """Start the fleet server with its broker."""
        self.programs.start(
            "server",
            "fleet_server",
            "serve",
            "--data",
            str(self.data),
            "--console",
            f"127.0.0.1:{self.ports.console}",
            "--devices",
            f"127.0.0.1:{self.ports.devices}",
            "--broker",
            f"127.0.0.1:{self.ports.broker}",
            "--broker-admin-port",
            str(self.ports.admin),
            "--public-host",
            "127.0.0.1",
        )

    def start_agent(self, name: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Start one device's agent."""
        self.programs.start(name, "agent", "run", "--config", str(self.config(name)), environment=environment)

    def config(self, name: str) -> Path:
        """Return a device's settings file, written on first use."""
        path = self.folder / name / "agent.toml"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f'[device]\nstate = "{self.folder / name / "state"}"\n\n'
                f'[inference]\nunix = "{self.unix(name)}"\nhttp = "127.0.0.1:{self.ports.inference[name]}"\n\n'
                f"[telemetry]\nwindow_seconds = {WINDOW_SECONDS}\n\n"
                f"[update]\nprobation_seconds = {PROBATION_SECONDS}\n\n"
                "[mqtt]\nkeepalive_seconds = 10\nwill_delay_seconds = 5\nreconnect_seconds = 2\n"
            )
        return path

    def unix(self, name: str) -> Path:
        """Return the inference socket of a device."""
        return self.folder / name / "inference.sock"

    def pause_streams(self) -> None:
        """End the streams and keep what they counted."""
        for name, stream in self.streams.items():
            stream.stop()
            self.answered_ever[name] += stream.counts.answered
            stream.counts = Counts()

    def restart_streams(self) -> None:
        """Begin new streams; ended ones do not come back."""
        self.streams = self._make_streams()
        for stream in self.streams.values():
            stream.start()

    def _make_streams(self) -> dict[str, DigitStream]:
        spec = input_of(EXAMPLES / "v1" / "manifest.json")
        return {
            name: DigitStream(
                self.unix(name), EXAMPLES / "heldout.npz", spec, per_second=REQUESTS_PER_SECOND, start_at=k * 100
            )
            for k, name in enumerate(DEVICES)
        }

    # ------------------------------------------------------------ commands, as a person would type them
    def edgewarden(self, *arguments: str) -> str:
        """Run the operators' command line; return what it printed."""
        return self._command("fleet_server.cli", *arguments)

    def enrol(self, name: str, token_file: Path, *, server: str = "", config: Path | None = None) -> str:
        """Run ``edgewarden-agent enroll`` for a device; ``server``: where it believes the fleet server to be."""
        return self._command(
            "agent",
            "enroll",
            "--server",
            server or f"https://127.0.0.1:{self.ports.devices}",
            "--token-file",
            str(token_file),
            "--device",
            name,
            "--config",
            str(config or self.config(name)),
        )

    def local(self, name: str, command: str, *arguments: str) -> Any:
        """Ask a device's agent on the device itself; return the JSON that it prints."""
        return json.loads(self._command("agent", command, "--config", str(self.config(name)), *arguments))

    def _command(self, module: str, *arguments: str) -> str:
        environment = {
            **os.environ,
            "EDGEWARDEN_SERVER": self.console,
            "EDGEWARDEN_PASSWORD": self.password(),
            "XDG_CONFIG_HOME": str(self.folder / "operator"),
            "NO_COLOR": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            words = " ".join(arguments[:3])
            raise NotObserved(f"{module} {words}… ended with {done.returncode}: {done.stderr.strip() or done.stdout}")
        return done.stdout

    def password(self) -> str:
        """Return the administrator's generated password."""
        return (self.data / "admin-password").read_text().strip()

    # ------------------------------------------------------------ observing
    def api(self) -> Session:
        """Return the logged-in session of the observer."""
        if self.session is None:
            self.session = Session(self.console, cookies=self.folder / "observer.json", password=self.password())
        return self.session

    def devices(self) -> dict[str, DeviceView]:
        """Return every device as the server sees it."""
        return {device.id: device for device in self.api().get("/devices", tuple[DeviceView, ...])}

    def model_on(self, name: str) -> ModelOnDevice:
        """Return what the server knows of the model on a device."""
        for model in self.devices()[name].models:
            if model.model == MODEL:
                return model
        raise NotObserved(f"{name} does not report {MODEL}")

    def events_since(self, row: int, device: str) -> tuple[EventView, ...]:
        """Return a device's events after a row, newest first."""
        return self.api().get(f"/events?device={device}&after={row}&limit=200", tuple[EventView, ...])

    def newest_event(self) -> int:
        """Return the row of the newest event, 0 when there is none."""
        events = self.api().get("/events?limit=1", tuple[EventView, ...])
        return events[0].row if events else 0

    def stored_requests(self, name: str) -> int:
        """Return how many requests of a device the server has counted."""
        series = self.api().get(f"/devices/{name}/series?model={MODEL}&span=7200", tuple[SeriesPoint, ...])
        return sum(point.requests for point in series)

    def console_page(self, path: str) -> str:
        """Return a page of the console, with the observer's cookie."""
        self.api()
        cookie = CookieFile(self.folder / "observer.json").load(self.console)
        connection = http.client.HTTPConnection("127.0.0.1", self.ports.console, timeout=10)
        try:
            connection.request("GET", path, headers={"Cookie": f"{COOKIE}={cookie}"})
            response = connection.getresponse()
            page = response.read().decode()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise NotObserved(f"{path}: HTTP {response.status}")
        return page

    def wait(self, what: str, look: Callable[[], T | None], patience: float = PATIENCE) -> T:
        """Look until something is there; raise `NotObserved` naming what was not, and why the last look failed."""
        deadline = time.monotonic() + patience
        last = ""
        while time.monotonic() < deadline:
            try:
                found = look()
            except (ApiError, OSError, NotObserved, KeyError, msgspec.MsgspecError) as error:
                found, last = None, f" (last look: {error})"
            if found:
                return found
            time.sleep(0.2)
        raise NotObserved(f"not seen within {patience:.0f} s: {what}{last}")

    def note(self, name: str, value: object) -> None:
        """Leave a fact of this run for people in ``.demo/<name>.json``."""
        (self.folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def _choose_ports() -> Ports:
    held = []
    numbers = []
    for wanted in (CONSOLE_PORT, 0, 0, 0, 0, 0, 0):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", wanted))
        except OSError:  # somebody has the console's port: any other will do
            sock.bind(("127.0.0.1", 0))
        held.append(sock)
        numbers.append(int(sock.getsockname()[1]))
    for sock in held:
        sock.close()
    return Ports(
        console=numbers[0],
        devices=numbers[1],
        broker=numbers[2],
        admin=numbers[3],
        inference=dict(zip(DEVICES, numbers[4:], strict=True)),
    )
