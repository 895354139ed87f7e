"""Writes cli.md, states.md and access.md from the programs themselves: ``python docs/reference/generate.py``.

Looks at parsers, tables and enums instead of capturing help texts, so that the pages do not depend on a terminal or
on a library's layout. A test makes the pages anew in memory and compares.
"""
# ruff: noqa: INP001, SLF001 - a script beside what it writes; neither the programs nor argparse show parsers publicly

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

import agent.__main__ as agent_program
import agent.inference.__main__ as data_plane
import converters.__main__ as convert_program
import fleet_server.__main__ as server_program
import fleet_server.cli.__main__ as operator_program
import simulator.__main__ as simulator_program
from agent.core import deployment
from agent.core.deployment import Deployment, Happened
from fleet_server.core.access import Permission, Role, permissions_of
from fleet_server.web.auth import rule_of
from fleet_server.web.console_app import console_litestar
from protocol import states

HERE = Path(__file__).parent
NOTICE = "<!-- Written by generate.py from the programs. Change them, then run: python docs/reference/generate.py -->"
_MEMBER = re.compile(r"^    (\w+) = \"[^\"]*\"(?:  # (.*))?$", re.MULTILINE)


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {"cli.md": _cli_page(), "states.md": _states_page(), "access.md": _access_page()}


# ---------------------------------------------------------------- command line: what every parser can say
@dataclass(frozen=True, kw_only=True)
class Option:
    """An option or argument."""

    words: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command as a person types it."""

    name: str
    does: str
    options: tuple[Option, ...]
    exit_codes: str = ""  # where they are not those of the whole program


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program; the first of its commands is the program itself."""

    whose: str
    commands: tuple[Command, ...]
    exit_codes: str


def programs() -> tuple[Program, ...]:
    """Return everything that a person can type."""
    return (
        _program("On the device", _agent_commands(), agent_program),
        _program("The fleet server", _of_argparse(server_program._parser()), server_program),
        _program("For operators", _of_typer(operator_program.app, "edgewarden"), operator_program),
        _program("For bundles", _of_typer(convert_program.program, "edgewarden-convert"), convert_program),
        _program("A simulated fleet", _of_argparse(simulator_program._parser()), simulator_program),
    )


def _program(whose: str, commands: Iterable[Command], module: Any) -> Program:
    return Program(whose=whose, commands=tuple(commands), exit_codes=module.EXIT_CODES)


def _cli_page() -> str:
    lines = ["# Command line", "", NOTICE, ""]
    lines += ["Five programs. Each says `--help`. Environment of `edgewarden`: `EDGEWARDEN_SERVER` (address of the"]
    lines += ["console), `EDGEWARDEN_TOKEN` (an API token, instead of a log-in), `EDGEWARDEN_USER` and"]
    lines += [
        "`EDGEWARDEN_PASSWORD` (log in by themselves, as `admin` unless said), `EDGEWARDEN_CA` (PEM file, signs the"
    ]
    lines += [
        "console's certificate, served over TLS). `edgewarden-agent enroll` takes the token from `EW_TOKEN` when no"
    ]
    lines += ["file is named.", ""]
    for program in programs():
        lines += [f"## {program.whose}: {program.commands[0].name}", "", program.exit_codes, ""]
        for command in program.commands:
            lines += _command_lines(command)
    return "\n".join(lines).rstrip() + "\n"


def _command_lines(command: Command) -> Iterator[str]:
    yield from (f"### {command.name}", "")
    if command.does:
        yield from (f"{command.does} {command.exit_codes}".rstrip(), "")
    if command.options:
        yield from ("| option | default | meaning |", "|---|---|---|")
        yield from (f"| {one.words} | {one.default} | {_cell(one.meaning)} |" for one in command.options)
        yield ""


def _agent_commands() -> Iterator[Command]:
    """Return the agent's commands; control hands some on unread, and the data plane parses them."""
    handed_on = {command.name: command for command in _of_argparse(data_plane._parser()) if command.exit_codes}
    for command in _of_argparse(agent_program._parser()):
        yield handed_on.get(command.name, command)


# ---------------------------------------------------------------- argparse
def _of_argparse(parser: argparse.ArgumentParser, does: str = "") -> Iterator[Command]:
    yield Command(
        name=parser.prog,
        does=_sentence(does or parser.description or ""),
        options=tuple(_argparse_option(action, parser.prog) for action in parser._actions if _counts(action)),
        exit_codes=_exit_codes(parser),
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help for choice in action._choices_actions}
            for name, sub in action.choices.items():
                yield from _of_argparse(sub, said.get(name) or "")


