"""Measures what the agent costs a device that has little: memory and idle CPU of control and of the data plane.

Control is a real agent that has enrolled with a real server over a real broker and taken one signed update. The data
plane serves digits, on each runtime in turn. Memory is the proportional set size; CPU is read while nobody asks. What
a spare data plane costs is the difference that it makes to all of it.
"""

import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from parts import ROOT, RUNTIMES, cpu_seconds, note, options, pss_mb, result, until

from demo.story import make_keys, start_server
from demo.world import DEVICES, MODEL, World
from protocol.states import DeploymentState, PresenceState

DEVICE = DEVICES[0]
TELEMETRY = "window_seconds = 60"  # as shipped; the demo's 2 s are for people who watch


def main() -> None:
    """Answer the question; ``--rounds`` is the number of seconds that idle CPU is read."""
    given = options(__doc__ or "", 30)
    seconds = 5 if given.quick else given.rounds
    result("footprint", **{runtime: measure(runtime, seconds) for runtime in RUNTIMES})


def measure(runtime: str, seconds: int) -> dict[str, float]:
    """Return memory and idle CPU of an agent after one update."""
    with TemporaryDirectory(prefix="edgewarden-bench-") as folder:
        world = World(Path(folder) / "world")
        try:
            note(f"a server, and an agent on {runtime}")
            update_once(world, runtime)
            without = idle(world, seconds)
            return {**without, "spare_mb": spare(world)}
        finally:
            world.programs.stop_all()


def update_once(world: World, runtime: str) -> None:
    """Enrol one device and let it take one update."""
    start_server(world)
    make_keys(world)
    config = world.config(DEVICE)
    text = config.read_text().replace("window_seconds = 2", TELEMETRY)
    config.write_text(text.replace("[inference]", f'[inference]\nruntime = "{runtime}"\nspare = "off"'))
    token = world.folder / "token"
    world.edgewarden("tokens", "create", "--uses", "1", "--label", "site=bench", "--output", str(token))
    world.enrol(DEVICE, token)
    world.start_agent(DEVICE)
    world.wait("the device online", lambda: world.devices()[DEVICE].presence is PresenceState.ONLINE)
    bundle = ROOT / "examples" / "digits" / "v1"
    world.edgewarden("models", "publish", str(bundle), "--keys", str(world.keys))
    world.edgewarden("deploy", MODEL, "1", "--all")
    world.wait("version 1 committed", lambda: world.model_on(DEVICE).state is DeploymentState.COMMITTED)


def idle(world: World, seconds: int) -> dict[str, float]:
    """Return what the two processes take while nobody asks."""
    control = world.programs.pid(DEVICE)
    (child,) = children(control)
    time.sleep(5)  # what the update left to do
    before = cpu_seconds(control), cpu_seconds(child)
    time.sleep(seconds)
    used = cpu_seconds(control) - before[0], cpu_seconds(child) - before[1]
    figures = {
        "control_mb": round(pss_mb(control), 1),
        "data_plane_mb": round(pss_mb(child), 1),
        "control_cpu_percent": round(used[0] / seconds * 100, 3),
        "data_plane_cpu_percent": round(used[1] / seconds * 100, 3),
    }
    note(f"  {figures}")
    return figures


def spare(world: World) -> float:
    """Start the agent again, and return by how much its processes grow with a spare, in MB."""
    config, before = world.config(DEVICE), world.programs.pid(DEVICE)
    config.write_text(config.read_text().replace('spare = "off"', 'spare = "on"'))
    world.programs.kill(DEVICE, signal.SIGTERM)
    until(lambda: world.programs.pid(DEVICE) != before and len(children(world.programs.pid(DEVICE))) == 1)
    time.sleep(3)  # the model is loaded
    alone = family_mb(world)
    until(lambda: len(children(world.programs.pid(DEVICE))) > 1)
    time.sleep(3)  # the spare has imported what it needs
    figure = round(family_mb(world) - alone, 1)
    note(f"  a spare: {figure} MB")
    return figure


def family_mb(world: World) -> float:
    """Return what control and its children take together, in MB."""
    control = world.programs.pid(DEVICE)
    return sum(pss_mb(pid) for pid in (control, *children(control)))


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    found = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in found for child in text.split()]


if __name__ == "__main__":
    main()
