"""``python -m agent.inference.trial``: tries one candidate, alone in a process that may die of it.

Reads a `TrialRequest` on standard input, and writes one `TrialVerdict` on standard output. In between the bundle is
unpacked, and its model loaded, run on its golden samples and measured, without network and under limits of memory and
CPU. Whoever started this process bounds its time, and takes its death for a failed verdict.
"""

import errno
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.channel import TrialRequest, TrialVerdict
from agent.core.rungs import Rung
from agent.inference.kernel import NoIsolation, die_with_parent, take_network_away
from agent.inference.ladder import climb_in_trial
from agent.inference.loading import (
    CannotServe,
    Servable,
    Settings,
    WrongTensors,
    choose_runtime,
    from_folder,
    load_one,
    run_golden,
    unpack_file,
)
from protocol.bundle import digest_of
from protocol.manifest import MANIFEST_NAME, Manifest
from protocol.states import RejectReason, RuntimeName
from runtime.interpreter import LoadedModel, RuntimeMissing, import_runtime
from runtime.measure import RUNS, growth, measure_latency, memory_use

MAX_REQUEST = 64 * 1024  # bytes
MIN_RUNS = 3
MEASURE_US = 200_000  # how long measuring may take, about: a push waits for it


class Failed(Exception):
    """The candidate did not pass."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Name what is wrong and describe it."""
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def main() -> int:
    """Try what standard input asks for; the exit code is 0 whenever there is a verdict."""
    die_with_parent(os.environ)
    answer = _keep_stdout()
    request = msgspec.json.decode(sys.stdin.buffer.read(MAX_REQUEST), type=TrialRequest)
    answer.write(msgspec.json.encode(try_candidate(request)) + b"\n")
    answer.flush()
    return 0


def try_candidate(request: TrialRequest) -> TrialVerdict:
    """Return the verdict on a candidate. This process cannot be used for anything else afterwards."""
    network = ""
    try:
        network = take_network_away()
        return _passed(request, _unpacked(request), network)
    except NoIsolation as error:
        return _verdict(RejectReason.SELFTEST_FAILED, f"the network cannot be taken away: {error}", network)
    except Failed as failure:
        return _verdict(failure.reason, failure.detail, network)
    except MemoryError:
        return _verdict(RejectReason.SELFTEST_FAILED, _out_of_memory(request), network)


def _keep_stdout() -> BinaryIO:
    """Return standard output for the verdict alone; what native code prints goes to standard error from now on."""
    kept = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return kept


def _verdict(reason: RejectReason, detail: str, network: str) -> TrialVerdict:
    return TrialVerdict(passed=False, reason=reason.value, detail=detail, network=network)


def _out_of_memory(request: TrialRequest) -> str:
    return f"it needs more memory than the {request.memory_bytes} bytes it may take"


# ---------------------------------------------------------------- the bundle
def _unpacked(request: TrialRequest) -> Servable:
    folder = Path(request.folder)
    try:
        manifest = unpack_file(Path(request.bundle), folder)
        _check_release(request, manifest, folder / MANIFEST_NAME)
        return from_folder(folder, digest="")
    except CannotServe as error:
        reason = RejectReason.NO_SPACE if _is_out_of_space(error.__cause__) else RejectReason.BAD_BUNDLE
        raise Failed(reason, str(error)) from error


def _is_out_of_space(cause: BaseException | None) -> bool:
    """A full disk is this device's fault, never the bundle's."""
    return isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}


def _check_release(request: TrialRequest, manifest: Manifest, path: Path) -> None:
    """Raise `Failed` when the bundle is not the release that was signed."""
    if request.manifest_sha256 not in {None, digest_of(path.read_bytes())}:
        raise Failed(RejectReason.WRONG_RELEASE, "the manifest is not the one that was signed")
    signed = (request.model, request.version, request.variant, request.task)
    found = (manifest.model, manifest.version, manifest.variant, manifest.task)
    if request.model and signed != found:
        raise Failed(
            RejectReason.WRONG_RELEASE,
            f"{_release(*signed)} was signed, the bundle says it is {_release(*found)}",
        )


def _release(model: str, version: int, variant: str, task: str) -> str:
    return f"{model} {version} {variant} ({msgspec.to_builtins(task)})"


# ---------------------------------------------------------------- the model
def _passed(request: TrialRequest, servable: Servable, network: str) -> TrialVerdict:
    runtime = _import_runtime(servable, request)
    _limit(request)
    before = memory_use()
    try:
        model = load_one(servable, Settings(runtime=runtime.value))
        golden = run_golden(servable, model)
        latency_us = _latency_us(model)
    except WrongTensors as error:
        raise Failed(RejectReason.DOES_NOT_FIT, str(error)) from error
    except (CannotServe, RuntimeError) as error:
        raise Failed(RejectReason.SELFTEST_FAILED, str(error)) from error
    peak = growth(before, memory_use())
    model.close()
    return TrialVerdict(
        passed=True,
        ladder=_ladder(request, servable),
        runtime=runtime,
        latency_us=latency_us,
        peak_memory=peak,
        golden=golden,
        network=network,
    )


def _ladder(request: TrialRequest, servable: Servable) -> tuple[Rung, ...]:
    """Measure in children of this process: they have no network either, and the same limits each."""
    if not request.ladder_seconds:
        return ()
    return climb_in_trial(
        servable,
        os.cpu_count() or 1,
        runtime=request.runtime,
        seconds=request.ladder_seconds,
        delegates=request.delegates,
    )


def _import_runtime(servable: Servable, request: TrialRequest) -> RuntimeName:
    """Import the runtime before the memory is limited: its own code is not the candidate's doing."""
    try:
        return import_runtime(choose_runtime(servable, Settings(runtime=request.runtime)))
    except (CannotServe, RuntimeMissing, ValueError) as error:
        raise Failed(RejectReason.DOES_NOT_FIT, str(error)) from error


def _limit(request: TrialRequest) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + request.cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    data = memory_use().data + request.memory_bytes
    more = max((delegate.memory_bytes for delegate in request.delegates), default=0)  # for the children that load one
    resource.setrlimit(resource.RLIMIT_DATA, (data, data + more))


def _latency_us(model: LoadedModel) -> int:
    """Return the median of warm runs; a slow model gets fewer, for its trial has to end."""
    one = measure_latency(model, time.perf_counter_ns, warm_up=1, runs=1).median_us
    runs = min(RUNS, max(MIN_RUNS, MEASURE_US // max(1, one)))
    return measure_latency(model, time.perf_counter_ns, warm_up=MIN_RUNS, runs=runs).median_us


if __name__ == "__main__":
    sys.exit(main())
