"""Ingest on both databases with the broker played by the test: what is acknowledged, and when."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from data_world import NOW, Databases, birth, bundle, database, desire, enrol, event, impatient, report, rows_of
from sqlalchemy.engine import Engine

from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseRegistry
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.ingest import Acknowledgements, Ingest, StoreUnavailable
from fleet_server.ports import Batch
from protocol.codec import DEFLATE_1, encode
from protocol.messages import Acknowledgement, Birth, DesiredState, Report


@dataclass
class Uplink:
    """`ports.Uplink` that remembers."""

    acks: list[tuple[str, Acknowledgement]] = field(default_factory=list)

    def publish_desired(self, device_id: str, message: DesiredState) -> None:
        raise AssertionError("ingest does not publish desires")

    def admit(self, device_id: str) -> None:
        raise AssertionError("ingest admits nobody")

    def acknowledge(self, device_id: str, acknowledgement: Acknowledgement) -> None:
        self.acks.append((device_id, acknowledgement))


@dataclass
class Story:
    """One ingest over one database, and all that came out of it."""

    engine: Engine
    ingest: Ingest
    uplink: Uplink
    births: list[tuple[str, Birth]]
    accepted: list[str] = field(default_factory=list)

    def say(self, device: str, channel: str, payload: bytes) -> bool:
        topic = f"ew/1/d/{device}/up/{channel}"
        return self.ingest.offer(topic, payload, lambda: self.accepted.append(topic))

    def report(self, device: str, message: Report) -> bool:
        return self.say(device, "t", encode(message, codec=DEFLATE_1))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)

    def dead(self) -> list[str]:
        return [str(row[3]) for row in rows_of(self.engine, "dead_letter")["dead_letter"]]


@pytest.fixture
def story(opened: Engine) -> Iterator[Story]:
    enrol(opened, "cam-1", "cam-2")
    told = make_story(opened, DatabaseTelemetry(opened))
    told.ingest.start()
    yield told
    told.ingest.stop()


def make_story(engine: Engine, telemetry: object, size: int = 100) -> Story:
    uplink, births = Uplink(), []
    ingest = Ingest(
        telemetry=telemetry,  # type: ignore[arg-type]  # real or faulty, as the test needs
        registry=DatabaseRegistry(engine, clock=lambda: NOW),
        desired=DatabaseDesiredStates(engine),
        uplink=uplink,
        newest_root=lambda: 2,
        on_birth=lambda device, born: births.append((device, born)),
        clock=lambda: NOW,
        size=size,
    )
    return Story(engine=engine, ingest=ingest, uplink=uplink, births=births)


def test_a_message_is_stored_then_accepted_then_acknowledged(story: Story) -> None:
    assert story.report("cam-1", report(1))
    assert story.say("cam-1", "e", encode(event(1)))
    story.until(lambda: bool(story.uplink.acks))
    ((device, ack),) = story.uplink.acks
    assert (device, ack.spool, ack.telemetry, ack.events, ack.at) == ("cam-1", "s1", 1, 1, NOW)
    assert len(story.accepted) == 2
    assert {name: len(rows) for name, rows in rows_of(story.engine, "report", "event").items()} == {
        "report": 1,
        "event": 1,
    }


DEAD = {
    "not JSON": ("cam-1", "t", b"\x00{", "not a Report"),
    "an unknown codec": ("cam-1", "t", b"\x09{}", "codec 9 is unknown"),
    "empty": ("cam-1", "e", b"", "the payload is empty"),
    "a bomb": ("cam-1", "t", b"\x01" + b"\x00" * 70_000, "over the cap"),
    "a type of the wrong kind": ("cam-1", "t", b'\x00{"p":1,"q":1}', "not a Report"),
    "a device that is not enrolled": ("stranger", "t", encode(report(1)), "the device is unknown"),
    "a channel that goes down": ("cam-1", "nothing", b"\x00{}", "not a topic of ours"),
    "a reply to nothing": ("cam-1", "r", b"\x00{}", "not a Reply"),
    "not UTF-8": ("cam-1", "t", b'\x00{"p":"\xff","q":1}', "not a Report"),
    "a stream that cannot be": ("cam-1", "t", encode(report(2**70)), "sequence is"),
}


@pytest.mark.parametrize(("device", "channel", "payload", "reason"), DEAD.values(), ids=DEAD.keys())
def test_what_cannot_be_read_becomes_a_dead_letter_and_is_accepted(
    story: Story, device: str, channel: str, payload: bytes, reason: str
) -> None:
    assert story.say(device, channel, payload)
    story.until(lambda: len(story.accepted) == 1)
    assert [reason in dead for dead in story.dead()] == [True]
    assert story.uplink.acks == []


def test_an_implausible_report_keeps_its_number_and_is_not_asked_for_again(story: Story) -> None:
    for message in (report(1), report(2, requests=2**60), report(3)):
        story.report("cam-1", message)
    story.until(lambda: bool(story.uplink.acks))
    ack = story.uplink.acks[-1][1]
    assert (ack.telemetry, ack.missing_telemetry, len(story.dead())) == (3, (), 1)


def test_a_revoked_device_is_not_heard(story: Story) -> None:
    with story.engine.begin() as connection:
        connection.exec_driver_sql("update device set revoked = true where id = 'cam-2'")
    story.report("cam-2", report(1))
    story.until(lambda: len(story.accepted) == 1)
    assert story.dead() == ["the device is revoked"]


def test_what_is_missing_is_said_at_once_and_filled_later(story: Story) -> None:
    story.report("cam-1", report(1))
    story.until(lambda: len(story.uplink.acks) == 1)
    story.report("cam-1", report(4))
    story.until(lambda: len(story.uplink.acks) == 2)
    assert story.uplink.acks[-1][1].missing_telemetry == ((2, 3),)
    story.report("cam-1", report(3))
    story.report("cam-1", report(2))
    story.until(lambda: story.uplink.acks[-1][1].missing_telemetry == ())
    assert story.uplink.acks[-1][1].telemetry == 4


BIRTHS = {
    "up to date": (birth(director_version=3, director_root=2), 0),
    "behind our desire": (birth(director_version=2, director_root=2), 1),
    "ahead of a restored server": (birth(director_version=9, director_root=2), 1),
    "behind our roots": (birth(director_version=3, director_root=1), 1),
}


@pytest.mark.parametrize(("born", "calls"), BIRTHS.values(), ids=BIRTHS.keys())
def test_a_birth_whose_trust_is_not_ours_is_answered(story: Story, born: Birth, calls: int) -> None:
    DatabaseDesiredStates(story.engine).save_desired(desire("cam-1", 3, bundle(1)))
    story.say("cam-1", "state", encode(born))
    story.until(lambda: story.ingest.standing().stored == 1)
    assert story.births == [("cam-1", born)] * calls
    assert DatabaseRegistry(story.engine, clock=lambda: NOW).presence("cam-1").birth == born


# ---------------------------------------------------------------- trouble
def test_while_the_database_is_locked_nothing_is_accepted_and_afterwards_everything_is(
    story: Story, databases: Databases
) -> None:
    impatient(story.engine)
    with databases.blocked(story.engine):
        for number in range(1, 11):
            assert story.report("cam-1", report(number))
        story.until(lambda: story.ingest.standing().failing_since is not None)
        assert (story.accepted, story.uplink.acks) == ([], [])
    story.until(lambda: bool(story.uplink.acks))
    assert (len(story.accepted), story.uplink.acks[-1][1].telemetry) == (10, 10)
    assert story.ingest.standing().failing_since is None


def test_a_full_queue_takes_nothing(tmp_path: Path) -> None:
    with database(tmp_path) as engine:
        enrol(engine, "cam-1")
        told = make_story(engine, DatabaseTelemetry(engine), size=3)
        assert [told.report("cam-1", report(n)) for n in range(1, 6)] == [True, True, True, False, False]
        assert told.ingest.standing().refused == 2
        told.ingest.start()
        told.until(lambda: len(told.accepted) == 3)
        assert told.report("cam-1", report(4))
        told.ingest.stop()
        assert len(told.accepted) == 4
        assert not told.report("cam-1", report(5)), "nothing is taken after the end"


class Allergic(DatabaseTelemetry):
    """A database that refuses any batch with report 13."""

    def store(self, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
        if any(r.sequence == 13 for _, r in batch.reports):
            raise OverflowError("thirteen is too much")
        return super().store(batch)


def test_one_message_that_the_database_refuses_does_not_stop_the_others(tmp_path: Path) -> None:
    with database(tmp_path) as engine:
        enrol(engine, "cam-1", "cam-2")
        told = make_story(engine, Allergic(engine))
        for number in range(1, 31):
            told.report("cam-1", report(number))
        told.ingest.start()
        told.until(lambda: len(told.accepted) == 30)
        told.ingest.stop()
        assert len(rows_of(engine, "report")["report"]) == 29
        assert told.dead() == ["the database refuses it: thirteen is too much"]


class Gone(DatabaseTelemetry):
    """A database that is gone for good."""

    tried = threading.Event()

    def store(self, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
        self.tried.set()
        raise StoreUnavailable("gone")


def test_it_ends_when_told_even_if_it_can_store_nothing(tmp_path: Path) -> None:
    with database(tmp_path) as engine:
        enrol(engine, "cam-1")
        told = make_story(engine, Gone(engine))
        told.report("cam-1", report(1))
        told.ingest.start()
        assert Gone.tried.wait(5)
        told.ingest.stop()
        assert (told.accepted, told.uplink.acks) == ([], [])


# ---------------------------------------------------------------- acknowledgements
def ack(telemetry: int, *missing: tuple[int, int]) -> Acknowledgement:
    return Acknowledgement(spool="s", at=0, telemetry=telemetry, missing_telemetry=missing)


def test_acknowledgements_of_a_device_are_put_together_to_one_a_second() -> None:
    sent: list[int] = []
    acks = Acknowledgements(send=lambda _, a: sent.append(a.telemetry))
    for tenth in range(26):
        acks.add("d", ack(tenth), tenth / 10)
        acks.flush(tenth / 10)
    assert sent == [0, 10, 20]


def test_a_new_hole_is_said_at_once_but_an_old_one_only_with_the_next() -> None:
    sent: list[int] = []
    acks = Acknowledgements(send=lambda _, a: sent.append(a.telemetry))
    for at, message in ((0.0, ack(1)), (0.1, ack(5, (2, 4))), (0.2, ack(6, (2, 4))), (0.3, ack(9, (2, 4), (7, 8)))):
        acks.add("d", message, at)
        acks.flush(at)
    assert sent == [1, 5, 9]


def test_a_failing_link_ends_nothing() -> None:
    tried: list[int] = []

    def fail(_device: str, acknowledgement: Acknowledgement) -> None:
        tried.append(acknowledgement.telemetry)
        raise OSError("no link")

    acks = Acknowledgements(send=fail)
    for at in (0.0, 2.0):
        acks.add("d", ack(int(at)), at)
        acks.flush(at)
    assert tried == [0, 2]
