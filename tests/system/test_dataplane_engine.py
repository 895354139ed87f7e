"""The engine in real processes: models that hang, memory that is too small, versions side by side."""

import hashlib
import http.client
import os
import queue
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from dataplane_parts import (
    PATIENCE,
    Control,
    UnixClient,
    control_side,
    heldout,
    load,
    manifest_of,
    members,
    store,
    write_ewb,
)
from endless_model import ENDLESS, FINE, endless_members, endless_store

from agent.adapters.deployment_file import DeploymentFile
from agent.adapters.model_store import FolderStore
from agent.adapters.threads import ThreadBackground
from agent.adapters.trial import TrialChild
from agent.channel import (
    CANDIDATE,
    EXIT_HUNG,
    Answer,
    Hung,
    Refused,
    SelfTested,
    Serving,
    Shadow,
    ShadowDelta,
    ShadowEnded,
    Shadowing,
    StatisticsDelta,
    Withdrawn,
)
from agent.core.facts import DeviceFacts, Target, VerifiedDesire
from agent.core.health import HealthLimits
from agent.core.shadowing import ShadowCounts, add
from agent.ports import DataPlaneExit, StoredModel
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol.bundle import digest_of_stream
from protocol.manifest import MANIFEST_NAME, decode_manifest, encode_manifest
from protocol.release import Assignment, DeviceConfig, ShadowTerms, release_of
from protocol.states import DeploymentState, RejectReason, RuntimeName

QUICK = ["--invoke-seconds", "0.5"]
RAW = {"Inference-Header-Content-Length": "0"}


def ask(unix: Path, model: str, body: bytes, version: str = "") -> int:
    """Return the status, or 0 when the connection ended without an answer."""
    client = UnixClient(unix)
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    try:
        client.request("POST", path, body=body, headers=RAW)
        return client.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        client.close()


# ---------------------------------------------------------------- a model that hangs
@pytest.mark.parametrize("runtime", ["litert", "tflite-runtime"])
def test_a_model_that_hangs_ends_its_process_which_names_it_and_serves_again(tmp_path: Path, runtime: str) -> None:
    with control_side(tmp_path, [*QUICK, "--runtime", runtime]) as control:
        control.serve(store(tmp_path, "v2", 2))
        endless = endless_store(tmp_path, 3, "loop")
        control.serve(endless)
        assert ask(control.unix, "loop", FINE) == 200
        pid = control.supervisor.pid
        assert pid is not None
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(ask(control.unix, "loop", ENDLESS))) for _ in range(3)
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        ended = control.wait_for_end(pid)
        took = time.monotonic() - started
        for thread in threads:
            thread.join(PATIENCE)
        assert (ended.returncode, ended.planned) == (EXIT_HUNG, False)
        assert ended.detail == "loop 3 hung: one invoke took more than 0.5 s"
        assert 0.5 <= took < 5
        hung = control.wait_for(lambda event: isinstance(event, Hung))
        assert isinstance(hung, Hung)
        assert (hung.model, hung.version, hung.digest) == ("loop", 3, endless.digest)
        assert sorted(statuses) == [0, 503, 503]  # who waited behind it is told to come again
        assert ask(control.unix, "digits", heldout()[0][0].tobytes()) == 200
        assert ask(control.unix, "loop", FINE) == 200


def test_other_models_answer_until_the_process_that_hangs_ends(tmp_path: Path) -> None:
    """The listening sockets stay open, so that nobody is refused; a few answers in flight may be lost."""
    with control_side(tmp_path, QUICK) as control:
        control.serve(store(tmp_path, "v2", 2))
        control.serve(endless_store(tmp_path, 3, "loop"))
        pid = control.supervisor.pid
        assert pid is not None
        with load(control.unix, clients=2, keep_alive=False) as clients:
            clients.wait_for(20)
            ask(control.unix, "loop", ENDLESS)
            control.wait_for_end(pid)
            clients.wait_for(20)
        assert clients.refused == 0
        assert len(clients.failures) <= 2


