from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.adapters.spool import SqliteSpool
from agent.channel import StatisticsDelta
from agent.core.merging import merge_payloads
from agent.core.windows import Windows
from agent.ports import EVENTS, TELEMETRY, Spool, Trouble
from agent.reporter import BATCH, MAX_DETAIL, MAX_PENDING, MAX_UNANSWERED, Reporter
from protocol.codec import decode_event, decode_report, encode
from protocol.messages import Acknowledgement, Event, Report, Resources, ServerState
from protocol.names import MAX_INFLATED_MESSAGE, MAX_TELEMETRY_MESSAGE
from protocol.states import EventKind
from protocol.statistics import ModelStatistics, TruthStatistics, merge_truth
from simulator.memory import FakeHost, MemorySpool, MemoryUplink

MINUTE = 60_000
NOON = 1_750_000_020_000 // MINUTE * MINUTE
UP = ServerState(up=True, epoch="first")


class World:
    """A reporter on in-memory parts, with a clock the test moves."""

    def __init__(
        self, spool: Spool | None = None, uplink: MemoryUplink | None = None, *, server: bool = True
    ) -> None:
        self.now = NOON
        self.spool = spool or MemorySpool(merge=merge_payloads)
        self.uplink = uplink or MemoryUplink()
        self.host = FakeHost()
        self.reporter = self.start()
        if server:
            self.reporter.server_state(UP)

    def start(self) -> Reporter:
        return Reporter(
            spool=self.spool,
            uplink=self.uplink,
            host=self.host,
            windows=Windows(self.now),
            now=lambda: self.now,
            monotonic=lambda: self.now / 1000,
        )

    def serve(self, requests: int = 1, *truth: TruthStatistics) -> None:
        self.reporter.count(StatisticsDelta(models=(ModelStatistics(digest="d", requests=requests),), truth=truth))

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1000)
        self.reporter.tick(self.now)

    def sent(self) -> list[tuple[str, int]]:
        return [(stream, number) for stream, number, _ in self.uplink.take()]

    def acknowledge(self, telemetry: int = 0, events: int = 0, missing: Sequence[tuple[int, int]] = ()) -> None:
        self.reporter.acknowledge(
            Acknowledgement(
                spool=self.spool.id, at=self.now, telemetry=telemetry, events=events, missing_telemetry=tuple(missing)
            )
        )


def test_a_closed_window_is_reported_with_the_readings() -> None:
    world = World()
    truth = TruthStatistics(digest="d", minute=NOON, confusion=((1, 1, 1),))
    world.serve(3, truth)
    world.wait(30)
    assert [] == world.sent()
    world.serve(4)
    world.wait(30)
    ((stream, number, payload),) = world.uplink.take()
    report = decode_report(payload)
    assert (TELEMETRY, 1, 1) == (stream, number, report.sequence)
    assert (truth,) == report.truth
    (window,) = report.windows
    assert (NOON, MINUTE, world.host.resources) == (window.start, window.span, window.resources)
    assert 7 == window.models[0].requests


def test_events_go_before_the_telemetry_backlog() -> None:
    world = World(server=False)
    for _ in range(3):
        world.wait(60)
    world.reporter.record(kind=EventKind.AGENT, detail="x" * 1000)
    world.reporter.server_state(UP)
    published = world.uplink.take()
    assert [(EVENTS, 1), (TELEMETRY, 1), (TELEMETRY, 2), (TELEMETRY, 3)] == [p[:2] for p in published]
    event = decode_event(published[0][2])
    assert (1, world.now, MAX_DETAIL) == (event.sequence, event.at, len(event.detail))


def test_an_event_is_sent_at_once() -> None:
    world = World()
    world.reporter.record(kind=EventKind.DEPLOYMENT, model="digits", version=2)
    assert [(EVENTS, 1)] == world.sent()


def test_nothing_is_published_while_the_server_is_away() -> None:
    world = World()
    world.reporter.server_state(ServerState(up=False, epoch=""))
    world.wait(60)
    world.reporter.record(kind=EventKind.AGENT)
    assert [] == world.sent()
    assert (1, 1) == (world.spool.depth(TELEMETRY), world.spool.depth(EVENTS))
    world.reporter.server_state(UP)
    assert [(EVENTS, 1), (TELEMETRY, 1)] == world.sent()


def test_nothing_is_published_or_sealed_while_offline() -> None:
    world = World()
    world.uplink.connected = False
    for _ in range(50):
        world.wait(60)
    world.uplink.connected = True
    world.reporter.connected()
    world.wait(1)
    assert [(TELEMETRY, number) for number in range(1, BATCH + 1)] == world.sent()


