"""What a pipeline may be: where frames come from, how they become tensors, where results go.

The shapes of ``[[pipeline]]`` in ``agent.toml``, and of what control hands to the data plane. Pure: how a source is
read is the data plane's business. Pipelines start programs and read files, so they come from the device's own
settings only; nothing that the fleet signs holds one.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

MAX_PIPELINES = 32  # each takes two threads, and one per sink

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}\Z")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Command = Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=64)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0.05, le=86400)]
Priority = Annotated[int, msgspec.Meta(ge=1, le=10)]  # as clients name it: a lower number goes first
Waiting = Annotated[int, msgspec.Meta(ge=1, le=65536)]


class BadPipeline(ValueError):
    """A pipeline contradicts itself or another; the message names it."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of sources, preprocessing and sinks: ``kind`` says which one it is."""


# ---------------------------------------------------------------- sources
class DirectorySource(Part, frozen=True, kw_only=True, tag="directory"):
    """Files that appear in a folder, oldest first."""

    path: Text
    pattern: Text = "*"  # of file names; names that begin with a dot or end with .tmp or .part never count
    after: Literal["move", "delete", "keep"] = "move"  # move: into done/ and failed/ inside the folder
    poll_seconds: Seconds = 1.0  # where the kernel tells of new files, this is only the net below


class MqttSource(Part, frozen=True, kw_only=True, tag="mqtt"):
    """Messages of a topic on a broker of this site."""

    topic: Text
    host: Text = "127.0.0.1"
    port: Port = 1883
    qos: Literal[0, 1] = 0
    username: str = ""
    password_file: str = ""
    tls: bool = False
    ca_file: str = ""  # signs the broker's certificate; empty: the system's
    certificate_file: str = ""  # of this client, where the broker asks for one
    key_file: str = ""


class ExecSource(Part, frozen=True, kw_only=True, tag="exec"):
    """What a program writes on its standard output; it is started again when it ends."""

    command: Command
    framing: Literal["lines", "length"] = "lines"  # length: 4 bytes, big-endian, before each frame


class CameraSource(Part, frozen=True, kw_only=True, tag="camera"):
    """Pictures of a camera: ``/dev/video0``, an ``rtsp://`` address, or a video file. Needs the extra [camera]."""

    device: Text
    fps: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0  # frames per second at most; 0: as they come


class HttpSource(Part, frozen=True, kw_only=True, tag="http"):
    """What local programs send with ``POST /v2/pipelines/NAME``."""


class IntervalSource(Part, frozen=True, kw_only=True, tag="interval"):
    """A file read, or what a program printed until its end, every so often."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0  # 0: by ``cron``
    cron: str = ""  # five fields, in UTC
    path: str = ""
    command: tuple[Text, ...] = ()
    timeout_seconds: Seconds = 30.0  # for the program


Source = DirectorySource | MqttSource | ExecSource | CameraSource | HttpSource | IntervalSource


# ---------------------------------------------------------------- preprocessing
class RawPreprocess(Part, frozen=True, kw_only=True, tag="raw"):
    """A frame is the bytes of the model's one input."""


class JsonPreprocess(Part, frozen=True, kw_only=True, tag="json"):
    """A frame is a JSON array for the model's one input, or an object with an array per input."""

    values: Literal["real", "tensor"] = "real"  # real: quantised here; tensor: in the tensor's own units


class ImagePreprocess(Part, frozen=True, kw_only=True, tag="image"):
    """A frame is a picture (JPEG, PNG, or a camera's); it is scaled to the input, and real = (pixel - mean) / std."""

    mean: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)] = 0.0  # in pixel values, 0…255
    std: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)] = 255.0


Preprocess = RawPreprocess | JsonPreprocess | ImagePreprocess


# ---------------------------------------------------------------- sinks
class FileSink(Part, frozen=True, kw_only=True, tag="file"):
    """A file of JSON lines, rotated by size."""

    path: Text
    max_bytes: Annotated[int, msgspec.Meta(ge=4096, le=2**40)] = 10 * 1024 * 1024
    keep: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3  # rotated files beside the current one
    queue: Waiting = 1000


