"""The server's side of MQTT: one connection to the broker's loopback listener, kept up while the server runs.

Knows MQTT and Mosquitto's dynamic-security commands. What a message means is for ingest; what devices should run is
for rollouts. Every connection is a fresh paho client: nothing queued for, or acknowledged on, an old connection can
leak into a new one (a late PUBACK would release a message that was never stored).

Threads: paho's own reads the network and never waits; ``broker-keeper`` connects and reconnects; ``broker-errands``
does everything that may take time, such as telling the application that the connection is up.
"""

import logging
import queue
import ssl
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec

import msgspec
from paho.mqtt.client import (
    MQTT_ERR_SUCCESS,
    Client,
    ConnectFlags,
    DisconnectFlags,
    MQTTMessage,
    MQTTv5,
)
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleet_server.adapters.authority import TlsFiles
from fleet_server.adapters.broker_rights import CONTROL_TOPIC, RESPONSE_TOPIC, admission, expulsion
from protocol.codec import encode
from protocol.messages import Acknowledgement, CommandEnvelope, DesiredState, ServerState
from protocol.topics import SERVER_STATE, Channel, device_topic, every_device, shared

RECEIVE_MAXIMUM = 1000  # messages the broker may have under way to us; the rest waits there
KEEPALIVE = 30  # seconds
COMMAND_TIMEOUT = 10.0  # seconds the broker has to answer a dynamic-security command
FIRST_DELAY, LAST_DELAY = 0.5, 10.0  # seconds between attempts to connect, doubling, with full jitter
ADMIT_AT_ONCE = 50  # devices in one command: the plugin writes its whole file after each, and the broker waits
OWED_EVERY = 5.0  # seconds between attempts to admit those whose admission failed
TAKE_OVER_TIMEOUT = 5.0  # seconds the broker has to let us in under a device's name
_AS_WISHED = ("already exists", "not found")  # how the errors of what is so already end
MAX_RESPONSE = 16 * 1024 * 1024  # bytes of a dynamic-security answer
_SUBSCRIPTIONS = (
    shared(every_device(Channel.TELEMETRY)),
    shared(every_device(Channel.EVENT)),
    shared(every_device(Channel.REPLY)),
    every_device(Channel.STATE),
    RESPONSE_TOPIC,
)
_log = logging.getLogger(__name__)

Acknowledge = Callable[[], None]
OnMessage = Callable[[str, bytes, Acknowledge], bool]
P = ParamSpec("P")


class Unavailable(Exception):
    """The broker did not do what was asked: no connection, no answer in time, or an error of the plugin."""


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """Where the broker listens for the server, and what to show it."""

    host: str = "127.0.0.1"
    port: int
    tls: TlsFiles


