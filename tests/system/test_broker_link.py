"""The server's own connection: what it hears, what it says, and that it comes back."""

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broker_world import BrokerWorld, eventually

from fleet_server.adapters.broker import BrokerLink
from protocol.codec import decode_acknowledgement, decode_command_envelope, decode_desired_state, decode_server_state
from protocol.messages import Acknowledgement, CommandEnvelope, DesiredState
from protocol.topics import SERVER_STATE, Channel, device_topic

pytestmark = pytest.mark.broker

DESIRE = DesiredState(timestamp=b"t", snapshot=b"s", targets=b"x")


class Ingest:
    """Takes messages as ingest does; says "not now" while it is full."""

    def __init__(self) -> None:
        self.taken: queue.Queue[tuple[str, bytes, Callable[[], None]]] = queue.Queue()
        self.full = threading.Event()
        self.refused = 0
        self.connections = 0

    def on_message(self, topic: str, payload: bytes, acknowledge: Callable[[], None]) -> bool:
        if self.full.is_set():
            self.refused += 1
            return False
        self.taken.put((topic, payload, acknowledge))
        return True

    def on_connected(self) -> None:
        self.connections += 1

    def next(self) -> tuple[str, bytes]:
        topic, payload, acknowledge = self.taken.get(timeout=10)
        acknowledge()
        return topic, payload


@pytest.fixture
def world(tmp_path: Path) -> Iterator[BrokerWorld]:
    world = BrokerWorld(tmp_path, "a", "b")
    world.broker.start()
    yield world
    world.broker.stop()


@pytest.fixture
def ingest() -> Ingest:
    return Ingest()


@pytest.fixture
def link(world: BrokerWorld, ingest: Ingest) -> Iterator[BrokerLink]:
    link = world.link(on_message=ingest.on_message, on_connected=ingest.on_connected)
    link.start()
    assert eventually(lambda: link.connected and ingest.connections == 1)
    yield link
    link.stop()


def test_what_devices_say_comes_in_on_all_four_channels(world: BrokerWorld, link: BrokerLink, ingest: Ingest) -> None:
    channels = (Channel.STATE, Channel.TELEMETRY, Channel.EVENT, Channel.REPLY)
    with world.device("a") as device:
        for channel in channels:
            device.publish(device_topic("a", channel), channel.value.encode())
    heard = {ingest.next() for _ in channels}
    assert heard == {(device_topic("a", channel), channel.value.encode()) for channel in channels}


def test_a_device_gets_its_desired_state_its_acknowledgement_and_the_servers_state(
    world: BrokerWorld, link: BrokerLink
) -> None:
    link.publish_desired("a", DESIRE)
    with world.device("a") as device:
        device.subscribe("ew/1/d/a/down/#")
        topic, payload = device.received() or ("", b"")
        assert (topic, decode_desired_state(payload)) == (device_topic("a", Channel.DESIRED), DESIRE)
        link.acknowledge("a", Acknowledgement(spool="s", at=1, telemetry=7))
        topic, payload = device.received() or ("", b"")
        assert (topic, decode_acknowledgement(payload).telemetry) == (device_topic("a", Channel.ACKNOWLEDGEMENT), 7)
        device.subscribe(SERVER_STATE)
        _, payload = device.received() or ("", b"")
        state = decode_server_state(payload)
        assert (state.up, state.epoch) == (True, "epoch-1")


def test_a_command_reaches_its_device_and_no_other_and_is_not_retained(world: BrokerWorld, link: BrokerLink) -> None:
    command = CommandEnvelope(payload=b"{}", payload_type="x", signatures=())
    with world.device("a") as device, world.device("b") as other:
        device.subscribe("ew/1/d/a/down/#")
        other.subscribe("ew/1/d/b/down/#")
        link.send_command("a", command, life_seconds=60)
        topic, payload = device.received() or ("", b"")
        assert (topic, decode_command_envelope(payload)) == (device_topic("a", Channel.COMMAND), command)
        assert other.received(timeout=0.5) is None
    with world.device("a") as late:
        late.subscribe("ew/1/d/a/down/#")
        assert late.received(timeout=0.5) is None  # nothing is retained


def test_a_device_that_enrols_while_the_broker_runs_gets_its_rights_at_once(
    world: BrokerWorld, link: BrokerLink, ingest: Ingest
) -> None:
    link.admit("new")
    link.admit("new")  # again changes nothing
    with world.device("new") as device:
        assert "Granted" in device.subscribe("ew/1/d/new/down/#")
        device.publish(device_topic("new", Channel.EVENT), b"hello")
        assert ingest.next() == (device_topic("new", Channel.EVENT), b"hello")
        assert "Not authorized" in device.publish(device_topic("a", Channel.EVENT))


def test_many_devices_are_admitted_in_one_go_and_known_ones_left_alone(world: BrokerWorld, link: BrokerLink) -> None:
    link.admit_all(["a", "b", *(f"d{n}" for n in range(120))])
    for name in ("a", "d0", "d119"):
        with world.device(name) as device:
            assert "Granted" in device.subscribe(f"ew/1/d/{name}/down/#")


