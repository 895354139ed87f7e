"""What a thief would do with a stolen server: its disk, its online keys, its broker. Used by the demo and by tests.

The thief has everything in ``DATA`` but none of the offline keys. Each attack puts something on a ``down/want``
or on the server's disk, as the real server would; whether a device falls for it is observed elsewhere.
"""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from fleet_server.adapters.director import OnlineDirector
from fleet_server.adapters.online_keys import OnlineSigners
from fleet_server.ports import Assigned, PublishedBundle
from protocol.codec import decode_desired_state, encode
from protocol.commands import PAYLOAD_TYPE, Command, encode_command
from protocol.messages import DesiredState
from protocol.release import Assignment, DeviceConfig, bundle_path, from_custom, is_bundle_path, to_custom
from protocol.topics import Channel, device_topic

ANSWER_SECONDS = 10.0
ROGUE_VERSION = 666


@dataclass(frozen=True, kw_only=True)
class StolenServer:
    """A copy of what the server knows."""

    data: Path
    admin_port: int  # the broker's listener for the server

    # ------------------------------------------------------------ the broker
    def read_want(self, device: str) -> bytes:
        """Return the retained desired state of a device."""
        found: list[bytes] = []
        arrived = threading.Event()

        def on_message(_client: Client, _data: object, message: MQTTMessage) -> None:
            found.append(bytes(message.payload))
            arrived.set()

        with self._broker() as client:
            client.on_message = on_message
            client.subscribe(device_topic(device, Channel.DESIRED), qos=1)
            if not arrived.wait(ANSWER_SECONDS):
                raise TimeoutError(f"no desired state of {device} is retained")
        return found[0]

    def put_want(self, device: str, payload: bytes) -> None:
        """Put a retained desired state, whatever it is."""
        with self._broker() as client:
            topic = device_topic(device, Channel.DESIRED)
            client.publish(topic, payload, qos=1, retain=True).wait_for_publish(ANSWER_SECONDS)

    # ------------------------------------------------------------ the disk
    @contextmanager
    def tampered(self, sha256: str) -> Iterator[Path]:
        """Flip one byte in the middle of a bundle in the artifact folder, and of its deltas; mended afterwards."""
        originals = {path: path.read_bytes() for path in self.data.rglob(f"{sha256}*") if path.is_file()}
        (bundle,) = [path for path in originals if path.suffix == ".ewb"]
        for path, original in originals.items():
            middle = len(original) // 2
            path.chmod(0o600)
            path.write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
        try:
            yield bundle
        finally:
            for path, original in originals.items():
                path.write_bytes(original)

    @contextmanager
    def forged_release(self, model: str, version: int, key: Path | None = None) -> Iterator[PublishedBundle]:
        """Name a bundle, genuine but for its version, in the Image repository, by a key the root does not know.

        Snapshot and timestamp are signed properly, for those keys were stolen; the files are put back afterwards.
        ``key``: the PEM of a stolen release key instead.
        """
        rogue = self.unreleased(model, version)
        with self.image_files() as folder:
            timestamp, snapshot, targets = (
                _newest_timestamp(folder),
                _newest_snapshot(folder),
                _newest_targets(folder),
            )
            custom: dict[str, Any] = {"release": to_custom(rogue.release)}
            named = TargetFile(rogue.length, {"sha256": rogue.sha256}, rogue.path, {"custom": custom})
            targets.targets[rogue.path] = named
            targets.version += 1
            metadata = Metadata(targets)
            metadata.sign(_signer(key) if key else CryptoSigner.generate_ed25519())
            _lead_to(folder, self._online_image(), metadata.to_bytes(), snapshot, timestamp)
            yield rogue

    @contextmanager
    def image_files(self) -> Iterator[Path]:
        """Give the folder of the Image repository's metadata to change at will; put back afterwards."""
        folder = self._image_folder()
        before = {path: path.read_bytes() for path in folder.glob("*.json")}
        try:
            yield folder
        finally:
            _put_back(folder, before)

    def read_image(self) -> dict[str, bytes]:
        """Return the Image repository's metadata as it is now, by file name."""
        return {path.name: path.read_bytes() for path in self._image_folder().glob("*.json")}

    @contextmanager
    def mixed_image(self, older: bytes) -> Iterator[None]:
        """Lead to older targets, which are genuine, as if they were the newest."""
        with self.image_files() as folder:
            _lead_to(folder, self._online_image(), older, _newest_snapshot(folder), _newest_timestamp(folder))
            yield

    @contextmanager
    def frozen_image(self) -> Iterator[None]:
        """Show a timestamp whose life is over, as it is when the newest one is held back for long enough."""
        with self.image_files() as folder:
            timestamp = _newest_timestamp(folder)
            timestamp.version += 1
            timestamp.expires = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=1)
            (folder / "timestamp.json").write_bytes(self._online_image().sign(timestamp))
            yield

    def released(self, model: str, version: int) -> PublishedBundle:
        """Return a bundle that the release team released."""
        return _released(_newest_targets(self._image_folder()), model, version)

    def unreleased(self, model: str, version: int) -> PublishedBundle:
        """Return a bundle that is genuine but for its version, which nobody released."""
        genuine = self.released(model, version)
        release = msgspec.structs.replace(genuine.release, version=ROGUE_VERSION)
        return replace(genuine, release=release, path=bundle_path(release))

    # ------------------------------------------------------------ the online keys
    def sign_want(self, device: str, version: int, bundles: list[PublishedBundle], now: int) -> bytes:
        """Sign a desired state with the stolen Director keys."""
        return _want(OnlineDirector(self.data / "director"), device, version, bundles, now)

    def sign_command(self, command: Command) -> bytes:
        """Sign a command with the stolen Director key."""
        signers = OnlineSigners(self.data / "director", (Targets.type,))
        return encode(signers.envelope(Targets.type, encode_command(command), PAYLOAD_TYPE))

    def send_command(self, device: str, payload: bytes) -> None:
        """Put a command, whatever it is."""
        with self._broker() as client:
            topic = device_topic(device, Channel.COMMAND)
            client.publish(topic, payload, qos=1).wait_for_publish(ANSWER_SECONDS)

    def _image_folder(self) -> Path:
        return self.data / "image" / "metadata"

    def _online_image(self) -> OnlineSigners:
        return OnlineSigners(self.data / "image", (Snapshot.type, Timestamp.type))

    @contextmanager
    def _broker(self) -> Iterator[Client]:
        client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        client.tls_set_context(self._tls())
        connected = threading.Event()
        client.on_connect = lambda *_: connected.set()
        client.connect("127.0.0.1", self.admin_port, keepalive=30)
        client.loop_start()
        try:
            if not connected.wait(ANSWER_SECONDS):
                raise TimeoutError("the broker's admin listener does not answer")
            yield client
        finally:
            with suppress(OSError):
                client.disconnect()
            client.loop_stop()

    def _tls(self) -> ssl.SSLContext:
        authority = self.data / "authority"
        context = ssl.create_default_context(cafile=str(authority / "admin-ca.pem"))
        context.load_cert_chain(authority / "server-admin.pem", authority / "server-admin.key")
        return context


