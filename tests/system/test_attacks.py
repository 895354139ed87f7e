"""The attacks of the TUF and Uptane papers by name, on a real fleet whose server, broker and network are a thief's.

The thief has the server's disk, its online keys, its TLS key and its broker, and one of the two release keys. After
each attack: the device said by name what it refused, the server has that as an event (where the device is cut off,
its own status says it), and every client was answered all the time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from agent.adapters.device_api import HttpsEnrolment
from agent.adapters.identity import IdentityFolder
from agent.ports import AgentError
from demo import story
from demo.attacks import director_version_of, mix, sign_as_stranger
from demo.impostor import Impostor, endless, slow
from demo.world import DEVICES, MODEL, NotObserved, World
from fleet_server.api_types import DeploymentView, DeployRequest, EventView, RollbackRequest
from fleet_server.ports import PublishedBundle
from protocol.commands import Command, SelfTestCommand
from protocol.device_api import EnrolRequest, parse_token
from protocol.states import DeploymentState, EventKind, PresenceState, RejectReason

VICTIM, SLOWED, CLOCKED = DEVICES
SERVED, NEWER = 2, 3  # the version that serves throughout, and one that no device gets
DAY = 24 * 3600 * 1000
HUGE = 2**31 - 1
DOCS = Path(__file__).parents[2] / "docs" / "explanation" / "trust.md"
R = RejectReason

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]


@dataclass
class Fleet:
    """What the attacks need beside the world."""

    world: World
    token: Path
    impostors: dict[str, Impostor]
    empties: dict[str, bytes]  # the first, empty desired state of each device
    older_want: bytes  # of the victim
    older_image: dict[str, bytes]
    clock: Path  # what libfaketime adds to the clock of one device
    table: list[tuple[str, str]]

    # ------------------------------------------------------------ what an operator does meanwhile
    def order(self, version: int, device: str = VICTIM) -> None:
        request = DeployRequest(model=MODEL, version=version, devices=(device,))
        self.world.api().post("/deployments", request, DeploymentView)

    def settle(self, device: str = VICTIM) -> None:
        """Have the device where it was: it wants what serves, and knows it."""
        self.world.api().post(
            "/rollbacks", RollbackRequest(model=MODEL, to=SERVED, devices=(device,)), DeploymentView
        )
        self.world.wait(f"{device} settled", lambda: self._is_settled(device))

    def _is_settled(self, device: str) -> bool:
        view = self.world.devices()[device]
        return view.director_version_accepted == view.director_version_wanted

    # ------------------------------------------------------------ what is seen of an attack
    def saw(self, attack: str, row: int, reason: RejectReason, device: str = VICTIM) -> EventView:
        """Wait until the server has the device's refusal by name; see that the device serves on."""
        event = self.world.wait(f"{reason.value} from {device}", lambda: self._refusal(row, device, reason))
        self.serves_on(device)
        whole = event.kind is EventKind.REFUSED
        self.note(attack, f"`{reason.value}`, {'refused' if whole else 'that update rejected'}")
        return event

    def _refusal(self, row: int, device: str, reason: RejectReason) -> EventView | None:
        for event in self.world.events_since(row, device):
            over = event.kind is EventKind.REFUSED or event.state is DeploymentState.REJECTED
            if over and event.reason is not None:
                assert event.reason is reason, event
                return event
        return None

    def serves_on(self, device: str) -> None:
        stream = self.world.streams[device]
        before = stream.counts.answered
        self.world.wait(f"answers of {device}", lambda: stream.counts.answered > before + 3)
        assert self.world.model_on(device).running_version == SERVED
        failed = {name: one.counts.last_error for name, one in self.world.streams.items() if one.counts.failed}
        assert failed == {}

    def note(self, attack: str, seen: str) -> None:
        self.table.append((attack, seen))

    def released(self, version: int = SERVED) -> PublishedBundle:
        return self.world.thief.released(MODEL, version)

    @contextmanager
    def wanting(self, payload: bytes, device: str = VICTIM) -> Iterator[int]:
        """Put a desired state on the broker for a while; give the row of the newest event before it."""
        honest = self.world.thief.read_want(device)
        row = self.world.newest_event()
        self.world.thief.put_want(device, payload)
        try:
            yield row
        finally:
            self.world.thief.put_want(device, honest)

    def forge(self, *bundles: PublishedBundle, device: str = VICTIM, to: str = VICTIM, age: int = 0) -> bytes:
        """Sign the next desired state of ``to`` with the stolen keys, made out for ``device``."""
        version = director_version_of(self.world.thief.read_want(to)) + 1
        return self.world.thief.sign_want(device, version, list(bundles), now() - age)


