"""The device's connection to the broker: MQTT 5 over mutual TLS. The only importer of paho.

One thread of its own runs everything that touches paho: it connects, reads, writes, and waits between attempts (full
jitter). Other threads leave what they want in a mailbox and wake it. Each connection is a new paho client, because
paho's memory of what was in flight would compete with the spool, which sends again what the server did not
acknowledge. What the payloads mean is not known here: they come and go as bytes.
"""

import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.core.retry import BackOff
from agent.ports import EVENTS, REPLIES, TELEMETRY, Trouble
from protocol.names import MAX_DESIRED_MESSAGE
from protocol.topics import SERVER_STATE, Channel, device_topic, everything_of

log = logging.getLogger(__name__)

WINDOW = 20  # records in flight; Mosquitto's default max_inflight_messages
SESSION_EXPIRY = 3600  # seconds the broker keeps the session, so that commands wait for a short absence
WILL_DELAY = 30  # seconds; a takeover or a short cut must not look like a death
KEEPALIVE = 60  # seconds
STABLE_AFTER = 60.0  # seconds a connection must have lasted before the back-off begins anew
CONNECT_TIMEOUT = 10.0  # seconds for TCP and TLS, and again for the broker's answer
MAX_PACKET = MAX_DESIRED_MESSAGE + 1024  # bytes; the payload with its topic and properties
_TICK = 1.0  # seconds; how often keepalive and deadlines are looked at
_CHANNELS = {TELEMETRY: Channel.TELEMETRY, EVENTS: Channel.EVENT, REPLIES: Channel.REPLY}
_STOPPED = "the agent stopped"


def _ignore(_payload: bytes) -> None:
    """Do nothing about a message."""


@dataclass(frozen=True, kw_only=True)
class Ears:
    """What is told to the rest of the agent. Called on the uplink's thread; what they raise is logged."""

    on_desired: Callable[[bytes], None]
    on_acknowledgement: Callable[[bytes], None]
    on_server_state: Callable[[bytes], None]
    on_connected: Callable[[bool], None]  # whether the broker kept the session
    on_disconnected: Callable[[str], None]  # why, for people
    on_published: Callable[[str, int], None]  # the broker has a record
    on_unpublished: Callable[[str, int, str], None]  # the broker refused a record, and why
    on_trouble: Callable[[Trouble], None]  # the broker refuses what this device is entitled to
    on_command: Callable[[bytes], None] = _ignore  # simulated devices take none


@dataclass(frozen=True, kw_only=True)
class Words:
    """What is said of this device on ``up/state``, for a connection's number."""

    birth: Callable[[int], bytes]
    will: Callable[[int], bytes]
    farewell: Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """Where the broker is, and how patient both sides are. Seconds."""

    host: str
    port: int
    keepalive: int = KEEPALIVE
    will_delay: int = WILL_DELAY
    back_off: BackOff = field(default_factory=lambda: BackOff(first=1.0, ceiling=60.0))


