"""Commands on a device: each at most once, whatever comes twice and wherever the power goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.adapters.command_file import CommandFile
from agent.channel import SelfTested
from agent.commanding import MAX_WAITING, PATIENCE, QUIET, Commanding
from agent.core.commands import Ledger
from agent.ports import DataPlaneExit, Refusal, Trouble
from protocol.commands import (
    Command,
    Deed,
    RenewCertificateCommand,
    RestartDataPlaneCommand,
    SelfTestCommand,
    decode_command,
    encode_command,
)
from protocol.states import CommandOutcome, EventKind, RejectReason

NOW = 1_790_000_000_000
DIGITS = SelfTestCommand(model="digits")


class PowerCut(BaseException):
    """Nothing that the agent could catch."""


class Seal:
    """`agent.ports.CommandTrust` without signatures: those are tested where they are verified."""

    def open(self, payload: bytes, at: int) -> Command:
        if payload == b"forged":
            raise Refusal(RejectReason.BAD_SIGNATURE, "not signed by whom it should be")
        return decode_command(payload)


@dataclass
class Device:
    """What of a device outlives the agent's process, and what the agent did to its parts."""

    folder: Path
    now: int = NOW
    floor: int = 0
    seconds: float = 0.0
    pid: int | None = 100
    done: list[tuple[int, str]] = field(default_factory=list)  # (ticket, model), (0, "restart")
    replies: list[tuple[str, CommandOutcome, RejectReason | None, str]] = field(default_factory=list)
    events: list[tuple[RejectReason | None, str]] = field(default_factory=list)
    replies_waiting: int = 0
    disk_full: bool = False
    spool_full: bool = False
    cut_at: str = ""  # where the power goes: "act", "reply", "note"
    commanding: Commanding = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A fresh process on what the disk holds."""
        self.cut_at = ""
        self.commanding = Commanding(
            device="cam-7",
            trust=Seal(),
            memory=self,
            plane=self,
            renewal=self,
            replies=self,
            events=self,  # type: ignore[arg-type]  # it takes what refusals give
            clock_floor=lambda: self.floor,
            monotonic=lambda: self.seconds,
        )
        self.commanding.start()

    # ------------------------------------------------------------ the parts
    def load(self) -> Ledger:
        return CommandFile(self.folder / "commands.json").load()

    def save(self, ledger: Ledger) -> None:
        if self.disk_full:
            raise Trouble("the disk is full")
        if self.cut_at == "note" and ledger.commands[-1].told:
            raise PowerCut
        CommandFile(self.folder / "commands.json").save(ledger)

    def self_test(self, ticket: int, model: str) -> None:
        self._cut("act")
        self.done.append((ticket, model))

    def restart_planned(self) -> None:
        self._cut("act")
        self.done.append((0, "restart"))

    def renew_now(self) -> None:
        self._cut("act")
        self.done.append((0, "renew"))

    def reply(
        self, *, command: str, outcome: CommandOutcome, reason: RejectReason | None = None, detail: str = ""
    ) -> None:
        self._cut("reply")
        if self.spool_full:
            raise Trouble("the spool cannot be used")
        self.replies.append((command, outcome, reason, detail))

    def record(self, *, kind: EventKind, reason: RejectReason | None, detail: str) -> None:
        assert EventKind.REFUSED is kind
        self.events.append((reason, detail))

    def _cut(self, where: str) -> None:
        if self.cut_at == where:
            raise PowerCut

    # ------------------------------------------------------------ the story
    def hear(self, id_: str = "one", sequence: int = 1, deed: Deed = DIGITS, device: str = "cam-7") -> None:
        command = Command(device=device, id=id_, sequence=sequence, issued=NOW, expires=NOW + 60_000, command=deed)
        self.commanding.arrived(encode_command(command), self.now)

    def answer(self, *, passed: bool | None = True, detail: str = "16 golden samples agree") -> None:
        ticket, model = self.done[-1]
        self.commanding.tested(SelfTested(ticket=ticket, model=model, passed=passed, detail=detail))

    def plane_ends(self, pid: int, *, planned: bool, returncode: int = 0) -> None:
        self.commanding.plane_ended(DataPlaneExit(pid=pid, returncode=returncode, planned=planned))

    def outcomes(self) -> Sequence[tuple[str, CommandOutcome]]:
        return [(command, outcome) for command, outcome, _, _ in self.replies]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


SELF_TESTS = {
    "the golden samples agree": (True, CommandOutcome.DONE, "16 golden samples agree"),
    "they do not agree": (False, CommandOutcome.FAILED, "16 golden samples agree"),
    "they could not be run": (None, CommandOutcome.FAILED, "not run: 16 golden samples agree"),
}


@pytest.mark.parametrize(("passed", "outcome", "detail"), SELF_TESTS.values(), ids=list(SELF_TESTS))
def test_a_self_test_is_answered_with_what_the_golden_samples_say(
    device: Device, passed: bool | None, outcome: CommandOutcome, detail: str
) -> None:
    device.hear()
    assert [] == device.replies
    device.answer(passed=passed)
    assert [("one", outcome, None, detail)] == device.replies
    device.answer(passed=passed)
    assert 1 == len(device.replies)


def test_the_update_machines_own_self_tests_answer_no_command(device: Device) -> None:
    device.hear()
    device.commanding.tested(SelfTested(ticket=1, model="digits", passed=True, detail=""))
    assert [] == device.replies
    assert device.done[0][0] < 0


EXITS = {
    "the old one ended as planned": (100, True, CommandOutcome.DONE),
    "the old one died": (100, False, CommandOutcome.FAILED),
    "its successor died": (101, False, CommandOutcome.FAILED),
    "another one had been leaving": (99, True, None),
}


@pytest.mark.parametrize(("pid", "planned", "outcome"), EXITS.values(), ids=list(EXITS))
def test_a_restart_is_done_when_the_old_data_plane_has_left(
    device: Device, pid: int, planned: bool, outcome: CommandOutcome | None
) -> None:
    device.hear(deed=RestartDataPlaneCommand())
    assert [(0, "restart")] == device.done
    device.pid = 101
    device.plane_ends(pid, planned=planned)
    assert ([("one", outcome)] if outcome else []) == device.outcomes()


def test_a_restart_without_a_data_plane_restarts_nothing(device: Device) -> None:
    device.pid = None
    device.hear(deed=RestartDataPlaneCommand())
    assert [("one", CommandOutcome.FAILED)] == device.outcomes()
    assert [] == device.done


def test_a_renewal_is_done_when_there_is_a_new_certificate(device: Device) -> None:
    device.hear(deed=RenewCertificateCommand())
    device.plane_ends(100, planned=False)
    assert ([(0, "renew")], []) == (device.done, device.replies)
    device.commanding.renewed()
    device.commanding.renewed()
    assert [("one", CommandOutcome.DONE)] == device.outcomes()


def test_what_is_never_answered_fails_some_day(device: Device) -> None:
    device.hear()
    device.seconds = PATIENCE - 1
    device.commanding.tick()
    assert [] == device.replies
    device.seconds = PATIENCE
    device.commanding.tick()
    device.answer()
    assert [("one", CommandOutcome.FAILED)] == device.outcomes()


# ---------------------------------------------------------------- twice, late, in another order
def test_a_command_that_comes_again_is_answered_again_and_not_done_again(device: Device) -> None:
    device.hear()
    device.hear()
    assert (1, 0) == (len(device.done), len(device.replies))
    device.answer()
    device.now += 3_600_000
    device.hear()
    assert 1 == len(device.done)
    assert [("one", CommandOutcome.DONE)] * 2 == device.outcomes()
    assert [] == device.events


def test_a_flood_of_repeats_adds_nothing_while_replies_wait(device: Device) -> None:
    device.hear()
    device.answer()
    device.replies_waiting = MAX_WAITING
    for _ in range(100):
        device.hear()
    assert 1 == len(device.replies)


def test_commands_in_another_order_are_done_as_far_as_they_are_new(device: Device) -> None:
    device.hear("two", 2)
    device.hear("one", 1)
    device.hear("three", 3)
    assert 2 == len(device.done)
    assert [("one", CommandOutcome.REFUSED, RejectReason.REPLAYED)] == [said[:3] for said in device.replies]
    assert [RejectReason.REPLAYED] == [reason for reason, _ in device.events]


def test_who_is_refused_before_the_device_is_known_to_be_meant_gets_no_reply(device: Device) -> None:
    device.commanding.arrived(b"forged", NOW)
    device.hear(device="cam-8")
    assert [] == device.replies
    assert [RejectReason.BAD_SIGNATURE, RejectReason.WRONG_DEVICE] == [reason for reason, _ in device.events]


def test_a_flood_of_forgeries_is_one_event(device: Device) -> None:
    for _ in range(100):
        device.commanding.arrived(b"forged", NOW)
    assert 1 == len(device.events)
    device.seconds += QUIET
    device.commanding.arrived(b"forged", NOW)
    assert 2 == len(device.events)


def test_a_clock_behind_its_floor_does_not_revive_what_has_expired(device: Device) -> None:
    device.now, device.floor = 0, NOW + 60_000
    device.hear()
    assert [] == device.done
    assert [("one", CommandOutcome.REFUSED, RejectReason.EXPIRED)] == [said[:3] for said in device.replies]


# ---------------------------------------------------------------- the disk and the power
CUTS: dict[str, tuple[str, int, CommandOutcome]] = {
    "before acting": ("act", 0, CommandOutcome.INTERRUPTED),
    "before the reply": ("reply", 1, CommandOutcome.DONE),
    "before it is noted that the reply is in the spool": ("note", 1, CommandOutcome.DONE),
}


@pytest.mark.parametrize(("where", "done", "outcome"), CUTS.values(), ids=list(CUTS))
def test_a_power_cut_runs_nothing_twice_and_is_answered(
    device: Device, where: str, done: int, outcome: CommandOutcome
) -> None:
    device.cut_at = where
    with pytest.raises(PowerCut):
        _story(device)
    device.start()
    device.hear()
    assert done == len(device.done)
    assert {("one", outcome)} == set(device.outcomes())


def _story(device: Device) -> None:
    device.hear()
    device.answer()


def test_a_power_cut_while_it_is_under_way_is_answered_as_interrupted(device: Device) -> None:
    device.hear()
    device.start()
    assert [("one", CommandOutcome.INTERRUPTED)] == device.outcomes()
    device.answer()
    device.hear()
    assert 1 == len(device.done)


def test_nothing_is_done_that_the_disk_does_not_remember(device: Device) -> None:
    device.disk_full = True
    with pytest.raises(Trouble):
        device.hear()
    assert [] == device.done
    device.disk_full = False
    device.hear()
    assert 1 == len(device.done)


REFUSALS: dict[str, Callable[[Device, bool], None]] = {
    "the ledger": lambda device, on: setattr(device, "disk_full", on),
    "the spool": lambda device, on: setattr(device, "spool_full", on),
}


@pytest.mark.parametrize("fill", REFUSALS.values(), ids=list(REFUSALS))
def test_a_reply_that_the_disk_refuses_is_told_later(device: Device, fill: Callable[[Device, bool], None]) -> None:
    device.hear()
    fill(device, True)
    device.answer()
    assert [] == device.replies
    fill(device, False)
    device.commanding.tick()
    device.commanding.tick()
    assert [("one", CommandOutcome.DONE)] == device.outcomes()


def test_a_damaged_ledger_is_said_and_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "commands.json"
    file = CommandFile(path)
    file.save(Ledger(highest=3))
    assert Ledger(highest=3) == file.load()
    assert "" == file.lost
    path.write_bytes(path.read_bytes()[:-2])
    assert Ledger() == file.load()
    assert "checksum" in file.lost
