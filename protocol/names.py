"""The shapes of names that cross program borders, and the caps on what may be read.

Knows which ids, model names and paths are legal, and how large each thing on a wire or disk may be. It stops
there: who may use a name is decided by the fleet server.

Every reader takes its cap from here *before* it starts to read. Sizes are bytes.
"""

import re

DEVICE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
RESERVED_DEVICE_IDS = frozenset({"server", "srv", "admin"})  # broker users and log-in names of the server
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
FAMILY_NAME = MODEL_NAME
VARIANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
SHA256_HEX = re.compile(r"[0-9a-f]{64}")
MEMBER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?")

MAX_VERSION = 2**31 - 1
MAX_TELEMETRY_MESSAGE = 64 * 1024  # as it travels
MAX_INFLATED_MESSAGE = 512 * 1024  # after inflating; a bomb stops here
MAX_DESIRED_MESSAGE = 256 * 1024  # also the broker's max_packet_size; leaves room for a long root chain
MAX_COMMAND_MESSAGE = 16 * 1024  # a signed command as it travels
MAX_METADATA_FILE = 5_000_000  # python-tuf's own cap on targets metadata (ngclient/config.py)
MAX_MANIFEST = 1024 * 1024
MAX_BUNDLE = 2 * 1024**3
MAX_MEMBERS = 64
MAX_CLASSES = 10_000
MAX_DEVICE_REQUEST = 64 * 1024  # a JSON body on the device HTTPS port

SHORT_DIGEST_LENGTH = 16  # hex digits: 64 bits tell all bundles of a fleet apart


class IllegalName(ValueError):
    """A name has a shape that is not allowed. Fields: ``what`` it names and the ``value``."""

    def __init__(self, what: str, value: str, shape: re.Pattern[str]) -> None:
        """Say what was expected, with the offending value cut to a readable length."""
        super().__init__(f"{what} {value[:80]!r} is not legal: expected {shape.pattern}")
        self.what = what
        self.value = value


def check_name(what: str, value: str, shape: re.Pattern[str]) -> str:
    """Return ``value`` when it has the shape; raise `IllegalName` otherwise."""
    if not shape.fullmatch(value):
        raise IllegalName(what, value, shape)
    return value


def check_device_id(value: str) -> str:
    """Return a legal device id; raise `IllegalName` for a malformed or reserved one.

    The id becomes certificate CN, MQTT user, client id and topic part, so nothing else may pass
    (a CN ``dev-a/up`` would write into another device's topics).
    """
    check_name("device id", value, DEVICE_ID)
    if value in RESERVED_DEVICE_IDS:
        raise IllegalName("device id (reserved)", value, DEVICE_ID)
    return value


def short_digest(sha256_hex: str) -> str:
    """Return the short form of a bundle's digest that telemetry carries (64 bits, hex)."""
    return check_name("sha256", sha256_hex, SHA256_HEX)[:SHORT_DIGEST_LENGTH]
