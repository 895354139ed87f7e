"""Brings bundles onto this device (port `Downloads`): by a delta, from a mirror, or from the fleet server.

Knows files, sources and their order of trial; every way ends with the signed length and SHA-256, compared here. What
is decided on the way stands in ``core/downloading.py``; what may be downloaded at all is decided by `trust.py`.

Of a bundle on its way there are ``<sha256>.part`` (what came of it), ``.delta`` (what came of a delta), ``.made``
(what the delta made), ``.no-delta`` (a delta failed once; none is tried again), and at last ``.ewb``.
"""

import errno
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from agent.adapters.allowance import Allowance
from agent.adapters.atomic_file import flush_file, flush_folder
from agent.adapters.https import HttpsServer, Mirror
from agent.adapters.transfer import Cancelled, Transfer, Unusable, hash_of, length_of
from agent.core.downloading import Offer, Told, choose_delta, sources, space_needed, worth_telling
from agent.ports import Postponed, Rebuilding, Rebuilds, Refusal, Target, Trouble, Weather
from protocol.device_api import BUNDLES_PATH
from protocol.names import MAX_BUNDLE, SHA256_HEX, check_name
from protocol.release import NO_BASE
from protocol.states import RejectReason

log = logging.getLogger(__name__)

SUFFIXES = (".ewb", ".part", ".delta", ".made", ".no-delta")
TURN_SECONDS = 0.2  # a download that waits for its turn looks so often whether it is still wanted
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, kw_only=True)
class _Order:
    """One call of `fetch`."""

    target: Target
    progress: Callable[[int], None]
    cancelled: Callable[[], bool]


