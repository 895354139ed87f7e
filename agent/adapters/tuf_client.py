"""One TUF repository, read by python-tuf in a throw-away copy. The only importer of tuf.

Knows the client workflow of the specification: roots step by step, freshness, thresholds, versions, delegations.
What is remembered from one reading to the next, and what a target means, is the callers' business (`trust.py`).

python-tuf neither flushes nor swaps atomically, and half a payload spoils its folder. So it works on a copy of what
is remembered, and the caller replaces its memory in one step, or not at all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import msgspec
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Delegations, Key, Metadata, Root, Snapshot, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater

from agent.core.agreement import Said
from agent.ports import Refusal, Trouble, Weather
from protocol.names import MAX_METADATA_FILE
from protocol.states import RejectReason

Source = Callable[[str, int], bytes | None]
"""A repository's files: (name, cap in bytes) -> content, or None when there is no such file."""

Files = Mapping[str, str]
"""Verified files as text, by python-tuf's relative names: ``root_history/N.root.json`` and ``<role>.json``."""

SCRATCH_PREFIX = "tuf-"
TOP_LEVEL = ("timestamp.json", "snapshot.json", "targets.json")
_BASE = "edgewarden:/"  # python-tuf wants a URL; only the name after it matters
_FOREIGN_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What the top-level targets role says."""

    version: int
    expires: datetime
    custom: Mapping[str, object]  # of the signed part
    targets: Mapping[str, Said]


@dataclass(frozen=True, kw_only=True)
class RoleKeys:
    """Whose signatures make something a role's word."""

    keys: Sequence[Key]
    threshold: int
    expires: datetime  # of the root that says so


class UpdateClient:
    """Reads one repository from a pinned first root on."""

    def __init__(self, name: str, *, first_root: bytes, scratch: Path) -> None:
        """``name`` is for messages; ``scratch`` holds the throw-away copies. Raise `Trouble` on a damaged root."""
        self._name = name
        self._first_root = first_root
        self._scratch = scratch
        _check_anchor(name, first_root)

    @contextmanager
    def open(
        self,
        remembered: Files,
        at: datetime,
        source: Source | None = None,
        *,
        failed: Callable[[dict[str, str]], None] = lambda _: None,
    ) -> Iterator["Reading"]:
        """Yield a reading that begins with what is remembered; ``at`` counts as the present.

        Without a ``source`` the remembered files themselves are fed back, so that they are verified again. After a
        failure ``failed`` is told all that was verified until then.
        """
        with self._throw_away() as folder:
            try:
                with _as_refusals(self._name):
                    _fill(folder, remembered)
                    fetcher = _Fetcher(source or _again(remembered))
                    updater = Updater(str(folder), _BASE, fetcher=fetcher, bootstrap=self._first_root)
                    # Nothing public sets the time; without it a device that woke in 1970 would take old for fresh.
                    updater._trusted_set.reference_time = at  # noqa: SLF001 - see above
                yield Reading(self._name, folder, updater)
            except (Weather, Refusal):
                if source is not None:
                    failed(_read_files(folder))
                raise

    def newest_root(self, files: Files) -> int:
        """Return the version of the newest root that is remembered."""
        return max((_root_number(name) for name in files if is_root(name)), default=version_of(self._first_root))

    def targets_keys(self, files: Files) -> RoleKeys:
        """Return who speaks for the top-level targets role, by the newest root remembered: it was verified."""
        text = files.get(f"root_history/{self.newest_root(files)}.root.json")
        root = Metadata[Root].from_bytes(text.encode() if text is not None else self._first_root).signed
        found = root.get_delegated_role(Targets.type)
        keys = tuple(root.get_key(keyid) for keyid in found.keyids)
        return RoleKeys(keys=keys, threshold=found.threshold, expires=root.expires)

    @contextmanager
    def _throw_away(self) -> Iterator[Path]:
        try:
            temporary = TemporaryDirectory(dir=self._scratch, prefix=SCRATCH_PREFIX, ignore_cleanup_errors=True)
        except OSError as error:
            raise Trouble(f"cannot work in {self._scratch}: {error}", remedy="Check that it is not full") from error
        with temporary as name:
            yield Path(name)


class Reading:
    """One repository's trusted files in a folder that goes away, with python-tuf at work on it."""

    def __init__(self, name: str, folder: Path, updater: Updater) -> None:
        """Made by `UpdateClient.open`. Methods raise `Refusal`, `Weather` or `Trouble`."""
        self._name = name
        self._folder = folder
        self._updater = updater

    def refresh(self) -> None:
        """Load and verify the top-level roles."""
        with _as_refusals(self._name):
            self._updater.refresh()

    def target(self, path: str) -> Said | None:
        """Return what the repository says of a target, through whichever role speaks for it."""
        with _as_refusals(self._name):
            found = self._updater.get_targetinfo(path)
            return None if found is None else _said(found)

    def is_delegated(self, path: str) -> bool:
        """Tell whether the top-level targets role lets another role speak for a path."""
        with _as_refusals(self._name):
            delegations = self._targets().delegations
            return delegations is not None and any(delegations.get_roles_for_target(path))

    def listing(self) -> Listing:
        """Return the top-level targets role."""
        with _as_refusals(self._name):
            targets = self._targets()
            custom = targets.unrecognized_fields.get("custom")
            return Listing(
                version=targets.version,
                expires=targets.expires,
                custom=custom if isinstance(custom, dict) else {},
                targets={path: _said(target) for path, target in targets.targets.items()},
            )

    @property
    def consistent_snapshot(self) -> bool:
        """Tell whether targets are served under names that begin with their hash."""
        with _as_refusals(self._name):
            root = Metadata[Root].from_bytes((self._folder / "root.json").read_bytes())
            return bool(root.signed.consistent_snapshot)

    def files(self) -> dict[str, str]:
        """Return what is to be remembered: roots, top-level roles, and the delegated roles that still count."""
        with _as_refusals(self._name):
            files = _read_files(self._folder)
            counting = _vouched_for(files)
            return {name: text for name, text in files.items() if not is_delegated_role(name) or name in counting}

    def _targets(self) -> Targets:
        return Metadata[Targets].from_bytes((self._folder / "targets.json").read_bytes()).signed


