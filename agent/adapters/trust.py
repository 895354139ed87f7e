"""What this device may and should run, as both TUF repositories say. The only importer of tuf.

TUF's own rules (signatures, thresholds, versions, expiry, hashes of metadata) are python-tuf's. Added here:

- Director metadata is for this device, even when its list is empty, and a version never comes with two contents.
- Each Director target is named by the Image repository with the same length, hash and release, under the release's
  own path, and is not below the model's floor. A floor once seen never falls.
- The clock never counts as earlier than the newest ``issued`` accepted.
- A bundle that is in the store already needs no fresh Image metadata: those verified before still vouch for it, so
  that neither expired offline keys nor an unreachable server can stand in the way of a rollback.

python-tuf neither flushes nor swaps atomically, and half a payload spoils its folder. So it works in a throw-away
copy, and only when all checks have passed is one state file replaced. After a failure, newer roots are kept (signed
offline, and verified), and nothing else.
"""

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import msgspec
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.ports import RecalledDesire, Refusal, Target, Trouble, TrustVersions, VerifiedDesire, Weather
from protocol.messages import DesiredState
from protocol.names import MAX_METADATA_FILE, IllegalName
from protocol.release import (
    Assignment,
    DirectorScope,
    Release,
    bundle_path,
    floor_path,
    from_custom,
    is_bundle_path,
)
from protocol.states import RejectReason

log = logging.getLogger(__name__)
S = TypeVar("S")

Source = Callable[[str, int], bytes | None]
"""A repository's files: (name, cap in bytes) -> content, or None when there is no such file."""

_STATE_FILE = "trust.json"
_STATE_FORMAT = 1
_MAX_STATE = 4 * MAX_METADATA_FILE  # both repositories' metadata, as text
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)  # nothing has expired by then
_BASE = "edgewarden:/"  # python-tuf wants a URL; only the name after it matters
_PARTS = ("timestamp.json", "snapshot.json", "targets.json")
# What it looks like when the server published between two of our requests: ask once more.
_TORN = frozenset({RejectReason.REPLAYED, RejectReason.HASH_MISMATCH, RejectReason.INCOMPLETE})
_FOREIGN_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """All that is remembered. ``director`` and ``image``: python-tuf's files, {relative name: text}."""

    format: int = _STATE_FORMAT
    anchors: tuple[str, ...]  # whose state this is: device, and the SHA-256 of both first roots
    director: dict[str, str] = {}
    image: dict[str, str] = {}
    director_root: int = 0  # root versions under which these were accepted
    image_root: int = 0
    version: int = 0  # of the Director's targets
    issued: int = 0  # newest ``issued`` accepted, UTC ms: the clock's floor
    floors: dict[str, int] = {}  # {floor path: highest floor seen}


class _Floor(msgspec.Struct, frozen=True, kw_only=True):
    floor: int


class _Signed(msgspec.Struct, frozen=True):
    version: int


class _Versioned(msgspec.Struct, frozen=True):
    signed: _Signed