class BundleDownloads:
    """One download at a time."""

    def __init__(
        self,
        server: HttpsServer,
        folder: Path,
        *,
        mirrors: Sequence[Mirror] = (),
        allowance: Allowance | None = None,
        rebuilds: Rebuilds | None = None,
        base: Callable[[str], str | None] = lambda _: None,
        memory: int = sys.maxsize,
        spread: Callable[[], float] = lambda: 0.0,
        is_forced: Callable[[Target], bool] = lambda _: False,
        tell: Callable[[Target, str], None] = lambda _target, _detail: None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """``base`` returns where a stored bundle lies, extracted; ``memory`` is the machine's, in bytes.

        ``spread`` draws the seconds that a new download waits first; ``is_forced`` ones know no daily budget;
        ``tell`` hears sentences for people, on this thread; ``free`` returns what a folder's disk has left.
        """
        self._server = server
        self._folder = folder
        self._mirrors = {mirror.url: mirror for mirror in mirrors}
        self._allowance = allowance or Allowance()
        self._rebuilds = rebuilds
        self._base = base
        self._memory = memory
        self._spread = spread
        self._is_forced = is_forced
        self._tell = tell
        self._clock = clock
        self._free = free
        self._turn = threading.Lock()
        self._distrusted: set[str] = set()
        self._waited: set[str] = set()  # downloads that had their first wait
        self._said = ""  # the last sentence about waiting, so that it is said once

    def fetch(self, target: Target, progress: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
        check_name("sha256", target.sha256, SHA256_HEX)
        if target.length > MAX_BUNDLE:
            raise Refusal(RejectReason.NO_SPACE, f"{target.length} bytes are over the cap of {MAX_BUNDLE}")
        done = self._file(target, ".ewb")
        with self._alone(cancelled):
            try:
                self._make_folder()
                if not _is(done, target.length, target.sha256):
                    self._bring(_Order(target=target, progress=progress, cancelled=cancelled))
            except Refusal:
                self.discard(target.sha256)
                raise
            except Postponed as postponed:
                self._tell_once(target, str(postponed))
                raise
            except OSError as error:
                self._raise_disk(error, target.sha256)
        return str(done)

    def _make_folder(self) -> None:
        if not self._folder.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            flush_folder(self._folder.parent)  # a download is finished only when all names on its path stay

    def has_room(self, target: Target) -> bool:
        held = length_of(self._file(target, ".part"))
        try:
            return self._has_room(space_needed(target.length, held))
        except OSError:  # the folder is made by the first download
            return True

    def discard(self, sha256: str) -> None:
        check_name("sha256", sha256, SHA256_HEX)
        for suffix in SUFFIXES:
            try:
                (self._folder / f"{sha256}{suffix}").unlink(missing_ok=True)
            except OSError as error:  # a disk that became read-only
                log.warning("what is left of a download stays: %s", error)

    def collect(self, keep: Sequence[str]) -> None:
        for left in self._folder.glob("*"):
            if left.name.partition(".")[0] not in keep:
                try:
                    left.unlink(missing_ok=True)
                except OSError as error:  # as above
                    log.warning("what is left of a download stays: %s", error)

    def _bring(self, order: _Order) -> None:
        self._wait_first(order.target)
        came = self._by_delta(order) or self._whole(order)
        flush_file(came)  # what a delta made is not on the disk yet
        came.replace(self._file(order.target, ".ewb"))
        flush_folder(self._folder)
        for suffix in SUFFIXES[1:]:
            self._file(order.target, suffix).unlink(missing_ok=True)

    # ------------------------------------------------------------ by a delta
    def _by_delta(self, order: _Order) -> Path | None:
        """Return the bundle made from a delta, or None when it has to come whole. A delta that fails fails once."""
        offer = self._offer(order.target)
        if offer is None or not self._has_room(space_needed(order.target.length, 0, offer.delta)):
            return None
        try:
            made = self._make(order, offer)
        except Unusable as failed:
            self._file(order.target, ".no-delta").touch()
            self._file(order.target, ".delta").unlink(missing_ok=True)
            self._file(order.target, ".made").unlink(missing_ok=True)
            self._tell(order.target, f"the {offer.delta.method} delta is of no use, the bundle comes whole: {failed}")
            return None
        saved = f"{offer.delta.length} of {order.target.length} bytes"
        self._tell(order.target, f"it came as a {offer.delta.method} delta: {saved}")
        return made

    def _offer(self, target: Target) -> Offer | None:
        if self._rebuilds is None or self._file(target, ".no-delta").exists():
            return None
        return choose_delta(
            target.assignment.deltas,
            length=target.length,
            held=length_of(self._file(target, ".part")),
            methods=self._rebuilds.methods(),
            has=lambda base: SHA256_HEX.fullmatch(base) is not None and self._base(base) is not None,
            memory=self._memory,
        )

    def _make(self, order: _Order, offer: Offer) -> Path:
        """Fetch a delta and apply it; raise `Unusable` when that does not give the signed bundle."""
        target, delta = order.target, offer.delta
        path = f"{BUNDLES_PATH}/{target.sha256}?from={offer.base}&method={delta.method}"
        came, made = self._file(target, ".delta"), self._file(target, ".made")
        if self._receive_anew(order, path, came, (delta.length, delta.sha256), patient=False) != delta.sha256:
            raise Unusable(RejectReason.HASH_MISMATCH, "its bytes are not the signed ones")
        trouble = self._rebuild(offer, came, made, target.length)
        if trouble:
            raise Unusable(RejectReason.BAD_BUNDLE, trouble)
        if not _is(made, target.length, target.sha256):
            raise Unusable(RejectReason.HASH_MISMATCH, "what it makes is not the signed bundle")
        return made

    def _rebuild(self, offer: Offer, came: Path, made: Path, length: int) -> str:
        assert self._rebuilds is not None  # it told its methods
        folder = "" if offer.base == NO_BASE else self._base(offer.base)
        if folder is None:
            return "the bundle it starts from is no longer here"
        wanted = Rebuilding(
            method=offer.delta.method,
            base=offer.base,
            folder=folder,
            delta=str(came),
            made=str(made),
            length=length,
        )
        return self._rebuilds.rebuild(wanted)

    # ------------------------------------------------------------ whole
    def _whole(self, order: _Order) -> Path:
        """Bring the bundle itself: from the mirrors in order, then from the server, whose word is final."""
        part, target = self._file(order.target, ".part"), order.target
        if length_of(part) > target.length:
            part.unlink()
        self._check_room(space_needed(target.length, length_of(part)))
        for source in sources(tuple(self._mirrors), self._distrusted):
            if source is None:
                self._from_server(order, part)
            elif not self._from_mirror(order, part, self._mirrors[source]):
                continue
            break
        return part

    def _from_server(self, order: _Order, part: Path) -> None:
        path, signed = f"{BUNDLES_PATH}/{order.target.sha256}", (order.target.length, order.target.sha256)
        try:
            digest = self._receive_anew(order, path, part, signed)
        except Unusable as failed:
            raise Refusal(failed.reason, failed.detail) from failed
        if digest != order.target.sha256:
            raise Refusal(RejectReason.HASH_MISMATCH, f"the server's bytes have the SHA-256 {digest}")

    def _from_mirror(self, order: _Order, part: Path, mirror: Mirror) -> bool:
        """Return whether the whole bundle came; a mirror that is away is passed over, one that lies for good."""
        try:
            path = mirror.path_of(f"{order.target.sha256}.ewb")
            digest = self._receive(order, mirror, path, part, order.target.length, patient=False)
        except (Cancelled, Postponed):
            raise
        except Weather as weather:
            log.info("mirror passed over: %s", weather)
            return False
        except Unusable as failed:
            if failed.reason is not RejectReason.HASH_MISMATCH:
                log.info("mirror %s passed over: %s", mirror.url, failed)
                return False
            digest = ""
        if digest == order.target.sha256:
            return True
        part.unlink(missing_ok=True)
        self._distrusted.add(mirror.url)
        self._tell(order.target, f"mirror {mirror.url} sends other bytes than were signed, and is asked no more")
        return False

    def _receive_anew(
        self, order: _Order, path: str, part: Path, signed: tuple[int, str], *, patient: bool = True
    ) -> str:
        """Receive what has this length and SHA-256 from the server; from the start where what was here spoiled it.

        A power cut may have left a hole in the part that was here; only a fresh copy tells on the server.
        """
        held, (length, sha256) = length_of(part), signed
        digest = self._receive(order, self._server, path, part, length, patient=patient)
        if digest != sha256 and held:
            log.info("%s, on disk in part, is damaged; starting over", part.name)
            part.unlink()
            digest = self._receive(order, self._server, path, part, length, patient=patient)
        return digest

    def _receive(
        self, order: _Order, server: HttpsServer, path: str, part: Path, length: int, *, patient: bool = True
    ) -> str:
        if length_of(part) == length:  # all of it is here: nothing is taken
            with part.open("rb") as file:
                return hash_of(file).hexdigest()
        self._allowance.begin(forced=self._is_forced(order.target))
        try:
            return Transfer(
                server=server,
                path=path,
                length=length,
                allowance=self._allowance,
                cancelled=order.cancelled,
                progress=self._progress(order, part, length),
                patient=patient,
            ).receive(part)
        finally:
            self._allowance.end()

    # ------------------------------------------------------------ waiting, telling, room
    @contextmanager
    def _alone(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        while not self._turn.acquire(timeout=TURN_SECONDS):
            if cancelled():
                raise Cancelled("the download was cancelled while it waited for its turn")
        try:
            yield
        finally:
            self._turn.release()

    def _wait_first(self, target: Target) -> None:
        """Postpone a new download once, so that a fleet does not come all at once."""
        if target.sha256 in self._waited or length_of(self._file(target, ".part")):
            return
        self._waited.add(target.sha256)
        if seconds := self._spread():
            raise Postponed(
                f"the download begins in {seconds:.0f} s, for a fleet not to come at once", retry_after=seconds
            )

    def _progress(self, order: _Order, part: Path, length: int) -> Callable[[int], None]:
        told = Told(quarter=4 * length_of(part) // max(1, length), at=self._clock())

        def step(done: int) -> None:
            nonlocal told
            if part.suffix == ".part":
                order.progress(done)
            if news := worth_telling(told, done, length, self._clock()):
                told = news
                self._tell(order.target, f"{100 * done // length} % of {length} bytes are here")

        return step

    def _tell_once(self, target: Target, detail: str) -> None:
        if detail != self._said:
            self._said = detail
            self._tell(target, detail)

    def _has_room(self, needed: int) -> bool:
        return self._free(self._folder) >= needed

    def _check_room(self, needed: int) -> None:
        if not self._has_room(needed):
            free = self._free(self._folder)
            detail = (
                f"{needed} bytes are needed to come, to be extracted, and in reserve; {free} are free on the disk"
            )
            raise Refusal(RejectReason.NO_SPACE, detail)

    def _raise_disk(self, error: OSError, sha256: str) -> NoReturn:
        if error.errno in _OUT_OF_SPACE:
            self.discard(sha256)
            raise Refusal(RejectReason.NO_SPACE, f"the disk is full: {error}") from error
        raise Trouble(f"cannot keep a download in {self._folder}: {error}", remedy="Check the disk") from error

    def _file(self, target: Target, suffix: str) -> Path:
        return self._folder / f"{target.sha256}{suffix}"


def _is(path: Path, length: int, sha256: str) -> bool:
    """Tell whether a file is there and is the signed one."""
    if length_of(path) != length or not path.exists():
        return False
    with path.open("rb") as file:
        return hash_of(file).hexdigest() == sha256
