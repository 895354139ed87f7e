"""What this device remembers of both repositories: one state file, replaced in one step, and its high-water marks.

The marks lie beside the folder of the state file and say only how far it had come. They are there for the day that
the state file is damaged or gone: the device then begins anew from its pinned roots, and a state older than the marks
is refused all the same. What may be remembered is decided in `trust.py`.
"""

import hashlib
import logging
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.core.facts import Objection
from agent.ports import Refusal, Trouble
from protocol.names import MAX_METADATA_FILE
from protocol.states import RejectReason

log = logging.getLogger(__name__)
S = TypeVar("S", bound="State | Marks")

_STATE_FILE = "trust.json"
_MARKS_FILE = "trust-marks.json"
_FORMAT = 1
_MAX_STATE = 4 * MAX_METADATA_FILE  # both repositories' metadata, as text
_MAX_MARKS = 1024 * 1024


class State(msgspec.Struct, frozen=True, kw_only=True):
    """All that is remembered. ``director`` and ``image``: python-tuf's files, {relative name: text}."""

    format: int = _FORMAT
    anchors: tuple[str, ...]  # whose state this is: device, and the SHA-256 of both first roots
    director: dict[str, str] = {}
    image: dict[str, str] = {}
    director_root: int = 0  # root versions under which these were accepted
    image_root: int = 0
    version: int = 0  # of the Director's targets
    issued: int = 0  # newest ``issued`` accepted, UTC ms: the clock's floor
    floors: dict[str, int] = {}  # {floor path: highest floor seen}
    objections: dict[str, Objection] = {}  # {target path: what was said against it}, of the state accepted last


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """How far a state had come. A version counts under its root only: a new root may begin lower."""

    format: int = _FORMAT
    anchors: tuple[str, ...] = ()
    director_root: int = 0
    director: int = 0  # version of the Director's timestamp
    image_root: int = 0
    image: int = 0  # version of the Image repository's timestamp
    issued: int = 0
    floors: dict[str, int] = {}


class TrustMemory:
    """The state file and its marks."""

    def __init__(self, folder: Path, anchors: tuple[str, ...]) -> None:
        """Read both. Raise `Trouble` when another version of the agent wrote them; see `lost` for damage."""
        self._state_file = folder / _STATE_FILE
        self._marks_file = folder.with_name(_MARKS_FILE)
        self.lost = ""  # a sentence, when there was a state and it can no longer be read
        self._sweep()
        self.marks = self._read_marks(anchors)
        self.state = self._read_state(anchors)

    def keep(self, state: State, marks: Marks) -> None:
        """Replace the state durably, then its marks; raise `Trouble` when the disk refuses the state."""
        content = _sealed(state)
        if len(content) > _MAX_STATE:
            raise Refusal(RejectReason.MALFORMED, f"the metadata of both repositories is over {_MAX_STATE} bytes")
        write_atomically(self._state_file, content)
        self.state = state
        if marks != self.marks:
            self._keep_marks(marks)

    def _keep_marks(self, marks: Marks) -> None:
        try:
            write_atomically(self._marks_file, _sealed(marks))
        except Trouble as trouble:  # they lag behind the state, which stands
            log.warning("%s", trouble)
        self.marks = marks

    def _read_marks(self, anchors: tuple[str, ...]) -> Marks:
        try:
            data = read_capped(self._marks_file, _MAX_MARKS)
            marks = _opened(data, Marks) if data is not None else None
        except (_Damaged, Trouble) as error:
            log.warning("%s is not used: %s", self._marks_file, error)
            marks = None
        return marks if marks and marks.anchors == anchors else Marks(anchors=anchors)

    def _read_state(self, anchors: tuple[str, ...]) -> State:
        found = self._stored_state()
        if found is not None and found.anchors != anchors:
            log.warning("%s is of another enrolment and is not used", self._state_file)
            found = None
        elif found is None and self.marks.director and not self.lost:
            self.lost = f"{self._state_file} is gone"
        state = found or State(anchors=anchors)
        return msgspec.structs.replace(
            state,
            issued=max(state.issued, self.marks.issued),
            floors={
                path: max(state.floors.get(path, 0), self.marks.floors.get(path, 0))
                for path in {*state.floors, *self.marks.floors}
            },
        )

    def _stored_state(self) -> State | None:
        try:
            data = read_capped(self._state_file, _MAX_STATE)
            if data is None:
                return None
            state = _opened(data, State)
        except (_Damaged, Trouble) as damaged:
            self.lost = f"{self._state_file} is damaged: {damaged}; {self._move_aside()}"
            return None
        if state.format != _FORMAT:
            raise Trouble(f"{self._state_file} has format {state.format}, this agent reads {_FORMAT}", remedy=_FORGET)
        return state

    def _move_aside(self) -> str:
        """Keep a damaged state for people to look at, where the disk lets us; return what became of it."""
        aside = self._state_file.with_suffix(".damaged")
        try:
            self._state_file.replace(aside)
        except OSError as error:
            return f"it stays where it is, for {error}"
        return f"it is kept as {aside.name}"

    def _sweep(self) -> None:
        """Remove what a power cut left behind, where the disk lets us."""
        for file in (self._state_file, self._marks_file):
            for leftover in file.parent.glob(f".{file.name}.*.tmp"):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)


class _Damaged(Exception):
    """A file is not what was written."""


def _sealed(content: State | Marks) -> bytes:
    body = msgspec.json.encode(content)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _opened(data: bytes, kind: "type[S]") -> "S":
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise _Damaged("its checksum is wrong")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Damaged(str(error)) from error


_FORGET = "Run the agent that wrote it, or remove it to begin anew from the enrolled roots"
