"""A model that really never ends: it counts its input up to zero in steps of nothing.

``while x > 0: x = x + 0``. Golden samples below zero pass at once, so every check before serving is passed; an input
above zero never comes back. Written with the flatbuffer schema that LiteRT ships.
"""

import hashlib
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from agent.ports import StoredModel
from protocol.manifest import MANIFEST_NAME, Golden, Manifest, Needs, TensorSpec, encode_manifest
from protocol.states import Task

FLOAT, BOOL = 0, 6  # TensorType
GREATER, ADD, WHILE = 61, 0, 119  # BuiltinOperator
FINE, ENDLESS = np.float32([-1.0]).tobytes(), np.float32([1.0]).tobytes()


def _tensor(name: str, kind: int = FLOAT, buffer: int = 0) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), [1], kind, buffer
    return tensor


def _operator(code: int, inputs: list[int], outputs: list[int], options: object, kind: int) -> schema.OperatorT:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = code, inputs, outputs
    operator.builtinOptions, operator.builtinOptionsType = options, kind
    return operator


def _subgraph(tensors: list[schema.TensorT], output: int, operator: schema.OperatorT) -> schema.SubGraphT:
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, [0], [output], [operator]
    return graph


def _code(builtin: int) -> schema.OperatorCodeT:
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
    return code


def endless_model() -> bytes:
    """Return the .tflite file."""
    loop = schema.WhileOptionsT()
    loop.condSubgraphIndex, loop.bodySubgraphIndex = 1, 2
    options = schema.BuiltinOptions
    zero = [_tensor("x"), _tensor("zero", buffer=1)]
    model = schema.ModelT()
    model.version = 3
    model.operatorCodes = [_code(WHILE), _code(GREATER), _code(ADD)]
    model.buffers = [schema.BufferT(), schema.BufferT()]
    model.buffers[1].data = list(np.float32([0]).tobytes())
    model.subgraphs = [
        _subgraph([_tensor("x"), _tensor("y")], 1, _operator(0, [0], [1], loop, options.WhileOptions)),
        _subgraph(
            [*zero, _tensor("more", BOOL)],
            2,
            _operator(1, [0, 1], [2], schema.GreaterOptionsT(), options.GreaterOptions),
        ),
        _subgraph([*zero, _tensor("next")], 2, _operator(2, [0, 1], [2], schema.AddOptionsT(), options.AddOptions)),
    ]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def endless_members(folder: Path, version: int, name: str = "digits") -> Manifest:
    """Write the members of a bundle whose model hangs on what is above zero; return its manifest."""
    (folder / "model.tflite").write_bytes(endless_model())
    below = np.float32([[-1.0], [-2.0]])
    np.savez(folder / "golden.npz", in_0=below, out_0=below)
    return Manifest(
        model=name,
        version=version,
        variant="float32",
        task=Task.OTHER,
        inputs=(TensorSpec(name="x", dtype="FP32", shape=(1,)),),
        outputs=(TensorSpec(name="y", dtype="FP32", shape=(1,)),),
        needs=Needs(memory=4 * 1024 * 1024),
        golden=Golden(samples=2, tolerance=0),
        members={
            path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in ("model.tflite", "golden.npz")
        },
    )


def endless_store(root: Path, version: int, name: str = "digits") -> StoredModel:
    """Lay out such a bundle as the model store does."""
    folder = root / f"endless-{version}"
    folder.mkdir()
    manifest = endless_members(folder, version, name)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return StoredModel(
        digest=hashlib.sha256(encode_manifest(manifest)).hexdigest(), folder=str(folder), manifest=manifest
    )
