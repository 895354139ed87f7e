"""A device that becomes too hot and cools down again: real data planes, a made-up tree of /sys."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from dataplane_parts import PATIENCE, Control, UnixClient, control_side, heldout, store

from agent.adapters.sensors import MachineSensors
from agent.channel import Serving
from agent.core.governor import Governor, GovernorPolicy
from agent.governing import Governing
from agent.ports import DataPlaneExit
from protocol.states import EventKind

POLICY = GovernorPolicy(step_seconds=10, back_seconds=60)


class Device:
    """A machine whose heat the test sets, and the log of its events. Its seconds pass as fast as the test likes."""

    def __init__(self, root: Path, control: Control) -> None:
        self._zone = root / "sys" / "class" / "thermal" / "thermal_zone0"
        self._zone.mkdir(parents=True)
        (self._zone / "type").write_text("cpu-thermal\n")
        self._control = control
        self._governing = Governing(
            sensors=MachineSensors(root=root),
            governor=Governor(POLICY, interpreters=2, threads=2),
            plane=control.supervisor,
            events=self,
        )
        self._seconds = 0.0
        self.events: list[str] = []

    def record(self, *, kind: EventKind, detail: str = "", **_: object) -> None:
        assert kind is EventKind.GOVERNOR
        self.events.append(detail)

    def pass_seconds(self, seconds: int, degrees: float) -> None:
        (self._zone / "temp").write_text(f"{degrees * 1000:.0f}\n")
        for _ in range(seconds):
            self._governing.decide(self._governing.feel(self._seconds))
            self._seconds += 1

    # ------------------------------------------------------------ as a client sees it
    def ask(self, priority: int) -> tuple[int, str | None, str]:
        """Return status, Retry-After and body."""
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "INT8",
                        "shape": [1, 8, 8, 1],
                        "parameters": {"binary_data_size": 64},
                    }
                ],
                "parameters": {"priority": priority},
            }
        ).encode()
        client = UnixClient(self._control.unix)
        client.request(
            "POST",
            "/v2/models/digits/infer",
            body=head + IMAGE,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        response = client.getresponse()
        body = response.read().decode("utf-8", "replace")
        client.close()
        return response.status, response.getheader("Retry-After"), body

    def statuses(self) -> tuple[int, int]:
        """Return how priorities 1 and 9 are answered."""
        return self.ask(1)[0], self.ask(9)[0]

    def level(self) -> str:
        """Return the line of /metrics."""
        client = UnixClient(self._control.unix)
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
        client.close()
        return next((line for line in text.splitlines() if line.startswith("edgewarden_governor_level")), "")


IMAGE = np.ascontiguousarray(heldout()[0][0]).tobytes()


def eventually(expected: object, look: Callable[[], object]) -> None:
    """Orders are not answered: wait until what they lead to is seen."""
    deadline = time.monotonic() + PATIENCE
    while (seen := look()) != expected:
        assert time.monotonic() < deadline, f"{seen!r} is not {expected!r}"
        time.sleep(0.01)


def test_heat_sheds_what_may_wait_also_in_a_restarted_data_plane_and_all_is_normal_when_it_is_cool(
    tmp_path: Path,
) -> None:
    with control_side(tmp_path, ["--instances", "2", "--threads", "2"]) as control:
        device = Device(tmp_path / "machine", control)
        device.pass_seconds(5, 55)
        assert isinstance(control.serve(store(tmp_path, "v2", 2)), Serving)
        assert (200, 200) == device.statuses()
        eventually("edgewarden_governor_level 0", device.level)

        device.pass_seconds(31, 83)
        eventually("edgewarden_governor_level 3", device.level)
        assert device.ask(1)[0] == 200
        status, retry_after, body = device.ask(9)
        assert (503, "30") == (status, retry_after)
        assert "the device is in distress; only priorities up to 5 are answered now" in body

        pid = control.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert isinstance(control.wait_for_end(pid), DataPlaneExit)
        eventually((200, 503), device.statuses)
        assert device.level() == "edgewarden_governor_level 3"

        device.pass_seconds(181, 60)
        eventually("edgewarden_governor_level 0", device.level)
        assert (200, 200) == device.statuses()

    less = "shadow paused, 1 of 2 interpreters"
    least = f"{less}, 1 of 2 threads each"
    assert [
        f"heat: 83.0 °C for 10 s, limit 80.0 °C: {less} (normal → eased)",
        f"heat: 83.0 °C for 20 s, limit 80.0 °C: {least} (eased → strained)",
        f"heat: 83.0 °C for 30 s, limit 80.0 °C: {least}, only priorities 1 to 5 are answered (strained → distress)",
        f"better for 60 s (heat 60.0 °C): {least} (distress → strained)",
        f"better for 120 s (heat 60.0 °C): {less} (strained → eased)",
        "better for 180 s (heat 60.0 °C): everything as it is set (eased → normal)",
    ] == device.events
