"""``make demo``: runs the main story on real parts, prints what proves each step, and keeps the fleet running.

``--once`` exits instead: with 0 when every step was observed, with 1 and the failed step otherwise. Either way no
process is left behind.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from demo.story import steps
from demo.world import NotObserved, World
from fleet_server.cli.session import ApiError

FOLDER = Path(".demo")


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit when the story is told (make demo ONCE=1)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is put (default: %(default)s)")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell may have had it ignored in the background
        signal.signal(number, _interrupt)
    world = World(options.folder)
    try:
        told = _tell(world)
        if told and not options.once:
            _stay(world)
    except KeyboardInterrupt:
        print("\nstopping …")
        told = not options.once
    finally:
        for stream in world.streams.values():
            stream.stop()
        world.programs.stop_all()
    print("all processes have ended")
    return 0 if told else 1


def _tell(world: World) -> bool:
    began = time.monotonic()
    story = steps()
    for number, (title, act) in enumerate(story, 1):
        if sys.stdout.isatty():
            print(f"  {number:2}/{len(story)} {title} …", end="\r", flush=True)
        try:
            proof = act(world)
        except (NotObserved, ApiError, OSError, TimeoutError) as error:
            print(f"✗ {number:2} {title}\n     {error}", flush=True)
            _show_logs(world)
            return False
        print(f"✓ {number:2} {title}\n     {proof}", flush=True)
    print(f"\nThe whole story in {time.monotonic() - began:.0f} s. Logs and state: {world.folder}")
    return True


def _stay(world: World) -> None:
    world.restart_streams()
    print(f"\nConsole:  {world.console}/   user admin, password {world.password()}")
    print("Everything keeps running, with digits streaming. Ctrl-C ends it.", flush=True)
    while True:
        time.sleep(3600)


def _show_logs(world: World) -> None:
    for path in sorted((world.folder / "logs").glob("*.log")):
        print(f"--- end of {path}")
        print(world.programs.tail(path.stem))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
