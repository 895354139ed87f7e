"""A broker of this site as source or sink: MQTT 5 with paho, over TLS or, on a trusted network, without.

Not the device's uplink: that one has its own adapter, identity and rules. A connection that breaks is a failure; when
to try again is decided by the pipeline. Files of certificates are read at each connection, so renewed ones count.
"""

import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.core.pipelines import MqttSink, MqttSource
from agent.inference.pipelines.flow import Feed, SinkFailed, SourceFailed, ready_frame

KEEPALIVE = 30  # seconds
ANSWER_SECONDS = 10.0  # for CONNECT, SUBSCRIBE, PUBLISH
TICK = 0.25
MARGIN = 64 * 1024  # of a packet beside its payload: topic and properties
MAX_PASSWORD = 4096  # bytes


class BrokerFailed(Exception):
    """The broker cannot be reached, refuses, or has gone."""


class Connection:
    """One connection, used by one thread."""

    def __init__(self, settings: MqttSource | MqttSink, cap: int) -> None:
        """``cap``: bytes of the largest packet that may come."""
        self._where = f"{settings.host}:{settings.port}"
        self._cap = cap
        self._refusal = ""
        self._hint = _hint(settings)  # until the broker has answered
        self._acknowledged: set[int] = set()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.connect_timeout = ANSWER_SECONDS
        self._client.on_connect = lambda _c, _u, _f, code, _p: self._heard(code.is_failure, str(code))
        self._client.on_subscribe = lambda _c, _u, number, codes, _p: self._on_subscribe(number, codes)
        self._client.on_publish = lambda _c, _u, number, _r, _p: self._acknowledged.add(number)
        if settings.username:
            self._client.username_pw_set(settings.username, _password(settings.password_file))
        if settings.tls:
            self._client.tls_set_context(_tls(settings))
        self._open(settings)

    def close(self) -> None:
        """Say good-bye if possible, and close."""
        with suppress(OSError, ValueError):
            self._client.disconnect()
            self._client._sock_close()  # noqa: SLF001 - in public, paho closes only once DISCONNECT could be written

    def subscribe(self, topic: str, qos: int, on_message: Callable[[MQTTMessage], None]) -> None:
        """Take a topic's messages; raise `BrokerFailed`."""
        self._client.on_message = lambda _c, _u, message: on_message(message)
        result, number = self._client.subscribe(topic, qos)
        if result is not MQTTErrorCode.MQTT_ERR_SUCCESS or number is None:
            raise BrokerFailed(f"{self._where}: cannot subscribe to {topic}")
        self._until(lambda: number in self._acknowledged, f"does not answer the subscription to {topic}")

    def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> None:
        """Publish, and wait until the broker has it (QoS 1) or it is written (QoS 0); raise `BrokerFailed`."""
        told = self._client.publish(topic, payload, qos, retain)
        if told.rc is not MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise BrokerFailed(f"{self._where}: the connection broke")
        self._until(lambda: told.mid in self._acknowledged, "does not take a message")
        self._acknowledged.clear()

    def turn(self, seconds: float) -> None:
        """Let paho read and write for a while; raise `BrokerFailed`."""
        result = self._client.loop(seconds)
        if self._refusal:
            raise BrokerFailed(f"{self._where}: {self._refusal}")
        if result is not MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise BrokerFailed(f"{self._where}: the connection broke{self._hint}")
        announced = self._client._in_packet["remaining_length"]  # noqa: SLF001 - nothing public tells in time
        if announced > self._cap:
            raise BrokerFailed(f"{self._where}: the broker sends {announced} bytes, over the cap of {self._cap}")

    def _open(self, settings: MqttSource | MqttSink) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho does not type it
        properties.MaximumPacketSize = self._cap
        try:
            self._client.connect(settings.host, settings.port, KEEPALIVE, properties=properties)
            self._until(self._client.is_connected, "does not answer")
            self._hint = ""
        except ssl.SSLCertVerificationError as error:
            said = f"{self._where}: the broker's certificate is not trusted: {error.verify_message}"
            raise BrokerFailed(said) from error
        except (OSError, ValueError) as error:
            raise BrokerFailed(f"{self._where}: {error}") from error
        except BrokerFailed:
            self.close()
            raise

    def _until(self, done: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise BrokerFailed(f"{self._where}: the broker {otherwise}")
            self.turn(TICK)

    def _heard(self, refused: bool, reason: str) -> None:
        if refused:
            self._refusal = f"the broker refuses: {reason}"

    def _on_subscribe(self, number: int, codes: Sequence[ReasonCode]) -> None:
        for code in codes:
            self._heard(code.is_failure, str(code))
        self._acknowledged.add(number)


class MqttFrames:
    """Implements `flow.Source` with a topic."""

    def __init__(self, settings: MqttSource, cap: int) -> None:
        """``cap``: bytes of the largest message."""
        self._settings = settings
        self._cap = cap

    def run(self, feed: Feed) -> None:
        """Hand over messages; raise `SourceFailed`. While there is no room the broker keeps what comes."""
        try:
            connection = Connection(self._settings, self._cap + MARGIN)
        except BrokerFailed as error:
            raise SourceFailed(str(error)) from error
        try:
            connection.subscribe(
                self._settings.topic,
                self._settings.qos,
                lambda message: _hand_over(feed, message),
            )
            feed.up()
            while not feed.stop.is_set():
                connection.turn(TICK)
        except BrokerFailed as error:
            raise SourceFailed(str(error)) from error
        finally:
            connection.close()


class MqttDelivery:
    """Implements `flow.Sink` with a topic."""

    def __init__(self, settings: MqttSink) -> None:
        """Connect with the first result."""
        self._settings = settings
        self._connection: Connection | None = None

    def deliver(self, record: bytes) -> None:
        """Publish; raise `SinkFailed`. A connection that broke while nothing came is made anew without ado."""
        fresh = self._connection is None
        try:
            self._publish(record)
        except BrokerFailed as error:
            self.close()
            if fresh:
                raise SinkFailed(str(error)) from error
            self.deliver(record)

    def close(self) -> None:
        """Leave the broker."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _publish(self, record: bytes) -> None:
        settings = self._settings
        if self._connection is None:
            self._connection = Connection(settings, MARGIN)
        self._connection.publish(settings.topic, record, qos=settings.qos, retain=settings.retain)


def _hand_over(feed: Feed, message: MQTTMessage) -> None:
    feed.put(ready_frame(message.topic, bytes(message.payload)))


def _hint(settings: MqttSource | MqttSink) -> str:
    """Return what to think of when the broker hangs up before it has said anything."""
    if not settings.tls:
        return " before the broker answered; it may speak TLS only (tls = true)"
    return "" if settings.certificate_file else " before the broker answered; it may want a certificate_file"


class _Socket(ssl.SSLSocket):
    """Closes when the handshake fails: paho forgets such a socket."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def _tls(settings: MqttSource | MqttSink) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except OSError as error:
        raise BrokerFailed(f"the CA file {settings.ca_file} cannot be used: {error}") from error
    context.sslsocket_class = _Socket
    if settings.certificate_file:
        try:
            # An encrypted key must not ask for its passphrase on somebody's terminal.
            context.load_cert_chain(settings.certificate_file, settings.key_file, password=lambda: "")
        except OSError as error:
            files = f"{settings.certificate_file} with {settings.key_file}"
            raise BrokerFailed(f"the certificate {files} cannot be used: {error}") from error
    return context


def _password(file: str) -> str | None:
    if not file:
        return None
    try:
        with Path(file).open() as stream:
            return stream.read(MAX_PASSWORD).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerFailed(f"the password file {file} cannot be read: {error}") from error
