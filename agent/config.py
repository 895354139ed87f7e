"""The agent's settings: what may stand in ``agent.toml``, with defaults and bounds.

Settings are read once at start and passed on; what the fleet server may change at run time comes signed with the
desired state instead. docs/reference/settings.md is checked against this file.
"""

import platform
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from agent.core.capturing import CapturePolicy
from agent.core.delegates import BadDelegate, Delegate, check_delegates
from agent.core.downloading import MIN_BANDWIDTH
from agent.core.governor import BadPolicy, GovernorPolicy, check_policy
from agent.core.holding import parse_hours
from agent.core.pipelines import BadPipeline, PipelineSettings, check_pipelines
from agent.listening import CannotListen, parse_tcp
from protocol.settings import MAX_SETTINGS, BadSettings, decode_settings

DEFAULT_STATE = "/var/lib/edgewarden-agent"
DEFAULT_CONFIG = "/etc/edgewarden/agent.toml"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table: an unknown key is an error."""


class DeviceSettings(Section, frozen=True, kw_only=True):
    """``[device]``: what this machine is, and where the agent keeps its state."""

    state: str = DEFAULT_STATE  # folder: identity, trust, models, spool
    device_class: str = msgspec.field(default="", name="class")  # empty: the machine's architecture
    timezone: str = "UTC"  # IANA; maintenance hours are in it


class InferenceSettings(Section, frozen=True, kw_only=True):
    """``[inference]``: where local clients are answered, and with what."""

    unix: str = "/run/edgewarden-agent/inference.sock"  # empty: no unix socket
    http: str = "127.0.0.1:8500"  # loopback only; empty: no TCP
    grpc: str = ""  # HOST:PORT, loopback only; needs the extra "grpc"; empty: no gRPC
    runtime: Literal["auto", "litert", "tflite-runtime"] = "auto"
    instances: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # interpreters per model
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # threads per interpreter
    queue: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64  # requests that may wait per model
    max_body: Annotated[int, msgspec.Meta(ge=1024, le=2**30)] = 64 * 1024 * 1024  # bytes
    measure: bool = False  # a new model is measured in its trial, and runs as it is fastest here
    delegates: tuple[Delegate, ...] = msgspec.field(default=(), name="delegate")  # any: a new model is measured
    spare: Literal["auto", "on", "off"] = "auto"  # a data plane that waits to step in; auto: where memory is plenty
    invoke_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 10  # a model that takes longer hangs
    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 0  # of the data plane; 0: no limit
    feedback_on_tcp: bool = False  # truth is taken on the unix socket only, unless set
    allow_repository_control: bool = False  # local clients may load and unload what the fleet manages


class TelemetrySettings(Section, frozen=True, kw_only=True):
    """``[telemetry]``: how often is reported, and how much is kept while the server is away."""

    window_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60
    spool_bytes: Annotated[int, msgspec.Meta(ge=65536, le=2**30)] = 8 * 1024 * 1024


class UpdateSettings(Section, frozen=True, kw_only=True):
    """``[update]``: how a new model comes, and how it is tried."""

    probation_seconds: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 60
    hours: tuple[str, ...] = ()  # when a new version may be tried and take over, as "02:00-05:00"; empty: always
    max_errors: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.05  # share of requests that may fail in probation
    max_slowdown: Annotated[float, msgspec.Meta(ge=1.0, le=1000.0)] = 3.0  # of the 95th percentile, in probation
    max_unsure: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.3  # growth of the share of unsure predictions
    trial_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60  # wall clock of the trial child
    bandwidth: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 0  # bytes per second of a download; 0: no limit
    bytes_per_day: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 0  # of downloads, by the UTC day; 0: no limit
    spread_seconds: Annotated[int, msgspec.Meta(ge=0, le=86400)] = 0  # a new download waits a random part of it first
    mirrors: tuple[str, ...] = ()  # file servers with <sha256>.ewb, asked in order before the fleet server
    deltas: bool = True  # take a delta where that is less


class MqttSettings(Section, frozen=True, kw_only=True):
    """``[mqtt]``: how the connection to the broker is kept."""

    keepalive_seconds: Annotated[int, msgspec.Meta(ge=5, le=120)] = 60
    will_delay_seconds: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 30
    reconnect_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60  # longest pause between tries


class AgentSettings(Section, frozen=True, kw_only=True):
    """The whole of ``agent.toml``."""

    device: DeviceSettings = DeviceSettings()
    inference: InferenceSettings = InferenceSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    update: UpdateSettings = UpdateSettings()
    mqtt: MqttSettings = MqttSettings()
    governor: GovernorPolicy = GovernorPolicy()
    capture: CapturePolicy = CapturePolicy()
    pipelines: tuple[PipelineSettings, ...] = msgspec.field(default=(), name="pipeline")


def load_settings(path: Path) -> AgentSettings:
    """Read ``agent.toml``; raise `BadSettings` naming the file, the line and the key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS + 1)
        settings = decode_settings(data.decode(), AgentSettings, str(path))
    except OSError as error:
        raise BadSettings(str(path), 0, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadSettings(str(path), 0, "is not UTF-8 text") from error
    _check(settings, str(path))
    return settings


def read_settings(path: str) -> AgentSettings:
    """Read the file named on a command line; without one at the default place, the defaults stand."""
    if path == DEFAULT_CONFIG and not Path(path).exists():
        return AgentSettings()
    return load_settings(Path(path))


def device_class(settings: DeviceSettings) -> str:
    """Return the operator's label, else the machine's architecture."""
    return settings.device_class or platform.machine()


def _check(settings: AgentSettings, file: str) -> None:
    _check_timezone(settings.device.timezone, file)
    for span in settings.update.hours:
        try:
            parse_hours(span)
        except ValueError as error:
            raise BadSettings(file, 0, f"update.hours: {error}") from error
    inference = settings.inference
    if not inference.unix and not inference.http:
        raise BadSettings(file, 0, "inference.unix and inference.http are both empty: nobody could ask")
    for name, address in (("http", inference.http), ("grpc", inference.grpc)):
        try:
            if address:
                parse_tcp(address)
        except CannotListen as error:
            raise BadSettings(file, 0, f"inference.{name}: {error}") from error
    _check_update(settings.update, file)
    if settings.capture.redact and settings.capture.redact_command:
        raise BadSettings(file, 0, "capture.redact and capture.redact_command are both set; one of them does it")
    try:
        check_delegates(inference.delegates)
        check_pipelines(settings.pipelines)
        check_policy(settings.governor)
    except (BadDelegate, BadPipeline, BadPolicy) as error:
        raise BadSettings(file, 0, str(error)) from error


def _check_update(update: UpdateSettings, file: str) -> None:
    if 0 < update.bandwidth < MIN_BANDWIDTH:
        raise BadSettings(file, 0, f"update.bandwidth: {update.bandwidth} is below {MIN_BANDWIDTH}; 0 is no limit")
    for url in update.mirrors:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.query:
            raise BadSettings(file, 0, f"update.mirrors: {url!r} does not look like http://host/folder")


def _check_timezone(name: str, file: str) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise BadSettings(file, 0, f"device.timezone: {name!r} is not an IANA time zone known here") from error