def now() -> int:
    return time.time_ns() // 1_000_000


# ---------------------------------------------------------------- the fleet
@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    world = World(tmp_path_factory.mktemp("attacked"))
    impostors: dict[str, Impostor] = {}
    try:
        yield _build(world, impostors)
    finally:
        for stream in world.streams.values():
            stream.stop()
        world.programs.stop_all()
        for impostor in impostors.values():
            impostor.stop()


def _build(world: World, impostors: dict[str, Impostor]) -> Fleet:
    """Two of two release keys must sign; three devices serve digits 2 under load, two of them through the thief."""
    story.start_server(world)
    story.make_keys(world)
    keys = str(world.keys)
    world.edgewarden("keys", "make", "bob", "--dir", keys, "--no-passphrase")
    world.edgewarden("keys", "add", "image-targets", f"{keys}/bob.pub", "--threshold", "2", "--keys", keys)
    token, clock = world.folder / "token", world.folder / "clock"
    world.edgewarden("tokens", "create", "--uses", "9", "--output", str(token))
    clock.write_text("+0")
    for name in (VICTIM, SLOWED):
        impostors[name] = Impostor(world.data / "authority", world.ports.devices)
    for name in DEVICES:
        world.enrol(name, token, server=impostors[name].url if name in impostors else "")
    empties = {name: world.thief.read_want(name) for name in DEVICES}
    for name in DEVICES:
        world.start_agent(name)
    for folder in ("v1", "v2"):
        story.publish(world, folder)
    world.edgewarden("deploy", MODEL, str(SERVED), "--all", "--watch", "--timeout", "60")
    _give_other_clock(world, clock)
    older_want, older_image = world.thief.read_want(VICTIM), world.thief.read_image()
    story.publish(world, "v3")
    for stream in world.streams.values():
        stream.start()
    fleet = Fleet(
        world=world,
        token=token,
        impostors=impostors,
        empties=empties,
        older_want=older_want,
        older_image=older_image,
        clock=clock,
        table=[],
    )
    fleet.settle()  # what the victim wants now is newer than ``older_want``
    return fleet


def _give_other_clock(world: World, clock: Path) -> None:
    """Start one agent again on a clock that can be moved.

    Only now, when it serves: on a busy machine libfaketime lets waiting with a limit end with "invalid argument",
    which delays an update and has nothing to do with clocks.
    """
    world.programs.stop(CLOCKED)
    world.start_agent(CLOCKED, _moved_by(clock))
    world.wait(f"{CLOCKED} online", lambda: world.devices()[CLOCKED].presence is PresenceState.ONLINE)


