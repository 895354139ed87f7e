"""Bytes to messages and back, with every size capped before it is spent.

Byte 0 names the codec: 0 is raw JSON; 1 is raw DEFLATE (RFC 1951) with preset dictionary 1. A dictionary never
changes once released; a better one gets the next number, and devices list in their birth which they can read.
"""

import zlib
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from protocol.messages import (
    WIRE_VERSION,
    Acknowledgement,
    Birth,
    CommandEnvelope,
    DesiredState,
    DeviceState,
    Event,
    Farewell,
    Reply,
    Report,
    ServerState,
    Will,
)
from protocol.names import (
    MAX_COMMAND_MESSAGE,
    MAX_DESIRED_MESSAGE,
    MAX_INFLATED_MESSAGE,
    MAX_TELEMETRY_MESSAGE,
)

RAW_JSON = 0
DEFLATE_1 = 1
CODECS: Sequence[int] = (RAW_JSON, DEFLATE_1)

# What reports and events are made of, the most frequent last (DEFLATE prefers near matches). Frozen for ever.
_DICTIONARY_1 = (
    b'"deployment","model":"","version":"digest":"state":"committed","reason":"attempt":1,"detail":""}'
    b'"r":{"cpu":,"memory":,"memtot":,"rss":,"dprss":,"rx":,"tx":,"disk":,"temp":}}],'
    b'"g":[{"d":"","t":17,"c":[[0,0,1],[1,1,1],[2,2,1],[3,3,1],[4,4,1],[5,5,1],[6,6,1],[7,7,1],[8,8,1],[9,9,1]]}]}'
    b'"f":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1],"c":[1,2,3,4,5,6,7,8,9,10]}],'
    b'"l":{"o":60,"c":[1,0,2,1],"s":,"m":},"e":1,"x":1,'
    b'{"v":1,"p":"","q":1,"k":1,"w":[{"t":17,"w":60000,"m":[{"d":"","n":'
)

# RecursionError: msgspec skips unknown fields by recursion, so `[[[[…` in one would otherwise escape as itself.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

M = TypeVar("M", Report, Event, Reply, Acknowledgement, DesiredState, CommandEnvelope, ServerState)


class BadMessage(ValueError):
    """A payload cannot be read: unknown codec or version, over a cap, or not the message it should be."""


def encode(message: msgspec.Struct, *, codec: int = RAW_JSON) -> bytes:
    """Encode a message. Raises ValueError for an unknown codec."""
    body = _encoder.encode(message)
    if codec == RAW_JSON:
        return bytes([RAW_JSON]) + body
    if codec == DEFLATE_1:
        press = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY_1)
        return bytes([DEFLATE_1]) + press.compress(body) + press.flush()
    raise ValueError(f"codec {codec} is unknown; known are {list(CODECS)}")


def decode_report(payload: bytes) -> Report:
    """Decode ``up/t``; raise `BadMessage`."""
    return _decode(payload, _report, cap=MAX_TELEMETRY_MESSAGE)


def decode_event(payload: bytes) -> Event:
    """Decode ``up/e``; raise `BadMessage`."""
    return _decode(payload, _event, cap=MAX_TELEMETRY_MESSAGE)


def decode_reply(payload: bytes) -> Reply:
    """Decode ``up/r``; raise `BadMessage`."""
    return _decode(payload, _reply, cap=MAX_TELEMETRY_MESSAGE)


def decode_device_state(payload: bytes) -> DeviceState:
    """Decode ``up/state``; raise `BadMessage`."""
    body = _inflate(payload, cap=MAX_TELEMETRY_MESSAGE)
    try:
        message: DeviceState = _device_state.decode(body)
    except _UNREADABLE as error:
        raise BadMessage(f"not a device state: {error}") from error
    _check_version(message.v)
    return message


def decode_acknowledgement(payload: bytes) -> Acknowledgement:
    """Decode ``down/ack``; raise `BadMessage`."""
    return _decode(payload, _acknowledgement, cap=MAX_TELEMETRY_MESSAGE)


def decode_desired_state(payload: bytes) -> DesiredState:
    """Decode ``down/want``; raise `BadMessage`."""
    return _decode(payload, _desired_state, cap=MAX_DESIRED_MESSAGE)


def decode_command_envelope(payload: bytes) -> CommandEnvelope:
    """Decode ``down/cmd``; raise `BadMessage`."""
    return _decode(payload, _command_envelope, cap=MAX_COMMAND_MESSAGE)


def decode_server_state(payload: bytes) -> ServerState:
    """Decode ``srv/state``; raise `BadMessage`."""
    return _decode(payload, _server_state, cap=MAX_TELEMETRY_MESSAGE)


def _decode(payload: bytes, decoder: "msgspec.json.Decoder[M]", *, cap: int) -> M:
    body = _inflate(payload, cap=cap)
    try:
        message = decoder.decode(body)
    except _UNREADABLE as error:
        raise BadMessage(f"not a {decoder.type.__name__}: {error}") from error
    _check_version(message.v)
    return message


def _inflate(payload: bytes, *, cap: int) -> bytes:
    if not payload:
        raise BadMessage("the payload is empty")
    if len(payload) > cap:
        raise BadMessage(f"{len(payload)} bytes are over the cap of {cap}")
    codec, body = payload[0], payload[1:]
    if codec == RAW_JSON:
        return body
    if codec != DEFLATE_1:
        raise BadMessage(f"codec {codec} is unknown; known are {list(CODECS)}")
    press = zlib.decompressobj(-15, _DICTIONARY_1)
    try:
        inflated = press.decompress(body, MAX_INFLATED_MESSAGE)
    except zlib.error as error:
        raise BadMessage(f"cannot inflate: {error}") from error
    if press.unconsumed_tail or press.unused_data or not press.eof:
        raise BadMessage(
            f"inflates over the cap of {MAX_INFLATED_MESSAGE} bytes, is cut short, or goes on after its end"
        )
    return inflated


def _check_version(version: int) -> None:
    if version != WIRE_VERSION:
        raise BadMessage(f"wire version {version} is not spoken here; this side speaks {WIRE_VERSION}")


_encoder = msgspec.json.Encoder()
_report = msgspec.json.Decoder(Report)
_event = msgspec.json.Decoder(Event)
_reply = msgspec.json.Decoder(Reply)
_device_state = msgspec.json.Decoder(Birth | Farewell | Will)
_acknowledgement = msgspec.json.Decoder(Acknowledgement)
_desired_state = msgspec.json.Decoder(DesiredState)
_command_envelope = msgspec.json.Decoder(CommandEnvelope)
_server_state = msgspec.json.Decoder(ServerState)
