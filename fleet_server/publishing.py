"""Takes in what the release team signed: the trust roots once, then bundles and targets metadata, version by version.

Knows in which order things are checked and stored: first everything is verified, then it is stored, so that a
refusal leaves no trace. TUF's own rules are the Image repository's; this driver adds what only the bundles
themselves can show: each is here, whole, and says of itself what was signed about it.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import IO

from fleet_server.api_types import Publication, Roots
from fleet_server.ports import Artifacts, Director, ImageRepository, PublishedBundle, Releases
from protocol.bundle import BadBundle, unpack
from protocol.manifest import Manifest
from protocol.names import MAX_BUNDLE
from protocol.release import release_of

_log = logging.getLogger(__name__)


class Refused(Exception):
    """What was signed or uploaded cannot be taken. Field: ``reason``, a sentence that names what is wrong."""

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """The driver. One publication at a time."""

    releases: Releases
    director: Director
    image: ImageRepository
    artifacts: Artifacts
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def accept_roots(self, roots: Roots, now: int) -> None:
        """Take both roots and the Image targets that go with them; raise `Refused`.

        The first time these are versions 1. Later each may be the next version or the same again, so that expiry
        dates and keys can be renewed.
        """
        with self._turn:
            self.director.check_root(roots.director_root)
            self.image.accept_root(roots.image_root)
            self.image.accept_targets(roots.image_targets, now)
            self.director.accept_root(roots.director_root)
        _log.info("trust roots accepted")

    def upload(self, stream: Iterator[bytes], sha256: str) -> int:
        """Store a bundle; return its length. Raises `Refused` unless it is whole and a bundle."""
        length = self.artifacts.add(stream, sha256, cap=MAX_BUNDLE)
        with self.artifacts.open(sha256) as bundle:
            manifest = _read_whole(bundle, sha256)
        _log.info("bundle %s stored: %s %d (%d bytes)", sha256[:16], manifest.model, manifest.version, length)
        return length

    def publish(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        """Take targets n+1; return what is new. Raises `Refused`; then nothing was stored."""
        with self._turn:
            named = self.image.check_targets(publication.targets, now)
            known = self.releases.bundles()
            new = _new_among(named, known)
            _check_versions(new, known)
            for bundle in new:
                self._check_bundle(bundle)
            self.image.accept_targets(publication.targets, now)
            self.releases.add_bundles(named)
        for bundle in new:
            _log.info("published %s", bundle.path)
        return new

    def catch_up(self, now: int) -> None:
        """Put into the database what a publication that was cut short had signed already; for the start."""
        targets = self.image.metadata("targets.json")
        if targets is not None:
            self.releases.add_bundles(self.image.accept_targets(targets, now))

    def _check_bundle(self, bundle: PublishedBundle) -> None:
        length = self.artifacts.length(bundle.sha256)
        if length is None:
            raise Refused(f"{bundle.path}: the bundle {bundle.sha256} was not uploaded")
        if length != bundle.length:
            raise Refused(f"{bundle.path}: the bundle has {length} bytes, {bundle.length} were signed")
        with self.artifacts.open(bundle.sha256) as stored:
            manifest = _read_whole(stored, bundle.path)
        if manifest.version != bundle.release.version:
            raise Refused(
                f"{bundle.path}: the manifest says version {manifest.version}, signed was {bundle.release.version}"
            )
        if release_of(manifest, bundle.release.family) != bundle.release:
            raise Refused(f"{bundle.path}: the manifest describes another release than was signed")


def _new_among(named: Sequence[PublishedBundle], known: Sequence[PublishedBundle]) -> Sequence[PublishedBundle]:
    paths = {bundle.path for bundle in known}
    return [bundle for bundle in named if bundle.path not in paths]


def _check_versions(new: Sequence[PublishedBundle], known: Sequence[PublishedBundle]) -> None:
    """Hold new bundles to a version above all that exist; variants of one version come in one publication."""
    highest: dict[str, int] = {}
    for bundle in known:
        highest[bundle.release.model] = max(bundle.release.version, highest.get(bundle.release.model, 0))
    for bundle in new:
        floor = highest.get(bundle.release.model, 0)
        if bundle.release.version <= floor:
            raise Refused(
                f"{bundle.path}: version {bundle.release.version} is not above {floor}, "
                f"the highest of {bundle.release.model}"
            )


def _read_whole(bundle: IO[bytes], name: str) -> Manifest:
    """Return the manifest after checking every member's hash; the bytes go nowhere."""
    try:
        return unpack(bundle, lambda _: _Nowhere())
    except BadBundle as error:
        raise Refused(f"{name}: {error}") from error


class _Nowhere(BytesIO):
    """A file that forgets what is written to it."""

    def write(self, data: object, /) -> int:
        """Count only."""
        return memoryview(data).nbytes  # type: ignore[arg-type]  # typeshed has no public Buffer before 3.12