def _moved_by(clock: Path) -> dict[str, str]:
    """Return what makes a program read its clock through libfaketime, moved by what stands in a file."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    assert found, "libfaketime is missing: apt-get install faketime"
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


# ---------------------------------------------------------------- a server that is never done: it takes its time
@pytest.fixture(scope="module")
def slowed(fleet: Fleet) -> Iterator[Fleet]:
    """One device waits for a bundle that comes a byte a second, while the others are attacked otherwise."""
    with fleet.impostors[SLOWED].playing("/bundles/", slow):
        fleet.order(NEWER, SLOWED)
        yield fleet
    fleet.settle(SLOWED)


pytestmark.append(pytest.mark.usefixtures("slowed"))


# ---------------------------------------------------------------- what the thief says in the Director's name
DIRECTOR: dict[str, tuple[Callable[[Fleet, Path], bytes], RejectReason]] = {
    "freeze of the Director": (lambda f, _: f.forge(f.released(), age=8 * DAY), R.EXPIRED),
    "rollback of the Director": (lambda f, _: f.older_want, R.REPLAYED),
    "fast-forward without the key": (lambda _, keys: sign_as_stranger(VICTIM, HUGE, keys, now()), R.BAD_SIGNATURE),
    "mix and match in the Director": (lambda f, _: mix(f.forge(f.released()), f.older_want), R.REPLAYED),
    "Director keys stolen: an unreleased bundle": (
        lambda f, _: f.forge(f.world.thief.unreleased(MODEL, NEWER)), R.NOT_RELEASED,
    ),
    "Director keys stolen: a changed bundle": (
        lambda f, _: f.forge(replace(f.released(NEWER), sha256="0" * 64)), R.DISAGREEMENT,
    ),
    "wrong device's Director": (lambda f, _: f.forge(f.released(), device=SLOWED), R.WRONG_DEVICE),
    "wrong device's empty Director": (lambda f, _: f.forge(device=SLOWED), R.WRONG_DEVICE),
    "empty Director replayed": (lambda f, _: f.empties[VICTIM], R.REPLAYED),
    "duplicate ids": (lambda f, _: f.forge(f.released(), f.released(NEWER)), R.MALFORMED),
    "no metadata at all": (lambda _f, _: b"\x00{}", R.MALFORMED),
}  # fmt: skip


@pytest.mark.parametrize("attack", DIRECTOR)
def test_what_a_thief_says_for_the_director_is_refused(fleet: Fleet, attack: str, tmp_path: Path) -> None:
    forge, reason = DIRECTOR[attack]
    with fleet.wanting(forge(fleet, tmp_path / "keys")) as row:
        fleet.saw(attack, row, reason)


# ---------------------------------------------------------------- what the thief says in the Image repository's name
def rolled_back(fleet: Fleet) -> AbstractContextManager[object]:
    @contextmanager
    def older() -> Iterator[None]:
        with fleet.world.thief.image_files() as folder:
            for name, content in fleet.older_image.items():
                (folder / name).write_bytes(content)
            yield

    return older()


IMAGE: dict[str, tuple[Callable[[Fleet], AbstractContextManager[object]], RejectReason]] = {
    "freeze of the Image repository": (lambda f: f.world.thief.frozen_image(), R.EXPIRED),
    "rollback of the Image repository": (rolled_back, R.REPLAYED),
    "mix and match in the Image repository": (
        lambda f: f.world.thief.mixed_image(_newest_targets_in(f.older_image)), R.REPLAYED,
    ),
    "endless metadata": (lambda f: f.impostors[VICTIM].playing("/image/metadata/", endless), R.MALFORMED),
    "endless bundle": (lambda f: f.impostors[VICTIM].playing("/bundles/", endless), R.HASH_MISMATCH),
}  # fmt: skip


@pytest.mark.parametrize("attack", IMAGE)
def test_what_a_thief_shows_of_the_image_repository_is_refused(fleet: Fleet, attack: str) -> None:
    play, reason = IMAGE[attack]
    row = fleet.world.newest_event()
    with play(fleet):
        fleet.order(NEWER)
        fleet.saw(attack, row, reason)
    fleet.settle()


KEYS = {"arbitrary bundle": None, "one of two Image targets keys stolen": "image-targets.pem"}


@pytest.mark.parametrize("attack", KEYS)
def test_a_release_that_too_few_keys_signed_is_refused(fleet: Fleet, attack: str) -> None:
    """The thief has everything else: snapshot, timestamp and the Director's order are properly signed."""
    key = KEYS[attack]
    stolen = fleet.world.keys / key if key else None
    with fleet.world.thief.forged_release(MODEL, SERVED, stolen) as rogue, fleet.wanting(fleet.forge(rogue)) as row:
        fleet.saw(attack, row, R.BAD_SIGNATURE)


def test_a_bundle_whose_bytes_were_changed_on_the_server_is_refused(fleet: Fleet) -> None:
    bundle = fleet.released(NEWER)
    row = fleet.world.newest_event()
    with fleet.world.thief.tampered(bundle.sha256):
        fleet.order(NEWER)
        fleet.saw("changed bytes", row, R.HASH_MISMATCH)
    fleet.settle()


