"""What the server says of itself: metadata, Triton's model configuration and statistics, Prometheus text.

Pure translation from what the engine and the counters hold. Metric names are Triton's, so that dashboards made for it
show this server too.
"""

from collections.abc import Iterable
from typing import Any

import protocol
from agent.inference.engine import Engine
from agent.inference.generation import Generation
from agent.inference.statistics import Totals
from protocol.manifest import TensorSpec
from protocol.states import RuntimeName

SERVER_NAME = "edgewarden"
EXTENSIONS = (  # only what works
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "schedule_policy",
    "statistics",
)
REPOSITORY_EXTENSION = "model_repository"  # works only where local clients may load and unload
_PLATFORMS = {RuntimeName.LITERT: "tflite_litert", RuntimeName.TFLITE_RUNTIME: "tflite_runtime"}

Json = dict[str, Any]  # on its way out; nothing reads it again


def server_metadata(*, repository_is_open: bool = False) -> Json:
    """Return the body of ``GET /v2``."""
    more = (REPOSITORY_EXTENSION,) if repository_is_open else ()
    return {"name": SERVER_NAME, "version": protocol.__version__, "extensions": sorted((*EXTENSIONS, *more))}


def metadata(generation: Generation, versions: Iterable[Generation] = ()) -> Json:
    """Return a model's metadata; ``versions``: all that serve of it."""
    signature = generation.signature
    return {
        "name": signature.model,
        "versions": [str(one.signature.version) for one in versions] or [str(signature.version)],
        "platform": _PLATFORMS[generation.runtime],
        "inputs": [_tensor(spec) for spec in signature.inputs],
        "outputs": [_tensor(spec) for spec in signature.outputs],
    }


def model_config(generation: Generation) -> Json:
    """Return Triton's model configuration as far as it applies. ``max_batch_size`` 0: shapes are whole."""
    signature = generation.signature
    return {
        "name": signature.model,
        "platform": _PLATFORMS[generation.runtime],
        "backend": "tflite",
        "max_batch_size": 0,
        "version_policy": {"specific": {"versions": [signature.version]}},
        "input": [_config_tensor(spec) for spec in signature.inputs],
        "output": [_config_tensor(spec) for spec in signature.outputs],
        "instance_group": [{"name": signature.model, "kind": "KIND_CPU", "count": generation.interpreters}],
        "parameters": {name: {"string_value": value} for name, value in _parameters(generation).items()},
    }


def _parameters(generation: Generation) -> dict[str, str]:
    """Return what Triton's configuration has no field for: how numbers are quantised, and on what the model runs."""
    signature = generation.signature
    told = {"threads": str(generation.threads)}
    if generation.delegate:
        told["delegate"] = generation.delegate
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.scale is not None:
                told[f"quantization.{kind}.{spec.name}.scale"] = repr(spec.scale)
                told[f"quantization.{kind}.{spec.name}.zero_point"] = str(spec.zero_point or 0)
    return told


def model_statistics(generations: Iterable[Generation]) -> Json:
    """Return Triton's statistics of what serves."""
    return {"model_stats": [_statistics(generation) for generation in generations]}


def prometheus(engine: Engine) -> str:
    """Return ``/metrics``. A version that was swapped out keeps its counters: they must never go down."""
    rows = [(f'model="{one.model}",version="{one.version}"', one.totals()) for one in engine.statistics.all()]
    lines = [line for metric in _METRICS for line in _metric(*metric, rows)]
    lines += _family("nv_inference_pending_request_count", "gauge", "Requests waiting or running")
    for one in engine.all():
        labels = f'model="{one.servable.model}",version="{one.servable.version}"'
        lines.append(f"nv_inference_pending_request_count{{{labels}}} {one.waiting}")
    if engine.governed is not None:  # absent where nobody governs
        lines += _family("edgewarden_governor_level", "gauge", "0 normal, 1 eased, 2 strained, 3 distress")
        lines.append(f"edgewarden_governor_level {engine.governed.level.rank}")
    return "\n".join(lines) + "\n"


_METRICS = (
    ("nv_inference_request_success", "Requests answered", lambda t: {"": t.success}),
    (
        "nv_inference_request_failure",
        "Requests not answered, by reason",
        lambda t: {',reason="REJECTED"': t.rejected, ',reason="BACKEND"': t.failure},
    ),
    ("edgewarden_deadline_missed", "Requests turned away for their deadline", lambda t: {"": t.late}),
    ("edgewarden_shed", "Requests turned away for their priority, in distress", lambda t: {"": t.shed}),
    ("nv_inference_count", "Inferences performed", lambda t: {"": t.success}),
    ("nv_inference_exec_count", "Model executions", lambda t: {"": t.success}),
    ("nv_inference_request_duration_us", "Queue and compute time, cumulative", lambda t: {"": t.success_ns // 1000}),
    ("nv_inference_queue_duration_us", "Time in the queue, cumulative", lambda t: {"": t.queue_ns // 1000}),
    ("nv_inference_compute_input_duration_us", "Time to copy inputs", lambda t: {"": t.copy_in_ns // 1000}),
    ("nv_inference_compute_infer_duration_us", "Time in the model", lambda t: {"": t.infer_ns // 1000}),
    ("nv_inference_compute_output_duration_us", "Time to copy outputs", lambda t: {"": t.copy_out_ns // 1000}),
)


def _metric(name: str, text: str, values: Any, rows: list[tuple[str, Totals]]) -> list[str]:
    lines = _family(name, "counter", text)
    for labels, totals in rows:
        lines += [f"{name}{{{labels}{more}}} {value}" for more, value in values(totals).items()]
    return lines


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _tensor(spec: TensorSpec) -> Json:
    return {"name": spec.name, "datatype": spec.dtype, "shape": spec.shape}


def _config_tensor(spec: TensorSpec) -> Json:
    return {"name": spec.name, "data_type": f"TYPE_{spec.dtype}", "dims": spec.shape}


def _statistics(generation: Generation) -> Json:
    totals = generation.counters.totals()
    n = totals.success
    return {
        "name": generation.servable.model,
        "version": str(generation.servable.version),
        "last_inference": totals.last_ms,
        "inference_count": n,
        "execution_count": n,
        "inference_stats": {
            "success": _duration(n, totals.success_ns),
            "fail": _duration(totals.failure, totals.failure_ns),
            "queue": _duration(n, totals.queue_ns),
            "compute_input": _duration(n, totals.copy_in_ns),
            "compute_infer": _duration(n, totals.infer_ns),
            "compute_output": _duration(n, totals.copy_out_ns),
            "cache_hit": _duration(0, 0),
            "cache_miss": _duration(0, 0),
        },
        "batch_stats": [],
    }


def _duration(count: int, ns: int) -> Json:
    return {"count": count, "ns": ns}