def test_rights_given_while_it_ran_are_there_after_the_broker_was_killed(
    world: BrokerWorld, link: BrokerLink, ingest: Ingest
) -> None:
    world.known.append("new")  # the registry stores the device before it is admitted
    link.admit("new")
    kill_broker(world)
    assert eventually(lambda: ingest.connections == 2)
    with world.device("new") as device:
        assert "Granted" in device.subscribe("ew/1/d/new/down/#")


def test_an_admission_that_failed_is_made_up_for(world: BrokerWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_server.adapters.broker.OWED_EVERY", 0.1)
    link = world.link()
    link.admit("late")  # there is no connection yet
    link.start()
    try:

        def may_speak() -> bool:
            with world.device("late") as device:
                return "Not authorized" not in device.publish(device_topic("late", Channel.EVENT))

        assert eventually(may_speak)
    finally:
        link.stop()


def test_it_comes_back_after_the_broker_was_killed_and_says_so(
    world: BrokerWorld, link: BrokerLink, ingest: Ingest
) -> None:
    kill_broker(world)
    link.publish_desired("a", DESIRE)  # nobody hears it, and it must neither raise nor wait
    assert eventually(lambda: ingest.connections == 2)
    assert link.connected
    with world.device("a") as device:
        device.publish(device_topic("a", Channel.EVENT), b"again")
        assert ingest.next() == (device_topic("a", Channel.EVENT), b"again")


def test_what_was_refused_is_offered_again_in_order(world: BrokerWorld, link: BrokerLink, ingest: Ingest) -> None:
    ingest.full.set()
    with world.device("a") as device:
        for n in range(20):
            device.publish(device_topic("a", Channel.TELEMETRY), b"%d" % n)
        assert eventually(lambda: ingest.refused > 0)
        ingest.full.clear()
        assert [ingest.next()[1] for _ in range(20)] == [b"%d" % n for n in range(20)]


def test_more_messages_than_the_receive_maximum_all_arrive_once_they_are_acknowledged(
    world: BrokerWorld, link: BrokerLink, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.device("a") as device:
        for _ in range(1200):
            device.publish(device_topic("a", Channel.TELEMETRY))
    assert eventually(lambda: ingest.taken.qsize() >= 1000)
    assert ingest.taken.qsize() == 1000
    for _ in range(1200):
        ingest.next()
    assert ingest.taken.empty()


def test_an_error_in_a_handler_does_not_make_it_deaf(world: BrokerWorld) -> None:
    heard, greeted = [], []

    def broken(topic: str, payload: bytes, acknowledge: Callable[[], None]) -> bool:
        heard.append(payload)
        raise RuntimeError("a bug in ingest")

    def greet() -> None:
        greeted.append(True)
        raise RuntimeError("a bug in what follows a connection")

    link = world.link(on_message=broken, on_connected=greet)
    link.start()
    try:
        assert eventually(lambda: greeted), "before that nobody listens, and the broker keeps nothing"
        with world.device("a") as device:
            for word in (b"one", b"two"):
                device.publish(device_topic("a", Channel.EVENT), word)
            assert eventually(lambda: heard == [b"one", b"two"])
    finally:
        link.stop()


def test_an_acknowledgement_for_an_old_connection_does_not_count_on_the_new_one(
    world: BrokerWorld, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet_server.adapters.broker.RECEIVE_MAXIMUM", 1)  # the second waits for the first
    link = world.link(on_message=ingest.on_message, on_connected=ingest.on_connected)
    link.start()
    assert eventually(lambda: ingest.connections == 1)
    topic = device_topic("a", Channel.EVENT)
    try:
        with world.device("a") as device:
            device.publish(topic, b"old")
        _, _, late = ingest.taken.get(timeout=5)
        kill_broker(world)
        assert eventually(lambda: ingest.connections == 2)
        with world.device("a") as device:
            device.publish(topic, b"one")
            device.publish(topic, b"two")
        _, first, acknowledge = ingest.taken.get(timeout=5)
        late()
        with pytest.raises(queue.Empty):
            ingest.taken.get(timeout=0.3)
        acknowledge()
        assert (first, ingest.next()[1]) == (b"one", b"two")
    finally:
        link.stop()


def test_the_retained_state_says_when_the_server_left_on_purpose_and_when_it_did_not(world: BrokerWorld) -> None:
    link = world.link()
    link.start()
    assert eventually(lambda: link.connected)
    link.stop()
    with world.device("a") as device:
        device.subscribe(SERVER_STATE)
        _, payload = device.received() or ("", b"")
    assert (decode_server_state(payload).up, decode_server_state(payload).at > 0) == (False, True)


def kill_broker(world: BrokerWorld) -> None:
    pid = world.broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: world.broker.pid not in (None, pid))
