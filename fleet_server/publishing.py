"""Takes in what the release team signed: trust roots, bundles and targets metadata, version by version.

Knows in which order things are checked and stored: first everything is verified, then it is stored, so that a
refusal leaves no trace. TUF's own rules are the Image repository's; this driver adds what only the bundles
themselves can show: each is here, whole, and says of itself what was signed about it.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
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
    on_director_root: Callable[[int], object] = lambda _now: None  # the Director's keys may have changed
    on_new: Callable[[Sequence[PublishedBundle]], object] = lambda _bundles: None
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def accept_roots(self, roots: Roots, now: int) -> None:
        """Take both roots and the Image targets that go with them; raise `Refused`. For the first time, and again."""
        self.publish(
            Publication(image_root=roots.image_root, targets=roots.image_targets, director_root=roots.director_root),
            now,
        )
        _log.info("trust roots accepted")

    def make_next_keys(self) -> None:
        """Make new online keys; they are used from the roots on that name them."""
        with self._turn:
            self.director.make_next_keys()
            self.image.make_next_keys()
        _log.warning("new online keys were made; they wait for roots that name them")

    def upload(self, stream: Iterator[bytes], sha256: str) -> int:
        """Store a bundle; return its length. Raises `Refused` unless it is whole and a bundle."""
        length = self.artifacts.add(stream, sha256, cap=MAX_BUNDLE)
        with self.artifacts.open(sha256) as bundle:
            manifest = _read_whole(bundle, sha256)
        _log.info("bundle %s stored: %s %d (%d bytes)", sha256[:16], manifest.model, manifest.version, length)
        return length

    def publish(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        """Take what was signed offline; return the bundles that are new. After `Refused` nothing was stored."""
        with self._turn:
            new = self._check(publication, now)
            if publication.director_root is not None:
                self.director.accept_root(publication.director_root)
            if _is_of_image(publication):
                self.releases.add_bundles(self.image.accept(publication, now))
        if publication.director_root is not None:
            self.on_director_root(now)
        for bundle in new:
            _log.info("published %s", bundle.path)
        self.on_new(new)
        return new

    def catch_up(self, now: int) -> None:
        """Finish a publication that was cut short, and put into the database what is signed; for the start."""
        self.releases.add_bundles(self.image.catch_up(now))

    def _check(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        if publication.director_root is not None:
            self.director.check_root(publication.director_root)
        if not _is_of_image(publication):
            return ()
        known = self.releases.bundles()
        new = _new_among(self.image.check(publication, now), known)
        _check_versions(new, known)
        for bundle in new:
            self._check_bundle(bundle)
        return new

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


def _is_of_image(publication: Publication) -> bool:
    return bool(publication.image_root or publication.targets or publication.delegated)


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
