"""Replies travel as surely as reports: numbered, kept until the server has them, before everything else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.spool import SqliteSpool
from agent.core.merging import merge_payloads
from agent.core.windows import Windows
from agent.ports import EVENTS, REPLIES, TELEMETRY, Spool, Trouble
from agent.reporter import MAX_DETAIL, Reporter
from protocol.codec import decode_reply
from protocol.messages import Acknowledgement, ServerState
from protocol.states import CommandOutcome, EventKind
from simulator.memory import FakeHost, MemorySpool, MemoryUplink

NOON = 1_750_075_200_000


class World:
    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.uplink = MemoryUplink()
        self.now = NOON
        self.reporter = Reporter(
            spool=spool,
            uplink=self.uplink,
            host=FakeHost(),
            windows=Windows(NOON),
            now=lambda: self.now,
            monotonic=lambda: self.now / 1000,
        )

    def reply(self, command: str = "c-1", detail: str = "fine") -> None:
        self.reporter.reply(command=command, outcome=CommandOutcome.DONE, detail=detail)

    def up(self, epoch: str = "first") -> None:
        self.reporter.server_state(ServerState(up=True, epoch=epoch))

    def acknowledge(self, replies: int = 0, missing: tuple[tuple[int, int], ...] = ()) -> None:
        self.reporter.acknowledge(
            Acknowledgement(spool=self.spool.id, at=NOON, replies=replies, missing_replies=missing)
        )

    def sent(self) -> list[tuple[str, int]]:
        return [(stream, number) for stream, number, _ in self.uplink.take()]


@pytest.fixture(params=["memory", "sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "memory":
        yield World(MemorySpool(merge=merge_payloads))
    else:
        spool = SqliteSpool(tmp_path / "spool.db", merge=merge_payloads)
        yield World(spool)
        spool.close()


def test_a_reply_goes_before_events_and_telemetry(world: World) -> None:
    world.now += 60_000
    world.reporter.tick(world.now)
    world.reporter.record(kind=EventKind.AGENT)
    world.reply(detail="x" * 1000)
    world.up()
    published = world.uplink.take()
    assert [(REPLIES, 1), (EVENTS, 1), (TELEMETRY, 1)] == [one[:2] for one in published]
    reply = decode_reply(published[0][2])
    assert (world.spool.id, 1, "c-1", MAX_DETAIL) == (reply.spool, reply.sequence, reply.command, len(reply.detail))


def test_a_reply_waits_until_the_server_has_it(world: World) -> None:
    world.up()
    world.reply()
    assert ([(REPLIES, 1)], 1) == (world.sent(), world.reporter.replies_waiting)
    world.acknowledge()  # of a server that knows of other streams only
    world.up("second")
    assert [(REPLIES, 1)] == world.sent()
    world.acknowledge(replies=1)
    assert 0 == world.reporter.replies_waiting
    world.up("third")
    assert [] == world.sent()


def test_what_the_server_misses_is_sent_again(world: World) -> None:
    world.up()
    for _ in range(3):
        world.reply()
    world.sent()
    world.acknowledge(replies=3, missing=((2, 2),))
    assert ([(REPLIES, 2)], 1) == (world.sent(), world.reporter.replies_waiting)


def test_silence_of_the_server_is_answered_by_repetition(world: World) -> None:
    world.up()
    world.reply()
    world.sent()
    world.now += 31_000
    world.reporter.tick(world.now)
    assert (REPLIES, 1) in world.sent()


def test_a_spool_that_cannot_be_used_is_told_to_who_replies(tmp_path: Path) -> None:
    spool = SqliteSpool(tmp_path / "spool.db", merge=merge_payloads)
    world = World(spool)
    spool.close()
    with pytest.raises(Trouble):
        world.reply()


def test_replies_survive_a_restart_and_go_last_when_the_spool_is_full(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = SqliteSpool(path, merge=merge_payloads, limit=4000)
    world = World(spool)
    world.reply()
    for _ in range(200):
        world.reporter.record(kind=EventKind.AGENT, detail="y" * 400)
    spool.close()
    again = SqliteSpool(path, merge=merge_payloads)
    assert 1 == again.depth(REPLIES)
    assert 200 > again.depth(EVENTS) > 0
    again.close()
