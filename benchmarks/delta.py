"""Measures how many bytes each kind of delta saves, and what it costs to make and to apply.

Pairs are the digits examples, which were trained apart, and an int8 MobileNetV2 (``python benchmarks/models.py``)
whose weights are changed as training would change them: another head, ±1 on some, all anew. Deltas are
made as the server makes them and applied as a device does: the base is packed again from its members, and for the
memory in a child.
"""

import hashlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from parts import DIGITS, ROOT, need_mobilenet, note, options, result

from agent.channel import RebuildRequest, RebuildVerdict
from agent.inference.rebuild import apply
from fleet_server.adapters.delta_making import bsdiff, compress, patch_from
from protocol.bundle import unpack, write_bundle
from protocol.manifest import MANIFEST_NAME, Golden, Manifest, Needs, TensorSpec, decode_manifest
from protocol.release import BSDIFF, NO_BASE, ZSTD, ZSTD_PATCH
from protocol.states import Task

METHODS: dict[str, Callable[[bytes, bytes], bytes]] = {ZSTD: compress, ZSTD_PATCH: patch_from, BSDIFF: bsdiff}
WEIGHTS_FROM = 1024  # bytes; smaller int8 tensors are no weights worth speaking of
PLENTY = 4 * 1024**3  # bytes of memory: what is taken is measured, not limited
TENSOR = TensorSpec(name="x", dtype="INT8", shape=(1, 4))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two bundles, as they would be downloaded."""

    name: str
    base: bytes
    target: bytes


def main() -> None:
    """Answer the question for all pairs."""
    given = options(__doc__ or "", 3)
    rounds = 1 if given.quick else given.rounds
    rows = []
    with TemporaryDirectory() as scratch:
        for pair in (*digits(), *(() if given.quick else mobilenet())):
            rows += [row(pair, method, rounds, Path(scratch)) for method in METHODS]
    result("delta", rounds=rounds, rows=rows)


def row(pair: Pair, method: str, rounds: int, scratch: Path) -> dict[str, object]:
    """Return the figures of a pair and a method, and show them."""
    encode_s, delta = quickest(lambda: METHODS[method](pair.base, pair.target), rounds)
    request = laid_out(pair, method, delta, scratch)
    decode_s, made = quickest(lambda: applied(request), rounds)
    if made != pair.target:
        sys.exit(f"{pair.name}, {method}: what came out is not what went in")
    figures = {
        "pair": pair.name,
        "method": method,
        "bundle_bytes": len(pair.target),
        "bytes": len(delta),
        "ratio": round(len(delta) / len(pair.target), 4),
        "encode_s": round(encode_s, 3),
        "decode_s": round(decode_s, 3),
        "decode_peak_mb": round(peak_of(request) / 1e6, 1),
    }
    note("  ".join(f"{value}" for value in figures.values()))
    return figures


def quickest(act: Callable[[], bytes], rounds: int) -> tuple[float, bytes]:
    """Return the least seconds of so many rounds: the others were disturbed."""
    least, made = float("inf"), b""
    for _ in range(rounds):
        started = time.perf_counter()
        made = act()
        least = min(least, time.perf_counter() - started)
    return least, made


def laid_out(pair: Pair, method: str, delta: bytes, scratch: Path) -> RebuildRequest:
    """Put the base, extracted, and the delta where a device has them."""
    folder = scratch / hashlib.sha256(pair.base).hexdigest()
    if not folder.exists():
        folder.mkdir()
        unpack(io.BytesIO(pair.base), lambda name: (folder / name).open("xb"))
    (scratch / "delta").write_bytes(delta)
    return RebuildRequest(
        method=method,
        base=NO_BASE if method == ZSTD else folder.name,
        folder="" if method == ZSTD else str(folder),
        delta=str(scratch / "delta"),
        made=str(scratch / "made"),
        length=len(pair.target),
        memory_bytes=PLENTY,
        cpu_seconds=600,
    )


def applied(request: RebuildRequest) -> bytes:
    """Return what a delta makes."""
    with Path(request.made).open("wb") as made:
        apply(request, made)
    return Path(request.made).read_bytes()


def peak_of(request: RebuildRequest) -> int:
    """Return the bytes that applying takes at most, in a child as a device starts it."""
    command = [sys.executable, "-m", "agent.inference.rebuild"]
    done = subprocess.run(command, input=msgspec.json.encode(request), capture_output=True, check=True, cwd=ROOT)
    verdict = msgspec.json.decode(done.stdout, type=RebuildVerdict)
    if verdict.trouble:
        sys.exit(verdict.trouble)
    return verdict.peak_memory


# ---------------------------------------------------------------- pairs
def digits() -> Iterator[Pair]:
    """Yield the examples, each trained from nothing."""
    folders = [DIGITS.parent / name for name in ("v1", "v2", "v3")]
    bundles = [of_example(folder, number) for number, folder in enumerate(folders, 1)]
    yield Pair(name="digits v1 → v2", base=bundles[0], target=bundles[1])
    yield Pair(name="digits v2 → v3", base=bundles[1], target=bundles[2])


def mobilenet() -> Iterator[Pair]:
    """Yield what may become of an int8 MobileNetV2."""
    model = need_mobilenet().read_bytes()
    base = of_model(model, 1)
    changes = {
        "head replaced": replace_head,
        "±1 on 1 % of the weights": lambda weights, dice: nudge(weights, dice, 0.01),
        "±1 on 5 % of the weights": lambda weights, dice: nudge(weights, dice, 0.05),
        "±1 on 20 % of the weights": lambda weights, dice: nudge(weights, dice, 0.20),
        "all weights anew": anew,
    }
    for name, change in changes.items():
        data = bytearray(model)
        change(weights_of(data), np.random.default_rng(1))
        yield Pair(name=f"MobileNetV2, {name}", base=base, target=of_model(bytes(data), 2))


def weights_of(model: bytearray) -> list[np.ndarray]:
    """Return the int8 weights of a model, largest first; what is written there is written in the model."""
    root = schema.Model.GetRootAs(model, 0)
    graph = root.Subgraphs(0)
    tensors = [graph.Tensors(index) for index in range(graph.TensorsLength())]
    buffers = {tensor.Buffer() for tensor in tensors if tensor.Type() == schema.TensorType.INT8}
    found = [
        root.Buffers(index).DataAsNumpy() for index in buffers if root.Buffers(index).DataLength() >= WEIGHTS_FROM
    ]
    return sorted((data.view(np.int8) for data in found), key=len, reverse=True)


def replace_head(weights: list[np.ndarray], dice: np.random.Generator) -> None:
    """Replace the last layer, which in this model is the largest."""
    dice.shuffle(weights[0])


def nudge(weights: list[np.ndarray], dice: np.random.Generator, share: float) -> None:
    """Move some weights by one step."""
    for data in weights:
        step = np.where(dice.random(len(data)) < share, dice.choice((-1, 1), len(data)), 0)
        data[:] = np.clip(data.astype(np.int16) + step, -127, 127).astype(np.int8)


def anew(weights: list[np.ndarray], dice: np.random.Generator) -> None:
    """Give every layer other weights of the same distribution."""
    for data in weights:
        dice.shuffle(data)


def of_example(folder: Path, version: int) -> bytes:
    """Return the bundle that an example is published as."""
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
    members = {name: (folder / name).read_bytes() for name in manifest.members}
    return packed(msgspec.structs.replace(manifest, version=version), members)


def of_model(model: bytes, version: int) -> bytes:
    """Return a bundle of a bare model; it is not served here, so its manifest says the least."""
    members = {"model.tflite": model, "golden.npz": b""}
    manifest = Manifest(
        model="mobilenet",
        version=version,
        task=Task.OTHER,
        inputs=(TENSOR,),
        outputs=(TENSOR,),
        needs=Needs(memory=1),
        golden=Golden(samples=1, tolerance=0.0),
        members={name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    )
    return packed(manifest, members)


def packed(manifest: Manifest, members: dict[str, bytes]) -> bytes:
    """Return the bytes of a bundle."""
    target = io.BytesIO()
    write_bundle(target, manifest, members)
    return target.getvalue()


if __name__ == "__main__":
    main()
