"""The main story, step by step. Each step returns the figure that proves it, observed over REST, MQTT or a socket.

A step that does not see what it should raises `NotObserved`. Nothing here decides for the programs; it types the same
commands that a person would.
"""

import http.client
import json
import time
from collections.abc import Callable

import numpy as np

from demo.attacks import director_version_of
from demo.stream import UnixConnection, input_of, quantise_pixels
from demo.world import DEVICES, EXAMPLES, MODEL, NotObserved, World
from fleet_server.api_types import EventView, ModelVersion, Overview, TrustStatus
from protocol.metrics import Proportion
from protocol.states import DeploymentState, EventKind, PresenceState, RejectReason

Step = tuple[str, Callable[[World], str]]
VICTIM, OTHER = DEVICES[0], DEVICES[1]
MIN_LABELLED = 60  # predictions with truth before an accuracy is read
CLEARLY_WORSE = 0.10  # how far the bad model's accuracy must fall


def steps() -> list[Step]:
    """Return the story in order."""
    return [
        ("The fleet server runs, with its own CA and broker", start_server),
        ("Offline keys are made; both trust roots are signed offline", make_keys),
        ("Three devices enrol, each with its own key and certificate", enrol_devices),
        ("digits 1 is signed, published and deployed to all", deploy_first),
        ("Local clients are answered on unix socket and loopback TCP", answer_clients),
        ("Telemetry arrives, numbered, and is stored once", receive_telemetry),
        ("digits 2 (better) is swapped in without losing a request", deploy_better),
        ("digits 3 (trained on wrong labels) makes accuracy fall", deploy_worse),
        ("A signed rollback brings digits 2 back on all devices", roll_back),
        ("A tampered bundle is refused", refuse_tampered),
        ("A bundle signed by an unknown key is refused", refuse_unknown_key),
        ("A replayed older Director message is refused", refuse_replay),
        ("A desired state for another device is refused", refuse_foreign),
        ("The console shows the fleet", look_at_console),
        ("Every answer that clients got is counted by the server", balance_ledger),
    ]


# ---------------------------------------------------------------- 1 to 3: server, keys, devices
def start_server(world: World) -> str:
    """Start the server and wait for its broker."""
    began = time.monotonic()
    world.start_server()
    world.wait("the administrator's password", lambda: (world.data / "admin-password").exists() or None)
    overview = world.wait("a connected broker", lambda: overview_with_broker(world))
    return f"version {overview.version}, broker connected after {time.monotonic() - began:.1f} s"


def make_keys(world: World) -> str:
    """Make the offline keys and prove that none of them is on the server."""
    world.edgewarden("keys", "init", "--dir", str(world.keys), "--server", world.console, "--no-passphrase")
    trust = world.api().get("/trust", TrustStatus)
    if not trust.ready:
        raise NotObserved("the server does not say that both roots are there")
    offline = {path.read_bytes() for path in world.keys.rglob("*.pem")}
    leaked = [path for path in world.data.rglob("*") if path.is_file() and path.read_bytes() in offline]
    if leaked or not offline:
        raise NotObserved(f"offline keys on the server: {leaked}")
    return (
        f"{len(offline)} private keys offline, none of them on the server; Image root {trust.image_root_sha256:.12}…"
    )


def enrol_devices(world: World) -> str:
    """Enrol and start three agents."""
    token = world.folder / "token"
    world.edgewarden("tokens", "create", "--uses", "3", "--label", "site=demo", "--output", str(token))
    for name in DEVICES:
        world.enrol(name, token)
        world.start_agent(name)
    world.wait("three devices online", lambda: _all_online(world))
    keys = {(world.folder / name / "state" / "identity" / "key.pem").read_bytes() for name in DEVICES}
    if len(keys) != len(DEVICES):
        raise NotObserved("devices share a key")
    return f"{', '.join(DEVICES)} online, {len(keys)} different keys"


# ---------------------------------------------------------------- 4 to 6: first model, answers, telemetry
def deploy_first(world: World) -> str:
    """Publish and deploy the first model."""
    publish(world, "v1")
    took = _deploy_and_wait(world, 1)
    return f"committed on all three after {took:.1f} s"


