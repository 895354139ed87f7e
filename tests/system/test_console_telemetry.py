"""From a device to the console through the real server: enrolment, MQTT over TLS, database, acknowledgement, orders.

The device is a bare MQTT client here, so that this shows what the server does and nothing else.
"""

import queue
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import urllib3
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "unit" / "server_data"))  # the worlds that both floors share
sys.path.insert(0, str(Path(__file__).parent.parent / "unit" / "server_trust"))

from data_world import birth, event, report
from trust_world import bundle_bytes, source
from web_world import Key

from fleet_server.api_types import DeviceView, EventView, ModelVersion, Overview
from fleet_server.app import FleetServer
from fleet_server.cli.__main__ import app as cli
from fleet_server.cli.session import Session
from fleet_server.config import Settings, settle
from protocol.codec import DEFLATE_1, decode_acknowledgement, decode_desired_state, encode
from protocol.device_api import BUNDLES_PATH, CA_PATH, ENROL_PATH, EnrolRequest, EnrolResponse, parse_token
from protocol.messages import RunningModel
from protocol.states import DeploymentState, PresenceState
from protocol.topics import Channel, device_topic, everything_of

pytestmark = pytest.mark.broker


@dataclass
class Fleet:
    """A running server and an operator at it."""

    server: FleetServer
    folder: Path
    session: Session

    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(cli, [*arguments, "--server", self.server.console_url])
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    flags = Settings(
        data=str(folder / "data"),
        host="127.0.0.1",
        console="127.0.0.1:0",
        devices="127.0.0.1:0",
        broker="127.0.0.1:0",
        broker_admin_port=0,
        public_hosts=("localhost",),
    )
    server = FleetServer(settle(Settings(), flags))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEWARDEN_PASSWORD", server.new_password or "")
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        session = Session(server.console_url)
        made = Fleet(server=server, folder=folder, session=session)
        made.run("keys", "init", "--dir", str(folder / "keys"), "--no-passphrase")
        yield made
        session.close()
    server.stop()


@dataclass
class Device:
    """An enrolled device on the broker."""

    id: str
    key: Key
    client: Client
    ca: str
    heard: "queue.Queue[MQTTMessage]" = field(default_factory=queue.Queue)

    def say(self, channel: Channel, message: msgspec.Struct) -> None:
        sent = self.client.publish(device_topic(self.id, channel), encode(message, codec=DEFLATE_1), qos=1)
        sent.wait_for_publish(10)

    def next(self, channel: Channel) -> bytes:
        """Return the next message of a channel; others are dropped."""
        while True:
            message = self.heard.get(timeout=15)
            if message.topic.endswith(channel.value):
                return bytes(message.payload)

    def get(self, fleet: Fleet, path: str) -> urllib3.BaseHTTPResponse:
        return device_request(fleet, "GET", path, ca=self.ca, headers=self.key.bearer(self.id))


def device_request(fleet: Fleet, method: str, path: str, *, ca: str, **options: object) -> urllib3.BaseHTTPResponse:
    context = ssl.create_default_context(cadata=ca)
    with urllib3.PoolManager(ssl_context=context, retries=False, timeout=20.0) as pool:
        return pool.request(method, f"https://localhost:{fleet.server.devices_port}{path}", **options)  # type: ignore[arg-type]  # passed on


@pytest.fixture(scope="module")
def device(fleet: Fleet) -> Iterator[Device]:
    token = parse_token(fleet.run("tokens", "create", "--label", "site=oslo").strip())
    key = Key()
    ca = device_ca(fleet)
    request = EnrolRequest(token_id=token.id, secret=token.secret, device="cam-1", csr=key.csr("cam-1"))
    headers = {"Content-Type": "application/json"}
    answer = device_request(fleet, "POST", ENROL_PATH, ca=ca, body=msgspec.json.encode(request), headers=headers)
    assert answer.status == 200, answer.data
    enrolled = msgspec.json.decode(answer.data, type=EnrolResponse)
    made = Device(id="cam-1", key=key, client=connect(fleet.folder, key, enrolled), ca=ca)
    made.client.on_message = lambda _client, _data, message: made.heard.put(message)
    made.client.subscribe(everything_of("cam-1", "down"), qos=1)
    yield made
    made.client.disconnect()
    made.client.loop_stop()


