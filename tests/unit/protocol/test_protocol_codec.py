import zlib
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import (
    _DICTIONARY_1,
    BadMessage,
    decode_acknowledgement,
    decode_desired_state,
    decode_device_state,
    decode_event,
    decode_report,
    decode_server_state,
    encode,
)
from protocol.messages import (
    Acknowledgement,
    Birth,
    DesiredState,
    Event,
    Farewell,
    Report,
    Resources,
    RunningModel,
    ServerState,
    Will,
    Window,
)
from protocol.names import MAX_DESIRED_MESSAGE, MAX_INFLATED_MESSAGE, MAX_TELEMETRY_MESSAGE
from protocol.states import DeploymentState, EventKind, RejectReason, RuntimeName
from protocol.statistics import CONFIDENCE_BINS, Histogram, ModelStatistics, TruthStatistics

Decode = Callable[[bytes], msgspec.Struct]
DECODERS: list[Decode] = [
    decode_report,
    decode_event,
    decode_device_state,
    decode_acknowledgement,
    decode_desired_state,
    decode_server_state,
]

counts = st.integers(0, 2**40)
times = st.integers(0, 2**53 - 1)
texts = st.text(max_size=30)
digests = st.text("0123456789abcdef", min_size=16, max_size=16)
ranges = st.lists(st.tuples(counts, counts), max_size=4).map(tuple)


def tuples(elements: st.SearchStrategy[object], size: int) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(elements, max_size=size).map(tuple)


histograms = st.builds(
    Histogram, zero=counts, offset=st.integers(-300, 300), counts=tuples(counts, 8), sum=counts, max=counts
)
model_statistics = st.builds(
    ModelStatistics,
    digest=digests,
    requests=counts,
    errors=counts,
    dropped=counts,
    latency=histograms,
    confidence=tuples(counts, CONFIDENCE_BINS),
    classes=tuples(counts, 12),
)
cells = st.tuples(st.integers(0, 99), st.integers(0, 99), counts)
truths = st.builds(TruthStatistics, digest=digests, minute=times, confusion=tuples(cells, 5))
readings = st.none() | st.integers(-(2**50), 2**50)
resources = st.builds(Resources, **dict.fromkeys(Resources.__struct_fields__, readings))
windows = st.builds(
    Window, start=times, span=times, models=tuples(model_statistics, 3), resources=st.none() | resources
)
running = st.builds(
    RunningModel,
    model=texts,
    state=st.sampled_from(DeploymentState),
    version=st.none() | counts,
    digest=st.none() | digests,
    attempt=counts,
    reason=st.none() | st.sampled_from(RejectReason),
)
MESSAGES: dict[str, tuple[Decode, st.SearchStrategy[msgspec.Struct]]] = {
    "report": (
        decode_report,
        st.builds(
            Report,
            spool=texts,
            sequence=counts,
            covers=counts,
            windows=tuples(windows, 3),
            truth=tuples(truths, 3),
            dropped=counts,
        ),
    ),
    "event": (
        decode_event,
        st.builds(
            Event,
            spool=texts,
            sequence=counts,
            at=times,
            kind=st.sampled_from(EventKind),
            model=st.none() | texts,
            version=st.none() | counts,
            digest=st.none() | digests,
            state=st.none() | st.sampled_from(DeploymentState),
            reason=st.none() | st.sampled_from(RejectReason),
            attempt=st.none() | counts,
            detail=texts,
        ),
    ),
    "birth": (
        decode_device_state,
        st.builds(
            Birth,
            boot=texts,
            connection=counts,
            at=times,
            agent=texts,
            device_class=texts,
            timezone=texts,
            runtimes=tuples(st.sampled_from(RuntimeName), 2),
            codecs=tuples(st.integers(0, 255), 3),
            spool=texts,
            director_version=counts,
            director_root=counts,
            image_root=counts,
            models=tuples(running, 3),
            facts=st.dictionaries(texts, texts, max_size=3),
        ),
    ),
    "farewell": (decode_device_state, st.builds(Farewell, boot=texts, connection=counts, at=times)),
    "will": (decode_device_state, st.builds(Will, boot=texts, connection=counts)),
    "acknowledgement": (
        decode_acknowledgement,
        st.builds(
            Acknowledgement,
            spool=texts,
            at=times,
            telemetry=counts,
            events=counts,
            missing_telemetry=ranges,
            missing_events=ranges,
        ),
    ),
    "desired state": (
        decode_desired_state,
        st.builds(
            DesiredState,
            root=tuples(st.binary(max_size=50), 3),
            timestamp=st.binary(max_size=50),
            snapshot=st.binary(max_size=50),
            targets=st.binary(max_size=50),
        ),
    ),
    "server state": (decode_server_state, st.builds(ServerState, up=st.booleans(), epoch=texts, at=times)),
}


