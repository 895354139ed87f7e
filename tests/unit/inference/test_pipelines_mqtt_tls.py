"""MQTT sources and sinks over TLS with a real Mosquitto: who is trusted, who is let in, and what is said if not."""

import datetime as dt
import ipaddress
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion
from pipelines_parts import IMAGES, eventually, running

pytestmark = pytest.mark.broker
TODAY = dt.datetime.now(dt.timezone.utc)
LIFE = dt.timedelta(days=2)


@dataclass(frozen=True)
class Authority:
    """Signs certificates into a folder."""

    folder: Path
    name: str
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, folder: Path, name: str) -> "Authority":
        one = cls(folder, name, ec.generate_private_key(ec.SECP256R1()))
        one.write(name, one.key, ca=True)
        return one

    def issue(self, name: str, passphrase: bytes = b"") -> None:
        """Write NAME.pem and NAME.key, good for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        self.write(name, key, ca=False)
        how = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        (self.folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))

    def write(self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> None:
        alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(TODAY - LIFE)
            .not_valid_after(TODAY + LIFE)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(alternative, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        (self.folder / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))


@dataclass(frozen=True)
class Site:
    """A broker that wants a certificate and a password of everybody, and the files of one who has both."""

    folder: Path
    port: int

    def part(self, topic: str, **changes: object) -> dict:
        """Return a source or sink whose settings are right, but for the changes."""
        right = {
            "kind": "mqtt",
            "topic": topic,
            "port": self.port,
            "tls": True,
            "ca_file": self.path("site.pem"),
            "certificate_file": self.path("door.pem"),
            "key_file": self.path("door.key"),
            "username": "door",
            "password_file": self.path("password"),
        }
        return {key: value for key, value in (right | changes).items() if value is not None}

    def path(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    authority = Authority.new(folder, "site")
    Authority.new(folder, "stranger")
    for name, passphrase in (("broker", b""), ("door", b""), ("locked", b"s3cret")):
        authority.issue(name, passphrase)
    (folder / "password").write_text("open sesame\n")
    (folder / "wrong-password").write_text("open rye\n")
    command = [tool("mosquitto_passwd"), "-b", "-c", str(folder / "users"), "door", "open sesame"]
    subprocess.run(command, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    (folder / "mosquitto.conf").write_text(
        f"user root\nlistener {port} 127.0.0.1\nallow_anonymous false\npassword_file {folder / 'users'}\n"
        f"cafile {folder / 'site.pem'}\ncertfile {folder / 'broker.pem'}\nkeyfile {folder / 'broker.key'}\n"
        "require_certificate true\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([tool("mosquitto"), "-c", str(folder / "mosquitto.conf")], stdout=log, stderr=log)
    try:
        one = Site(folder, port)
        eventually(lambda: answers(one))
        yield one
    finally:
        process.kill()
        process.wait()


def tool(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin") or name


def answers(site: Site) -> bool:
    context = ssl.create_default_context(cafile=site.path("site.pem"))
    context.load_cert_chain(site.path("door.pem"), site.path("door.key"))
    with suppress(OSError), socket.create_connection(("127.0.0.1", site.port), 1) as plain:
        context.wrap_socket(plain, server_hostname="127.0.0.1").close()
        return True
    return False


@contextmanager
def somebody(site: Site, topic: str) -> Iterator[tuple[mqtt.Client, list[bytes]]]:
    """Another client of the broker, and what it hears."""
    heard: list[bytes] = []
    subscribed: list[int] = []
    one = mqtt.Client(CallbackAPIVersion.VERSION2)
    one.tls_set(site.path("site.pem"), site.path("door.pem"), site.path("door.key"))
    one.username_pw_set("door", "open sesame")
    one.on_message = lambda _c, _u, message: heard.append(message.payload)
    one.on_subscribe = lambda *_: subscribed.append(1)
    one.on_connect = lambda client, *_: client.subscribe(topic)
    one.connect("127.0.0.1", site.port)
    one.loop_start()
    try:
        eventually(lambda: subscribed)
        yield one, heard
    finally:
        one.disconnect()
        one.loop_stop()


def test_frames_come_and_results_go_over_tls_with_certificate_and_password(site: Site, tmp_path: Path) -> None:
    source, sink = site.part("frames"), site.part("results")
    with running(tmp_path, source, sink) as pipeline, somebody(site, "results") as (one, heard):
        eventually(lambda: pipeline.state == "running")
        one.publish("frames", IMAGES.tobytes())
        eventually(lambda: heard)
    assert ("frames", "digits") == (json.loads(heard[0])["frame"], json.loads(heard[0])["model"])


WRONG = {
    "a broker that nobody vouches for": ({"ca_file": "stranger.pem"}, "the broker's certificate is not trusted"),
    "a broker under another name": ({"host": "localhost"}, "not valid for 'localhost'"),
    "no CA, and the system knows none": ({"ca_file": ""}, "the broker's certificate is not trusted"),
    "a CA file that is not there": ({"ca_file": "none.pem"}, "none.pem cannot be used"),
    "a CA file that is none": ({"ca_file": "password"}, "password cannot be used"),
    "no certificate of its own": ({"certificate_file": None, "key_file": None}, "it may want a certificate_file"),
    "a certificate of strangers": ({"certificate_file": "stranger.pem"}, "cannot be used"),
    "a key with a passphrase": ({"certificate_file": "locked.pem", "key_file": "locked.key"}, "cannot be used"),
    "the wrong password": ({"password_file": "wrong-password"}, "the broker refuses: Not authorized"),
    "no name": ({"username": None, "password_file": None}, "the broker refuses: Not authorized"),
    "no TLS at all": (
        {"tls": None, "ca_file": None, "certificate_file": None, "key_file": None},
        "it may speak TLS only",
    ),
}


def changed(site: Site, case: str) -> dict:
    changes, _ = WRONG[case]
    files = {
        key: site.path(str(value)) if key.endswith("_file") and value else value for key, value in changes.items()
    }
    return site.part("frames", **files)


@pytest.mark.parametrize("case", WRONG)
def test_who_is_not_trusted_or_not_let_in_is_said(site: Site, tmp_path: Path, case: str) -> None:
    with running(tmp_path / "s", changed(site, case)) as pipeline:
        eventually(lambda: pipeline.health.error)
        assert WRONG[case][1] in pipeline.health.error
