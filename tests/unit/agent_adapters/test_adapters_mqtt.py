import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from device_pki import Authority
from uplink_broker import Broker, Server, Wire, wait_for

from agent.adapters.mqtt import BrokerSettings, Ears, MqttUplink, Words
from agent.core.retry import BackOff
from agent.ports import EVENTS, TELEMETRY
from protocol.topics import SERVER_STATE

pytestmark = pytest.mark.broker

STATE = "ew/1/d/cam-7/up/state"
AT_ONCE = BackOff(first=0.05, ceiling=0.2)
NEVER_AGAIN = BackOff(first=60.0, ceiling=60.0)


class Agent:
    """An uplink, and what it told."""

    def __init__(self, device: str, port: int, tls: Callable[[], ssl.SSLContext], **changes: Any) -> None:
        self.told: dict[str, list[Any]] = {name: [] for name in Ears.__dataclass_fields__}
        self.numbers = itertools.count(1)
        self.facts = b"first"
        ears = {name: self._ear(name) for name in self.told}
        ears.update(changes.pop("ears", {}))
        settings = {"host": "127.0.0.1", "port": port, "back_off": AT_ONCE, "will_delay": 0, **changes}
        self.uplink = MqttUplink(
            device=device,
            broker=BrokerSettings(**settings),
            tls=tls,
            next_connection=lambda: next(self.numbers),
            random=lambda: 0.99,
            words=Words(
                birth=lambda number: b"on %d %s" % (number, self.facts),
                will=lambda number: b"lost %d" % number,
                farewell=lambda number: b"off %d" % number,
            ),
            ears=Ears(**ears),
        )

    def _ear(self, name: str) -> Callable[..., None]:
        return lambda *words: self.told[name].append(words[0] if len(words) == 1 else words)

    def start(self) -> "Agent":
        self.uplink.start()
        return self

    def connect(self) -> "Agent":
        self.start()
        wait_for(lambda: self.told["on_connected"])
        return self

    def stop(self) -> None:
        self.uplink.stop(5)


@pytest.fixture(scope="module")
def devices() -> Authority:
    return Authority("Device CA")


