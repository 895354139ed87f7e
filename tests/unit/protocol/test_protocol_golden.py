"""One frozen example of every message. A change that breaks one of these breaks devices in the field."""

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import protocol
from protocol.bundle import digest_of, read_manifest, write_bundle
from protocol.codec import (
    CODECS,
    decode_acknowledgement,
    decode_command_envelope,
    decode_desired_state,
    decode_device_state,
    decode_event,
    decode_reply,
    decode_report,
    decode_server_state,
    encode,
)
from protocol.commands import (
    PAYLOAD_TYPE,
    Command,
    RenewCertificateCommand,
    RestartDataPlaneCommand,
    SelfTestCommand,
    decode_command,
    encode_command,
)
from protocol.device_api import DeviceApiError, EnrolRequest, EnrolResponse, RenewRequest, RenewResponse, Standing
from protocol.manifest import (
    Calibrator,
    Golden,
    Manifest,
    Needs,
    Reference,
    TensorSpec,
    decode_manifest,
    encode_manifest,
)
from protocol.messages import (
    Acknowledgement,
    Birth,
    CommandEnvelope,
    DesiredState,
    EnvelopeSignature,
    Event,
    Farewell,
    Reply,
    Report,
    Resources,
    RunningModel,
    ServerState,
    Will,
    Window,
)
from protocol.release import Assignment, DeviceConfig, DirectorScope, ShadowTerms, release_of
from protocol.states import CommandOutcome, DeploymentState, EventKind, RejectReason, RuntimeName
from protocol.statistics import Histogram, ModelStatistics, TruthStatistics

FOLDER = Path(protocol.__file__).parent / "golden"
NOON = 1_750_075_200_000
DIGEST = "5f" * 32

MODEL = b"not a model, but always the same bytes"
SAMPLES = b"not samples either"
MANIFEST = Manifest(
    model="digits",
    version=3,
    title="Digits, third try",
    inputs=(TensorSpec(name="image", dtype="INT8", shape=(-1, 8, 8, 1), scale=0.0625, zero_point=-128),),
    outputs=(TensorSpec(name="scores", dtype="INT8", shape=(-1, 3), scale=0.00390625, zero_point=-128),),
    classes=("zero", "one", "two"),
    needs=Needs(memory=1_500_000, device_classes=("x86_64", "aarch64")),
    golden=Golden(samples=16, tolerance=1.0),
    reference=Reference(samples=300, confidence=(*[0] * 15, 5, 10, 20, 65, 200), classes=(100, 110, 90), right=291),
    calibrator=Calibrator(temperature=1.25, samples=300),
    members={"model.tflite": digest_of(MODEL), "golden.npz": digest_of(SAMPLES)},
    lineage={"recipe": "int8, 200 calibration samples"},
)

MESSAGES: dict[str, tuple[msgspec.Struct, Callable[[bytes], msgspec.Struct]]] = {
    "birth-1": (
        Birth(
            boot="b00f",
            connection=42,
            at=NOON,
            agent="0.1.0",
            device_class="x86_64",
            timezone="Europe/Oslo",
            runtimes=(RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME),
            codecs=(0, 1),
            spool="00112233aabbccdd",
            director_version=17,
            director_root=2,
            models=(
                RunningModel(
                    model="digits",
                    state=DeploymentState.REJECTED,
                    version=2,
                    digest=DIGEST,
                    attempt=1,
                    reason=RejectReason.SELFTEST_FAILED,
                ),
                RunningModel(model="faces", state=DeploymentState.IDLE),
            ),
            facts={"machine": "x86_64", "cpus": "4"},
        ),
        decode_device_state,
    ),
    "farewell-1": (Farewell(boot="b00f", connection=42, at=NOON), decode_device_state),
    "will-1": (Will(boot="b00f", connection=42), decode_device_state),
    "report-1": (
        Report(
            spool="00112233aabbccdd",
            sequence=1027,
            covers=2,
            windows=(
                Window(
                    start=NOON,
                    span=120_000,
                    models=(
                        ModelStatistics(
                            digest=DIGEST[:16],
                            requests=61,
                            errors=1,
                            dropped=2,
                            latency=Histogram(zero=1, offset=60, counts=(20, 0, 39), sum=13_456, max=300),
                            confidence=(*[0] * 18, 10, 50),
                            classes=(20, 30, 10),
                        ),
                    ),
                    resources=Resources(
                        cpu=125,
                        memory=512_000_000,
                        memory_total=1_000_000_000,
                        control_rss=42_000_000,
                        data_plane_rss=70_000_000,
                        network_in=1000,
                        network_out=2000,
                        disk_free=9_000_000_000,
                        temperature=453,
                    ),
                ),
            ),
            truth=(TruthStatistics(digest=DIGEST[:16], minute=NOON, confusion=((0, 0, 9), (1, 2, 1))),),
            dropped=5,
        ),
        decode_report,
    ),
    "event-1": (
        Event(
            spool="00112233aabbccdd",
            sequence=7,
            at=NOON,
            kind=EventKind.DEPLOYMENT,
            model="digits",
            version=3,
            digest=DIGEST,
            state=DeploymentState.ROLLED_BACK,
            reason=RejectReason.CRASHED_IN_PROBATION,
            attempt=1,
            detail="the data plane died twice",
        ),
        decode_event,
    ),
    "report-refusals-1": (
        Report(
            spool="00112233aabbccdd",
            sequence=1028,
            windows=(
                Window(
                    start=NOON,
                    span=60_000,
                    models=(ModelStatistics(digest=DIGEST[:16], requests=40, dropped=9, late=4, shed=3),),
                ),
            ),
        ),
        decode_report,
    ),
    "acknowledgement-1": (
        Acknowledgement(
            spool="00112233aabbccdd",
            at=NOON,
            telemetry=1027,
            events=7,
            missing_telemetry=((3, 5), (9, 9)),
            missing_events=((2, 2),),
        ),
        decode_acknowledgement,
    ),
    "desired-state-1": (
        DesiredState(root=(b'{"root":2}',), timestamp=b'{"t":1}', snapshot=b'{"s":1}', targets=b'{"d":1}'),
        decode_desired_state,
    ),
    "acknowledgement-replies-1": (
        Acknowledgement(spool="00112233aabbccdd", at=NOON, events=7, replies=4, missing_replies=((2, 3),)),
        decode_acknowledgement,
    ),
    "reply-1": (
        Reply(
            spool="00112233aabbccdd",
            sequence=3,
            at=NOON,
            command="c-0a1b",
            outcome=CommandOutcome.REFUSED,
            reason=RejectReason.REPLAYED,
            detail="sequence 8 comes after 9",
        ),
        decode_reply,
    ),
    "command-envelope-1": (
        CommandEnvelope(
            payload=b'{"device":"cam-7"}',
            payload_type=PAYLOAD_TYPE,
            signatures=(EnvelopeSignature(keyid="ab" * 32, sig=bytes(range(64))),),
        ),
        decode_command_envelope,
    ),
    "server-state-1": (ServerState(up=True, epoch="e90c", at=NOON), decode_server_state),
}

