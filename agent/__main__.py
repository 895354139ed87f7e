"""``edgewarden-agent``: enrol this device, run the agent, or serve models without a fleet.

Reads the command line and hands over; argparse keeps the control process small. Exit codes: 0 done, 1 a failure
that a person must see to, 2 wrong usage or settings.
"""

import argparse
import logging
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from protocol import __version__
from protocol.settings import BadSettings

if TYPE_CHECKING:
    from agent.config import AgentSettings

DEFAULT_CONFIG = "/etc/edgewarden/agent.toml"
MAX_TOKEN = 4096  # bytes
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["serve"], ["bench"]):
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
    parser = argparse.ArgumentParser(prog="edgewarden-agent", description="The Edgewarden agent of one edge device.")
    parser.add_argument("--version", action="version", version=f"edgewarden-agent {__version__}")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    enroll = commands.add_parser("enroll", help="make this device a member of a fleet")
    enroll.add_argument("--server", required=True, metavar="URL", help="device port of the server, https://host:8443")
    enroll.add_argument(
        "--token-file", metavar="FILE", help="enrolment token; - is standard input (default: $EW_TOKEN)"
    )
    enroll.add_argument("--device", metavar="ID", help="id of this device (default: its host name)")
    enroll.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="agent.toml (default: %(default)s)")
    enroll.add_argument("--force", action="store_true", help="replace the certificate of an enrolled device")
    enroll.set_defaults(run=_enroll)

    run = commands.add_parser("run", help="run the agent (the systemd service does this)")
    run.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="agent.toml (default: %(default)s)")
    run.set_defaults(run=_run)

    commands.add_parser("bench", help="measure a model on every runtime and number of threads here", add_help=False)
    commands.add_parser("serve", help="serve bundles or .tflite files without a fleet", add_help=False)
    return parser


def _enroll(options: argparse.Namespace) -> int:
    from agent.adapters.download import HttpsEnrolment
    from agent.adapters.identity import IdentityFolder
    from agent.enrolment import enrol
    from agent.ports import AgentError, Weather

    settings = _settings(options.config)
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

    settings = _settings(options.config)
    try:
        Daemon(settings).run()
    except (AgentError, CannotListen, OSError) as error:
        return _fail(str(error), 1)
    return 0


def _serve(arguments: list[str]) -> int:
    """Become the data plane alone: the control process never imports it."""
    os.execv(sys.executable, [sys.executable, "-m", "agent.inference", *arguments])  # noqa: S606 - no shell is wanted


def _settings(path: str) -> "AgentSettings":
    from agent.config import AgentSettings, load_settings

    if path == DEFAULT_CONFIG and not Path(path).exists():
        return AgentSettings()
    return load_settings(Path(path))


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
