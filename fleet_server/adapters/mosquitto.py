"""Runs the managed broker: writes its configuration, starts Mosquitto as a child, and starts it again when it ends.

Knows Mosquitto's settings and its bad habits. Three of them shape this file: a SIGHUP can crash 2.0.11 or open it to
everybody (so nothing here ever sends one, and it logs to stdout, where no logrotate sends one either); a damaged
persistence file keeps it from starting (so that file is moved aside: server and devices say everything again); and
rights per device need the dynamic-security plugin, whose file is written anew before every start.

Errors: `BrokerMissing` (install it), `PortTaken` (free the port or configure another), `BrokerFailed` (its last
words).
"""

import ctypes
import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fleet_server.adapters.authority import ADMIN_NAME, TlsFiles
from fleet_server.adapters.broker_rights import document
from fleet_server.adapters.durable import SECRET, make_private_folder, write_atomically
from protocol.names import MAX_DESIRED_MESSAGE

PLUGIN = "mosquitto_dynamic_security.so"
LOOPBACK = "127.0.0.1"
START_TIMEOUT = 15.0  # seconds until the broker must answer
STOP_TIMEOUT = 10.0  # seconds for saving its database before it is killed
FIRST_DELAY, LAST_DELAY = 0.2, 30.0  # seconds between restarts, doubling
REFRESH_SPACING = 30.0  # seconds between restarts that were asked for: each makes every device connect again
STABLE_AFTER = 60.0  # seconds of running after which the delay starts small again
_LAST_WORDS = 20  # lines kept for error messages
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/sbin")
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
_INSTALL = (
    ("apt-get", "sudo apt-get install mosquitto"),
    ("dnf", "sudo dnf install mosquitto"),
    ("apk", "sudo apk add mosquitto"),
    ("pacman", "sudo pacman -S mosquitto"),
    ("brew", "brew install mosquitto"),
)
_log = logging.getLogger(__name__)


class BrokerMissing(Exception):
    """Mosquitto, or its dynamic-security plugin, is not on this machine."""


class PortTaken(Exception):
    """Another program listens where the broker should. Field: ``port``."""

    def __init__(self, what: str, host: str, port: int) -> None:
        """Name the listener, the address and the port."""
        super().__init__(f"port {port} on {host or 'all addresses'} is taken; the broker needs it for {what}")
        self.port = port