def device_ca(fleet: Fleet) -> str:
    """Fetch the CA as a new device does, before it can verify anything."""
    with urllib3.PoolManager(cert_reqs="CERT_NONE", retries=False, assert_hostname=False) as pool:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return pool.request("GET", f"https://localhost:{fleet.server.devices_port}{CA_PATH}").data.decode()


def connect(folder: Path, key: Key, enrolled: EnrolResponse) -> Client:
    files = {"cert.pem": enrolled.certificate, "ca.pem": enrolled.ca}
    for name, content in files.items():
        (folder / name).write_text(content)
    private = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(private)
    client = Client(CallbackAPIVersion.VERSION2, client_id="cam-1", protocol=MQTTv5)
    client.tls_set(str(folder / "ca.pem"), str(folder / "cert.pem"), str(folder / "key.pem"))
    client.connect("localhost", enrolled.broker_port)
    client.loop_start()
    return client


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def view(fleet: Fleet) -> DeviceView:
    return fleet.session.get("/devices/cam-1", DeviceView)


def test_a_device_comes_online_and_hears_what_it_should_run(fleet: Fleet, device: Device) -> None:
    device.say(Channel.STATE, birth(1, at=int(time.time() * 1000)))
    assert decode_desired_state(device.next(Channel.DESIRED)).targets
    until(lambda: view(fleet).presence is PresenceState.ONLINE)
    assert (view(fleet).labels, view(fleet).director_version_wanted) == ({"site": "oslo"}, 1)


def test_reports_are_stored_once_and_acknowledged_and_gaps_are_asked_for(fleet: Fleet, device: Device) -> None:
    now = int(time.time() * 1000)
    for number in (1, 2, 2, 5):
        device.say(Channel.TELEMETRY, report(number, start=now))
    until(lambda: fleet.session.get("/overview", Overview).reports == 3)
    told = decode_acknowledgement(device.next(Channel.ACKNOWLEDGEMENT))
    while told.telemetry < 5:
        told = decode_acknowledgement(device.next(Channel.ACKNOWLEDGEMENT))
    assert (told.missing_telemetry, view(fleet).missing) == (((3, 4),), 2)
    for number in (4, 3):
        device.say(Channel.TELEMETRY, report(number, start=now))
    while told.missing_telemetry:
        told = decode_acknowledgement(device.next(Channel.ACKNOWLEDGEMENT))
    assert (told.telemetry, view(fleet).missing, view(fleet).reports) == (5, 0, 5)


def test_what_cannot_be_read_is_counted_and_stops_nothing(fleet: Fleet, device: Device) -> None:
    device.client.publish(device_topic("cam-1", Channel.TELEMETRY), b"\x00nonsense", qos=1).wait_for_publish(10)
    until(lambda: fleet.session.get("/overview", Overview).dead_letters == 1)
    device.say(Channel.EVENT, event(1, at=int(time.time() * 1000), state=DeploymentState.STAGED, detail="after it"))
    until(lambda: any(e.detail == "after it" for e in fleet.session.get("/events", tuple[EventView, ...])))


def test_an_order_reaches_the_device_and_its_bundle_can_be_fetched(fleet: Fleet, device: Device) -> None:
    made = fleet.folder / "digits.ewb"
    made.write_bytes(bundle_bytes(source(content=b"weights" * 1000), 0))
    fleet.run("models", "publish", str(made), "--keys", str(fleet.folder / "keys"))
    (version,) = fleet.session.get("/models", tuple[ModelVersion, ...])
    assert (version.model, version.version, version.running_on) == ("digits", 1, 0)
    fleet.run("deploy", "digits", "1", "--all")
    while version.sha256.encode() not in decode_desired_state(device.next(Channel.DESIRED)).targets:
        pass
    bundle = device.get(fleet, f"{BUNDLES_PATH}/{version.sha256}")
    assert (bundle.status, len(bundle.data)) == (200, version.length)
    running = RunningModel(model="digits", state=DeploymentState.COMMITTED, version=1, digest=version.sha256)
    device.say(Channel.STATE, birth(2, at=int(time.time() * 1000), models=(running,), director_version=2))
    until(lambda: fleet.session.get("/models", tuple[ModelVersion, ...])[0].running_on == 1)
    assert [(m.wanted_version, m.running_version) for m in view(fleet).models] == [(1, 1)]
