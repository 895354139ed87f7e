"""``edgewarden-simulate``: simulated devices against a real server, for demonstrations and capacity planning."""

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from agent.ports import Trouble
from protocol import __version__
from simulator.device import Scene
from simulator.fleet import Fleet, device_of, identities_in
from simulator.traffic import Behaviour, Load

EXIT_CODES = "Exit codes: 0 ended on request or after --seconds, 1 too few enrolled identities, 2 wrong usage."
log = logging.getLogger("simulator")
_TOLD_EVERY = 10.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until interrupted; return the exit code."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("agent").setLevel(logging.WARNING)  # what one device says is noise among a thousand
    try:
        identities = identities_in(chosen.identity_dir, chosen.devices)
    except Trouble as trouble:
        print(trouble, file=sys.stderr)  # noqa: T201 - the program's own complaint
        return 1
    fleet = Fleet([device_of(identity, _scene(chosen), now=_now) for identity in identities])
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    _run(fleet, ended, chosen.seconds)
    return 0


def _run(fleet: Fleet, ended: threading.Event, seconds: float | None) -> None:
    began = told = time.monotonic()

    def over() -> bool:
        nonlocal told
        now = time.monotonic()
        if now - told >= _TOLD_EVERY:
            told = now
            log.info("%d devices, %d records await the server", len(fleet.devices), fleet.backlog())
        return ended.is_set() or (seconds is not None and now - began >= seconds)

    with fleet.running():
        fleet.run(over, wait=ended.wait)


def _scene(chosen: argparse.Namespace) -> Scene:
    return Scene(
        load=Load(requests_per_second=chosen.rate, classes=chosen.classes, labelled=chosen.labelled),
        behaviour=Behaviour(accuracy=chosen.accuracy, latency_us=chosen.latency_us, errors=chosen.errors),
        failing_versions=frozenset(chosen.failing_version),
        window=int(chosen.window * 1000),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgewarden-simulate",
        description="Simulated devices that speak to a real broker and server.",
        epilog=EXIT_CODES,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"edgewarden-simulate {__version__}", help="show the version")
    add("--identity-dir", type=Path, required=True, help="folder with one enrolled identity per sub-folder")
    add("--devices", type=int, help="how many of them to use (all)")
    add("--rate", type=float, default=1.0, help="requests per second and model (%(default)s)")
    add("--classes", type=int, default=10, help="classes of the models (%(default)s)")
    add("--accuracy", type=float, default=0.95, help="share of right answers (%(default)s)")
    add("--errors", type=float, default=0.0, help="share of failing requests (%(default)s)")
    add("--labelled", type=float, default=0.1, help="share of requests whose truth becomes known (%(default)s)")
    add("--latency-us", type=int, default=2000, help="median latency in µs (%(default)s)")
    add("--window", type=float, default=60.0, help="seconds per window, until the fleet sets it (%(default)s)")
    add("--failing-version", type=int, action="append", default=[], help="a version that fails its trial; repeatable")
    add("--seconds", type=float, help="end after this time (never)")
    return parser


def _now() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    sys.exit(main())
