"""What this device may and should run, as both TUF repositories say.

TUF's own rules (signatures, thresholds, versions, expiry, hashes of metadata) are `tuf_client.py`'s, and which fault
concerns one target and which the whole desired state is ``core/agreement.py``'s. Added here:

- Director metadata is for this device, even when its list is empty, and a version never comes with two contents.
- The clock never counts as earlier than the newest ``issued`` accepted, and a floor once seen never falls.
- A bundle that is in the store already needs no fresh Image metadata: those verified before still vouch for it, so
  that neither expired offline keys nor an unreachable server can stand in the way of a rollback.
- Only when all checks have passed is the memory replaced (`trust_memory.py`). After a failure, newer roots are kept
  (signed offline, and verified), and nothing else.
"""

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import msgspec

from agent.adapters.trust_memory import Marks, State, TrustMemory
from agent.adapters.tuf_client import (
    SCRATCH_PREFIX,
    TOP_LEVEL,
    Listing,
    Reading,
    RoleKeys,
    Source,
    UpdateClient,
    any_expired,
    is_root,
    root_name,
    serve,
    under_root,
    version_of,
)
from agent.core.agreement import PASSING, Condemned, Word, agree, is_doubtful, path_of_floor, read_wanted
from agent.core.facts import Objection
from agent.ports import RecalledDesire, Refusal, Target, TrustVersions, VerifiedDesire, Weather
from protocol.messages import DesiredState
from protocol.release import DirectorScope, bundle_path
from protocol.states import RejectReason

log = logging.getLogger(__name__)

