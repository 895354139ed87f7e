"""Commands on the server: stored before they are sent, sent until they are answered, and what people see of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_world import enrol, rows_of
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Key, Signature
from typer.testing import CliRunner
from web_world import Web, running_web

from fleet_server.adapters.database.commands import DatabaseCommands
from fleet_server.api_types import CommandRequest, CommandView
from fleet_server.cli import commands as cli
from fleet_server.cli.__main__ import app
from fleet_server.commands import CannotCommand, Commands
from fleet_server.ports import Batch
from protocol.commands import (
    MAX_LIFE_MS,
    PAYLOAD_TYPE,
    Command,
    RestartDataPlaneCommand,
    SelfTestCommand,
    decode_command,
)
from protocol.messages import CommandEnvelope, Reply
from protocol.states import CommandOutcome, CommandState, RejectReason

DIGITS = CommandRequest(command=SelfTestCommand(model="digits"))
RESTART = CommandRequest(command=RestartDataPlaneCommand(), life_seconds=30)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("commands")) as running:
        enrol(running.engine, "cam-1", "cam-2", "cam-3", "cam-4", "cam-5", "cam-6", "cam-7", "cam-8", "cam-9")
        yield running


def give(web: Web, device: str, request: CommandRequest = DIGITS) -> CommandView:
    return web.parts.commands.give(device, request, "ada", web.clock())


def sent_to(web: Web, device: str) -> list[tuple[CommandEnvelope, int]]:
    return [(envelope, life) for to, envelope, life in web.uplink.commands if to == device]


def look(web: Web, device: str) -> list[tuple[str, CommandState]]:
    return [(one.id, one.state) for one in web.parts.commands.of(device, 50, web.clock())]


def answer(
    web: Web,
    device: str,
    command: str,
    number: int = 1,
    outcome: CommandOutcome = CommandOutcome.DONE,
    **more: object,
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Store a reply; return what is acknowledged of replies."""
    facts = {"spool": f"s-{device}", "sequence": number, "at": 1, "command": command, "outcome": outcome}
    reply = Reply(**(facts | more))  # type: ignore[arg-type]  # facts of the story
    ((_, told),) = web.telemetry.store(Batch(replies=[(device, reply)], received_at=web.clock()))
    return told.replies, told.missing_replies


# ---------------------------------------------------------------- giving
def test_a_command_is_signed_by_the_directors_targets_key_for_one_device(web: Web) -> None:
    given = give(web, "cam-1", RESTART)
    ((envelope, life),) = sent_to(web, "cam-1")
    assert 30 == life
    command = decode_command(envelope.payload)
    assert ("cam-1", given.id, RESTART.command) == (command.device, command.id, command.command)
    assert 30_000 == command.expires - command.issued
    described = json.loads(web.parts.director.online_keys()["targets"])
    key = Key.from_dict(described.pop("keyid"), described)
    signatures = {one.keyid: Signature(one.keyid, one.sig.hex()) for one in envelope.signatures}
    Envelope(envelope.payload, PAYLOAD_TYPE, signatures).verify([key], 1)


def test_sequences_grow_whatever_the_clock_does(web: Web) -> None:
    commands, ahead = web.parts.commands, web.clock()
    for now in (ahead, ahead, ahead - 5_000_000, ahead + 7):
        commands.give("cam-2", DIGITS, "ada", now)
    sequences = [decode_command(envelope.payload).sequence for envelope, _ in sent_to(web, "cam-2")]
    assert [ahead, ahead + 1, ahead + 2, ahead + 7] == sequences


@pytest.mark.parametrize("ready", [True, False], ids=["unknown device", "no roots yet"])
def test_who_cannot_be_commanded_is_said_and_nothing_is_stored(web: Web, ready: bool) -> None:
    parts = web.parts
    before = rows_of(web.engine, "command")
    commands = Commands(
        registry=parts.registry,
        store=DatabaseCommands(web.engine),
        signer=parts.director,  # type: ignore[arg-type]  # the folder's director signs both
        uplink=web.uplink,
        new_id=lambda: "id",
        is_ready=lambda: ready,
    )
    with pytest.raises(CannotCommand, match="no device" if ready else "keys init"):
        commands.give("stranger" if ready else "cam-1", DIGITS, "ada", web.clock())
    assert before == rows_of(web.engine, "command")


def test_what_waits_is_sent_again_and_what_is_answered_or_over_is_not(web: Web) -> None:
    answered, waiting = give(web, "cam-3"), give(web, "cam-3")
    give(web, "cam-3", RESTART)
    answer(web, "cam-3", answered.id)
    first = {decode_command(envelope.payload).id: envelope for envelope, _ in sent_to(web, "cam-3")}
    web.uplink.commands.clear()
    web.parts.commands.send_waiting("cam-3", web.clock() + 31_000)
    ((again, life),) = sent_to(web, "cam-3")
    assert first[waiting.id] == again
    assert 560 < life < 570
    web.uplink.commands.clear()
    web.parts.commands.send_waiting(None, web.clock() + 31_000)
    assert 1 == len(sent_to(web, "cam-3"))


# ---------------------------------------------------------------- answers
def test_the_first_answer_is_the_last_word(web: Web) -> None:
    given = give(web, "cam-4")
    assert (1, ()) == answer(web, "cam-4", given.id, 1, CommandOutcome.FAILED, detail="it did not agree")
    assert (2, ()) == answer(web, "cam-4", given.id, 2, CommandOutcome.DONE)
    (view,) = web.parts.commands.of("cam-4", 50, web.clock())
    assert (CommandState.FAILED, "it did not agree", "ada") == (view.state, view.detail, view.by)
    assert view.answered_at


