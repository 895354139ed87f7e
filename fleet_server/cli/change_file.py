"""A change on its way from person to person, and what a machine without network needs to know of the server.

Two files, both JSON: what `keys fetch` writes (`Fetched`: the server's signed metadata, as a `Client` reads it), and
a change (`ChangeFile`: what is to be signed, with the `Fetched` it was made on). Nothing in them is trusted: whoever
signs verifies the one with their own key folder, and is shown the other.
"""

from pathlib import Path
from typing import IO, TypeVar

import msgspec

from fleet_server.api_types import OnlineKeysView, Publication, TrustStatus
from fleet_server.cli.changes import Change, change_of
from fleet_server.cli.errors import CannotSign, KeysMissing, NotInitialised
from fleet_server.cli.key_folder import KeyFolder, fingerprint, read_file, write_file
from fleet_server.cli.signing import Client, fetch_verified, now_utc

MAX_FILE = 64 * 1024 * 1024  # bytes
CHANGE_NAME = "change.json"
T = TypeVar("T")


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """The server's trust metadata at one time. A `Client` that cannot write."""

    status: TrustStatus
    online: OnlineKeysView
    files: dict[str, bytes]  # by the path under the API

    def get(self, path: str, type: type[T]) -> T:  # noqa: A002 - as Session names it
        """Return a resource."""
        known = {"/trust": self.status, "/trust/online-keys": self.online}
        return msgspec.convert(msgspec.to_builtins(known[path]), type)

    def get_bytes(self, path: str) -> bytes:
        """Return a file."""
        if path not in self.files:
            raise KeysMissing(f"the file has no {path}; fetch it anew with: edgewarden keys fetch")
        return self.files[path]

    def post(self, path: str, body: msgspec.Struct, type: type[T]) -> T:  # noqa: A002 - as Session names it
        """Refuse: there is no server behind a file."""
        del body, type
        raise CannotSign(f"{path} needs the server; write a file with --prepare instead")

    def upload(self, path: str, fileobj: IO[bytes], length: int) -> None:
        """Refuse: there is no server behind a file."""
        del fileobj, length
        raise CannotSign(f"{path} needs the server; write a file with --prepare instead")

    def fingerprint(self) -> str:
        """Return what two people compare."""
        return fingerprint(*(self.get_bytes(f"/trust/{r}/metadata/1.root.json") for r in ("image", "director")))


class ChangeFile(msgspec.Struct, frozen=True, kw_only=True):
    """A change, signed by some."""

    format: int = 1
    publication: Publication
    base: Fetched


def fetch(client: Client) -> Fetched:
    """Read all that a machine without network needs."""
    if isinstance(client, Fetched):
        return client
    status = client.get("/trust", TrustStatus)
    if not status.ready:
        raise NotInitialised("the server has no trust roots yet; make them with: edgewarden keys init --dir KEYS")
    versions = {"image": status.image_root_version or 0, "director": status.director_root_version or 0}
    roots = [
        f"/trust/{repository}/metadata/{n}.root.json"
        for repository, newest in versions.items()
        for n in range(1, newest + 1)
    ]
    targets = [f"/trust/image/metadata/{n}.{role}.json" for role, n in status.targets_versions.items()]
    return Fetched(
        status=status,
        online=client.get("/trust/online-keys", OnlineKeysView),
        files={path: client.get_bytes(path) for path in (*roots, *targets)},
    )


def read_fetched(path: Path) -> Fetched:
    """Read what `keys fetch` wrote."""
    return _read(path, Fetched)


def write_fetched(path: Path, fetched: Fetched) -> None:
    """Write it."""
    write_file(path, msgspec.json.encode(fetched))


def write_change(path: Path, change: Change, base: Fetched) -> None:
    """Write a change with the signatures it has."""
    write_file(path, msgspec.json.encode(ChangeFile(publication=change.publication(), base=base)))


def read_change(path: Path, folder: KeyFolder) -> tuple[Change, Fetched]:
    """Read a change and verify, with the folder's own roots, what it was made on."""
    file = _read(path, ChangeFile)
    return change_of(fetch_verified(file.base, folder), file.publication, now_utc()), file.base


def read_publication(path: Path) -> ChangeFile:
    """Read a change as it is, to bring it to the server, which verifies all of it."""
    return _read(path, ChangeFile)


def adopt_roots(folder: KeyFolder, fetched: Fetched) -> None:
    """Begin to trust the first roots in a file, after a person compared their fingerprint."""
    for repository in ("image", "director"):
        folder.keep_root(repository, 1, fetched.get_bytes(f"/trust/{repository}/metadata/1.root.json"))


def change_path(path: Path) -> Path:
    """Return the change's file: a folder of a prepared publication has it under its name."""
    return path / CHANGE_NAME if path.is_dir() else path


def _read(path: Path, kind: type[T]) -> T:
    data = read_file(path, MAX_FILE)
    if data is None:
        raise KeysMissing(f"{path} is not there")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise KeysMissing(f"{path} is not what this command wants: {error}") from error