Wanted = Mapping[str, Target]
Words = Mapping[str, Word]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)  # nothing has expired by then
# What it looks like when the server published between two of our requests: ask once more.
_TORN = frozenset({RejectReason.REPLAYED, RejectReason.HASH_MISMATCH, RejectReason.INCOMPLETE})


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
        """Load what is remembered; raise `Trouble` when a pinned root is damaged.

        ``folder`` keeps the state file, ``scratch`` the throw-away copies (best in memory). ``image`` fetches the
        Image repository's files; ``is_stored`` tells whether a bundle (SHA-256, hex) is in the store, verified.
        """
        self._device = device
        self._source = image
        self._is_stored = is_stored
        self._busy = threading.Lock()
        for place in (folder, scratch):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in scratch.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._director = UpdateClient("the Director repository", first_root=director_root, scratch=scratch)
        self._image = UpdateClient("the Image repository", first_root=image_root, scratch=scratch)
        anchors = (device, *(hashlib.sha256(root).hexdigest() for root in (director_root, image_root)))
        self._memory = TrustMemory(folder, anchors)

    # ------------------------------------------------------------ what others ask
    def verify(self, message: DesiredState, now: int) -> VerifiedDesire:
        with self._busy:
            return self._verify(message, _at(max(now, self.clock_floor)))

    def versions(self) -> TrustVersions:
        state = self._memory.state
        return TrustVersions(
            director=max(state.version, self._memory.marks.director),  # a server signs above it, also after a loss
            director_root=self._director.newest_root(state.director),
            image_root=self._image.newest_root(state.image),
        )

    @property
    def clock_floor(self) -> int:
        """Return the UTC ms before which it cannot be: the newest ``issued`` that was accepted."""
        return self._memory.state.issued

    def command_keys(self) -> RoleKeys:
        """Return who may sign commands: the Director's targets keys, by the newest root that was verified."""
        return self._director.targets_keys(self._memory.state.director)

    @property
    def lost(self) -> str:
        """Return how the remembered state was lost before this start; empty when it was not."""
        return self._memory.lost

    def recall(self, now: int) -> RecalledDesire | None:
        """Return the desired state accepted last, verified again offline; None when there was none.

        Age alone is no failure: what was verified once is returned, and marked as expired.
        """
        with self._busy:
            state = self._memory.state
            if TOP_LEVEL[-1] not in state.director:
                return None
            with self._director.open(under_root(state.director, state.director_root), _EPOCH) as reading:
                reading.refresh()
                listing = reading.listing()
            desire = self._agree_as_before(listing, self._wanted(listing))
            return RecalledDesire(desire=desire, expired=self._is_stale(_at(max(now, state.issued))))

    def _is_stale(self, at: datetime) -> bool:
        """Tell whether what is held has expired, or was accepted under a root that has a successor by now."""
        state, versions = self._memory.state, self.versions()
        superseded = (versions.director_root, versions.image_root) != (
            state.director_root,
            state.image_root or versions.image_root,
        )
        return superseded or any_expired(state.director, at) or any_expired(state.image, at)

    # ------------------------------------------------------------ the story
    def _verify(self, message: DesiredState, at: datetime) -> VerifiedDesire:
        _check_complete(message)
        files, listing = self._read_director(message, at)
        scope = self._scope(listing)
        wanted = self._wanted(listing)
        if all(files[part] == self._memory.state.director.get(part) for part in TOP_LEVEL):
            self._keep_newer_director_root(files)
            if not self._may_hope():
                return self._agree_as_before(listing, wanted)
        desire, image = self._verify_image(listing, wanted, at)
        self._accept(files, image, scope, desire)
        return desire

    def _read_director(self, message: DesiredState, at: datetime) -> tuple[dict[str, str], Listing]:
        keep_roots = partial(self._keep_roots, "director", self._director)
        with self._director.open(self._memory.state.director, at, _payload(message), failed=keep_roots) as reading:
            reading.refresh()
            files, listing = reading.files(), reading.listing()
            self._check_not_older(
                "the desired state",
                (self._director.newest_root(files), version_of(files["timestamp.json"])),
                (self._memory.marks.director_root, self._memory.marks.director),
            )
        for part in TOP_LEVEL:
            # At an equal version python-tuf silently keeps what it has.
            if files[part].encode() != _part(message, part):
                raise Refusal(RejectReason.REPLAYED, f"{part} comes again under a version already used for another")
        return files, listing

    def _scope(self, listing: Listing) -> DirectorScope:
        """Return whom a desired state is for; raise `Refusal` unless it is this device."""
        if listing.custom.get("device") != self._device:
            raise Refusal(RejectReason.WRONG_DEVICE, f"this is {self._device}; the desired state is not for it")
        try:
            scope = msgspec.convert(listing.custom, DirectorScope)
        except msgspec.ValidationError as error:
            raise Refusal(RejectReason.MALFORMED, f"the desired state's scope: {error}") from error
        if _at(scope.issued) > listing.expires:
            raise Refusal(RejectReason.MALFORMED, "the desired state is issued after it expires")
        return scope

    def _wanted(self, listing: Listing) -> Wanted:
        with _condemning():
            return read_wanted(listing.targets)

    def _verify_image(self, listing: Listing, wanted: Wanted, at: datetime) -> tuple[VerifiedDesire, dict[str, str]]:
        """Ask the Image repository about each target; return what both agree on, and the Image files to keep."""
        if not wanted:
            return self._desire(listing, ()), self._memory.state.image
        try:
            words, files = self._ask_image(wanted, at)
            return self._desire(listing, self._agree(wanted, words)), files
        except (Weather, Refusal) as error:
            if isinstance(error, Refusal) and error.reason is not RejectReason.EXPIRED:
                raise
            return self._desire(listing, self._ask_memory(wanted, error)), self._memory.state.image

    def _ask_image(self, wanted: Wanted, at: datetime) -> tuple[Words, dict[str, str]]:
        try:
            return self._ask_image_once(wanted, at)
        except Refusal as refusal:
            if refusal.reason not in _TORN:
                raise
            return self._ask_image_once(wanted, at)

    def _ask_image_once(self, wanted: Wanted, at: datetime) -> tuple[Words, dict[str, str]]:
        keep_roots = partial(self._keep_roots, "image", self._image)
        with self._image.open(self._memory.state.image, at, self._source, failed=keep_roots) as reading:
            reading.refresh()
            words = {path: _word(reading, path, target) for path, target in wanted.items()}
            files = reading.files()
            self._check_not_older(
                "the Image repository",
                (self._image.newest_root(files), version_of(files["timestamp.json"])),
                (self._memory.marks.image_root, self._memory.marks.image),
            )
            self._agree(wanted, words)  # what condemns must do so before anything but roots is kept
        return {**words, **self._words_of_old(wanted, words, files)}, files

    def _words_of_old(self, wanted: Wanted, words: Words, files: dict[str, str]) -> Words:
        """Return what families whose metadata has expired say of bundles that are stored: that still counts."""
        expired = {
            path: wanted[path]
            for path, word in words.items()
            if word.fault and word.fault.reason is RejectReason.EXPIRED and self._is_stored(wanted[path].sha256)
        }
        try:
            return self._words_from(files, expired)
        except Refusal as refusal:
            log.info("nothing else is remembered of an expired family: %s", refusal)
            return {}

    def _ask_memory(self, wanted: Wanted, error: Weather | Refusal) -> tuple[Target, ...]:
        """Let the Image metadata verified before vouch for bundles that are all stored; else raise ``error``."""
        if not all(self._is_stored(target.sha256) for target in wanted.values()):
            raise error
        try:
            agreed = self._agree(wanted, self._words_from(self._memory.state.image, wanted))
        except Refusal as refusal:
            raise error from refusal
        if any(target.objection and target.objection.reason in PASSING for target in agreed):
            raise error
        log.info("the Image repository cannot be asked (%s); what it said before vouches for stored bundles", error)
        return agreed

    def _agree_as_before(self, listing: Listing, wanted: Wanted) -> VerifiedDesire:
        """Return what was agreed on when this desired state was accepted; nobody is asked."""
        state = self._memory.state
        fine = {path: target for path, target in wanted.items() if path not in state.objections}
        words = self._words_from(under_root(state.image, state.image_root), fine)
        said = {
            path: Word(released=None, floor=None, delegated=True, fault=objection)
            for path, objection in state.objections.items()
        }
        return self._desire(listing, self._agree(wanted, {**said, **words}))

    def _words_from(self, files: Mapping[str, str], wanted: Wanted) -> Words:
        """Return what remembered files say, however old they are."""
        if not wanted:
            return {}
        with self._image.open(files, _EPOCH) as past:
            past.refresh()
            return {path: _word(past, path, target) for path, target in wanted.items()}

    def _agree(self, wanted: Wanted, words: Words) -> tuple[Target, ...]:
        with _condemning():
            return tuple(
                agree(
                    target,
                    words[path],
                    known_floor=self._memory.state.floors.get(path_of_floor(target), 0),
                    held=is_doubtful(target, words[path]) and self._is_stored(target.sha256),
                )
                for path, target in wanted.items()
            )

    def _desire(self, listing: Listing, agreed: tuple[Target, ...]) -> VerifiedDesire:
        scope = self._scope(listing)
        return VerifiedDesire(
            director_version=listing.version, issued=scope.issued, targets=agreed, config=scope.config
        )

    def _check_not_older(self, what: str, found: tuple[int, int], marked: tuple[int, int]) -> None:
        """Refuse what is older than a state that was lost: (root version, timestamp version)."""
        if found[0] < marked[0] or (found[0] == marked[0] and found[1] < marked[1]):
            raise Refusal(RejectReason.REPLAYED, f"{what} is older than what this device had accepted before")

    # ------------------------------------------------------------ memory
    def _may_hope(self) -> bool:
        """Tell whether something was said against a target that the release team may have put in order."""
        return any(objection.reason in PASSING for objection in self._memory.state.objections.values())

    def _accept(
        self, director: dict[str, str], image: dict[str, str], scope: DirectorScope, desire: VerifiedDesire
    ) -> None:
        before = self._memory.state
        floors = {path_of_floor(target): target.floor for target in desire.targets if target.floor}
        self._keep(
            msgspec.structs.replace(
                before,
                director=director,
                image=image,
                director_root=self._director.newest_root(director),
                image_root=self._image.newest_root(image),
                version=desire.director_version,
                issued=max(scope.issued, before.issued),
                floors={**before.floors, **floors},
                objections={_path(target): target.objection for target in desire.targets if target.objection},
            )
        )

    def _keep_newer_director_root(self, files: dict[str, str]) -> None:
        newest = self._director.newest_root(files)
        if newest > self._memory.state.director_root:
            self._keep(msgspec.structs.replace(self._memory.state, director=files, director_root=newest))

    def _keep_roots(self, which: str, client: UpdateClient, learned: Mapping[str, str]) -> None:
        state = self._memory.state
        held = state.director if which == "director" else state.image
        roots = {name: text for name, text in learned.items() if is_root(name)}
        if client.newest_root(roots) > client.newest_root(held):
            self._keep(msgspec.structs.replace(state, **{which: {**held, **roots}}))

    def _keep(self, state: State) -> None:
        before = self._memory.marks  # ahead of the state after a loss; they never go back
        director = max((before.director_root, before.director), (state.director_root, _timestamp_of(state.director)))
        image = max((before.image_root, before.image), (state.image_root, _timestamp_of(state.image)))
        marks = Marks(
            anchors=state.anchors,
            director_root=director[0],
            director=director[1],
            image_root=image[0],
            image=image[1],
            issued=state.issued,
            floors=state.floors,
        )
        self._memory.keep(state, marks)