# ---------------------------------------------------------------- commands
def command(**changes: object) -> Command:
    said: dict[str, object] = {"device": VICTIM, "id": "c-1", "sequence": 10, "issued": now() - 1000}
    said |= {"expires": now() + 60_000, "command": SelfTestCommand(model=MODEL), **changes}
    return Command(**said)  # type: ignore[arg-type]  # any field


COMMANDS: dict[str, tuple[dict[str, int | str], RejectReason]] = {
    "expired command": ({"id": "c-2", "sequence": 11, "expires": -1}, R.EXPIRED),
    "older command": ({"id": "c-3", "sequence": 9}, R.REPLAYED),
    "another device's command": ({"id": "c-4", "sequence": 12, "device": SLOWED}, R.WRONG_DEVICE),
}


def test_a_replayed_command_is_carried_out_once(fleet: Fleet) -> None:
    signed = fleet.world.thief.sign_command(command())
    log = fleet.world.folder / "logs" / f"{VICTIM}.log"
    for _ in range(2):
        fleet.world.thief.send_command(VICTIM, signed)
        fleet.world.wait("the command", lambda: "command c-1: done" in log.read_text())
    # What comes after the second copy on the same connection is handled after it.
    row = fleet.world.newest_event()
    fleet.world.thief.send_command(VICTIM, b"\x00{}")
    fleet.saw("command that is none", row, R.MALFORMED)
    assert log.read_text().count("command c-1: self-test") == 1
    fleet.note("replayed command", "carried out once")


@pytest.mark.parametrize("attack", COMMANDS)
def test_a_command_out_of_its_time_or_place_is_refused(fleet: Fleet, attack: str) -> None:
    changes, reason = COMMANDS[attack]
    if changes.get("expires") == -1:
        changes = {**changes, "expires": now() - 500}
    row = fleet.world.newest_event()
    fleet.world.thief.send_command(VICTIM, fleet.world.thief.sign_command(command(**changes)))
    fleet.saw(attack, row, reason)


# ---------------------------------------------------------------- enrolment
def posted(impostor: Impostor) -> list[str]:
    return [path for method, path in impostor.seen if method == "POST"]


def test_a_token_with_a_wrong_pin_gives_nothing_away(fleet: Fleet, tmp_path: Path) -> None:
    """As it is when somebody stands between: the CA that is shown is not the one that the token names."""
    pins = parse_token(fleet.token.read_text())
    other = tmp_path / "token"
    other.write_text(str(msgspec.structs.replace(pins, ca_key_sha256="0" * 64)))
    impostor = fleet.impostors[VICTIM]
    before = posted(impostor)
    with pytest.raises(NotObserved, match="CA is not the one that the token names"):
        fleet.world.enrol("edge-9", other, server=impostor.url, config=config_of(tmp_path))
    assert posted(impostor) == before  # the secret never left the device
    fleet.note("fleet token with a wrong pin", "enrolment stops before the secret is said")


def config_of(folder: Path) -> Path:
    config = folder / "agent.toml"
    config.write_text(f'[device]\nstate = "{folder / "state"}"\n')
    return config


