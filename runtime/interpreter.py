"""A TFLite model, loaded: the only importer of a TFLite runtime.

Knows both runtimes (LiteRT and tflite-runtime), how bytes get into and out of a model's tensors, and how the
tensors are described in Open Inference Protocol words. It stops there: what the bytes mean is known to
`runtime.preprocess` and `runtime.calibrator`, who may run which model is decided elsewhere.

Errors, by who must act:

- `RuntimeMissing`: nobody installed a usable runtime here; the message says which extra to install.
- `ModelUnloadable`: the file is not a model that this runtime can load, or not with this delegate.
- `ValueError` from `LoadedModel.fill`: the caller's bytes do not fit the tensor.
- `RuntimeError` from `LoadedModel.invoke`: the runtime gave up on these values.

A damaged file may crash the process (tflite-runtime does not verify it: a truncated one is a SIGSEGV), so a new model
is loaded in a child first. A file that is loaded must never be overwritten in place, for the runtime maps it and the
process would die of SIGBUS: replace it.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from protocol.manifest import TensorSpec
from protocol.states import RuntimeName

AUTO = "auto"
PREFERENCE = (RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME)  # LiteRT is the faster one wherever it was measured
MODULES: Mapping[RuntimeName, str] = MappingProxyType(
    {RuntimeName.LITERT: "ai_edge_litert", RuntimeName.TFLITE_RUNTIME: "tflite_runtime"}
)
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "UINT8": np.dtype(np.uint8),
        "UINT16": np.dtype(np.uint16),
        "UINT32": np.dtype(np.uint32),
        "UINT64": np.dtype(np.uint64),
        "INT8": np.dtype(np.int8),
        "INT16": np.dtype(np.int16),
        "INT32": np.dtype(np.int32),
        "INT64": np.dtype(np.int64),
        "FP16": np.dtype(np.float16),
        "FP32": np.dtype(np.float32),
        "FP64": np.dtype(np.float64),
    }
)
"""Open Inference Protocol type names and their numpy types, one to one."""

_OIP_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KERNELS: Mapping[str, str] = MappingProxyType(
    {"": "AUTO", "plain": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "reference": "BUILTIN_REF"}
)
"""Kinds of kernels and what the runtimes call them; empty: the fastest, on XNNPACK."""

_INSTALL = "install one with: pip install 'edgewarden[runtime]'"


class RuntimeMissing(Exception):
    """No usable TFLite runtime is installed."""


class ModelUnloadable(Exception):
    """The file is not a model that this runtime can load and allocate."""


class ExternalDelegate(NamedTuple):
    """An accelerator's shared library with ``tflite_plugin_create_delegate``, and what it is told.

    It may do to this process whatever it likes, dying included: load it in a child first.
    """

    library: str
    options: Mapping[str, str] = MappingProxyType({})


def available() -> tuple[RuntimeName, ...]:
    """Return the usable runtimes on this machine, preferred first, without importing any of them."""
    return tuple(name for name in PREFERENCE if _is_usable(name))


def open_model(
    path: str | Path,
    *,
    runtime: str = AUTO,
    threads: int = 1,
    kernels: str = "",
    delegate: ExternalDelegate | None = None,
) -> "LoadedModel":
    """Load a model file (memory-mapped) and allocate its tensors.

    ``runtime`` is ``auto`` or a `RuntimeName` value, ``kernels`` one of `KERNELS`. What a delegate leaves is run on
    the kernels. Raises `RuntimeMissing` or `ModelUnloadable`.
    """
    chosen = import_runtime(runtime)
    return LoadedModel(chosen, _load(chosen, Path(path), threads, kernels, delegate), Path(path))


def import_runtime(runtime: str = AUTO) -> RuntimeName:
    """Import a runtime and return which: do it before setting limits, or before measuring what a model takes.

    Raises `RuntimeMissing`.
    """
    chosen = _choose(runtime)
    _module(chosen)
    return chosen


@final
class LoadedModel:
    """One interpreter, allocated once and never resized; used by one thread at a time.

    ``inputs`` and ``outputs`` are in the model's own order; ``index`` below counts in them. Names are those of the
    model's signature where it has exactly one, else the tensors' own.
    """

    def __init__(self, runtime: RuntimeName, interpreter: Any, path: Path) -> None:
        """Describe an allocated interpreter; ``path`` is only for messages. Use `open_model` instead."""
        self.runtime = runtime
        input_names, output_names = _signature_names(interpreter)
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        self.inputs = tuple(_spec(detail, input_names, path) for detail in inputs)
        self.outputs = tuple(_spec(detail, output_names, path) for detail in outputs)
        self._interpreter = interpreter
        # The functions are kept, never the arrays: a live array would make the runtime refuse to invoke.
        self._input_views = [_viewer(interpreter, detail) for detail in inputs]
        self._output_views = [_viewer(interpreter, detail) for detail in outputs]
        self._input_sizes = [view().nbytes for view in self._input_views]

    def fill(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Copy the bytes of one input into its tensor; raise ValueError when the length is wrong."""
        expected = self._input_sizes[index]
        source = memoryview(data).cast("B")
        if source.nbytes != expected:
            name = self.inputs[index].name
            raise ValueError(f"input {name!r} takes {expected} bytes, got {source.nbytes}")
        # Plain memory to plain memory: numpy's own copy takes three times as long to begin.
        self._input_views[index]().data.cast("B")[:] = source

    def invoke(self) -> None:
        """Run the model on what was filled in. Other threads run meanwhile."""
        self._interpreter.invoke()

    def read(self, index: int) -> bytes:
        """Return a copy of the bytes of one output."""
        return self._output_views[index]().tobytes()

    def array(self, index: int) -> npt.NDArray[Any]:
        """Return a copy of one output."""
        return self._output_views[index]().copy()

    def close(self) -> None:
        """Give the interpreter's memory back; the model cannot be used afterwards."""
        self._input_views, self._output_views, self._input_sizes = [], [], []
        self._interpreter = None

    def __enter__(self) -> "LoadedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------- choosing a runtime