def director_version_of(payload: bytes) -> int:
    """Return the version of the Director metadata in a desired state."""
    message: DesiredState = decode_desired_state(payload)
    return Metadata[Targets].from_bytes(message.targets).signed.version


def sign_as_stranger(device: str, version: int, folder: Path, now: int) -> bytes:
    """Sign a desired state with keys that no root names; they are made in ``folder``."""
    return _want(OnlineDirector(folder), device, version, [], now)


def mix(newest: bytes, older: bytes) -> bytes:
    """Put the targets of an older desired state under the snapshot and timestamp of the newest one."""
    return encode(msgspec.structs.replace(decode_desired_state(newest), targets=decode_desired_state(older).targets))


def _want(director: OnlineDirector, device: str, version: int, bundles: list[PublishedBundle], now: int) -> bytes:
    assigned = [Assigned(bundle=bundle, assignment=Assignment(rollout="stolen")) for bundle in bundles]
    return encode(director.sign(device, version, assigned, DeviceConfig(), now).message())


def _lead_to(folder: Path, stolen: OnlineSigners, targets: bytes, snapshot: Snapshot, timestamp: Timestamp) -> None:
    """Write snapshot and timestamp, properly signed, that name these bytes as the next targets."""
    expires = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=7)
    number = snapshot.meta["targets.json"].version + 1
    lure = Snapshot(version=snapshot.version + 1, expires=expires, meta={"targets.json": MetaFile(number)})
    lead = Timestamp(version=timestamp.version + 1, expires=expires, snapshot_meta=MetaFile(lure.version))
    (folder / f"{number}.targets.json").write_bytes(targets)
    (folder / f"{lure.version}.snapshot.json").write_bytes(stolen.sign(lure))
    (folder / "timestamp.json").write_bytes(stolen.sign(lead))


def _signer(key: Path) -> CryptoSigner:
    return CryptoSigner(load_pem_private_key(key.read_bytes(), password=None))


def _newest_timestamp(folder: Path) -> Timestamp:
    return Metadata[Timestamp].from_bytes((folder / "timestamp.json").read_bytes()).signed


def _newest_snapshot(folder: Path) -> Snapshot:
    number = _newest_timestamp(folder).snapshot_meta.version
    return Metadata[Snapshot].from_bytes((folder / f"{number}.snapshot.json").read_bytes()).signed


def _newest_targets(folder: Path) -> Targets:
    number = _newest_snapshot(folder).meta["targets.json"].version
    return Metadata[Targets].from_bytes((folder / f"{number}.targets.json").read_bytes()).signed


def _released(targets: Targets, model: str, version: int) -> PublishedBundle:
    for path, target in targets.targets.items():
        if is_bundle_path(path):
            release = from_custom((target.custom or {}).get("release"))
            if (release.model, release.version) == (model, version):
                sha256 = target.hashes["sha256"]
                return PublishedBundle(
                    release=release, path=path, sha256=sha256, length=target.length, published_at=0
                )
    raise KeyError(f"{model} {version} is not released")


def _put_back(folder: Path, before: dict[Path, bytes]) -> None:
    for path in folder.glob("*.json"):
        if path not in before:
            path.unlink()
    for path, data in before.items():
        path.write_bytes(data)
