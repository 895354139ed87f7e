"""Readings of this machine. The only importer of psutil.

Rates (CPU, network) are over the time since the last call. What the machine cannot tell is None, never zero, and
no vanished process, missing sensor or locked-down /proc makes a reading fail: the other readings still count.
What the readings mean is decided elsewhere.
"""

import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from protocol.messages import Resources

log = logging.getLogger(__name__)

T = TypeVar("T")
_LOOPBACK = "lo"  # local clients' traffic costs nobody anything
_PLAUSIBLE_TENTHS = range(-500, 2000)  # 0.1 °C; sensors that are absent read -274 or 255 °C


class MachineHost:
    """`agent.ports.Host` on the real machine."""

    def __init__(self, state_folder: Path) -> None:
        """``state_folder``: where the models live; its file system's free space is reported."""
        self._state_folder = state_folder
        self._said: set[str] = set()
        self._network = self._ask("network", _network_totals)
        self._ask("cpu", lambda: psutil.cpu_percent(interval=None))  # the first call only starts the measurement

    def read(self, data_plane_pid: int | None) -> Resources:
        """Return the readings since the last call; one thread calls."""
        memory = self._ask("memory", psutil.virtual_memory)
        received, sent = self._network_since_last_call()
        return Resources(
            cpu=self._ask("cpu", _cpu_per_mille),
            memory=memory.total - memory.available if memory else None,
            memory_total=memory.total if memory else None,
            control_rss=_rss(os.getpid()),
            data_plane_rss=None if data_plane_pid is None else _rss(data_plane_pid),
            network_in=received,
            network_out=sent,
            disk_free=self._ask("disk", lambda: int(psutil.disk_usage(str(self._state_folder)).free)),
            temperature=self._ask("temperature", _hottest),
        )

    def memory_available(self) -> int | None:
        """Return how many bytes programs may still take without swapping; any thread may ask."""
        memory = self._ask("memory", psutil.virtual_memory)
        return int(memory.available) if memory else None

    def facts(self) -> dict[str, str]:
        """Return what does not change while the agent runs; an unknown fact is left out."""
        memory = self._ask("memory", psutil.virtual_memory)
        known = {
            "machine": platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cpus": str(os.cpu_count() or ""),
            "memory": str(memory.total) if memory else "",
            "os": _os_name(),
        }
        return {name: value for name, value in known.items() if value}

    def _network_since_last_call(self) -> tuple[int | None, int | None]:
        before, self._network = self._network, self._ask("network", _network_totals)
        if before is None or self._network is None:
            return None, None
        received, sent = self._network[0] - before[0], self._network[1] - before[1]
        if received < 0 or sent < 0:
            return None, None  # an interface went away or its counter wrapped: the difference says nothing
        return received, sent

    def _ask(self, what: str, read: Callable[[], T]) -> T | None:
        """Return a reading, or None when this machine cannot tell; say so once, not every minute."""
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - psutil passes on whatever /proc and /sys hold, ValueError and KeyError too
            if what not in self._said:
                self._said.add(what)
                log.warning("this machine does not tell its %s: %s", what, error)
            return None


def _cpu_per_mille() -> int:
    return round(psutil.cpu_percent(interval=None) * 10)


def _network_totals() -> tuple[int, int]:
    counters = psutil.net_io_counters(pernic=True)
    outside = [counter for name, counter in counters.items() if name != _LOOPBACK]
    return sum(counter.bytes_recv for counter in outside), sum(counter.bytes_sent for counter in outside)


def _rss(pid: int) -> int | None:
    """Return the resident memory of a process, or None when it is gone or hidden: it may end at any moment."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except (psutil.Error, OSError, ValueError):
        return None


def _hottest() -> int | None:
    """Return the hottest plausible sensor in 0.1 °C."""
    read = getattr(psutil, "sensors_temperatures", None)  # absent where the platform has no sensors
    sensors = read() if read else {}
    tenths = [round(sensor.current * 10) for group in sensors.values() for sensor in group]
    return max((value for value in tenths if value in _PLAUSIBLE_TENTHS), default=None)


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""
