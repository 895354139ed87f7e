"""The updater on in-memory ports: stories as the fleet would see them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from agent.channel import (
    Refused,
    SelfTested,
    Serving,
    Shadow,
    ShadowDelta,
    ShadowEnded,
    Shadowing,
    StatisticsDelta,
    TrialVerdict,
)
from agent.core.deployment import (
    LOOP_MS,
    MAX_DOWNLOAD_TRIES,
    MAX_PROBATION_CRASHES,
    MAX_TAKE_UPS,
    Deployment,
    running_model,
)
from agent.core.facts import DeviceFacts, Objection, Target
from agent.core.health import HealthLimits
from agent.core.shadowing import ShadowCounts
from agent.ports import Postponed, Refusal, Weather
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol.names import short_digest
from protocol.release import ShadowTerms
from protocol.states import DeploymentState as S
from protocol.states import RejectReason, RuntimeName
from protocol.statistics import ModelStatistics
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
        self.golden: bool | None = True
        self.calm = Calm()
        self.boot()

    def boot(self) -> None:
        self.background = Inline()
        self.plane = FakeDataPlane(on_test=self.test, on_shadow=self.shadow)
        self.verdicts = Verdicts(
            plane=self.plane, monotonic=self.monotonic, probation_ms=PROBATION, limits=HealthLimits()
        )
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
            monotonic=self.monotonic,
            verdicts=self.verdicts,
            calm=self.calm,
        )
        self.updater.start(self.now)

    def monotonic(self) -> float:
        return self.now / 1000

    def test(self, ticket: int, model: str) -> None:
        answer = SelfTested(
            ticket=ticket, model=model, digest=self.active or "", passed=self.golden, detail="8 golden samples"
        )
        self.verdicts.tested(answer)

    def shadow(self, order: Shadow) -> None:
        stored = self.deployments.records[order.model].target.sha256
        told = Shadowing(ticket=order.ticket, model=order.model, stable=self.active or "", candidate=stored)
        self.verdicts.shadowed(told)

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
            alias=call.alias,
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


def objected(version: int, reason: RejectReason = RejectReason.BELOW_FLOOR) -> Target:
    objection = Objection(reason=reason, detail="the repositories say no")
    return replace(example_target("digits", version), objection=objection)


def test_a_floor_that_rises_under_a_running_model_is_reported_and_the_model_serves_on() -> None:
    world = committed(2)
    world.updater.want(example_desire(objected(2)), world.now)
    world.settle()
    assert (S.REJECTED, RejectReason.BELOW_FLOOR) == world.events.states[-1]
    running = running_model(world.deployments.records["digits"])
    assert (2, RejectReason.BELOW_FLOOR) == (running.version, running.reason)
    world.boot()
    world.settle()
    assert example_digest("digits", 2) == world.active
    world.want(3)
    world.pass_probation()
    assert (S.COMMITTED, example_digest("digits", 3)) == (world.state, world.active)


def test_what_is_said_against_one_model_leaves_the_others_on_their_way() -> None:
    world = World()
    gauges = example_target("gauges", 1)
    world.store = MemoryStore({gauges.sha256: example_manifest("gauges", 1)})
    world.boot()
    world.updater.want(example_desire(objected(1, RejectReason.YANKED), gauges), world.now)
    world.settle()
    records = world.deployments.records
    assert (S.REJECTED, RejectReason.YANKED) == (records["digits"].state, records["digits"].reason)
    assert S.PROBATION is records["gauges"].state


def test_an_objection_stops_a_download_and_lets_it_go_on_when_it_is_taken_back() -> None:
    world = committed(1)
    world.updater.want(example_desire(example_target("digits", 2)), world.now)
    world.background.run()
    world.updater.tick(world.now)  # admitted: it downloads
    assert S.DOWNLOADING is world.state
    world.updater.want(example_desire(objected(2, RejectReason.BAD_SIGNATURE)), world.now)
    world.settle()
    assert (S.REJECTED, example_digest("digits", 1)) == (world.state, world.active)
    world.want(2)
    assert (S.PROBATION, example_digest("digits", 2)) == (world.state, world.active)


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


def test_a_server_that_asks_for_patience_gets_it() -> None:
    digest = example_digest("digits", 1)
    world = World(downloads=FakeDownloads({digest: [Weather("busy", retry_after=600.0), "memory:/ok"]}))
    world.want(1)
    world.now += 599_000
    world.settle()
    assert S.DOWNLOADING is world.state
    world.now += 60_000
    world.settle()
    assert S.PROBATION is world.state


def test_a_download_that_this_device_postpones_is_no_try_also_after_a_restart() -> None:
    digest = example_digest("digits", 1)
    waits: list[str | Exception] = [Postponed("the budget is used up", retry_after=3600.0)] * (MAX_DOWNLOAD_TRIES + 2)
    world = World(downloads=FakeDownloads({digest: [*waits, "memory:/ok"]}))
    world.want(1)
    for _ in waits[1:]:
        world.now += 3600_000
        world.settle()
        assert (S.DOWNLOADING, 0) == (world.state, world.deployments.records["digits"].download_tries)
    world.boot()
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


# ---------------------------------------------------------------- verdicts, holds, hands
def counted(world: World, version: int, requests: int, *, errors: int = 0) -> None:
    digest = short_digest(example_digest("digits", version))
    statistics = ModelStatistics(digest=digest, requests=requests, errors=errors)
    world.verdicts.count(StatisticsDelta(models=(statistics,)))
    world.settle()


def want_shadowed(world: World, version: int) -> None:
    target = example_target("digits", version, shadow=ShadowTerms(requests=100, seconds=60))
    world.updater.want(example_desire(target), world.now)
    world.settle()


def compared(world: World, *, compared: int, agreed: int) -> None:
    counts = ShadowCounts(stable="a", candidate="b", compared=compared, agreed=agreed)
    world.verdicts.shadowed(ShadowDelta(model="digits", counts=counts))
    world.settle()


def test_a_model_that_fails_requests_in_probation_is_taken_back_at_once_and_offline() -> None:
    world = committed(1)
    world.want(2)
    counted(world, 1, 1000)
    assert S.PROBATION is world.state
    counted(world, 2, 100, errors=50)
    assert (S.ROLLED_BACK, example_digest("digits", 1)) == (world.state, world.active)
    assert RejectReason.TOO_MANY_ERRORS is world.deployments.records["digits"].reason
    world.want(2)
    assert S.ROLLED_BACK is world.state, "the attempt that failed is final"


def test_golden_samples_that_fail_where_it_serves_take_it_back() -> None:
    world = committed(1)
    world.want(2)
    world.golden = False
    world.pass_probation()
    assert (S.ROLLED_BACK, example_digest("digits", 1)) == (world.state, world.active)


def test_golden_samples_that_cannot_run_now_are_asked_again() -> None:
    world = committed(1)
    world.want(2)
    world.golden = None
    world.pass_probation()
    assert S.PROBATION is world.state
    world.golden = True
    world.settle()
    assert S.COMMITTED is world.state


def test_a_candidate_serves_after_its_shadow_agreed() -> None:
    world = committed(1)
    want_shadowed(world, 2)
    assert (S.SHADOW, example_digest("digits", 1)) == (world.state, world.active)
    assert [0.1] == [order.share for order in world.plane.shadows]
    compared(world, compared=100, agreed=99)
    assert (S.PROBATION, example_digest("digits", 2)) == (world.state, world.active)


def test_a_candidate_that_differs_is_withdrawn_and_never_serves() -> None:
    world = committed(1)
    want_shadowed(world, 2)
    calls: list[DataPlaneCall] = []
    world.plane._on_call = calls.append
    compared(world, compared=100, agreed=50)
    assert (S.REJECTED, example_digest("digits", 1)) == (world.state, world.active)
    assert [(None, "candidate")] == [(call.stored, call.alias) for call in calls]
    assert RejectReason.SHADOW_FAILED is world.deployments.records["digits"].reason


def test_a_shadow_that_ends_by_itself_refuses_the_candidate() -> None:
    world = committed(1)
    want_shadowed(world, 2)
    world.verdicts.shadowed(ShadowEnded(ticket=0, model="digits", reason="other classes"))
    world.settle()
    assert (S.REJECTED, example_digest("digits", 1)) == (world.state, world.active)


def test_a_shadow_in_progress_keeps_nobody_waiting() -> None:
    world = committed(1)
    world.store.manifests[example_digest("faces", 1)] = example_manifest("faces", 1)
    shadowed = example_target("digits", 2, shadow=ShadowTerms())
    world.updater.want(example_desire(shadowed, example_target("faces", 1)), world.now)
    world.settle()
    states = {model: record.state for model, record in world.deployments.records.items()}
    assert {"digits": S.SHADOW, "faces": S.PROBATION} == states


def test_an_update_that_an_application_holds_waits_with_its_bytes_on_disk() -> None:
    world = committed(1)
    until = world.now + 600_000
    world.calm = Calm(hold=lambda: until)
    world.boot()
    world.settle()
    world.want(2)
    assert (S.STAGED, "an application holds updates") == (world.state, world.updater.held("digits"))
    world.now = until
    world.settle()
    assert (S.PROBATION, "") == (world.state, world.updater.held("digits"))


def test_a_hold_that_ends_early_is_noticed_when_told() -> None:
    world = committed(1)
    holds = [world.now + 600_000]
    world.calm = Calm(hold=lambda: holds[-1])
    world.boot()
    world.settle()
    world.want(2)
    holds.append(0)
    world.updater.look_again()
    world.settle()
    assert S.PROBATION is world.state


def test_a_forced_rollback_is_not_held() -> None:
    world = committed(1)
    world.want(2)
    world.pass_probation()
    until = world.now + 600_000
    world.calm = Calm(hold=lambda: until)
    world.boot()
    world.settle()
    world.updater.want(example_desire(example_target("digits", 1, forced=True)), world.now)
    world.settle()
    assert (S.PROBATION, example_digest("digits", 1)) == (world.state, world.active)


def test_a_person_at_the_device_takes_a_model_back_and_the_fleet_does_not_undo_it() -> None:
    world = committed(1)
    world.want(2)
    world.pass_probation()
    assert "digits 1" == world.updater.take_back("digits", world.now)
    world.settle()
    assert (S.ROLLED_BACK, example_digest("digits", 1)) == (world.state, world.active)
    world.want(2)
    assert example_digest("digits", 1) == world.active
    world.want(2, attempt=2)
    assert example_digest("digits", 2) == world.active


@pytest.mark.parametrize(("model", "why"), [("faces", "not known"), ("digits", "no earlier version")])
def test_there_must_be_something_to_take_back(model: str, why: str) -> None:
    world = committed(1)
    with pytest.raises(Refusal, match=why):
        world.updater.take_back(model, world.now)
    assert (S.COMMITTED, example_digest("digits", 1)) == (world.state, world.active)


def test_a_fleet_that_wavers_is_left_alone_for_an_hour_and_then_heard_again() -> None:
    world = committed(1)
    for turn in range(MAX_TAKE_UPS + 2):
        world.want(2 + turn % 2)
    assert RejectReason.LOOPING is world.deployments.records["digits"].reason
    assert example_digest("digits", 1) == world.active, "the last committed version"
    world.now += LOOP_MS
    world.want(3)
    assert example_digest("digits", 3) == world.active


def test_a_damaged_committed_version_falls_back_to_the_factory_one() -> None:
    world = committed(1)
    for version in (2, 3):
        world.want(version)
        world.pass_probation()
    for version in (2, 3):
        del world.store.stored[example_digest("digits", version)]
    world.boot()
    assert [example_digest("digits", 1)] == [call.stored.digest for call in world.plane.calls if call.stored]
    assert example_digest("digits", 1) == world.active
