"""``edgewarden models publish``: gives bundles a version, signs them into the Image repository offline, uploads them.

Knows the order: verify what the server has, sign on top of it, upload the bundles, then the metadata. The model files
are read here and signed here; the server only ever sees the result.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Annotated, cast

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile, Targets

from fleet_server.api_types import Publication
from fleet_server.cli.keys import AsJson, PassphraseFile, Server, errors_said, passphrase_from
from fleet_server.cli.session import ApiError, Session, Unreachable
from fleet_server.cli.signing import (
    IMAGE_TARGETS,
    CannotSign,
    Client,
    KeyFolder,
    fetch_verified,
    now_utc,
    releases_in,
    sign_next,
)
from protocol.bundle import BadBundle, digest_of_stream, unpack, write_bundle
from protocol.manifest import MANIFEST_NAME, UNPUBLISHED, BadManifest, Manifest, decode_manifest
from protocol.names import FAMILY_NAME, MAX_BUNDLE, MAX_MANIFEST, IllegalName, check_name
from protocol.release import DEFAULT_FAMILY, Release, bundle_path, release_of, to_custom

Opened = Callable[[Path], IO[bytes]]
_out = Console()


class BadSource(CannotSign):
    """A bundle or folder to publish is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A bundle before it has a version."""

    name: str
    manifest: Manifest
    members: Mapping[str, bytes]


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle as it was published."""

    model: str
    version: int
    variant: str
    path: str
    sha256: str
    length: int


@dataclass(frozen=True, kw_only=True)
class _Packed:
    release: Release
    file: Path
    sha256: str
    length: int

    def target(self) -> TargetFile:
        custom = {"custom": {"release": to_custom(self.release)}}
        return TargetFile(self.length, {"sha256": self.sha256}, bundle_path(self.release), custom)

    def published(self) -> Published:
        return Published(
            model=self.release.model,
            version=self.release.version,
            variant=self.release.variant,
            path=bundle_path(self.release),
            sha256=self.sha256,
            length=self.length,
        )


