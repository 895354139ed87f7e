"""Windows and events into the spool, and from the spool to the server, until the server says it has them.

Drives `agent.core.windows` and the ports `Spool`, `Uplink` and `Host`; knows nothing of SQLite or MQTT. One thread,
the control process's main one, calls it. A record leaves the spool only when the *server* acknowledges it: a PUBACK
ends at the broker, which drops silently when a queue is full. What stays unanswered is sent again; the server knows
each record by its number, so twice does no harm.
"""

import logging
from collections.abc import Callable, Sequence

import msgspec

from agent.channel import StatisticsDelta
from agent.core.merging import fits, split
from agent.core.windows import Windows
from agent.ports import EVENTS, REPLIES, TELEMETRY, Host, Spool, Trouble, Uplink
from protocol.codec import DEFLATE_1, encode
from protocol.messages import Acknowledgement, Event, Reply, Report, ServerState, Window
from protocol.states import CommandOutcome, DeploymentState, EventKind, RejectReason
from protocol.statistics import TruthStatistics

log = logging.getLogger(__name__)

BATCH = 20  # records asked of the spool at a time; also the uplink's window
MAX_UNANSWERED = 500  # records per stream that await the server; more would only fill the broker's queue
PATIENCE = 30.0  # seconds; the server acknowledges within a few
LONGEST_PATIENCE = 600.0  # seconds; a server that does not keep up is not helped by repetition
MAX_PENDING = 100  # records kept in memory while the disk refuses them
MAX_DETAIL = 500  # characters; protocol/README.md, Event


