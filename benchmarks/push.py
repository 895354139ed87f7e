"""Measures a push: from the order to deploy a 4 MB model to the first answer of the new version, step by step.

A real server with its Mosquitto over TLS and two real agents on one machine, which serve an int8 MobileNetV2
(``python benchmarks/models.py``) on LiteRT. Every push is of a version that the device has never had: the weights of
each differ from the version before by ±1 on 5 %. All versions are published, and their deltas made, beforehand. One
device takes deltas, the other whole bundles; they are pushed to in turns, and a client asks the model all the while.
Probation comes after the new version serves, and is not part of a push.
"""

import hashlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from delta import nudge, weights_of
from parts import need_mobilenet, note, options, result

from agent.client import Client
from agent.local_api import Step
from demo import story
from demo.world import DEVICES, World
from fleet_server.api_types import DeploymentView, DeployRequest, ModelVersion
from protocol.manifest import MANIFEST_NAME, Golden, Manifest, Needs, encode_manifest
from protocol.states import DeploymentState, RuntimeName, Task
from runtime.golden import GoldenSamples, save_golden
from runtime.interpreter import LoadedModel, open_model

MODEL = "mobilenet"
AIM_MS = 1000.0
SHARE = 0.05  # of the weights that differ from one version to the next
SAMPLES = 4  # golden ones
PATIENCE = 240.0  # seconds
PAUSE = 0.02  # seconds between two questions of the client
HOW = {DEVICES[0]: "delta", DEVICES[1]: "whole"}
STEPS = ("sign and store", "broker", "verify", "admit", "download", "trial", "swap", "first answer")


def main() -> None:
    """Answer the question."""
    given = options(__doc__ or "", 10)
    rounds = 2 if given.quick else given.rounds
    with TemporaryDirectory(prefix="edgewarden-push-") as scratch, fleet(Path(scratch)) as world:
        publish(world, Path(scratch), rounds + 1)
        for device in HOW:
            push(world, device, 1)
        pushes: dict[str, list[dict[str, float]]] = {device: [] for device in HOW}
        for version in range(2, rounds + 2):
            for device, how in HOW.items():
                pushes[device].append(push(world, device, version))
                note(f"  {how:<6} {version}: " + said(pushes[device][-1]))
    result("push", rounds=rounds, aim_ms=AIM_MS, **{HOW[device]: summed(each) for device, each in pushes.items()})


def summed(pushes: list[dict[str, float]]) -> dict[str, object]:
    """Return the median of every step and of the whole, in ms, and every whole."""
    steps = {step: round(statistics.median(one[step] for one in pushes), 1) for step in (*STEPS, "all")}
    return {"p50_ms": steps, "all_ms": [round(one["all"]) for one in pushes]}


def said(one: dict[str, float]) -> str:
    """Return a push as a line for people."""
    return ", ".join(f"{step} {took:.0f}" for step, took in one.items()) + " ms"


# ---------------------------------------------------------------- the fleet
@contextmanager
def fleet(scratch: Path) -> Iterator[World]:
    """Run a server and two devices until the block ends."""
    world = World(scratch / "fleet")
    try:
        story.start_server(world)
        story.make_keys(world)
        token = world.folder / "token"
        world.edgewarden("tokens", "create", "--uses", "2", "--output", str(token))
        for device in HOW:
            configure(world, device)
            world.enrol(device, token)
            world.start_agent(device)
        yield world
    finally:
        world.programs.stop_all()


def configure(world: World, device: str) -> None:
    """Write a device's settings: LiteRT, the shortest probation, deltas or none."""
    path = world.folder / device / "agent.toml"
    path.parent.mkdir(parents=True)
    path.write_text(
        f'[device]\nstate = "{world.folder / device / "state"}"\n\n'
        f'[inference]\nunix = "{world.unix(device)}"\nhttp = "127.0.0.1:{world.ports.inference[device]}"\n'
        'runtime = "litert"\n\n'
        f"[update]\nprobation_seconds = 1\ndeltas = {str(HOW[device] == 'delta').lower()}\n"
    )


# ---------------------------------------------------------------- the versions
def publish(world: World, scratch: Path, count: int) -> None:
    """Publish so many versions, and wait for their deltas."""
    data = bytearray(need_mobilenet().read_bytes())
    for version in range(1, count + 1):
        folder = bundle(scratch / f"v{version}", bytes(data))
        world.edgewarden("models", "publish", str(folder), "--keys", str(world.keys))
        published = world.api().get("/models", tuple[ModelVersion, ...])
        sha256 = next(one.sha256 for one in published if (one.model, one.version) == (MODEL, version))
        last = world.data / "deltas" / f"{sha256}.none.json"
        world.wait(f"the deltas of version {version}", last.exists, PATIENCE)
        note(f"  version {version} of {count} is published")
        nudge(weights_of(data), np.random.default_rng(version), SHARE)


