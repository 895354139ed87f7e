"""Applies deltas in a short-lived child (port `Rebuilds`).

Knows how the child is asked, and what it may take. What a delta makes is worth nothing before its length and hash
were compared with the signed ones, which `BundleDownloads` does.
"""

import sys
from collections.abc import Collection
from importlib.util import find_spec

import msgspec

from agent.adapters.limited_child import LimitedChild
from agent.channel import RebuildRequest, RebuildVerdict
from agent.core.downloading import REBUILD_FACTOR
from agent.ports import Rebuilding
from protocol.release import BSDIFF, ZSTD, ZSTD_PATCH

WALL_SECONDS = 120.0
CPU_SECONDS = 60
MEMORY_MARGIN = 32 * 1024 * 1024  # bytes: bz2 and zstd take some, however small the bundle is
LIBRARIES = {ZSTD: "zstandard", ZSTD_PATCH: "zstandard", BSDIFF: "bsdiff4"}


class RebuildChild:
    """Runs ``python -m agent.inference.rebuild``."""

    def __init__(
        self,
        *,
        wall_seconds: float = WALL_SECONDS,
        cpu_seconds: int = CPU_SECONDS,
        memory_margin: int = MEMORY_MARGIN,
        python: str = sys.executable,
    ) -> None:
        """``memory_margin``: bytes beyond those that grow with the bundle."""
        self._cpu_seconds = cpu_seconds
        self._memory_margin = memory_margin
        self._child = LimitedChild("agent.inference.rebuild", wall_seconds=wall_seconds, python=python)

    def methods(self) -> Collection[str]:
        return installed_methods()

    def rebuild(self, wanted: Rebuilding) -> str:
        request = RebuildRequest(
            method=wanted.method,
            base=wanted.base,
            folder=wanted.folder,
            delta=wanted.delta,
            made=wanted.made,
            length=wanted.length,
            memory_bytes=wanted.length * REBUILD_FACTOR + self._memory_margin,
            cpu_seconds=self._cpu_seconds,
        )
        heard = self._child.ask(msgspec.json.encode(request))
        if trouble := heard.trouble(self._cpu_seconds):
            return f"the child that applies it {trouble}"
        try:
            return msgspec.json.decode(bytes(heard.answer), type=RebuildVerdict).trouble
        except (msgspec.DecodeError, UnicodeDecodeError):
            return "the child that applies it said nothing sensible"


def installed_methods() -> tuple[str, ...]:
    """Return which methods this device can apply; their libraries are looked for, not loaded."""
    return tuple(method for method, library in LIBRARIES.items() if find_spec(library) is not None)
