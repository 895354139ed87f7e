"""The stories that `crash_sweep.py` cuts short: each prepares a disk, goes on from any disk, and says what is wrong.

A story is told once to the recorder. Cut short at a moment, it is told on from the disk of that moment, with far ends
that know what they knew then; what must be true afterwards is checked here, in sentences.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash_journal import FOLDER, Image, Moment, Recorder, lay_out
from crash_world import DEVICE, TURN_MS, Device, Fleet, Server, Settings, make_bundle, manifest_of
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from device_pki import Authority
from tuf_world import NOW, Bundle

from agent.adapters.identity import IdentityFolder, key_pin
from agent.enrolment import enrol
from agent.ports import EVENTS, TELEMETRY, Refusal, Trouble
from protocol.device_api import BUNDLES_PATH, EnrolmentToken, EnrolRequest, EnrolResponse, RenewResponse, pin_of
from protocol.manifest import MANIFEST_NAME
from protocol.messages import DesiredState
from protocol.states import DeploymentState

Said = Sequence[tuple[Any, ...]]
Problems = list[str]
RESTART_MS = 60_000

# What may lie in a state folder at rest; of models/ only the bundles that are kept.
_AT_REST = re.compile(
    r"trust|trust/trust\.json|trust-marks\.json|deployments\.json|active\.json|spool\.db(-wal|-shm)?|connections|hold"
    r"|history\.jsonl|downloads|downloads\.json|models|models/[0-9a-f]{64}(\.bench\.json|/[a-z0-9_.-]+)?"
)
_IDENTITY = re.compile(r"identity(/identity\.json|/(key|cert|ca)(-\d)?\.pem|/(image|director)_root(-\d)?\.json)?")
_FILES_OF_AN_IDENTITY = 6


class Story(ABC):
    """What a sweep needs of a story."""

    name: str

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Make the disk on which it begins."""

    @abstractmethod
    def tell(self, folder: Path, scratch: Path, recorder: Recorder) -> None:
        """Tell all of it, once."""

    @abstractmethod
    def go_on(self, folder: Path, scratch: Path, moment: Moment) -> Problems:
        """Start again on the disk of a moment, and go on to the end."""


def told(said: Said, kind: str) -> list[tuple[Any, ...]]:
    """Return what was noted of a kind."""
    return [each[1:] for each in said if each[0] == kind]


# ---------------------------------------------------------------- updates
@dataclass
class Plan:
    """One story of a device that is a member of a fleet."""

    base: Sequence[DesiredState]  # brought to rest before it begins
    steps: Sequence[Callable[[Device], None]]
    ends: Mapping[str, tuple[DeploymentState, int | None]]  # by model: state, and the version that serves
    bundles: Sequence[Bundle] = ()
    settings: Settings = field(default_factory=Settings)
    old: DesiredState | None = None  # must be refused once a newer one was accepted
    downloads_again: bool = False  # what came was worthless
    never: Sequence[str] = ()  # files that must not be asked for


