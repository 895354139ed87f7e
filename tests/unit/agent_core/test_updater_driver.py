"""The updater on in-memory ports: stories as the fleet would see them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from agent.channel import Refused, Serving, TrialVerdict
from agent.core.deployment import MAX_PROBATION_CRASHES, Deployment
from agent.core.facts import DeviceFacts
from agent.ports import Refusal, Weather
from agent.updater import Updater
from protocol.states import DeploymentState as S
from protocol.states import RejectReason, RuntimeName
from simulator.memory import (
    DataPlaneCall,
    FakeDataPlane,
    FakeDownloads,
    FakeTrials,
    MemoryStore,
    example_desire,
    example_digest,
    example_manifest,
    example_target,
)

PROBATION = 1000
FACTS = DeviceFacts(device_class="x86_64", runtimes=(RuntimeName.LITERT,), memory_total=10**9)


class MemoryDeployments:
    def __init__(self) -> None:
        self.records: dict[str, Deployment] = {}
        self.saves: list[S] = []

    def load(self) -> Mapping[str, Deployment]:
        return dict(self.records)

    def save(self, record: Deployment) -> None:
        self.records[record.model] = record
        self.saves.append(record.state)


class Inline:
    """Runs background work when the test says so."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def submit(self, name: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.queue.append(lambda: done(work()))

    def run(self) -> None:
        while self.queue:
            self.queue.pop(0)()


@dataclass
class Events:
    states: list[tuple[S | None, RejectReason | None]] = field(default_factory=list)

    def record(self, *, state: S | None = None, reason: RejectReason | None = None, **_: object) -> None:
        self.states.append((state, reason))


class World:
    """A device in memory; killing it keeps what a disk would keep."""

    def __init__(self, *, downloads: FakeDownloads | None = None, trials: FakeTrials | None = None) -> None:
        self.deployments, self.events = MemoryDeployments(), Events()
        self.store = MemoryStore({example_digest("digits", n): example_manifest("digits", n) for n in (1, 2, 3)})
        self.downloads, self.trials = downloads or FakeDownloads(), trials or FakeTrials()
        self.now = 1_750_000_000_000
        self.refuse = False
        self.boot()

    def boot(self) -> None:
        self.background, self.plane = Inline(), FakeDataPlane()
        self.updater = Updater(
            facts=FACTS,
            deployments=self.deployments,
            store=self.store,
            downloads=self.downloads,
            trials=self.trials,
            plane=self.plane,
            background=self.background,
            events=self.events,
            changed=lambda: None,
            random=lambda: 0.5,
            probation_ms=PROBATION,
        )
        self.updater.start(self.now)

    def settle(self) -> None:
        for _ in range(30):
            self.background.run()
            calls, self.plane.calls = self.plane.calls, []
            for call in calls:
                self.answer(call)
            self.updater.tick(self.now)

    def answer(self, call: DataPlaneCall) -> None:
        if call.stored is None:
            return
        if self.refuse:
            self.updater.plane_refuses(Refused(ticket=call.ticket, model=call.model, reason="no"), self.now)
            return
        answer = Serving(
            ticket=call.ticket,
            model=call.model,
            version=call.stored.manifest.version,
            digest=call.stored.digest,
            runtime=RuntimeName.LITERT,
            took_us=5000,
        )
        self.updater.plane_serves(answer, self.now)

    def want(self, *versions: int, attempt: int = 1) -> None:
        targets = [example_target("digits", version, attempt=attempt) for version in versions]
        self.updater.want(example_desire(*targets), self.now)
        self.settle()

    def pass_probation(self) -> None:
        self.now += PROBATION
        self.settle()

    @property
    def state(self) -> S:
        return self.deployments.records["digits"].state

    @property
    def active(self) -> str | None:
        return self.store.active().get("digits")


def committed(version: int) -> World:
    world = World()
    world.want(version)
    world.pass_probation()
    assert (S.COMMITTED, example_digest("digits", version)) == (world.state, world.active)
    return world


def test_a_wanted_model_is_fetched_tried_served_and_committed() -> None:
    world = World()
    world.want(1)
    assert S.PROBATION is world.state
    world.pass_probation()
    expected = [S.VERIFIED, S.DOWNLOADING, S.STAGED, S.SELFTEST, S.SWAPPING, S.PROBATION, S.COMMITTED]
    assert expected == world.deployments.saves
    assert expected == [state for state, _ in world.events.states]
    assert example_digest("digits", 1) == world.active


def test_a_rollback_needs_no_download() -> None:
    world = committed(1)
    world.want(2)
    world.pass_probation()
    fetched = len(world.downloads.calls)
    world.want(1)
    assert (S.PROBATION, example_digest("digits", 1)) == (world.state, world.active)
    assert fetched == len(world.downloads.calls)


def test_a_rollback_while_on_probation_is_obeyed_at_once() -> None:
    world = committed(1)
    world.want(2)
    assert S.PROBATION is world.state
    world.want(1)
    assert example_digest("digits", 1) == world.active


