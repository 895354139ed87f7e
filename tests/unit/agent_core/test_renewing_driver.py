"""The driver: attempts in the background, what it remembers of them, and what it tells."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from agent.core.renewal import Lease
from agent.ports import ShutOut, Trouble, Weather
from agent.renewing import Renewing
from protocol.device_api import RenewRequest, RenewResponse, Standing

NOW = 1_790_000_000_000
HOUR = 3600.0


@dataclass
class Device:
    """A device with a server that answers what the test says, and a clock that the test moves."""

    answers: list[Any] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    waiting: list[Callable[[], None]] = field(default_factory=list)
    renewed: int = 0
    stored: list[str] = field(default_factory=list)
    held: str = "CA 1"
    clock: float = 1000.0
    floor: int = 0
    up: bool = True

    def __post_init__(self) -> None:
        self.lease = Lease(start=NOW, end=NOW + 300 * 24 * 3600 * 1000)
        self.driver = Renewing(
            device="cam-7",
            server=self,
            credentials=self,  # type: ignore[arg-type]  # the part of the port that the driver uses
            lease=lambda: self.lease,
            connected=lambda: self.up,
            renewed=self._renewed,
            background=self,
            events=self,
            clock_floor=lambda: self.floor,
            monotonic=lambda: self.clock,
            random=lambda: 0.5,
        )

    def _renewed(self) -> None:
        self.renewed += 1

    def tick(self, after: float = 0.0) -> list[str]:
        """Let time pass, tick, let the background finish; return what was asked of the server."""
        self.clock += after
        self.asked.clear()
        self.driver.tick(NOW)
        while self.waiting:
            self.waiting.pop(0)()
        return list(self.asked)

    # the ports
    def submit(self, name: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.waiting.append(lambda: done(work()))

    def record(self, *, detail: str = "", **_: object) -> None:
        self.told.append(detail)

    def request(self, device: str) -> str:
        return f"CSR of {device}"

    def holds(self, ca: str) -> bool:
        return ca == self.held

    def renew(self, asked: RenewRequest | RenewResponse) -> Any:
        if isinstance(asked, RenewResponse):
            self.stored.append(asked.certificate)
            self.held = asked.ca
            return None
        self.asked.append("renew")
        return self._answer(RenewResponse(certificate="next", ca="CA 1"))

    def standing(self) -> Standing:
        self.asked.append("ask")
        answer: Standing = self._answer(Standing(ca="CA 1", expires=NOW))
        return answer

    def _answer(self, usual: Any) -> Any:
        answer = self.answers.pop(0) if self.answers else usual
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_device_asks_when_it_starts_and_then_once_a_day() -> None:
    device = Device()
    assert [["ask"], [], [], ["ask"]] == [device.tick(after) for after in (0, 1, 12 * HOUR, 12 * HOUR)]
    assert (device.renewed, device.told) == (0, [])


def test_an_order_renews_at_once_and_the_new_key_is_used_at_once() -> None:
    device = Device()
    device.tick()
    device.driver.renew_now()
    assert [["renew"], ["ask"], []] == [device.tick(1), device.tick(1), device.tick(1)]
    assert (device.stored, device.renewed, device.told) == (["next"], 1, ["the certificate was renewed"])


def test_a_ca_that_is_not_held_is_learnt_by_renewing() -> None:
    device = Device()
    device.answers = [Standing(ca="CA 1 and 2", expires=NOW), RenewResponse(certificate="next", ca="CA 1 and 2")]
    assert [["ask"], ["renew"]] == [device.tick(), device.tick(1)]
    assert device.held == "CA 1 and 2"


def test_a_clock_behind_what_was_signed_does_not_put_a_renewal_off() -> None:
    device = Device(floor=NOW + 250 * 24 * 3600 * 1000)
    assert device.tick() == ["renew"]


def test_an_unreachable_server_is_tried_again_later_and_later() -> None:
    device = Device(answers=[Weather("away"), Weather("away"), Weather("busy", retry_after=600)])
    tried = [bool(device.tick(5)) for _ in range(300)]
    assert [0, 6, 18] == [at for at, was in enumerate(tried) if was][:3]  # after 30 and 60 s, in steps of 5
    assert 18 + 600 // 5 < [at for at, was in enumerate(tried) if was][3]
    assert device.told == []


def test_a_renewal_that_cannot_be_stored_is_tried_again() -> None:
    device = Device()
    device.tick()
    device.driver.renew_now()
    device.answers = [Trouble("the disk is full")]
    assert [["renew"], [], ["renew"]] == [device.tick(1), device.tick(1), device.tick(60)]
    assert device.renewed == 1


def test_a_device_that_was_revoked_says_so_once_and_serves_on() -> None:
    device = Device(answers=[ShutOut("this device was revoked")] * 3)
    assert [["ask"], [], ["ask"]] == [device.tick(), device.tick(60), device.tick(0.5 * HOUR)]
    assert device.driver.shut_out == "this device was revoked"
    assert device.told == ["the fleet server refuses this device, which serves on: this device was revoked"]
    device.answers.clear()
    device.tick(HOUR)
    assert device.driver.shut_out == ""
    assert device.told[1:] == ["the fleet server takes this device for a member again"]


@pytest.mark.parametrize(("what", "expected"), [("doubt", ["ask"]), ("nothing", [])])
def test_a_broker_that_refuses_is_a_reason_to_ask(what: str, expected: list[str]) -> None:
    device = Device()
    device.tick()
    if what == "doubt":
        device.driver.doubt()
    assert expected == device.tick(1)


def test_a_broker_that_stays_away_is_a_reason_to_ask_now_and_then() -> None:
    device = Device()
    device.tick()
    device.up = False
    asked = [bool(device.tick(30)) for _ in range(60)]
    assert asked.count(True) in (2, 3)  # in half an hour


def test_one_attempt_is_under_way_at_a_time() -> None:
    device = Device()
    device.driver.tick(NOW)
    device.driver.tick(NOW)
    assert len(device.waiting) == 1
