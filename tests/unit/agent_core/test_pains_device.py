"""What users of other update systems suffered from, as stories on a device in memory. Each test is named so.

The comment in each says what happened elsewhere; ``docs/explanation/pains.md`` says what is done about it here.
"""

import pytest
from test_updater_driver import PROBATION, World, committed

from agent.core.deployment import MAX_DOWNLOAD_TRIES, MAX_TAKE_UPS, running_model
from agent.ports import Refusal, Weather
from protocol.messages import RunningModel
from protocol.states import DeploymentState as S
from protocol.states import RejectReason
from simulator.memory import FakeDownloads, example_desire, example_digest, example_target

TWO = example_digest("digits", 2)


def birth(world: World) -> RunningModel:
    """Return what the device tells the fleet of its model."""
    return running_model(world.deployments.records["digits"])


def test_success_told_before_it_is_proved() -> None:
    # eclipse-hawkbit#3185, rauc-hawkbit-updater#161: it went on once the bytes were there, running or not
    world = committed(1)
    world.want(2)
    assert (2, S.PROBATION) == (birth(world).version, birth(world).state)
    assert S.COMMITTED not in [state for state, _ in world.events.states[-3:]]
    world.pass_probation()
    assert (2, S.COMMITTED) == (birth(world).version, birth(world).state)


def test_the_server_never_hears_of_a_fall_back() -> None:
    # eclipse-hawkbit#446: the server went on to show the version that the device had left, and never offered it again
    world = committed(1)
    world.want(2)
    world.updater.take_back("digits", world.now)
    world.settle()
    assert (1, S.ROLLED_BACK, RejectReason.TAKEN_BACK) == (
        birth(world).version,
        birth(world).state,
        birth(world).reason,
    )
    world.want(2, attempt=2)
    world.pass_probation()
    assert (2, S.COMMITTED) == (birth(world).version, birth(world).state)


def test_an_update_that_hangs_blocks_all_later_ones() -> None:
    # aws-greengrass-nucleus#1203, #807, #1161: in progress for ever, not to be cancelled, all others behind it
    world = committed(1)
    world.downloads = FakeDownloads({TWO: [Weather("the server hangs")] * 1000})
    world.boot()
    world.want(2)
    assert S.DOWNLOADING is world.state
    world.want(3)
    world.pass_probation()
    assert (S.COMMITTED, 3) == (world.state, birth(world).version)


def test_a_cancelled_update_is_stuck_between_two_states() -> None:
    # eclipse-hawkbit#950, #952, #1318: a refused cancellation never went back to running, a denied action came again
    world = committed(1)
    world.downloads = FakeDownloads({TWO: [Weather("the server hangs")] * 1000})
    world.boot()
    world.want(2)
    world.want(1)
    world.pass_probation()
    assert (S.COMMITTED, 1) == (world.state, birth(world).version)
    fetched = len(world.downloads.calls)
    world.now += 3_600_000
    world.settle()
    assert fetched == len(world.downloads.calls)


def test_an_endless_download_of_what_is_not_there() -> None:
    # rauc-hawkbit-updater#158: 404 was asked for again and again by a whole fleet, and the server could not stop it
    gone = Refusal(RejectReason.UNREACHABLE, "the server has no such bundle (status 404)")
    world = committed(1)
    world.downloads = FakeDownloads({TWO: [gone]})
    world.boot()
    world.want(2)
    for _ in range(100):
        world.now += 900_000
        world.want(2)
    assert (S.REJECTED, 1, 1) == (world.state, birth(world).version, len(world.downloads.calls))


def test_a_server_in_trouble_is_asked_for_ever() -> None:
    # rauc-hawkbit-updater#158 with 5xx: no end and no back-off
    world = committed(1)
    world.downloads = FakeDownloads({TWO: [Weather("status 503")]})
    world.boot()
    world.want(2)
    for _ in range(200):
        world.now += 900_000
        world.settle()
    assert (S.FAILED, RejectReason.UNREACHABLE, 1) == (world.state, birth(world).reason, birth(world).version)
    assert MAX_DOWNLOAD_TRIES == len(world.downloads.calls)


def test_a_device_that_failed_often_refuses_until_it_is_restarted() -> None:
    # Azure/iotedge#6971: after so many failures nothing was tried any more before the agent was started anew
    world = committed(1)
    world.downloads = FakeDownloads({TWO: [Refusal(RejectReason.HASH_MISMATCH, "x")] * 5 + ["memory:/ok"]})
    world.boot()
    for attempt in range(1, 6):
        world.want(2, attempt=attempt)
        assert S.REJECTED is world.state
    world.want(2, attempt=6)
    world.pass_probation()
    assert (S.COMMITTED, 2) == (world.state, birth(world).version)


def test_a_bad_target_is_tried_for_ever() -> None:
    # aktualizr-lite#153, #132: the same broken target was installed, rolled back and installed again, without end
    world = committed(1)
    for _ in range(50):
        world.want(2)
        if world.state is S.PROBATION:
            world.updater.take_back("digits", world.now)
            world.settle()
        world.now += 60_000
    assert 1 == [state for state, _ in world.events.states].count(S.ROLLED_BACK)
    assert (S.ROLLED_BACK, 1) == (world.state, birth(world).version)


def test_a_bad_version_is_only_ever_tried_again_and_never_taken_back() -> None:
    # azure-docs#49887, #71204: a failing module was started again and again; the old one never came back
    world = committed(1)
    world.want(2)
    world.golden = False
    world.pass_probation()
    assert (S.ROLLED_BACK, 1) == (world.state, birth(world).version)


def test_an_update_that_comes_while_the_application_must_not_be_disturbed() -> None:
    # azure-docs#41140, iotedge#5803: the old module was stopped before the new one had even been pulled
    world = committed(1)
    hold = world.now + 3_600_000
    world.calm = type(world.calm)(hold=lambda: hold)
    world.boot()
    world.settle()
    world.want(2)
    assert (S.STAGED, 1) == (world.state, birth(world).version)
    assert TWO in [target.sha256 for target in world.downloads.calls]
    world.now = hold + 1
    world.settle()
    assert 2 == birth(world).version


def test_a_last_report_that_does_not_get_through_takes_the_model_back() -> None:
    # mendersoftware/mender PR 823-827: the commit stood, the final status could not be posted, and it rolled back
    world = committed(1)
    world.want(2)
    world.events.record = lambda **_: None  # type: ignore[method-assign] # nobody will ever hear of it
    world.pass_probation()
    world.boot()
    world.now += 10 * PROBATION
    world.settle()
    assert (S.COMMITTED, 2) == (world.state, birth(world).version)


def test_a_loop_of_transitions_wears_the_device_out() -> None:
    # mendersoftware/mender PR 485: between two states for ever, while a status was retried offline
    world = committed(1)
    for n in range(10 * MAX_TAKE_UPS):
        world.want(2 + n % 2)
        world.now += 1000
    told = [state for state, _ in world.events.states]
    assert told.count(S.VERIFIED) <= MAX_TAKE_UPS + 1
    assert (1, RejectReason.LOOPING) == (birth(world).version, birth(world).reason)


@pytest.mark.parametrize("number", [10, 20, 100, 1000, 2**31 - 1])
def test_a_number_that_ends_in_0(number: int) -> None:
    # zephyr#89530: an action whose id was a multiple of ten could not be cancelled
    world = committed(1)
    world.updater.want(example_desire(example_target("digits", 2, attempt=number)), world.now)
    world.settle()
    world.pass_probation()
    assert (2, number) == (birth(world).version, birth(world).attempt)