class BrokerLink:
    """`ports.Uplink`, and the source of everything that devices publish.

    ``on_message(topic, payload, acknowledge)`` is called on the network thread and must not wait. False means "not
    now": it is offered again soon, and meanwhile the broker holds back what exceeds the Receive Maximum.
    ``on_connected`` is called on the errands thread after each connection. ``jitter`` returns 0…1. ``on_desired`` is
    for those who count the desired states that were sent.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        epoch: str,
        clock: Callable[[], int],
        jitter: Callable[[], float],
        on_message: OnMessage,
        on_connected: Callable[[], None],
        on_desired: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._epoch = epoch
        self._clock = clock
        self._jitter = jitter
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_desired = on_desired
        self._connection: _Connection | None = None
        self._owed: set[str] = set()
        self._to_expel: set[str] = set()
        self._errands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep_connected, name="broker-keeper", daemon=True),
            threading.Thread(target=self._run_errands, name="broker-errands", daemon=True),
        ]

    @property
    def connected(self) -> bool:
        """Whether messages can flow."""
        connection = self._connection
        return connection is not None and connection.ready.is_set() and not connection.closed.is_set()

    def start(self) -> None:
        """Begin to connect; returns at once."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say good-bye and end the threads."""
        self._stopping.set()
        connection = self._connection
        if connection is not None:
            connection.closed.set()
        self._errands.put(_nothing)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    # ------------------------------------------------------------ ports.Uplink
    def publish_desired(self, device_id: str, message: DesiredState) -> None:
        """Without a connection nothing is sent: `on_connected` is the occasion to publish everything again."""
        if self._publish(device_topic(device_id, Channel.DESIRED), encode(message), qos=1, retain=True):
            self._on_desired()

    def acknowledge(self, device_id: str, acknowledgement: Acknowledgement) -> None:
        """Lost acknowledgements are no harm: they are cumulative."""
        self._publish(device_topic(device_id, Channel.ACKNOWLEDGEMENT), encode(acknowledgement), qos=0)

    def send_command(self, device_id: str, envelope: CommandEnvelope, *, life_seconds: int) -> None:
        """Without a connection nothing is sent: `on_connected` is the occasion to send everything that waits."""
        self._publish(device_topic(device_id, Channel.COMMAND), encode(envelope), qos=1, life_seconds=life_seconds)

    def admit(self, device_id: str) -> None:
        """Return when the broker has let the device in; when it cannot now, that is tried again until it can."""
        self._admit((device_id,))

    def expel(self, device_id: str) -> bool:
        """Shut a device out now; when the broker cannot be reached, that is tried again until it can."""
        self._owed.discard(device_id)
        try:
            self._command(expulsion(device_id))
            _take_over(self._address, device_id)
        except (Unavailable, OSError) as error:
            _log.warning("device %s is to be shut out of the broker: %s", device_id, error)
            self._to_expel.add(device_id)
            return False
        self._to_expel.discard(device_id)
        self._publish(device_topic(device_id, Channel.DESIRED), b"", qos=1, retain=True)
        return True

    def expel_all(self, device_ids: Sequence[str]) -> None:
        """Shut out those of these devices that the broker still knows."""
        try:
            known = self._known_devices()
        except Unavailable as error:
            _log.warning("cannot ask the broker whom it knows: %s", error)
            return
        for device in known.intersection(device_ids):
            self.expel(device)

    def admit_all(self, device_ids: Sequence[str]) -> None:
        """Let in those of these devices that the broker does not know yet."""
        try:
            known = self._known_devices()
        except Unavailable as error:
            _log.warning("cannot ask the broker whom it knows: %s", error)
            known = frozenset()
        missing = [device for device in device_ids if device not in known]
        for first in range(0, len(missing), ADMIT_AT_ONCE):
            self._admit(missing[first : first + ADMIT_AT_ONCE])

    def _admit(self, device_ids: Sequence[str]) -> None:
        self._to_expel.difference_update(device_ids)
        try:
            self._command([command for device in device_ids for command in admission(device)])
        except Unavailable as error:
            _log.warning("%d devices wait for their rights on the broker: %s", len(device_ids), error)
            self._owed.update(device_ids)
        else:
            self._owed.difference_update(device_ids)

    def _known_devices(self) -> frozenset[str]:
        (answer,) = self._command([{"command": "listClients"}])
        return frozenset(answer.data.get("clients", ()))

    def _command(self, commands: "list[dict[str, Any]]") -> "Sequence[_Answer]":
        connection = self._connection
        if connection is None or not self.connected:
            raise Unavailable("there is no connection")
        return connection.command(commands)

    def _publish(
        self, topic: str, payload: bytes, *, qos: int, retain: bool = False, life_seconds: int | None = None
    ) -> bool:
        """Hand a message to the connection; tell whether there is one that took it."""
        connection = self._connection
        if (
            connection is None
            or not self.connected
            or not connection.publish(topic, payload, qos=qos, retain=retain, life_seconds=life_seconds)
        ):
            _log.debug("not connected: nothing sent to %s", topic)
            return False
        return True

    # ------------------------------------------------------------ threads
    def _keep_connected(self) -> None:
        delay = FIRST_DELAY
        while not self._stopping.is_set():
            connection = _Connection(
                self._address, self._epoch, self._clock, self._on_message, lambda: self._errands.put(self._greet)
            )
            self._connection = connection
            try:
                connection.open()
                connection.closed.wait()
            except (OSError, ValueError) as error:
                _log.warning("no connection to the broker: %s", error)
            finally:
                connection.close(goodbye=self._stopping.is_set())
            delay = FIRST_DELAY if connection.ready.is_set() else min(LAST_DELAY, delay * 2)
            self._stopping.wait(delay * self._jitter())

    def _run_errands(self) -> None:
        waited = 0.0
        while not self._stopping.is_set():
            connection = self._connection
            pause = 0.02 if connection is not None and connection.parked else 0.5
            try:
                errand: Callable[[], None] = self._errands.get(timeout=pause)
            except queue.Empty:
                errand = _nothing
            _guarded(errand)
            if connection is not None:
                _guarded(connection.offer_parked)
            waited += pause
            if waited > OWED_EVERY and self.connected:
                waited = 0.0
                _guarded(self._make_up)

    def _make_up(self) -> None:
        """Do what could not be done when it was asked for."""
        for device in sorted(self._to_expel):
            self.expel(device)
        if self._owed:
            self._admit(sorted(self._owed)[:ADMIT_AT_ONCE])

    def _greet(self) -> None:
        _log.info("connected to the broker at %s:%d", self._address.host, self._address.port)
        self._on_connected()