class TufTrust:
    """Port `Trust`. One desired state is verified at a time; `versions` answers meanwhile."""

    def __init__(
        self,
        *,
        device: str,
        director_root: bytes,
        image_root: bytes,
        folder: Path,
        scratch: Path,
        image: Source,
        is_stored: Callable[[str], bool],
    ) -> None:
        """Load the state; raise `Trouble` when it is damaged.

        ``folder`` keeps the state file, ``scratch`` the throw-away copies (best in memory). ``image`` fetches the
        Image repository's files; ``is_stored`` tells whether a bundle (SHA-256, hex) is in the store, verified.
        """
        self._device = device
        self._bootstrap = {"director": director_root, "image": image_root}
        self._folder = folder
        self._scratch = scratch
        self._image = image
        self._is_stored = is_stored
        self._busy = threading.Lock()
        for place in (folder, scratch):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        for which, root in self._bootstrap.items():
            _check_anchor(which, root)
        self._state = self._load()

    # ------------------------------------------------------------ what others ask
    def verify(self, message: DesiredState, now: int) -> VerifiedDesire:
        with self._busy:
            return self._verify(message, _at(max(now, self._state.issued)))

    def versions(self) -> TrustVersions:
        state = self._state
        return TrustVersions(
            director=state.version,
            director_root=_newest_root(state.director, self._bootstrap["director"]),
            image_root=_newest_root(state.image, self._bootstrap["image"]),
        )

    @property
    def clock_floor(self) -> int:
        """Return the UTC ms before which it cannot be: the newest ``issued`` that was accepted."""
        return self._state.issued

    def recall(self, now: int) -> RecalledDesire | None:
        """Return the desired state accepted last, verified again offline; None when there was none.

        Age alone is no failure: what was verified once is returned, and marked as expired.
        """
        with self._busy:
            state = self._state
            if _PARTS[-1] not in state.director:
                return None
            with self._copy("director", _as_accepted(state.director, state.director_root), _EPOCH) as director:
                director.refresh()
                targets = _director_targets(director.files())
            with self._copy("image", _as_accepted(state.image, state.image_root), _EPOCH) as image:
                desire = self._agree(targets, image)
            return RecalledDesire(desire=desire, expired=self._is_stale(_at(max(now, state.issued))))

    def _is_stale(self, at: datetime) -> bool:
        """Tell whether what is held has expired, or was accepted under a root that has a successor by now."""
        state, versions = self._state, self.versions()
        superseded = (versions.director_root, versions.image_root) != (
            state.director_root,
            state.image_root or versions.image_root,
        )
        return superseded or _any_expired(state.director, at) or _any_expired(state.image, at)

    # ------------------------------------------------------------ the story
    def _verify(self, message: DesiredState, at: datetime) -> VerifiedDesire:
        _check_complete(message)
        files, targets = self._verify_director(message, at)
        scope = self._scope(targets)
        if all(files[part] == self._state.director.get(part) for part in _PARTS):
            self._keep_newer_director_root(files)
            return self._agree_as_before(targets)
        desire, image = self._verify_image(targets, at)
        self._commit(
            msgspec.structs.replace(
                self._state,
                director=files,
                image=image,
                director_root=_newest_root(files, self._bootstrap["director"]),
                image_root=_newest_root(image, self._bootstrap["image"]),
                version=targets.version,
                issued=max(scope.issued, self._state.issued),
                floors=self._raised_floors(desire),
            )
        )
        return desire

    def _verify_director(self, message: DesiredState, at: datetime) -> tuple[dict[str, str], Targets]:
        with self._copy("director", self._state.director, at, _payload(message)) as director:
            director.refresh()
            files = director.files()
        for part in _PARTS:
            # At an equal version python-tuf silently keeps what it has.
            if files[part].encode() != _part(message, part):
                raise Refusal(RejectReason.REPLAYED, f"{part} comes again under a version already used for another")
        return files, _director_targets(files)

    def _scope(self, targets: Targets) -> DirectorScope:
        """Return whom a desired state is for; raise `Refusal` unless it is this device."""
        custom = targets.unrecognized_fields.get("custom")
        if not isinstance(custom, dict) or custom.get("device") != self._device:
            raise Refusal(RejectReason.WRONG_DEVICE, f"this is {self._device}; the desired state is not for it")
        scope = _convert(custom, DirectorScope, "the desired state's scope")
        if _at(scope.issued) > targets.expires:
            raise Refusal(RejectReason.MALFORMED, "the desired state is issued after it expires")
        return scope

    def _verify_image(self, targets: Targets, at: datetime) -> tuple[VerifiedDesire, dict[str, str]]:
        """Ask the Image repository about each target; return what both agree on, and the Image files to keep."""
        if not targets.targets:
            return self._desire(targets, ()), self._state.image
        try:
            return self._ask_image(targets, at)
        except (Weather, Refusal) as error:
            if isinstance(error, Refusal) and error.reason is not RejectReason.EXPIRED:
                raise
            return self._ask_memory(targets, error), self._state.image

    def _ask_image(self, targets: Targets, at: datetime) -> tuple[VerifiedDesire, dict[str, str]]:
        try:
            return self._ask_image_once(targets, at)
        except Refusal as refusal:
            if refusal.reason not in _TORN:
                raise
            return self._ask_image_once(targets, at)

    def _ask_image_once(self, targets: Targets, at: datetime) -> tuple[VerifiedDesire, dict[str, str]]:
        with self._copy("image", self._state.image, at, self._image) as image:
            image.refresh()
            desire = self._agree(targets, image)
            return desire, image.files()

    def _ask_memory(self, targets: Targets, error: Weather | Refusal) -> VerifiedDesire:
        """Let the Image metadata verified before vouch for bundles that are all stored; else raise ``error``."""
        if not all(self._is_stored(info.hashes.get("sha256", "")) for info in targets.targets.values()):
            raise error
        try:
            with self._copy("image", self._state.image, _EPOCH) as image:
                desire = self._agree(targets, image)
        except Refusal as refusal:
            if refusal.reason is RejectReason.BELOW_FLOOR:
                raise
            raise error from refusal
        log.info("the Image repository cannot be asked (%s); what it said before vouches for stored bundles", error)
        return desire

    def _agree_as_before(self, targets: Targets) -> VerifiedDesire:
        files = _as_accepted(self._state.image, self._state.image_root)
        with self._copy("image", files, _EPOCH) as image:
            return self._agree(targets, image)

    # ------------------------------------------------------------ agreement of both repositories
    def _agree(self, targets: Targets, image: "_Copy") -> VerifiedDesire:
        agreed = tuple(self._agree_on(path, info, image) for path, info in sorted(targets.targets.items()))
        models = [target.release.model for target in agreed]
        if len(set(models)) != len(models):
            raise Refusal(RejectReason.MALFORMED, f"a model is named twice: {', '.join(models)}")
        return self._desire(targets, agreed)

    def _agree_on(self, path: str, wanted: TargetFile, image: "_Copy") -> Target:
        if not is_bundle_path(path):
            raise Refusal(RejectReason.MALFORMED, f"{path} is not the path of a bundle")
        released = image.target(path)
        if released is None:
            raise Refusal(RejectReason.NOT_RELEASED, f"the Image repository does not name {path}")
        release = _same_release(path, wanted, released)
        floor = self._floor(release, image)
        if release.version < floor:
            raise Refusal(RejectReason.BELOW_FLOOR, f"{release.model} {release.version} is below the floor {floor}")
        return Target(
            release=release,
            assignment=_convert(_custom(wanted).get("assignment"), Assignment, f"the assignment of {path}"),
            sha256=released.hashes["sha256"],
            length=released.length,
            floor=floor,
        )

    def _floor(self, release: Release, image: "_Copy") -> int:
        path = floor_path(release.family, release.model)
        known = self._state.floors.get(path, 0)
        target = image.target(path)
        if target is None:
            return known
        return max(known, _convert(_custom(target), _Floor, path).floor)

    def _raised_floors(self, desire: VerifiedDesire) -> dict[str, int]:
        seen = {floor_path(t.release.family, t.release.model): t.floor for t in desire.targets if t.floor}
        return {**self._state.floors, **seen}

    def _desire(self, targets: Targets, agreed: tuple[Target, ...]) -> VerifiedDesire:
        scope = self._scope(targets)
        return VerifiedDesire(
            director_version=targets.version, issued=scope.issued, targets=agreed, config=scope.config
        )

    # ------------------------------------------------------------ memory
    @contextmanager
    def _copy(
        self, which: str, stored: Mapping[str, str], at: datetime, source: Source | None = None
    ) -> Iterator["_Copy"]:
        """Yield a throw-away copy of a repository; keep newer roots that it learned, also when it fails.

        Without a ``source`` the stored files themselves are fed back, so that they are verified again.
        """
        with self._throw_away() as folder:
            try:
                with _as_refusals(f"the {which.capitalize()} repository"):
                    _fill(folder, stored)
                    fetcher = _Fetcher(source or _again(stored))
                    updater = Updater(str(folder), _BASE, fetcher=fetcher, bootstrap=self._bootstrap[which])
                    # Nothing public sets the time; without it a device that woke in 1970 would take old for fresh.
                    updater._trusted_set.reference_time = at  # noqa: SLF001 - see above
                    yield _Copy(folder, updater)
            except (Weather, Refusal):
                if source is not None:
                    self._keep_roots(which, _read_files(folder))
                raise

    @contextmanager
    def _throw_away(self) -> Iterator[Path]:
        try:
            temporary = TemporaryDirectory(dir=self._scratch, prefix="tuf-", ignore_cleanup_errors=True)
        except OSError as error:
            raise Trouble(f"cannot work in {self._scratch}: {error}", remedy="Check that it is not full") from error
        with temporary as name:
            yield Path(name)

    def _keep_newer_director_root(self, files: dict[str, str]) -> None:
        newest = _newest_root(files, self._bootstrap["director"])
        if newest > self._state.director_root:
            self._commit(msgspec.structs.replace(self._state, director=files, director_root=newest))

    def _keep_roots(self, which: str, learned: Mapping[str, str]) -> None:
        held = self._state.director if which == "director" else self._state.image
        roots = {name: text for name, text in learned.items() if _is_root(name)}
        if _newest_root(roots, self._bootstrap[which]) > _newest_root(held, self._bootstrap[which]):
            self._commit(msgspec.structs.replace(self._state, **{which: {**held, **roots}}))

    def _commit(self, state: _State) -> None:
        body = msgspec.json.encode(state)
        digest = hashlib.sha256(body).hexdigest().encode()
        write_atomically(self._folder / _STATE_FILE, digest + b"\n" + body)
        self._state = state

    def _load(self) -> _State:
        path = self._folder / _STATE_FILE
        anchors = (self._device, *(hashlib.sha256(root).hexdigest() for root in self._bootstrap.values()))
        data = read_capped(path, _MAX_STATE)
        if data is None:
            return _State(anchors=anchors)
        state = _decode_state(data, path)
        if state.anchors != anchors:
            log.warning("%s is of another enrolment and is not used", path)
            return _State(anchors=anchors)
        return state

    def _sweep(self) -> None:
        """Remove what a power cut left behind."""
        for leftover in self._folder.glob(f".{_STATE_FILE}.*.tmp"):
            leftover.unlink(missing_ok=True)
        for leftover in self._scratch.glob("tuf-*"):
            shutil.rmtree(leftover, ignore_errors=True)