@pytest.mark.parametrize("codec", [0, 1])
@pytest.mark.parametrize("name", MESSAGES)
@given(data=st.data())
def test_what_is_encoded_is_decoded(name: str, codec: int, data: st.DataObject) -> None:
    decode, strategy = MESSAGES[name]
    message = data.draw(strategy)
    assert message == decode(encode(message, codec=codec))


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x00", b"\x01", b"\x00{", b"\x00[", b'\x00{"s":"on",']))
def test_noise_is_a_bad_message_and_nothing_else(noise: bytes, start: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(BadMessage):
            decode(start + noise)


EXAMPLE = encode(
    Report(
        spool="s",
        sequence=1,
        windows=(
            Window(start=1, span=2, models=(ModelStatistics(digest="d", requests=3),), resources=Resources(cpu=1)),
        ),
        truth=(TruthStatistics(digest="d", minute=0, confusion=((1, 1, 1),)),),
    )
)


@given(st.integers(1, len(EXAMPLE) - 1), st.binary(min_size=1, max_size=3))
def test_a_damaged_message_is_read_or_refused_but_never_breaks_the_reader(at: int, bytes_: bytes) -> None:
    try:
        report = decode_report(EXAMPLE[:at] + bytes_ + EXAMPLE[at + len(bytes_) :])
    except BadMessage:
        return
    assert isinstance(report, Report)


def deflated(body: bytes) -> bytes:
    press = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY_1)
    return b"\x01" + press.compress(body) + press.flush()


HOSTILE = [
    ("nothing", b""),
    ("only a codec", b"\x00"),
    ("an unknown codec", b"\x02{}"),
    ("another wire version", b'\x00{"v":2,"p":"s","q":1}'),
    ("a field of another type", b'\x00{"p":"s","q":"1"}'),
    ("a fraction for a count", b'\x00{"p":"s","q":1.5}'),
    ("a missing field", b'\x00{"p":"s"}'),
    ("two documents", b'\x00{"p":"s","q":1}{}'),
    ("bytes that are not text", b'\x00{"p":"\xff","q":1}'),
    ("half a surrogate pair", b'\x00{"p":"\\ud800","q":1}'),
    ("a number of many digits", b'\x00{"p":"s","q":' + b"9" * 60_000 + b"}"),
    ("a deep nest in an unknown field", b'\x00{"x":' + b"[" * 60_000),
    ("a deep nest of objects", b"\x00" + b'{"x":' * 12_000),
    ("more than travels", b"\x00" + b" " * MAX_TELEMETRY_MESSAGE),
    ("a bomb", deflated(b" " * (MAX_INFLATED_MESSAGE + 1))),
    ("a large bomb", deflated(b" " * 50_000_000)),
    ("a stream cut short", deflated(b'{"p":"s","q":1}')[:-3]),
    ("a stream that goes on after its end", deflated(b'{"p":"s","q":1}') + b"x"),
    ("deflate without the dictionary", b"\x01" + zlib.compress(b'{"p":"s","q":1}')),
]


@pytest.mark.parametrize("payload", [case[1] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_report(payload)


def test_a_message_up_to_the_cap_is_read() -> None:
    body = b'{"p":"s","q":1}'
    assert 1 == decode_report(b"\x00" + body + b" " * (MAX_TELEMETRY_MESSAGE - 1 - len(body))).sequence
    assert 1 == decode_report(deflated(body + b" " * (MAX_INFLATED_MESSAGE - len(body)))).sequence


def test_a_desired_state_may_be_larger_but_not_without_end() -> None:
    large = DesiredState(root=(b"r" * 100_000,), timestamp=b"", snapshot=b"", targets=b"")
    assert large == decode_desired_state(encode(large))
    with pytest.raises(BadMessage):
        decode_desired_state(b"\x00" + b" " * MAX_DESIRED_MESSAGE)


def test_unknown_fields_are_ignored() -> None:
    assert Report(spool="s", sequence=1) == decode_report(b'\x00{"p":"s","q":1,"from the future":{"a":[1]}}')


def test_a_message_without_a_version_is_of_the_first() -> None:
    assert 1 == decode_report(b'\x00{"p":"s","q":1}').v


def test_a_minute_of_one_model_fits_into_two_hundred_bytes() -> None:
    model = ModelStatistics(
        digest="5f5f5f5f5f5f5f5f",
        requests=60,
        latency=Histogram(offset=58, counts=(1, 3, 9, 17, 20, 8, 2), sum=13_000, max=410),
        confidence=(*[0] * 12, 1, 0, 2, 3, 3, 5, 9, 37),
        classes=(5, 7, 6, 6, 4, 7, 6, 6, 7, 6),
    )
    load = Resources(cpu=125, memory=512_331_776, memory_total=1_024_663_552, control_rss=42_110_976, network_in=1042)
    report = Report(
        spool="00112233aabbccdd",
        sequence=1027,
        windows=(Window(start=1_750_075_200_000, span=60_000, models=(model,), resources=load),),
    )
    assert len(encode(report, codec=1)) < 200


def test_an_unknown_codec_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="codec 7"):
        encode(Will(boot="b", connection=1), codec=7)
