"""What this machine tells of its distress, from the files of /sys and /proc: heat, throttling, memory, power.

Read anew each time, for sensors come and go. What the machine cannot tell is None, never zero: a file that is absent,
refuses to be read or holds nonsense says nothing, and the others still count. From when on it is distress is decided
in `agent.core.governor`.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from agent.core.governor import Readings

log = logging.getLogger(__name__)

_CAP = 8192  # bytes of a file; /proc/meminfo takes two thousand
_PLAUSIBLE = range(-50_000, 200_000)  # 0.001 °C; sensors that are absent read -274 or 255 °C
_OF_THE_CPU = re.compile(r"cpu|soc|core|cluster|package|pkg|k10temp|zenpower|bcm2|imx|^tj", re.IGNORECASE)
_SLOWS_THE_CPU = re.compile(r"cpufreq|^Processor$|thermal-idle")
# Bits of what a Raspberry Pi's firmware says of now. The next one, the soft limit at 60 °C, is no distress.
_UNDER_VOLTAGE, _CAPPED, _THROTTLED = 1, 2, 4
_CHARGED = frozenset({"Charging", "Full", "Not charging"})
_MEMINFO = re.compile(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", re.MULTILINE)
_STALL = re.compile(r"^some avg10=(\d+(?:\.\d+)?) ", re.MULTILINE)


class _Heat(NamedTuple):
    sensor: str
    millidegrees: int


class MachineSensors:
    """`agent.ports.Sensors` on the real machine."""

    def __init__(self, sensor: str = "", root: Path = Path("/")) -> None:
        """``sensor``: the one whose heat counts, by name; empty: those of the CPU. ``root``: holds sys and proc."""
        self._sensor = sensor
        self._sys = root / "sys"
        self._proc = root / "proc"
        self._said = False

    def read(self) -> Readings:
        """Return what is true now; sensors that are slow to answer make it slow."""
        battery, discharging = self._battery()
        said = self._firmware()
        return Readings(
            temperature=self._temperature(),
            throttled=self._throttled(said),
            frequency=self._frequency(),
            memory=self._memory(),
            stall=self._stall(),
            under_voltage=self._under_voltage(said),
            battery=battery,
            discharging=discharging,
        )

    # ------------------------------------------------------------ heat
    def _temperature(self) -> float | None:
        known = list(self._heats())
        right = [one.millidegrees for one in known if self._counts(one.sensor)]
        if known and not right and not self._said:
            self._said = True
            names = ", ".join(sorted({one.sensor for one in known}))
            log.warning("no sensor of the CPU is known here; governor.sensor may name one of: %s", names)
        return max(right) / 1000 if right else None

    def _counts(self, sensor: str) -> bool:
        return sensor == self._sensor if self._sensor else bool(_OF_THE_CPU.search(sensor))

    def _heats(self) -> Iterator[_Heat]:
        for zone in self._glob("class/thermal/thermal_zone*"):
            yield from _heats_of(_text(zone / "type"), [zone / "temp"])
        for chip in self._glob("class/hwmon/hwmon*"):
            yield from _heats_of(_text(chip / "name"), sorted(chip.glob("temp*_input")))

    # ------------------------------------------------------------ throttling
    def _firmware(self) -> int | None:
        """Return what a Raspberry Pi's firmware says."""
        for file in self._glob("devices/platform/soc*/*firmware/get_throttled"):
            try:
                return int(_text(file) or "", 16)
            except ValueError:
                continue
        return None

    def _throttled(self, firmware: int | None) -> bool | None:
        signs = [] if firmware is None else [bool(firmware & (_CAPPED | _THROTTLED))]
        for device in self._glob("class/thermal/cooling_device*"):
            state = _number(device / "cur_state")
            if state is not None and _SLOWS_THE_CPU.search(_text(device / "type") or ""):
                signs.append(state > 0)
        return any(signs) if signs else None

    def _frequency(self) -> float | None:
        shares = []
        for policy in self._glob("devices/system/cpu/cpufreq/policy*"):
            allowed, highest = _number(policy / "scaling_max_freq"), _number(policy / "cpuinfo_max_freq")
            if allowed and highest:
                shares.append(100.0 * allowed / highest)
        return min(shares, default=None)

    # ------------------------------------------------------------ memory
    def _memory(self) -> float | None:
        found = {name: int(kib) for name, kib in _MEMINFO.findall(_text(self._proc / "meminfo") or "")}
        total, available = found.get("MemTotal"), found.get("MemAvailable")
        return 100.0 * available / total if total and available is not None else None

    def _stall(self) -> float | None:
        found = _STALL.search(_text(self._proc / "pressure" / "memory") or "")
        return float(found[1]) if found else None

    # ------------------------------------------------------------ power
    def _under_voltage(self, firmware: int | None) -> bool | None:
        signs = [] if firmware is None else [bool(firmware & _UNDER_VOLTAGE)]
        for chip in self._glob("class/hwmon/hwmon*"):
            alarm = _number(chip / "in0_lcrit_alarm")
            if alarm is not None and _text(chip / "name") == "rpi_volt":
                signs.append(alarm > 0)
        return any(signs) if signs else None

    def _battery(self) -> tuple[float | None, bool | None]:
        """Return how full this machine's batteries are on the whole, and whether one of them is being emptied."""
        capacities, states = [], []
        for supply in self._glob("class/power_supply/*"):
            if _text(supply / "type") != "Battery" or _text(supply / "scope") == "Device":  # a mouse has one too
                continue
            capacity = _number(supply / "capacity")
            if capacity is not None and 0 <= capacity <= 100:  # noqa: PLR2004 - per cent
                capacities.append(capacity)
                states.append(_text(supply / "status"))
        return _mean(capacities), _is_discharging(states)

    def _glob(self, pattern: str) -> list[Path]:
        try:
            return sorted(self._sys.glob(pattern))
        except OSError:
            return []


def _heats_of(sensor: str | None, files: Iterable[Path]) -> Iterator[_Heat]:
    for file in files:
        millidegrees = _number(file)
        if sensor and millidegrees is not None and millidegrees in _PLAUSIBLE:
            yield _Heat(sensor, millidegrees)


def _is_discharging(states: list[str | None]) -> bool | None:
    if "Discharging" in states:
        return True
    return False if any(state in _CHARGED for state in states) else None


def _mean(numbers: list[int]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> str | None:
    """Return a file's text, or None when it has none to give: many a driver answers with an error."""
    try:
        with path.open("rb") as file:
            return file.read(_CAP).decode("utf-8", "replace").strip()
    except OSError:
        return None
