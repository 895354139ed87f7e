"""Verified bundles on disk: ``models/<sha256>/`` each extracted, and the pointer to the active ones.

Never writes over a file that may be loaded (a loaded ``.tflite`` is mapped into memory; changing it kills the
process). The pointer ``active.json`` is replaced in one atomic, durable step. Members are hashed when a bundle is
first asked for in this process, so that one damaged on disk is never loaded. What to keep is decided by the caller.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from agent.adapters.atomic_file import flush_file, flush_folder, read_capped, remove_leftovers, write_atomically
from agent.core.rungs import Rung, choose
from agent.ports import Refusal, StoredModel, Trouble
from protocol.bundle import digest_of_stream
from protocol.manifest import MANIFEST_NAME, BadManifest, Manifest, decode_manifest
from protocol.names import MAX_MANIFEST, SHA256_HEX, IllegalName, check_name
from protocol.states import RejectReason

log = logging.getLogger(__name__)

MAX_POINTER = 1024 * 1024  # bytes
_STAGING = ".staging"
_BENCH = ".bench.json"  # after the digest: what was measured of a bundle here


class FolderStore:
    """A model store in one folder of its own."""

    def __init__(self, root: Path, *, delegates: Mapping[str, str] = MappingProxyType({})) -> None:
        """Make the folder; leftovers of a killed process are removed. ``delegates``: the mark of each that is set."""
        self._models = root / "models"
        self._pointer = root / "active.json"
        self._verified: dict[str, StoredModel] = {}
        self._delegates = delegates
        self.lost = ""  # a sentence, when there is a pointer and it cannot be read
        self._models.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._models / _STAGING, ignore_errors=True)
        remove_leftovers(self._models)

    def stage(self, digest: str) -> str:
        """Return a fresh, empty folder to unpack a candidate into."""
        folder = self._models / _STAGING / check_name("digest", digest, SHA256_HEX)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return str(folder)

    def admit(self, digest: str) -> StoredModel:
        """Move the staged folder into the store, durably; raise `Refusal` when a member is not what was signed."""
        staged = self._models / _STAGING / check_name("digest", digest, SHA256_HEX)
        manifest = _verify(staged)
        for name in (MANIFEST_NAME, *manifest.members):
            flush_file(staged / name)
        flush_folder(staged)
        final = self._models / digest
        shutil.rmtree(final, ignore_errors=True)
        staged.rename(final)
        flush_folder(self._models)
        return self._remember(digest, manifest)

    def find(self, digest: str) -> StoredModel | None:
        """Return a stored bundle whose every member still has its hash, or None.

        A damaged one is removed; one that the disk does not let us read now may be whole, and stays.
        """
        if digest in self._verified:
            return self._verified[digest]
        folder = self._models / check_name("digest", digest, SHA256_HEX)
        if not folder.is_dir():
            return None
        try:
            return self._remember(digest, _verify(folder))
        except _Unread as unread:
            log.error("stored bundle %s cannot be read now: %s", digest[:16], unread.detail)
            return None
        except Refusal as refusal:
            log.error("stored bundle %s is damaged and removed: %s", digest[:16], refusal.detail)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def note_rungs(self, digest: str, rungs: Sequence[Rung]) -> None:
        """Keep what was measured of a stored bundle, beside it."""
        marked = [msgspec.structs.replace(rung, mark=self._delegates.get(rung.delegate, "")) for rung in rungs]
        write_atomically(self._bench(digest), msgspec.json.encode(marked))
        if stored := self._verified.get(digest):
            self._remember(digest, stored.manifest)

    def active(self) -> Mapping[str, str]:
        """Return {model: digest} of the active pointer; an unreadable pointer counts as empty, and is said."""
        try:
            data = read_capped(self._pointer, MAX_POINTER)
            return {} if data is None else _decode_pointer(data)
        except (msgspec.DecodeError, UnicodeDecodeError, IllegalName, Trouble) as error:
            if not self.lost:
                log.error("%s is unreadable, no model is active: %s", self._pointer, error)
            self.lost = f"{self._pointer} is unreadable: {error}"
            return {}

    def activate(self, model: str, digest: str | None) -> None:
        """Point a model to a digest (None: to nothing), in one atomic, durable step."""
        pointer = {name: value for name, value in self.active().items() if name != model}
        if digest is not None:
            pointer[model] = check_name("digest", digest, SHA256_HEX)
        write_atomically(self._pointer, msgspec.json.encode(pointer, order="sorted"))

    def collect(self, keep: Sequence[str]) -> None:
        """Remove stored bundles and leftovers except these digests; what the disk does not let go stays."""
        try:
            for entry in tuple(self._models.iterdir()):
                if entry.name.removesuffix(_BENCH) not in keep:
                    self._remove(entry)
        except OSError as error:
            log.warning("bundles that are no longer needed stay: %s", error)

    def check_all(self) -> Sequence[tuple[StoredModel, str]]:
        """Hash every stored bundle again; return each with what is wrong with it, or nothing.

        A damaged one stays: it may be loaded, and what is in memory is whole. The next start leaves it out.
        """
        return [(stored, _damage_of(Path(stored.folder))) for stored in tuple(self._verified.values())]

    def _remove(self, entry: Path) -> None:
        self._verified.pop(entry.name, None)
        if entry.name.endswith(_BENCH):
            entry.unlink(missing_ok=True)
        else:
            shutil.rmtree(entry, ignore_errors=True)

    def _remember(self, digest: str, manifest: Manifest) -> StoredModel:
        folder = str(self._models / digest)
        rungs = [rung for rung in self._rungs(digest) if self._is_as_measured(rung)]
        stored = StoredModel(digest=digest, folder=folder, manifest=manifest, rung=choose(rungs))
        self._verified[digest] = stored
        return stored

    def _is_as_measured(self, rung: Rung) -> bool:
        """A delegate that is no longer set, or whose library was replaced, has not been tried with this bundle."""
        return not rung.delegate or rung.mark == self._delegates.get(rung.delegate)

    def _bench(self, digest: str) -> Path:
        return self._models / f"{check_name('digest', digest, SHA256_HEX)}{_BENCH}"

    def _rungs(self, digest: str) -> Sequence[Rung]:
        """Return what was measured; a file that cannot be read is as good as none."""
        try:
            return msgspec.json.decode(read_capped(self._bench(digest), MAX_POINTER) or b"[]", type=list[Rung])
        except (msgspec.DecodeError, UnicodeDecodeError, Trouble) as error:
            log.warning("what was measured of %s is unreadable: %s", digest[:16], error)
            return ()


class _Unread(Refusal):
    """The disk does not let us read a bundle now; what is on it may be whole."""


def _decode_pointer(data: bytes) -> dict[str, str]:
    """Return {model: digest}; raise `msgspec.DecodeError` or `IllegalName` for what no agent wrote."""
    pointer = msgspec.json.decode(data, type=dict[str, str])
    for digest in pointer.values():
        check_name("digest", digest, SHA256_HEX)
    return pointer


def _damage_of(folder: Path) -> str:
    try:
        _verify(folder)
    except Refusal as refusal:
        return refusal.detail
    return ""


def _verify(folder: Path) -> Manifest:
    """Return the manifest of an extracted bundle whose members all have their hashes; raise `Refusal`."""
    try:
        manifest = decode_manifest(read_capped(folder / MANIFEST_NAME, MAX_MANIFEST) or b"")
        for name, expected in manifest.members.items():
            with (folder / name).open("rb") as member:
                if digest_of_stream(member) != expected:
                    raise Refusal(RejectReason.HASH_MISMATCH, f"{name} has changed on disk")
    except (FileNotFoundError, IsADirectoryError, BadManifest) as error:
        raise Refusal(RejectReason.BAD_BUNDLE, f"{folder.name[:16]}: {error}") from error
    except (OSError, Trouble) as error:
        raise _Unread(RejectReason.BAD_BUNDLE, f"{folder.name[:16]}: {error}") from error
    return manifest