class UpdateStory(Story):
    """Told by a plan, which is made anew for each fleet."""

    def __init__(self, name: str, fleet: Fleet, plan: Callable[[Fleet], Plan]) -> None:
        self.name = name
        self._fleet = fleet
        self._plan = plan(fleet)
        self._known = Server()  # what the server has before it begins

    def prepare(self, folder: Path) -> None:
        scratch = folder.with_name("scratch")
        device = self._device(folder, scratch, self._known, NOW + 1000)
        device.start()
        device.connect()
        for message in self._plan.base:
            device.say(message)
            device.settle()
        device.end()

    def tell(self, folder: Path, scratch: Path, recorder: Recorder) -> None:
        server = Server(got=dict(self._known.got))
        device = self._device(folder, scratch, server, NOW + 3_600_000, recorder)
        device.start()
        self._tell_from(0, device)
        device.end()

    def go_on(self, folder: Path, scratch: Path, moment: Moment) -> Problems:
        self._fleet.sent.clear()
        self._fleet.cuts.clear()
        server = Server(got=dict(self._known.got))
        for spool, stream, number, payload in told(moment.said, "got"):
            server.take(spool, stream, number, payload)
        device = self._device(folder, scratch, server, NOW + 7_200_000 + RESTART_MS)
        try:
            device.start()
            problems = [*self._after_start(device, moment)]
            steps = told(moment.said, "step")
            self._tell_from(steps[-1][0] if steps else 0, device)
            problems += self._at_the_end(device, server, folder, moment)
        finally:
            device.end()
        return problems

    def _tell_from(self, first: int, device: Device) -> None:
        for number, step in enumerate(self._plan.steps):
            if number >= first:
                device.mark("step", number)
                step(device)
        device.connect()
        device.settle()

    def _device(
        self, folder: Path, scratch: Path, server: Server, clock: int, recorder: Recorder | None = None
    ) -> Device:
        return Device(
            folder,
            self._fleet,
            server,
            settings=self._plan.settings,
            scratch=scratch,
            clock=clock,
            recorder=recorder,
        )

    # ------------------------------------------------------------ right after the start
    def _after_start(self, device: Device, moment: Moment) -> Problems:
        return [
            *self._what_serves(device, moment),
            *_trust_that_went_back(device, moment.said),
            *_numbers_that_went_back(device, moment.said),
        ]

    def _what_serves(self, device: Device, moment: Moment) -> Problems:
        for model in told(moment.said, "served"):
            if model[0] not in device.plane.stable and self._plan.ends[model[0]][1] is not None:
                return [f"{model[0]} served before, and does not after the start"]
        if self._plan.base and not moment.said and not device.plane.stable:
            return ["nothing serves after the start"]
        return []

    # ------------------------------------------------------------ at the end
    def _at_the_end(self, device: Device, server: Server, folder: Path, moment: Moment) -> Problems:
        return [
            *self._wrong_ends(device),
            *self._lost_records(device, server, moment.said),
            *self._bytes_again(moment),
            *_leftovers(folder, device),
            *_lost_history(device),
            *self._replays(device),
        ]

    def _wrong_ends(self, device: Device) -> Problems:
        problems = []
        records = {record.model: record for record in device.updater.records()}
        active = device.store.active()
        for model, (state, version) in self._plan.ends.items():
            record = records.get(model)
            found = (record.state, record.serving.version if record.serving else None) if record else None
            if found != (state, version):
                problems.append(f"{model} ends as {found}, not as {(state.value, version)}")
            serving = device.plane.stable.get(model)
            if serving != active.get(model) or (serving is None) != (version is None):
                problems.append(f"{model}: {serving} serves, the pointer says {active.get(model)}")
        return problems

    def _lost_records(self, device: Device, server: Server, said: Said) -> Problems:
        problems = list(server.conflicts)
        for spool, stream, number in told(said, "kept"):
            if spool != device.spool.id:
                problems.append(f"spool {spool} had records and is gone")
            elif number not in server.covered(spool, stream) and not (stream == TELEMETRY and device.spool.dropped()):
                problems.append(f"{stream} {number} was kept and never came")
        for stream in (EVENTS, TELEMETRY):
            covered = server.covered(device.spool.id, stream)
            gaps = sorted(set(range(1, max(covered, default=0))) - covered)
            dropped = device.spool.dropped() if stream == TELEMETRY else 0  # a full spool counts what it drops
            problems += [f"{stream}: {gaps} are missing"] if len(gaps) > dropped else []
        return problems

    def _bytes_again(self, moment: Moment) -> Problems:
        if self._plan.downloads_again:
            return []
        finished = {sha256 for (sha256,) in told(moment.said, "downloaded")}
        problems = []
        for bundle in self._plan.bundles:
            for path, data in self._fleet.files.items():
                if path.startswith(f"{BUNDLES_PATH}/{bundle.sha256}"):
                    is_here = bundle.sha256 in finished or path in self._plan.never
                    allowed = 0 if is_here else _bytes_to_come(moment.image, bundle, path, data)
                    if (sent := self._fleet.sent.get(path, 0)) > allowed:
                        problems.append(
                            f"{sent} bytes of {path[len(BUNDLES_PATH) :][:30]} came, {allowed} could be missing"
                        )
        return problems

    def _replays(self, device: Device) -> Problems:
        if self._plan.old is None:
            return []
        try:
            device.trust.verify(self._plan.old, device.now)
        except Refusal:
            return []
        return ["an older desired state is accepted"]


