"""A fleet server's web on ephemeral ports: real database, keys, CA and folders; only the broker is played."""

import secrets
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jwt
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from data_world import database
from litestar import Litestar
from sqlalchemy.engine import Engine

from fleet_server.access import Access, make_admin
from fleet_server.adapters.admin_password import first_password
from fleet_server.adapters.artifacts import ArtifactFolder
from fleet_server.adapters.authority import CertificateAuthority
from fleet_server.adapters.database.accounts import DatabaseAccounts
from fleet_server.adapters.database.audit_log import DatabaseAuditLog
from fleet_server.adapters.database.commands import DatabaseCommands
from fleet_server.adapters.database.kept_answers import DatabaseKeptAnswers
from fleet_server.adapters.database.queries import Queries
from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseRegistry, DatabaseReleases
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.adapters.deltas import DeltaFolder
from fleet_server.adapters.director import OnlineDirector
from fleet_server.adapters.image_repository import ImageFolder
from fleet_server.adapters.passwords import Argon2Passwords
from fleet_server.commands import Commands
from fleet_server.enrolment import Enrolment
from fleet_server.membership import Membership
from fleet_server.publishing import Publishing
from fleet_server.rollouts import Rollouts
from fleet_server.web.auth import Doorkeeper
from fleet_server.web.console_app import console_litestar
from fleet_server.web.device_app import device_app
from fleet_server.web.headers import with_security_headers
from fleet_server.web.repeats import Repeats
from fleet_server.web.services import Parts
from fleet_server.web.serving import Site, Tls, WebServer, listen
from protocol.device_api import AUDIENCE
from protocol.messages import Acknowledgement, CommandEnvelope, DesiredState

PASSWORD = "correct horse"


class Clock:
    """The real time, moved by tests."""

    def __init__(self) -> None:
        self.ahead = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead


@dataclass
class SilentUplink:
    """`ports.Uplink` without a broker."""

    wants: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    commands: list[tuple[str, CommandEnvelope, int]] = field(default_factory=list)
    expelled: list[str] = field(default_factory=list)

    def publish_desired(self, device_id: str, message: DesiredState) -> None:
        assert message.targets
        self.wants.append(device_id)

    def acknowledge(self, device_id: str, acknowledgement: Acknowledgement) -> None:
        raise AssertionError("the web acknowledges nothing")

    def send_command(self, device_id: str, envelope: CommandEnvelope, *, life_seconds: int) -> None:
        self.commands.append((device_id, envelope, life_seconds))

    def admit(self, device_id: str) -> None:
        self.admitted.append(device_id)

    def expel(self, device_id: str) -> bool:
        self.expelled.append(device_id)
        return True


@dataclass(kw_only=True)
class Web:
    """A running web and what is behind it."""

    engine: Engine
    parts: Parts
    access: Access
    uplink: SilentUplink
    clock: Clock
    app: Litestar
    console_port: int
    device_port: int
    telemetry: DatabaseTelemetry
    pool: urllib3.PoolManager

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.console_port}"

    def request(self, method: str, path: str, **options: object) -> urllib3.BaseHTTPResponse:
        return self.pool.request(method, self.url + path, redirect=False, **options)  # type: ignore[arg-type]  # passed on

    def device_request(self, method: str, path: str, **options: object) -> urllib3.BaseHTTPResponse:
        url = f"https://localhost:{self.device_port}{path}"
        return self.pool.request(method, url, redirect=False, **options)  # type: ignore[arg-type]  # passed on

    def login(self) -> dict[str, str]:
        """Return the headers of somebody who is logged in."""
        headers = {"Content-Type": "application/json", "X-Requested-With": "edgewarden"}
        body = b'{"user": "admin", "password": "correct horse"}'
        answer = self.request("POST", "/api/v1/login", headers=headers, body=body)
        assert answer.status == 200, answer.data
        return headers | {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}