@pytest.fixture(scope="module")
def running(devices: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    folder = tmp_path_factory.mktemp("broker")
    broker = Broker(folder, devices, Authority("Admin CA"), {"cam-7": "#", "cam-9": "state t"})
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def broker(running: Broker) -> Broker:
    """Start afresh, so that neither sessions nor retained messages of another test are there."""
    running.stop()
    running.start()
    return running


@pytest.fixture
def server(broker: Broker, tmp_path: Path) -> Iterator[Server]:
    server = broker.server(tmp_path / "srv")
    yield server
    server.close()


@pytest.fixture
def wire(broker: Broker) -> Iterator[Wire]:
    wire = Wire(broker.port)
    yield wire
    wire.close()


@pytest.fixture
def make(broker: Broker, devices: Authority, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def make(device: str = "cam-7", port: int = 0, **changes: Any) -> Agent:
        context = devices.client_tls(tmp_path / device, device, devices.pem)
        agents.append(Agent(device, port or broker.port, lambda: context, **changes))
        return agents[-1]

    yield make
    for agent in agents:
        agent.stop()


Make = Callable[..., Agent]


# ---------------------------------------------------------------- presence
def test_a_birth_is_retained_at_each_connection_and_when_asked(make: Make, server: Server, broker: Broker) -> None:
    agent = make().connect()
    wait_for(lambda: server.payloads(STATE) == [b"on 1 first"])
    agent.facts = b"second"

    agent.uplink.announce()

    wait_for(lambda: server.payloads(STATE) == [b"on 1 first", b"on 1 second"])
    assert agent.told["on_connected"] == [False]
    late = broker.server(Path(broker._folder) / "late")
    wait_for(lambda: (STATE, b"on 1 second", True) in late.heard)
    late.close()


def test_a_cut_wire_lets_the_broker_publish_the_will(make: Make, server: Server, wire: Wire) -> None:
    agent = make(port=wire.port, back_off=NEVER_AGAIN).connect()

    wire.cut()

    wait_for(lambda: server.payloads(STATE)[-1:] == [b"lost 1"])
    wait_for(lambda: agent.told["on_disconnected"])
    assert not agent.uplink.connected


def test_a_short_cut_within_the_will_delay_is_no_death(make: Make, server: Server, wire: Wire) -> None:
    agent = make(port=wire.port, will_delay=30).connect()
    wait_for(lambda: server.payloads(STATE))

    wire.cut()
    wait_for(lambda: agent.told["on_disconnected"])
    wire.mend()

    wait_for(lambda: len(agent.told["on_connected"]) == 2)
    assert agent.told["on_connected"] == [False, True]  # the broker kept the session
    wait_for(lambda: len(server.payloads(STATE)) == 2)
    numbers = [int(payload.split()[1]) for payload in server.payloads(STATE)]
    assert all(payload.startswith(b"on") for payload in server.payloads(STATE))
    assert numbers[0] == 1 < numbers[1]


def test_a_stop_says_farewell_and_leaves_no_will(make: Make, server: Server) -> None:
    agent = make().connect()

    agent.stop()

    wait_for(lambda: server.payloads(STATE)[-1:] == [b"off 1"])
    assert agent.told["on_disconnected"] == ["the agent stopped"]
    assert not agent.uplink._thread.is_alive()
    assert not agent.uplink.publish(TELEMETRY, 1, b"x")


def test_a_broker_that_does_not_answer_holds_up_a_stop_only_for_its_timeout(make: Make, broker: Broker) -> None:
    agent = make().connect()
    broker.freeze(True)
    try:
        agent.uplink.stop(0.3)
    finally:
        broker.freeze(False)

    assert not agent.uplink._thread.is_alive()


# ---------------------------------------------------------------- records
def test_a_record_is_published_on_its_stream_and_told_when_the_broker_has_it(make: Make, server: Server) -> None:
    agent = make().connect()

    assert agent.uplink.publish(TELEMETRY, 1, b"report")
    assert agent.uplink.publish(EVENTS, 1, b"event")

    wait_for(lambda: len(agent.told["on_published"]) == 2)
    assert agent.told["on_published"] == [(TELEMETRY, 1), (EVENTS, 1)]
    wait_for(lambda: server.payloads("ew/1/d/cam-7/up/t") == [b"report"])
    wait_for(lambda: server.payloads("ew/1/d/cam-7/up/e") == [b"event"])


def test_nothing_is_taken_while_not_connected(make: Make, server: Server, broker: Broker) -> None:
    agent = make()
    assert not agent.uplink.publish(TELEMETRY, 1, b"before")
    agent.connect()
    server.close()
    broker.stop()
    wait_for(lambda: not agent.uplink.connected)
    assert not agent.uplink.publish(TELEMETRY, 2, b"down")
    broker.start()
    wait_for(lambda: len(agent.told["on_connected"]) == 2)

    assert agent.uplink.publish(TELEMETRY, 3, b"after")
    wait_for(lambda: agent.told["on_published"] == [(TELEMETRY, 3)])


def test_at_most_twenty_are_in_flight_and_none_twice(make: Make, server: Server, broker: Broker) -> None:
    agent = make().connect()
    wait_for(lambda: server.payloads(STATE))
    broker.freeze(True)
    try:
        taken = [agent.uplink.publish(TELEMETRY, number, b"%d" % number) for number in range(1, 23)]
        again = agent.uplink.publish(TELEMETRY, 1, b"1")
    finally:
        broker.freeze(False)

    assert taken == [True] * 20 + [False] * 2
    assert again  # it is on its way already
    wait_for(lambda: len(agent.told["on_published"]) == 20)
    wait_for(lambda: len(server.payloads("ew/1/d/cam-7/up/t")) == 20)


def test_a_record_that_the_broker_refuses_is_not_published(make: Make, server: Server) -> None:
    agent = make("cam-9").connect()

    assert agent.uplink.publish(EVENTS, 1, b"event")

    wait_for(lambda: agent.told["on_unpublished"])
    assert agent.told["on_unpublished"] == [(EVENTS, 1, "Not authorized")]
    assert agent.told["on_published"] == []
    assert agent.uplink.connected


# ---------------------------------------------------------------- what comes down
def test_each_message_reaches_its_ear(make: Make, server: Server) -> None:
    server.say("ew/1/d/cam-7/down/want", b"want", retain=True)
    server.say(SERVER_STATE, b"up", retain=True)
    agent = make().connect()
    wait_for(lambda: agent.told["on_desired"] == [b"want"])
    wait_for(lambda: agent.told["on_server_state"] == [b"up"])

    server.say("ew/1/d/cam-7/down/ack", b"ack")
    server.say("ew/1/d/cam-7/down/want", b"", retain=True)  # cleared: says nothing
    server.say("ew/1/d/cam-7/down/news", b"of a later version")
    server.say("ew/1/d/cam-7/down/ack", b"ack 2")

    wait_for(lambda: agent.told["on_acknowledgement"] == [b"ack", b"ack 2"])
    assert agent.told["on_desired"] == [b"want"]


def test_an_error_in_a_callback_does_not_end_the_uplink(make: Make, server: Server) -> None:
    def fail(payload: bytes) -> None:
        raise RuntimeError("a bug elsewhere")

    agent = make(ears={"on_desired": fail}).connect()
    server.say("ew/1/d/cam-7/down/want", b"want")

    server.say("ew/1/d/cam-7/down/ack", b"ack")

    wait_for(lambda: agent.told["on_acknowledgement"] == [b"ack"])
    assert agent.told["on_disconnected"] == []


def test_a_message_over_the_cap_is_never_received(make: Make, server: Server) -> None:
    agent = make().connect()
    server.say("ew/1/d/cam-7/down/want", bytes(300_000))
    server.say("ew/1/d/cam-7/down/want", b"small")

    wait_for(lambda: agent.told["on_desired"] == [b"small"])
    assert agent.told["on_disconnected"] == []


# ---------------------------------------------------------------- brokers that are not friendly
def test_a_refused_subscription_is_trouble_told_once_and_tried_again(make: Make) -> None:
    agent = make("cam-8").start()  # the broker knows no such device

    wait_for(lambda: len(agent.told["on_connected"]) >= 3)

    assert ["does not let this device listen" in str(trouble) for trouble in agent.told["on_trouble"]] == [True]


def test_a_broker_of_another_ca_is_trouble_and_never_sees_a_number(
    broker: Broker, devices: Authority, tmp_path: Path
) -> None:
    context = devices.client_tls(tmp_path, "cam-7", Authority().pem)
    attempts: list[int] = []

    def tls() -> ssl.SSLContext:
        attempts.append(1)
        return context

    agent = Agent("cam-7", broker.port, tls).start()
    wait_for(lambda: len(attempts) >= 3)
    agent.stop()

    assert len(agent.told["on_trouble"]) == 1
    assert next(agent.numbers) == 2
    assert agent.told["on_connected"] == []


def test_a_broker_that_is_not_there_is_tried_again(make: Make, broker: Broker) -> None:
    broker.stop()
    agent = make().start()
    wait_for(agent.uplink._thread.is_alive)
    broker.start()

    wait_for(lambda: agent.uplink.connected)


def test_a_packet_of_an_endless_length_ends_the_connection(devices: Authority, make: Make, tmp_path: Path) -> None:
    """A broker may ignore the cap it was told; what it announces is not even waited for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tls = devices.server_tls(tmp_path / "rogue")
        thread = threading.Thread(target=be_rogue, args=(listener, tls))
        thread.start()
        agent = make(port=listener.getsockname()[1], back_off=NEVER_AGAIN).start()
        wait_for(lambda: agent.told["on_disconnected"])
        agent.stop()
        thread.join()

    assert "over the cap" in agent.told["on_disconnected"][0]


def be_rogue(listener: socket.socket, tls: ssl.SSLContext) -> None:
    plain, _ = listener.accept()
    with tls.wrap_socket(plain, server_side=True) as broker:
        broker.recv(65536)  # CONNECT
        broker.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK, success, no properties
        broker.sendall(b"\x30\xff\xff\xff\x7f" + bytes(10_000))  # PUBLISH of 256 MiB
        while True:
            try:
                if not broker.recv(65536):
                    return
            except OSError:
                return