DOCUMENTS: dict[str, msgspec.Struct] = {
    "enrol-request-1": EnrolRequest(token_id="0123abcd", secret="s" * 24, device="cam-7", csr="PEM"),
    "enrol-response-1": EnrolResponse(
        certificate="PEM",
        ca="PEM",
        image_root=b"{}",
        director_root=b"{}",
        broker_host="fleet.example",
        broker_port=8883,
        labels={"site": "oslo"},
    ),
    "standing-1": Standing(ca="PEM", expires=NOON),
    "renew-request-1": RenewRequest(csr="PEM"),
    "renew-response-1": RenewResponse(certificate="PEM", ca="PEM"),
    "device-api-error-1": DeviceApiError(error="the token is used up", remedy="ask for a new one"),
    "release-1": release_of(MANIFEST),
    "assignment-1": Assignment(rollout="r-12", attempt=2),
    "assignment-2": Assignment(rollout="r-13", forced=True, shadow=ShadowTerms(share=50, requests=500)),
    "director-scope-1": DirectorScope(device="cam-7", issued=NOON, config=DeviceConfig(window_seconds=10)),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_this_version_reads_and_writes_as_ever(name: str) -> None:
    message, decode = MESSAGES[name]
    frozen = (FOLDER / f"{name}.json").read_bytes().rstrip(b"\n")
    assert message == decode(b"\x00" + frozen)
    assert b"\x00" + frozen == encode(message)


@pytest.mark.parametrize("name", MESSAGES)
def test_what_was_deflated_with_dictionary_1_is_read_for_ever(name: str) -> None:
    message, decode = MESSAGES[name]
    assert message == decode((FOLDER / f"{name}.deflate").read_bytes())


COMMANDS = {
    "command-self-test-1": SelfTestCommand(model="digits"),
    "command-restart-data-plane-1": RestartDataPlaneCommand(),
    "command-renew-certificate-1": RenewCertificateCommand(),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_this_version_reads_and_writes_as_ever(name: str) -> None:
    command = Command(
        device="cam-7",
        id="c-0a1b",
        sequence=NOON,
        issued=NOON,
        expires=NOON + 600_000,
        command=COMMANDS[name],
    )
    frozen = (FOLDER / f"{name}.json").read_bytes().rstrip(b"\n")
    assert command == decode_command(frozen)
    assert frozen == encode_command(command)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_of_this_version_reads_and_writes_as_ever(name: str) -> None:
    document = DOCUMENTS[name]
    frozen = (FOLDER / f"{name}.json").read_bytes().rstrip(b"\n")
    assert document == msgspec.json.decode(frozen, type=type(document))
    assert frozen == msgspec.json.encode(document)


def test_a_manifest_of_this_format_reads_and_writes_as_ever() -> None:
    frozen = (FOLDER / "manifest-1.json").read_bytes()
    assert MANIFEST == decode_manifest(frozen)
    assert frozen == encode_manifest(MANIFEST)


def test_a_bundle_of_this_format_is_the_same_bytes_as_ever() -> None:
    frozen = (FOLDER / "bundle-1.ewb").read_bytes()
    assert MANIFEST == read_manifest(io.BytesIO(frozen))
    target = io.BytesIO()
    write_bundle(target, MANIFEST, {"model.tflite": MODEL, "golden.npz": SAMPLES})
    assert frozen == target.getvalue()


def test_nothing_else_is_frozen_here() -> None:
    expected = {f"{name}.json" for name in (*MESSAGES, *DOCUMENTS, *COMMANDS, "manifest-1")}
    expected |= {f"{name}.deflate" for name in MESSAGES} | {"bundle-1.ewb"}
    assert expected == {file.name for file in FOLDER.iterdir()}


def test_deflate_is_the_newest_codec_that_is_frozen() -> None:
    assert (0, 1) == tuple(CODECS)
