"""What a person at the device asks and orders, on in-memory ports."""

from collections.abc import Callable
from typing import Any

import pytest

from agent.chronicle import Chronicle
from agent.core.deployment import Deployment
from agent.core.deployment import Serving as Served
from agent.core.facts import DeviceFacts
from agent.core.health import HealthLimits
from agent.local_api import (
    AskHistory,
    AskStatus,
    AskTrust,
    AskVerify,
    Denied,
    Done,
    History,
    LocalAnswer,
    LocalRequest,
    ModelStatus,
    OrderHold,
    OrderRollback,
    Status,
    Step,
    TrustStatus,
    Verified,
)
from agent.local_control import LocalControl
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol.states import DeploymentState, RejectReason, RuntimeName
from simulator.memory import (
    FakeDataPlane,
    FakeDownloads,
    FakeTrials,
    InlineBackground,
    MemoryDeployments,
    MemoryStore,
    example_digest,
    example_manifest,
    example_target,
)

NOW = 1_750_000_000_000


class Steps:
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def newest(self, limit: int, model: str = "") -> list[Step]:
        return [step for step in reversed(self.steps) if model in ("", step.model)][:limit]


class Hold:
    def __init__(self) -> None:
        self.end = 0

    def until(self) -> int:
        return self.end

    def set(self, until: int) -> None:
        self.end = until


class NoFleet:
    def record(self, **_: object) -> None:
        """Nobody listens."""


class Device:
    """A device that serves digits 2 and has 1 in its store."""

    def __init__(self) -> None:
        self.turns: list[Callable[[], None]] = []
        self.answers: list[LocalAnswer] = []
        self.history, self.hold, self.plane = Steps(), Hold(), FakeDataPlane()
        one, two = (Served(version=n, digest=example_digest("digits", n)) for n in (1, 2))
        store = MemoryStore({served.digest: example_manifest("digits", served.version) for served in (one, two)})
        for served in (one, two):
            store.admit(served.digest)
        store.activate("digits", two.digest)
        record = Deployment(
            model="digits",
            state=DeploymentState.COMMITTED,
            target=example_target("digits", 2),
            serving=two,
            committed=two,
            previous=one,
            factory=one,
        )
        background = InlineBackground(self.turns.append)
        self.updater = Updater(
            facts=DeviceFacts(device_class="x", runtimes=(RuntimeName.LITERT,), memory_total=10**9),
            deployments=MemoryDeployments([record]),
            store=store,
            downloads=FakeDownloads(),
            trials=FakeTrials(),
            plane=self.plane,
            background=background,
            events=Chronicle(NoFleet(), self.history, lambda: NOW),
            changed=lambda: None,
            random=lambda: 0.5,
            monotonic=lambda: 0.0,
            verdicts=Verdicts(plane=self.plane, monotonic=lambda: 0.0, probation_ms=1, limits=HealthLimits()),
            calm=Calm(hold=self.hold.until),
        )
        self.updater.start(NOW)
        self.control = LocalControl(
            updater=self.updater,
            store=store,
            history=self.history,
            hold=self.hold,
            background=background,
            status=self.status,
            trust=lambda now: TrustStatus(
                device="d", director=3, director_root=1, image_root=1, clock_floor=now, expired=False
            ),
        )

    def status(self, models: tuple[ModelStatus, ...], hold_until: int) -> Status:
        return Status(
            device="d",
            agent="1",
            boot="b",
            connected=True,
            server_up=True,
            spooled_events=0,
            spooled_reports=0,
            dropped_reports=0,
            hold_until=hold_until,
            models=models,
        )

    def ask(self, request: LocalRequest) -> Any:
        self.control.answer(request, self.answers.append, NOW)
        while self.turns:
            self.turns.pop(0)()
        return self.answers[-1]


def test_status_tells_what_serves_and_what_could() -> None:
    (model,) = Device().ask(AskStatus()).models
    assert ("digits", 2, 2, 1, 1) == (model.model, model.serving, model.wanted, model.previous, model.factory)


def test_a_rollback_by_hand_serves_the_version_before_and_is_remembered() -> None:
    device = Device()
    assert device.ask(OrderRollback(model="digits")).said.startswith("digits 1 will serve")
    assert example_digest("digits", 1) == device.plane.calls[-1].stored.digest
    (step,) = device.ask(AskHistory()).steps
    assert (DeploymentState.ROLLING_BACK, RejectReason.TAKEN_BACK) == (step.state, step.reason)


@pytest.mark.parametrize("model", ["faces", ""])
def test_what_cannot_be_taken_back_is_denied_with_the_reason(model: str) -> None:
    assert "is not known here" in Device().ask(OrderRollback(model=model)).why


HOLDS = [(600, NOW + 600_000, Done), (0, 0, Done), (-1, 0, Denied), (86_401, 0, Denied)]


@pytest.mark.parametrize(("seconds", "until", "answer"), HOLDS)
def test_a_hold_lasts_as_long_as_said_and_a_day_at_most(seconds: int, until: int, answer: type) -> None:
    device = Device()
    assert isinstance(device.ask(OrderHold(seconds=seconds)), answer)
    assert until == device.hold.until() == device.ask(AskStatus()).hold_until


def test_a_hold_that_is_over_is_not_shown() -> None:
    device = Device()
    device.hold.set(NOW)
    assert 0 == device.ask(AskStatus()).hold_until


def test_the_store_is_hashed_and_trust_is_read_in_the_background() -> None:
    device = Device()
    verified, trust, history = (device.ask(each) for each in (AskVerify(), AskTrust(), AskHistory(model="faces")))
    assert [(1, False, ""), (2, True, "")] == [
        (b.version, b.active, b.damage) for b in verified.bundles if isinstance(verified, Verified)
    ]
    assert 3 == trust.director
    assert History(steps=()) == history
