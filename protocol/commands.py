"""What a server may ask of one device once: the signed part of a command. README.md §9 is the prose.

Knows the commands there are and reads them strictly: what a device does not know whole, it does not do in part. Who
signs, and what the envelope around it looks like on the wire, is `protocol.messages`' and the adapters' business.
"""

from typing import Annotated

import msgspec

from protocol.codec import BadMessage
from protocol.names import MAX_COMMAND_MESSAGE

PAYLOAD_TYPE = "application/vnd.edgewarden.command+json"  # what is signed along with the payload (DSSE)
MAX_LIFE_MS = 24 * 3600 * 1000  # a signed command must not lie about for longer
MAX_NUMBER = 2**53 - 1  # exact in every JSON reader

_Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_Model = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
_Number = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]


class SelfTestCommand(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do", tag="self-test"
):
    """Run the golden samples of a model where it serves."""

    model: _Model


class RestartDataPlaneCommand(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do", tag="restart-data-plane"
):
    """Replace the data plane's process as planned: no request is lost."""


class RenewCertificateCommand(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do", tag="renew-certificate"
):
    """Renew the device's key and certificate now, whatever their age."""


Deed = SelfTestCommand | RestartDataPlaneCommand | RenewCertificateCommand


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The payload that the Director's targets keys sign."""

    device: str
    id: _Id
    sequence: _Number  # grows per device, gaps allowed
    issued: _Number  # UTC ms
    expires: _Number  # UTC ms
    command: Deed


def encode_command(command: Command) -> bytes:
    """Return the bytes to be signed."""
    return msgspec.json.encode(command)


def decode_command(payload: bytes) -> Command:
    """Read a payload whose signature is good; raise `BadMessage`."""
    if len(payload) > MAX_COMMAND_MESSAGE:
        raise BadMessage(f"{len(payload)} bytes are over the cap of {MAX_COMMAND_MESSAGE}")
    try:
        return _command.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"not a command: {error}") from error


def describe(deed: Deed) -> str:
    """Say in words what a command asks for."""
    match deed:
        case SelfTestCommand(model=model):
            return f"self-test {model}"
        case RestartDataPlaneCommand():
            return "restart-data-plane"
        case RenewCertificateCommand():
            return "renew-certificate"


_command = msgspec.json.Decoder(Command)