class MqttSink(Part, frozen=True, kw_only=True, tag="mqtt"):
    """A topic on a broker of this site."""

    topic: Text
    host: Text = "127.0.0.1"
    port: Port = 1883
    qos: Literal[0, 1] = 1
    retain: bool = False
    username: str = ""
    password_file: str = ""
    tls: bool = False
    ca_file: str = ""  # as of the source
    certificate_file: str = ""
    key_file: str = ""
    queue: Waiting = 1000


class WebhookSink(Part, frozen=True, kw_only=True, tag="webhook"):
    """An HTTP address that each result is posted to."""

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s/]+\S*\Z", max_length=4096)]
    secret_file: str = ""  # signs each body with HMAC-SHA256
    ca_file: str = ""  # of a private server; empty: the system's
    timeout_seconds: Seconds = 10.0  # of one attempt, in all
    queue: Waiting = 1000


class ExecSink(Part, frozen=True, kw_only=True, tag="exec"):
    """A program that reads a JSON line per result from its standard input; it is started again when it ends."""

    command: Command
    queue: Waiting = 1000


Sink = FileSink | MqttSink | WebhookSink | ExecSink


# ---------------------------------------------------------------- pipelines
class PipelineSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[pipeline]]``."""

    name: Name
    model: Name
    policy: Literal["latest", "every"] = "latest"  # latest: a newer frame takes the place of one that waits
    queue: Waiting = 16  # frames that may wait under ``every``; the source waits beyond that
    max_frame: Annotated[int, msgspec.Meta(ge=1, le=2**28)] = 16 * 1024 * 1024  # bytes
    priority: Priority = 8  # of its requests; a client's is 5 unless it says otherwise, so a person's call goes first
    outputs: bool = False  # results carry the outputs' numbers too; those of models without classes always do
    source: Source
    preprocess: Preprocess = RawPreprocess()
    sinks: tuple[Sink, ...] = msgspec.field(default=(), name="sink")


def check_pipelines(pipelines: Sequence[PipelineSettings]) -> None:
    """Raise `BadPipeline` when pipelines contradict themselves or each other."""
    if len(pipelines) > MAX_PIPELINES:
        raise BadPipeline(f"{len(pipelines)} pipelines are over the cap of {MAX_PIPELINES}")
    for name, count in Counter(one.name for one in pipelines).items():
        if count > 1:
            raise BadPipeline(f"two pipelines are named {name!r}")
    files = Counter(sink.path for one in pipelines for sink in one.sinks if isinstance(sink, FileSink))
    for path, count in files.items():
        if count > 1:
            raise BadPipeline(f"two sinks write to {path}")
    for one in pipelines:
        if isinstance(one.source, IntervalSource):
            _check_interval(one.name, one.source)
        for part in (one.source, *one.sinks):
            if isinstance(part, MqttSource | MqttSink):
                _check_broker(one.name, part)


def _check_interval(name: str, source: IntervalSource) -> None:
    if bool(source.path) == bool(source.command):
        raise BadPipeline(f"pipeline {name}: an interval source has either a path or a command")
    if bool(source.seconds) == bool(source.cron):
        raise BadPipeline(f"pipeline {name}: an interval source has either seconds or cron")


def _check_broker(name: str, part: MqttSource | MqttSink) -> None:
    """Nobody shall believe that a connection is protected when it is not."""
    if (part.ca_file or part.certificate_file or part.key_file) and not part.tls:
        raise BadPipeline(f"pipeline {name}: files for TLS are named for {part.host}, but tls is not true")
    if bool(part.certificate_file) != bool(part.key_file):
        raise BadPipeline(f"pipeline {name}: certificate_file and key_file go together")
    if part.password_file and not part.username:
        raise BadPipeline(f"pipeline {name}: a password_file needs a username")