class _Copy:
    """One repository's trusted files in a folder that goes away, with python-tuf at work on it."""

    def __init__(self, folder: Path, updater: Updater) -> None:
        self._folder = folder
        self._updater = updater

    def refresh(self) -> None:
        """Load and verify the top-level roles; raise tuf's errors."""
        self._updater.refresh()

    def target(self, path: str) -> TargetFile | None:
        """Return what the repository says of a target; walks delegations; raises tuf's errors."""
        return self._updater.get_targetinfo(path)

    def files(self) -> dict[str, str]:
        """Return all that was verified, by relative name."""
        return _read_files(self._folder)


class _Fetcher(FetcherInterface):
    """Gives python-tuf a repository's files; nothing touches a disk on the way."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def download_bytes(self, url: str, max_length: int) -> bytes:
        name = url.removeprefix(_BASE)
        data = self._source(name, max_length)
        if data is None:
            raise tuf_errors.DownloadHTTPError(f"there is no {name}", 404)
        if len(data) > max_length:
            raise tuf_errors.DownloadLengthMismatchError(f"{name} is over the cap of {max_length} bytes")
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter([self.download_bytes(url, MAX_METADATA_FILE)])  # not a generator: errors must show here


def _fill(folder: Path, stored: Mapping[str, str]) -> None:
    (folder / "root_history").mkdir()
    for name, text in stored.items():
        (folder / name).write_bytes(text.encode())


def _read_files(folder: Path) -> dict[str, str]:
    """Return python-tuf's files (``root.json`` is only its link to the newest root)."""
    found = sorted(path for path in folder.rglob("*.json") if not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in found}