@contextmanager
def running_web(folder: Path) -> Iterator[Web]:
    """Start it; the admin's password is `PASSWORD`."""
    (folder / "admin-password").write_text(PASSWORD + "\n")
    clock = Clock()
    with database(folder) as engine:
        access = make_access(engine)
        make_admin(access, lambda: first_password(folder), clock())
        authority = CertificateAuthority(folder / "authority", hosts=["localhost"], now=clock())
        uplink = SilentUplink()
        parts = make_parts(engine, authority, uplink, folder, clock)
        doorkeeper = Doorkeeper(access, Repeats(DatabaseKeptAnswers(engine), clock), clock=clock, secure=False)
        files = authority.server_files()
        app = console_litestar(parts, doorkeeper)
        console = Site(app=with_security_headers(app), listener=listen("127.0.0.1", 0))
        devices = Site(
            app=device_app(parts),
            listener=listen("127.0.0.1", 0),
            tls=Tls(certificate=files.certificate, key=files.key),
        )
        server = WebServer([console, devices])
        server.start()
        try:
            context = ssl.create_default_context(cadata=authority.ca_certificate().decode())
            with urllib3.PoolManager(ssl_context=context, retries=False, timeout=20.0) as pool:
                yield Web(
                    engine=engine,
                    parts=parts,
                    access=access,
                    uplink=uplink,
                    clock=clock,
                    app=app,
                    console_port=console.port,
                    device_port=devices.port,
                    telemetry=DatabaseTelemetry(engine),
                    pool=pool,
                )
        finally:
            server.stop()


def make_access(engine: Engine) -> Access:
    return Access(
        accounts=DatabaseAccounts(engine),
        audit=DatabaseAuditLog(engine),
        passwords=Argon2Passwords(),
        random_bytes=secrets.token_bytes,
    )


def make_parts(
    engine: Engine, authority: CertificateAuthority, uplink: SilentUplink, folder: Path, clock: Clock
) -> Parts:
    registry = DatabaseRegistry(engine, clock=clock)
    desired, releases = DatabaseDesiredStates(engine), DatabaseReleases(engine)
    director, image = OnlineDirector(folder / "director"), ImageFolder(folder / "image")
    artifacts = ArtifactFolder(folder / "bundles")
    return Parts(
        queries=Queries(engine, clock=clock),
        registry=registry,
        desired=desired,
        enrolment=Enrolment(
            registry=registry,
            authority=authority,
            director=director,
            image=image,
            desired=desired,
            uplink=uplink,
            random_bytes=lambda n: clock().to_bytes(8, "big").rjust(n, b"x")[:n],
            broker_host="localhost",
            broker_port=8883,
        ),
        membership=Membership(registry=registry, authority=authority, uplink=uplink),
        publishing=Publishing(releases=releases, director=director, image=image, artifacts=artifacts),
        rollouts=Rollouts(
            registry=registry,
            releases=releases,
            desired=desired,
            director=director,
            uplink=uplink,
            new_id=partial(str, "order"),
            hindrance=image.hindrance,
        ),
        commands=Commands(
            registry=registry,
            store=DatabaseCommands(engine),
            signer=director,
            uplink=uplink,
            new_id=lambda: uuid.uuid4().hex,
            is_ready=lambda: True,
        ),
        authority=authority,
        director=director,
        image=image,
        artifacts=artifacts,
        deltas=DeltaFolder(folder / "deltas", artifacts),
        broker_up=lambda: True,
        epoch="epoch",
        clock=clock,
    )


@dataclass(frozen=True)
class Key:
    """A device's key."""

    private: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def csr(self, name: str) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self.private, hashes.SHA256())
        return request.public_bytes(Encoding.PEM).decode()

    def bearer(self, device: str, *, life: int = 60, at: int = 0, audience: str = AUDIENCE) -> dict[str, str]:
        now = int(time.time()) + at
        claims = {"iss": device, "aud": audience, "iat": now, "exp": now + life}
        return {"Authorization": "Bearer " + jwt.encode(claims, self.private, algorithm="ES256")}