def test_the_uplinks_window_is_respected() -> None:
    world = World(server=False, uplink=MemoryUplink(window=5))
    for _ in range(8):
        world.wait(60)
    world.reporter.server_state(UP)
    assert [1, 2, 3, 4, 5] == [number for _, number in world.sent()]
    world.wait(1)
    assert [6, 7, 8] == [number for _, number in world.sent()]


def test_an_acknowledged_report_leaves_the_spool_and_a_missing_one_comes_again() -> None:
    world = World()
    for _ in range(4):
        world.wait(60)
        world.uplink.settle()
    world.sent()
    world.acknowledge(telemetry=4, missing=[(2, 3)])
    assert [(TELEMETRY, 2), (TELEMETRY, 3)] == world.sent()
    assert 2 == world.spool.depth(TELEMETRY)
    world.acknowledge(telemetry=4)
    assert 0 == world.spool.depth(TELEMETRY)


def test_an_acknowledgement_for_another_spool_is_ignored() -> None:
    world = World()
    world.wait(60)
    world.reporter.acknowledge(Acknowledgement(spool="other", at=0, telemetry=1))
    assert 1 == world.spool.depth(TELEMETRY)


def test_silence_of_the_server_repeats_with_growing_patience() -> None:
    world = World()
    world.wait(60)
    world.sent()
    repeats = []
    for second in range(1, 301):
        world.now += 1000
        world.reporter.publish()
        if world.sent():
            repeats.append(second)
    assert [30, 90, 210] == repeats
    world.acknowledge(telemetry=1)
    world.wait(1)
    assert [] == [number for _, number in world.sent() if number == 1]


@pytest.mark.parametrize("cause", ["a new connection", "a new epoch"])
def test_everything_unacknowledged_comes_again(cause: str) -> None:
    world = World()
    for _ in range(3):
        world.wait(60)
    world.sent()
    world.acknowledge(telemetry=1)
    if cause == "a new connection":
        world.reporter.connected()
    else:
        world.reporter.server_state(ServerState(up=True, epoch="second"))
    world.wait(1)
    assert [(TELEMETRY, 2), (TELEMETRY, 3)] == world.sent()


def test_the_same_epoch_again_repeats_nothing() -> None:
    world = World()
    world.wait(60)
    world.sent()
    world.reporter.server_state(ServerState(up=False, epoch="first"))
    world.reporter.server_state(UP)
    assert [] == world.sent()


def test_only_so_many_await_the_server() -> None:
    world = World(server=False, uplink=MemoryUplink(window=10**6))
    for _ in range(MAX_UNANSWERED + 50):
        world.wait(60)
    world.reporter.server_state(UP)
    for _ in range(40):
        world.reporter.publish()
    assert MAX_UNANSWERED == len(world.sent())


def test_the_fleet_sets_the_window_and_takes_it_back() -> None:
    world = World()
    world.reporter.set_window(2)
    world.wait(2)
    assert 1 == len(world.sent())
    world.reporter.set_window(None)
    world.wait(2)
    assert 0 == len(world.sent())


def test_flush_reports_the_last_seconds() -> None:
    world = World()
    world.serve(5)
    world.now += 1500
    world.reporter.flush(world.now)
    ((_, _, payload),) = world.uplink.take()
    (window,) = decode_report(payload).windows
    assert (1500, 5) == (window.span, window.models[0].requests)


def test_a_huge_report_is_cut_and_loses_nothing() -> None:
    world = World()
    truth = [
        TruthStatistics(
            digest="d", minute=m, confusion=tuple((k, (k * 7919) % 997, 10**6 + k * m) for k in range(997))
        )
        for m in range(60)
    ]
    world.serve(3, *truth)
    world.wait(60)
    for _ in range(10):
        world.uplink.settle()
        world.wait(1)
    payloads = [payload for _, _, payload in world.uplink.take()]
    reports = [decode_report(payload) for payload in payloads]
    assert len(reports) > 2
    assert all(len(payload) <= MAX_TELEMETRY_MESSAGE for payload in payloads)
    assert all(len(encode(report)) <= MAX_INFLATED_MESSAGE for report in reports)
    assert merge_truth(truth) == merge_truth(t for report in reports for t in report.truth)
    assert list(range(1, len(reports) + 1)) == [report.sequence for report in reports]


def test_a_full_spool_is_told_once_until_the_server_answers() -> None:
    spool = MemorySpool(limit=1000)
    world = World(spool=spool, server=False)
    for _ in range(60):
        world.wait(60)
    assert spool.dropped() > 10
    assert 1 == spool.depth(EVENTS)
    ((_, payload),) = spool.unpublished(EVENTS, 9)
    assert EventKind.SPOOL is decode_event(payload).kind
    (_, newest) = spool.unpublished(TELEMETRY, 99)[-1]
    assert 0 < decode_report(newest).dropped <= spool.dropped()


class FullDisk(MemorySpool):
    """A spool whose disk is full until somebody makes room."""

    full = True

    def append(self, stream: str, make: object) -> int:
        if self.full:
            raise Trouble("the disk is full")
        return super().append(stream, make)


