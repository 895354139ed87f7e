"""Measures how long clients wait when the data plane is killed, and when it is replaced as planned.

The real supervisor watches a real data plane, with and without a spare. Two clients ask 200 times a second each: one
keeps its connection (and asks again when it breaks, as `agent.client` does), one makes a connection for every request
and never asks twice.
"""

import itertools
import os
import signal
import socket
import statistics
import threading
import time

from parts import RUNTIMES, Plane, load, note, options, plane, pss_mb, result, until

from agent.ports import DataPlaneExit

REQUEST = (
    b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Inference-Header-Content-Length: 0\r\nContent-Length: 64\r\n\r\n" + bytes(64)
)


def main() -> None:
    """Answer the question."""
    given = options(__doc__ or "", 10)
    rounds = 3 if given.quick else given.rounds
    result("restart", **{runtime: measure(runtime, rounds) for runtime in RUNTIMES})


def measure(runtime: str, rounds: int) -> dict[str, object]:
    """Return what kills and planned restarts did."""
    with_spare = [killed(runtime, k, rounds, spare=True) for k in range(rounds)]
    without = [killed(runtime, k, rounds, spare=False) for k in range(rounds)]
    with plane(runtime) as served:
        served.serve(served.publish("v1", 1))
        planned = [after(replace, served, k, rounds) for k in range(rounds)]
    return {
        "kill": {**summed(with_spare), "spare_mb": median(with_spare, "spare_mb")},
        "kill_without_spare": summed(without),
        "planned": summed(planned),
    }


def killed(runtime: str, k: int, rounds: int, *, spare: bool) -> dict[str, float]:
    """Kill one data plane under a supervisor of its own: one that sees many deaths waits before it starts."""
    with plane(runtime, spare=spare) as served:
        served.serve(served.publish("v1", 1))
        pss = 0.0
        if spare:
            until(lambda: served.supervisor.spare_pid is not None)
            time.sleep(1)  # it imports what it was told to
            pss = pss_mb(served.supervisor.spare_pid or 0)
        return {**after(kill, served, k, rounds), "spare_mb": pss}


class Newcomer:
    """Connects anew for every request, and never asks twice."""

    def __init__(self, unix: str) -> None:
        """Begin at once."""
        self.refused = self.failed = self.answered = 0
        self._unix = unix
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Stop asking."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.005):
            try:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(self._unix)
                    sock.sendall(REQUEST)
                    is_answered = sock.recv(65536).startswith(b"HTTP/1.1 200")
            except ConnectionRefusedError:
                self.refused += 1
            except OSError:
                self.failed += 1
            else:
                self.answered += is_answered
                self.failed += not is_answered


def after(restart: object, served: Plane, k: int, rounds: int) -> dict[str, float]:
    """Restart under load, and return what the clients saw."""
    assert callable(restart)
    newcomer = Newcomer(served.unix)
    with load(served.unix) as asking:
        time.sleep(0.5)
        pid, began, counted = served.supervisor.pid, time.monotonic(), len(asking.latencies)
        restart(served)
        served.wait_for(lambda event: isinstance(event, DataPlaneExit) and event.pid == pid)
        until(lambda: served.supervisor.pid not in {None, pid} and asking.answered_at[-1] > time.monotonic() - 0.02)
        time.sleep(0.5)
    newcomer.stop()
    gap = longest_gap([began, *(at for at in asking.answered_at if at > began)])
    note(f"  {k + 1}/{rounds} {getattr(restart, '__name__', '')}: longest gap {gap * 1000:.0f} ms")
    return {
        "gap_ms": gap * 1000,
        "worst_ms": asking.worst_ms(counted),
        "failed_kept_alive": len(asking.failures),
        "failed_new_connections": newcomer.failed,
        "refused": newcomer.refused,
        "requests": len(asking.latencies) + newcomer.answered,
    }


def kill(served: Plane) -> None:
    """Kill the data plane as the kernel would when memory runs out."""
    os.kill(served.supervisor.pid or 0, signal.SIGKILL)


def replace(served: Plane) -> None:
    """Have the data plane replaced."""
    served.supervisor.restart_planned()


def longest_gap(moments: list[float]) -> float:
    """Return the longest time without an answer, in seconds."""
    return max(b - a for a, b in itertools.pairwise(moments))


def median(rounds: list[dict[str, float]], name: str) -> float:
    """Return the median of a figure."""
    return round(statistics.median(one[name] for one in rounds), 1)


def summed(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return medians and sums over the rounds."""
    return {
        "next_answer_ms_p50": median(rounds, "gap_ms"),
        "next_answer_ms_worst": round(max(one["gap_ms"] for one in rounds), 1),
        **{
            name: sum(one[name] for one in rounds)
            for name in ("failed_kept_alive", "failed_new_connections", "refused", "requests")
        },
    }


if __name__ == "__main__":
    main()