REFUSALS = [
    ("tampered bytes", {"downloads": Refusal(RejectReason.HASH_MISMATCH, "x")}, RejectReason.HASH_MISMATCH),
    ("a full disk", {"downloads": Refusal(RejectReason.NO_SPACE, "x")}, RejectReason.NO_SPACE),
    (
        "a trial that says no",
        {"trials": TrialVerdict(passed=False, reason="selftest-failed")},
        RejectReason.SELFTEST_FAILED,
    ),
    ("a trial that dies", {"trials": TrialVerdict(passed=False, detail="SIGKILL")}, RejectReason.SELFTEST_FAILED),
]


@pytest.mark.parametrize(("name", "script", "reason"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_refused_candidate_leaves_what_serves_and_says_why(name: str, script: Any, reason: RejectReason) -> None:
    world = committed(1)
    digest = example_digest("digits", 2)
    if "downloads" in script:
        world.downloads = FakeDownloads({digest: [script["downloads"]]})
    else:
        world.trials = FakeTrials({digest: [script["trials"]]})
    world.boot()
    world.settle()
    world.want(2)
    assert (S.REJECTED, example_digest("digits", 1)) == (world.state, world.active)
    assert (S.REJECTED, reason) == world.events.states[-1]
    world.want(2)
    assert (S.REJECTED, reason) == world.events.states[-1], "the same attempt is final"


def test_a_higher_attempt_tries_again() -> None:
    digest = example_digest("digits", 1)
    world = World(downloads=FakeDownloads({digest: [Refusal(RejectReason.HASH_MISMATCH, "x"), "memory:/ok"]}))
    world.want(1)
    assert S.REJECTED is world.state
    world.want(1, attempt=2)
    assert S.PROBATION is world.state


def test_weather_is_waited_out() -> None:
    digest = example_digest("digits", 1)
    world = World(downloads=FakeDownloads({digest: [Weather("no route"), Weather("no route"), "memory:/ok"]}))
    world.want(1)
    assert S.DOWNLOADING is world.state
    world.now += 60_000
    world.settle()
    world.now += 60_000
    world.settle()
    assert S.PROBATION is world.state


def test_a_swap_the_data_plane_refuses_leaves_the_pointer() -> None:
    world = committed(1)
    world.refuse = True
    world.want(2)
    assert (S.FAILED, example_digest("digits", 1)) == (world.state, world.active)


def test_a_crash_loop_in_probation_takes_the_model_back() -> None:
    world = committed(1)
    world.want(2)
    for _ in range(MAX_PROBATION_CRASHES):
        world.updater.plane_died(world.now)
        world.settle()
    assert (S.ROLLED_BACK, example_digest("digits", 1)) == (world.state, world.active)
    world.want(2)
    assert S.ROLLED_BACK is world.state, "the attempt that failed is final"


@pytest.mark.parametrize("kill_after", [S.VERIFIED, S.DOWNLOADING, S.STAGED, S.SELFTEST, S.SWAPPING, S.PROBATION])
def test_an_agent_killed_in_any_state_ends_where_it_should(kill_after: S) -> None:
    """The record of that state was just persisted; the process dies before its effect ran."""

    class Killed(BaseException):
        pass

    class DyingDisk(MemoryDeployments):
        def save(self, record: Deployment) -> None:
            super().save(record)
            if record.state is kill_after and not self.died:
                self.died = True
                raise Killed

        died = False

    world = committed(1)
    dying = DyingDisk()
    dying.records = world.deployments.records
    world.deployments = dying
    world.boot()
    with pytest.raises(Killed):
        world.want(2)
    world.boot()
    assert [example_digest("digits", 1)] == [c.stored.digest for c in world.plane.calls if c.stored][:1] or (
        kill_after is S.PROBATION
    ), "what was verified serves at once"
    world.settle()
    world.want(2)
    world.pass_probation()
    assert (S.COMMITTED, example_digest("digits", 2)) == (world.state, world.active)


def test_a_lost_record_file_still_serves_what_the_pointer_names() -> None:
    world = committed(1)
    world.deployments.records.clear()
    world.boot()
    assert [example_digest("digits", 1)] == [call.stored.digest for call in world.plane.calls if call.stored]
    world.settle()
    world.want(1)
    assert S.COMMITTED is world.state


def test_a_damaged_active_bundle_is_never_loaded() -> None:
    world = committed(1)
    del world.store.stored[example_digest("digits", 1)]
    world.boot()
    assert [] == world.plane.calls
    assert RejectReason.HASH_MISMATCH is world.events.states[-1][1]
    world.want(1)
    world.pass_probation()
    assert (S.COMMITTED, example_digest("digits", 1)) == (world.state, world.active)


def test_an_empty_desired_state_withdraws_the_model() -> None:
    world = committed(1)
    world.want()
    assert (S.IDLE, None) == (world.state, world.active)


def test_a_superseded_download_is_void() -> None:
    world = committed(1)
    world.updater.want(example_desire(example_target("digits", 2)), world.now)
    world.want(3)
    world.pass_probation()
    assert (S.COMMITTED, example_digest("digits", 3)) == (world.state, world.active)