def test_a_full_disk_loses_only_the_oldest_of_many_and_stops_nobody() -> None:
    spool = FullDisk()
    world = World(spool=spool)
    world.reporter.record(kind=EventKind.AGENT)
    for _ in range(MAX_PENDING + 9):
        world.serve()
        world.wait(60)
    spool.full = False
    world.wait(60)
    assert MAX_PENDING + 1 == spool.depth(TELEMETRY)


# ---------------------------------------------------------------- nothing is lost, nothing counts twice
@dataclass
class Server:
    """Keeps what reached it, as the fleet server does: by number, each once."""

    reports: dict[int, Report] = field(default_factory=dict)
    events: dict[int, Event] = field(default_factory=dict)

    def take(self, stream: str, payload: bytes) -> None:
        if stream == TELEMETRY:
            report = decode_report(payload)
            known = self.reports.setdefault(report.sequence, report)
            assert known == msgspec.structs.replace(report, dropped=known.dropped)  # what was sent never changes
        else:
            event = decode_event(payload)
            assert event == self.events.setdefault(event.sequence, event)

    def numbers(self) -> list[int]:
        """Return every number the stored reports stand for."""
        return sorted(n for r in self.reports.values() for n in range(r.sequence - r.covers + 1, r.sequence + 1))

    def answer(self, spool: str, now: int) -> Acknowledgement:
        have = set(self.numbers())
        highest = max(have, default=0)
        holes = tuple((n, n) for n in range(1, highest + 1) if n not in have)
        events = max(self.events, default=0)
        lost = tuple((n, n) for n in range(1, events + 1) if n not in self.events)
        return Acknowledgement(
            spool=spool, at=now, telemetry=highest, events=events, missing_telemetry=holes, missing_events=lost
        )


class Story:
    """A device with a real spool, a lossy network and a server; each public method is a step of the story."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self.spool = self._open()
        self.world = World(spool=self.spool)
        self.server = Server()
        self.served = self.events = 0

    def _open(self) -> SqliteSpool:
        spool = SqliteSpool(self._path, merge=merge_payloads, limit=self._limit)
        spool._database.execute("PRAGMA synchronous = OFF")  # power is not lost in this story
        return spool

    def serve(self) -> None:
        self.served += 1
        self.world.serve()

    def minute(self) -> None:
        self.world.wait(60)

    def event(self) -> None:
        self.events += 1
        self.world.reporter.record(kind=EventKind.AGENT)

    def deliver(self) -> None:
        for stream, _, payload in self.world.uplink.take():
            self.server.take(stream, payload)

    def lose(self) -> None:
        self.world.uplink.take()

    def acknowledge(self) -> None:
        self.world.reporter.acknowledge(self.server.answer(self.spool.id, self.world.now))

    def offline(self) -> None:
        self.world.uplink.connected = False

    def online(self) -> None:
        self.world.uplink.connected = True
        self.world.reporter.connected()

    def server_restarts(self) -> None:
        self.world.reporter.server_state(ServerState(up=True, epoch=str(self.world.now)))

    def agent_restarts(self) -> None:
        self.world.reporter.flush(self.world.now)
        self.spool.close()
        self.spool = self.world.spool = self._open()
        self.world.reporter = self.world.start()
        self.world.reporter.server_state(UP)

    def long_silence(self) -> None:
        self.world.wait(700)


STEPS = [name for name in vars(Story) if not name.startswith("_")]


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=60), limit=st.sampled_from([400, 700, 100_000]))
def test_every_request_is_counted_once_whatever_the_network_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], limit: int
) -> None:
    story = Story(tmp_path_factory.mktemp("spool") / "spool.db", limit)
    for step in steps:
        getattr(story, step)()
    story.world.reporter.flush(story.world.now)
    while story.spool.depth(TELEMETRY) + story.spool.depth(EVENTS):
        story.online()
        story.world.reporter.publish()
        story.deliver()
        story.acknowledge()
    dropped = story.spool.dropped()
    story.spool.close()
    numbers = story.server.numbers()
    assert len(set(numbers)) == len(numbers)  # nothing counts twice
    counted = sum(m.requests for r in story.server.reports.values() for w in r.windows for m in w.models)
    assert counted <= story.served if dropped else counted == story.served
    if limit == 100_000:
        told = sum(event.kind is EventKind.AGENT for event in story.server.events.values())
        assert (0, story.events) == (dropped, told)


def test_readings_of_a_fake_host_reach_the_server_unchanged() -> None:
    world = World()
    world.host.resources = Resources(cpu=1, temperature=None)
    world.wait(60)
    ((_, _, payload),) = world.uplink.take()
    assert Resources(cpu=1) == decode_report(payload).windows[0].resources
