"""Models made for the protocol's tests: each input leaves flattened as an output, in any type that TFLite copies."""

import hashlib
import io
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from agent.inference.loading import Servable, from_folder
from protocol.manifest import (
    MANIFEST_NAME,
    UNPUBLISHED,
    Golden,
    Manifest,
    Needs,
    Preprocess,
    TensorSpec,
    encode_manifest,
)
from protocol.states import Task
from runtime.interpreter import DTYPES

TYPES = {
    "BOOL": schema.TensorType.BOOL,
    "UINT8": schema.TensorType.UINT8,
    "INT8": schema.TensorType.INT8,
    "INT16": schema.TensorType.INT16,
    "INT32": schema.TensorType.INT32,
    "INT64": schema.TensorType.INT64,
    "FP32": schema.TensorType.FLOAT32,
    "FP16": schema.TensorType.FLOAT16,
    "FP64": schema.TensorType.FLOAT64,
    "UINT16": schema.TensorType.UINT16,
    "UINT32": schema.TensorType.UINT32,
    "UINT64": schema.TensorType.UINT64,
}


def flatten_model(*inputs: TensorSpec) -> bytes:
    """Return a .tflite whose k-th output is its k-th input as one row."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version = 3
    model.buffers = [schema.BufferT()]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RESHAPE
    code.version = 1
    model.operatorCodes = [code]
    graph.tensors, graph.operators, graph.inputs, graph.outputs = [], [], [], []
    for number, spec in enumerate(inputs):
        row = [1, int(np.prod(spec.shape))]
        shape = schema.BufferT()
        shape.data = np.asarray(row, np.int32).view(np.uint8)
        model.buffers.append(shape)
        place = len(graph.tensors)
        graph.tensors += [
            _tensor(spec.name, spec.shape, TYPES[spec.dtype], spec),
            _tensor(f"shape_{number}", [2], schema.TensorType.INT32, buffer=len(model.buffers) - 1),
            _tensor(f"{spec.name}_out", row, TYPES[spec.dtype], spec),
        ]
        graph.inputs.append(place)
        graph.outputs.append(place + 2)
        graph.operators.append(_reshape(place, row))
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _tensor(name: str, shape: object, kind: int, spec: TensorSpec | None = None, buffer: int = 0) -> object:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
    if spec is not None and spec.scale:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = [spec.scale]
        tensor.quantization.zeroPoint = [spec.zero_point or 0]
    return tensor


def _reshape(place: int, row: list[int]) -> object:
    operator = schema.OperatorT()
    operator.opcodeIndex = 0
    operator.inputs, operator.outputs = [place, place + 1], [place + 2]
    operator.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
    operator.builtinOptions = schema.ReshapeOptionsT()
    operator.builtinOptions.newShape = row
    return operator


def flatten_bundle(
    root: Path, *inputs: TensorSpec, model: str = "flat", preprocess: Preprocess | None = None
) -> Path:
    """Lay out a bundle folder around such a model."""
    folder = root / model
    folder.mkdir()
    outputs = tuple(
        TensorSpec(
            name=f"{spec.name}_out",
            dtype=spec.dtype,
            shape=(1, int(np.prod(spec.shape))),
            scale=spec.scale,
            zero_point=spec.zero_point,
        )
        for spec in inputs
    )
    zeros = {f"in_{k}": np.zeros((1, *spec.shape), DTYPES[spec.dtype]) for k, spec in enumerate(inputs)}
    zeros |= {f"out_{k}": np.zeros((1, *spec.shape), DTYPES[spec.dtype]) for k, spec in enumerate(outputs)}
    golden = io.BytesIO()
    np.savez(golden, **zeros)
    members = {"model.tflite": flatten_model(*inputs), "golden.npz": golden.getvalue()}
    manifest = Manifest(
        model=model,
        version=UNPUBLISHED,
        task=Task.OTHER,
        inputs=inputs,
        outputs=outputs,
        needs=Needs(memory=2**20),
        golden=Golden(samples=1, tolerance=0),
        members={name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
        **({"preprocess": preprocess} if preprocess else {}),
    )
    for name, data in members.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return folder


def flatten_servable(root: Path, *inputs: TensorSpec, **options: object) -> Servable:
    """Return such a bundle, ready for an engine."""
    folder = flatten_bundle(root, *inputs, **options)
    return from_folder(folder, hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest())