def publish(
    sources: Annotated[list[Path], typer.Argument(help="Folders with a manifest.json, or .ewb files.")],
    *,
    keys: Annotated[Path, typer.Option("--keys", "--dir", help="The key folder.")],
    family: Annotated[str, typer.Option(help="The family of the models.")] = DEFAULT_FAMILY,
    title: Annotated[str | None, typer.Option(help="A name for people; the manifest's own by default.")] = None,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Publish bundles: the next version of each model, signed with the offline targets key."""
    with errors_said():
        bundles = [read_source(path, title) for path in sources]
        folder = KeyFolder(keys)
        signer = folder.signer(IMAGE_TARGETS, passphrase_from(passphrase_file))
        session = Session(server)
        try:
            with _progress(hidden=as_json) as progress:
                publisher = Publisher(
                    client=session, folder=folder, signer=signer, family=family, open_bundle=_shown_on(progress)
                )
                published = publisher.publish(bundles)
        finally:
            session.close()
    if as_json:
        typer.echo(msgspec.json.encode(published))
        return
    for one in published:
        line = f"published {one.model} {one.version} ({one.variant}), {one.length} bytes, sha256 {one.sha256}"
        _out.print(line, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """One release person at work: the server, the key folder and its opened targets key."""

    client: Client
    folder: KeyFolder
    signer: CryptoSigner
    family: str = DEFAULT_FAMILY
    open_bundle: Opened = lambda path: path.open("rb")

    def publish(self, sources: Sequence[Source]) -> Sequence[Published]:
        """Publish; when someone else published in between, do it once more on top of that."""
        _check_sources(sources, self.family)
        with tempfile.TemporaryDirectory(prefix="edgewarden-publish-") as work:
            current = fetch_verified(self.client, self.folder).targets
            try:
                return self._publish_on(current, sources, Path(work))
            except Unreachable:
                raise
            except ApiError:
                newer = fetch_verified(self.client, self.folder).targets
                if newer.version == current.version:
                    raise
                return self._publish_on(newer, sources, Path(work))

    def _publish_on(self, current: Targets, sources: Sequence[Source], work: Path) -> Sequence[Published]:
        packed = [_pack(s, _next_version(current, s.manifest.model), self.family, work) for s in sources]
        targets = sign_next(current, {bundle_path(p.release): p.target() for p in packed}, self.signer, now_utc())
        for bundle in packed:
            with self.open_bundle(bundle.file) as file:
                self.client.upload(f"/models/bundles/{bundle.sha256}", file, bundle.length)
        self.client.post("/models/publish", Publication(targets=targets), object)
        self.folder.keep_targets(targets, current.version + 1)
        return [bundle.published() for bundle in packed]


def _next_version(current: Targets, model: str) -> int:
    return 1 + max((r.version for r in releases_in(current) if r.model == model), default=0)


def _pack(source: Source, version: int, family: str, work: Path) -> _Packed:
    if source.manifest.version not in (UNPUBLISHED, version):
        raise BadSource(
            f"{source.name}: its manifest has version {source.manifest.version} already, the next is {version}; "
            "publish the bundle as it was before it got a version"
        )
    manifest = msgspec.structs.replace(source.manifest, version=version)
    file = work / f"{manifest.model}-{version}-{manifest.variant}.ewb"
    try:
        with file.open("wb") as target:
            write_bundle(target, manifest, source.members)
    except BadBundle as error:
        raise BadSource(f"{source.name}: {error}") from error
    with file.open("rb") as written:
        sha256 = digest_of_stream(written)
    return _Packed(release=release_of(manifest, family), file=file, sha256=sha256, length=file.stat().st_size)


def _check_sources(sources: Sequence[Source], family: str) -> None:
    try:
        check_name("family", family, FAMILY_NAME)
    except IllegalName as error:
        raise BadSource(str(error)) from error
    seen: dict[tuple[str, str], str] = {}
    for source in sources:
        key = (source.manifest.model, source.manifest.variant)
        if key in seen:
            raise BadSource(
                f"{source.name} and {seen[key]} are both {key[0]} ({key[1]}); publish one after the other"
            )
        seen[key] = source.name


# ---------------------------------------------------------------- reading bundles
def read_source(path: Path, title: str | None = None) -> Source:
    """Read a folder with a manifest, or an ``.ewb`` file; raise `BadSource`."""
    try:
        manifest, members = _read_folder(path) if path.is_dir() else _read_file(path)
    except (BadManifest, BadBundle) as error:
        raise BadSource(f"{path}: {error}") from error
    except OSError as error:
        raise BadSource(f"cannot read {error.filename or path}: {error.strerror}") from error
    if title is not None:
        manifest = msgspec.structs.replace(manifest, title=title)
    return Source(name=str(path), manifest=manifest, members=members)


def _read_folder(folder: Path) -> tuple[Manifest, Mapping[str, bytes]]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BadSource(f"{folder} has no {MANIFEST_NAME}; pack a model with: edgewarden-convert")
    manifest = decode_manifest(_read_capped(path, MAX_MANIFEST))
    return manifest, {name: _read_capped(folder / name, MAX_BUNDLE) for name in manifest.members}


def _read_capped(path: Path, cap: int) -> bytes:
    if path.stat().st_size > cap:
        raise BadSource(f"{path} is over the cap of {cap} bytes")
    return path.read_bytes()


def _read_file(path: Path) -> tuple[Manifest, Mapping[str, bytes]]:
    members: dict[str, _Member] = {}
    with path.open("rb") as file:
        manifest = unpack(file, lambda name: members.setdefault(name, _Member()))
    return manifest, {name: member.content for name, member in members.items() if name != MANIFEST_NAME}


class _Member(BytesIO):
    """A member in memory whose content outlives its closing."""

    content = b""

    def close(self) -> None:
        if not self.closed:
            self.content = self.getvalue()
        super().close()


# ---------------------------------------------------------------- progress
def _progress(*, hidden: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=hidden or not console.is_terminal, transient=True)


def _shown_on(progress: Progress) -> Opened:
    """Return an `open` whose reading moves a bar."""

    def opened(path: Path) -> IO[bytes]:
        return cast("IO[bytes]", progress.open(path, "rb", description=path.name))

    return opened
