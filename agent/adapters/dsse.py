"""Signed commands: DSSE envelopes, verified by securesystemslib with the keys that the Director's root names.

Says who signed, and what. Whether the command is for this device, fresh and new is decided in `agent.core.commands`.
"""

from collections.abc import Callable
from datetime import datetime

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Signature

from agent.adapters.tuf_client import RoleKeys
from agent.ports import Refusal
from protocol.codec import BadMessage, decode_command_envelope
from protocol.commands import PAYLOAD_TYPE, Command, decode_command
from protocol.messages import CommandEnvelope
from protocol.states import RejectReason

MAX_SIGNATURES = 16  # each costs a verification


class SignedCommands:
    """`agent.ports.CommandTrust`."""

    def __init__(self, keys: Callable[[], RoleKeys]) -> None:
        """``keys`` returns who may sign now, by the newest root that this device has verified."""
        self._keys = keys

    def open(self, payload: bytes, at: int) -> Command:
        try:
            envelope = decode_command_envelope(payload)
            self._verify(envelope, at)
            return decode_command(envelope.payload)
        except BadMessage as error:
            raise Refusal(RejectReason.MALFORMED, str(error)) from error

    def _verify(self, message: CommandEnvelope, at: int) -> None:
        envelope, keys = _envelope(message), self._keys()
        if _milliseconds(keys.expires) <= at:
            raise Refusal(RejectReason.EXPIRED, "the Director root, which names who may command, has expired")
        try:
            envelope.verify(list(keys.keys), keys.threshold)
        except (VerificationError, ValueError) as error:  # ValueError: fewer keys than the threshold asks for
            raise Refusal(RejectReason.BAD_SIGNATURE, f"the command: {error}") from error


def _envelope(message: CommandEnvelope) -> Envelope:
    if message.payload_type != PAYLOAD_TYPE:
        raise BadMessage(f"a signed {message.payload_type[:80]!r} is not a command")
    if len(message.signatures) > MAX_SIGNATURES:
        raise BadMessage(f"{len(message.signatures)} signatures are more than {MAX_SIGNATURES}")
    signatures = {one.keyid: Signature(one.keyid, one.sig.hex()) for one in message.signatures}
    if len(signatures) != len(message.signatures):
        raise BadMessage("a key signed twice")
    return Envelope(message.payload, message.payload_type, signatures)


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
