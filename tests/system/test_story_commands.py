"""Signed commands over the whole house: real server, broker and agents; and what a thief on the broker achieves."""

import json
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from securesystemslib.signer import CryptoSigner

from demo import story
from demo.attacks import StolenServer
from demo.world import DEVICES, World
from fleet_server.adapters.director import OnlineDirector
from fleet_server.api_types import CommandRequest, CommandView
from protocol.codec import decode_command_envelope, encode
from protocol.commands import Command, Deed, RenewCertificateCommand, RestartDataPlaneCommand, SelfTestCommand
from protocol.messages import CommandEnvelope
from protocol.states import CommandState, EventKind, PresenceState, RejectReason
from protocol.topics import Channel, device_topic

FIRST, SECOND = DEVICES[0], DEVICES[1]

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A fleet that serves digits 1."""
    world = World(tmp_path_factory.mktemp("commands"))
    try:
        story.start_server(world)
        story.make_keys(world)
        enrol(world)
        story.publish(world, "v1")
        world.edgewarden("deploy", "digits", "1", "--all")
        for name in (FIRST, SECOND):
            world.wait(f"digits 1 on {name}", lambda name=name: world.model_on(name).state.value == "committed")
        yield world
    finally:
        for stream in world.streams.values():
            stream.stop()
        world.programs.stop_all()


def enrol(world: World) -> None:
    """Two of the demo's three devices are enough."""
    token = world.folder / "token"
    world.edgewarden("tokens", "create", "--uses", "2", "--output", str(token))
    for name in (FIRST, SECOND):
        world.enrol(name, token)
        world.start_agent(name)
    states = (PresenceState.ONLINE, PresenceState.ONLINE)
    world.wait("both online", lambda: tuple(one.presence for one in world.devices().values()) == states)


@pytest.fixture(scope="module")
def thief(world: World) -> "Thief":
    return Thief(world.thief)


class Thief:
    """Holds the broker, and where a test says so the Director's keys."""

    def __init__(self, stolen: StolenServer) -> None:
        self._stolen = stolen

    def put(self, device: str, payload: bytes) -> None:
        """Put bytes on a device's ``down/cmd``."""
        with self._stolen._broker() as client:
            client.publish(device_topic(device, Channel.COMMAND), payload, qos=1).wait_for_publish(10)

    def watch(self, device: str, act: Callable[[], object]) -> list[bytes]:
        """Return what comes by on a device's ``down/cmd`` while something is done."""
        seen: list[bytes] = []
        with self._stolen._broker() as client:
            client.on_message = lambda _c, _d, message: seen.append(bytes(message.payload))
            client.on_subscribe = lambda *_: seen.append(b"")
            client.subscribe(device_topic(device, Channel.COMMAND), qos=1)
            deadline = time.monotonic() + 10
            while not seen:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            act()
        return [payload for payload in seen if payload]

    def sign(self, command: Command, *, by: CryptoSigner | None = None) -> bytes:
        director = OnlineDirector(self._stolen.data / "director")
        if by is not None:
            director._signers._signers["targets"] = by
        return encode(director.sign_command(command))


def listed(world: World, device: str = FIRST) -> tuple[CommandView, ...]:
    return world.api().get(f"/devices/{device}/commands", tuple[CommandView, ...])


def ask(world: World, device: str, deed: Deed) -> CommandView:
    """Give a command as the API does, and wait for its end."""
    given = world.api().post(f"/devices/{device}/commands", CommandRequest(command=deed), CommandView)

    def ended() -> CommandView | None:
        (found,) = [one for one in listed(world, device) if one.id == given.id]
        return found if found.state is not CommandState.WAITING else None

    return world.wait(f"the end of {given.command} on {device}", ended)


def refused(world: World, row: int, reason: RejectReason, device: str = FIRST) -> str:
    """Wait until a device has told of a refused command by name; return what it said."""

    def look() -> str | None:
        events = world.events_since(row, device)
        return next((e.detail for e in events if (e.kind, e.reason) == (EventKind.REFUSED, reason)), None)

    return world.wait(f"{reason.value} of {device}", look)


def data_plane_of(world: World, device: str) -> int:
    pid = world.local(device, "status", "--json")["data_plane"]
    assert isinstance(pid, int)
    return pid


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_a_self_test_prints_what_the_golden_samples_say(world: World) -> None:
    said = world.edgewarden("command", FIRST, "self-test", "digits", "--wait")
    assert f"self-test digits on {FIRST}: done: " in said
    assert "golden samples agree on" in said
    (one,) = listed(world)
    assert (CommandState.DONE, "admin") == (one.state, one.by)
    assert "golden samples agree" in world.edgewarden("commands", FIRST)


def test_a_model_that_is_not_there_fails_by_name(world: World) -> None:
    with pytest.raises(story.NotObserved, match="ended with 1"):
        world.edgewarden("command", FIRST, "self-test", "faces", "--wait")
    newest = listed(world)[0]
    assert CommandState.FAILED is newest.state
    assert "faces" in newest.detail