# ------------------------------------------------------------ two repositories, in the words of the agreement
def _word(reading: Reading, path: str, target: Target) -> Word:
    """Return the Image repository's word on a target. A family that cannot be believed concerns its own targets only.

    What does not match the server's own snapshot is no family's fault, and is raised.
    """
    delegated = reading.is_delegated(path)
    try:
        released, floor = reading.target(path), reading.target(path_of_floor(target))
    except Refusal as refusal:
        if not delegated or refusal.reason in _TORN:
            raise
        fault = Objection(reason=refusal.reason, detail=refusal.detail)
        return Word(released=None, floor=None, delegated=delegated, fault=fault)
    return Word(released=released, floor=floor, delegated=delegated)


@contextmanager
def _condemning() -> Iterator[None]:
    try:
        yield
    except Condemned as condemned:
        raise Refusal(condemned.objection.reason, condemned.objection.detail) from condemned


def _path(target: Target) -> str:
    return bundle_path(target.release)


# ------------------------------------------------------------ the message
def _payload(message: DesiredState) -> Source:
    """Return the Director's files as one message carries them."""
    files = {root_name(root): root for root in message.root}
    files.update({part: _part(message, part) for part in TOP_LEVEL})
    return serve(files)


def _part(message: DesiredState, part: str) -> bytes:
    return {"timestamp.json": message.timestamp, "snapshot.json": message.snapshot, "targets.json": message.targets}[
        part
    ]


def _check_complete(message: DesiredState) -> None:
    for part in TOP_LEVEL:
        if not _part(message, part):
            raise Refusal(RejectReason.INCOMPLETE, f"the desired state has no {part}")


# ------------------------------------------------------------ numbers
def _timestamp_of(files: Mapping[str, str]) -> int:
    return version_of(files["timestamp.json"]) if "timestamp.json" in files else 0


def _at(milliseconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, tz=timezone.utc)
    except (OverflowError, ValueError, OSError) as error:
        raise Refusal(RejectReason.MALFORMED, f"{milliseconds} is not a time") from error