def _exit_codes(parser: argparse.ArgumentParser) -> str:
    """Return a command's own exit codes; those of a whole program are said once."""
    own = parser.epilog or ""
    whole = {program.EXIT_CODES for program in (agent_program, server_program, simulator_program)}
    return "" if own in whole else own


def _counts(action: argparse.Action) -> bool:
    hidden = action.help == argparse.SUPPRESS
    return not hidden and not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)


def _argparse_option(action: argparse.Action, prog: str) -> Option:
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.choices:
        value = "\\|".join(str(choice) for choice in action.choices)
    words = [f"{word} {value}".strip() for word in action.option_strings] or [f"{value}{_repeats(action)}"]
    return Option(
        words=_code(words),
        default=_default(action.default, required=action.required),
        meaning=(action.help or "") % {**vars(action), "prog": prog},
    )


def _repeats(action: argparse.Action) -> str:
    return " …" if action.nargs == "+" else ""


# ---------------------------------------------------------------- Typer
def _of_typer(app: typer.Typer, name: str) -> Iterator[Command]:
    return _walk(typer.main.get_command(app), name)


def _walk(command: Any, name: str) -> Iterator[Command]:
    options = tuple(_typer_option(parameter) for parameter in command.params if parameter.name != "help")
    yield Command(name=name, does=_sentence(inspect.cleandoc(command.help or "")), options=options)
    for word, sub in getattr(command, "commands", {}).items():
        yield from _walk(sub, f"{name} {word}")


def _typer_option(parameter: Any) -> Option:
    if parameter.param_type_name == "argument":
        words = [parameter.name.upper() + (" …" if parameter.nargs == -1 else "")]
    else:
        value = "" if parameter.is_flag else f" {parameter.opts[0].lstrip('-').replace('-', '_').upper()}"
        words = [f"{word}{value}" for word in parameter.opts]
    return Option(
        words=_code(words),
        default=_default(parameter.default, required=parameter.required),
        meaning=parameter.help or "",
    )


# ---------------------------------------------------------------- who may do what
def _access_page() -> str:
    lines = ["# Roles and permissions", "", NOTICE, ""]
    lines += [
        "How to give them: [users, roles and tokens](../how-to/users-and-roles.md). A permission is also a scope of"
    ]
    lines += ["API tokens; a token never has more than its user has.", "", "## Roles", ""]
    lines += ["| permission | " + " | ".join(role.value for role in Role) + " | lets one |"]
    lines += ["|---|" + "---|" * (len(Role) + 1)]
    for permission, said in _members(Permission):
        marks = [("yes" if permission in permissions_of(role) else "") for role in Role]
        lines += [f"| {permission.value} | {' | '.join(marks)} | {said} |"]
    lines += [
        "",
        "## Routes",
        "",
        "*anybody* needs no log-in, *known* any user or API token, *person* a log-in and no",
    ]
    lines += ["API token. Where a key is *kept*, an `Idempotency-Key` makes a repeat safe for a day.", ""]
    lines += ["| route | needs | repeats |", "|---|---|---|", *sorted(_routes())]
    return "\n".join(lines) + "\n"


def _routes() -> Iterator[str]:
    nothing: Any = None  # nothing is asked of them before a request comes
    for route in console_litestar(nothing, nothing).routes:
        for method, (handler, _) in getattr(route, "route_handler_map", {}).items():
            rule = rule_of(handler)
            if method != "OPTIONS" and rule is not None:
                kept = "kept" if handler.opt.get("repeatable") else ""
                yield f"| `{route.path} {method}` | {rule.value} | {kept} |"


# ---------------------------------------------------------------- states
def _states_page() -> str:
    lines = ["# States, reasons, events", "", NOTICE, "", "## Where an update stands on a device", ""]
    lines += ["One machine per model, [agent/core/deployment.py](../../agent/core/deployment.py). A state is on disk"]
    lines += ["before its effect runs, so after a power cut the effect in the last column runs again.", ""]
    lines += ["| state | meaning | after a restart |", "|---|---|---|"]
    lines += [
        f"| {s.value} | {said} | {deployment.RESUME[s].value} |" for s, said in _members(states.DeploymentState)
    ]
    lines += ["", "```mermaid", "stateDiagram-v2", *_diagram(), "```", ""]
    lines += ["An event that a state does not expect changes nothing. *Once too often* is counted by:", ""]
    lines += [f"- `{name}` = {getattr(deployment, name)}" for name in _MAXIMA]
    lines += ["", "| state | event | next state | effect |", "|---|---|---|---|"]
    lines += [f"| {edge.start.value} | {edge.label} | {edge.end.value} | {edge.effect} |" for edge in _edges()]
    for enum, title, words in _LISTS:
        lines += ["", f"## {title}", "", words, "", "| value | meaning |", "|---|---|"]
        lines += [f"| {member.value} | {said} |" for member, said in _members(enum)]
    return "\n".join(lines) + "\n"


