"""``edgewarden-server``: reads the command line, runs the server until a signal, and ends in order."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import protocol
from fleet_server import errands
from fleet_server.config import BadConfig, ServerConfig, Settings, read_file, settle

EXIT_CODES = "Exit codes: 0 ended on request, 1 could not start or ended by itself, 2 wrong command line or settings."
_POLL = 1.0  # seconds between looks at whether the web still serves
_log = logging.getLogger("edgewarden-server")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parsed = _parser().parse_args(arguments)
    if parsed.command is None:
        _parser().print_help()
        return 2
    logging.basicConfig(level=parsed.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        config = settle(read_file(parsed.config) if parsed.config else Settings(), _flags(parsed))
    except BadConfig as error:
        _say(f"error: {error}")
        return 2
    if errands.is_one(parsed.command):
        return errands.run(parsed, config)
    return _ca(parsed, config) if parsed.command == "ca" else _serve(config)


def _ca(parsed: argparse.Namespace, config: ServerConfig) -> int:
    """Take a step of replacing the CA."""
    import msgspec

    from fleet_server.ca_rotation import run, sentences

    try:
        status = run(parsed.step, config, force=parsed.force)
    except Exception as error:  # noqa: BLE001 - whatever hinders it, the operator is told in one sentence
        _log.debug("no step was taken", exc_info=True)
        _say(f"error: {error}")
        return 1
    if parsed.json:
        sys.stdout.write(msgspec.json.encode(status).decode() + "\n")
    else:
        sys.stdout.writelines(line + "\n" for line in sentences(parsed.step, status))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgewarden-server", description="The fleet server of Edgewarden.", epilog=EXIT_CODES
    )
    version = f"edgewarden-server {protocol.__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", description="Run the server.", help="run the server", epilog=EXIT_CODES)
    serve.add_argument("--data", metavar="DIR", help="folder of everything that lasts")
    serve.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML; flags override them")
    serve.add_argument("--host", metavar="ADDRESS", help="listen here for devices (default: all addresses)")
    serve.add_argument("--console", metavar="HOST:PORT", help="console and API (default: 127.0.0.1:8080)")
    serve.add_argument("--devices", metavar="HOST:PORT", help="HTTPS for devices (default: port 8443)")
    serve.add_argument("--broker", metavar="HOST:PORT", help="MQTT for devices (default: port 8883)")
    serve.add_argument("--broker-admin-port", type=int, metavar="PORT", help="loopback port (default: 8884)")
    serve.add_argument(
        "--public-host",
        action="append",
        metavar="NAME",
        help="a name or address that devices use for this machine; may be repeated, the first is told to devices",
    )
    levels = ("debug", "info", "warning", "error")
    serve.add_argument("--log-level", default="info", choices=levels, help="how much is said on stderr")
    _add_ca(commands)
    errands.add_to(commands)
    return parser


def _add_ca(commands: Any) -> None:
    """Add ``ca`` (`argparse` does not name the type of what it adds to)."""
    ca = commands.add_parser(
        "ca",
        description="Replace the CA that devices pin.",
        help="replace the CA that devices pin",
        epilog=EXIT_CODES,
    )
    does = "status: which CAs are in force, and who renewed; rotate: make the next CA; retire: end the first one"
    ca.add_argument("step", choices=("status", "rotate", "retire"), metavar="STEP", help=does)
    ca.add_argument("--data", metavar="DIR", help="folder of everything that lasts; no server may run on it")
    ca.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML; flags override them")
    ca.add_argument("--force", action="store_true", help="retire though some devices did not renew: they enrol anew")
    ca.add_argument("--json", action="store_true", help="print one JSON object")
    ca.add_argument(
        "--log-level", default="warning", choices=("debug", "info", "warning", "error"), help="as for serve"
    )


def _flags(parsed: argparse.Namespace) -> Settings:
    if parsed.command != "serve":
        return Settings(data=parsed.data)
    return Settings(
        data=parsed.data,
        host=parsed.host,
        console=parsed.console,
        devices=parsed.devices,
        broker=parsed.broker,
        broker_admin_port=parsed.broker_admin_port,
        public_hosts=tuple(parsed.public_host) if parsed.public_host else None,
    )


def _serve(config: ServerConfig) -> int:
    """Start, wait for SIGINT or SIGTERM, stop."""
    from fleet_server.adapters.service_manager import ServiceManager
    from fleet_server.app import FleetServer

    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    manager = ServiceManager(os.environ.pop("NOTIFY_SOCKET", None))  # not for children: Mosquitto would say READY too
    try:
        server = FleetServer(config)
        server.start()
    except Exception as error:  # noqa: BLE001 - whatever a part cannot do, the operator is told in one sentence
        _log.debug("could not start", exc_info=True)
        _say(f"error: {error}")
        return 1
    try:
        _announce(server.console_url, config, server.new_password)
        manager.ready(f"console at {server.console_url}")
        while server.running and not ending.wait(_POLL):
            pass
    finally:
        manager.stopping()
        server.stop()
    return 0 if ending.is_set() else 1


def _announce(url: str, config: ServerConfig, password: str | None) -> None:
    _say(f"Edgewarden {protocol.__version__} is running. Console: {url}")
    if password is not None:
        _say(f"Log in as admin with the password {password}")
    _say(f"The first password is in {config.data / 'admin-password'}")


def _say(text: str) -> None:
    """Write for people on stderr: stdout stays free for programs."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
