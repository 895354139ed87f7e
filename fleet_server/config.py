"""The server's settings: a TOML file, then command-line flags over it, then checked once, at the start.

Knows every setting with its default. It stops there: whether an address is free or a file can be read is found out by
whoever uses it. Everything wrong is a `BadConfig` that names the key, and the line of the file where it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleet_server.core.rollups import Kept
from protocol.settings import MAX_SETTINGS, BadSettings, decode_settings

MAX_PORT = 65535
MAX_DAYS = 3650


class BadConfig(Exception):
    """A setting is wrong; the operator must mend it."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen. Port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the form that settings use."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file may say. None: not said."""

    data: str | None = None  # folder of everything that lasts
    host: str | None = None  # listen here for devices and their MQTT; the two below override it
    console: str | None = None  # address of console and API
    devices: str | None = None  # address of HTTPS for devices
    broker: str | None = None  # address of MQTT for devices
    broker_admin_port: int | None = None  # loopback, for the server's own connection
    public_hosts: tuple[str, ...] | None = None  # names that devices use for this machine; the first is told to them
    database: str | None = None  # SQLAlchemy URL; SQLite in the data folder by default
    console_certificate: str | None = None  # PEM with its chain: the console is then served over TLS
    console_key: str | None = None
    retention_days: int | None = None  # how long reports and truth are kept
    quarter_retention_days: int | None = None  # how long their sums over quarters of an hour are
    daily_retention_days: int | None = None  # how long their sums over days are


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Checked settings."""

    data: Path
    console: Address
    devices: Address
    broker: Address
    broker_admin_port: int
    public_hosts: tuple[str, ...]  # empty: ask the machine for its name
    database: str
    console_certificate: Path | None
    console_key: Path | None
    retention_days: int
    quarter_retention_days: int
    daily_retention_days: int

    @property
    def kept(self) -> Kept:
        """How long reports and their sums are kept."""
        return Kept(raw=self.retention_days, quarters=self.quarter_retention_days, days=self.daily_retention_days)


def read_file(path: Path) -> Settings:
    """Read a settings file; raise `BadConfig`."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_SETTINGS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"cannot read {path}: {error}") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Settings:
    """Parse the text of a settings file; raise `BadConfig` naming key and line."""
    try:
        return decode_settings(text, Settings, name)
    except BadSettings as error:
        raise BadConfig(str(error)) from error


def settle(file: Settings, flags: Settings) -> ServerConfig:
    """Put flags over the file, fill in defaults, and check; raise `BadConfig`."""
    said = {name: getattr(file, name) for name in Settings.__struct_fields__}
    said |= {name: value for name in said if (value := getattr(flags, name)) is not None}
    chosen = Settings(**said)
    if not chosen.data:
        raise BadConfig("data: which folder? give --data DIR, or data in the settings file")
    data = Path(chosen.data).expanduser().absolute()
    host = chosen.host or "0.0.0.0"  # noqa: S104 - devices come from the network; every connection is authenticated
    _check_console_tls(chosen)
    kept = _kept(chosen)
    return ServerConfig(
        data=data,
        console=address("console", chosen.console or "127.0.0.1:8080"),
        devices=address("devices", chosen.devices or str(Address(host=host, port=8443))),
        broker=address("broker", chosen.broker or str(Address(host=host, port=8883))),
        broker_admin_port=_within("broker_admin_port", _or(chosen.broker_admin_port, 8884), 0, MAX_PORT),
        public_hosts=_names(chosen.public_hosts or ()),
        database=chosen.database or f"sqlite:///{data / 'edgewarden.db'}",
        console_certificate=Path(chosen.console_certificate) if chosen.console_certificate else None,
        console_key=Path(chosen.console_key) if chosen.console_key else None,
        retention_days=kept.raw,
        quarter_retention_days=kept.quarters,
        daily_retention_days=kept.days,
    )


def address(key: str, text: str) -> Address:
    """Parse ``host:port`` or ``[v6]:port``; raise `BadConfig` naming the key."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise BadConfig(f"{key}: {text!r} is not an address like 127.0.0.1:8080")
    return Address(host=host, port=_within(key, int(port), 0, MAX_PORT))


def _check_console_tls(settings: Settings) -> None:
    if bool(settings.console_certificate) != bool(settings.console_key):
        raise BadConfig("console_certificate and console_key belong together: give both, or neither")


def _kept(settings: Settings) -> Kept:
    """A coarser sum is not kept for less long than what it is made from; a default gives way to that."""
    default = Kept()
    raw = _within("retention_days", _or(settings.retention_days, default.raw), 1, MAX_DAYS)
    quarters = _or(settings.quarter_retention_days, max(default.quarters, raw))
    quarters = _within("quarter_retention_days", quarters, raw, MAX_DAYS)
    days = _or(settings.daily_retention_days, max(default.days, quarters))
    return Kept(raw=raw, quarters=quarters, days=_within("daily_retention_days", days, quarters, MAX_DAYS))


def _names(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if not name or any(c.isspace() or c in "/:@" for c in name.strip("[]").replace(":", "")):
            raise BadConfig(f"public_hosts: {name!r} is not a host name or address")
    return tuple(names)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _within(key: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise BadConfig(f"{key}: {value} is not between {low} and {high}")
    return value