class _Answer(msgspec.Struct, frozen=True, rename={"correlation": "correlationData"}):
    """One command's part of a dynamic-security answer."""

    command: str = ""
    error: str = ""
    correlation: str = ""
    data: dict[str, Any] = {}


class _Answers(msgspec.Struct, frozen=True):
    """What comes on the response topic."""

    responses: tuple[_Answer, ...] = ()


class _Pending:
    """A command that waits for its answer."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answers: Sequence[_Answer] = ()


class _Connection:
    """One MQTT connection, from CONNECT until it closes; never used again after that."""

    def __init__(
        self,
        address: BrokerAddress,
        epoch: str,
        clock: Callable[[], int],
        on_message: OnMessage,
        on_ready: Callable[[], None],
    ) -> None:
        self.ready = threading.Event()
        self.closed = threading.Event()
        self.parked: deque[tuple[str, bytes, Acknowledge]] = deque()
        self._address = address
        self._epoch = epoch
        self._clock = clock
        self._on_message = on_message
        self._on_ready = on_ready
        self._pending: dict[str, _Pending] = {}
        self._client = self._make_client()

    def _make_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"server/{self._epoch}",  # no device id has a slash
            protocol=MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.tls_set_context(_tls_context(self._address.tls))
        client.will_set(SERVER_STATE, encode(ServerState(up=False, epoch=self._epoch)), qos=1, retain=True)
        client.on_connect = self._unless_broken(self._connected)
        client.on_disconnect = self._unless_broken(self._disconnected)
        client.on_subscribe = self._unless_broken(self._subscribed)
        client.on_message = self._received
        return client

    def open(self) -> None:
        """Connect and start the network thread; raise OSError."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho left this one untyped
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        self._client.connect(
            self._address.host, self._address.port, keepalive=KEEPALIVE, clean_start=True, properties=properties
        )
        self._client.loop_start()

    def close(self, *, goodbye: bool) -> None:
        """End it. With ``goodbye`` the retained state says that the server left."""
        self.closed.set()
        if goodbye and self.ready.is_set() and self._client.is_connected():
            state = ServerState(up=False, epoch=self._epoch, at=self._clock())
            farewell = self._client.publish(SERVER_STATE, encode(state), qos=1, retain=True)
            try:
                farewell.wait_for_publish(2.0)
            except (RuntimeError, ValueError) as error:
                _log.debug("no good-bye: %s", error)
        self._client.disconnect()
        self._client.loop_stop()

    def publish(
        self, topic: str, payload: bytes, *, qos: int, retain: bool = False, life_seconds: int | None = None
    ) -> bool:
        """Hand a message to the network thread; tell whether there is a connection.

        ``life_seconds``: how long the broker keeps it for a device that is away; None: as long as its session.
        """
        properties = None if life_seconds is None else _expiring(life_seconds)
        sent = self._client.publish(topic, payload, qos=qos, retain=retain, properties=properties)
        return sent.rc == MQTT_ERR_SUCCESS

    def command(self, commands: "list[dict[str, Any]]") -> Sequence[_Answer]:
        """Send dynamic-security commands as one and wait for their answers; raise `Unavailable`."""
        correlation, pending = uuid.uuid4().hex, _Pending()
        self._pending[correlation] = pending
        body = {"commands": [{**command, "correlationData": correlation} for command in commands]}
        try:
            self.publish(CONTROL_TOPIC, msgspec.json.encode(body), qos=1)
            if not pending.done.wait(COMMAND_TIMEOUT):
                raise Unavailable(f"no answer within {COMMAND_TIMEOUT:.0f} s")
        finally:
            del self._pending[correlation]
        if self.closed.is_set() and not pending.answers:
            raise Unavailable("the connection ended")
        for answer in pending.answers:
            if answer.error and not answer.error.endswith(_AS_WISHED):
                raise Unavailable(f"{answer.command}: {answer.error}")
        return pending.answers

    def offer_parked(self) -> None:
        """Offer again, in order, what was refused before."""
        while self.parked and not self.closed.is_set():
            if not self._offer(*self.parked[0]):
                return
            self.parked.popleft()

    # ------------------------------------------------------------ paho's callbacks, none of which may raise
    def _unless_broken(self, callback: Callable[P, None]) -> Callable[P, None]:
        """An error in a callback would end paho's thread and leave us deaf: give the connection up instead."""

        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                callback(*args, **kwargs)
            except Exception:  # noqa: BLE001 - whatever it was, the answer is a new connection
                _log.exception("giving up the connection to the broker")
                self.closed.set()

        return call

    def _connected(
        self, client: Client, _data: object, _flags: ConnectFlags, reason: ReasonCode, _p: Properties | None
    ) -> None:
        if reason.is_failure:
            _log.error("the broker refuses the server: %s", reason)
            self.closed.set()
            return
        client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in _SUBSCRIPTIONS])

    def _subscribed(
        self, client: Client, _data: object, _mid: int, reasons: list[ReasonCode], _p: Properties | None
    ) -> None:
        refused = [topic for topic, reason in zip(_SUBSCRIPTIONS, reasons, strict=False) if reason.is_failure]
        if refused:
            _log.error("the broker refuses to deliver %s", ", ".join(refused))
        state = ServerState(up=True, epoch=self._epoch, at=self._clock())
        client.publish(SERVER_STATE, encode(state), qos=1, retain=True)
        self.ready.set()
        _guarded(self._on_ready)

    def _disconnected(
        self, _client: Client, _data: object, _flags: DisconnectFlags, reason: ReasonCode, _p: Properties | None
    ) -> None:
        if not self.closed.is_set():
            _log.warning("the connection to the broker ended: %s", reason)
        self.closed.set()
        for pending in tuple(self._pending.values()):
            pending.done.set()  # no answer will come

    def _received(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        acknowledge = partial(self._acknowledge, message.mid, message.qos)
        if message.topic == RESPONSE_TOPIC:
            _guarded(lambda: self._answered(bytes(message.payload)))
            acknowledge()
        else:
            _guarded(lambda: self._hand_over(message.topic, bytes(message.payload), acknowledge))

    def _hand_over(self, topic: str, payload: bytes, acknowledge: Acknowledge) -> None:
        """Keep the order: once something waits, everything after it waits too."""
        if self.parked or not self._offer(topic, payload, acknowledge):
            self.parked.append((topic, payload, acknowledge))

    def _offer(self, topic: str, payload: bytes, acknowledge: Acknowledge) -> bool:
        """A message that breaks its handler is let go: kept, it would block every other; devices send again."""
        try:
            return self._on_message(topic, payload, acknowledge)
        except Exception:  # noqa: BLE001 - as the summary says; it is logged whole
            _log.exception("a message on %s could not be handled", topic)
            acknowledge()
            return True

    def _acknowledge(self, mid: int, qos: int) -> None:
        if not self.closed.is_set():
            self._client.ack(mid, qos)

    def _answered(self, payload: bytes) -> None:
        if len(payload) > MAX_RESPONSE:
            _log.warning("an answer of the broker with %d bytes is over the cap", len(payload))
            return
        answers = msgspec.json.decode(payload, type=_Answers).responses
        for correlation in {answer.correlation for answer in answers}:
            pending = self._pending.get(correlation)
            if pending is not None:
                pending.answers = tuple(a for a in answers if a.correlation == correlation)
                pending.done.set()


def _take_over(address: BrokerAddress, device_id: str) -> None:
    """Connect under a device's client id: the broker cuts its connection and drops its session, queue and will.

    Only the loopback listener leaves a client the id that it asks for. Raises OSError, `Unavailable`.
    """
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    client = Client(CallbackAPIVersion.VERSION2, client_id=device_id, protocol=MQTTv5, reconnect_on_failure=False)
    client.tls_set_context(_tls_context(address.tls))
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answers.put(not reason.is_failure)
    client.connect(address.host, address.port, clean_start=True)
    client.loop_start()
    try:
        taken = answers.get(timeout=TAKE_OVER_TIMEOUT)
    except queue.Empty:
        taken = False
    finally:
        client.disconnect()
        client.loop_stop()
    if not taken:
        raise Unavailable(f"the broker does not let the server take the place of {device_id}")


def _expiring(seconds: int) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho left this one untyped
    properties.MessageExpiryInterval = seconds
    return properties


def _tls_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)
    return context


def _guarded(errand: Callable[[], None]) -> None:
    """Run something whose failure must not end the thread it runs on."""
    try:
        errand()
    except Exception:  # noqa: BLE001 - as the summary says; it is logged whole
        _log.exception("an errand of the broker connection failed")


def _nothing() -> None:
    """There was no errand."""