def _is_usable(name: RuntimeName) -> bool:
    if importlib.util.find_spec(MODULES[name]) is None:
        return False
    # tflite-runtime 2.14 imports with numpy 2 but dies when an interpreter is made.
    return name is not RuntimeName.TFLITE_RUNTIME or np.__version__.startswith("1.")


def _choose(runtime: str) -> RuntimeName:
    usable = available()
    if runtime == AUTO:
        if not usable:
            raise RuntimeMissing(f"no TFLite runtime is installed; {_INSTALL}")
        return usable[0]
    try:
        wanted = RuntimeName(runtime)
    except ValueError:
        known = ", ".join([AUTO, *(name.value for name in RuntimeName)])
        raise ValueError(f"runtime {runtime!r} is not known; choose one of {known}") from None
    if wanted not in usable:
        raise RuntimeMissing(f"{wanted.value} is not installed, or its numpy is not below 2; {_INSTALL}")
    return wanted


def _module(runtime: RuntimeName) -> Any:
    try:
        return importlib.import_module(f"{MODULES[runtime]}.interpreter")
    except ImportError as error:
        raise RuntimeMissing(f"{runtime.value} is installed but cannot be imported ({error}); {_INSTALL}") from error


def _load(runtime: RuntimeName, path: Path, threads: int, kernels: str, delegate: ExternalDelegate | None) -> Any:
    if not path.is_file():
        raise ModelUnloadable(f"{path}: there is no such file")
    module = _module(runtime)
    delegates = [_load_delegate(module, delegate)] if delegate else None
    try:
        kind = module.OpResolverType[KERNELS[kernels]]
        interpreter = module.Interpreter(
            model_path=str(path),
            num_threads=threads,
            experimental_op_resolver_type=kind,
            experimental_delegates=delegates,
        )
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        said = str(error) or "it says no reason, as when memory is short"
        raise ModelUnloadable(f"{path}: {runtime.value} cannot load it: {said}") from error
    return interpreter


def _load_delegate(module: Any, delegate: ExternalDelegate) -> Any:
    try:
        return module.load_delegate(delegate.library, dict(delegate.options))
    except (OSError, AttributeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split()) or "it says no reason"
        raise ModelUnloadable(f"delegate {delegate.library} cannot be loaded: {said}") from error


# ---------------------------------------------------------------- describing tensors
def _signature_names(interpreter: Any) -> tuple[dict[int, str], dict[int, str]]:
    """Return {tensor index: name in the signature} of inputs and outputs; empty without a single signature."""
    signatures = list(interpreter.get_signature_list())
    if len(signatures) != 1 or not signatures[0]:
        return {}, {}
    runner = interpreter.get_signature_runner(signatures[0])
    inputs, outputs = runner.get_input_details(), runner.get_output_details()
    return (
        {detail["index"]: name for name, detail in inputs.items()},
        {detail["index"]: name for name, detail in outputs.items()},
    )


def _spec(detail: Mapping[str, Any], names: Mapping[int, str], path: Path) -> TensorSpec:
    name = names.get(detail["index"], detail["name"])
    dtype = _OIP_NAMES.get(np.dtype(detail["dtype"]))
    if dtype is None:
        raise ModelUnloadable(f"{path}: tensor {name!r} has type {np.dtype(detail['dtype'])}, which is not supported")
    scale, zero_point = detail["quantization"]
    return TensorSpec(
        name=name,
        dtype=dtype,
        shape=tuple(int(size) for size in detail["shape"]),
        scale=float(scale) if scale else None,
        zero_point=int(zero_point) if scale else None,
    )


def _viewer(interpreter: Any, detail: Mapping[str, Any]) -> Callable[[], npt.NDArray[Any]]:
    view: Callable[[], npt.NDArray[Any]] = interpreter.tensor(detail["index"])
    return view