class Fleet:
    """The update machine on real parts: store, trial child, supervisor and data plane. Only the network misses."""

    def __init__(self, folder: Path, control: Control) -> None:
        self.folder = folder
        self.ahead = 0.0  # seconds by which the test lets time pass
        self.bundles: dict[str, Path] = {}
        self.items: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.told: list[tuple[DeploymentState | None, RejectReason | None, str]] = []
        self.background = ThreadBackground(self.items.put)
        self.verdicts = Verdicts(
            plane=control.supervisor, monotonic=self.monotonic, probation_ms=600_000, limits=HealthLimits()
        )
        self.updater = Updater(
            facts=DeviceFacts(device_class="any", runtimes=(RuntimeName.LITERT,), memory_total=10**10),
            deployments=DeploymentFile(folder / "deployments.json"),
            store=FolderStore(folder / "state"),
            downloads=self,
            trials=TrialChild(),
            plane=control.supervisor,
            background=self.background,
            events=self,
            changed=lambda: None,
            random=random.random,
            monotonic=self.monotonic,
            verdicts=self.verdicts,
            calm=Calm(),
        )
        control.on_event = lambda event: self.items.put(lambda: self._hear(event))
        self.updater.start(_now())

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def fetch(self, target: Target, progress: object, cancelled: object) -> str:
        return str(self.bundles[target.sha256])

    def discard(self, sha256: str) -> None:
        """Keep it: the test owns its bundles."""

    def collect(self, keep: object) -> None:
        """Keep them all, for the same reason."""

    def record(
        self,
        *,
        state: DeploymentState | None = None,
        reason: RejectReason | None = None,
        detail: str = "",
        **_: object,
    ) -> None:
        self.told.append((state, reason, detail))

    def want(self, bundle: Path, manifest: object, shadow: ShadowTerms | None = None) -> None:
        with bundle.open("rb") as stream:
            digest = digest_of_stream(stream)
        self.bundles[digest] = bundle
        target = Target(
            release=release_of(manifest),
            assignment=Assignment(rollout="r", shadow=shadow),
            sha256=digest,
            length=bundle.stat().st_size,
        )
        desire = VerifiedDesire(director_version=1, issued=_now(), targets=(target,), config=DeviceConfig())
        self.updater.want(desire, _now())

    def run_until(self, state: DeploymentState) -> None:
        deadline = time.monotonic() + 3 * PATIENCE
        while self.updater.records()[0].state is not state:
            assert time.monotonic() < deadline, self.told
            with suppress(queue.Empty):
                self.items.get(timeout=0.1)()
            self.updater.tick(_now())

    def _hear(self, event: Answer | DataPlaneExit) -> None:
        match event:
            case Serving():
                self.updater.plane_serves(event, _now())
            case Refused():
                self.updater.plane_refuses(event, _now())
            case Withdrawn():
                self.updater.plane_withdrew(event, _now())
            case DataPlaneExit(planned=False):
                self.updater.plane_died(_now())
            case StatisticsDelta():
                self.verdicts.count(event)
            case SelfTested():
                self.verdicts.tested(event)
            case Shadowing() | ShadowDelta() | ShadowEnded():
                self.verdicts.shadowed(event)


def _now() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[Fleet, Control]]:
    with control_side(folder, QUICK) as control:
        one = Fleet(folder, control)
        try:
            yield one, control
        finally:
            one.background.stop()


def test_a_model_that_passes_its_trial_and_hangs_in_the_field_is_taken_back_by_the_device(tmp_path: Path) -> None:
    """Nobody on the fleet's side does anything: two hangs in probation, and version 1 serves again."""
    good = manifest_of("v1", 1)
    hanging = tmp_path / "hanging"
    hanging.mkdir()
    bad = endless_members(hanging, 2)
    content = {path.name: path.read_bytes() for path in hanging.iterdir()}
    with fleet(tmp_path) as (one, control):
        one.want(write_ewb(tmp_path / "v1.ewb", good, members("v1")), good)
        one.run_until(DeploymentState.PROBATION)
        one.ahead = 601.0  # probation is over, and the golden samples are run where the model serves
        one.run_until(DeploymentState.COMMITTED)
        one.want(write_ewb(tmp_path / "v2.ewb", bad, content), bad)
        one.run_until(DeploymentState.PROBATION)
        for _ in range(2):
            heard = len(control.heard)
            assert ask(control.unix, "digits", ENDLESS) == 0
            control.wait_for(lambda event: isinstance(event, DataPlaneExit), since=heard)
        one.run_until(DeploymentState.ROLLED_BACK)
        assert ask(control.unix, "digits", heldout()[0][0].tobytes()) == 200
    exits = [event for event in control.heard if isinstance(event, DataPlaneExit) and not event.planned]
    assert [event.returncode for event in exits] == [EXIT_HUNG] * 2
    states = [state for state, _, _ in one.told]
    assert states[-2:] == [DeploymentState.ROLLING_BACK, DeploymentState.ROLLED_BACK]
    assert one.told[-2][1] is RejectReason.CRASHED_IN_PROBATION


