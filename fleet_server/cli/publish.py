"""``edgewarden models publish | yank | floor``: what the offline keys say of bundles.

Publishing gives bundles a version. Knows the order: verify what the server has, sign on top of it, upload the
bundles, then the metadata. The model files are read here and signed here; the server only ever sees the result.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from tuf.api.metadata import TargetFile

from fleet_server.cli import change_file, trust_table
from fleet_server.cli.changes import Change
from fleet_server.cli.errors import CannotSign, KeysMissing
from fleet_server.cli.key_folder import KeyFolder
from fleet_server.cli.release_desk import (
    AsJson,
    Folder,
    Offline,
    Opened,
    PassphraseFile,
    Prepare,
    Server,
    complete,
    desk_at,
    errors_said,
    out,
    progress,
    shown_on,
)
from fleet_server.cli.session import ApiError, Unreachable
from fleet_server.cli.signers import Passphrase
from fleet_server.cli.signing import Client, Verified, fetch_verified, now_utc, releases_in
from protocol.bundle import BadBundle, digest_of_stream, unpack, write_bundle
from protocol.manifest import MANIFEST_NAME, UNPUBLISHED, BadManifest, Manifest, decode_manifest
from protocol.names import FAMILY_NAME, MAX_BUNDLE, MAX_MANIFEST, IllegalName, check_name
from protocol.release import DEFAULT_FAMILY, Release, bundle_path, release_of, to_custom


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
    keys: Folder,
    family: Annotated[str, typer.Option(help="The family of the models.")] = DEFAULT_FAMILY,
    title: Annotated[str | None, typer.Option(help="A name for people; the manifest's own by default.")] = None,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
    as_json: AsJson = False,
) -> None:
    """Publish bundles: the next version of each model, signed with the offline keys of its family.

    With --prepare OUT a folder is written, with the bundles and what is signed so far.
    """
    with errors_said():
        bundles = [read_source(path, title) for path in sources]
        with desk_at(keys, server, offline, passphrase_file) as desk, progress(hidden=as_json) as bars:
            publisher = Publisher(
                client=desk.client,
                folder=desk.folder,
                passphrase=desk.passphrase,
                family=family,
                open_bundle=shown_on(bars),
            )
            published = publisher.prepare(bundles, prepare) if prepare else publisher.publish(bundles)
    if as_json:
        typer.echo(msgspec.json.encode(published))
        return
    for one in published:
        verb = "prepared" if prepare else "published"
        line = f"{verb} {one.model} {one.version} ({one.variant}), {one.length} bytes, sha256 {one.sha256}"
        out.print(line, soft_wrap=True)


def yank(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[int, typer.Argument(min=1, help="The version.")],
    *,
    keys: Folder,
    reason: Annotated[str, typer.Option(help="Why; shown to whoever would deploy it.")],
    variant: Annotated[str | None, typer.Option(help="Only this variant.")] = None,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Yank a version: it is not newly installed anywhere; devices that run it go on serving. A yank stays."""
    with errors_said(), desk_at(keys, server, offline, passphrase_file) as desk:
        change = desk.change()
        change.yank(model, version, reason, variant)
        desk.finish(change, prepare)


def floor(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[int, typer.Argument(min=1, help="The lowest version that devices may run.")],
    *,
    keys: Folder,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Raise the floor of a model: devices install nothing below it, also not to roll back. It only grows."""
    with errors_said(), desk_at(keys, server, offline, passphrase_file) as desk:
        change = desk.change()
        change.raise_floor(model, version)
        desk.finish(change, prepare)


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """One release person at work: the server, or what was fetched of it, and the key folder."""

    client: Client
    folder: KeyFolder
    passphrase: Passphrase
    family: str = DEFAULT_FAMILY
    open_bundle: Opened = lambda path: path.open("rb")

    def publish(self, sources: Sequence[Source]) -> Sequence[Published]:
        """Publish; when someone else published in between, do it once more on top of that."""
        _check_sources(sources, self.family)
        with tempfile.TemporaryDirectory(prefix="edgewarden-publish-") as work:
            current = fetch_verified(self.client, self.folder)
            try:
                return self._publish_on(current, sources, Path(work))
            except Unreachable:
                raise
            except ApiError:
                newer = fetch_verified(self.client, self.folder)
                if _versions(newer) == _versions(current):
                    raise
                return self._publish_on(newer, sources, Path(work))

    def prepare(self, sources: Sequence[Source], folder: Path) -> Sequence[Published]:
        """Write the bundles and what is signed so far to a folder that is carried on."""
        _check_sources(sources, self.family)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise BadSource(f"{folder} is there already; say a new folder with --prepare")
        folder.mkdir(parents=True, exist_ok=True)
        change, packed = self._signed_on(fetch_verified(self.client, self.folder), sources, folder)
        for bundle in packed:
            bundle.file.replace(folder / f"{bundle.sha256}.ewb")
        file = folder / change_file.CHANGE_NAME
        change_file.write_change(file, change, change_file.fetch(self.client))
        trust_table.say_signed((), change.missing(), folder)
        return [bundle.published() for bundle in packed]

    def _publish_on(self, current: Verified, sources: Sequence[Source], work: Path) -> Sequence[Published]:
        change, packed = self._signed_on(current, sources, work)
        publication = complete(change)
        for bundle in packed:
            with self.open_bundle(bundle.file) as file:
                self.client.upload(f"/models/bundles/{bundle.sha256}", file, bundle.length)
        self.client.post("/models/publish", publication, object)
        for role, metadata in change.targets.items():
            self.folder.keep_targets(metadata.to_bytes(), metadata.signed.version, role)
        return [bundle.published() for bundle in packed]

    def _signed_on(
        self, current: Verified, sources: Sequence[Source], work: Path
    ) -> tuple[Change, Sequence[_Packed]]:
        packed = [_pack(s, _next_version(current, s.manifest.model), self.family, work) for s in sources]
        change = Change(base=current, now=now_utc())
        change.add_bundles(self.family, {bundle_path(p.release): p.target() for p in packed})
        if not change.sign(self.folder, self.passphrase):
            raise KeysMissing(
                f"{self.folder.path} holds no key that signs for family {self.family}\n" + "\n".join(change.missing())
            )
        return change, packed


def _versions(current: Verified) -> Mapping[str, int]:
    return {role: metadata.signed.version for role, metadata in current.signed.items()}


def _next_version(current: Verified, model: str) -> int:
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