def _bytes_to_come(image: Image, bundle: Bundle, path: str, data: bytes) -> int:
    """Return what of a file is not on the disk yet."""
    stored = {f"models/{bundle.sha256}/{name}" for name in (MANIFEST_NAME, *manifest_of(bundle).members)}
    whole = f"downloads/{bundle.sha256}.ewb"
    if stored <= image.keys() or image.get(whole) == bundle.data:
        return 0
    held = image.get(f"downloads/{bundle.sha256}{'.delta' if '?' in path else '.part'}") or b""
    rest = max(0, len(data) - len(held))
    return rest if data.startswith(held) else rest + len(data)  # a hole shows at the end only


def _trust_that_went_back(device: Device, said: Said) -> Problems:
    versions = device.trust.versions()
    now = (versions.director, versions.director_root, versions.image_root, device.trust.clock_floor)
    problems = [
        f"trust went back from {before} to {now}"
        for before in told(said, "trusted")
        if any(one < other for one, other in zip(now, before, strict=True))
    ]
    if device.trust.lost:
        problems.append(device.trust.lost)
    return problems


def _numbers_that_went_back(device: Device, said: Said) -> Problems:
    problems = []
    if any(number >= device.connection for (number,) in told(said, "connection")):
        problems.append(f"connection {device.connection} was used before")
    held = told(said, "held")
    if held and told(said, "holding")[-1:] == held[-1:] and device.hold.until() != held[-1][0]:
        problems.append(f"the hold was {held[-1][0]} and is {device.hold.until()}")
    if device.spool.replaced:
        problems.append(f"the spool was unreadable: {device.spool.replaced}")
    return problems


def _leftovers(folder: Path, device: Device) -> Problems:
    keep = device.updater._worth_keeping()
    problems = []
    for place in sorted(folder.rglob("*")):
        path = place.relative_to(folder).as_posix()
        if not _AT_REST.fullmatch(path) or path.startswith("downloads/"):
            problems.append(f"{path} is left")
        elif path.startswith("models/") and path[len("models/") :][:64] not in keep:
            problems.append(f"{path} is left of a bundle that nobody needs")
    here = (digest for digest in keep if (folder / "models" / digest).exists())
    return [*problems, *(f"half of bundle {digest[:8]} is left" for digest in here if not device.store.find(digest))]


def _lost_history(device: Device) -> Problems:
    added = device.history.added
    found = tuple(reversed(device.history.newest(len(added))))
    return [] if found == tuple(added) else [f"of {len(added)} steps the history has not all"]


# ---------------------------------------------------------------- plans
def say(message: DesiredState) -> Callable[[Device], None]:
    """Bring a desired state, and wait until it has come about."""

    def step(device: Device) -> None:
        device.connect()
        device.say(message)
        device.settle()

    return step


def _cut_at(*sizes: int) -> Callable[[Device], None]:
    """Let the next answers break off; only while the story is told for the first time."""

    def step(device: Device) -> None:
        device.fleet.cuts[:] = sizes if device.recorder is not None else ()

    return step


def _published(fleet: Fleet, *versions: int) -> list[Bundle]:
    return [fleet.publish(make_bundle(f"v{version}", version)) for version in versions]


def _with(**assignment: Any) -> Callable[[Any], None]:
    """Return a change of the Director's target."""

    def change(target: Any) -> None:
        target.custom["assignment"].update(assignment)

    return change