class MqttUplink:
    """Port `Uplink`."""

    def __init__(
        self,
        *,
        device: str,
        broker: BrokerSettings,
        tls: Callable[[], ssl.SSLContext],
        next_connection: Callable[[], int],
        random: Callable[[], float],
        words: Words,
        ears: Ears,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``next_connection`` returns a number that is durably higher than any before; ``random`` is in [0, 1)."""
        self._parties = _Parties(device=device, broker=broker, tls=tls, words=words, ears=ears, monotonic=monotonic)
        self._mailbox = _Mailbox()
        self._next_connection = next_connection
        self._random = random
        self._number: int | None = None  # a connection number that no broker has seen yet
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)

    @property
    def connected(self) -> bool:
        return self._mailbox.connected

    def start(self) -> None:
        """Connect, and stay connected until `stop`."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Say good-bye if connected, disconnect and end the thread; gives up after ``timeout`` seconds."""
        self._mailbox.stop(self._parties.monotonic() + timeout)
        if self._thread.ident is not None:
            self._thread.join(timeout + _TICK)
        if not self._thread.is_alive():
            self._mailbox.close()

    def announce(self) -> None:
        """Publish the birth again, because what it says has changed. Each new connection publishes it anyway."""
        self._mailbox.announce()

    def reconnect(self) -> None:
        """End the connection and make a new one: the certificate has changed."""
        self._mailbox.reconnect()

    def publish(self, stream: str, number: int, payload: bytes) -> bool:
        if stream not in _CHANNELS:
            raise ValueError(f"stream {stream!r} is unknown; known are {sorted(_CHANNELS)}")
        return self._mailbox.post(stream, number, payload)

    # ------------------------------------------------------------ the thread
    def _run(self) -> None:
        failures = 0
        while not self._mailbox.stopping.is_set():
            began = self._parties.monotonic()
            try:
                self._live()
            except Exception as error:
                log.exception("the uplink's connection ended in an error")
                self._parties.tell_trouble(Trouble(f"the uplink met an error: {error}", remedy="See the agent's log"))
            failures = 1 if self._parties.monotonic() - began >= STABLE_AFTER else failures + 1
            self._mailbox.stopping.wait(self._parties.broker.back_off.delay(failures, self._random()))

    def _live(self) -> None:
        """Live through one connection, from CONNECT to its end."""
        if self._number is None:
            self._number = self._next_connection()
        connection = _Connection(self._parties, self._mailbox, self._number)
        if not connection.open():
            return  # no broker saw the number: the next attempt uses it
        self._number = None
        reason = "an error in the agent"
        try:
            reason = connection.run()
        finally:
            connection.close()
            was_connected = self._mailbox.disconnect()
            log.info("not connected to the broker: %s", reason)
            if was_connected:
                _tell(self._parties.ears.on_disconnected, reason)


class _Parties:
    """Who talks to whom, and how trouble is told: once, until it has passed."""

    def __init__(
        self,
        *,
        device: str,
        broker: BrokerSettings,
        tls: Callable[[], ssl.SSLContext],
        words: Words,
        ears: Ears,
        monotonic: Callable[[], float],
    ) -> None:
        self.device = device
        self.broker = broker
        self.tls = tls
        self.words = words
        self.ears = ears
        self.monotonic = monotonic
        self.state_topic = device_topic(device, Channel.STATE)
        self.deliver: dict[str, Callable[[bytes], None]] = {
            device_topic(device, Channel.DESIRED): ears.on_desired,
            device_topic(device, Channel.ACKNOWLEDGEMENT): ears.on_acknowledgement,
            device_topic(device, Channel.COMMAND): ears.on_command,
            SERVER_STATE: ears.on_server_state,
        }
        self._told = ""

    def tell_trouble(self, trouble: Trouble) -> None:
        """Log trouble, and tell it unless it was told last: a revoked device tries again each minute."""
        log.error("%s", trouble)
        if str(trouble) != self._told:
            self._told = str(trouble)
            _tell(self.ears.on_trouble, trouble)

    def forget_trouble(self) -> None:
        """All is well: the same trouble would be news again."""
        self._told = ""


def _tell(ear: Callable[..., None], *words: object) -> None:
    """Call back; an error in there must never end the uplink's thread."""
    try:
        ear(*words)
    except Exception:
        log.exception("a callback of the uplink failed")


class _Mailbox:
    """What other threads want of the uplink's thread. The one place they share."""

    def __init__(self) -> None:
        self.stopping = threading.Event()  # also wakes the back-off
        self.deadline = 0.0  # monotonic seconds by which a farewell must be through
        self.woken, self._waker = socket.socketpair()
        self.woken.setblocking(False)
        self._waker.setblocking(False)
        self._lock = threading.Lock()
        self._connected = False
        self._window = WINDOW
        self._in_flight: set[tuple[str, int]] = set()
        self._outbox: deque[tuple[str, int, bytes]] = deque()
        self._announcing = False
        self._reconnecting = False

    @property
    def connected(self) -> bool:
        return self._connected

    def post(self, stream: str, number: int, payload: bytes) -> bool:
        """Take a record to be published; False when not connected or the window is full."""
        with self._lock:
            if not self._connected or self.stopping.is_set():
                return False
            if (stream, number) in self._in_flight:
                return True  # it is on its way already
            if len(self._in_flight) >= self._window:
                return False
            self._in_flight.add((stream, number))
            self._outbox.append((stream, number, payload))
        self._wake()
        return True

    def announce(self) -> None:
        """Ask for a birth."""
        with self._lock:
            self._announcing = True
        self._wake()

    def reconnect(self) -> None:
        """Ask for another connection."""
        with self._lock:
            self._reconnecting = True
        self._wake()

    def take_reconnection(self) -> bool:
        """Tell whether another connection was asked for."""
        with self._lock:
            asked, self._reconnecting = self._reconnecting, False
            return asked

    def stop(self, deadline: float) -> None:
        """Ask for the end."""
        self.deadline = deadline
        self.stopping.set()
        self._wake()

    def connect(self, window: int) -> None:
        """Take records from now on, at most ``window`` in flight."""
        with self._lock:
            self._connected = True
            self._window = window
            self._announcing = False  # a connection begins with a birth

    def disconnect(self) -> bool:
        """Take no more records, forget those under way; tell whether there was a connection."""
        with self._lock:
            was_connected, self._connected = self._connected, False
            self._in_flight.clear()
            self._outbox.clear()
            return was_connected

    def take_record(self) -> tuple[str, int, bytes] | None:
        """Return the next record to be published."""
        with self._lock:
            return self._outbox.popleft() if self._outbox else None

    def take_announcement(self) -> bool:
        """Tell whether a birth was asked for."""
        with self._lock:
            asked, self._announcing = self._announcing, False
            return asked

    def land(self, stream: str, number: int) -> None:
        """A record is no longer in flight."""
        with self._lock:
            self._in_flight.discard((stream, number))

    def drain(self) -> None:
        """Forget the wake-up calls."""
        with suppress(BlockingIOError):
            self.woken.recv(4096)

    def close(self) -> None:
        """Nobody waits here any more."""
        self.woken.close()
        self._waker.close()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it wakes anyway; closed: nobody is left to wake
            self._waker.send(b"\0")


class _Socket(ssl.SSLSocket):
    """A TLS socket that closes itself when the handshake fails; paho would leave it open."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class _Connection:
    """One MQTT connection. Lives on the uplink's thread, the only one that touches its paho client."""

    def __init__(self, parties: _Parties, mailbox: _Mailbox, number: int) -> None:
        self._parties = parties
        self._mailbox = mailbox
        self._number = number
        self._records: dict[int, tuple[str, int]] = {}  # paho's message id -> record
        self._states: set[int] = set()  # message ids of births and farewell
        self._room = WINDOW  # how many messages the broker lets us have in flight
        self._farewell: int | None = None  # paho's message id
        self._ended = ""
        self._answer_by = 0.0  # monotonic seconds
        self._client = self._make_client()

    # ------------------------------------------------------------ life
    def open(self) -> bool:
        """Connect TCP and TLS and send CONNECT; False when the broker cannot be reached."""
        broker = self._parties.broker
        properties = _properties(
            PacketTypes.CONNECT,
            SessionExpiryInterval=SESSION_EXPIRY,
            ReceiveMaximum=WINDOW,
            MaximumPacketSize=MAX_PACKET,
        )
        try:
            self._client.connect(
                broker.host, broker.port, keepalive=broker.keepalive, clean_start=False, properties=properties
            )
        except ssl.SSLCertVerificationError as error:
            self._parties.tell_trouble(
                Trouble(
                    f"the broker's certificate is not good: {error.verify_message}",
                    remedy="Check the clock, the broker's address, and whether the server's CA was changed",
                )
            )
            return False
        except OSError as error:
            log.info("cannot reach the broker at %s:%s: %s", broker.host, broker.port, error)
            return False
        self._answer_by = self._parties.monotonic() + CONNECT_TIMEOUT
        return True

    def run(self) -> str:
        """Serve the connection until it ends; return why."""
        while not self._ended and (sock := self._client.socket()) is not None:
            readable, writable = self._wait(sock)
            if readable:
                self._client.loop_read()
                self._check_size()
            self._check_deadlines()
            self._hand_over()
            if writable or self._client.want_write():
                self._client.loop_write()
            self._client.loop_misc()
        return self._ended or "the connection broke"

    def close(self) -> None:
        """Close the socket, whatever state it is in."""
        with suppress(OSError):
            self._client._sock_close()  # noqa: SLF001 - in public, paho closes only once DISCONNECT could be written

    def _wait(self, sock: Any) -> tuple[bool, bool]:
        """Wait for the broker, another thread or the next tick; return (readable, writable)."""
        pending = sock.pending() > 0  # TLS may hold bytes that select cannot see
        writing = [sock] if self._client.want_write() else []
        woken = self._mailbox.woken
        readable, writable, _ = select.select([sock, woken], writing, [], 0.0 if pending else self._patience())
        if woken in readable:
            self._mailbox.drain()
        return pending or sock in readable, bool(writable)

    def _patience(self) -> float:
        if not self._mailbox.stopping.is_set():
            return _TICK
        return min(_TICK, max(0.0, self._mailbox.deadline - self._parties.monotonic()))

    def _check_size(self) -> None:
        """End the connection of a broker that sends more than it was told may come: paho itself has no cap."""
        announced = self._client._in_packet["remaining_length"]  # noqa: SLF001 - nothing public tells in time
        if announced > MAX_PACKET:
            self._end(f"the broker sends a packet of {announced} bytes, over the cap of {MAX_PACKET}")

    def _check_deadlines(self) -> None:
        now = self._parties.monotonic()
        if self._mailbox.stopping.is_set() and now >= self._mailbox.deadline:
            self._end("the agent stopped; the broker did not take the farewell")
        if not self._mailbox.connected and now >= self._answer_by:
            self._end("the broker does not answer")

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason

    # ------------------------------------------------------------ out
    def _hand_over(self) -> None:
        """Give paho what other threads have asked for, as far as the broker lets us."""
        if self._mailbox.stopping.is_set():
            self._leave()
        if not self._mailbox.connected:
            return
        if self._mailbox.take_reconnection():
            self._end("the certificate was renewed")
        if self._has_room() and self._mailbox.take_announcement():
            self._say(self._parties.words.birth)
        while self._has_room() and (record := self._mailbox.take_record()):
            self._send(*record)

    def _has_room(self) -> bool:
        return len(self._records) + len(self._states) < self._room

    def _leave(self) -> None:
        if not self._mailbox.connected:
            self._end(_STOPPED)
        elif self._farewell is None and self._has_room():
            self._farewell = self._say(self._parties.words.farewell)

    def _say(self, words: Callable[[int], bytes]) -> int:
        """Publish a state of this device; return paho's message id."""
        payload = words(self._number)
        mid: int = self._client.publish(self._parties.state_topic, payload, qos=1, retain=True).mid
        self._states.add(mid)
        return mid

    def _send(self, stream: str, number: int, payload: bytes) -> None:
        topic = device_topic(self._parties.device, _CHANNELS[stream])
        info = self._client.publish(topic, payload, qos=1)
        if info.rc is MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._records[info.mid] = (stream, number)
        else:
            self._land(stream, number, f"not sent: {info.rc.name}")

    def _land(self, stream: str, number: int, failure: str | None) -> None:
        self._mailbox.land(stream, number)
        if failure is None:
            _tell(self._parties.ears.on_published, stream, number)
        else:
            log.warning("the broker refused %s %s: %s", stream, number, failure)
            _tell(self._parties.ears.on_unpublished, stream, number, failure)

    # ------------------------------------------------------------ paho's callbacks
    def _make_client(self) -> Client:
        parties = self._parties
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=parties.device,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT
        context = parties.tls()
        context.sslsocket_class = _Socket
        client.tls_set_context(context)
        delay = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=parties.broker.will_delay)
        will = parties.words.will(self._number)
        client.will_set(parties.state_topic, will, qos=1, retain=True, properties=delay)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    def _on_connect(
        self, client: Client, _data: object, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._end(f"the broker refused the connection: {reason}")
            self._parties.tell_trouble(
                Trouble(f"the broker refused the connection: {reason}", remedy="Is this device still enrolled?")
            )
            return
        self._room = min(WINDOW, int(getattr(properties, "ReceiveMaximum", WINDOW)))  # paho does not look at it
        options = SubscribeOptions(qos=1)
        client.subscribe([(everything_of(self._parties.device, "down"), options), (SERVER_STATE, options)])
        session = "kept" if flags.session_present else "new"
        log.info("connected to the broker, connection %s, session %s", self._number, session)
        self._mailbox.connect(self._room)
        self._say(self._parties.words.birth)
        _tell(self._parties.ears.on_connected, flags.session_present)

    def _on_subscribe(
        self, _client: Client, _data: object, _mid: int, reasons: list[ReasonCode], _properties: object
    ) -> None:
        refused = ", ".join(str(reason) for reason in reasons if reason.is_failure)
        if not refused:
            self._parties.forget_trouble()
            return
        # A deaf connection is worth nothing; rights that come later are found by trying again.
        self._end(f"the broker refused a subscription: {refused}")
        self._parties.tell_trouble(
            Trouble(
                f"the broker does not let this device listen: {refused}",
                remedy="Check in the fleet server that the device is enrolled and not revoked",
            )
        )

    def _on_publish(self, client: Client, _data: object, mid: int, reason: ReasonCode, _properties: object) -> None:
        self._states.discard(mid)
        if mid == self._farewell:
            client.disconnect()
        elif mid in self._records:
            stream, number = self._records.pop(mid)
            self._land(stream, number, str(reason) if reason.is_failure else None)
        elif reason.is_failure:
            log.warning("the broker refused this device's state: %s", reason)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        deliver = self._parties.deliver.get(message.topic)
        if deliver is None:
            log.debug("nobody here listens to %s", message.topic)
        elif message.payload:  # an empty one only says that a retained message was cleared
            _tell(deliver, message.payload)

    def _on_disconnect(
        self, _client: Client, _data: object, flags: DisconnectFlags, reason: ReasonCode, _properties: object
    ) -> None:
        who = "the broker said" if flags.is_disconnect_packet_from_server else "the connection ended"
        self._end(_STOPPED if self._farewell is not None else f"{who}: {reason}")


def _properties(packet: int, **values: int) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]  # paho has no annotation there
    for name, value in values.items():
        setattr(properties, name, value)
    return properties
