"""A real agent with a real data plane, killed by SIGKILL at chance moments of updates; for `crash_sweep.py`.

The real server, the real broker and one device, as in the demo. Each round orders the other version, waits for a
moment drawn by chance, kills the agent (its data plane and its trial die with it), lets it be started again, and
looks at what the sweep looks at: what serves, what state the machine is in, what lies in the state folder.
"""

import http.client
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from demo import story
from demo.world import EXAMPLES, MODEL, World
from protocol.states import DeploymentState

DEVICE = "edge-1"
LONGEST_WAIT = 4.0  # seconds between the order and the kill: an update takes about so long
PATIENCE = 60.0
_LEFT = re.compile(r"\..*\.tmp|.*\.(part|delta|made|no-delta|ewb|unreadable|damaged)|\.staging")


@contextmanager
def fleet(folder: Path) -> Iterator[World]:
    """Yield a fleet of one device that serves version 1, with version 2 published."""
    world = World(folder)
    try:
        story.start_server(world)
        story.make_keys(world)
        token = world.folder / "token"
        world.edgewarden("tokens", "create", "--uses", "1", "--output", str(token))
        world.enrol(DEVICE, token)
        world.start_agent(DEVICE)
        for example in ("v1", "v2"):
            world.edgewarden("models", "publish", str(EXAMPLES / example), "--keys", str(world.keys))
        order(world, 1)
        settled(world, 1)
        yield world
    finally:
        world.programs.stop_all()


def order(world: World, version: int) -> None:
    """Have the device run a version; forced, for so many orders within an hour are a loop."""
    world.edgewarden("deploy", MODEL, str(version), "--device", DEVICE, "--force")


def settled(world: World, version: int) -> None:
    """Wait until a version is committed there, as the server sees it."""

    def is_committed() -> bool:
        model = world.model_on(DEVICE)
        return (version, DeploymentState.COMMITTED) == (model.running_version, model.state)

    world.wait(f"version {version} committed", is_committed, PATIENCE)


def serving(world: World) -> int | None:
    """Return the version that the agent on the device says it serves."""
    status = world.local(DEVICE, "status", "--json")
    return next((model["serving"] for model in status["models"] if model["model"] == MODEL), None)


def answers(world: World) -> bool:
    """Tell whether the model takes requests."""
    connection = http.client.HTTPConnection("127.0.0.1", world.ports.inference[DEVICE], timeout=5)
    try:
        connection.request("GET", f"/v2/models/{MODEL}/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except http.client.HTTPException:
        return False
    finally:
        connection.close()


def kill_rounds(
    folder: Path, rounds: int, seed: int, told: Callable[[int, int], None]
) -> tuple[list[str], list[float]]:
    """Kill so often; return what was wrong, and how long each restart took until a model served (ms)."""
    dice, problems, took = random.Random(seed), [], []
    with fleet(folder) as world:
        for number in range(rounds):
            version = 2 - number % 2
            order(world, version)
            time.sleep(dice.uniform(0, LONGEST_WAIT))
            starts = world.programs._programs[DEVICE].starts
            world.programs.kill(DEVICE)
            began = time.perf_counter()
            world.wait(
                "the restart", lambda before=starts: world.programs._programs[DEVICE].starts > before, PATIENCE
            )
            world.wait("a model that serves", lambda: answers(world), PATIENCE)
            took.append((time.perf_counter() - began) * 1000)
            settled(world, version)
            problems += [f"kill {number}: {said}" for said in _wrong(world, version)]
            told(number + 1, rounds)
    return problems, took


def _is_restarted(world: World, starts: int) -> bool:
    return world.programs._programs[DEVICE].starts > starts


def _wrong(world: World, version: int) -> list[str]:
    problems = []
    if serving(world) != version:
        problems.append(f"{serving(world)} serves, not {version}")
    state = world.folder / DEVICE / "state"
    time.sleep(0.5)  # the last event may still be on its way into the spool
    left = (place for place in state.rglob("*") if _LEFT.fullmatch(place.name))
    problems += [f"{place.relative_to(state)} is left" for place in left]
    damage = [bundle["damage"] for bundle in world.local(DEVICE, "verify", "--json")["bundles"] if bundle["damage"]]
    return [*problems, *damage]
