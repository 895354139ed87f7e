"""A fleet server's trust in one folder: real signing on disk; storage, broker and the CLI's client in memory.

`World.ready()` has both roots; `publish()` and `enrol()` go the whole way. Other rooms' tests may use it.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fleet_server.adapters.artifacts import ArtifactFolder
from fleet_server.adapters.authority import CertificateAuthority
from fleet_server.adapters.director import OnlineDirector
from fleet_server.adapters.image_repository import ImageFolder
from fleet_server.api_types import MakeOnlineKeys, OnlineKeysView, Publication, Roots, TokenRequest, TrustStatus
from fleet_server.cli.key_folder import KeyFolder
from fleet_server.cli.publish import Published, Publisher, Source
from fleet_server.cli.session import ApiError
from fleet_server.cli.signing import now_utc, sign_first
from fleet_server.enrolment import DeviceExists, Enrolment, TokenRefused
from fleet_server.membership import Membership
from fleet_server.ports import (
    DeploymentRecord,
    Device,
    Presence,
    PublishedBundle,
    SignedDesire,
    TokenRecord,
)
from fleet_server.publishing import Publishing, Refused
from fleet_server.rollouts import Rollouts
from fleet_server.web.overview import roles_of
from protocol.bundle import digest_of, write_bundle
from protocol.device_api import EnrolRequest, EnrolResponse, parse_token
from protocol.manifest import Golden, Manifest, Needs, TensorSpec, encode_manifest
from protocol.messages import Acknowledgement, Birth, DesiredState
from protocol.states import RuntimeName

SECOND = 1000
DAY = 24 * 3600 * SECOND


def now_ms() -> int:
    return int(now_utc().timestamp()) * 1000


# ---------------------------------------------------------------- in-memory ports
@dataclass
class MemoryRegistry:
    tokens: dict[str, TokenRecord] = field(default_factory=dict)
    known: dict[str, Device] = field(default_factory=dict)
    births: dict[str, Birth] = field(default_factory=dict)
    counting_no_more: list[str] = field(default_factory=list)

    def add_token(self, token: TokenRecord) -> None:
        self.tokens[token.id] = token

    def redeem_token(self, token_id: str, secret_sha256: str, now: int) -> TokenRecord:
        token = self.tokens.get(token_id)
        if token is None or token.secret_sha256 != secret_sha256 or token.uses_left < 1 or token.expires_at <= now:
            raise TokenRefused("the enrolment token is unknown, wrong, used up or expired")
        self.tokens[token_id] = replace(token, uses_left=token.uses_left - 1)
        return token

    def check_token(self, token_id: str, secret_sha256: str, now: int) -> None:
        token = self.tokens.get(token_id)
        if token is None or token.secret_sha256 != secret_sha256 or token.expires_at <= now:
            raise TokenRefused("the enrolment token is unknown, wrong or expired")

    def add_device(self, device: Device) -> None:
        if device.id in self.known:
            raise DeviceExists(device.id)
        self.known[device.id] = device

    def device(self, device_id: str) -> Device | None:
        return self.known.get(device_id)

    def devices(self) -> Sequence[Device]:
        return list(self.known.values())

    def presence(self, device_id: str) -> Presence:
        birth = self.births.get(device_id)
        return Presence(
            device=device_id, birth=birth, connected=birth is not None, said_goodbye=False, last_seen=None
        )

    def replace_device(self, device: Device, now: int) -> None:
        known = self.known[device.id]
        if known.open_until <= now:
            raise DeviceExists(device.id)
        self._retire(known.certificate, known.next_certificate)
        self.known[device.id] = device

    def offer_certificate(self, device_id: str, certificate: str, now: int) -> None:
        self._retire(self.known[device_id].next_certificate)
        self.known[device_id] = replace(self.known[device_id], next_certificate=certificate)

    def promote(self, device_id: str, certificate: str, now: int) -> None:
        known = self.known[device_id]
        if known.next_certificate == certificate:
            self._retire(known.certificate)
            self.known[device_id] = replace(known, certificate=certificate, next_certificate="")

    def revoke(self, device_id: str, now: int = 0) -> None:
        known = self.known[device_id]
        self._retire(known.certificate, known.next_certificate)
        self.known[device_id] = replace(known, revoked=True, open_until=0)

    def reopen(self, device_id: str, until: int) -> None:
        self.known[device_id] = replace(self.known[device_id], open_until=until)

    def retired(self) -> Sequence[str]:
        return list(self.counting_no_more)

    def forget_retired(self, certificates: Sequence[str]) -> None:
        self.counting_no_more = [c for c in self.counting_no_more if c not in certificates]

    def _retire(self, *certificates: str) -> None:
        self.counting_no_more += [c for c in certificates if c and c not in self.counting_no_more]

    def put(self, *device_ids: str) -> None:
        """Add devices without the ceremony of enrolment."""
        for device_id in device_ids:
            self.add_device(Device(id=device_id, labels={}, certificate="", enrolled_at=0))


@dataclass
class MemoryReleases:
    stored: dict[str, PublishedBundle] = field(default_factory=dict)

    def add_bundles(self, bundles: Sequence[PublishedBundle]) -> None:
        for bundle in bundles:
            self.stored.setdefault(bundle.path, bundle)

    def bundles(self, model: str | None = None) -> Sequence[PublishedBundle]:
        return [b for b in self.stored.values() if model in (None, b.release.model)]


@dataclass
class MemoryDesiredStates:
    current: dict[str, SignedDesire] = field(default_factory=dict)
    deployments: list[DeploymentRecord] = field(default_factory=list)
    committed: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    attempts: dict[tuple[str, str], int] = field(default_factory=dict)

    def desired(self, device_id: str) -> SignedDesire | None:
        return self.current.get(device_id)

    def save_desired(self, desire: SignedDesire) -> None:
        before = self.current.get(desire.device)
        if before is not None and desire.version <= before.version:
            raise ValueError(f"version {desire.version} is not above {before.version}")
        self.current[desire.device] = desire
        for a in desire.assigned:
            key = (desire.device, a.bundle.sha256)
            self.attempts[key] = max(self.attempts.get(key, 0), a.assignment.attempt)

    def expiring(self, before: int) -> Sequence[SignedDesire]:
        return [d for d in self.current.values() if d.expires_at <= before]

    def add_deployment(self, deployment: DeploymentRecord) -> None:
        self.deployments.append(deployment)

    def committed_versions(self, device_id: str, model: str) -> Sequence[int]:
        return self.committed.get((device_id, model), [])

    def highest_attempt(self, device_id: str, sha256: str) -> int:
        return self.attempts.get((device_id, sha256), 0)


@dataclass
class MemoryUplink:
    admitted: list[str] = field(default_factory=list)
    expelled: list[str] = field(default_factory=list)
    reachable: bool = True
    retained: dict[str, DesiredState] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)

    def publish_desired(self, device_id: str, message: DesiredState) -> None:
        self.retained[device_id] = message
        self.published.append(device_id)

    def acknowledge(self, device_id: str, acknowledgement: Acknowledgement) -> None:
        pass  # nothing in these tests sends telemetry

    def admit(self, device_id: str) -> None:
        self.admitted.append(device_id)

    def expel(self, device_id: str) -> bool:
        self.expelled.append(device_id)
        self.retained.pop(device_id, None)
        return self.reachable


# ---------------------------------------------------------------- the world
class World:
    """Everything, on one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = random.Random(7)
        self.replaced: list[bool] = []  # how often the broker was to learn of retired certificates
        self.registry, self.releases = MemoryRegistry(), MemoryReleases()
        self.desired, self.uplink = MemoryDesiredStates(), MemoryUplink()
        self.keys = KeyFolder(folder / "KEYS")
        self.client = InProcessClient(self)
        self.restart()

    def restart(self) -> None:
        """Read everything from disk again, as a new process would; the database keeps what it has."""
        folder = self.folder
        self.authority = CertificateAuthority(folder / "authority", hosts=("fleet.example",), now=now_ms())
        self.director = OnlineDirector(folder / "director")
        self.image = ImageFolder(folder / "image")
        self.artifacts = ArtifactFolder(folder / "artifacts")
        self.publishing = Publishing(
            releases=self.releases,
            director=self.director,
            image=self.image,
            artifacts=self.artifacts,
            on_director_root=self.follow_root,
        )
        self.enrolment = Enrolment(
            registry=self.registry,
            authority=self.authority,
            director=self.director,
            image=self.image,
            desired=self.desired,
            uplink=self.uplink,
            random_bytes=self.random.randbytes,
            broker_host="fleet.example",
            broker_port=8883,
            on_replaced=lambda: self.replaced.append(True),
        )
        self.membership = Membership(registry=self.registry, authority=self.authority, uplink=self.uplink)
        self.rollouts = Rollouts(
            registry=self.registry,
            releases=self.releases,
            desired=self.desired,
            director=self.director,
            uplink=self.uplink,
            new_id=lambda: f"order-{len(self.desired.deployments) + 1}",
            hindrance=self.image.hindrance,
        )

    def follow_root(self, now: int) -> None:
        """Sign again under a new Director root."""
        self.rollouts.follow_root(now)

    def ready(self) -> "World":
        """Make the offline keys and both roots."""
        self.keys.make_keys(None)
        roots = sign_first(self.keys, self.client.get("/trust/online-keys", OnlineKeysView), no_passphrase, now_utc())
        self.publishing.accept_roots(roots, now_ms())
        return self

    def publish(self, *sources: Source, **options: Any) -> Sequence[Published]:
        return self.publisher(**options).publish(sources)

    def publisher(self, keys: KeyFolder | None = None, **options: Any) -> Publisher:
        return Publisher(client=self.client, folder=keys or self.keys, passphrase=no_passphrase, **options)

    def enrol(self, device_id: str, *, token: str | None = None) -> EnrolResponse:
        text = token or self.enrolment.create_token(TokenRequest(), now_ms()).token
        parsed = parse_token(text)
        request = EnrolRequest(token_id=parsed.id, secret=parsed.secret, device=device_id, csr=make_csr(device_id))
        return self.enrolment.enrol(request, now_ms())