S = DeploymentState


def first(fleet: Fleet) -> Plan:
    (one,) = _published(fleet, 1)
    return Plan(base=[], steps=[say(fleet.world.assign(one))], ends={"digits": (S.COMMITTED, 1)}, bundles=[one])


def update(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before = fleet.world.assign(one)
    after = fleet.world.assign(two)
    ends = {"digits": (S.COMMITTED, 2)}
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two], old=before)


def broken_off(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before, after = fleet.world.assign(one), fleet.world.assign(two)
    steps = [_cut_at(9000, 9000, 9000), say(after)]
    return Plan(base=[before], steps=steps, ends={"digits": (S.COMMITTED, 2)}, bundles=[one, two])


def by_delta(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before = fleet.world.assign(one)
    after = fleet.world.assign(two, change=_with(deltas=fleet.offer_delta(one, two)))
    steps = [_cut_at(2000), say(after)]
    ends = {"digits": (S.COMMITTED, 2)}
    whole = f"{BUNDLES_PATH}/{two.sha256}"
    return Plan(base=[before], steps=steps, ends=ends, bundles=[one, two], never=[whole])


def by_useless_delta(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before = fleet.world.assign(one)
    after = fleet.world.assign(two, change=_with(deltas=fleet.offer_delta(one, two, b"BSDIFF40" + bytes(3000))))
    return Plan(base=[before], steps=[say(after)], ends={"digits": (S.COMMITTED, 2)}, bundles=[one, two])


def within_budget(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before, after = fleet.world.assign(one), fleet.world.assign(two)
    settings = Settings(bytes_per_day=1_000_000)
    ends = {"digits": (S.COMMITTED, 2)}
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two], settings=settings)


def rollback(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    base = [fleet.world.assign(one), fleet.world.assign(two)]
    after = fleet.world.assign(one)
    return Plan(base=base, steps=[say(after)], ends={"digits": (S.COMMITTED, 1)}, bundles=[one, two], old=base[1])


def by_hand(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    base = [fleet.world.assign(one), fleet.world.assign(two)]

    def take_back(device: Device) -> None:
        device.connect()
        device.settle()
        (record,) = device.updater.records()
        if record.state is S.COMMITTED:
            device.updater.take_back("digits", device.now)
        device.settle()

    return Plan(base=base, steps=[take_back], ends={"digits": (S.ROLLED_BACK, 1)}, bundles=[one, two])


def sickened(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before, after = fleet.world.assign(one), fleet.world.assign(two)
    settings = Settings(golden={2: False})
    ends = {"digits": (S.ROLLED_BACK, 1)}
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two], settings=settings)


def _shadowed(fleet: Fleet, *, agrees: bool) -> Plan:
    one, two = _published(fleet, 1, 2)
    before = fleet.world.assign(one)
    after = fleet.world.assign(two, change=_with(shadow={"share": 100, "requests": 200}))
    ends = {"digits": (S.COMMITTED, 2) if agrees else (S.REJECTED, 1)}
    settings = Settings(agrees=agrees)
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two], settings=settings)


def shadow(fleet: Fleet) -> Plan:
    return _shadowed(fleet, agrees=True)


def shadow_that_differs(fleet: Fleet) -> Plan:
    return _shadowed(fleet, agrees=False)


def refused(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before, after = fleet.world.assign(one), fleet.world.assign(two)
    settings = Settings(failing=frozenset({2}))
    ends = {"digits": (S.REJECTED, 1)}
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two], settings=settings)


def damaged(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before, after = fleet.world.assign(one), fleet.world.assign(two)
    fleet.files[f"{BUNDLES_PATH}/{two.sha256}"] = bytes(len(two.data))
    ends = {"digits": (S.REJECTED, 1)}
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two], downloads_again=True)