# ------------------------------------------------------------ errors of python-tuf, in our words
@contextmanager
def _as_refusals(whose: str) -> Iterator[None]:
    try:
        yield
    except tuf_errors.DownloadError as error:
        raise _refusal_of_download(error, whose) from error
    except tuf_errors.RepositoryError as error:
        raise Refusal(_reason_of(error), f"{whose}: {error}") from error
    except OSError as error:
        raise Trouble(f"cannot verify metadata: {error}", remedy="Check that the disk is not full") from error
    except _FOREIGN_ERRORS as error:  # hostile metadata must never do more than be refused
        raise Refusal(RejectReason.MALFORMED, f"{whose}: {type(error).__name__}: {error}") from error


_REASONS: tuple[tuple[type[Exception], RejectReason], ...] = (
    (tuf_errors.UnsignedMetadataError, RejectReason.BAD_SIGNATURE),
    (tuf_errors.BadVersionNumberError, RejectReason.REPLAYED),
    (tuf_errors.ExpiredMetadataError, RejectReason.EXPIRED),
    (tuf_errors.LengthOrHashMismatchError, RejectReason.HASH_MISMATCH),
)


def _reason_of(error: Exception) -> RejectReason:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return RejectReason.MALFORMED


def _refusal_of_download(error: tuf_errors.DownloadError, whose: str) -> Refusal | Weather:
    if isinstance(error, tuf_errors.DownloadHTTPError):
        return Refusal(RejectReason.INCOMPLETE, f"{whose}: {error}")
    if isinstance(error, tuf_errors.DownloadLengthMismatchError):
        return Refusal(RejectReason.MALFORMED, f"{whose}: {error}")
    return Weather(f"{whose}: {error}")


