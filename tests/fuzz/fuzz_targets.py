"""What a stranger's bytes reach, one function per reader: any bytes in, only the reader's own errors may come out.

The same functions are driven by Hypothesis (``tests/unit/inference/test_fuzz_readers.py``, in ``make test``) and for
longer, guided by coverage, by atheris (``make fuzz``). What breaks one becomes a file in ``corpus/``, and so a test.
"""

import io
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np

from agent.channel import Channel, ChannelClosed
from agent.client import Client, InferenceError
from agent.config import AgentSettings
from agent.core.pipelines import ImagePreprocess, JsonPreprocess, RawPreprocess
from agent.inference.answering import encode_answer
from agent.inference.encoding import accepted_coding, coding_of, inflated
from agent.inference.http import Disconnected, HttpConnection, Limits
from agent.inference.parsing import HttpError, check_local, parse_head
from agent.inference.pipelines.flow import BadFrame
from agent.inference.pipelines.preparing import prepare
from agent.inference.reading import decode_call
from agent.inference.tensors import BadTensor, NotARequest, Signature, size
from protocol.bundle import BadBundle, unpack
from protocol.codec import (
    BadMessage,
    decode_acknowledgement,
    decode_command_envelope,
    decode_desired_state,
    decode_device_state,
    decode_event,
    decode_reply,
    decode_report,
    decode_server_state,
)
from protocol.manifest import BadManifest, TensorSpec, decode_manifest
from protocol.settings import BadSettings, decode_settings
from runtime.arrays import BadArrays, read_arrays

CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT = 60_000  # bytes; a socket pair holds them without a reader
BODY_CAP = 4096
ARRAYS_CAP = 1 << 20

_DIGITS = Signature(
    model="digits",
    version=1,
    inputs=(TensorSpec(name="image", dtype="INT8", shape=(1, 8)),),
    outputs=(TensorSpec(name="scores", dtype="INT8", shape=(1, 3)),),
)
_PICTURE = Signature(
    model="picture",
    version=3,
    inputs=(TensorSpec(name="photo", dtype="INT8", shape=(1, 4, 4, 3), scale=0.1, zero_point=-3),),
    outputs=(),
)
_PAIR = Signature(
    model="pair",
    version=2,
    inputs=(
        TensorSpec(name="a", dtype="FP32", shape=(1, 2)),
        TensorSpec(name="b", dtype="BOOL", shape=(2,)),
        TensorSpec(name="c", dtype="UINT64", shape=(2, 2)),
    ),
    outputs=(TensorSpec(name="y", dtype="FP32", shape=(2,)), TensorSpec(name="z", dtype="INT64", shape=(1,))),
)


def head(data: bytes) -> None:
    """Read the head of a request, and what is asked of it."""
    try:
        found = parse_head(data)
        check_local(found)
        coding_of(found.headers)
        accepted_coding(found.headers)
    except HttpError as error:
        if not 400 <= error.status < 600:
            raise AssertionError from error


def connection(data: bytes) -> None:
    """Read requests from a connection until it ends."""
    with _arrived(data) as sock:
        peer = HttpConnection(sock, Limits(head_bytes=1024, body_bytes=BODY_CAP))
        try:
            while (found := peer.read_head()) is not None:
                assert len(peer.read_body(found, BODY_CAP)) == found.content_length
        except (HttpError, Disconnected):
            return


def body(data: bytes) -> None:
    """Inflate a body. The first byte chooses the coding."""
    for coding in ("gzip", "deflate"):
        try:
            assert len(inflated(memoryview(data), coding, BODY_CAP)) <= BODY_CAP
        except HttpError as error:
            if error.status not in {400, 413}:
                raise AssertionError from error


def tensors(data: bytes) -> None:
    """Read an inference request. The first two bytes are the length of its JSON; 65535 says that all of it is."""
    length, rest = int.from_bytes(data[:2], "big"), memoryview(data)[2:]
    for signature in (_DIGITS, _PAIR):
        try:
            call = decode_call(rest, None if length == 0xFFFF else length, signature)
        except (NotARequest, BadTensor):
            continue
        assert [len(one) for one in call.inputs] == [size(spec) for spec in signature.inputs]
        encode_answer(call, "id", [bytes(size(spec)) for spec in signature.outputs], signature)


def frame(data: bytes) -> None:
    """Make tensors of a pipeline's frame; the first byte chooses how."""
    hows = (RawPreprocess(), JsonPreprocess(), JsonPreprocess(values="tensor"), ImagePreprocess())
    how = hows[data[0] % len(hows)] if data else hows[0]
    for signature in (_DIGITS, _PAIR, _PICTURE):
        try:
            inputs = prepare(data[1:], how, signature)
        except (BadFrame, BadTensor):
            continue
        assert [len(one) for one in inputs] == [size(spec) for spec in signature.inputs]


def answer(data: bytes) -> None:
    """Read a response, as a client."""
    with _arrived(data) as sock, Client("/nowhere") as client:
        client._sock = sock.dup()  # its peer has spoken already, without listening
        try:
            client.infer("m", {"x": np.zeros(4, np.int8)})
        except InferenceError:
            return


def bundle(data: bytes) -> None:
    """Unpack a bundle."""
    try:
        unpack(io.BytesIO(data), lambda _: io.BytesIO())
    except BadBundle:
        return


def manifest(data: bytes) -> None:
    """Read a manifest."""
    try:
        decode_manifest(data)
    except BadManifest:
        return


def arrays(data: bytes) -> None:
    """Read an ``.npz``."""
    try:
        found = read_arrays(io.BytesIO(data), ARRAYS_CAP)  # type: ignore[arg-type] - a file is read like a path's
    except BadArrays:
        return
    assert sum(one.nbytes for one in found.values()) <= ARRAYS_CAP


def channel(data: bytes) -> None:
    """Read frames of the control channel, as the data plane and as control."""
    for receive in (Channel.receive_order, Channel.receive_answer):
        with _arrived(data) as sock:
            ours = Channel(sock)
            try:
                while receive(ours):
                    pass
            except ChannelClosed:
                continue


def codec(data: bytes) -> None:
    """Decode a payload as every message that there is."""
    for decode in (
        decode_report,
        decode_event,
        decode_reply,
        decode_command_envelope,
        decode_device_state,
        decode_acknowledgement,
        decode_desired_state,
        decode_server_state,
    ):
        try:
            decode(data)
        except BadMessage:
            continue


def settings(data: bytes) -> None:
    """Read ``agent.toml``."""
    try:
        decode_settings(data.decode("utf-8", "replace"), AgentSettings, "agent.toml")
    except BadSettings:
        return


@contextmanager
def _arrived(data: bytes) -> Iterator[socket.socket]:
    """Yield a socket on which these bytes have arrived, and nothing more will."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[:MAX_INPUT])
        theirs.shutdown(socket.SHUT_WR)
        yield ours


Target = Callable[[bytes], None]
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        one.__name__: one
        for one in (
            head,
            connection,
            body,
            tensors,
            frame,
            answer,
            bundle,
            manifest,
            arrays,
            channel,
            codec,
            settings,
        )
    }
)


def seeds(name: str) -> list[bytes]:
    """Return the corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
