"""A TUF repository for tests, made of the metadata API and served over plain HTTP, with knobs to do wrong.

Edit the roles (``repository.targets`` …), then ``release()`` what changed. Nothing is checked: it signs anything.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)

TOP = ("root", "timestamp", "snapshot", "targets")


def in_days(days: float) -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=days)


class Repository:
    """Roles as they will be signed next, their keys, and what is served."""

    def __init__(self, *, consistent: bool = True, hashes: bool = False) -> None:
        self.hashes = hashes  # whether timestamp and snapshot carry lengths and hashes
        self.signers = {role: [CryptoSigner.generate_ed25519()] for role in TOP}
        self.root = Root(expires=in_days(30), consistent_snapshot=consistent)
        self.timestamp = Timestamp(expires=in_days(30))
        self.snapshot = Snapshot(expires=in_days(30))
        self.targets = Targets(expires=in_days(30))
        for one in (self.root, self.timestamp, self.snapshot, self.targets):
            one.version = 0  # signing is what makes a version
        self.delegated: dict[str, Targets] = {}
        self.metadata: dict[str, bytes] = {}  # by the name it is asked for
        self.files: dict[str, bytes] = {}  # targets, by the path they are asked for
        self.asked: list[str] = []
        for role, (signer,) in self.signers.items():
            self.root.add_key(signer.public_key, role)
        self.put_root()
        self.release("targets")

    # ------------------------------------------------------------ signing
    def put_root(self, *, signers: Sequence[CryptoSigner] | None = None) -> bytes:
        self.root.version += 1
        data = self._sign(self.root, self.signers["root"] if signers is None else signers)
        self.metadata[f"{self.root.version}.root.json"] = data
        return data

    def put_targets(self, role: str, *, bump: int = 1) -> None:
        targets = self.role(role)
        targets.version += bump
        data = self._sign(targets, self.signers[role])
        self._serve(role, targets.version, data)
        self.snapshot.meta[f"{role}.json"] = self._meta(targets.version, data)

    def put_snapshot(self, *, bump: int = 1) -> None:
        self.snapshot.version += bump
        data = self._sign(self.snapshot, self.signers["snapshot"])
        self._serve("snapshot", self.snapshot.version, data)
        self.timestamp.snapshot_meta = self._meta(self.snapshot.version, data)

    def put_timestamp(self, *, bump: int = 1) -> None:
        self.timestamp.version += bump
        self.metadata["timestamp.json"] = self._sign(self.timestamp, self.signers["timestamp"])

    def release(self, *roles: str) -> None:
        """Sign the next version of these targets roles, and the snapshot and timestamp that lead to them."""
        for role in roles:
            self.put_targets(role)
        self.put_snapshot()
        self.put_timestamp()

    def rotate(self, *roles: str) -> None:
        """Give top-level roles new keys by a new root, signed by the old root keys and the new ones."""
        before = list(self.signers["root"])
        for role in roles:
            for signer in self.signers[role]:
                self.root.revoke_key(signer.public_key.keyid, role)
            self.signers[role] = [CryptoSigner.generate_ed25519()]
            self.root.add_key(self.signers[role][0].public_key, role)
        self.put_root(signers=[*before, *(s for s in self.signers["root"] if s not in before)])

    # ------------------------------------------------------------ targets and delegations
    def role(self, name: str) -> Targets:
        return self.targets if name == "targets" else self.delegated[name]

    def add(self, role: str, path: str, data: bytes) -> None:
        target = TargetFile.from_data(path, data, ["sha256"])
        self.role(role).targets[path] = target
        folder, slash, name = path.rpartition("/")
        self.files[f"{folder}{slash}{target.hashes['sha256']}.{name}" if self.root.consistent_snapshot else path] = (
            data
        )

    def delegate(
        self,
        parent: str,
        name: str,
        paths: Sequence[str] | None = ("*",),
        *,
        terminating: bool = False,
        prefixes: Sequence[str] | None = None,
        signer: CryptoSigner | None = None,
    ) -> CryptoSigner:
        """Let a role speak for paths; a role that is delegated to again keeps its content."""
        signer = signer or CryptoSigner.generate_ed25519()
        role = DelegatedRole(
            name, [signer.public_key.keyid], 1, terminating, None if prefixes else list(paths or ()), prefixes
        )
        delegator = self.role(parent)
        if delegator.delegations is None:
            delegator.delegations = Delegations({}, {})
        assert delegator.delegations.roles is not None
        delegator.delegations.roles[name] = role
        delegator.delegations.keys[signer.public_key.keyid] = signer.public_key
        self._new_role(name)
        self.signers.setdefault(name, []).append(signer)
        return signer

    def delegate_bins(self, bits: int, prefix: str) -> list[str]:
        signer = CryptoSigner.generate_ed25519()
        succinct = SuccinctRoles([signer.public_key.keyid], 1, bits, prefix)
        self.targets.delegations = Delegations({signer.public_key.keyid: signer.public_key}, None, succinct)
        names = list(succinct.get_roles())
        for name in names:
            self._new_role(name)
            self.signers[name] = [signer]
        return names

    # ------------------------------------------------------------ inside
    def _new_role(self, name: str) -> None:
        if name not in self.delegated:
            self.delegated[name] = Targets(expires=in_days(30))
            self.delegated[name].version = 0

    def _sign(self, signed: Signed, signers: Sequence[CryptoSigner]) -> bytes:
        metadata: Metadata[Any] = Metadata(signed)
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def _serve(self, role: str, version: int, data: bytes) -> None:
        name = f"{quote(role, safe='')}.json"
        self.metadata[f"{version}.{name}" if self.root.consistent_snapshot else name] = data

    def _meta(self, version: int, data: bytes) -> MetaFile:
        return MetaFile.from_data(version, data, ["sha256"]) if self.hashes else MetaFile(version)


class _Handler(BaseHTTPRequestHandler):
    server: "HttpRepository"

    def do_GET(self) -> None:
        kind, _, name = self.path.lstrip("/").partition("/")
        repository = self.server.repository
        repository.asked.append(name)
        data = repository.metadata.get(name) if kind == "metadata" else repository.files.get(unquote(name))
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing."""


class HttpRepository(ThreadingHTTPServer):
    """Serves one repository after the other."""

    daemon_threads = False
    repository: Repository

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def http_repository() -> Iterator[HttpRepository]:
    """Serve on a free port of 127.0.0.1."""
    server = HttpRepository(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
