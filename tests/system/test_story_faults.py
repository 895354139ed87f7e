"""The whole house under faults: a real server, broker and two agents, killed one after the other under load."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from demo import story
from demo.world import DEVICES, World
from protocol.states import EventKind

FIRST, SECOND = DEVICES[0], DEVICES[1]
STATISTICS_SECONDS = 2.0  # a kill of the data plane may lose one second of statistics; one more for the kill itself

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A fleet that serves digits 1 under load."""
    world = World(tmp_path_factory.mktemp("fleet"))
    try:
        story.start_server(world)
        story.make_keys(world)
        story.enrol_devices(world)
        story.deploy_first(world)
        for stream in world.streams.values():
            stream.start()
        yield world
    finally:
        for stream in world.streams.values():
            stream.stop()
        world.programs.stop_all()


def child_of(pid: int, word: str) -> int:
    """Return the oldest child of a kind: of two data planes, the younger is a spare."""
    children = psutil.Process(pid).children(recursive=True)
    found = [child for child in children if word in " ".join(child.cmdline())]
    assert found, f"{pid} has no child {word}"
    return min(found, key=lambda child: child.create_time()).pid


def is_dead(pid: int) -> bool:
    """An orphan stays a zombie until the machine's first process collects it; that is dead enough."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def failures(world: World) -> dict[str, int]:
    return {name: stream.counts.failed for name, stream in world.streams.items()}


def seen_again(world: World, name: str) -> None:
    """Wait until reports of a device come in that were made after this call."""
    before = world.devices()[name].reports
    world.wait(f"new reports of {name}", lambda: world.devices()[name].reports > before + 1)


def test_a_killed_broker_and_a_killed_server_lose_no_report_and_no_request(world: World) -> None:
    failed = failures(world)
    os.kill(child_of(world.programs.pid("server"), "mosquitto"), signal.SIGKILL)
    world.wait("the broker is back", lambda: story.overview_with_broker(world))
    for name in DEVICES:
        seen_again(world, name)
    world.programs.kill("server")
    time.sleep(3)
    world.wait("the server is back", lambda: story.overview_with_broker(world))
    for name in DEVICES:
        seen_again(world, name)
    assert failed == failures(world)
    world.pause_streams()
    answered = dict(world.answered_ever)
    world.wait("equal sums", lambda: {name: world.stored_requests(name) for name in DEVICES} == answered)
    assert dict.fromkeys(DEVICES, 0) == {name: device.missing for name, device in world.devices().items()}
    world.restart_streams()


def test_a_killed_data_plane_refuses_no_connection_and_says_so(world: World) -> None:
    row = world.newest_event()
    agent = world.programs.pid(FIRST)
    victim = child_of(agent, "agent.inference")
    before = world.streams[FIRST].counts.answered
    os.kill(victim, signal.SIGKILL)
    world.wait("answers again", lambda: world.streams[FIRST].counts.answered > before + 20)
    assert victim != child_of(agent, "agent.inference")
    counts = world.streams[FIRST].counts
    assert counts.failed <= 1, counts.last_error  # the one request in flight
    assert "refused" not in counts.last_error.lower()
    event = world.wait("the event", lambda: _event(world, row, EventKind.DATA_PLANE))
    assert str(victim) in event


def _event(world: World, row: int, kind: EventKind) -> str | None:
    return next((event.detail for event in world.events_since(row, FIRST) if event.kind is kind), None)


def test_a_killed_agent_comes_back_serving_what_it_served(world: World) -> None:
    agent = world.programs.pid(SECOND)
    plane = child_of(agent, "agent.inference")
    world.programs.kill(SECOND)
    before = world.streams[SECOND].counts.answered
    world.wait("answers again", lambda: world.streams[SECOND].counts.answered > before + 20)
    world.wait("the death of the old data plane with its control process", lambda: is_dead(plane))
    seen_again(world, SECOND)
    model = world.model_on(SECOND)
    assert (1, "committed") == (model.running_version, model.state.value)


def test_an_agent_without_its_server_starts_and_serves(world: World) -> None:
    """Server and broker are down when the agent starts: it serves the last verified model, and reports later."""
    server = world.programs.pid("server")
    frozen = (server, child_of(server, "mosquitto"))  # frozen, not killed: the watcher would start them again
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        world.programs.kill(SECOND)
        before = world.streams[SECOND].counts.answered
        deadline = time.monotonic() + 20
        while world.streams[SECOND].counts.answered < before + 20:
            assert time.monotonic() < deadline, world.streams[SECOND].counts
            time.sleep(0.1)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    seen_again(world, SECOND)


def test_sums_are_never_more_than_clients_counted_and_at_most_seconds_less(world: World) -> None:
    """After all kills: nothing counted twice, and each kill of a data plane cost at most a second of statistics."""
    world.pause_streams()
    time.sleep(6)
    kills = {FIRST: 1, SECOND: 2, DEVICES[2]: 0}
    for name in DEVICES:
        answered = world.answered_ever[name]
        stored = world.stored_requests(name)
        lost = answered - stored
        allowed = kills[name] * STATISTICS_SECONDS * world.rate
        assert 0 <= lost <= allowed, f"{name}: answered {answered}, stored {stored}"


def test_the_local_command_line_shows_holds_takes_back_and_verifies(world: World) -> None:
    world.wait("digits 1 committed", lambda: world.model_on(FIRST).state.value == "committed")
    status = world.local(FIRST, "status", "--json")
    assert (FIRST, True, 1) == (status["device"], status["connected"], status["models"][0]["serving"])
    assert "wait for 600 s" in world.local(FIRST, "hold", "--for", "10m", "--json")["said"]
    assert world.local(FIRST, "status", "--json")["hold_until"] > 0
    world.local(FIRST, "hold", "--release", "--json")
    assert [""] == [bundle["damage"] for bundle in world.local(FIRST, "verify", "--json")["bundles"]]
    assert ["digits 1"] == world.local(FIRST, "trust", "--json")["models"]
    states = [step["state"] for step in world.local(FIRST, "history", "--json")["steps"]]
    assert ["committed", "probation", "swapping"] == states[:3]


def test_a_full_disk_is_said_and_leaves_what_serves(world: World) -> None:
    """A tiny file system under the downloads folder: the bundle does not fit, the event says so."""
    downloads = world.folder / FIRST / "state" / "downloads"
    downloads.mkdir(exist_ok=True)
    as_root("mount", "-t", "tmpfs", "-o", "size=4k,mode=0777", "tmpfs", str(downloads))
    try:
        world.restart_streams()
        story.publish(world, "v2")
        row = world.newest_event()
        world.edgewarden("deploy", "digits", "2", "--device", FIRST)
        event = world.wait("no-space", lambda: _rejected(world, row))
        assert "no-space" == event
        assert 1 == world.model_on(FIRST).running_version
    finally:
        as_root("umount", str(downloads))


def as_root(*command: str) -> None:
    """A tiny file system is the one honest full disk; mounting it takes root or password-less sudo."""
    subprocess.run([*([] if os.getuid() == 0 else ["sudo", "-n"]), *command], check=True)


def _rejected(world: World, row: int) -> str | None:
    reasons = [event.reason.value for event in world.events_since(row, FIRST) if event.reason]
    return reasons[0] if reasons else None
