"""What a machine tells of its distress, on made-up trees of /sys and /proc. Each case is a few files."""

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.adapters.sensors import MachineSensors
from agent.core.governor import Readings

ZONE, CHIP = "sys/class/thermal/thermal_zone", "sys/class/hwmon/hwmon"
POLICY = "sys/devices/system/cpu/cpufreq/policy"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
SUPPLY = "sys/class/power_supply"
MEMINFO = "MemTotal:        1000000 kB\nMemFree:           10000 kB\nMemAvailable:      45000 kB\nBuffers: 1 kB\n"
PRESSURE = "some avg10=12.34 avg60=1.00 avg300=0.10 total=5\nfull avg10=9.99 avg60=0.00 avg300=0.00 total=1\n"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return root


def zone(number: int, kind: str, temperature: str) -> dict[str, str]:
    return {f"{ZONE}{number}/type": kind, f"{ZONE}{number}/temp": temperature}


def battery(name: str, capacity: int, status: str, **more: str) -> dict[str, str]:
    files = {"type": "Battery", "capacity": str(capacity), "status": status, **more}
    return {f"{SUPPLY}/{name}/{file}": text for file, text in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, Readings(), id="nothing-is-absent-not-zero"),
        pytest.param(zone(0, "cpu-thermal", "83000"), Readings(temperature=83.0), id="a-zone"),
        pytest.param(
            zone(0, "soc-thermal", "61000") | zone(1, "bigcore0-thermal", "83500") | zone(2, "gpu-thermal", "99000"),
            Readings(temperature=83.5),
            id="the-hottest-of-the-cpu",
        ),
        pytest.param(
            {
                f"{CHIP}0/name": "nvme",
                f"{CHIP}0/temp1_input": "90000",
                f"{CHIP}1/name": "coretemp",
                f"{CHIP}1/temp1_input": "51000",
                f"{CHIP}1/temp2_input": "52000",
            },
            Readings(temperature=52.0),
            id="a-chip",
        ),
        pytest.param(
            zone(0, "cpu0", "-274000") | zone(1, "cpu1", "255000") | zone(2, "cpu2", "") | zone(3, "cpu3", "hot"),
            Readings(),
            id="implausible",
        ),
        pytest.param({FIRMWARE: "0"}, Readings(throttled=False, under_voltage=False), id="pi-fine"),
        pytest.param({FIRMWARE: "50000"}, Readings(throttled=False, under_voltage=False), id="pi-was-not-is"),
        pytest.param({FIRMWARE: "50005"}, Readings(throttled=True, under_voltage=True), id="pi-throttled-for-volts"),
        pytest.param({FIRMWARE: "20002"}, Readings(throttled=True, under_voltage=False), id="pi-capped"),
        pytest.param({FIRMWARE: "80008"}, Readings(throttled=False, under_voltage=False), id="pi-soft-limit"),
        pytest.param({FIRMWARE: "?"}, Readings(), id="pi-nonsense"),
        pytest.param(
            {f"{CHIP}3/name": "rpi_volt", f"{CHIP}3/in0_lcrit_alarm": "1"}, Readings(under_voltage=True), id="hwmon"
        ),
        pytest.param(
            {
                "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
                "sys/class/thermal/cooling_device0/cur_state": "2",
                "sys/class/thermal/cooling_device1/type": "pwm-fan",
                "sys/class/thermal/cooling_device1/cur_state": "0",
            },
            Readings(throttled=True),
            id="the-kernel-cools-by-the-clock",
        ),
        pytest.param(
            {
                "sys/class/thermal/cooling_device0/type": "pwm-fan",
                "sys/class/thermal/cooling_device0/cur_state": "4",
            },
            Readings(),
            id="a-fan-is-no-throttling",
        ),
        pytest.param(
            {
                f"{POLICY}0/scaling_max_freq": "1800000",
                f"{POLICY}0/cpuinfo_max_freq": "1800000",
                f"{POLICY}4/scaling_max_freq": "1200000",
                f"{POLICY}4/cpuinfo_max_freq": "2400000",
            },
            Readings(frequency=50.0),
            id="the-lowest-cap",
        ),
        pytest.param({f"{POLICY}0/scaling_max_freq": "1800000"}, Readings(), id="half-a-policy"),
        pytest.param({"proc/meminfo": MEMINFO}, Readings(memory=4.5), id="memory"),
        pytest.param({"proc/meminfo": "MemTotal: 1000 kB\n"}, Readings(), id="an-old-kernel"),
        pytest.param({"proc/pressure/memory": PRESSURE}, Readings(stall=12.34), id="stall"),
        pytest.param(battery("BAT0", 18, "Discharging"), Readings(battery=18.0, discharging=True), id="battery"),
        pytest.param(battery("BAT0", 18, "Charging"), Readings(battery=18.0, discharging=False), id="charging"),
        pytest.param(battery("ups", 18, "Unknown"), Readings(battery=18.0, discharging=None), id="who-knows"),
        pytest.param(
            battery("BAT0", 100, "Full") | battery("BAT1", 20, "Discharging"),
            Readings(battery=60.0, discharging=True),
            id="two-batteries",
        ),
        pytest.param(battery("hidpp_battery_0", 3, "Discharging", scope="Device"), Readings(), id="of-a-mouse"),
        pytest.param({f"{SUPPLY}/AC/type": "Mains", f"{SUPPLY}/AC/online": "1"}, Readings(), id="mains"),
    ],
)
def test_a_machine_tells_what_it_can(tmp_path: Path, files: Mapping[str, str], expected: Readings) -> None:
    assert expected == MachineSensors(root=machine(tmp_path, files)).read()


def test_a_sensor_that_goes_away_is_absent_from_then_on(tmp_path: Path) -> None:
    sensors = MachineSensors(root=machine(tmp_path, zone(0, "cpu-thermal", "70000")))
    assert 70.0 == sensors.read().temperature
    (tmp_path / f"{ZONE}0/temp").unlink()
    assert sensors.read().temperature is None


def test_the_sensor_of_the_settings_counts_and_no_other(tmp_path: Path) -> None:
    root = machine(tmp_path, zone(0, "cpu-thermal", "70000") | zone(1, "acpitz", "40000"))
    assert 40.0 == MachineSensors("acpitz", root).read().temperature
    assert MachineSensors("nowhere", root).read().temperature is None


def test_a_machine_whose_sensors_are_not_known_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sensors = MachineSensors(root=machine(tmp_path, zone(0, "acpitz", "40000") | zone(1, "iwlwifi_1", "50000")))
    assert [None, None] == [sensors.read().temperature for _ in range(2)]
    assert ["acpitz, iwlwifi_1"] == [str(record.args[0]) for record in caplog.records if record.args]
    assert logging.WARNING == caplog.records[0].levelno


def test_this_machine_tells_of_its_memory() -> None:
    memory = MachineSensors().read().memory
    assert memory is not None
    assert 0 < memory < 100