def commit(one: Fleet, folder: Path, example: str, version: int, shadow: ShadowTerms | None = None) -> None:
    manifest = manifest_of(example, version)
    one.want(write_ewb(folder / f"{example}-{version}.ewb", manifest, members(example)), manifest, shadow)
    one.run_until(DeploymentState.PROBATION)
    one.ahead += 601.0
    one.run_until(DeploymentState.COMMITTED)


def test_a_model_that_its_clients_cannot_use_is_taken_back_by_the_device(tmp_path: Path) -> None:
    """It passes its own golden samples; but what clients send does not fit it, and every request fails."""
    other = tmp_path / "other"
    other.mkdir()
    bad = endless_members(other, 2)
    content = {path.name: path.read_bytes() for path in other.iterdir()}
    image = heldout()[0][0].tobytes()
    with fleet(tmp_path) as (one, control):
        commit(one, tmp_path, "v1", 1)
        for _ in range(50):
            assert ask(control.unix, "digits", image) == 200
        one.want(write_ewb(tmp_path / "v2.ewb", bad, content), bad)
        one.run_until(DeploymentState.PROBATION)
        for _ in range(50):
            ask(control.unix, "digits", image)
        one.run_until(DeploymentState.ROLLED_BACK)
        assert ask(control.unix, "digits", image) == 200
    assert one.told[-2][1] is RejectReason.TOO_MANY_ERRORS


def test_a_candidate_shadows_live_requests_before_it_takes_over(tmp_path: Path) -> None:
    images = [image.tobytes() for image in heldout()[0]]
    terms = ShadowTerms(share=1000, requests=40, seconds=3600, agreement=800)
    second = manifest_of("v2", 2)
    with fleet(tmp_path) as (one, control):
        commit(one, tmp_path, "v1", 1)
        one.want(write_ewb(tmp_path / "v2.ewb", second, members("v2")), second, terms)
        one.run_until(DeploymentState.SHADOW)
        deadline = time.monotonic() + 3 * PATIENCE
        while one.updater.records()[0].state is DeploymentState.SHADOW:
            assert time.monotonic() < deadline, one.told
            assert ask(control.unix, "digits", images[one.items.qsize() % len(images)]) == 200
            with suppress(queue.Empty):
                one.items.get(timeout=0.01)()
            one.updater.tick(_now())
        one.run_until(DeploymentState.PROBATION)
        one.ahead += 601.0
        one.run_until(DeploymentState.COMMITTED)
        assert (ask(control.unix, "digits", images[0], "2"), ask(control.unix, "digits", images[0], CANDIDATE)) == (
            200,
            404,
        )
    agreed = next(detail for state, _, detail in one.told if state is DeploymentState.SWAPPING and "agreed" in detail)
    assert "0 failed" in agreed


# ---------------------------------------------------------------- memory
def test_with_little_memory_a_swap_stops_the_old_one_first_and_requests_wait(tmp_path: Path) -> None:
    with control_side(tmp_path, ["--memory-bytes", str(24 * 1024 * 1024)]) as control:
        first, second = store(tmp_path, "v1", 1), store(tmp_path, "v2", 2)
        serving = control.serve(first)
        assert isinstance(serving, Serving)
        assert not serving.stop_start
        with load(control.unix, clients=2) as clients:
            clients.wait_for(20)
            # far more than the limit: there is never room for both
            greedy = _needing(tmp_path, second.folder, memory=64 * 1024 * 1024)
            swapped = control.serve(greedy)
            assert isinstance(swapped, Serving), swapped
            assert swapped.stop_start
            clients.wait_for(20)
            broken = _needing(tmp_path, second.folder, memory=64 * 1024 * 1024, damaged=True)
            refused = control.serve(broken)
            assert isinstance(refused, Refused)
            clients.wait_for(20)
        assert clients.failures == []
        client = UnixClient(control.unix)
        assert client.ask("GET", "/v2/models/digits")[1]["versions"] == ["2"]
        client.close()