_MAXIMA = (
    "MAX_DOWNLOAD_TRIES",
    "MAX_SHADOW_TRIES",
    "MAX_SWAP_TRIES",
    "MAX_PROBATION_CRASHES",
    "MAX_PROBATION_INTERRUPTIONS",
    "MAX_TAKE_UPS",
)
_LISTS: tuple[tuple[type[Enum], str, str], ...] = (
    (deployment.Event, "What can happen to an update", "The events of the machine."),
    (deployment.Effect, "What the agent does on entering a state", "The effects of the machine."),
    (states.RejectReason, "Why a device refused or gave up", "Beside a state, and in events."),
    (states.EventKind, "What an event is about", "Shown by `edgewarden events`."),
    (states.CommandState, "What became of a command", "Shown by `edgewarden commands`."),
    (states.PresenceState, "What the server believes of a connection", "Shown by `edgewarden devices list`."),
)


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One way from a state to the next."""

    start: states.DeploymentState
    label: str
    end: states.DeploymentState
    effect: str


def _edges() -> Iterator[Edge]:
    """Return the table's rows, and after them where a counter at its maximum or a restart leads elsewhere."""
    for (start, event), (end, effect) in deployment.TABLE.items():
        yield Edge(start=start, label=event.value, end=end, effect=effect.value)
    for (start, event), (end, _) in deployment.TABLE.items():
        record, effect = deployment.advance(_exhausted(start), Happened(event=event), 0)
        if end is states.DeploymentState.SHADOW and start is not end:
            yield _bent(start, f"{event.value}, no shadow asked for", record, effect)
        elif record.state is not end:
            yield _bent(start, f"{event.value} once too often", record, effect)
    for start in deployment.RESUME:
        record, effect = deployment.resume(_exhausted(start), None, 0)
        if record.state is not start:
            yield _bent(start, "agent restarted once too often", record, effect)


def _exhausted(state: states.DeploymentState) -> Deployment:
    """Return a record whose counters are one step before their maximum."""
    return Deployment(
        model="any",
        state=state,
        download_tries=deployment.MAX_DOWNLOAD_TRIES - 1,
        shadow_tries=deployment.MAX_SHADOW_TRIES - 1,
        swap_tries=deployment.MAX_SWAP_TRIES - 1,
        taken_up=(0,) * deployment.MAX_TAKE_UPS,
        crashes=deployment.MAX_PROBATION_CRASHES - 1,
        interruptions=deployment.MAX_PROBATION_INTERRUPTIONS,
    )


def _bent(start: states.DeploymentState, label: str, record: Deployment, effect: deployment.Effect) -> Edge:
    reason = f" ({record.reason.value})" if record.reason else ""
    return Edge(start=start, label=label + reason, end=record.state, effect=effect.value)


def _diagram() -> Iterator[str]:
    labels: dict[tuple[states.DeploymentState, states.DeploymentState], list[str]] = {}
    for edge in _edges():
        labels.setdefault((edge.start, edge.end), []).append(edge.label)
    yield f"    [*] --> {states.DeploymentState.IDLE.name}"
    for state in states.DeploymentState:
        yield f'    state "{state.value}" as {state.name}'
    for (start, end), said in labels.items():
        yield f"    {start.name} --> {end.name}: {', '.join(said)}"


def _members(enum: type[Enum]) -> Iterator[tuple[Any, str]]:
    """Return each member with the comment that stands beside it."""
    said = dict(_MEMBER.findall(inspect.getsource(enum)))
    for member in enum:
        yield member, said[member.name] or "as the name says"


# ---------------------------------------------------------------- words
def _default(value: object, *, required: bool) -> str:
    if required:
        return "required"
    if value is None or value is False or value in ("", [], (), argparse.SUPPRESS):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


if __name__ == "__main__":
    main()
