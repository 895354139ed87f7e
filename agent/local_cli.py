"""``edgewarden-agent status | history | rollback | hold | verify | trust``: asks the running agent and prints.

Reads the command line's words and writes for people, or JSON with ``--json``. What is asked and answered stands in
``agent/local_api.py``.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from agent.adapters.local_socket import ask_agent
from agent.config import DEFAULT_CONFIG, read_settings
from agent.local_api import (
    SOCKET_NAME,
    AskHistory,
    AskStatus,
    AskTrust,
    AskVerify,
    BundleCheck,
    Denied,
    Done,
    History,
    LocalAnswer,
    LocalRequest,
    OrderHold,
    OrderRollback,
    Status,
    Step,
    TrustStatus,
    Verified,
)
from agent.ports import Trouble

_DURATION = re.compile(r"([0-9]{1,6})([smh]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def add_commands(commands: Any) -> None:
    """Add the commands to the agent's parser (`argparse` does not name the type of what it adds to)."""
    _command(commands, "status", "show what serves, what is under way, and how the device is connected")
    history = _command(commands, "history", "show what happened to the models of this device, newest first")
    history.add_argument("model", nargs="?", default="", metavar="MODEL", help="of this model only")
    history.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default: %(default)s)")
    rollback = _command(commands, "rollback", "serve the version before, without asking the fleet")
    rollback.add_argument("model", metavar="MODEL", help="name of the model")
    hold = _command(commands, "hold", "let no update disturb for a while")
    span = hold.add_mutually_exclusive_group(required=True)
    span.add_argument("--for", dest="seconds", type=_duration, metavar="TIME", help="such as 90s, 10m or 2h")
    span.add_argument("--release", dest="seconds", action="store_const", const=0, help="end the hold")
    _command(commands, "verify", "hash every stored bundle again; exit code 1 when one is damaged")
    _command(commands, "trust", "show which signed state this device holds; exit code 1 when it has expired")


def _command(commands: Any, name: str, does: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=does)
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="agent.toml (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, command=name)
    return parser


def run(options: argparse.Namespace) -> int:
    """Ask, print, and return the exit code."""
    state = Path(read_settings(options.config).device.state)
    try:
        answer = ask_agent(state / SOCKET_NAME, _request(options))
    except Trouble as trouble:
        return _fail(str(trouble))
    if isinstance(answer, Denied):
        return _fail(answer.why)
    if options.json:
        _say(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    else:
        for line in _lines(answer):
            _say(line)
    return _exit_code(answer)


def _request(options: argparse.Namespace) -> LocalRequest:
    match options.command:
        case "history":
            return AskHistory(limit=options.limit, model=options.model)
        case "rollback":
            return OrderRollback(model=options.model)
        case "hold":
            return OrderHold(seconds=options.seconds)
        case "verify":
            return AskVerify()
        case "trust":
            return AskTrust()
        case _:
            return AskStatus()


def _exit_code(answer: LocalAnswer) -> int:
    match answer:
        case Verified():
            return int(any(bundle.damage for bundle in answer.bundles))
        case TrustStatus():
            return int(answer.expired or bool(answer.problem))
        case _:
            return 0


# ---------------------------------------------------------------- for people
def _lines(answer: LocalAnswer) -> Sequence[str]:
    match answer:
        case Status():
            return _status_lines(answer)
        case History():
            return [_step_line(step) for step in answer.steps] or ["nothing has happened yet"]
        case TrustStatus():
            return _trust_lines(answer)
        case Verified():
            return _verified_lines(answer)
        case Done():
            return [answer.said]
        case _:
            return []


def _status_lines(status: Status) -> list[str]:
    server = "reporting" if status.server_up else "connected, server away" if status.connected else "not connected"
    spooled = f"{status.spooled_events} events and {status.spooled_reports} reports wait"
    plane = f"process {status.data_plane}" if status.data_plane else "starting"
    lines = [
        f"device      {status.device} (agent {status.agent})",
        f"fleet       {server}; {spooled}" + (f", {status.dropped_reports} dropped" * bool(status.dropped_reports)),
        f"data plane  {plane}",
    ]
    if status.trouble:
        lines.append(f"trouble     {status.trouble}")
    if status.certificate_expires:
        lines.append(f"certificate until {_time(status.certificate_expires)}")
    if status.shut_out:
        lines.append(f"SHUT OUT    the fleet server refuses this device, which serves on: {status.shut_out}")
    if status.hold_until:
        lines.append(f"updates     held until {_time(status.hold_until)}")
    for one in status.models:
        serving = f"serves {one.serving}" if one.serving is not None else "serves nothing"
        wanted = f", wants {one.wanted}" if one.wanted not in (None, one.serving) else ""
        earlier = f", before it {one.previous}" if one.previous is not None else ""
        why = ": ".join(part for part in (one.reason.value if one.reason else "", one.waits or one.detail) if part)
        lines.append(f"{one.model:<11} {serving}{wanted}{earlier}; {one.state.value} since {_time(one.since)}")
        if why:
            lines.append(f"{'':<11} {why}")
    return lines if status.models else [*lines, "no model yet"]


def _step_line(step: Step) -> str:
    reason = f" ({step.reason.value})" if step.reason else ""
    version = "-" if step.version is None else step.version
    return f"{_time(step.at)}  {step.model} {version}  {step.state.value}{reason}  {step.detail}".rstrip()


def _trust_lines(trust: TrustStatus) -> list[str]:
    lines = [
        f"device         {trust.device}",
        f"desired state  version {trust.director}" + (", expired: nothing new is installed" * trust.expired),
        f"names          {', '.join(trust.models) or 'no model'}",
        f"roots          director {trust.director_root}, image {trust.image_root}",
        f"clock floor    {_time(trust.clock_floor) if trust.clock_floor else 'none yet'}",
    ]
    return [*lines, f"problem        {trust.problem}"] if trust.problem else lines


def _verified_lines(verified: Verified) -> list[str]:
    return [_bundle_line(bundle) for bundle in verified.bundles] or ["no bundle is stored"]


def _bundle_line(bundle: BundleCheck) -> str:
    active = " (active)" if bundle.active else ""
    return f"{bundle.digest[:16]}  {bundle.model} {bundle.version}{active}  {bundle.damage or 'whole'}"


def _time(at: int) -> str:
    return datetime.fromtimestamp(at / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _duration(text: str) -> int:
    match = _DURATION.fullmatch(text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 90s, 10m or 2h")
    return int(match[1]) * _SECONDS[match[2]]


def _say(line: str) -> None:
    print(line)  # noqa: T201 - the answer


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the answer
    return 1