def _needing(root: Path, source: str, *, memory: int, damaged: bool = False) -> StoredModel:
    """Lay out a copy of a stored bundle that says it needs this much."""
    folder = root / f"needing-{memory}-{damaged}"
    shutil.copytree(source, folder)
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
    needs = msgspec.structs.replace(manifest.needs, memory=memory)
    manifest = msgspec.structs.replace(manifest, needs=needs, title=str(damaged))
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    if damaged:
        model = folder / "model.tflite"
        data = model.read_bytes()
        model.unlink()
        model.write_bytes(data[:100])
    digest = hashlib.sha256(encode_manifest(manifest)).hexdigest()
    return StoredModel(digest=digest, folder=str(folder), manifest=manifest)


# ---------------------------------------------------------------- versions side by side
def test_a_candidate_serves_beside_the_stable_version_also_after_a_death_and_can_be_promoted(tmp_path: Path) -> None:
    image = heldout()[0][0].tobytes()
    with control_side(tmp_path) as control:
        first, second = store(tmp_path, "v1", 1), store(tmp_path, "v2", 2)
        control.serve(first)
        answer = control.serve(second, CANDIDATE)
        assert isinstance(answer, Serving)
        assert answer.alias == CANDIDATE
        for version in ("1", "2", "stable", CANDIDATE):
            assert ask(control.unix, "digits", image, version) == 200
        _kill(control)
        assert ask(control.unix, "digits", image, "2") == 200
        assert isinstance(control.serve(second), Serving)
        assert (ask(control.unix, "digits", image, "1"), ask(control.unix, "digits", image, CANDIDATE)) == (404, 404)
        _kill(control)
        assert (ask(control.unix, "digits", image), ask(control.unix, "digits", image, "1")) == (200, 404)


def _kill(control: Control) -> None:
    pid = control.supervisor.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    control.wait_for_end(pid)


# ---------------------------------------------------------------- shadow
def _shadow(control: Control, ticket: int, **wanted: float) -> Answer:
    control.supervisor.shadow(Shadow(ticket=ticket, model="digits", **wanted))
    answer = control.wait_for(lambda event: getattr(event, "ticket", None) == ticket)
    assert isinstance(answer, Shadowing | ShadowEnded)
    return answer


def _counts(control: Control) -> ShadowCounts:
    counts = None
    for event in control.heard:
        if isinstance(event, ShadowDelta):
            counts = add(counts, event.counts)
    assert counts is not None
    return counts


def test_a_shadow_is_compared_through_the_channel_and_lives_through_a_planned_restart(tmp_path: Path) -> None:
    first, second = store(tmp_path, "v1", 1), store(tmp_path, "v2", 2)
    with control_side(tmp_path) as control:
        control.serve(first)
        refused = _shadow(control, 901, share=1.0)
        assert isinstance(refused, ShadowEnded)
        assert "no stable version and candidate" in refused.reason
        control.serve(second, CANDIDATE)
        begun = _shadow(control, 902, share=0.5, cpu=0.5)
        assert isinstance(begun, Shadowing)
        assert (begun.stable, begun.candidate) == (first.digest, second.digest)
        with load(control.unix, clients=1) as clients:
            clients.wait_for(100)
            old = control.supervisor.pid
            assert old is not None
            control.supervisor.restart_planned()
            control.wait_for_end(old)
            compared = _counts(control).compared
            assert compared > 0
            clients.wait_for(100)
            control.wait_for(lambda event: isinstance(event, ShadowDelta), since=len(control.heard))
        control.supervisor.end_shadow(903, "digits")
        control.wait_for(lambda event: isinstance(event, ShadowEnded) and event.ticket == 903)
        assert clients.failures == []
        counts = _counts(control)
        assert (counts.stable, counts.candidate) == (first.digest, second.digest)
        assert counts.compared > compared
        assert counts.latency.count == counts.compared
        assert [event.ticket for event in control.heard if isinstance(event, ShadowEnded)] == [901, 903]


def test_a_shadow_does_not_survive_a_death(tmp_path: Path) -> None:
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v1", 1))
        control.serve(store(tmp_path, "v2", 2), CANDIDATE)
        _shadow(control, 902, share=1.0)
        _kill(control)
        ended = control.wait_for(lambda event: isinstance(event, ShadowEnded))
        assert isinstance(ended, ShadowEnded)
        assert "the data plane ended" in ended.reason
        assert ask(control.unix, "digits", heldout()[0][0].tobytes()) == 200
        heard = len(control.heard)
        time.sleep(1.2)
        assert not [event for event in control.heard[heard:] if isinstance(event, ShadowDelta)]