def answer_clients(world: World) -> str:
    """Ask every device over both sockets, in both encodings; then let the streams begin."""
    with np.load(EXAMPLES / "heldout.npz", allow_pickle=False) as data:
        image, truth = data["images"][0], int(data["truth"][0])
    spec = input_of(EXAMPLES / "v1" / "manifest.json")
    tensor = quantise_pixels(image, spec)
    answers = []
    for name in DEVICES:
        for connect in (_unix(world, name), _tcp(world, name)):
            answers.append(_infer_binary(connect, spec.name, tensor))
            answers.append(_infer_json(connect, spec.name, list(np.frombuffer(tensor, dtype=np.int8))))
            connect.close()
            world.single_requests[name] += 2
    if len({tuple(answer) for answer in answers}) != 1:
        raise NotObserved(f"answers differ: {answers}")
    for stream in world.streams.values():
        stream.start()
    predicted = int(np.argmax(answers[0]))
    return f"{len(answers)} equal answers (JSON and binary, 2 sockets, 3 devices): {predicted}, truth {truth}"


def receive_telemetry(world: World) -> str:
    """Wait for accuracy, and see that no report is missing."""
    world.wait("labelled accuracy of all devices", lambda: _accuracies(world, 1))
    devices = world.devices()
    if missing := {name: device.missing for name, device in devices.items() if device.missing}:
        raise NotObserved(f"reports are missing: {missing}")
    reports = sum(device.reports for device in devices.values())
    model = world.model_on(VICTIM)
    resources = devices[VICTIM].resources
    cpu = resources.cpu if resources else None
    return (
        f"{reports} reports stored, 0 missing; {VICTIM}: accuracy {_say(model.accuracy)}, "
        f"p50 {model.p50_us or 0:.0f} µs, CPU {'n/a' if cpu is None else f'{cpu / 10:.0f} %'}"
    )


# ---------------------------------------------------------------- 7: better, worse, back
def deploy_better(world: World) -> str:
    """Swap in a better model under load."""
    before = _fleet_accuracy(world, 1)
    publish(world, "v2")
    failed_before = _failed(world)
    took = _deploy_and_wait(world, 2)
    world.wait("labelled accuracy of version 2", lambda: _accuracies(world, 2))
    if failed := _failed(world) - failed_before:
        raise NotObserved(f"{failed} requests failed during the swap: {_last_errors(world)}")
    after = _fleet_accuracy(world, 2)
    if not (after.value or 0) > (before.value or 1):
        raise NotObserved(f"version 2 is not better: {_say(before)} → {_say(after)}")
    return f"0 failed requests, {took:.1f} s; accuracy {_say(before)} → {_say(after)}"


def deploy_worse(world: World) -> str:
    """Deploy a worse one, validly signed, and watch accuracy fall."""
    before = _fleet_accuracy(world, 2)
    publish(world, "v3")
    _deploy_and_wait(world, 3)
    world.wait("labelled accuracy of version 3", lambda: _accuracies(world, 3))
    after = _fleet_accuracy(world, 3)
    if (before.value or 0) - (after.value or 1) < CLEARLY_WORSE:
        raise NotObserved(f"accuracy did not fall: {_say(before)} → {_say(after)}")
    return f"valid signature, accuracy {_say(before)} → {_say(after)}"


def roll_back(world: World) -> str:
    """Take it back on all devices."""
    began, failed_before = time.monotonic(), _failed(world)
    world.edgewarden("rollback", MODEL, "--all")
    world.wait("version 2 serving on all devices", lambda: _all_serve(world, 2))
    took = time.monotonic() - began
    world.wait("version 2 committed on all devices", lambda: _all_committed(world, 2))
    if failed := _failed(world) - failed_before:
        raise NotObserved(f"{failed} requests failed during the rollback: {_last_errors(world)}")
    return f"signed, pushed and serving again after {took:.1f} s, 0 failed requests"


# ---------------------------------------------------------------- 8: attacks
def refuse_tampered(world: World) -> str:
    """Change a byte of a bundle on the server's disk."""
    publish(world, "v1")  # becomes version 4: bytes that no device has yet
    bundle = _published(world, 4)
    last = world.data / "deltas" / f"{bundle.sha256}.none.json"
    world.wait("the deltas of version 4, for the thief to change", lambda: last.exists() or None)
    row = world.newest_event()
    with world.thief.tampered(bundle.sha256):
        world.edgewarden("deploy", MODEL, "4", "--device", VICTIM)
        event = world.wait(
            "the refusal of the tampered bundle", lambda: _refusal(world, row, VICTIM, RejectReason.HASH_MISMATCH)
        )
    world.edgewarden("rollback", MODEL, "--device", VICTIM, "--to", "2")
    world.wait("version 2 settled again", lambda: _all_committed(world, 2))
    return _told(world, event)