def test_an_id_that_is_taken_cannot_be_enrolled_by_another_key(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(NotObserved, match="is enrolled already"):
        fleet.world.enrol(VICTIM, fleet.token, config=config_of(tmp_path))
    fleet.serves_on(VICTIM)
    fleet.note("enrolment under an existing id", "409, “is enrolled already”")


@pytest.mark.parametrize("name", ["server", "srv", "admin"])
def test_a_reserved_id_cannot_be_enrolled(fleet: Fleet, tmp_path: Path, name: str) -> None:
    """Neither with our agent, nor with one that does not check."""
    with pytest.raises(NotObserved, match="reserved"):
        fleet.world.enrol(name, fleet.token, config=config_of(tmp_path))
    pins = parse_token(fleet.token.read_text())
    server = HttpsEnrolment(f"https://127.0.0.1:{fleet.world.ports.devices}")
    csr = IdentityFolder(tmp_path / "thief").request(name)
    with pytest.raises(AgentError, match="reserved"):
        server.enrol(EnrolRequest(token_id=pins.id, secret=pins.secret, device=name, csr=csr), server.ca())
    if name == "admin":
        fleet.note("enrolment under a reserved id", "400, “reserved”")


# ---------------------------------------------------------------- clocks
@contextmanager
def moved(fleet: Fleet, offset: str) -> Iterator[None]:
    """Move one device's clock while it runs."""
    fleet.clock.write_text(offset)
    try:
        yield
    finally:
        fleet.clock.write_text("+0")


def test_a_clock_ten_years_ahead_installs_nothing_and_leaves_nothing_behind(fleet: Fleet) -> None:
    row = fleet.world.newest_event()
    with moved(fleet, "+10y"):
        fleet.order(NEWER, CLOCKED)
        fleet.saw("clock ten years ahead", row, R.EXPIRED, CLOCKED)
    fleet.settle(CLOCKED)


def test_a_clock_ten_years_back_believes_the_signed_time(fleet: Fleet) -> None:
    with moved(fleet, "-10y"):
        fleet.settle(CLOCKED)  # a genuine order counts
        forged = fleet.forge(fleet.released(), device=CLOCKED, to=CLOCKED, age=8 * DAY)
        with fleet.wanting(forged, CLOCKED) as row:
            fleet.saw("clock ten years back", row, R.EXPIRED, CLOCKED)
    fleet.settle(CLOCKED)


# ---------------------------------------------------------------- what ends the module
def test_slow_data_is_given_up_and_said_at_the_device(fleet: Fleet) -> None:
    """It was under way all the time; it is no refusal, for the next try may go better."""

    def said() -> str:
        (model,) = fleet.world.local(SLOWED, "status", "--json")["models"]
        return str(model["detail"]) if "sends only" in model["detail"] else ""

    fleet.world.wait("the slow server is given up", said, patience=60)
    fleet.serves_on(SLOWED)
    fleet.note("slow data", "given up after 30 s and tried again later: “sends only … bytes”")


def test_a_version_below_the_floor_is_refused(fleet: Fleet) -> None:
    fleet.world.edgewarden("models", "floor", MODEL, str(SERVED), "--keys", str(fleet.world.keys))
    row = fleet.world.newest_event()
    fleet.world.thief.put_want(VICTIM, fleet.forge(fleet.released(1)))
    fleet.saw("floor violation", row, R.BELOW_FLOOR)
    fleet.settle()


def test_a_revoked_device_is_cut_off_and_serves_on(fleet: Fleet) -> None:
    """It hears nothing more, not even over HTTPS; its own status says that it is not connected."""
    fleet.world.edgewarden("devices", "revoke", CLOCKED, "--yes")
    fleet.world.wait("the cut", lambda: fleet.world.devices()[CLOCKED].presence is PresenceState.REVOKED)
    fleet.world.wait(
        "the device's word", lambda: not fleet.world.local(CLOCKED, "status", "--json")["connected"] or None
    )
    wanted = fleet.world.devices()[CLOCKED].director_version_wanted
    fleet.world.api().post(
        "/deployments", DeployRequest(model=MODEL, version=NEWER, devices=(CLOCKED,)), DeploymentView
    )
    assert fleet.world.devices()[CLOCKED].director_version_wanted == wanted
    fleet.serves_on(CLOCKED)
    fleet.note("revoked device", "not connected, by its own `status`; serves on")


def test_every_client_was_answered(fleet: Fleet) -> None:
    for name in DEVICES:
        fleet.serves_on(name)
    assert all(stream.counts.answered for stream in fleet.world.streams.values())


def test_the_table_of_the_documentation_is_what_was_seen(fleet: Fleet, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [f"| {attack} | {seen} |" for attack, seen in sorted(fleet.table)]
    with capfd.disabled():
        print("", "| attack | what the device said |", "|---|---|", *rows, sep="\n")  # noqa: T201 - the table is the result
    written = DOCS.read_text()
    assert [row for row in rows if row not in written] == []


def _newest_targets_in(files: dict[str, bytes]) -> bytes:
    names = [name for name in files if name.endswith(".targets.json")]
    return files[max(names, key=lambda name: int(name.partition(".")[0]))]