# ------------------------------------------------------------ delegated roles that are remembered
def _vouched_for(files: Files) -> set[str]:
    """Return the remembered delegated roles that their present delegator signs for, at the snapshot's version.

    The library checks a role when it is asked through it, and leaves the others' files lying. What lies there longer
    than its delegation must neither grow the memory for ever nor be found again by a later delegation of that name.
    """
    snapshot = Metadata[Snapshot].from_bytes(files["snapshot.json"].encode()).signed
    counting: set[str] = set()
    delegators = [Metadata[Targets].from_bytes(files["targets.json"].encode()).signed]
    while delegators:
        delegator = delegators.pop()
        for name in sorted(_named_by(delegator.delegations, files) - counting):
            metadata = _verified(name, files[name].encode(), delegator, snapshot)
            if metadata is not None:
                counting.add(name)
                delegators.append(metadata)
    return counting


def _named_by(delegations: Delegations | None, files: Files) -> set[str]:
    if delegations is None:
        return set()
    roles = {name: unquote(name).removesuffix(".json") for name in files if is_delegated_role(name)}
    if delegations.succinct_roles is not None:
        return {name for name, role in roles.items() if delegations.succinct_roles.is_delegated_role(role)}
    return {name for name, role in roles.items() if role in (delegations.roles or {})}


def _verified(name: str, data: bytes, delegator: Targets, snapshot: Snapshot) -> Targets | None:
    role = unquote(name).removesuffix(".json")
    try:
        metadata = Metadata[Targets].from_bytes(data)
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        said = snapshot.meta[f"{role}.json"]
        said.verify_length_and_hashes(data)
    except (tuf_errors.RepositoryError, *_FOREIGN_ERRORS):
        return None
    return metadata.signed if metadata.signed.version == said.version else None


# ------------------------------------------------------------ the folder
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


def serve(files: Mapping[str, bytes]) -> Source:
    """Return a source in memory: roots go by their number, the others whatever version is asked for."""

    def source(name: str, cap: int) -> bytes | None:
        del cap  # these are in memory already
        return files.get(name, files.get(_unversioned(name)))

    return source


def _again(remembered: Files) -> Source:
    return serve({name: text.encode() for name, text in remembered.items() if not is_root(name)})


def _unversioned(name: str) -> str:
    version, _, rest = name.partition(".")
    return rest if version.isdecimal() and rest != "root.json" else name


def _fill(folder: Path, remembered: Files) -> None:
    (folder / "root_history").mkdir()
    for name, text in remembered.items():
        (folder / name).write_bytes(text.encode())


def _read_files(folder: Path) -> dict[str, str]:
    """Return python-tuf's files (``root.json`` is only its link to the newest root)."""
    found = sorted(path for path in folder.rglob("*.json") if not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in found}


# ------------------------------------------------------------ names, versions and ages of files
def is_root(name: str) -> bool:
    """Tell roots from the other remembered files."""
    return name.startswith("root_history/")


def is_delegated_role(name: str) -> bool:
    """Tell delegated roles from the other remembered files."""
    return not is_root(name) and name not in TOP_LEVEL


def root_name(root: bytes) -> str:
    """Return the name under which a repository serves a root; raise `Refusal`."""
    try:
        return f"{version_of(root)}.root.json"
    except msgspec.DecodeError as error:
        raise Refusal(RejectReason.MALFORMED, f"a root is not metadata: {error}") from error


def under_root(files: Files, root: int) -> dict[str, str]:
    """Return the files without roots newer than the one they were accepted under."""
    return {name: text for name, text in files.items() if not is_root(name) or _root_number(name) <= root}


def any_expired(files: Files, at: datetime) -> bool:
    """Tell whether a role that is remembered is past its life."""
    return any(
        Metadata.from_bytes(text.encode()).signed.expires <= at for name, text in files.items() if not is_root(name)
    )


class _Signed(msgspec.Struct, frozen=True):
    version: int


class _Versioned(msgspec.Struct, frozen=True):
    signed: _Signed


def version_of(metadata: str | bytes) -> int:
    """Return the version that metadata gives itself; raise `msgspec.DecodeError`."""
    return msgspec.json.decode(metadata, type=_Versioned).signed.version


def _root_number(name: str) -> int:
    return int(name.removeprefix("root_history/").partition(".")[0])


def _said(target: TargetFile) -> Said:
    custom = target.custom
    return Said(length=target.length, hashes=target.hashes, custom=custom if isinstance(custom, dict) else {})


# ------------------------------------------------------------ errors of python-tuf, in our words
def _check_anchor(name: str, root: bytes) -> None:
    try:
        metadata = Metadata[Root].from_bytes(root)
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except (tuf_errors.RepositoryError, *_FOREIGN_ERRORS) as error:
        raise Trouble(
            f"the first root of {name} is damaged: {error}",
            remedy="Enrol again with `edgewarden-agent enroll --force`; the key is kept",
        ) from error


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
