"""``[inference] measure``: a device measures a model once, keeps what it found, and runs the model accordingly."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from dataplane_parts import UnixClient

from agent.core.rungs import Rung, choose
from demo import story
from demo.world import DEVICES, EXAMPLES, MODEL, World
from protocol.states import DeploymentState, PresenceState, RuntimeName

DEVICE = DEVICES[0]

pytestmark = [pytest.mark.broker, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A device that has measured digits 1 in its trial and committed it."""
    world = World(tmp_path_factory.mktemp("measuring"))
    try:
        story.start_server(world)
        story.make_keys(world)
        config = world.config(DEVICE)
        config.write_text(config.read_text().replace("[inference]\n", "[inference]\nmeasure = true\n"))
        token = world.folder / "token"
        world.edgewarden("tokens", "create", "--uses", "1", "--label", "site=test", "--output", str(token))
        world.enrol(DEVICE, token)
        world.start_agent(DEVICE)
        world.wait("the device online", lambda: world.devices()[DEVICE].presence is PresenceState.ONLINE)
        world.edgewarden("models", "publish", str(EXAMPLES / "v1"), "--keys", str(world.keys))
        world.edgewarden("deploy", MODEL, "1", "--all")
        world.wait("version 1 committed", lambda: world.model_on(DEVICE).state is DeploymentState.COMMITTED)
        yield world
    finally:
        world.programs.stop_all()


def bench_file(world: World) -> Path:
    """Return where the figures lie: beside the stored bundle."""
    models = world.folder / DEVICE / "state" / "models"
    (found,) = models.glob("*.bench.json")
    assert (models / found.name.removesuffix(".bench.json")).is_dir()
    return found


def measured(world: World) -> list[Rung]:
    return msgspec.json.decode(bench_file(world).read_bytes(), type=list[Rung])


def served(world: World) -> tuple[str, str] | None:
    """Return the runtime and the threads that digits is served with, or None while it is not."""
    client = UnixClient(world.unix(DEVICE))
    try:
        status, config = client.ask("GET", f"/v2/models/{MODEL}/config")
    except OSError:
        return None
    finally:
        client.close()
    return (config["platform"], config["parameters"]["threads"]["string_value"]) if status == 200 else None


def as_served(rung: Rung) -> tuple[str, str]:
    platforms = {RuntimeName.LITERT: "tflite_litert", RuntimeName.TFLITE_RUNTIME: "tflite_runtime"}
    return platforms[rung.runtime], str(rung.threads)


def restart(world: World) -> None:
    before = world.programs.pid(DEVICE)
    world.programs.kill(DEVICE, signal.SIGTERM)
    world.wait("the agent started again", lambda: world.programs.pid(DEVICE) != before)
    world.wait("answers again", lambda: served(world))


def data_plane(world: World) -> int:
    """Return the process that serves: the oldest child that is one."""
    children = psutil.Process(world.programs.pid(DEVICE)).children()
    planes = [child for child in children if "agent.inference" in child.cmdline()]
    return min(planes, key=lambda child: child.create_time()).pid


def test_the_trial_measured_every_rung_and_the_model_runs_on_the_best(world: World) -> None:
    rungs = measured(world)
    assert {rung.runtime for rung in rungs} == set(RuntimeName)
    assert {1, os.cpu_count() or 1} <= {rung.threads for rung in rungs}
    assert not [rung for rung in rungs if rung.error]
    assert all(rung.p50_us > 0 and rung.golden > 0 for rung in rungs)
    best = choose(rungs)
    assert best
    assert served(world) == as_served(best)


def test_after_a_restart_nothing_is_measured_again_and_what_was_measured_decides(world: World) -> None:
    """The figures on disk are changed before the agent starts again, so that another rung is the best."""
    file, first = bench_file(world), choose(measured(world))
    other = next(runtime for runtime in RuntimeName if first and runtime is not first.runtime)
    doctored = [
        Rung(runtime=first.runtime, threads=1, p50_us=900, p95_us=900, golden=1),
        Rung(runtime=other, threads=2, p50_us=100, p95_us=100, golden=1),
    ]
    file.write_bytes(msgspec.json.encode(doctored))
    written = file.stat().st_mtime_ns
    restart(world)
    assert served(world) == as_served(doctored[1])
    os.kill(data_plane(world), signal.SIGKILL)
    world.wait("answers again", lambda: served(world))
    assert served(world) == as_served(doctored[1])
    world.wait("committed still", lambda: world.model_on(DEVICE).state is DeploymentState.COMMITTED)
    assert json.loads(file.read_bytes()) == json.loads(msgspec.json.encode(doctored))
    assert file.stat().st_mtime_ns == written