# ------------------------------------------------------------ where files come from
def _payload(message: DesiredState) -> Source:
    """Return the Director's files as one message carries them."""
    files = {_root_name(root): root for root in message.root}
    files.update({part: _part(message, part) for part in _PARTS})
    return _serve(files)


def _again(stored: Mapping[str, str]) -> Source:
    return _serve({name: text.encode() for name, text in stored.items() if not _is_root(name)})


def _serve(files: Mapping[str, bytes]) -> Source:
    """Roots go by their number; the other roles are held in one version each, whatever version is asked for."""

    def source(name: str, cap: int) -> bytes | None:
        del cap  # these are in memory already
        return files.get(name, files.get(_unversioned(name)))

    return source


def _unversioned(name: str) -> str:
    version, _, rest = name.partition(".")
    return rest if version.isdecimal() and rest != "root.json" else name


def _part(message: DesiredState, part: str) -> bytes:
    return {"timestamp.json": message.timestamp, "snapshot.json": message.snapshot, "targets.json": message.targets}[
        part
    ]


def _check_complete(message: DesiredState) -> None:
    for part in _PARTS:
        if not _part(message, part):
            raise Refusal(RejectReason.INCOMPLETE, f"the desired state has no {part}")


# ------------------------------------------------------------ reading what was verified
def _director_targets(files: Mapping[str, str]) -> Targets:
    return Metadata[Targets].from_bytes(files["targets.json"].encode()).signed


def _same_release(path: str, wanted: TargetFile, released: TargetFile) -> Release:
    """Return the release that both repositories mean; raise `Refusal` where they differ."""
    if set(wanted.hashes) != {"sha256"} or set(released.hashes) != {"sha256"}:
        raise Refusal(RejectReason.MALFORMED, f"{path}: only SHA-256 hashes are known")
    if (wanted.length, wanted.hashes) != (released.length, released.hashes):
        raise Refusal(RejectReason.DISAGREEMENT, f"{path}: the repositories differ in length or hash")
    release = _release(released, path)
    if _release(wanted, path) != release:
        raise Refusal(RejectReason.DISAGREEMENT, f"{path}: the repositories differ in the release")
    if _path_of(release) != path:
        # A delegation signs for its own family's paths only; a release must not claim more than its path.
        raise Refusal(RejectReason.DISAGREEMENT, f"{path}: the release belongs under another path")
    return release


def _release(target: TargetFile, path: str) -> Release:
    try:
        return from_custom(_custom(target).get("release"))
    except msgspec.ValidationError as error:
        raise Refusal(RejectReason.MALFORMED, f"the release of {path}: {error}") from error


def _path_of(release: Release) -> str:
    try:
        return bundle_path(release)
    except IllegalName as error:
        raise Refusal(RejectReason.MALFORMED, str(error)) from error


def _custom(target: TargetFile) -> dict[str, object]:
    custom = target.custom
    return custom if isinstance(custom, dict) else {}


def _convert(value: object, kind: "type[S]", what: str) -> "S":
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Refusal(RejectReason.MALFORMED, f"{what}: {error}") from error


# ------------------------------------------------------------ names and versions of stored files
def _check_anchor(which: str, root: bytes) -> None:
    try:
        metadata = Metadata[Root].from_bytes(root)
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except (tuf_errors.RepositoryError, *_FOREIGN_ERRORS) as error:
        raise Trouble(
            f"the first root of the {which.capitalize()} repository is damaged: {error}",
            remedy="Enrol again with `edgewarden-agent enroll --force`; the key is kept",
        ) from error


def _is_root(name: str) -> bool:
    return name.startswith("root_history/")


def _root_number(name: str) -> int:
    return int(name.removeprefix("root_history/").partition(".")[0])


def _newest_root(files: Mapping[str, str], bootstrap: bytes) -> int:
    return max((_root_number(name) for name in files if _is_root(name)), default=_version_of(bootstrap))


def _root_name(root: bytes) -> str:
    try:
        return f"{_version_of(root)}.root.json"
    except msgspec.DecodeError as error:
        raise Refusal(RejectReason.MALFORMED, f"a root is not metadata: {error}") from error


def _version_of(metadata: bytes) -> int:
    return msgspec.json.decode(metadata, type=_Versioned).signed.version


def _as_accepted(files: Mapping[str, str], root: int) -> dict[str, str]:
    """Return the files without roots newer than the one they were accepted under."""
    return {name: text for name, text in files.items() if not _is_root(name) or _root_number(name) <= root}


def _any_expired(files: Mapping[str, str], at: datetime) -> bool:
    return any(_expires(text) <= at for name, text in files.items() if not _is_root(name))


def _expires(text: str) -> datetime:
    return Metadata.from_bytes(text.encode()).signed.expires


def _at(milliseconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, tz=timezone.utc)
    except (OverflowError, ValueError, OSError) as error:
        raise Refusal(RejectReason.MALFORMED, f"{milliseconds} is not a time") from error


def _decode_state(data: bytes, path: Path) -> _State:
    """Return the state; a file that is not what was written is trouble, never silently forgotten."""
    digest, _, body = data.partition(b"\n")
    try:
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise msgspec.DecodeError("its checksum is wrong")
        state = msgspec.json.decode(body, type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Trouble(f"{path} is damaged: {error}", remedy=_FORGET) from error
    if state.format != _STATE_FORMAT:
        raise Trouble(f"{path} has format {state.format}, this agent reads {_STATE_FORMAT}", remedy=_FORGET)
    return state


_FORGET = "Remove it to begin anew from the enrolled roots: the device then takes the server's present word as it is"
