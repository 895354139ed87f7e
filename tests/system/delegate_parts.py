"""Delegates that are really loaded: compiled from C, and a model whose work one of them saves."""

import hashlib
import io
import subprocess
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from agent.core.delegates import Delegate
from protocol.manifest import MANIFEST_NAME, Golden, Manifest, Needs, TensorSpec, encode_manifest
from protocol.states import RuntimeName, Task

SOURCE = Path(__file__).parent / "delegates" / "delegate.c"
NEG = 59  # BuiltinOperator
SIZE, LINKS = 16_384, 64


def compiled(folder: Path, variant: str, **changes: object) -> Delegate:
    """Return a delegate of `delegates/delegate.c`."""
    library = folder / f"lib{variant.lower()}.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-DVARIANT={variant}", "-o", library, SOURCE]
    subprocess.run(command, check=True, timeout=60)
    name = variant.lower().replace("_", "-")
    return Delegate(**{"name": name, "library": str(library), **changes})  # type: ignore[arg-type]  # test's own words


def chain_model(links: int = LINKS) -> bytes:
    """Return a .tflite that negates its input an even number of times: much work that comes to nothing."""
    model, code, graph = schema.ModelT(), schema.OperatorCodeT(), schema.SubGraphT()
    model.version = 3
    code.builtinCode = code.deprecatedBuiltinCode = NEG
    code.version = 1
    graph.tensors = [_tensor(k) for k in range(links + 1)]
    graph.operators = [_link(k) for k in range(links)]
    graph.inputs, graph.outputs = [0], [links]
    model.operatorCodes, model.buffers, model.subgraphs = [code], [schema.BufferT()], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(number: int) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = f"x{number}".encode(), [1, SIZE], 0, 0
    return tensor


def _link(number: int) -> schema.OperatorT:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [number], [number + 1]
    return operator


def chain_members(*runtimes: RuntimeName) -> tuple[Manifest, dict[str, bytes]]:
    """Return what a bundle of such a model holds, its golden samples with it; without runtimes it is for both."""
    sample, golden = np.linspace(-1, 1, 2 * SIZE, dtype=np.float32).reshape(2, 1, SIZE), io.BytesIO()
    np.savez(golden, in_0=sample, out_0=sample)
    content = {"model.tflite": chain_model(), "golden.npz": golden.getvalue()}
    spec = TensorSpec(name="x", dtype="FP32", shape=(1, SIZE))
    manifest = Manifest(
        model="chain",
        version=1,
        variant="float32",
        task=Task.OTHER,
        inputs=(spec,),
        outputs=(spec,),
        needs=Needs(runtimes=runtimes or tuple(RuntimeName), memory=32 * 1024 * 1024),
        golden=Golden(samples=2, tolerance=0),
        members={name: hashlib.sha256(data).hexdigest() for name, data in content.items()},
    )
    return manifest, content


def chain_folder(folder: Path, *runtimes: RuntimeName) -> Path:
    """Lay such a bundle out, unpacked."""
    manifest, content = chain_members(*runtimes)
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder
