"""Measures what many swaps under load do to clients and to memory, and how long a rollback takes.

The real supervisor orders a real data plane to swap the two digits bundles in turn, while a client asks 200 times a
second. Latency counts from when a request was due, so that a stall shows in full.
"""

import statistics
import time

from parts import RUNTIMES, Plane, load, note, options, plane, pss_mb, result

WARM_UP = 20  # swaps before memory is read for the first time: by then what is loaded once is loaded
ROLLBACKS = 20
NOTED = 100  # swaps between two notes


def main() -> None:
    """Answer the question; ``--rounds`` is the number of swaps."""
    given = options(__doc__ or "", 1000)
    swaps = 100 if given.quick else given.rounds
    result("swap", **{runtime: measure(runtime, swaps) for runtime in RUNTIMES})


def measure(runtime: str, swaps: int) -> dict[str, object]:
    """Return what so many swaps did."""
    note(f"{swaps} swaps of digits on {runtime}, 200 requests/s")
    with plane(runtime) as served:
        first, second = served.publish("v1", 1), served.publish("v2", 2)
        served.serve(first)
        with load(served.unix) as asking:
            time.sleep(3)
            quiet = len(asking.latencies)
            took = [served.serve((second, first)[k % 2]) for k in range(WARM_UP)]
            before = memory(served)
            for k in range(swaps):
                took.append(served.serve((second, first)[k % 2]))
                if (k + 1) % NOTED == 0:
                    note(f"  {k + 1} swaps, {memory(served):.1f} MB, worst {asking.worst_ms(quiet)} ms")
            after = memory(served)
            rollbacks = [served.serve((second, first)[k % 2]) for k in range(ROLLBACKS)][1::2]
    late = sorted(asking.latencies[quiet:])
    return {
        "swaps": swaps,
        "requests": len(asking.latencies),
        "failed": len(asking.failures),
        "failures": asking.failures[:3],
        "swap_ms_p50": round(statistics.median(took), 1),
        "rollback_ms_p50": round(statistics.median(rollbacks), 1),
        "rollback_ms_worst": round(max(rollbacks), 1),
        "growth_mb": round(after - before, 2),
        "latency_ms_p99": round(late[len(late) * 99 // 100] * 1000, 1),
        "latency_ms_worst": round(late[-1] * 1000, 1),
        "latency_ms_worst_before_swaps": round(max(asking.latencies[:quiet]) * 1000, 1),
    }


def memory(served: Plane) -> float:
    """Return the data plane's memory, in MB."""
    pid = served.supervisor.pid
    return pss_mb(pid) if pid else 0.0


if __name__ == "__main__":
    main()