def test_a_restart_replaces_the_process_and_loses_no_request(world: World) -> None:
    stream = world.streams[SECOND]
    stream.start()
    world.wait("answers", lambda: stream.counts.answered > 20)
    before = data_plane_of(world, SECOND)
    given = json.loads(world.edgewarden("command", SECOND, "restart-data-plane", "--wait", "--json"))
    assert "done" == given["state"], given
    after = data_plane_of(world, SECOND)
    assert before != after
    assert f"{before} was replaced by {after}" == given["detail"]
    world.wait("the end of the old one", lambda: not psutil.pid_exists(before))
    answered = stream.counts.answered
    world.wait("answers of the new one", lambda: stream.counts.answered > answered + 20)
    stream.stop()
    assert stream.counts.sent == stream.counts.answered, stream.counts.last_error


def test_bytes_that_are_put_again_change_nothing(world: World, thief: Thief) -> None:
    """The very bytes of a command that was carried out: the same answer again, and not another process."""
    given: list[CommandView] = []
    seen = thief.watch(FIRST, lambda: given.append(ask(world, FIRST, RestartDataPlaneCommand())))
    assert [CommandState.DONE] == [one.state for one in given]
    plane = data_plane_of(world, FIRST)
    before = listed(world)
    for payload in seen * 3:
        thief.put(FIRST, payload)
    ask(world, FIRST, SelfTestCommand(model="digits"))  # comes after them, in order
    assert plane == data_plane_of(world, FIRST)
    assert before == listed(world)[1:]
    row = world.newest_event()
    thief.put(SECOND, seen[0])
    assert SECOND in refused(world, row, RejectReason.WRONG_DEVICE, SECOND)


def test_a_genuine_command_that_was_held_back_is_refused_as_replayed(world: World, thief: Thief) -> None:
    """Signed by the right keys and not expired, but a later one has been carried out: by sequence alone."""
    newest = listed(world)[0]
    held_back = Command(
        device=FIRST,
        id="held-back",
        sequence=newest.issued_at - 1,
        issued=now_ms(),
        expires=now_ms() + 600_000,
        command=RestartDataPlaneCommand(),
    )
    plane, row = data_plane_of(world, FIRST), world.newest_event()
    thief.put(FIRST, thief.sign(held_back))
    assert "comes after" in refused(world, row, RejectReason.REPLAYED)
    assert plane == data_plane_of(world, FIRST)


def test_what_is_forged_spoilt_or_expired_is_refused_by_name(world: World, thief: Thief) -> None:
    fresh = Command(
        device=FIRST,
        id="forged",
        sequence=now_ms() + 1000,
        issued=now_ms(),
        expires=now_ms() + 600_000,
        command=SelfTestCommand(model="digits"),
    )
    genuine = decode_command_envelope(thief.sign(fresh))
    stale = Command(
        device=FIRST, id="stale", sequence=now_ms() + 1000, issued=1, expires=now_ms() - 1000, command=fresh.command
    )
    short = Command(
        device=FIRST,
        id="short",
        sequence=now_ms() + 1000,
        issued=now_ms() - 5000,
        expires=now_ms() - 1000,
        command=fresh.command,
    )
    attacks = {
        RejectReason.BAD_SIGNATURE: [
            thief.sign(fresh, by=CryptoSigner.generate_ed25519()),
            encode(_with_payload(genuine, genuine.payload.replace(b"digits", b"faces0"))),
        ],
        RejectReason.EXPIRED: [thief.sign(short)],
        RejectReason.MALFORMED: [thief.sign(stale), b"\x00not json"],
    }
    row, before = world.newest_event(), listed(world)
    for payloads in attacks.values():
        for payload in payloads:
            thief.put(FIRST, payload)
    for reason in attacks:
        refused(world, row, reason)
    assert before == listed(world)


def _with_payload(envelope: CommandEnvelope, payload: bytes) -> CommandEnvelope:
    return CommandEnvelope(payload=payload, payload_type=envelope.payload_type, signatures=envelope.signatures)


def test_a_renewal_ends_with_another_key(world: World) -> None:
    identity = world.folder / FIRST / "state" / "identity"
    before = {path.read_bytes() for path in identity.glob("key*.pem")}
    assert CommandState.DONE is ask(world, FIRST, RenewCertificateCommand()).state
    assert {path.read_bytes() for path in identity.glob("key*.pem")} - before


def test_a_command_to_a_device_that_is_away_waits_for_it(world: World) -> None:
    """Killed, asked, started again: the broker keeps the command, or the server sends it again at the birth."""
    name = SECOND
    agent = world.programs._programs[name]
    agent.wanted = False
    world.programs.kill(name)
    world.wait("the end of the agent", lambda: agent.process is None or agent.process.poll() is not None)
    assert "waiting" in world.edgewarden("command", name, "self-test", "digits")
    agent.wanted = True  # the watcher starts it again
    world.wait("the answer", lambda: listed(world, name)[0].state is CommandState.DONE)


def test_the_books_of_the_server_name_what_was_signed(world: World) -> None:
    for one in listed(world):
        assert one.command in {"self-test digits", "self-test faces", "restart-data-plane", "renew-certificate"}
        assert one.answered_at