def test_a_reply_that_comes_twice_or_out_of_order_counts_once_and_holes_are_told(web: Web) -> None:
    one, two = give(web, "cam-5"), give(web, "cam-5")
    assert (2, ((1, 1),)) == answer(web, "cam-5", two.id, 2)
    assert (2, ((1, 1),)) == answer(web, "cam-5", two.id, 2)
    assert (2, ()) == answer(web, "cam-5", one.id, 1)
    assert [CommandState.DONE] * 2 == [state for _, state in look(web, "cam-5")]


def test_nobody_answers_for_another_device(web: Web) -> None:
    given = give(web, "cam-6")
    answer(web, "cam-7", given.id)
    assert [(given.id, CommandState.WAITING)] == look(web, "cam-6")


def test_without_an_answer_it_expires_and_a_late_answer_is_still_told(web: Web) -> None:
    given = give(web, "cam-7", RESTART)
    late = given.expires_at
    assert CommandState.WAITING is web.parts.commands.of("cam-7", 1, late - 1)[0].state
    assert CommandState.EXPIRED is web.parts.commands.of("cam-7", 1, late)[0].state
    answer(web, "cam-7", given.id, 2, CommandOutcome.REFUSED, reason=RejectReason.EXPIRED)
    view = web.parts.commands.of("cam-7", 1, late)[0]
    assert (CommandState.REFUSED, RejectReason.EXPIRED) == (view.state, view.reason)


# ---------------------------------------------------------------- REST
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"command":{"do":"restart-data-plane"}}', 201),
        (b'{"command":{"do":"fly"}}', 400),
        (b'{"command":{"do":"self-test"}}', 400),
        (b'{"command":{"do":"self-test","model":"../x"}}', 400),
        (b'{"command":{"do":"restart-data-plane"},"life_seconds":1}', 400),
        (b'{"command":{"do":"restart-data-plane"},"life_seconds":86401}', 400),
    ],
)
def test_the_api_takes_what_is_a_command_and_names_what_is_not(web: Web, body: bytes, status: int) -> None:
    answer_ = web.request("POST", "/api/v1/devices/cam-8/commands", headers=web.login(), body=body)
    assert status == answer_.status, answer_.data


def test_the_api_is_for_people_who_are_logged_in_and_for_devices_that_exist(web: Web) -> None:
    path = "/api/v1/devices/cam-8/commands"
    assert 401 == web.request("GET", path).status
    headers = {"Content-Type": "application/json", "X-Requested-With": "edgewarden"}
    assert 401 == web.request("POST", path, headers=headers, body=b"{}").status
    assert 404 == web.request("GET", "/api/v1/devices/nobody/commands", headers=web.login()).status
    body = b'{"command":{"do":"restart-data-plane"}}'
    assert 404 == web.request("POST", "/api/v1/devices/nobody/commands", headers=web.login(), body=body).status


def test_the_longest_life_of_the_api_is_what_devices_take(web: Web) -> None:
    web.parts.commands.give("cam-8", CommandRequest(command=DIGITS.command, life_seconds=86_400), "ada", web.clock())
    envelope, _ = sent_to(web, "cam-8")[-1]
    command: Command = decode_command(envelope.payload)
    assert MAX_LIFE_MS == command.expires - command.issued


# ---------------------------------------------------------------- the command line
@pytest.fixture
def line(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(cli, "POLL", 0.01)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("EDGEWARDEN_SERVER", web.url)
    monkeypatch.setenv("EDGEWARDEN_PASSWORD", "correct horse")
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner()


def test_the_command_line_gives_and_lists(web: Web, line: CliRunner) -> None:
    assert "nothing was asked" in line.invoke(app, ["commands", "cam-9"]).output
    given = line.invoke(app, ["command", "cam-9", "self-test", "digits"])
    assert (0, True) == (given.exit_code, "self-test digits on cam-9: waiting" in given.output), given.output
    listed = json.loads(line.invoke(app, ["commands", "cam-9", "--json"]).output)
    assert [("self-test digits", "admin", "waiting")] == [(c["command"], c["by"], c["state"]) for c in listed]
    answer(web, "cam-9", listed[0]["id"], 1, CommandOutcome.REFUSED, reason=RejectReason.REPLAYED, detail="\x1b[31m")
    shown = line.invoke(app, ["commands", "cam-9"]).output
    assert ("refused" in shown, "replayed" in shown, "\x1b" in shown) == (True, True, False)


def test_waiting_ends_with_the_answer_and_its_exit_code(
    web: Web, line: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([(CommandOutcome.DONE, 11), (CommandOutcome.FAILED, 12)])

    def reply_while_it_waits(_seconds: float) -> None:
        outcome, number = next(outcomes)
        answer(web, "cam-9", look(web, "cam-9")[0][0], number, outcome, detail="16 golden samples agree")

    monkeypatch.setattr(cli.time, "sleep", reply_while_it_waits)
    done = line.invoke(app, ["command", "cam-9", "restart-data-plane", "--wait"])
    assert (0, "restart-data-plane on cam-9: done: 16 golden samples agree") == (done.exit_code, done.output.strip())
    failed = line.invoke(app, ["command", "cam-9", "self-test", "digits", "--wait", "--json"])
    assert (1, "failed") == (failed.exit_code, json.loads(failed.output)["state"])


WRONG = {
    "no model": ["self-test"],
    "a model that is none": ["self-test", "No Such"],
    "a restart of a model": ["restart-data-plane", "digits"],
    "nothing that a device can do": ["fly"],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=list(WRONG))
def test_wrong_usage_asks_no_device(web: Web, line: CliRunner, words: list[str]) -> None:
    before = rows_of(web.engine, "command")
    assert 2 == line.invoke(app, ["command", "cam-9", *words]).exit_code
    assert before == rows_of(web.engine, "command")