def refuse_unknown_key(world: World) -> str:
    """Sign a release with a key that the offline root does not know."""
    row = world.newest_event()
    want = world.thief.read_want(VICTIM)
    with world.thief.forged_release(MODEL, 2) as rogue:
        forged = world.thief.sign_want(VICTIM, director_version_of(want) + 1, [rogue], _now())
        world.thief.put_want(VICTIM, forged)
        event = world.wait(
            "the refusal of the unknown key", lambda: _refusal(world, row, VICTIM, RejectReason.BAD_SIGNATURE)
        )
    world.thief.put_want(VICTIM, want)
    return _told(world, event)


def refuse_replay(world: World) -> str:
    """Put an older desired state of the same device."""
    old = world.thief.read_want(VICTIM)
    world.edgewarden("deploy", MODEL, "2", "--device", VICTIM)  # the same again: a newer desired state
    newer = world.wait("a newer desired state", lambda: _newer_want(world, old))
    world.wait("the device has taken it", lambda: _has_accepted(world, director_version_of(newer)))
    row = world.newest_event()
    world.thief.put_want(VICTIM, old)
    event = world.wait("the refusal of the replay", lambda: _refusal(world, row, VICTIM, RejectReason.REPLAYED))
    world.thief.put_want(VICTIM, newer)
    return _told(world, event)


def refuse_foreign(world: World) -> str:
    """Put another device's desired state."""
    want, foreign = world.thief.read_want(OTHER), world.thief.read_want(VICTIM)  # the newer of the two
    row = world.newest_event()
    world.thief.put_want(OTHER, foreign)
    event = world.wait(
        "the refusal of another device's state", lambda: _refusal(world, row, OTHER, RejectReason.WRONG_DEVICE)
    )
    world.thief.put_want(OTHER, want)
    return _told(world, event)


# ---------------------------------------------------------------- 9: the console, and the books
def look_at_console(world: World) -> str:
    """Open the console as a logged-in person would."""
    page = world.console_page("/")
    if absent := [name for name in DEVICES if name not in page]:
        raise NotObserved(f"the console does not show {absent}")
    return f"{world.console}/ shows {len(DEVICES)} devices ({len(page) // 1024} KiB)"


def balance_ledger(world: World) -> str:
    """Stop the streams, let the last windows arrive, and compare what clients got with what the server has."""
    world.pause_streams()
    answered = {name: world.answered_ever[name] + world.single_requests[name] for name in DEVICES}
    stored = world.wait("equal sums", lambda: _equal_sums(world, answered))
    return f"{sum(stored.values())} requests answered = {sum(stored.values())} in the database, 0 reports missing"


# ---------------------------------------------------------------- observations
def overview_with_broker(world: World) -> Overview | None:
    """Return the overview once the server says that its broker is up."""
    overview = world.api().get("/overview", Overview)
    return overview if overview.broker_up else None


def _all_online(world: World) -> bool:
    devices = world.devices()
    return set(devices) == set(DEVICES) and all(d.presence is PresenceState.ONLINE for d in devices.values())


def publish(world: World, folder: str) -> None:
    """Sign and upload an example bundle."""
    world.edgewarden("models", "publish", str(EXAMPLES / folder), "--keys", str(world.keys))


def _published(world: World, version: int) -> ModelVersion:
    for model in world.api().get("/models", tuple[ModelVersion, ...]):
        if (model.model, model.version) == (MODEL, version):
            return model
    raise NotObserved(f"{MODEL} {version} is not published")


def _deploy_and_wait(world: World, version: int) -> float:
    began = time.monotonic()
    world.edgewarden("deploy", MODEL, str(version), "--all")
    world.wait(f"version {version} committed on all devices", lambda: _all_committed(world, version))
    return time.monotonic() - began


def _all_serve(world: World, version: int) -> bool:
    return all(world.model_on(name).running_version == version for name in DEVICES)