def bundle(folder: Path, model: bytes) -> Path:
    """Return a bundle folder of a model, with golden samples of this machine."""
    folder.mkdir()
    (folder / "model.tflite").write_bytes(model)
    loaded = open_model(folder / "model.tflite", runtime=RuntimeName.LITERT.value)
    save_golden(folder / "golden.npz", golden_of(loaded))
    members = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    manifest = Manifest(
        model=MODEL,
        task=Task.OTHER,
        inputs=loaded.inputs,
        outputs=loaded.outputs,
        needs=Needs(memory=32 * 1024**2),
        golden=Golden(samples=SAMPLES, tolerance=1.0),
        members=members,
    )
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    loaded.close()
    return folder


def golden_of(model: LoadedModel) -> GoldenSamples:
    """Return random images and what the model answers."""
    dice = np.random.default_rng(0)
    images = dice.integers(-128, 128, (SAMPLES, *model.inputs[0].shape[1:]), dtype=np.int8)
    answers = []
    for image in images:
        model.fill(0, image.tobytes())
        model.invoke()
        answers.append(model.array(0).reshape(-1))
    return GoldenSamples(inputs=[images], outputs=[np.stack(answers)])


# ---------------------------------------------------------------- a push
class Asking:
    """A client that asks all the while, until a version has answered."""

    def __init__(self, world: World, device: str, version: int) -> None:
        """Begin at once."""
        self.answered_at, self._last = 0.0, "it was never asked"
        self._unix, self._version = str(world.unix(device)), str(version)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait(self) -> float:
        """Return when the version answered first (UTC, seconds)."""
        self._thread.join()
        if not self.answered_at:
            sys.exit(f"version {self._version} did not answer: {self._last}")
        return self.answered_at

    def _run(self) -> None:
        image = np.zeros((1, 224, 224, 3), np.int8)
        deadline = time.monotonic() + PATIENCE
        with Client(self._unix) as client:
            while time.monotonic() < deadline:
                try:
                    self._last = client.infer(MODEL, image).model_version
                except Exception as error:  # noqa: BLE001 - the first version is asked for before it is there
                    self._last = repr(error)
                if self._last == self._version:
                    self.answered_at = time.time()
                    return
                time.sleep(PAUSE)


def push(world: World, device: str, version: int) -> dict[str, float]:
    """Order a version for a device, wait until it is committed there, and return how long each step took, in ms."""
    request = DeployRequest(model=MODEL, version=version, devices=(device,))
    asking = Asking(world, device, version)
    began = time.time()
    world.api().post("/deployments", request, DeploymentView)
    ordered = time.time()
    answered = asking.wait()
    world.wait(f"version {version} committed", lambda: committed(world, device, version), PATIENCE)
    at = steps_of(world, device, version)
    moments = {
        "sign and store": ordered,
        "broker": max(ordered, arrival(world, device, began)),  # it may be there before the answer to the order
        "verify": at[DeploymentState.VERIFIED],
        "admit": at[DeploymentState.DOWNLOADING],
        "download": at[DeploymentState.STAGED],
        "trial": at[DeploymentState.SWAPPING],
        "swap": at[DeploymentState.PROBATION],
        "first answer": answered,
    }
    took, before = {}, began
    for step, moment in moments.items():
        took[step], before = (moment - before) * 1000, moment
    return {**took, "all": (answered - began) * 1000}


def committed(world: World, device: str, version: int) -> bool:
    """Tell whether a device keeps a version, so that the next push is taken up at once."""
    return DeploymentState.COMMITTED in steps_of(world, device, version)


def steps_of(world: World, device: str, version: int) -> dict[DeploymentState, float]:
    """Return when a version entered each state, by the device's own history (UTC, seconds)."""
    lines = (world.folder / device / "state" / "history.jsonl").read_bytes().splitlines()
    steps = [msgspec.json.decode(line, type=Step) for line in lines]
    return {step.state: step.at / 1000 for step in reversed(steps) if step.version == version}


def arrival(world: World, device: str, since: float) -> float:
    """Return when the desired state came in, by the device's log."""
    for line in (world.folder / "logs" / f"{device}.log").read_text().splitlines():
        if "a desired state arrived" in line:
            at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()  # noqa: DTZ007 - logs are local
            if at >= since - 0.001:
                return at
    sys.exit("the log does not say when the desired state arrived")


if __name__ == "__main__":
    main()
