"""A real Mosquitto run by `ManagedBroker`, device certificates, and plain paho devices to knock at its doors."""

import queue
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleet_server.adapters.authority import CertificateAuthority, TlsFiles
from fleet_server.adapters.broker import BrokerAddress, BrokerLink
from fleet_server.adapters.mosquitto import BrokerSettings, ManagedBroker


def now_ms() -> int:
    return int(time.time() * 1000)


def eventually(question: Callable[[], bool], timeout: float = 15.0) -> bool:
    """Ask until the answer is yes or the time is over."""
    deadline = time.monotonic() + timeout
    while not question():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class BrokerWorld:
    """The broker, who may connect to it, and what was made for that."""

    def __init__(self, folder: Path, *devices: str) -> None:
        self.folder = folder
        self.known = list(devices)
        self.authority = CertificateAuthority(folder / "authority", hosts=(), now=now_ms())
        settings = BrokerSettings(
            folder=folder / "broker",
            device_host="127.0.0.1",
            device_port=0,
            admin_port=0,
            device_tls=self.authority.server_files(),
            admin_tls=self.authority.broker_admin_files(),
        )
        self.broker = ManagedBroker(settings, lambda: self.known)
        self.settings = self.broker.settings

    def link(self, **changes: object) -> BrokerLink:
        """Return the server's connection, not started yet."""
        parts: dict[str, object] = {
            "epoch": "epoch-1",
            "clock": now_ms,
            "jitter": lambda: 0.1,
            "on_message": lambda topic, payload, acknowledge: True,
            "on_connected": lambda: None,
            **changes,
        }
        address = BrokerAddress(port=self.settings.admin_port, tls=self.authority.admin_client_files())
        return BrokerLink(address, **parts)  # type: ignore[arg-type]  # as the defaults above

    def certificate(self, name: str, *, authority: CertificateAuthority | None = None) -> TlsFiles:
        """Sign a fresh key for a device, as enrolment does."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        signed = (authority or self.authority).sign(csr.public_bytes(Encoding.PEM).decode(), name, now_ms())
        files = TlsFiles(
            certificate=self.folder / f"{name}.pem", key=self.folder / f"{name}.key", ca=self.settings.device_tls.ca
        )
        files.certificate.write_text(signed)
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def device(self, name: str, **connection: object) -> "Device":
        return Device(self.certificate(name), self.settings.device_port, name, **connection)


class Device:
    """A device's MQTT client, of the plainest kind. Use with ``with``."""

    def __init__(self, files: TlsFiles, port: int, name: str = "", *, client_id: str = "") -> None:
        self.inbox: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._answers: queue.Queue[object] = queue.Queue()
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or name,
            protocol=MQTTv5,
            reconnect_on_failure=False,
        )
        context = ssl.create_default_context(cafile=str(files.ca))
        context.load_cert_chain(files.certificate, files.key)
        self._client.tls_set_context(context)
        self._client.on_connect = lambda c, d, f, reason, p: self._answers.put(str(reason))
        self._client.on_subscribe = lambda c, d, mid, reasons, p: self._answers.put([str(r) for r in reasons])
        self._client.on_publish = lambda c, d, mid, reason, p: self._answers.put(str(reason))
        self._client.on_message = lambda c, d, message: self.inbox.put((message.topic, bytes(message.payload)))
        self._client.on_disconnect = lambda c, d, f, reason, p: self._answers.put(None)
        self._client.connect("127.0.0.1", port, clean_start=True)
        self._client.loop_start()
        if self._answers.get(timeout=5) != "Success":
            self._client.loop_stop()
            raise ConnectionRefusedError("the broker hung up before it said welcome")

    def __enter__(self) -> "Device":  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """Publish with QoS 1 and return the broker's answer."""
        self._client.publish(topic, payload, qos=1, retain=retain)
        return str(self._answers.get(timeout=5))

    def subscribe(self, filter_: str) -> str:
        """Subscribe with QoS 1 and return the broker's answer."""
        self._client.subscribe(filter_, options=SubscribeOptions(qos=1))
        (answer,) = self._answers.get(timeout=5)  # type: ignore[misc]  # a list by on_subscribe
        return str(answer)

    def received(self, timeout: float = 5.0) -> tuple[str, bytes] | None:
        try:
            return self.inbox.get(timeout=timeout)
        except queue.Empty:
            return None
