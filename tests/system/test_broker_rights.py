"""Who may do what on a real Mosquitto with the managed configuration."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_world import BrokerWorld, Device, now_ms

from fleet_server.adapters.authority import CertificateAuthority, TlsFiles
from protocol.topics import SERVER_STATE, Channel, device_topic, every_device, shared

pytestmark = pytest.mark.broker

REFUSED = "Not authorized"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerWorld]:
    world = BrokerWorld(tmp_path_factory.mktemp("rights"), "a", "b")
    world.broker.start()
    yield world
    world.broker.stop()


MAY_PUBLISH = [device_topic("a", c) for c in (Channel.STATE, Channel.TELEMETRY, Channel.EVENT, Channel.REPLY)]
MAY_NOT_PUBLISH = [
    device_topic("b", Channel.TELEMETRY),
    device_topic("b", Channel.STATE),
    device_topic("a", Channel.DESIRED),
    device_topic("a", Channel.ACKNOWLEDGEMENT),
    device_topic("b", Channel.DESIRED),
    SERVER_STATE,
    "$CONTROL/dynamic-security/v1",
    "elsewhere",
]
MAY_SUBSCRIBE = ["ew/1/d/a/down/#", device_topic("a", Channel.DESIRED), SERVER_STATE]
MAY_NOT_SUBSCRIBE = [
    "#",
    "ew/1/#",
    "ew/1/d/b/down/#",
    device_topic("b", Channel.DESIRED),
    device_topic("b", Channel.TELEMETRY),
    every_device(Channel.TELEMETRY),
    shared(every_device(Channel.TELEMETRY)),
    shared(every_device(Channel.EVENT)),
    "$share/other/ew/1/d/+/up/t",
    "$share/ingest/ew/1/d/a/down/#",
    "$CONTROL/dynamic-security/v1/response",
    "$SYS/#",
]


def test_a_device_publishes_its_own_upward_channels_and_nothing_else(world: BrokerWorld) -> None:
    with world.device("a") as device:
        assert {topic for topic in MAY_PUBLISH if REFUSED in device.publish(topic)} == set()
        assert {topic for topic in MAY_NOT_PUBLISH if REFUSED not in device.publish(topic)} == set()


def test_a_device_subscribes_to_its_own_downward_channels_and_nothing_else(world: BrokerWorld) -> None:
    with world.device("a") as device:
        assert {f for f in MAY_SUBSCRIBE if "Granted" not in device.subscribe(f)} == set()
        assert {f for f in MAY_NOT_SUBSCRIBE if "Granted" in device.subscribe(f)} == set()


def test_nothing_of_another_device_is_delivered_whatever_was_asked_for(world: BrokerWorld) -> None:
    with world.device("a") as listener, world.device("b") as speaker:
        for filter_ in (*MAY_SUBSCRIBE, *MAY_NOT_SUBSCRIBE):
            listener.subscribe(filter_)
        speaker.publish(device_topic("b", Channel.TELEMETRY), b"secret")
        assert listener.received(0.5) is None


def test_the_name_in_the_certificate_counts_and_not_the_client_id(world: BrokerWorld) -> None:
    files = world.certificate("a")
    with Device(files, world.settings.device_port, client_id="b") as device:
        assert REFUSED in device.publish(device_topic("b", Channel.TELEMETRY))
        assert REFUSED not in device.publish(device_topic("a", Channel.TELEMETRY))


def test_a_certificate_of_an_unknown_ca_is_refused(world: BrokerWorld, tmp_path: Path) -> None:
    strange = CertificateAuthority(tmp_path, hosts=(), now=now_ms())
    files = world.certificate("a", authority=strange)
    with pytest.raises(ConnectionRefusedError):
        Device(files, world.settings.device_port, "a")


def test_a_device_certificate_does_not_open_the_admin_listener(world: BrokerWorld) -> None:
    device = world.certificate("a")
    admin = TlsFiles(certificate=device.certificate, key=device.key, ca=world.settings.admin_tls.ca)
    with pytest.raises(ConnectionRefusedError):
        Device(admin, world.settings.admin_port, "a")


def test_a_device_that_nobody_admitted_connects_to_nothing(world: BrokerWorld) -> None:
    with world.device("stranger") as device:
        assert REFUSED in device.publish(device_topic("stranger", Channel.TELEMETRY))
        assert "Granted" not in device.subscribe("ew/1/d/stranger/down/#")
