"""Every MQTT topic, built and parsed in one place.

>>> device_topic("cam-7", Channel.TELEMETRY)
'ew/1/d/cam-7/up/t'
>>> parse("ew/1/d/cam-7/up/t")
DeviceTopic(device='cam-7', channel=<Channel.TELEMETRY: 'up/t'>)
>>> parse("ew/1/d/cam-7/up/nonsense") is None
True

Rights: a device publishes its own ``up/#`` and receives its own ``down/#`` and `SERVER_STATE`; see README.md §3.
"""

from dataclasses import dataclass
from enum import Enum

from protocol.names import DEVICE_ID, check_name

ROOT = "ew/1"
SERVER_STATE = f"{ROOT}/srv/state"
INGEST_GROUP = "ingest"  # shared-subscription group of the server's workers


class Channel(str, Enum):
    """The last two levels of a device topic."""

    STATE = "up/state"
    TELEMETRY = "up/t"
    EVENT = "up/e"
    REPLY = "up/r"
    DESIRED = "down/want"
    COMMAND = "down/cmd"
    ACKNOWLEDGEMENT = "down/ack"


UPWARD = frozenset({Channel.STATE, Channel.TELEMETRY, Channel.EVENT, Channel.REPLY})


@dataclass(frozen=True, kw_only=True)
class DeviceTopic:
    """A parsed device topic."""

    device: str
    channel: Channel


def device_topic(device: str, channel: Channel) -> str:
    """Build the topic of one channel of one device; raise `IllegalName` for a bad id."""
    return f"{ROOT}/d/{check_name('device id', device, DEVICE_ID)}/{channel.value}"


def every_device(channel: Channel) -> str:
    """Build the filter that matches one channel of all devices."""
    return f"{ROOT}/d/+/{channel.value}"


def shared(filter_: str) -> str:
    """Build the shared subscription of the ingest workers for a filter."""
    return f"$share/{INGEST_GROUP}/{filter_}"


def everything_of(device: str, direction: str) -> str:
    """Build the filter for all channels of a device in one direction (``up`` or ``down``)."""
    return f"{ROOT}/d/{check_name('device id', device, DEVICE_ID)}/{direction}/#"


def parse(topic: str) -> DeviceTopic | None:
    """Return the parts of a device topic, or None when it is not one of ours."""
    prefix = f"{ROOT}/d/"
    if not topic.startswith(prefix):
        return None
    device, _, rest = topic[len(prefix) :].partition("/")
    if not DEVICE_ID.fullmatch(device):
        return None
    try:
        return DeviceTopic(device=device, channel=Channel(rest))
    except ValueError:
        return None