class BrokerFailed(Exception):
    """Mosquitto does not come up; the text has what it said last."""


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """Where the managed broker keeps its files, listens, and finds its certificates."""

    folder: Path
    device_host: str = ""  # all addresses
    device_port: int = 8883  # 0: any free one; so for the next
    admin_port: int = 8884  # loopback only
    device_tls: TlsFiles
    admin_tls: TlsFiles


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A Mosquitto on this machine."""

    program: Path
    plugin: Path


def find_mosquitto(path: str | None = None, libraries: Sequence[str] = _LIBRARIES) -> Installation:
    """Return the Mosquitto to use; raise `BrokerMissing` with the command that installs it."""
    search = os.environ.get("PATH", "") if path is None else path
    places = search if path is not None else os.pathsep.join([search, *_SBIN])
    program = shutil.which("mosquitto", path=places)
    if program is None:
        raise BrokerMissing(f"Mosquitto is not installed; install it with: {_install_command()}")
    for library in libraries:
        for plugin in sorted(Path(library).glob(PLUGIN)) + sorted(Path(library).glob(f"*/{PLUGIN}")):
            return Installation(program=Path(program), plugin=plugin)
    raise BrokerMissing(
        f"Mosquitto's {PLUGIN} (version 2.0 or newer) is not in {', '.join(libraries)}; "
        f"install it with: {_install_command()}"
    )


class ManagedBroker:
    """One Mosquitto child.

    At each start it learns from ``devices`` which ids have rights, and from ``revocations`` (CRLs in PEM) which
    certificates count no more.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        devices: Callable[[], Sequence[str]],
        revocations: Callable[[], bytes] | None = None,
    ) -> None:
        self._settings = _with_ports(settings)
        self._devices = devices
        self._revocations = revocations
        self._refresh_from = 0.0  # monotonic seconds
        self._refresh_timer: threading.Timer | None = None
        self._refreshing = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._words_before: tuple[str, ...] = ()  # of the run before this one, which may not have spoken yet
        self._starts = 0

    @property
    def settings(self) -> BrokerSettings:
        """What it runs with; ports that were 0 are chosen."""
        return self._settings

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def restarts(self) -> int:
        """How often it had to be started again."""
        return max(0, self._starts - 1)

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start it and return when it listens. Raises `BrokerMissing`, `PortTaken`, `BrokerFailed`."""
        installation = find_mosquitto()
        self._check_ports()
        make_private_folder(self._settings.folder)
        # Not a pool's thread: the child dies with the thread that started it (PDEATHSIG), so this one lives as long.
        self._thread = threading.Thread(
            target=self._keep_running, args=(installation,), name="mosquitto-keeper", daemon=True
        )
        self._thread.start()
        if not self._wait_until_listening(timeout):
            self.stop()
            said = " | ".join((*self._words_before, *self._last_words)[-_LAST_WORDS:])
            raise BrokerFailed(f"Mosquitto does not come up; it said: {said or 'nothing'}")

    def refresh(self) -> None:
        """Have it learn about devices and revocations again: by a restart, at once or when the last one is past."""
        wait = self._refresh_from - time.monotonic()
        self._refresh_from = time.monotonic() + max(0.0, wait) + REFRESH_SPACING
        if wait <= 0:
            self._restart()
        elif self._refresh_timer is None or not self._refresh_timer.is_alive():
            self._refresh_timer = threading.Timer(wait, self._restart)
            self._refresh_timer.daemon = True
            self._refresh_timer.start()

    def _restart(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            self._refreshing.set()
            process.terminate()

    def stop(self) -> None:
        """End it; it saves its database first."""
        self._stopping.set()
        if self._refresh_timer is not None:
            self._refresh_timer.cancel()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------ keeping it running
    def _keep_running(self, installation: Installation) -> None:
        delay = FIRST_DELAY
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._run_once(installation)
            except Exception:  # noqa: BLE001 - this thread must outlive every failed start; it is logged whole
                _log.exception("the broker could not be started")
            if self._stopping.is_set():
                return
            if self._refreshing.is_set():
                self._refreshing.clear()
                _log.warning("the broker is started again, to learn which certificates count no more")
                continue
            if time.monotonic() - started > STABLE_AFTER:
                delay = FIRST_DELAY
            _log.error("the broker ended; starting it again in %.1f s", delay)
            self._stopping.wait(delay)
            delay = min(LAST_DELAY, delay * 2)

    def _run_once(self, installation: Installation) -> None:
        """Start it, pass on what it says until it ends, and look at how it ended."""
        self._write_files(installation)
        if self._last_words:
            self._words_before = tuple(self._last_words)
        self._last_words.clear()
        with subprocess.Popen(
            [installation.program, "-c", self._settings.folder / "mosquitto.conf"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the server alone, which ends it in its turn
            preexec_fn=_die_with_parent(),  # noqa: PLW1509 - one prepared system call; the kernel must know before exec
        ) as process:
            self._process = process
            self._starts += 1
            if self._stopping.is_set():  # stop() may have looked before there was anything to stop
                process.terminate()
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(line.rstrip())
        if not self._stopping.is_set():
            self._move_damaged_database_aside()

    def _hear(self, line: str) -> None:
        self._last_words.append(line)
        _log.log(_level_of(line), "mosquitto: %s", line)

    def _move_damaged_database_aside(self) -> None:
        """Losing the broker's database loses nothing: the server publishes again, the devices send again."""
        said = " ".join(self._last_words).lower()
        database = self._settings.folder / "mosquitto.db"
        if "database" in said and "error" in said and database.exists():
            aside = database.with_name(f"mosquitto.db.damaged-{int(time.time())}")
            database.replace(aside)
            _log.error("the broker cannot read its database; moved it to %s and start without it", aside)

    # ------------------------------------------------------------ configuration
    def _write_files(self, installation: Installation) -> None:
        folder = self._settings.folder
        write_atomically(folder / "dynamic-security.json", document(ADMIN_NAME, self._devices()), mode=SECRET)
        revoked = None
        if self._revocations is not None:
            revoked = folder / "revoked.pem"
            write_atomically(revoked, self._revocations())
        write_atomically(folder / "mosquitto.conf", configuration(self._settings, installation, revoked).encode())

    def _check_ports(self) -> None:
        settings = self._settings
        _check_port_free("devices", settings.device_host, settings.device_port)
        _check_port_free("the server itself", LOOPBACK, settings.admin_port)

    def _wait_until_listening(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.pid is not None and _answers(LOOPBACK, self._settings.admin_port):
                return True
            time.sleep(0.05)
        return False


def configuration(settings: BrokerSettings, installation: Installation, revoked: Path | None = None) -> str:
    """Return mosquitto.conf; valid for 2.0.11 and 2.1. ``revoked``: file of the device CAs' revocation lists."""
    folder = settings.folder
    lines = [
        "# Written by edgewarden-server before every start of the broker; changes here are lost.",
        *_run_as(),
        "per_listener_settings false",
        "allow_anonymous false",
        f"plugin {installation.plugin}",
        f"plugin_opt_config_file {folder / 'dynamic-security.json'}",
        "log_dest stdout",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",
        "log_timestamp false",
        "connection_messages false",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "persistent_client_expiration 14d",
        f"max_packet_size {MAX_DESIRED_MESSAGE}",
        "max_queued_messages 10000",
        "max_inflight_messages 1000",  # what the server's Receive Maximum asks for
        "max_keepalive 120",
        "",
        f"listener {settings.device_port} {settings.device_host}".rstrip(),
        *_tls(settings.device_tls),
        *([f"crlfile {revoked}"] if revoked else []),
        "use_username_as_clientid true",
        "",
        f"listener {settings.admin_port} {LOOPBACK}",
        *_tls(settings.admin_tls),  # no use_username_as_clientid: several workers of the server may connect
        "",
    ]
    return "\n".join(lines)


def _tls(files: TlsFiles) -> Sequence[str]:
    return (
        f"cafile {files.ca}",
        f"certfile {files.certificate}",
        f"keyfile {files.key}",
        "tls_version tlsv1.2",  # the oldest it accepts
        "require_certificate true",
        "use_identity_as_username true",
    )


def _run_as() -> Sequence[str]:
    """Started by root it would become user ``mosquitto``, who cannot read the server's keys."""
    return ("user root",) if os.geteuid() == 0 else ()


def _die_with_parent() -> Callable[[], None] | None:
    """Return what makes the child end with this server, however that ends; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def bind() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; SIGTERM, so that it saves its database
        if os.getppid() != parent:
            os._exit(1)

    return bind


def _with_ports(settings: BrokerSettings) -> BrokerSettings:
    return replace(
        settings,
        device_port=settings.device_port or _free_port(settings.device_host),
        admin_port=settings.admin_port or _free_port(LOOPBACK),
    )


def _free_port(host: str) -> int:
    with socket.socket(_family_of(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _check_port_free(what: str, host: str, port: int) -> None:
    with socket.socket(_family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise PortTaken(what, host, port) from error
            raise


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _level_of(line: str) -> int:
    if "OpenSSL" in line or "Warning" in line:  # somebody knocked with the wrong certificate, or none
        return logging.WARNING
    return logging.ERROR if "Error" in line else logging.DEBUG


def _install_command() -> str:
    for program, command in _INSTALL:
        if shutil.which(program):
            return command
    return _INSTALL[0][1]