def superseded(fleet: Fleet) -> Plan:
    one, two, three = _published(fleet, 1, 2, 3)
    before, meanwhile, after = (fleet.world.assign(bundle) for bundle in (one, two, three))

    def begin(device: Device) -> None:
        _cut_at(9000)(device)
        device.connect()
        device.say(meanwhile)
        device.settle(lambda: any(record.download_tries for record in device.updater.records()))

    ends = {"digits": (S.COMMITTED, 3)}
    return Plan(base=[before], steps=[begin, say(after)], ends=ends, bundles=[one, two, three], old=meanwhile)


def withdrawn(fleet: Fleet) -> Plan:
    (one,) = _published(fleet, 1)
    before, after = fleet.world.assign(one), fleet.world.assign()
    return Plan(base=[before], steps=[say(after)], ends={"digits": (S.IDLE, None)}, bundles=[one])


def two_models(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    other = fleet.publish(make_bundle("v3", 1, "letters"))
    before, after = fleet.world.assign(one), fleet.world.assign(two, other)
    ends = {"digits": (S.COMMITTED, 2), "letters": (S.COMMITTED, 1)}
    return Plan(base=[before], steps=[say(after)], ends=ends, bundles=[one, two, other])


def rotation(fleet: Fleet) -> Plan:
    """New root keys and new online keys in both repositories, and an update signed with them."""
    one, two = _published(fleet, 1, 2)
    before = fleet.world.assign(one)
    roots = [fleet.world.director.rotate("root", "targets", "snapshot", "timestamp")]
    after = fleet.world.assign(two, root=roots)

    def rotate_image(device: Device) -> None:
        if fleet.world.image.root_version == 1:
            fleet.world.image.rotate("root", "targets", "snapshot", "timestamp")
            fleet.world.sign_image()
        say(after)(device)

    ends = {"digits": (S.COMMITTED, 2)}
    return Plan(base=[before], steps=[rotate_image], ends=ends, bundles=[one, two], old=before)


def held(fleet: Fleet) -> Plan:
    one, two = _published(fleet, 1, 2)
    before, after = fleet.world.assign(one), fleet.world.assign(two)
    until = NOW + 365 * 86_400_000

    def hold(end: int) -> Callable[[Device], None]:
        def step(device: Device) -> None:
            device.mark("holding", end)
            device.hold.set(end)
            device.mark("held", end)
            device.updater.look_again()

        return step

    steps = [hold(until), say(after), hold(0)]
    return Plan(base=[before], steps=steps, ends={"digits": (S.COMMITTED, 2)}, bundles=[one, two])


def offline(fleet: Fleet) -> Plan:
    """Reports pile up without a server until the spool merges them; then the server is back."""
    (one,) = _published(fleet, 1)
    before = fleet.world.assign(one)

    def pile_up(device: Device) -> None:
        for _ in range(25):
            device.now += 1000
            device.reporter.tick(device.now)

    settings = Settings(spool_bytes=1500, window_ms=1000)
    return Plan(base=[before], steps=[pile_up], ends={"digits": (S.COMMITTED, 1)}, bundles=[one], settings=settings)


PLANS: Mapping[str, Callable[[Fleet], Plan]] = {
    "first": first,
    "update": update,
    "broken-off": broken_off,
    "delta": by_delta,
    "useless-delta": by_useless_delta,
    "budget": within_budget,
    "rollback": rollback,
    "by-hand": by_hand,
    "sick": sickened,
    "shadow": shadow,
    "shadow-differs": shadow_that_differs,
    "refused": refused,
    "damaged": damaged,
    "superseded": superseded,
    "withdrawn": withdrawn,
    "two-models": two_models,
    "rotation": rotation,
    "held": held,
    "offline": offline,
}


# ---------------------------------------------------------------- enrolment
class Registrar:
    """The open part of the server's device API, in this process (port `EnrolmentServer`)."""

    url = "https://127.0.0.1:8443"
    image_root = b'{"signed": {"version": 1}}'

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self.keys: list[bytes] = []
        self.asked: Callable[[bytes], None] = lambda _key: None

    def ca(self) -> str:
        return self._authority.pem

    def enrol(self, request: EnrolRequest, ca: str) -> EnrolResponse:
        return self.sign(request.csr)

    def sign(self, csr: str) -> EnrolResponse:
        key = _der(x509.load_pem_x509_csr(csr.encode()).public_key())
        self.keys.append(key)
        self.asked(key)
        return self._authority.response(csr, image_root=self.image_root)

    @property
    def token(self) -> str:
        pin = key_pin(self._authority.certificate)
        return str(
            EnrolmentToken(
                id="0a1b2c3d", secret="s" * 24, ca_key_sha256=pin, image_root_sha256=pin_of(self.image_root)
            )
        )


class EnrolStory(Story):
    """A person enrols the device; with ``again``, one that is a member already."""

    def __init__(self, name: str, authority: Authority, *, again: bool) -> None:
        self.name = name
        self._authority = authority
        self._again = again

    def prepare(self, folder: Path) -> None:
        if self._again:
            self._enrol(folder, Registrar(self._authority))

    def tell(self, folder: Path, scratch: Path, recorder: Recorder) -> None:
        registrar = Registrar(self._authority)
        registrar.asked = lambda key: recorder.mark("asked", key)
        self._change(folder, registrar)
        recorder.mark("enrolled")

    def go_on(self, folder: Path, scratch: Path, moment: Moment) -> Problems:
        files = IdentityFolder(folder / "identity")
        problems = []
        if (self._again or told(moment.said, "enrolled")) and not _key_of(files):
            problems.append("it was enrolled, and is no member after the start")
        keys, registrar = [_key_of(files)], Registrar(self._authority)
        self._change(folder, registrar)
        if not _key_of(files):
            problems.append("doing it again does not make it a member")
        keys += registrar.keys
        if any(key not in keys for (key,) in told(moment.said, "asked")):
            problems.append("the key whose certificate was asked for is gone")
        files.tidy()  # as the agent does at its start
        found = sorted(place.relative_to(folder).as_posix() for place in folder.rglob("*"))
        problems += [f"{path} is left" for path in found if not _IDENTITY.fullmatch(path)]
        if len(found) != 1 + _FILES_OF_AN_IDENTITY:
            problems.append(f"files of more than one identity are left: {found}")
        return problems

    def _change(self, folder: Path, registrar: Registrar) -> None:
        """Do what may be cut short."""
        self._enrol(folder, registrar)

    def _enrol(self, folder: Path, registrar: Registrar) -> None:
        credentials = IdentityFolder(folder / "identity")
        enrol(token=registrar.token, device=DEVICE, server=registrar, credentials=credentials, force=True)


class RenewStory(EnrolStory):
    """The device has its certificate renewed, with a new key."""

    def _change(self, folder: Path, registrar: Registrar) -> None:
        files = IdentityFolder(folder / "identity")
        answer = registrar.sign(files.request(DEVICE))
        files.renew(RenewResponse(certificate=answer.certificate, ca=answer.ca))


def _der(key: Any) -> bytes:
    der: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return der


def _key_of(files: IdentityFolder) -> bytes:
    """Return the public key of a whole identity; nothing when there is none."""
    try:
        return _der(files.load().key.public_key())
    except Trouble:
        return b""


# ---------------------------------------------------------------- all of them
def names() -> list[str]:
    """Return the stories' names."""
    return [*PLANS, "enrolment", "enrolment-again", "renewal"]


def story(name: str, fleet: Callable[[], Fleet]) -> Story:
    """Return a story with a fleet of its own."""
    if name in PLANS:
        return UpdateStory(name, fleet(), PLANS[name])
    if name == "renewal":
        return RenewStory(name, fleet().authority, again=True)
    return EnrolStory(name, fleet().authority, again=name.endswith("again"))


__all__ = ["FOLDER", "TURN_MS", "Story", "lay_out", "names", "story"]