class Reporter:
    """Counts, closes windows, records events, publishes, and listens to acknowledgements."""

    def __init__(
        self,
        *,
        spool: Spool,
        uplink: Uplink,
        host: Host,
        windows: Windows,
        now: Callable[[], int],
        monotonic: Callable[[], float],
        data_plane_pid: Callable[[], int | None] = lambda: None,
        codec: int = DEFLATE_1,
        patience: float = PATIENCE,
        troubled: Callable[[Trouble], None] = lambda _: None,
    ) -> None:
        """``now``: UTC ms; ``monotonic``: seconds that never go back; ``codec``: one the server can read.

        ``troubled`` hears of a disk that refuses, each time.
        """
        self._spool = spool
        self._uplink = uplink
        self._host = host
        self._windows = windows
        self._now = now
        self._monotonic = monotonic
        self._data_plane_pid = data_plane_pid
        self._codec = codec
        self._troubled = troubled
        self._default_length = windows.length
        self._first_patience = self._patience = patience
        self._server = ServerState(up=False, epoch="")
        self._unanswered: dict[str, dict[int, float]] = {
            REPLIES: {},
            EVENTS: {},
            TELEMETRY: {},
        }  # number -> when published
        self._pending: list[Report | Event] = []  # what the disk has refused so far
        self._drops_told = spool.dropped()
        self._drops_in_event = False  # told already since the server last took a report

    # ---------------------------------------------------------------- what happens on the device
    def count(self, delta: StatisticsDelta) -> None:
        """Add what the data plane did since its last message."""
        self._windows.add(delta.models, delta.truth)

    def record(
        self,
        *,
        kind: EventKind,
        model: str | None = None,
        version: int | None = None,
        digest: str | None = None,
        state: DeploymentState | None = None,
        reason: RejectReason | None = None,
        attempt: int | None = None,
        detail: str = "",
    ) -> None:
        """Spool an event and send it before the telemetry backlog (`agent.ports.EventLog`). Never raises."""
        event = Event(
            spool=self._spool.id,
            sequence=0,
            at=self._now(),
            kind=kind,
            model=model,
            version=version,
            digest=digest,
            state=state,
            reason=reason,
            attempt=attempt,
            detail=detail[:MAX_DETAIL],
        )
        self._store([event])
        self.publish()

    def reply(
        self, *, command: str, outcome: CommandOutcome, reason: RejectReason | None = None, detail: str = ""
    ) -> None:
        """Spool a reply and send it before everything else (`agent.ports.Replies`). Raises `Trouble`."""
        reply = Reply(
            spool=self._spool.id,
            sequence=0,
            at=self._now(),
            command=command,
            outcome=outcome,
            reason=reason,
            detail=detail[:MAX_DETAIL],
        )
        replace = msgspec.structs.replace
        self._spool.append(REPLIES, lambda number: encode(replace(reply, sequence=number), codec=self._codec))
        self.publish()

    @property
    def replies_waiting(self) -> int:
        """Return how many replies the server has still to take."""
        return self._spool.depth(REPLIES)

    def spool_moved(self) -> None:
        """The spool goes on in another file: what stands there was never sent by this process."""
        self._drops_told = self._spool.dropped()
        self._send_all_again()

    def set_window(self, seconds: int | None) -> None:
        """Take the window length the fleet asks for; None: the device's own."""
        self._windows.set_length(self._default_length if seconds is None else seconds * 1000)

    def tick(self, now: int) -> None:
        """Close the window if it is due (UTC ms) and publish what may be published. Call about once a second."""
        window = self._windows.close(now)
        self._store(self._reports(window) if window else [])
        self._tell_drops()
        self.publish()

    def flush(self, now: int) -> None:
        """Spool the window as it is: the agent ends."""
        window = self._windows.flush(now)
        self._store(self._reports(window) if window else [])
        self.publish()

    # ---------------------------------------------------------------- what comes from the server
    def connected(self) -> None:
        """A new connection to the broker: whatever was on the old one may be lost."""
        self._send_all_again()

    def server_state(self, state: ServerState) -> None:
        """The server came, went, or started anew; while it is away nothing is published."""
        restarted = state.up and state.epoch != self._server.epoch
        self._server = state if state.up else ServerState(up=False, epoch=self._server.epoch)
        if restarted:
            self._send_all_again()
        self.publish()

    def acknowledge(self, acknowledgement: Acknowledgement) -> None:
        """Drop what the server has in its database; send again what it misses."""
        if acknowledgement.spool != self._spool.id:
            log.info("ignored an acknowledgement for spool %s; this is %s", acknowledgement.spool, self._spool.id)
            return
        self._answered(TELEMETRY, acknowledgement.telemetry, acknowledgement.missing_telemetry)
        self._answered(EVENTS, acknowledgement.events, acknowledgement.missing_events)
        self._answered(REPLIES, acknowledgement.replies, acknowledgement.missing_replies)
        self.publish()

    def publish(self) -> None:
        """Hand records to the uplink until its window is full: replies first, then events, then telemetry."""
        if not (self._server.up and self._uplink.connected):
            return
        try:
            for stream in (REPLIES, EVENTS, TELEMETRY):
                self._repeat_unanswered(stream)
                if not self._publish_stream(stream):
                    break
        except Trouble as trouble:
            self._hear(trouble, "nothing is published")

    @property
    def server_up(self) -> bool:
        """Whether the server is known to take reports."""
        return self._server.up

    # ---------------------------------------------------------------- into the spool
    def _reports(self, window: Window) -> list[Report]:
        resources = self._host.read(self._data_plane_pid())
        window = msgspec.structs.replace(window, resources=resources)
        return self._fitting((window,), self._windows.take_truth())

    def _fitting(self, windows: tuple[Window, ...], truth: tuple[TruthStatistics, ...]) -> list[Report]:
        """Return reports that each fit into a message; counts are additive, so any cut is right."""
        report = Report(spool=self._spool.id, sequence=0, windows=windows, truth=truth)
        if fits(report, encode(report, codec=self._codec)):
            return [report]
        parts = split(report)
        if parts is None:
            log.error("a report of one model is too large for a message and was left out")
            return []
        return [fit for part in parts for fit in self._fitting(part.windows, part.truth)]

    def _store(self, records: Sequence[Report | Event]) -> None:
        """Spool records, after those that the disk refused before; keep what it refuses now."""
        self._pending += records
        try:
            while self._pending:
                self._append(self._pending[0])
                del self._pending[0]
        except Trouble as trouble:
            del self._pending[:-MAX_PENDING]
            self._hear(trouble, f"{len(self._pending)} records wait in memory")

    def _hear(self, trouble: Trouble, what: str) -> None:
        log.error("%s: %s", what, trouble)
        self._troubled(trouble)

    def _append(self, record: Report | Event) -> None:
        record = msgspec.structs.replace(record, spool=self._spool.id)  # it may have waited for another disk
        replace = msgspec.structs.replace
        if isinstance(record, Event):
            self._spool.append(EVENTS, lambda number: encode(replace(record, sequence=number), codec=self._codec))
        else:
            dropped = self._spool.dropped()
            self._spool.append(
                TELEMETRY,
                lambda number: encode(replace(record, sequence=number, dropped=dropped), codec=self._codec),
            )

    def _tell_drops(self) -> None:
        """Record one event when a full spool begins to drop; the count itself is in every report."""
        dropped = self._spool.dropped()
        if dropped > self._drops_told and not self._drops_in_event:
            self._drops_told, self._drops_in_event = dropped, True
            self.record(kind=EventKind.SPOOL, detail=f"the spool is full: {dropped} reports were dropped so far")

    # ---------------------------------------------------------------- out of the spool
    def _publish_stream(self, stream: str) -> bool:
        """Publish a batch; False when the uplink takes no more."""
        unanswered = self._unanswered[stream]
        room = min(BATCH, MAX_UNANSWERED - len(unanswered))
        for number, payload in self._spool.unpublished(stream, room) if room > 0 else ():
            if not self._uplink.publish(stream, number, payload):
                return False
            self._spool.mark_published(stream, number)
            unanswered[number] = self._monotonic()
        return True

    def _answered(self, stream: str, upto: int, missing: Sequence[tuple[int, int]]) -> None:
        try:
            dropped = self._spool.acknowledge(stream, upto, missing)
        except Trouble as trouble:
            self._hear(trouble, "acknowledged records stay")
            return
        waiting = self._unanswered[stream]
        self._unanswered[stream] = {n: at for n, at in waiting.items() if n > upto and not _within(n, missing)}
        if dropped:
            self._patience = self._first_patience
            self._drops_in_event = False

    def _repeat_unanswered(self, stream: str) -> None:
        """Make records unpublished again that the server has been silent about for too long."""
        limit = self._monotonic() - self._patience
        overdue = [number for number, at in self._unanswered[stream].items() if at <= limit]
        if overdue:
            log.info("%d records of %s were not acknowledged within %.0f s", len(overdue), stream, self._patience)
            self._spool.acknowledge(stream, 0, [(number, number) for number in overdue])  # drops nothing
            for number in overdue:
                del self._unanswered[stream][number]
            self._patience = min(LONGEST_PATIENCE, self._patience * 2)

    def _send_all_again(self) -> None:
        try:
            self._spool.forget_published()
        except Trouble as trouble:
            log.error("cannot send again: %s", trouble)
            return
        for waiting in self._unanswered.values():
            waiting.clear()
        self._patience = self._first_patience


def _within(number: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(low <= number <= high for low, high in ranges)
