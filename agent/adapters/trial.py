"""Tries a candidate in a short-lived child, and turns whatever becomes of the child into a verdict.

Implements `agent.ports.Trials`. A child that hangs, dies, or says nothing sensible is a failed verdict that names how
it ended.
"""

import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from agent.adapters.limited_child import Heard, LimitedChild
from agent.channel import TrialRequest, TrialVerdict
from agent.core.delegates import Delegate
from agent.ports import Target
from protocol.states import RejectReason

WALL_SECONDS = 60.0
CPU_SECONDS = 30
MEMORY_FACTOR = 2  # over what the packer measured: another machine and another runtime take more
MEMORY_MARGIN = 16 * 1024 * 1024  # bytes
SELFTEST_FAILED = RejectReason.SELFTEST_FAILED.value


class TrialChild:
    """Runs ``python -m agent.inference.trial``."""

    def __init__(
        self,
        *,
        runtime: str = "auto",
        wall_seconds: float = WALL_SECONDS,
        ladder_seconds: float = 0.0,
        delegates: Sequence[Delegate] = (),
        cpu_seconds: int = CPU_SECONDS,
        memory_factor: int = MEMORY_FACTOR,
        memory_margin: int = MEMORY_MARGIN,
        python: str = sys.executable,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``runtime``: ``auto`` or the one that is set; ``ladder_seconds``, ``delegates``: see `TrialRequest`."""
        self._runtime = runtime
        self._ladder_seconds = ladder_seconds
        self._delegates = tuple(delegates)
        self._cpu_seconds = cpu_seconds
        self._memory_factor = memory_factor
        self._memory_margin = memory_margin
        self._child = LimitedChild("agent.inference.trial", wall_seconds=wall_seconds, python=python, clock=clock)

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:
        request = self._request(bundle, folder, target)
        return self._judge(self._child.ask(msgspec.json.encode(request)))

    def _request(self, bundle: str, folder: str, target: Target) -> TrialRequest:
        release = target.release
        return TrialRequest(
            bundle=bundle,
            folder=folder,
            task=release.task,
            runtime=self._runtime,
            memory_bytes=release.needs.memory * self._memory_factor + self._memory_margin,
            cpu_seconds=self._cpu_seconds,
            model=release.model,
            version=release.version,
            variant=release.variant,
            ladder_seconds=self._ladder_seconds,
            delegates=self._delegates,
        )

    def _judge(self, heard: Heard) -> TrialVerdict:
        if trouble := heard.trouble(self._cpu_seconds):
            return _failed(f"the trial {trouble}")
        try:
            return msgspec.json.decode(bytes(heard.answer), type=TrialVerdict)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _failed("the trial ended without a verdict")


def _failed(detail: str) -> TrialVerdict:
    return TrialVerdict(passed=False, reason=SELFTEST_FAILED, detail=detail)
