"""``edgewarden-agent``: enrol this device, run the agent, or serve models without a fleet.

Reads the command line and hands over; argparse keeps the control process small. ``serve`` and ``bench`` are the data
plane's own commands.
"""

import argparse
import logging
import os
import platform
import sys
from pathlib import Path

from agent.config import DEFAULT_CONFIG, read_settings
from agent.local_cli import add_commands
from protocol import __version__
from protocol.settings import BadSettings

EXIT_CODES = "Exit codes: 0 done, 1 a failure that a person must see to, 2 wrong usage or settings."
MAX_TOKEN = 4096  # bytes
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if _is_for_data_plane(arguments):
        return _serve(arguments)
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)  # it tells of every tick
    try:
        run: int = options.run(options)
    except BadSettings as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return 130
    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgewarden-agent", description="The Edgewarden agent of one edge device.", epilog=EXIT_CODES
    )
    version = f"edgewarden-agent {__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version")
    levels = ["debug", "info", "warning", "error"]
    parser.add_argument("--log-level", default="info", choices=levels, help="how much is said on stderr")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    joins = "make this device a member of a fleet"
    enroll = commands.add_parser("enroll", description=joins, help=joins, epilog=EXIT_CODES)
    enroll.add_argument("--server", required=True, metavar="URL", help="device port of the server, https://host:8443")
    enroll.add_argument(
        "--token-file", metavar="FILE", help="enrolment token; - is standard input (default: $EW_TOKEN)"
    )
    enroll.add_argument("--device", metavar="ID", help="id of this device (default: its host name)")
    enroll.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="agent.toml (default: %(default)s)")
    enroll.add_argument("--force", action="store_true", help="replace the certificate of an enrolled device")
    enroll.set_defaults(run=_enroll)

    runs = "run the agent (the systemd service does this)"
    run = commands.add_parser("run", description=runs, help=runs, epilog=EXIT_CODES)
    run.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="agent.toml (default: %(default)s)")
    run.set_defaults(run=_run)

    add_commands(commands)
    commands.add_parser("bench", help="measure a model on every runtime and number of threads here", add_help=False)
    commands.add_parser("serve", help="serve bundles or .tflite files without a fleet", add_help=False)
    return parser


def _enroll(options: argparse.Namespace) -> int:
    from agent.adapters.device_api import HttpsEnrolment
    from agent.adapters.identity import IdentityFolder
    from agent.enrolment import enrol
    from agent.ports import AgentError, Weather

    settings = read_settings(options.config)
    device = options.device or platform.node().split(".")[0].lower()
    folder = Path(settings.device.state) / "identity"
    try:
        token = _token(options.token_file)
        server = HttpsEnrolment(options.server)
        enrol(token=token, device=device, server=server, credentials=IdentityFolder(folder), force=options.force)
    except Weather as error:
        return _fail(f"{error}. Nothing was changed; try again when the server can be reached", 1)
    except (AgentError, OSError) as error:
        return _fail(str(error), 1)
    print(f"device {device} is enrolled at {options.server}; its identity is in {folder}")  # noqa: T201 - the answer
    return 0


def _run(options: argparse.Namespace) -> int:
    from agent.daemon import Daemon
    from agent.listening import CannotListen
    from agent.ports import AgentError
    from agent.stranded import Stranded, has_served, trouble_with_identity

    settings = read_settings(options.config)
    try:
        trouble = trouble_with_identity(settings)
        if trouble and has_served(settings) and not Stranded(settings, trouble, log_level=options.log_level).run():
            return 0  # told to stop
        Daemon(settings, log_level=options.log_level).run()
    except (AgentError, CannotListen, OSError) as error:
        return _fail(str(error), 1)
    return 0


def _is_for_data_plane(arguments: list[str]) -> bool:
    """Tell whether the command is one of the data plane's; only the log level may stand before it."""
    before = 2 if arguments[:1] == ["--log-level"] else int("".join(arguments[:1]).startswith("--log-level="))
    return arguments[before : before + 1] in (["serve"], ["bench"])


def _serve(arguments: list[str]) -> int:
    """Become the data plane alone: the control process never imports it."""
    os.execv(sys.executable, [sys.executable, "-m", "agent.inference", *arguments])  # noqa: S606 - no shell is wanted


def _token(file: str | None) -> str:
    from agent.ports import Trouble

    if file == "-":
        return sys.stdin.read(MAX_TOKEN)
    if file is None:
        if token := os.environ.get("EW_TOKEN"):
            return token
        raise Trouble("no enrolment token was given", remedy="Use --token-file FILE, --token-file - or $EW_TOKEN")
    try:
        with Path(file).open() as stream:
            return stream.read(MAX_TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise Trouble(f"the token file {file} cannot be read: {error}") from error


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the answer
    return code


if __name__ == "__main__":
    sys.exit(main())