class InProcessClient:
    """`cli.signing.Client` without HTTP: what the REST API does, in one process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.before_publish: list[Any] = []  # callables; each runs once before a publication reaches the server

    def get(self, path: str, kind: Any) -> Any:
        w = self.world
        if path == "/trust/online-keys":
            return OnlineKeysView(director=_texts(w.director.online_keys()), image=_texts(w.image.online_keys()))
        assert path == "/trust"
        return self._status()

    def get_bytes(self, path: str) -> bytes:
        _, _, repository, _, name = path.split("/")
        if repository == "director":
            return self.world.director.roots()[int(name.split(".")[0]) - 1]
        data = self.world.image.metadata(name)
        if data is None:
            raise ApiError(404, "not found", path)
        return data

    def post(self, path: str, body: Any, kind: Any) -> Any:
        try:
            if path == "/trust/online-keys":
                assert isinstance(body, MakeOnlineKeys)
                self.world.publishing.make_next_keys()
                return self.get(path, kind)
            if path == "/trust/roots":
                assert isinstance(body, Roots)
                self.world.publishing.accept_roots(body, now_ms())
            else:
                assert isinstance(body, Publication)
                if self.before_publish:
                    self.before_publish.pop(0)()
                self.world.publishing.publish(body, now_ms())
        except Refused as refused:
            raise ApiError(409, "refused", refused.reason) from refused
        return {}

    def upload(self, path: str, fileobj: IO[bytes], length: int) -> None:
        data = fileobj.read()
        assert len(data) == length
        self.world.publishing.upload(chunks(data), path.rpartition("/")[2])

    def _status(self) -> TrustStatus:
        image, director = self.world.image, self.world.director
        root, targets = image.metadata("root.json"), image.metadata("targets.json")
        return TrustStatus(
            ready=image.first_root() is not None and bool(director.roots()),
            ca_key_sha256=self.world.authority.ca_key_sha256(),
            image_root_sha256=None,
            image_root_version=_version(root),
            director_root_version=len(director.roots()),
            targets_version=_version(targets),
            targets_expires=None,
            roles=roles_of(director, image, now_ms()),
            targets_versions={
                f.name.replace("image-targets", "targets"): f.version
                for f in image.roles()
                if f.name == "image-targets" or not f.name.startswith("image-")
            },
        )


# ---------------------------------------------------------------- things to publish and to enrol
def source(model: str = "digits", *, variant: str = "int8", content: bytes = b"weights", **changes: Any) -> Source:
    """A bundle that is small, legal and says that it is a model."""
    members = {"model.tflite": content, "golden.npz": b"golden"}
    manifest = Manifest(
        model=model,
        variant=variant,
        inputs=(TensorSpec(name="x", dtype="INT8", shape=(-1, 8, 8, 1), scale=1 / 255, zero_point=-128),),
        outputs=(TensorSpec(name="y", dtype="INT8", shape=(-1, 2), scale=1 / 256, zero_point=-128),),
        classes=("zero", "one"),
        needs=Needs(memory=1_000_000, runtimes=(RuntimeName.LITERT,)),
        golden=Golden(samples=1, tolerance=1.0),
        members={name: digest_of(data) for name, data in members.items()},
    )
    return Source(name=f"{model}-{variant}", manifest=msgspec.structs.replace(manifest, **changes), members=members)


def folder_of(world: World, name: str, **changes: Any) -> Path:
    """A bundle folder as the converters leave it."""
    folder = world.folder / name
    folder.mkdir()
    packed = source(**changes)
    (folder / "manifest.json").write_bytes(encode_manifest(packed.manifest))
    for member, data in packed.members.items():
        (folder / member).write_bytes(data)
    return folder


def bundle_bytes(of: Source, version: int) -> bytes:
    target = BytesIO()
    write_bundle(target, msgspec.structs.replace(of.manifest, version=version), of.members)
    return target.getvalue()


def make_csr(common_name: str, *, key: Any = None, signed_by: Any = None, names: Sequence[str] | None = None) -> str:
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names or (common_name,)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def birth(**changes: Any) -> Birth:
    return msgspec.structs.replace(
        Birth(boot="b", connection=1, at=0, agent="1", device_class="x86_64", runtimes=(RuntimeName.LITERT,)),
        **changes,
    )


def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def no_passphrase() -> bytes:
    raise AssertionError("these keys have no passphrase")


def _texts(keys: dict[str, bytes]) -> dict[str, str]:
    return {role: key.decode() for role, key in keys.items()}


def _version(metadata: bytes | None) -> int | None:
    return msgspec.json.decode(metadata)["signed"]["version"] if metadata else None