def _all_committed(world: World, version: int) -> bool:
    models = [world.model_on(name) for name in DEVICES]
    return all(m.running_version == version and m.state is DeploymentState.COMMITTED for m in models)


def _accuracies(world: World, version: int) -> bool:
    models = [world.model_on(name) for name in DEVICES]
    return all(m.running_version == version and m.accuracy and m.accuracy.n >= MIN_LABELLED for m in models)


def _fleet_accuracy(world: World, version: int) -> Proportion:
    accuracy = _published(world, version).accuracy
    if accuracy is None or not accuracy.n:
        raise NotObserved(f"no labelled prediction of version {version} is known")
    return accuracy


def _failed(world: World) -> int:
    return sum(stream.counts.failed for stream in world.streams.values())


def _last_errors(world: World) -> list[str]:
    return [stream.counts.last_error for stream in world.streams.values() if stream.counts.last_error]


def _refusal(world: World, row: int, device: str, reason: RejectReason) -> EventView | None:
    """Return the event by which a device refused, once version 2 is seen to serve on."""
    for event in world.events_since(row, device):
        if event.reason is reason and (
            event.kind is EventKind.REFUSED or event.state in (DeploymentState.REJECTED, DeploymentState.FAILED)
        ):
            return event if world.model_on(device).running_version == 2 else None  # noqa: PLR2004 - digits 2
    return None


def _told(world: World, event: EventView) -> str:
    """Say what the device said, and see that it still answers."""
    serving = world.model_on(event.device).running_version
    connection = _unix(world, event.device)
    answers = _infer_binary(connection, *_example_input())
    connection.close()
    world.single_requests[event.device] += 1
    reason = event.reason.value if event.reason else "?"
    return f"{event.device}: {reason}: “{event.detail[:90]}”; serves version {serving} on ({len(answers)} scores)"


def _newer_want(world: World, old: bytes) -> bytes | None:
    want = world.thief.read_want(VICTIM)
    return want if director_version_of(want) > director_version_of(old) else None


def _has_accepted(world: World, version: int) -> bool:
    return world.devices()[VICTIM].director_version_accepted >= version


def _equal_sums(world: World, answered: dict[str, int]) -> dict[str, int] | None:
    stored = {name: world.stored_requests(name) for name in DEVICES}
    if stored != answered:
        raise NotObserved(f"clients counted {answered}, the server {stored}")
    if any(device.missing for device in world.devices().values()):
        return None
    return stored


def _say(accuracy: Proportion | None) -> str:
    if accuracy is None or accuracy.value is None or accuracy.low is None or accuracy.high is None:
        return "n/a"
    return f"{accuracy.value:.1%} (n = {accuracy.n}, 95 % {accuracy.low:.1%}–{accuracy.high:.1%})"


def _now() -> int:
    return time.time_ns() // 1_000_000


# ---------------------------------------------------------------- asking a data plane
def _unix(world: World, name: str) -> http.client.HTTPConnection:
    return UnixConnection(world.unix(name))


def _tcp(world: World, name: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", world.ports.inference[name], timeout=10)


def _example_input() -> tuple[str, bytes]:
    with np.load(EXAMPLES / "heldout.npz", allow_pickle=False) as data:
        spec = input_of(EXAMPLES / "v1" / "manifest.json")
        return spec.name, quantise_pixels(data["images"][0], spec)


def _infer_binary(connection: http.client.HTTPConnection, name: str, tensor: bytes) -> list[int]:
    head = json.dumps({"inputs": [_tensor(name, parameters={"binary_data_size": len(tensor)})]}).encode()
    return _ask(connection, head + tensor, {"Inference-Header-Content-Length": str(len(head))})


def _infer_json(connection: http.client.HTTPConnection, name: str, values: list[int]) -> list[int]:
    body = json.dumps({"inputs": [_tensor(name, data=[int(value) for value in values])]}).encode()
    return _ask(connection, body, {"Content-Type": "application/json"})


def _tensor(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "shape": [1, 8, 8, 1], "datatype": "INT8", **more}


def _ask(connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> list[int]:
    connection.request("POST", f"/v2/models/{MODEL}/infer", body, headers)
    response = connection.getresponse()
    data = response.read()
    if response.status != http.client.OK:
        raise NotObserved(f"HTTP {response.status}: {data[:200]!r}")
    return [int(value) for value in json.loads(data)["outputs"][0]["data"]]
